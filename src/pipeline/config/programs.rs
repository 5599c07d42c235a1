//! Checks of the programs and scripts that `exec` stages run.

use std::env;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::diagnostic::{At, Diagnostic};
use super::paths::shown;
use super::pipeline::PipelineSpec;
use super::secrets::Secrets;
use super::source::KeyPath;
use super::suggest::suggest;
use crate::stages::{Exec, StageSpec, is_executable};
use ovchat_io::files;

/// Reports the programs of `exec` stages that cannot be started. They are looked up as the system
/// does: relative to the folder of the stage if the name contains a `/`, otherwise in the
/// directories of `PATH`. Also reports scripts among the arguments that do not exist, or whose
/// changes would go unnoticed.
pub fn unstartable(written: &PipelineSpec, secrets: &Secrets) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    for (stage, _) in written.all_stages() {
        if let Some(StageSpec::Exec(exec)) = &stage.spec
            && let Some(program) = exec.program()
        {
            let command = stage.settings.key("command");
            let at = At::value(command.index(0));
            let missing = no_program(exec, program, at, secrets);
            let missing = missing
                .into_iter()
                .chain(no_script(exec, &command, secrets));
            let before = diagnostics.len();
            diagnostics.extend(missing);
            if diagnostics.len() == before {
                diagnostics.extend(unwatched(exec, &command, secrets));
            }
        }
    }
    diagnostics
}

const NO_PROGRAM: &str = "config::no_program";

/// The shortest program name for which a similar one is suggested.
const GUESSED_MIN: usize = 4;

fn no_program(exec: &Exec, program: &str, at: At, secrets: &Secrets) -> Option<Diagnostic> {
    let diagnostic = |message: String| Diagnostic::new(NO_PROGRAM, at.clone(), message);
    if program.contains('/') {
        let path = exec.folder().join(program.trim_start_matches("./"));
        let name = shown(&path, secrets);
        return match path.metadata() {
            Ok(found) if !found.is_file() => Some(diagnostic(format!("`{name}` is not a file"))),
            Ok(_) if !is_executable(&path) => {
                let help = format!("run `chmod +x {name}`");
                Some(diagnostic(format!("`{name}` is not executable")).help(help))
            }
            Ok(_) => no_interpreter(exec, &path, at.clone(), secrets),
            Err(_) => Some(diagnostic(format!("program `{name}` does not exist"))),
        };
    }
    let folders = search_path(exec)?;
    if is_in(&folders, program) {
        return None;
    }
    let diagnostic = diagnostic(format!("program `{program}` was not found in PATH"));
    if exec.folder().join(program).is_file() {
        let help = format!("write `./{program}` to run the file next to the pipeline file");
        return Some(diagnostic.help(help));
    }
    // There are so many programs with short names that one of them is always similar.
    if program.len() < GUESSED_MIN {
        return Some(diagnostic);
    }
    let entries = folders.iter().filter_map(|folder| folder.read_dir().ok());
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    Some(diagnostic.suggest(suggest(program, names.iter().map(String::as_str))))
}

/// The directories of `PATH`.
fn search_path(exec: &Exec) -> Option<Vec<PathBuf>> {
    let path = env::var_os("PATH")?;
    let folders = env::split_paths(&path).map(|folder| exec.folder().join(folder));
    Some(folders.collect())
}

fn is_in(folders: &[PathBuf], program: &str) -> bool {
    folders
        .iter()
        .any(|folder| is_executable(&folder.join(program)))
}

/// Bytes of the first line of a script that the system reads.
const FIRST_LINE_MAX: u64 = 256;

