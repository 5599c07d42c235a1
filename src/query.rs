//! SQL over tables: the home of DataFusion, and the only file with async but for the page's server.
//!
//! Every query runs on one thread with bounded memory; what does not fit is spilled to a folder of
//! the caller's. Tables are given as lists of Parquet files, so that a reader never sees a file that
//! the manifest doesn't list.

mod count;
mod lines;
#[cfg(test)]
mod tests;
mod unsupported;
mod words;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::ScalarValue;
use datafusion::datasource::MemTable;
use datafusion::error::DataFusionError;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::prelude::{
    DataFrame, ParquetReadOptions, SQLOptions, SessionConfig, SessionContext, lit,
};
use futures::StreamExt;

pub use count::{RowCount, Several};
pub use words::no_table;
use words::{Allowed, error, refuse_others, refuse_unknown_params};

/// Memory for sorts and joins; more is spilled to disk.
const MEMORY_BYTES: usize = 512 << 20;

/// A query can't be planned or run.
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
    /// Its files, Parquet or, by their ending `jsonl`, JSON lines, by round; `None` where the table has no rounds.
    pub files: Vec<(Option<u32>, Vec<PathBuf>)>,
    /// Whether the rounds become a column `round`.
    pub with_round: bool,
}

/// A query that other queries can read as a table.
#[derive(Debug, Clone)]
pub struct View {
    pub name: String,
    pub query: String,
}

/// The schema that a query's result has. Nothing is read.
pub fn plan(
    sql: &str,
    tables: &[(String, SchemaRef)],
    params: &[(&str, Param)],
) -> Result<SchemaRef, QueryError> {
    Ok(plan_counted(sql, tables, params)?.0)
}

/// The same as [`plan`], with the number of rows.
pub fn plan_counted(
    sql: &str,
    tables: &[(String, SchemaRef)],
    params: &[(&str, Param)],
) -> Result<(SchemaRef, RowCount), QueryError> {
    let context = SessionContext::new_with_config(config());
    block_on(async {
        for (name, schema) in tables {
            register_empty(&context, name, schema)?;
        }
        let frame = prepare(&context, sql, params, Allowed::Queries).await?;
        // The logical schema knows names and types; nullability is as wide as it may be.
        let schema = Arc::new(frame.schema().as_arrow().clone());
        let count = RowCount::of(frame.logical_plan());
        // Types are reconciled, and functions looked at, on the way to the plan that would be executed.
        frame.create_physical_plan().await.map_err(error)?;
        Ok((schema, count))
    })
}

/// The names of the tables that a query reads.
pub fn tables(sql: &str) -> Result<Vec<String>, QueryError> {
    let state = SessionContext::new_with_config(config()).state();
    let dialect = state.config_options().sql_parser.dialect;
    let statement = state.sql_to_statement(sql, &dialect).map_err(error)?;
    let tables = state.resolve_table_references(&statement).map_err(error)?;
    Ok(tables
        .iter()
        .map(|table| table.table().to_owned())
        .collect())
}

/// The columns of a result.
pub struct Header {
    pub schema: SchemaRef,
    /// The table or alias that each column was taken from as it is, if it was.
    pub tables: Vec<Option<String>>,
}

/// Runs a query over tables and views (each may read the ones before) and hands its rows to `sink`,
/// batch by batch. Returns the result's schema.
pub fn run<E: From<QueryError>>(
    sql: &str,
    params: &[(&str, Param)],
    tables: &[QueryTable],
    views: &[View],
    spill: Option<&Path>,
    mut sink: impl FnMut(RecordBatch) -> Result<(), E>,
) -> Result<SchemaRef, E> {
    let mut schema = None;
    stream(sql, params, tables, views, spill, |part| -> Result<(), E> {
        match part {
            Part::Header(header) => schema = Some(header.schema),
            Part::Rows(rows) => sink(rows)?,
        }
        Ok(())
    })?;
    Ok(schema.expect("the header comes first"))
}

/// A piece of a result: the header, then the rows.
pub enum Part {
    Header(Header),
    Rows(RecordBatch),
}

/// The same as [`run`], with a header before the first row is computed.
pub fn stream<E: From<QueryError>>(
    sql: &str,
    params: &[(&str, Param)],
    tables: &[QueryTable],
    views: &[View],
    spill: Option<&Path>,
    mut sink: impl FnMut(Part) -> Result<(), E>,
) -> Result<(), E> {
    let context = context(spill).map_err(error)?;
    block_on(async {
        for table in tables {
            register(&context, table).await?;
        }
        for view in views {
            // One that reads a table which the run has not begun yet is not there yet either.
            if let Ok(frame) = prepare(&context, &view.query, &[], Allowed::Queries).await {
                context
                    .register_table(view.name.as_str(), frame.into_view())
                    .map_err(error)?;
            }
        }
        let frame = prepare(&context, sql, params, Allowed::Looks).await?;
        let columns = frame.schema().iter();
        let tables = columns.map(|(table, _)| Some(table?.table().to_owned()));
        sink(Part::Header(Header {
            schema: Arc::new(frame.schema().as_arrow().clone()),
            tables: tables.collect(),
        }))?;
        let mut stream = frame.execute_stream().await.map_err(error)?;
        while let Some(batch) = stream.next().await {
            sink(Part::Rows(batch.map_err(error)?))?;
        }
        Ok(())
    })
}

