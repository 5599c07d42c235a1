//! The interface of queries: parameters, tables and views, the pieces of a result, errors, and the
//! memory limit.

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use ovchat_data::store::TableFile;

/// The memory limit for sorts and joins, in bytes; the rest is spilled to disk.
pub const MEMORY_BYTES: usize = 512 << 20;

/// A query that cannot be planned or run.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct QueryError(pub String);

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
