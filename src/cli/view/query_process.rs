//! The process that runs a query of a client: it reads the query from stdin and prints its end.

use std::io::Read as _;
use std::time::Duration;

use serde_json::Value;

use super::apart::{End, Query, Request};
use super::asked::{Asked, Problem};
use super::runs::Runs;
use super::{lists, sql};
use crate::failed::Failed;
use crate::out::line;
use crate::rows::Format;
use crate::spill::{self, Spill};

/// The memory limit for the sorts and joins of a query: that of `pipeline sql`.
const MEMORY: usize = 512 << 20;

/// Reads a query from stdin, runs it, and prints its end.
pub fn serve() -> Result<(), Failed> {
    let unreadable = |problem: String| Failed::Words(format!("cannot read the query: {problem}"));
    let mut input = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut input);
    read.map_err(|error| unreadable(error.to_string()))?;
    let request: Request =
        serde_json::from_slice(&input).map_err(|error| unreadable(error.to_string()))?;
    spill::end_at_signals()?;
    // The process that waits has the time limit.
    let spill = Spill::open()?;
    let runs = Runs::new(vec![request.folder], &spill, Duration::MAX).with_memory(MEMORY);
    let asked = Asked::new(Vec::new(), Duration::MAX, std::sync::Arc::default());
    let end = match answer(&runs, &asked, &request.query) {
        Ok(value) => End::Done(value),
        Err(Problem::Refused(words)) => End::Refused(words),
        Err(problem) => End::Failed(problem.words().1.to_owned()),
    };
    line(serde_json::to_string(&end).expect("plain data serializes"))
}

fn answer(runs: &Runs, asked: &Asked, query: &Query) -> Result<Value, Problem> {
    match query {
        Query::Rows { sql, limit } => sql::table(runs, asked, sql, *limit),
        Query::Csv { sql, to } => sql::write(runs, asked, sql, Format::Csv, to),
        Query::Parquet { sql, to } => sql::write(runs, asked, sql, Format::Parquet, to),
        Query::Positions {
            table,
            round,
            files,
            condition,
            order,
            to,
        } => {
            let by = (condition.as_deref(), order.as_deref());
            lists::write(runs, asked, (table, *round, files), by, to)
        }
    }
}