/// Runs a query over rows in memory: tables by name, each with at least one batch.
pub fn over<'t>(
    sql: &str,
    params: &[(&str, Param)],
    tables: impl IntoIterator<Item = (&'t str, Vec<RecordBatch>)>,
) -> Result<Vec<RecordBatch>, QueryError> {
    let context = context(None).map_err(error)?;
    block_on(async {
        for (name, rows) in tables {
            let table = MemTable::try_new(rows[0].schema(), vec![rows]).map_err(error)?;
            context
                .register_table(name, Arc::new(table))
                .map_err(error)?;
        }
        let frame = prepare(&context, sql, params, Allowed::Looks).await?;
        frame.collect().await.map_err(error)
    })
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a thread's own runtime");
    runtime.block_on(work)
}

fn config() -> SessionConfig {
    let mut config = SessionConfig::new()
        .with_target_partitions(1)
        .with_information_schema(true);
    config.options_mut().execution.parquet.pushdown_filters = true;
    config
}

fn context(spill: Option<&Path>) -> Result<SessionContext, DataFusionError> {
    let mut runtime = RuntimeEnvBuilder::new().with_memory_limit(MEMORY_BYTES, 1.0);
    if let Some(spill) = spill {
        runtime = runtime.with_temp_file_path(spill);
    }
    Ok(SessionContext::new_with_config_rt(
        config(),
        runtime.build_arc()?,
    ))
}

async fn prepare(
    context: &SessionContext,
    sql: &str,
    params: &[(&str, Param)],
    allowed: Allowed,
) -> Result<DataFrame, QueryError> {
    let options = SQLOptions::new()
        .with_allow_ddl(false)
        .with_allow_dml(false)
        .with_allow_statements(false);
    let state = context.state();
    let dialect = state.config_options().sql_parser.dialect;
    let statement = state.sql_to_statement(sql, &dialect).map_err(error)?;
    refuse_others(&statement, allowed)?;
    let ignored = unsupported::find(&statement, &state);
    let plan = state.statement_to_plan(statement).await.map_err(error)?;
    // After the planner, which knows best what is wrong with the rest of the query.
    if let Some(message) = ignored {
        return Err(QueryError(message));
    }
    options.verify_plan(&plan).map_err(error)?;
    refuse_unknown_params(&plan, params)?;
    let frame = context.execute_logical_plan(plan).await.map_err(error)?;
    if params.is_empty() {
        return Ok(frame);
    }
    let values = params.iter().map(|(name, value)| {
        let value = match value {
            Param::Integer(value) => ScalarValue::Int64(Some(*value)),
            Param::Float(value) => ScalarValue::Float64(Some(*value)),
            Param::Text(value) => ScalarValue::Utf8(Some(value.clone())),
        };
        ((*name).to_owned(), value)
    });
    frame
        .with_param_values(values.collect::<Vec<_>>())
        .map_err(error)
}

async fn register(context: &SessionContext, table: &QueryTable) -> Result<(), QueryError> {
    let mut union: Option<DataFrame> = None;
    for (round, files) in &table.files {
        if files.is_empty() {
            continue;
        }
        if let Some(missing) = files.iter().find(|file| !file.is_file()) {
            return Err(QueryError(format!(
                "a file of the table `{}` is not there: {}; ask again if a run goes on, else `pipeline run` makes it again",
                table.name,
                missing.display()
            )));
        }
        let paths: Vec<String> = files
            .iter()
            .map(|file| file.to_string_lossy().into_owned())
            .collect();
        let is_text = files
            .iter()
            .all(|file| file.extension() == Some("jsonl".as_ref()));
        let read = if is_text {
            let lines = lines::table(&table.schema, files).map_err(error)?;
            context.read_table(Arc::new(lines))
        } else {
            let options = ParquetReadOptions::default();
            context.read_parquet(paths, options).await
        };
        let mut frame = read.map_err(error)?;
        if table.with_round {
            let value = lit(ScalarValue::Int32(round.map(u32::cast_signed)));
            frame = frame.with_column("round", value).map_err(error)?;
        } else if table.schema.field_with_name("round").is_err() {
            // The files' own column, see `TableWriter::in_round`.
            frame = frame.drop_columns(&["round"]).map_err(error)?;
        }
        union = Some(match union {
            None => frame,
            Some(others) => others.union_by_name(frame).map_err(error)?,
        });
    }
    match union {
        Some(frame) => {
            context
                .register_table(table.name.as_str(), frame.into_view())
                .map_err(error)?;
        }
        None => register_empty(
            context,
            &table.name,
            &with_round(&table.schema, table.with_round),
        )?,
    }
    Ok(())
}

fn register_empty(
    context: &SessionContext,
    name: &str,
    schema: &SchemaRef,
) -> Result<(), QueryError> {
    let nothing = MemTable::try_new(schema.clone(), vec![vec![]]).map_err(error)?;
    context
        .register_table(name, Arc::new(nothing))
        .map_err(error)?;
    Ok(())
}

/// Whether a result is one column, true or false.
pub fn is_flag(schema: &Schema) -> bool {
    matches!(&*schema.fields().to_vec(), [field] if *field.data_type() == DataType::Boolean)
}

/// The columns of a table as queries see it: with `round`, where it is `wanted`.
pub fn with_round(schema: &SchemaRef, wanted: bool) -> SchemaRef {
    if !wanted {
        return schema.clone();
    }
    let round = Arc::new(Field::new("round", DataType::Int32, true));
    let fields = schema
        .fields()
        .iter()
        .cloned()
        .chain([round])
        .collect::<Vec<_>>();
    Arc::new(Schema::new(fields))
}
