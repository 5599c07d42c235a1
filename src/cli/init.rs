//! `pipeline init`: write a commented pipeline file.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::failed::Failed;
use super::out::say;

const STARTER: &str = include_str!("starter.yaml");

/// Write a commented pipeline file to start from.
#[derive(Args)]
#[command(after_help = "Example:\n  pipeline init dpo.yaml")]
pub struct Init {
    /// The file to write; it must not exist.
    #[arg(default_value = "pipeline.yaml")]
    file: PathBuf,
}

impl Init {
    pub fn run(&self) -> Result<(), Failed> {
        let shown = self.file.display();
        let created = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&self.file);
        let mut file = created.map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Failed::Words(format!("{shown} already exists; choose another name"))
            }
            _ => Failed::Words(format!("cannot write {shown}: {error}")),
        })?;
        file.write_all(STARTER.as_bytes())
            .map_err(|error| Failed::Words(format!("cannot write {shown}: {error}")))?;
        say!("wrote {shown}; fill in the paths, then run: pipeline check {shown}");
        Ok(())
    }
}
