//! `pipeline sql`: every table of a run is a view, also while the run goes on.

use std::io::{BufRead, IsTerminal, Read};
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray, StructArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use clap::{Args, ValueEnum};

use super::out::{Out, line};
use super::{Failed, run_folder};
use crate::query::{self, Param, QueryError, QueryTable, View};
use crate::store::{FileRecord, LABELS, Made, RunFolder};
use crate::tables::{Call, Image, Label, Reject, Row, Telemetry, schema_of};

/// Answers one SQL query over the tables of a run; tables of all rounds have a column `round`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline sql runs/small-world \"select round, avg(reward) from rewards group by round order by round\"\n  \
    pipeline sql runs/small-world \"select * from rejects\" --format json\n  \
    pipeline sql runs/small-world < question.sql\n  \
    pipeline sql runs/small-world \"show tables\"\n\nWithout a query it reads queries from the terminal, each ended by `;`."
)]
pub struct Sql {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    /// The query; read from stdin if left out.
    query: Option<String>,
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

/// How rows are printed.
#[derive(Clone, Copy, ValueEnum)]
pub enum Format {
    Table,
    Csv,
    /// A JSON list.
    Json,
}

impl Sql {
    pub fn run(&self) -> Result<(), Failed> {
        let folder = run_folder(&self.run);
        let run = RunFolder::read(&folder)?;
        if let Some(query) = &self.query {
            return self.answer(&run, query);
        }
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            let mut query = String::new();
            let read = stdin.lock().read_to_string(&mut query);
            read.map_err(|error| Failed::Words(format!("cannot read the query: {error}")))?;
            return self.answer(&run, &query);
        }
        self.converse(&folder)
    }

    /// Reads and answers queries until the end of the input.
    fn converse(&self, folder: &std::path::Path) -> Result<(), Failed> {
        eprintln!("end a query with `;`, leave with Ctrl-D; try: show tables;");
        let mut query = String::new();
        loop {
            eprint!("{}", if query.is_empty() { "sql> " } else { "...> " });
            let read = std::io::stdin().lock().read_line(&mut query);
            if read.map_err(|error| Failed::Words(format!("cannot read the query: {error}")))? == 0
            {
                eprintln!();
                return Ok(());
            }
            if query.trim_end().ends_with(';') {
                // Opened anew, so that what a running pipeline makes meanwhile is seen.
                let run = RunFolder::read(folder)?;
                if let Err(failed) = self.answer(&run, query.trim_end().trim_end_matches(';')) {
                    eprintln!("error: {failed}");
                }
                query.clear();
            }
        }
    }

    fn answer(&self, run: &RunFolder, query: &str) -> Result<(), Failed> {
        let mut printer = Printer::new(self.format);
        let schema = ask(run, query, |batch| printer.print(&batch))?;
        printer.end(&Arc::new((*schema).clone()))
    }
}

/// Prints what a query over some tables says.
pub fn show(
    query: &str,
    params: &[(&str, Param)],
    tables: &[QueryTable],
    format: Format,
) -> Result<(), Failed> {
    let spill = spill()?;
    let mut printer = Printer::new(format);
    let sink = |batch| printer.print(&batch);
    let schema = query::run(query, params, tables, &[], Some(spill.path()), sink)?;
    printer.end(&Arc::new((*schema).clone()))
}

fn spill() -> Result<tempfile::TempDir, Failed> {
    tempfile::tempdir()
        .map_err(|error| Failed::Words(format!("no folder for temporary files: {error}")))
}

/// Runs a query over all that there is in a run: its tables, and the views of its report.
pub fn ask(
    run: &RunFolder,
    query: &str,
    sink: impl FnMut(RecordBatch) -> Result<(), Failed>,
) -> Result<SchemaRef, Failed> {
    let spill = spill()?;
    let views = report_views(&run.manifest().source);
    query::run(query, &[], &tables(run)?, &views, Some(spill.path()), sink)
}

/// The views that the pipeline of the last run names.
fn report_views(source: &serde_json::Value) -> Vec<View> {
    let views = source.get("views").and_then(serde_json::Value::as_array);
    let view = |view: &serde_json::Value| {
        let text = |name: &str| Some(view.get(name)?.as_str()?.to_owned());
        Some(View {
            name: text("name")?,
            query: text("query")?,
        })
    };
    views.into_iter().flatten().filter_map(view).collect()
}

/// A table of a run in one round, for queries of our own.
pub fn run_table(run: &RunFolder, table: &str, round: Option<u32>) -> Result<QueryTable, Failed> {
    let schema = run.schema(table, round)?;
    let schema = schema
        .ok_or_else(|| Failed::Words(format!("{} has no table `{table}`", run.root().display())))?;
    Ok(QueryTable {
        name: table.to_owned(),
        schema,
        files: vec![(None, run.files(table, round))],
        with_round: false,
    })
}

