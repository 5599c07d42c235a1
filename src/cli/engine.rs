//! The engine: the same command line, with the networks. `pipeline` becomes it when a network opens.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Failed;
use ovchat_models::libtorch::{self, BUILT_AGAINST, BUILT_WITH, SET_HERE};

/// The library that the engine can't start without.
const LIBRARY: &str = "libtorch_cpu.so";

/// The engine beside this program.
pub fn path() -> Result<PathBuf, Failed> {
    let program = std::env::current_exe()
        .map_err(|error| Failed::Words(format!("cannot find this program: {error}")))?;
    let engine = program.with_file_name("pipeline-engine");
    if engine.is_file() {
        return Ok(engine);
    }
    Err(Failed::Words(format!(
        "this pipeline opens a network, and there is no {}; build it with `cargo build`",
        engine.display()
    )))
}

/// The folder in which the engine will find libtorch, looked for where the system's loader will look.
/// Fails if it is another version than the one that was built against.
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
            "libtorch is missing: there is no {LIBRARY} in {}; run `make setup` in the project, or name the lib \
             folder of a torch 2.11 in LD_LIBRARY_PATH",
            if folders.is_empty() {
                "any folder of LD_LIBRARY_PATH".to_owned()
            } else {
                folders.join(" or ")
            }
        )));
    };
    // Where no file says the version, the engine asks libtorch itself.
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

/// The engine with the arguments of this process and the environment that libtorch needs.
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

/// Replaces this process with the engine, with the same arguments. Returns only to say why not.
pub fn become_it() -> Failed {
    match (path(), libtorch()) {
        (Err(failed), _) | (_, Err(failed)) => failed,
        (Ok(engine), Ok(_)) => {
            let error = command(&engine).exec();
            cannot_start(&engine, &error)
        }
    }
}

/// Called by the engine before anything else: one that was not started by `pipeline` starts itself
/// again with the environment that libtorch needs, which it reads only once.
pub fn settle() -> Result<(), Failed> {
    if std::env::var_os(SET_HERE).is_some() {
        return Ok(());
    }
    let engine = std::env::current_exe()
        .map_err(|error| Failed::Words(format!("cannot find this program: {error}")))?;
    let error = command(&engine).exec();
    Err(cannot_start(&engine, &error))
}

pub fn cannot_start(engine: &Path, error: &std::io::Error) -> Failed {
    Failed::Words(format!("cannot start {}: {error}", engine.display()))
}
