//! The engine: the same command line, with the networks. `pipeline` becomes it when a network opens.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Failed;

/// The library that the engine can't start without.
const LIBRARY: &str = "libtorch_cpu.so";

/// Where the engine was built to find it.
const BUILT_WITH: Option<&str> = option_env!("OVCHAT_LIBTORCH");

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
    found.cloned().ok_or_else(|| {
        let folders: Vec<_> = searched.iter().map(|folder| folder.display().to_string()).collect();
        Failed::Words(format!(
            "libtorch is missing: there is no {LIBRARY} in {}; run `make setup` in the project, or name the lib \
             folder of a torch 2.11 in LD_LIBRARY_PATH",
            if folders.is_empty() { "any folder of LD_LIBRARY_PATH".to_owned() } else { folders.join(" or ") }
        ))
    })
}

/// Replaces this process with the engine, with the same arguments. Returns only to say why not.
pub fn become_it() -> Failed {
    match (path(), libtorch()) {
        (Err(failed), _) | (_, Err(failed)) => failed,
        (Ok(engine), Ok(_)) => {
            let error = Command::new(&engine)
                .args(std::env::args_os().skip(1))
                .exec();
            cannot_start(&engine, &error)
        }
    }
}

pub fn cannot_start(engine: &Path, error: &std::io::Error) -> Failed {
    Failed::Words(format!("cannot start {}: {error}", engine.display()))
}
