//! The engine: the same command line, with networks; `pipeline` replaces itself with it when a
//! network has to be opened.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::failed::Failed;
use ovchat_models::libtorch::{self, BUILT_AGAINST, BUILT_WITH, SET_HERE};

/// The library that the engine requires.
const LIBRARY: &str = "libtorch_cpu.so";

/// Returns the path of the engine, next to this program.
pub fn path() -> Result<PathBuf, Failed> {
    let program = std::env::current_exe().map_err(|error| {
        Failed::Words(format!(
            "cannot determine the path of this program: {error}"
        ))
    })?;
    let engine = program.with_file_name("pipeline-engine");
    if engine.is_file() {
        return Ok(engine);
    }
    Err(Failed::Words(format!(
        "this pipeline needs a network, but {} does not exist; build it with `cargo build`",
        engine.display()
    )))
}

/// Returns the folder in which the engine will find libtorch, searched like the dynamic linker
/// does. Fails if its version differs from the one that the engine was built against.
pub fn libtorch() -> Result<PathBuf, Failed> {
    let searched: Vec<PathBuf> = std::env::var_os("LD_LIBRARY_PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .chain(BUILT_WITH.map(PathBuf::from))
        .filter(|folder| !folder.as_os_str().is_empty())
        .collect();
    let found = searched
        .iter()
        .find(|folder| folder.join(LIBRARY).is_file());
    let Some(folder) = found else {
        let folders: Vec<_> = searched
            .iter()
            .map(|folder| folder.display().to_string())
            .collect();
        return Err(Failed::Words(format!(
            "libtorch not found: no {LIBRARY} in {}; run `make setup` in the project, or add the lib folder \
             of torch 2.11 to LD_LIBRARY_PATH",
            if folders.is_empty() {
                "any folder of LD_LIBRARY_PATH".to_owned()
            } else {
                folders.join(" or ")
            }
        )));
    };
    // If no file states the version, the engine asks libtorch itself.
    let version = libtorch::version_in(folder);
    let problem = version
        .zip(BUILT_AGAINST)
        .and_then(|(found, built)| libtorch::mismatch(&found, built));
    match problem {
        None => Ok(folder.clone()),
        Some(problem) => Err(Failed::Words(format!(
            "libtorch in {}: {problem}",
            folder.display()
        ))),
    }
}

/// Returns the engine's command, with the arguments of this process and the environment that
/// libtorch needs.
pub fn command(engine: &Path) -> Command {
    let is_set = |name: &str| std::env::var_os(name).is_some();
    let settings = libtorch::environment(&is_set);
    let names: Vec<&str> = settings.iter().map(|setting| setting.name).collect();
    let mut command = Command::new(engine);
    command
        .args(std::env::args_os().skip(1))
        .envs(settings.iter().map(|setting| (setting.name, setting.value)))
        .env(SET_HERE, names.join(","));
    command
}

/// Replaces this process with the engine, with the same arguments. Only returns on failure.
pub fn become_it() -> Failed {
    match (path(), libtorch()) {
        (Err(failed), _) | (_, Err(failed)) => failed,
        (Ok(engine), Ok(_)) => {
            let error = command(&engine).exec();
            cannot_start(&engine, &error)
        }
    }
}

/// Restarts the engine with the environment that libtorch needs, unless it was started by
/// `pipeline`. Called before anything else, because libtorch reads the environment only once.
pub fn settle() -> Result<(), Failed> {
    if std::env::var_os(SET_HERE).is_some() {
        return Ok(());
    }
    let engine = std::env::current_exe().map_err(|error| {
        Failed::Words(format!(
            "cannot determine the path of this program: {error}"
        ))
    })?;
    let error = command(&engine).exec();
    Err(cannot_start(&engine, &error))
}

pub fn cannot_start(engine: &Path, error: &std::io::Error) -> Failed {
    Failed::Words(format!("cannot start {}: {error}", engine.display()))
}
