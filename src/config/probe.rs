//! What a pipeline needs beside its own files: the programs of `exec`, and room in the contexts of its
//! models.

use std::env;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::check::all_stages;
use super::complaint::{At, Complaint};
use super::guess::guess;
use super::paths::shown;
use super::pipeline::Written;
use super::reference::Secrets;
use super::source::KeyPath;
use crate::models::{Asking, ModelSpec};
use crate::prep::OnevisionCard;
use crate::stages::{Exec, ModelName, StageSpec};

/// Programs of `exec` stages that can't be started: looked for as the system will, in the stage's
/// folder where the name holds a `/`, else in the directories of `PATH`.
pub fn programs(written: &Written, secrets: &Secrets) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (stage, _) in all_stages(written) {
        if let Some(StageSpec::Exec(exec)) = &stage.spec
            && let Some(program) = exec.program()
        {
            let at = At::value(stage.settings.key("command").index(0));
            complaints.extend(unstartable(exec, program, at, secrets));
        }
    }
    complaints
}

/// The shortest name of a program that another one is guessed for.
const GUESSED_MIN: usize = 4;

fn unstartable(exec: &Exec, program: &str, at: At, secrets: &Secrets) -> Option<Complaint> {
    let complaint = |message: String| Complaint::new("config::no_program", at.clone(), message);
    if program.contains('/') {
        let path = exec.folder().join(program.trim_start_matches("./"));
        let name = shown(&path, secrets);
        return match path.metadata() {
            Ok(found) if !found.is_file() => Some(complaint(format!("`{name}` is not a program"))),
            Ok(_) if !is_executable(&path) => {
                let help = format!("chmod +x {name}");
                Some(complaint(format!("`{name}` is not executable")).help(help))
            }
            Ok(_) => None,
            Err(_) => Some(complaint(format!("there is no program `{name}`"))),
        };
    }
    let path = env::var_os("PATH")?;
    let folders: Vec<PathBuf> = env::split_paths(&path)
        .map(|folder| exec.folder().join(folder))
        .collect();
    if folders
        .iter()
        .any(|folder| is_executable(&folder.join(program)))
    {
        return None;
    }
    let complaint = complaint(format!(
        "there is no program `{program}` in the directories of PATH"
    ));
    if exec.folder().join(program).is_file() {
        let help = format!("for the file beside the pipeline file, write `./{program}`");
        return Some(complaint.help(help));
    }
    // So many programs have short names that one of them is always near.
    if program.len() < GUESSED_MIN {
        return Some(complaint);
    }
    let entries = folders.iter().filter_map(|folder| folder.read_dir().ok());
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    Some(complaint.guess(guess(program, names.iter().map(String::as_str))))
}

fn is_executable(path: &Path) -> bool {
    let metadata = path.metadata();
    metadata.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// Answers and replies that would be longer than the whole context of their model. Models whose config
/// can't be read are complained about elsewhere.
pub fn contexts(written: &Written) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (stage, _) in all_stages(written) {
        if let Some(StageSpec::Sample(sample)) = &stage.spec {
            let tokens = sample.max_new_tokens.get();
            let at = stage.settings.key("max_new_tokens");
            complaints.extend(beyond(written, sample.model.as_str(), tokens, at));
        }
    }
    for entry in &written.models {
        let Some((spec, asking)) = entry.spec.as_ref().and_then(|it| Some((it, it.asking()?)))
        else {
            continue;
        };
        let Asking { max_new_tokens, .. } = asking;
        let writer = spec.speaker().unwrap_or(entry.name.as_str());
        let at = entry.settings.below("ask.max_new_tokens");
        complaints.extend(beyond(written, writer, max_new_tokens.0.get(), at));
    }
    complaints
}

fn beyond(written: &Written, model: &str, tokens: u32, at: KeyPath) -> Option<Complaint> {
    let of_name = |name: &ModelName| name.as_str() == model;
    let entry = written.models.iter().find(|entry| of_name(&entry.name))?;
    let ModelSpec::LlavaOnevision(spec) = entry.spec.clone()?.opened() else {
        return None;
    };
    let card = OnevisionCard::open(&spec.weights).ok()?;
    let context = card.text_config.max_position_embeddings;
    if (tokens as usize) < context {
        return None;
    }
    let message =
        format!("`max_new_tokens` is {tokens}, and the context of `{model}` is {context} tokens");
    let help = format!(
        "the context holds prompt, pictures and answer: set `max_new_tokens` well below {context}"
    );
    Some(Complaint::new("config::context", At::value(at), message).help(help))
}
