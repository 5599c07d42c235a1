//! The interface of queries: parameters, tables and views, the pieces of a result, errors, and the
//! memory limit.

use std::path::Path;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use ovchat_data::store::TableFile;

/// The default memory limit for sorts and joins, in bytes; the rest is spilled to disk.
pub const MEMORY_BYTES: usize = 512 << 20;

/// The memory of a query.
#[derive(Debug, Clone, Copy)]
pub struct Room<'a> {
    /// The memory limit for sorts and joins, in bytes.
    pub memory: usize,
    /// The folder into which the rest is spilled; without one, a query beyond the limit fails.
    pub spill: Option<&'a Path>,
}

impl<'a> From<Option<&'a Path>> for Room<'a> {
    fn from(spill: Option<&'a Path>) -> Self {
        let memory = MEMORY_BYTES;
        Self { memory, spill }
    }
}

/// A query that cannot be planned or run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// The text is not SQL.
    #[error("{message}")]
    Syntax {
        /// The parser's message, with the place in words.
        message: String,
        /// The message without the place.
        problem: String,
        /// The line and the column of the unexpected token, counted from 1; `None` at the end of
        /// the query.
        place: Option<(usize, usize)>,
    },
    /// The query reads a table that does not exist.
    #[error("there is no table `{0}`")]
    NoTable(String),
    /// The query reads a column that does not exist.
    #[error("there is no column `{name}`{advice}")]
    NoColumn { name: String, advice: String },
    /// The query uses a `$name` that has no value.
    #[error("there is no `${name}` here{advice}")]
    NoParameter { name: String, advice: String },
    /// Any other error, as a message.
    #[error("{0}")]
    Other(String),
}

impl QueryError {
    /// Returns the name that the query uses and that does not exist.
    pub fn unknown_name(&self) -> Option<&str> {
        match self {
            Self::NoTable(name) | Self::NoColumn { name, .. } | Self::NoParameter { name, .. } => {
                Some(name)
            }
            Self::Syntax { .. } | Self::Other(_) => None,
        }
    }
}

/// The value of a `$name` in a query.
#[derive(Debug, Clone, PartialEq)]
pub enum Param {
    Integer(i64),
    Float(f64),
    Text(String),
}

/// A table to query.
#[derive(Debug, Clone)]
pub struct QueryTable {
    pub name: String,
    pub schema: SchemaRef,
    /// The files per round, Parquet or, with the extension `jsonl`, JSON lines; `None` if the table
    /// has no rounds.
    pub files: Vec<(Option<u32>, Vec<TableFile>)>,
    /// True if the rounds become a column `round`.
    pub with_round: bool,
}

/// A query that other queries can read as a table.
#[derive(Debug, Clone)]
pub struct View {
    pub name: String,
    pub query: String,
}

/// The columns of a result.
pub struct Header {
    pub schema: SchemaRef,
    /// The table or alias that each column was taken from unchanged, if it was.
    pub tables: Vec<Option<String>>,
}

/// A piece of a result: the header, then the rows.
pub enum Part {
    Header(Header),
    Rows(RecordBatch),
    /// No rows yet; sent several times a second, so that the caller can check for a stop request.
    Nothing,
}
