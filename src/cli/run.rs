//! `pipeline run`: run a pipeline.

use std::io::IsTerminal;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::check::refuse;
use super::failed::Failed;
use super::file::{PipelineFile, folder_of, quoted, shown, warn};
use super::log::{self, JsonLog};
use super::out::say;
use super::preflight::Preflight;
use super::progress::Progress;
use super::{cluster, engine, report};
use ovchat_data::store::{Rates, RunFolder};
use ovchat_models::{Board, Hub, ModelLoader, RankPlace, Repository};
use ovchat_pipeline::config::{At, Diagnostic, KeyPath, NOT_FETCHED, Plan, RenderStyle, load};
use ovchat_pipeline::run::{
    Interrupt, Options, Ranks, Report, RunError, Summary, WorkerCommand, Workers, follow, run,
};
use ovchat_pipeline::stages::{Failure, TableName};

/// Run a pipeline, or resume an interrupted run; tables that are up to date are reused.
#[derive(Args)]
#[command(after_help = "Examples:\n  pipeline run pipelines/dpo.yaml\n  \
    pipeline run pipelines/dpo.yaml --run /data/runs/first --set rounds=1\n  \
    pipeline run pipelines/dpo.yaml --until pairs\n  \
    pipeline run pipelines/dpo.yaml --log json 2> run.log")]
pub struct Run {
    #[command(flatten)]
    file: PipelineFile,
    /// The run's folder [default: runs/<pipeline name>].
    #[arg(long = "run", value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Stop once this table has been built for the first time.
    #[arg(long, value_name = "TABLE")]
    until: Option<String>,
    /// The number of worker processes that sample and score [default: one a GPU; on a CPU, none beside
    /// this process].
    #[arg(long, value_name = "N")]
    workers: Option<NonZeroU32>,
    /// Take the run from a process on another machine that holds it and cannot be stopped.
    #[arg(long)]
    take_over: bool,
    /// The format of progress output on stderr.
    #[arg(long, value_enum, default_value_t = Log::Text)]
    log: Log,
}

/// The format of progress output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Log {
    /// A progress bar on a terminal, plain lines elsewhere.
    Text,
    /// One JSON object per line.
    Json,
}

impl Run {
    pub fn run(&self, loader: Option<&dyn ModelLoader>) -> Result<(), Failed> {
        if self.log == Log::Text {
            return self.go(loader);
        }
        log::catch_panics();
        self.go(loader).map_err(|failed| log::end(&failed))
    }

    fn go(&self, loader: Option<&dyn ModelLoader>) -> Result<(), Failed> {
        let loaded = || load(&self.file.file, &self.file.sets, false);
        let plan = match loaded() {
            // The pipeline itself is valid.
            Ok(plan) if plan.warnings.iter().any(|one| one.code == NOT_FETCHED) => {
                self.fetch(&plan)?;
                loaded().and_then(Plan::fetched)
            }
            loaded => loaded,
        };
        let plan = plan?;
        let until = self.until(&plan)?;
        let place = cluster::place().map_err(Failed::Words)?;
        let mut models = plan.models.values();
        // The ranks of a cluster find each other by libtorch.
        let needs_torch = models.any(ovchat_models::ModelSpec::needs_torch) || place.is_some();
        if loader.is_none() && needs_torch {
            return Err(engine::become_it());
        }
        let folder = folder_of(&plan, self.folder.as_deref());
        let interrupt = Interrupt::listen()
            .map_err(|error| Failed::Words(format!("cannot listen for signals: {error}")))?;
        let board = match (&place, loader) {
            (Some(place), Some(loader)) => Some(
                loader
                    .board(place)
                    .map_err(|error| Failed::Words(error.to_string()))?,
            ),
            _ => None,
        };
        let ranks = board.as_deref().zip(place.as_ref());
        let workers = self.workers(ranks)?;
        if place.is_some_and(|place| place.rank > 0) {
            return self.follow(&plan, &folder, loader, &workers, &interrupt);
        }
        let preflight = Preflight::of_run(&plan, &folder, loader, self.workers)?;
        refuse(preflight.refusals(&plan, until.as_ref()))?;
        refuse(preflight.missing_keys(&plan, until.as_ref()))?;
        match self.log {
            Log::Text => warn(&plan),
            Log::Json => {
                log::write(
                    "begin",
                    json!({ "pipeline": plan.pipeline.as_str(), "run": folder }),
                );
                for warning in &plan.warnings {
                    log::write("note", json!({ "warning": warning.to_json() }));
                }
            }
        }
        let options = Options {
            folder,
            until,
            forecasts: preflight.forecasts,
            command: self.command(),
            sets: self.file.sets.clone(),
            rates: Rates::usual_place(),
            take_over: self.take_over,
            workers: Some(workers),
        };
        match self.log {
            Log::Text => {
                let mut progress = Progress::new(std::io::stderr().is_terminal());
                let done = run(&plan, &options, loader, &mut progress, &interrupt);
                progress.clear();
                in_text(&plan, &options, &interrupt, done)
            }
            Log::Json => {
                let done = run(&plan, &options, loader, &mut JsonLog::new(), &interrupt);
                in_json(&plan, &options, &interrupt, done)
            }
        }
    }

