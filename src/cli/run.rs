//! `pipeline run`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Args;

use super::check::{PipelineFile, warn};
use super::progress::Progress;
use super::{Failed, engine, report};
use crate::config::{At, Complaint, KeyPath, Look, Plan, load};
use crate::models::ModelLoader;
use crate::run::{Interrupt, Options, RunError, Summary, run};
use crate::stages::{Failure, TableName};
use crate::store::RunFolder;

/// Runs a pipeline, or goes on with a run that was stopped; what is done is not done again.
#[derive(Args)]
#[command(after_help = "Examples:\n  pipeline run pipelines/dpo.yaml\n  \
    pipeline run pipelines/dpo.yaml --run /data/runs/first --set rounds=1\n  \
    pipeline run pipelines/dpo.yaml --until pairs")]
pub struct Run {
    #[command(flatten)]
    file: PipelineFile,
    /// The run's folder; runs/<pipeline name> if left out.
    #[arg(long = "run", value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Stop when this table was made for the first time.
    #[arg(long, value_name = "TABLE")]
    until: Option<String>,
}

impl Run {
    pub fn run(&self, loader: Option<&dyn ModelLoader>) -> Result<(), Failed> {
        let plan = load(&self.file.file, &self.file.sets, false)?;
        let until = self.until(&plan)?;
        if loader.is_none()
            && plan
                .models
                .values()
                .any(crate::models::ModelSpec::needs_torch)
        {
            return Err(engine::become_it());
        }
        warn(&plan);
        let folder = folder_of(&plan, self.folder.as_deref());
        let options = Options { folder, until };
        let interrupt = Interrupt::listen()
            .map_err(|error| Failed::Words(format!("cannot listen to signals: {error}")))?;
        let mut progress = Progress::new(std::io::stderr().is_terminal());
        let done = run(&plan, &options, loader, &mut progress, &interrupt);
        progress.clear();
        let folder = options.folder.display();
        match done {
            Ok(summary) => {
                if options.until.is_none() {
                    report::print(&plan, &RunFolder::read(&options.folder)?)?;
                }
                let Summary { made, reused } = summary;
                match made {
                    0 => eprintln!("nothing to do: all {reused} tables of {folder} are there"),
                    _ => eprintln!("done: {made} tables made, {reused} there before, in {folder}"),
                }
                Ok(())
            }
            Err(error) if matches!(*error.failure, Failure::Interrupted) => {
                eprintln!(
                    "stopped; what was made is kept in {folder}, and the same command goes on"
                );
                Err(Failed::Code(interrupt.code() as u8))
            }
            Err(error) => {
                eprint!("{}", underlined(&plan, &error));
                Err(Failed::Code(1))
            }
        }
    }

    fn until(&self, plan: &Plan) -> Result<Option<TableName>, Failed> {
        let Some(name) = &self.until else {
            return Ok(None);
        };
        let found = plan.all().find(|stage| stage.name.as_str() == name);
        let names = || {
            plan.all()
                .map(|stage| stage.name.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        };
        match found {
            Some(stage) => Ok(Some(stage.name.clone())),
            None => Err(Failed::Usage(format!(
                "--until: there is no table `{name}`; the tables are {}",
                names()
            ))),
        }
    }
}

/// The folder of a plan's run, unless another is given.
pub fn folder_of(plan: &Plan, given: Option<&Path>) -> PathBuf {
    match given {
        Some(folder) => folder.to_owned(),
        None => PathBuf::from("runs").join(plan.pipeline.as_str()),
    }
}

/// A failure, with the stage that asked for it underlined in the pipeline file.
fn underlined(plan: &Plan, error: &RunError) -> String {
    let message = plan.secrets.hide(&error.to_string());
    let Some(stage) = error.stage.as_ref().and_then(|name| plan.stage(name)) else {
        return format!("error: {message}\n");
    };
    let round = error
        .round
        .map_or_else(String::new, |round| format!(" in round {round}"));
    let complaint = Complaint::new("run::failed", At::key(KeyPath::default()), message)
        .label(format!("failed here{round}; what was made before is kept"))
        .placed(stage.place.clone());
    complaint.render(Look::detect(std::io::stderr().is_terminal()))
}