/// Reports a script whose first line, `#!…`, names a program that does not exist.
fn no_interpreter(exec: &Exec, path: &Path, at: At, secrets: &Secrets) -> Option<Diagnostic> {
    let mut start = Vec::new();
    let file = files::open(path).ok()?;
    file.take(FIRST_LINE_MAX).read_to_end(&mut start).ok()?;
    let line = start
        .strip_prefix(b"#!")?
        .split(|&byte| byte == b'\n')
        .next()?;
    let line = String::from_utf8_lossy(line);
    let name = shown(path, secrets);
    if line.ends_with('\r') {
        let message = format!("the first line of `{name}` ends with a carriage return (\\r)");
        let help = "save the script with Unix line endings (\\n)";
        return Some(Diagnostic::new(NO_PROGRAM, at, message).help(help));
    }
    let mut words = line.split_whitespace();
    let interpreter = words.next()?;
    let missing = if is_executable(&exec.folder().join(interpreter)) {
        if Path::new(interpreter).file_name()? != "env" {
            return None;
        }
        let is_program = |word: &&str| !word.starts_with('-') && !word.contains(['=', '/']);
        let program = words.find(is_program)?;
        (!is_in(&search_path(exec)?, program)).then_some(program)?
    } else {
        interpreter
    };
    let message = format!("`{name}` starts with `#!{line}`, but program `{missing}` was not found");
    Some(Diagnostic::new(NO_PROGRAM, at, message))
}

/// The file extensions of scripts.
const SCRIPTS: [&str; 9] = ["py", "sh", "bash", "R", "r", "jl", "pl", "rb", "js"];

/// True if an argument names a script.
fn is_script(word: &str) -> bool {
    let end = Path::new(word).extension().and_then(|end| end.to_str());
    !word.starts_with('-')
        && !word.contains(char::is_whitespace)
        && end.is_some_and(|end| SCRIPTS.contains(&end))
}

/// Warns of the first program or script of the user in the command that `files` does not cover: the
/// table is not rebuilt when it changes.
fn unwatched(exec: &Exec, command: &KeyPath, secrets: &Secrets) -> Option<Diagnostic> {
    let is_watched = |path: &Path| {
        let path = path.canonicalize();
        path.is_ok_and(|path| {
            let mut files = exec
                .files
                .iter()
                .filter_map(|file| file.canonicalize().ok());
            files.any(|file| path.starts_with(file))
        })
    };
    let is_users = |number: usize, word: &str| match number {
        0 => word.contains('/') && !Path::new(word).is_absolute(),
        _ => is_script(word),
    };
    let mut words = exec.command.iter().enumerate();
    let (number, word) = words.find(|(number, word)| {
        let path = exec.folder().join(word);
        is_users(*number, word) && path.is_file() && !is_watched(&path)
    })?;
    let name = shown(Path::new(word), secrets);
    let message =
        format!("`{name}` is not listed in `files`: the table is not rebuilt when it changes");
    let diagnostic = Diagnostic::warning(
        "config::file_not_listed",
        At::value(command.index(number)),
        message,
    );
    Some(diagnostic.help(format!("add it to `files`: `files: [{name}]`")))
}

/// Reports the first argument that names a script if that file does not exist: an error for an
/// interpreter, which would fail, and a warning for other programs, which may create the file.
fn no_script(exec: &Exec, command: &KeyPath, secrets: &Secrets) -> Option<Diagnostic> {
    let mut words = exec.command.iter().enumerate().skip(1);
    let (number, script) = words.find(|(_, word)| is_script(word))?;
    let path = exec.folder().join(script);
    if path.exists() {
        return None;
    }
    let at = At::value(command.index(number));
    let message = format!("file `{}` does not exist", shown(&path, secrets));
    let diagnostic = if number == 1 && runs_scripts(exec.program()?) {
        Diagnostic::new("config::missing_file", at, message)
    } else {
        Diagnostic::warning("config::missing_file", at, message)
    };
    let names = path.parent()?.read_dir().into_iter().flatten();
    let names: Vec<String> = names
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let wanted = path.file_name()?.to_string_lossy().into_owned();
    Some(
        diagnostic
            .suggest(suggest(&wanted, names.iter().map(String::as_str)))
            .help(
                "give the path relative to the folder of the pipeline file, where the command runs",
            ),
    )
}

/// True if a program runs the file that its first argument names.
fn runs_scripts(program: &str) -> bool {
    let name = Path::new(program)
        .file_name()
        .and_then(|name| name.to_str());
    let name = name.unwrap_or_default();
    let name = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    let known = [
        "python", "sh", "bash", "dash", "zsh", "Rscript", "julia", "perl", "ruby", "node",
    ];
    known.contains(&name)
}
