//! Queries that clients write, each in a process of its own: DataFusion can neither be stopped nor be
//! limited in memory within every operator.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::asked::{Asked, Problem};
use super::child;
use super::runs::Runs;

/// The most resident memory of such a process, in bytes.
const MEMORY_MAX: u64 = 1 << 30;

/// The argument that starts such a process.
pub const COMMAND: &str = "view-query";

/// A query of a client.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Query {
    /// The first rows of a query.
    Rows {
        sql: String,
        limit: usize,
    },
    /// All rows of a query, written to a file.
    Csv {
        sql: String,
        to: PathBuf,
    },
    Parquet {
        sql: String,
        to: PathBuf,
    },
    /// The positions of the pairs that meet a condition, written to a file.
    Positions {
        table: String,
        round: Option<u32>,
        /// The files that positions are of.
        files: Vec<String>,
        condition: Option<String>,
        order: Option<String>,
        to: PathBuf,
    },
}

/// The input of the other process.
#[derive(Serialize, Deserialize)]
pub struct Request {
    pub folder: PathBuf,
    pub query: Query,
}

/// The end of a query.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    Done(Value),
    Refused(String),
    Failed(String),
}

/// Runs a query of a client over a run in another process.
pub fn run(runs: &Runs, folder: &Path, asked: &Asked, query: Query) -> Result<Value, Problem> {
    let _one = runs.apart(asked)?;
    let request = Request {
        folder: folder.to_owned(),
        query,
    };
    let input = serde_json::to_vec(&request).expect("plain data serializes");
    let mut command = child::command(&[COMMAND])?;
    // Its spilled rows are below those of this process, and go with them.
    command.env("TMPDIR", &runs.spill);
    let output = child::run(command, &input, asked, Some(MEMORY_MAX))?;
    let end = serde_json::from_slice(&output.out);
    match end {
        Ok(End::Done(value)) => Ok(value),
        Ok(End::Refused(words)) => Err(Problem::Refused(words)),
        Ok(End::Failed(words)) => Err(Problem::Failed(words)),
        Err(_) => Err(Problem::Failed(format!(
            "the process of the query failed: {}",
            output.errors.lines().next().unwrap_or("it said nothing")
        ))),
    }
}

/// Returns an empty file for the result of a query, and its path.
pub fn file(runs: &Runs) -> Result<(File, PathBuf), Problem> {
    let failed =
        |error: std::io::Error| Problem::Failed(format!("cannot write a temporary file: {error}"));
    let file = tempfile::Builder::new()
        .tempfile_in(&runs.spill)
        .map_err(failed)?;
    file.keep().map_err(|error| failed(error.error))
}