/// Every table that the manifest lists, with the rounds it has so far.
fn tables(run: &RunFolder) -> Result<Vec<QueryTable>, Failed> {
    let manifest = run.manifest();
    let mut tables: Vec<QueryTable> = Vec::new();
    for made in &manifest.made {
        let files = run.files(&made.table, made.round);
        if let Some(table) = tables.iter_mut().find(|table| table.name == made.table) {
            table.files.push((made.round, files));
            continue;
        }
        let schema = match made.kind.as_deref().and_then(schema_of) {
            Some(schema) => schema,
            None => match run.schema(&made.table, made.round)? {
                Some(schema) => schema,
                None => continue,
            },
        };
        let with_round = made.round.is_some();
        tables.push(QueryTable {
            name: made.table.clone(),
            schema,
            files: vec![(made.round, files)],
            with_round,
        });
    }
    let paths = |files: Vec<&FileRecord>| {
        files
            .iter()
            .map(|file| run.root().join(&file.file))
            .collect()
    };
    let images = paths(manifest.images.iter().collect());
    let rejects = paths(manifest.made.iter().flat_map(Made::rejects).collect());
    let telemetry = paths(manifest.made.iter().flat_map(Made::telemetry).collect());
    let calls = lines_in(&run.calls());
    let labels = lines_in(&run.root().join(LABELS));
    for (name, schema, files) in [
        ("calls", Call::schema(), calls),
        (LABELS, Label::schema(), labels),
        ("images", Image::schema(), images),
        ("rejects", Reject::schema(), rejects),
        ("telemetry", Telemetry::schema(), telemetry),
    ] {
        let files = vec![(None, files)];
        tables.push(QueryTable {
            name: name.to_owned(),
            schema,
            files,
            with_round: false,
        });
    }
    Ok(tables)
}

/// The files of JSON lines in a folder.
fn lines_in(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    files.retain(|path| path.extension() == Some("jsonl".as_ref()));
    files.sort();
    files
}

/// Prints rows in one of the formats.
struct Printer {
    format: Format,
    /// For a table, whose columns are as wide as their widest value.
    batches: Vec<RecordBatch>,
    csv: Option<arrow::csv::Writer<Out>>,
    json: Option<arrow::json::ArrayWriter<Out>>,
}

impl Printer {
    fn new(format: Format) -> Self {
        Self {
            format,
            batches: Vec::new(),
            csv: None,
            json: None,
        }
    }

    fn print(&mut self, batch: &RecordBatch) -> Result<(), Failed> {
        match self.format {
            Format::Table => self.batches.push(readable(batch, false)?),
            Format::Csv => {
                let writer = self.csv.get_or_insert_with(|| arrow::csv::Writer::new(Out));
                writer.write(&readable(batch, true)?)?;
            }
            Format::Json => {
                let builder = || arrow::json::WriterBuilder::new().with_explicit_nulls(true);
                let writer = self.json.get_or_insert_with(|| builder().build(Out));
                writer.write(batch)?;
            }
        }
        Ok(())
    }

    fn end(mut self, schema: &SchemaRef) -> Result<(), Failed> {
        match self.format {
            Format::Table => {
                if self.batches.is_empty() {
                    self.batches.push(RecordBatch::new_empty(schema.clone()));
                }
                line(arrow::util::pretty::pretty_format_batches(&self.batches)?)
            }
            Format::Csv if self.csv.is_none() => {
                let names = schema.fields().iter().map(|field| field.name().as_str());
                line(names.collect::<Vec<_>>().join(","))
            }
            Format::Csv => Ok(()),
            Format::Json => match self.json.take() {
                Some(mut writer) => {
                    writer.finish()?;
                    line("")
                }
                None => line("[]"),
            },
        }
    }
}

/// Columns that a person (or CSV) can read: bytes become their number, and, in CSV, lists and structs
/// become text.
pub fn readable(batch: &RecordBatch, flat: bool) -> Result<RecordBatch, ArrowError> {
    let mut fields = Vec::new();
    let mut columns: Vec<ArrayRef> = Vec::new();
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        let mut column = without_bytes(column)?;
        if flat && column.data_type().is_nested() {
            column = as_text(&column)?;
        }
        fields.push(Field::new(field.name(), column.data_type().clone(), true));
        columns.push(column);
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)
}

fn as_text(column: &ArrayRef) -> Result<ArrayRef, ArrowError> {
    let options = FormatOptions::default();
    let formatter = ArrayFormatter::try_new(column, &options)?;
    let text = |row| (!column.is_null(row)).then(|| formatter.value(row).to_string());
    Ok(Arc::new(
        (0..column.len()).map(text).collect::<StringArray>(),
    ))
}

/// `12345 bytes` in place of bytes, also inside structs: nobody reads a picture in hex.
fn without_bytes(column: &ArrayRef) -> Result<ArrayRef, ArrowError> {
    match column.data_type() {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            let column = cast(column, &DataType::LargeBinary)?;
            let lengths = column
                .as_binary::<i64>()
                .iter()
                .map(|bytes| Some(format!("{} bytes", bytes?.len())));
            Ok(Arc::new(lengths.collect::<StringArray>()))
        }
        DataType::Struct(fields) => {
            let parts = column.as_struct();
            let columns = parts
                .columns()
                .iter()
                .map(without_bytes)
                .collect::<Result<Vec<_>, _>>()?;
            let field = |(field, column): (&Arc<Field>, &ArrayRef)| {
                Field::new(field.name(), column.data_type().clone(), true)
            };
            let fields: Vec<Field> = fields.iter().zip(&columns).map(field).collect();
            Ok(Arc::new(StructArray::try_new(
                fields.into(),
                columns,
                parts.nulls().cloned(),
            )?))
        }
        _ => Ok(column.clone()),
    }
}

impl From<ArrowError> for Failed {
    fn from(error: ArrowError) -> Self {
        Self::Query(QueryError(error.to_string()))
    }
}