    /// The workers of this run, and the way to start them.
    fn workers<'b>(
        &self,
        ranks: Option<(&'b dyn Board, &RankPlace)>,
    ) -> Result<Workers<'b>, Failed> {
        let program = std::env::current_exe().map_err(|error| {
            Failed::Words(format!(
                "cannot determine the path of this program: {error}"
            ))
        })?;
        Ok(Workers {
            asked: self.workers,
            command: WorkerCommand {
                program,
                arguments: vec!["worker".to_owned()],
            },
            ranks: ranks.map(|(board, place)| Ranks {
                board,
                rank: place.rank,
                world: place.world,
            }),
        })
    }

    /// Computes parts for the run of rank 0.
    fn follow(
        &self,
        plan: &Plan,
        folder: &Path,
        loader: Option<&dyn ModelLoader>,
        workers: &Workers<'_>,
        interrupt: &Interrupt,
    ) -> Result<(), Failed> {
        let mut report: Box<dyn Report> = match self.log {
            Log::Text => Box::new(Progress::new(false)),
            Log::Json => Box::new(JsonLog::new()),
        };
        let sets = &self.file.sets;
        match follow(plan, sets, folder, loader, workers, &mut *report, interrupt) {
            Ok(()) => Ok(()),
            Err(Failure::Interrupted) => Err(Failed::Code(interrupt.code() as u8)),
            Err(failure) => Err(Failed::Words(failure.to_string())),
        }
    }

    /// Fetches the weights and datasets that the pipeline names on the hub and that are missing from
    /// the hub's cache.
    fn fetch(&self, plan: &Plan) -> Result<(), Failed> {
        self.until(plan)?;
        let Some(hub) = Hub::of_environment().map_err(Failed::Words)? else {
            return Ok(());
        };
        let paths = plan.models.values().flat_map(|spec| {
            let paths = spec.paths().into_iter();
            paths.filter_map(|(_, path)| Repository::of(path))
        });
        let mut say = |text: &str| match self.log {
            Log::Text => say!("{text}"),
            Log::Json => log::write("note", json!({ "text": text })),
        };
        for repository in paths.collect::<Vec<_>>() {
            hub.fetch(&repository, &mut say).map_err(Failed::Words)?;
        }
        for stage in plan.all() {
            if let Some((from, part)) = stage.spec.source()
                && let Some(repository) = Repository::of(from)
            {
                hub.fetch_dataset(&repository, part, &mut say)
                    .map_err(Failed::Words)?;
            }
        }
        Ok(())
    }

    /// Returns the command line that repeats this run, without `--until`.
    fn command(&self) -> String {
        let file = quoted(&shown(&self.file.file));
        let folder = self
            .folder
            .iter()
            .map(|folder| quoted(&folder.to_string_lossy()));
        let folder = folder.map(|folder| format!(" --run {folder}"));
        let sets = self
            .file
            .sets
            .iter()
            .map(|set| format!(" --set {}", quoted(set)));
        format!(
            "pipeline run {file}{}",
            folder.chain(sets).collect::<String>()
        )
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
                "--until: no table `{name}`; available tables: {}",
                names()
            ))),
        }
    }
}

