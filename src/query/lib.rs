//! SQL queries over tables, with DataFusion.
//!
//! This crate contains all use of DataFusion, and all async code except the server of pages.
//! Every query runs on its own thread, with bounded memory and a deep stack, and spills to a folder
//! of the caller's. Tables are given as lists of Parquet files, so that a query never reads a file
//! that the manifest does not list.

mod apart;
mod bounded;
mod cancel;
mod checked;
mod count;
mod depth;
mod interface;
mod intervals;
mod large;
mod lines;
mod positions;
mod row_by_row;
#[cfg(test)]
mod tests;
pub mod types;
mod unsupported;
mod words;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::ScalarValue;
use datafusion::datasource::MemTable;
use datafusion::error::DataFusionError;
use datafusion::execution::SessionState;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::physical_plan::execute_stream;
use datafusion::prelude::{
    DataFrame, ParquetReadOptions, SQLOptions, SessionConfig, SessionContext, lit,
};
use datafusion::sql::parser::Statement;
use futures::StreamExt;

use apart::{Listener, apart, piece_by_piece};
use cancel::cancellable;
use checked::CheckedFiles;
pub use count::{RowCount, Several};
pub use interface::{Header, Param, Part, QueryError, QueryTable, Room, View};
pub use positions::positions;
pub use row_by_row::reach_beyond;
use words::{Allowed, error, refuse_others, refuse_unknown_params};

use ovchat_data::store::{StoreError, TableFile, schema_of_file};
use ovchat_io::files;

/// Returns the schema of a query's result. Reads no data.
pub fn plan(
    sql: &str,
    tables: &[(String, SchemaRef)],
    params: &[(&str, Param)],
) -> Result<SchemaRef, QueryError> {
    Ok(plan_counted(sql, tables, params)?.0)
}

/// Returns the schema of a query's result, as [`plan`], with the bounds on its number of rows.
pub fn plan_counted(
    sql: &str,
    tables: &[(String, SchemaRef)],
    params: &[(&str, Param)],
) -> Result<(SchemaRef, RowCount), QueryError> {
    apart(async || {
        let context = SessionContext::new_with_config(config());
        bounded::register(&context);
        for (name, schema) in tables {
            register_empty(&context, name, schema).map_err(error)?;
        }
        let frame = prepare(&context, sql, params, Allowed::Queries).await?;
        // The logical schema has the names and types; nullability is as wide as possible.
        let schema = Arc::new(frame.schema().as_arrow().clone());
        types::each_type(&schema, &mut |path, of| {
            types::equal_fields(path, of).map_or(Ok(()), |words| Err(QueryError::Other(words)))
        })?;
        let count = RowCount::of(frame.logical_plan());
        // Types are coerced and functions resolved while the physical plan is created.
        frame.create_physical_plan().await.map_err(error)?;
        Ok((schema, count))
    })
}

/// Returns the names of the tables that a query reads.
pub fn tables(sql: &str) -> Result<Vec<String>, QueryError> {
    apart(async || {
        let state = SessionContext::new_with_config(config()).state();
        let statement = parse(&state, sql)?;
        let tables = state.resolve_table_references(&statement).map_err(error)?;
        let names = tables.iter().map(|table| table.table().to_owned());
        Ok(names.collect())
    })
}

/// Returns the name of a table as it is written in SQL: in quotes if it needs them.
pub fn identifier(name: &str) -> String {
    match tables(&format!("select * from {name}")) {
        Ok(read) if read == [name] => name.to_owned(),
        _ => format!("\"{}\"", name.replace('"', "\"\"")),
    }
}

/// Runs a query over tables and views (each view may read the previous ones) and passes its rows to
/// `sink`, batch by batch. Returns the result's schema.
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
        if files::stopped() {
            return Err(QueryError::Other("interrupted".to_owned()).into());
        }
        match part {
            Part::Header(header) => schema = Some(header.schema),
            Part::Rows(rows) => sink(rows)?,
            Part::Nothing => {}
        }
        Ok(())
    })?;
    Ok(schema.expect("the header comes first"))
}

/// Runs a query as [`run`] does, but passes a header before the first row is computed, and
/// [`Part::Nothing`] while there are no rows. If `sink` ends a query, its thread may run on for a
/// while.
pub fn stream<E: From<QueryError>>(
    sql: &str,
    params: &[(&str, Param)],
    tables: &[QueryTable],
    views: &[View],
    spill: Option<&Path>,
    sink: impl FnMut(Part) -> Result<(), E>,
) -> Result<(), E> {
    stream_within(sql, params, tables, views, spill.into(), sink)
}

