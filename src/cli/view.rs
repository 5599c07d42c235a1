//! `pipeline view`: a local web page that shows runs: their pairs with images, the life of a prompt,
//! the health and the curves of the rounds, the graph of the tables, and SQL.
//!
//! The page is embedded in this program, loads nothing from elsewhere, and can write nothing. It is
//! served on localhost only, to clients that know the key in its address.

mod apart;
mod asked;
mod bundle;
mod charts;
mod child;
mod graph;
mod health;
mod images;
mod lists;
mod positions;
mod prompt;
mod query_process;
mod questions;
mod runs;
mod similar;
mod site;
mod sql;
mod turns;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clap::Args;

pub use self::query_process::serve as serve_query;
use self::runs::Runs;
use super::failed::Failed;
use super::file::{read_run, run_folder};
use super::out::say;
use super::spill::Spill;
use super::web::{Access, Server};
use ovchat_pipeline::run::Interrupt;

/// The time that a connection has for its response, besides the time of a query.
const RESPONSE_TIME: Duration = Duration::from_secs(60);

/// The longest wait for the end of requests when the server ends.
const LAST_WORK: Duration = Duration::from_secs(3);

/// Serve a page that shows runs, also while they go on: pairs with their images, the life of a
/// prompt, rounds, the graph of the tables, and SQL.
#[derive(Args)]
#[command(after_help = "Examples:\n  pipeline view runs/small-world\n  \
    pipeline view runs/first runs/second --port 8080\n  \
    pipeline view small-world --bundle pairs-to-look-at --pairs 100")]
pub struct View {
    /// The runs: their folders, or their names below runs/.
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// The port on localhost to serve the page on; 0 picks a free port.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// The time limit of a query of the page, in seconds.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    query_seconds: u32,
    /// Write the page with some pairs as files into a new folder, to send around, instead of serving
    /// it.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// The number of pairs in the bundle: those with the largest margins of the last round.
    #[arg(long, value_name = "N", default_value_t = 200, requires = "bundle")]
    pairs: usize,
}

impl View {
    pub fn run(&self) -> Result<(), Failed> {
        let folders: Vec<PathBuf> = self.runs.iter().map(|run| run_folder(run)).collect();
        for folder in &folders {
            read_run(folder)?;
        }
        if self.bundle.is_some() && folders.len() > 1 {
            let words = "a bundle has one run: write one bundle for each";
            return Err(Failed::Usage(words.to_owned()));
        }
        let query_time = Duration::from_secs(self.query_seconds.into());
        let spill = Spill::open()?;
        let runs = Runs::new(folders, &spill, query_time);
        if let Some(folder) = &self.bundle {
            return bundle::write(&runs, folder, self.pairs);
        }
        let interrupt = Interrupt::listen()
            .map_err(|error| Failed::Words(format!("cannot listen to signals: {error}")))?;
        let server = Server::listen(self.port).map_err(|error| {
            let port = self.port;
            Failed::Words(format!("cannot serve a page on port {port}: {error}"))
        })?;
        let address = server.address();
        let access = Access::new(address.port())?;
        say!("http://{address}/{}/", access.key);
        say!("serving on localhost only, read-only; press Ctrl-C to stop");
        let runs = Arc::new(runs);
        let site = site::site(Arc::clone(&runs), access);
        server.serve(&site, query_time + RESPONSE_TIME, &|| interrupt.raised());
        drop(site);
        // Requests end soon, with their processes; then nobody uses the temporary files.
        runs.ends.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        while Arc::strong_count(&runs) > 1 && begun.elapsed() < LAST_WORK {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(spill);
        Ok(())
    }
}