/// The exit code of a run that waits for labels.
const WAITING: u8 = 3;

/// Reports the end of a run as text.
fn in_text(
    plan: &Plan,
    options: &Options<'_>,
    interrupt: &Interrupt,
    done: Result<Summary, RunError>,
) -> Result<(), Failed> {
    let folder = options.folder.display();
    match done {
        Ok(summary) => {
            if options.until.is_none() {
                let reported =
                    report::print(plan, &RunFolder::read(&options.folder)?, &mut |text| {
                        say!("{text}");
                    });
                if reported.is_err() && interrupt.raised() {
                    say!(
                        "interrupted; all tables are built, and the same command prints the report"
                    );
                    return Err(Failed::Code(interrupt.code() as u8));
                }
                reported?;
            }
            let Summary { made, reused } = summary;
            match made {
                0 => say!("nothing to do: all {reused} tables in {folder} are up to date"),
                _ => say!("done: {made} built, {reused} up to date, in {folder}"),
            }
            Ok(())
        }
        Err(error) if matches!(*error.failure, Failure::Interrupted) => {
            say!("interrupted; progress is saved in {folder}; run the same command to resume");
            Err(Failed::Code(interrupt.code() as u8))
        }
        Err(error) if matches!(*error.failure, Failure::Waiting(_)) => {
            say!("waiting: {error}; then run the same command to resume");
            Err(Failed::Code(WAITING))
        }
        Err(error) => {
            eprint!("{}", underlined(plan, &error));
            Err(Failed::Code(1))
        }
    }
}

/// Reports the end of a run as an event of the log; the report still goes to stdout.
fn in_json(
    plan: &Plan,
    options: &Options<'_>,
    interrupt: &Interrupt,
    done: Result<Summary, RunError>,
) -> Result<(), Failed> {
    let folder = &options.folder;
    match done {
        Ok(Summary { made, reused }) => {
            if options.until.is_none() {
                let reported = report::print(plan, &RunFolder::read(folder)?, &mut |text| {
                    log::write("note", json!({ "text": text }));
                });
                if reported.is_err() && interrupt.raised() {
                    let code = interrupt.code() as u8;
                    log::write("stopped", json!({ "code": code, "run": folder }));
                    return Err(Failed::Code(code));
                }
                reported?;
            }
            log::write(
                "done",
                json!({ "code": 0, "run": folder, "made": made, "reused": reused }),
            );
            Ok(())
        }
        Err(error) if matches!(*error.failure, Failure::Interrupted) => {
            let code = interrupt.code() as u8;
            log::write("stopped", json!({ "code": code, "run": folder }));
            Err(Failed::Code(code))
        }
        Err(error) if matches!(*error.failure, Failure::Waiting(_)) => {
            let table = error.stage.as_ref().map(TableName::as_str);
            let message = error.to_string();
            let more = json!({ "code": WAITING, "run": folder, "table": table, "round": error.round, "message": message });
            log::write("waiting", more);
            Err(Failed::Code(WAITING))
        }
        Err(error) => {
            let table = error.stage.as_ref();
            let stage = table.and_then(|name| plan.stage(name));
            log::write(
                "failed",
                json!({
                    "code": 1, "run": folder, "table": table.map(TableName::as_str),
                    "round": error.round, "message": plan.secrets.hide(&error.to_string()),
                    "place": stage.map(|stage| stage.place().to_string()),
                }),
            );
            Err(Failed::Code(1))
        }
    }
}

/// Renders a failure, with its stage underlined in the pipeline file.
fn underlined(plan: &Plan, error: &RunError) -> String {
    let message = plan.secrets.hide(&error.to_string());
    let Some(stage) = error.stage.as_ref().and_then(|name| plan.stage(name)) else {
        return format!("error: {message}\n");
    };
    let round = error
        .round
        .map_or_else(String::new, |round| format!(" in round {round}"));
    let diagnostic = Diagnostic::new("run::failed", At::key(KeyPath::default()), message)
        .label(format!("failed here{round}; completed work is kept"))
        .placed(stage.place());
    diagnostic.render(RenderStyle::detect(std::io::stderr().is_terminal()))
}
