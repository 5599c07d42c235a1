//! `pipeline verify` and `pipeline repair`: check the integrity of a run's files, and quarantine
//! corrupt ones.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::failed::Failed;
use super::file::run_folder;
use super::out::{Output, line, say};
use ovchat_data::store::{Flaw, Manifest, RunFolder, TableVersion};

/// Verify the SHA-256 checksum of every file of a run. Exits with code 1 on a mismatch.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline verify runs/small-world\n  pipeline verify small-world --format json"
)]
pub struct Verify {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    #[command(flatten)]
    output: Output,
}

/// Repair a run: restore a damaged manifest and quarantine corrupt files; the next run rebuilds
/// what they were part of.
#[derive(Args)]
#[command(after_help = "Example:\n  pipeline repair runs/small-world")]
pub struct Repair {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
}

impl Verify {
    pub fn run(&self) -> Result<(), Failed> {
        let folder = run_folder(&self.run);
        let run = RunFolder::read(&folder)?;
        let mut flaws = Manifest::flaws(&folder);
        if let Some(damage) = &run.manifest().damage
            && flaws.is_empty()
        {
            flaws.push(Flaw {
                file: "manifest.json".to_owned(),
                problem: damage.clone(),
            });
        }
        let versions: Vec<&TableVersion> = run.manifest().versions().collect();
        flaws.extend(run.flaws(versions.iter().copied(), true));
        flaws.extend(run.record_flaws());
        if self.output.is_json() {
            let shown = flaws.iter();
            let shown = shown.map(|flaw| json!({ "file": flaw.file, "problem": flaw.problem }));
            let shown: Vec<_> = shown.collect();
            line(format_args!(
                "{:#}",
                json!({ "run": folder, "flaws": shown })
            ))?;
        } else {
            for Flaw { file, problem } in &flaws {
                line(format_args!("{file}: {problem}"))?;
            }
        }
        let shown = folder.display();
        if flaws.is_empty() {
            say!("{shown}: all checksums match");
            return Ok(());
        }
        say!(
            "{shown}: {} damaged; run `pipeline repair {shown}` to quarantine them, then `pipeline run` to \
             rebuild what is missing",
            counted(flaws.len())
        );
        Err(Failed::Code(1))
    }
}

impl Repair {
    pub fn run(&self) -> Result<(), Failed> {
        let folder = run_folder(&self.run);
        let pipeline = RunFolder::read(&folder)?.manifest().pipeline.clone();
        let (mut run, opened) = RunFolder::open(&folder, &pipeline)?;
        for words in opened.damage.iter().chain(&opened.lost) {
            say!("{words}");
        }
        let mut flaws = run.set_flaws_aside()?;
        flaws.extend(run.mend_records()?);
        for Flaw { file, problem } in &flaws {
            say!("{file}: {problem}");
        }
        let found = flaws.len() + opened.lost.len() + opened.damage.iter().len();
        let shown = folder.display();
        if found == 0 {
            say!("{shown}: nothing to repair");
        } else {
            say!("{shown}: repaired; the next `pipeline run` rebuilds what is missing");
        }
        Ok(())
    }
}

/// Fails if files of the given versions are corrupt, before they are copied elsewhere.
pub fn refuse_flaws<'m>(
    run: &RunFolder,
    versions: impl IntoIterator<Item = &'m TableVersion>,
    with_media: bool,
) -> Result<(), Failed> {
    let flaws = run.flaws(versions, with_media);
    let Some(Flaw { file, problem }) = flaws.first() else {
        return Ok(());
    };
    let others = match flaws.len() - 1 {
        0 => String::new(),
        more => format!(" (and {} more)", counted(more)),
    };
    Err(Failed::Words(format!(
        "{}: {problem}{others}; nothing was written. Run the pipeline again to rebuild it",
        run.root().join(Path::new(file)).display()
    )))
}

fn counted(files: usize) -> String {
    match files {
        1 => "1 file".to_owned(),
        _ => format!("{files} files"),
    }
}
