//! The command line: one file per subcommand. Data goes to stdout, messages to stderr.
//!
//! Two programs share it. `pipeline` has no networks, and replaces itself with `pipeline-engine`
//! when a network has to be opened; the engine brings a [`ModelLoader`].

mod ask;
mod benchmarks;
mod calls;
mod chart;
mod check;
mod cluster;
mod diff;
mod doctor;
mod engine;
mod export;
mod failed;
mod file;
mod forecast;
mod fork;
mod gc;
mod graph;
mod health;
mod init;
mod label;
mod log;
mod memory;
mod out;
mod pairs;
mod preflight;
mod progress;
mod report;
mod rows;
mod run;
mod schema;
mod spill;
mod sql;
mod status;
mod tokens;
mod verify;
mod view;
mod web;
mod worker;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use failed::Failed;
use out::say;

use ovchat_models::ModelLoader;
use ovchat_pipeline::config::{Diagnostics, LoadError, RenderStyle};

/// Iterative DPO of a vision-language model, as one declarative pipeline over Arrow tables.
///
/// Exit codes: 0 success, 1 failure, 2 invalid pipeline or command line, 3 waiting for labels, 130
/// and 143 interrupted by SIGINT and SIGTERM.
#[derive(Parser)]
#[command(name = "pipeline", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Run),
    Check(check::Check),
    Plan(check::ShowPlan),
    Sql(sql::Sql),
    Status(status::Status),
    Health(health::ShowHealth),
    View(view::View),
    Graph(graph::ShowGraph),
    Label(label::LabelRun),
    Pairs(pairs::ShowPairs),
    Ask(ask::Ask),
    Benchmarks(benchmarks::Benchmarks),
    Export(export::Export),
    Fork(fork::MakeFork),
    Diff(diff::Diff),
    Gc(gc::Gc),
    Verify(verify::Verify),
    Repair(verify::Repair),
    Schema(schema::ShowSchema),
    Init(init::Init),
    Doctor(doctor::Doctor),
    /// Compute parts of tables for a run, which starts it.
    #[command(hide = true)]
    Worker,
    /// Run a query of the page of `view`, which starts this process.
    #[command(hide = true)]
    ViewQuery,
    /// Print shell completions.
    #[command(
        after_help = "Example:\n  pipeline completions bash > ~/.local/share/bash-completion/completions/pipeline"
    )]
    Completions {
        shell: clap_complete::Shell,
    },
}

/// Runs the command line of this process.
pub fn main(loader: Option<&dyn ModelLoader>) -> ExitCode {
    if loader.is_some()
        && let Err(failed) = engine::settle()
    {
        let failed = match log::is_asked_for(std::env::args_os()) {
            true => log::end(&failed),
            false => failed,
        };
        return ExitCode::from(tell(&failed));
    }
    let arguments = match Arguments::try_parse() {
        // Help and version are not errors.
        Err(error) if error.use_stderr() && log::is_asked_for(std::env::args_os()) => {
            log::wrong_arguments(&error);
            return ExitCode::from(error.exit_code() as u8);
        }
        parsed => parsed.unwrap_or_else(|error| error.exit()),
    };
    let done = match arguments.command {
        Command::Run(command) => command.run(loader),
        Command::Check(command) => command.run(),
        Command::Plan(command) => command.run(loader),
        Command::Sql(command) => command.run(),
        Command::Status(command) => command.run(),
        Command::Health(command) => command.run(),
        Command::View(command) => command.run(),
        Command::Graph(command) => command.run(loader),
        Command::Label(command) => command.run(),
        Command::Pairs(command) => command.run(),
        Command::Ask(command) => command.run(loader),
        Command::Benchmarks(command) => command.run(),
        Command::Export(command) => command.run(loader),
        Command::Fork(command) => command.run(),
        Command::Diff(command) => command.run(),
        Command::Gc(command) => command.run(),
        Command::Verify(command) => command.run(),
        Command::Repair(command) => command.run(),
        Command::Schema(command) => command.run(),
        Command::Init(command) => command.run(),
        Command::Doctor(command) => command.run(loader),
        Command::Worker => worker::run(loader),
        Command::ViewQuery => view::serve_query(),
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Arguments::command(),
                "pipeline",
                &mut std::io::stdout(),
            );
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => ExitCode::from(tell(&failed)),
    }
}

/// Prints a failure to stderr; returns the exit code.
fn tell(failed: &Failed) -> u8 {
    match failed {
        Failed::Refused(LoadError::Refused(diagnostics)) => eprint!("{}", render(diagnostics)),
        Failed::Code(_) => {}
        _ => say!("error: {failed}"),
    }
    failed.code()
}

fn render(diagnostics: &Diagnostics) -> String {
    diagnostics.render(RenderStyle::detect(std::io::stderr().is_terminal()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_for_programs_has_one_name() {
        let command = Arguments::command();
        command.clone().debug_assert();
        let mut with_json = Vec::new();
        for command in command.get_subcommands() {
            let name = command.get_name();
            let option = |id: &str| command.get_arguments().find(|option| option.get_id() == id);
            let json = option("json");
            assert!(
                json.is_none_or(clap::Arg::is_hide_set),
                "{name} shows --json"
            );
            let Some(format) = option("format") else {
                continue;
            };
            let values = format.get_possible_values();
            assert!(
                values.iter().any(|value| value.matches("json", false)),
                "{name}"
            );
            with_json.push(name.to_owned());
        }
        let expected = [
            "check", "plan", "sql", "status", "health", "graph", "pairs", "ask", "diff", "gc",
            "verify", "doctor",
        ];
        assert_eq!(with_json, expected);
    }
}