/// Runs a query as [`stream`] does, within a memory limit.
pub fn stream_within<E: From<QueryError>>(
    sql: &str,
    params: &[(&str, Param)],
    tables: &[QueryTable],
    views: &[View],
    room: Room<'_>,
    sink: impl FnMut(Part) -> Result<(), E>,
) -> Result<(), E> {
    let (sql, tables, views) = (sql.to_owned(), tables.to_vec(), views.to_vec());
    let params: Vec<(String, Param)> = params
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone()))
        .collect();
    let (memory, spill) = (room.memory, room.spill.map(Path::to_owned));
    piece_by_piece(
        async move |listener| {
            let spill = spill.as_deref();
            let context = context(Room { memory, spill }).map_err(error)?;
            let files = tables.iter().flat_map(|table| table.files.clone());
            let error = checked_files(&context, &files.collect::<Vec<_>>());
            let mentioned = mentioned(&sql, &views);
            for table in tables.iter().filter(|table| mentioned(&table.name)) {
                register(&context, table).await.map_err(&error)?;
            }
            for view in views.iter().filter(|view| mentioned(&view.name)) {
                // A view over a table that the run has not begun yet cannot be planned yet.
                if let Ok(frame) = prepare(&context, &view.query, &[], Allowed::Queries).await {
                    context
                        .register_table(view.name.as_str(), frame.into_view())
                        .map_err(&error)?;
                }
            }
            let params: Vec<(&str, Param)> = params
                .iter()
                .map(|(name, value)| (name.as_str(), value.clone()))
                .collect();
            let frame = prepare(&context, &sql, &params, Allowed::Looks).await?;
            let columns = frame.schema().iter();
            let tables = columns.map(|(table, _)| Some(table?.table().to_owned()));
            let header = Header {
                schema: Arc::new(frame.schema().as_arrow().clone()),
                tables: tables.collect(),
            };
            listener.give(Part::Header(header))?;
            give_rows(frame, listener, &error).await
        },
        sink,
    )
}

/// Executes a query and passes its rows on.
async fn give_rows(
    frame: DataFrame,
    mut listener: Listener,
    error: &dyn Fn(DataFusionError) -> QueryError,
) -> Result<(), QueryError> {
    let tasks = Arc::new(frame.task_ctx());
    let plan = frame.create_physical_plan().await.map_err(error)?;
    let plan = cancellable(plan, &listener.is_gone).map_err(error)?;
    let mut stream = execute_stream(plan, tasks).map_err(error)?;
    while let Some(batch) = listener.unless_gone(stream.next()).await? {
        listener.give(Part::Rows(batch.map_err(error)?))?;
    }
    Ok(())
}

/// Lets a query read these files, with their checksums verified. Returns the function that words its
/// errors: for a corrupt file, it is better than DataFusion's message.
fn checked_files(
    context: &SessionContext,
    files: &[(Option<u32>, Vec<TableFile>)],
) -> impl Fn(DataFusionError) -> QueryError + use<> {
    let files = CheckedFiles::new(files.iter().flat_map(|(_, files)| files));
    let corrupt = files.corrupt();
    context.register_object_store(ObjectStoreUrl::local_filesystem().as_ref(), Arc::new(files));
    move |failed| {
        let corrupt = corrupt.lock().expect("no panic while locked");
        match &*corrupt {
            Some(path) => {
                let path = path.clone();
                let corrupt = StoreError::Corrupt { path };
                QueryError::Other(format!(
                    "{corrupt}; `pipeline verify` lists corrupt files, and after `pipeline repair` the next \
                     `pipeline run` rebuilds them"
                ))
            }
            None => error(failed),
        }
    }
}

/// Runs a query over in-memory tables, each with at least one batch.
pub fn over<'t>(
    sql: &str,
    params: &[(&str, Param)],
    tables: impl IntoIterator<Item = (&'t str, Vec<RecordBatch>)>,
) -> Result<Vec<RecordBatch>, QueryError> {
    let tables: Vec<(&str, Vec<RecordBatch>)> = tables.into_iter().collect();
    apart(async || {
        let context = context(None.into()).map_err(error)?;
        for (name, rows) in tables {
            let schema = nullable(&rows[0].schema());
            let table = MemTable::try_new(schema, vec![rows]).map_err(error)?;
            context
                .register_table(name, Arc::new(table))
                .map_err(error)?;
        }
        let frame = prepare(&context, sql, params, Allowed::Looks).await?;
        frame.collect().await.map_err(error)
    })
}

fn config() -> SessionConfig {
    let mut config = SessionConfig::new()
        .with_target_partitions(1)
        .with_information_schema(true);
    config.options_mut().execution.parquet.pushdown_filters = true;
    // Without it, timestamps with a time zone would lose the zone.
    config.options_mut().execution.time_zone = Some("+00:00".to_owned());
    config
}

fn context(room: Room<'_>) -> Result<SessionContext, DataFusionError> {
    let mut runtime = RuntimeEnvBuilder::new().with_memory_limit(room.memory, 1.0);
    if let Some(spill) = room.spill {
        runtime = runtime.with_temp_file_path(spill);
    }
    let context = SessionContext::new_with_config_rt(config(), runtime.build_arc()?);
    bounded::register(&context);
    Ok(context)
}

fn parse(state: &SessionState, sql: &str) -> Result<Statement, QueryError> {
    depth::refuse_deep(sql)?;
    let dialect = state.config_options().sql_parser.dialect;
    let statement = state.sql_to_statement(sql, &dialect).map_err(error)?;
    large::refuse_large(&statement)?;
    Ok(statement)
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
    let statement = parse(&state, sql)?;
    refuse_others(&statement, allowed)?;
    let ignored = unsupported::find(&statement, &state);
    let plan = state.statement_to_plan(statement).await.map_err(error)?;
    // Reported after planning, because the planner has better messages for other errors in the
    // query.
    if let Some(message) = ignored {
        return Err(QueryError::Other(message));
    }
    options.verify_plan(&plan).map_err(error)?;
    intervals::refuse_compared(&plan)?;
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

/// Returns a predicate for the tables and views that a query may read: those whose name is in its
/// text, or in the text of a view that it may read. The others are not opened, so that a corrupt
/// one does not fail the query.
fn mentioned(sql: &str, views: &[View]) -> impl Fn(&str) -> bool + use<> {
    let mut text = sql.to_lowercase();
    let mut left: Vec<&View> = views.iter().collect();
    while let Some(found) = left
        .iter()
        .position(|view| text.contains(&view.name.to_lowercase()))
    {
        text.push(' ');
        text.push_str(&left.swap_remove(found).query.to_lowercase());
    }
    let asks_for_all = ["show", "information_schema"]
        .iter()
        .any(|word| text.contains(word));
    move |name| asks_for_all || text.contains(&name.to_lowercase())
}

async fn register(context: &SessionContext, table: &QueryTable) -> Result<(), DataFusionError> {
    let mut union: Option<DataFrame> = None;
    for (round, files) in &table.files {
        if files.is_empty() {
            continue;
        }
        if let Some(missing) = files.iter().find(|file| !file.path.is_file()) {
            return Err(DataFusionError::Execution(format!(
                "a file of table `{}` is missing: {}; if a run is in progress, try again, else `pipeline run` rebuilds it",
                table.name,
                missing.path.display()
            )));
        }
        let paths: Vec<String> = files
            .iter()
            .map(|file| file.path.to_string_lossy().into_owned())
            .collect();
        let is_text = files
            .iter()
            .all(|file| file.path.extension() == Some("jsonl".as_ref()));
        let read = if is_text {
            let files = files.iter().map(|file| file.path.clone()).collect();
            let lines = lines::table(&table.schema, files)?;
            context.read_table(Arc::new(lines))
        } else {
            let schema = schema_of_file(&files[0].path).ok();
            // Files of one table differ in their metadata.
            let schema = schema.map(|schema| documented(&nullable(&schema), &table.schema));
            let options = ParquetReadOptions {
                schema: schema.as_ref(),
                ..ParquetReadOptions::default()
            };
            context.read_parquet(paths, options).await
        };
        let mut frame = read?;
        if table.with_round {
            let value = lit(ScalarValue::Int32(round.map(u32::cast_signed)));
            frame = frame.with_column("round", value)?;
        } else if table.schema.field_with_name("round").is_err() {
            // The column `round` in the files, see `TableWriter::in_round`.
            frame = frame.drop_columns(&["round"])?;
        }
        union = Some(match union {
            None => frame,
            Some(others) => others.union_by_name(frame)?,
        });
    }
    match union {
        Some(frame) => {
            context.register_table(table.name.as_str(), frame.into_view())?;
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
) -> Result<(), DataFusionError> {
    let nothing = MemTable::try_new(nullable(schema), vec![vec![]])?;
    context.register_table(name, Arc::new(nothing))?;
    Ok(())
}

/// Returns the columns with the metadata that they have in `documented`, and without their own, which
/// differs between files that different versions of this program wrote.
fn documented(schema: &Schema, documented: &Schema) -> Schema {
    let fields = schema.fields().iter().map(|field| {
        let of = documented.field_with_name(field.name());
        let metadata = of.map_or_else(|_| HashMap::new(), |of| of.metadata().clone());
        field.as_ref().clone().with_metadata(metadata)
    });
    Schema::new(fields.collect::<Vec<Field>>())
}

/// Returns the schema with all columns nullable. If the column of an empty scalar subquery is not
/// nullable, DataFusion does not treat its value as null.
fn nullable(schema: &SchemaRef) -> SchemaRef {
    let fields = schema.fields().iter();
    let fields = fields.map(|field| field.as_ref().clone().with_nullable(true));
    let fields: Vec<Field> = fields.collect();
    Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()))
}

/// True if a result is a single Boolean column.
pub fn is_flag(schema: &Schema) -> bool {
    matches!(&*schema.fields().to_vec(), [field] if *field.data_type() == DataType::Boolean)
}

/// Returns the columns of a table as queries see them: with `round` if `wanted`.
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
