//! The rows of a query in each format of `--format`.
//!
//! | format | null | `''` | NaN, infinities | bytes | lists, structs |
//! |---|---|---|---|---|---|
//! | `csv` | nothing | `""` | `NaN`, `inf`, `-inf` | base64 | JSON |
//! | `json`, `jsonl` | `null` | `""` | an error, or text with `--nan text` | base64 | JSON |
//! | `parquet`, `arrow` | as they are | | | | |
//! | `table`, `markdown` | for people | | | | |

mod json;
#[cfg(test)]
mod tests;
mod text;

pub use json::Nan;
pub use text::{readable, shown};

use std::io::{self, Write};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::{CastOptions, cast, cast_with_options};
use arrow::datatypes::{DataType, FieldRef, Fields, Schema, SchemaRef, TimeUnit};
use arrow::error::ArrowError;
use arrow::json::writer::{ArrayWriter, LineDelimitedWriter, WriterBuilder};
use arrow::util::pretty::pretty_format_batches;
use arrow_ipc::writer::FileWriter;
use clap::{Args, ValueEnum};
use json::{Cells, non_finite};
use text::{csv_header, csv_rows, markdown_header, markdown_rows};

use super::failed::Failed;
use super::out::say;
use ovchat_data::store::ParquetStream;
use ovchat_query::types::{each_type, equal_fields, look_within};
use ovchat_query::{Header, QueryError};

/// A format for rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table with borders, for people.
    Table,
    /// A Markdown table, for people.
    Markdown,
    /// CSV: null is empty, '' is "", lists and structs are JSON, bytes are base64.
    Csv,
    /// A JSON list of objects; bytes are base64.
    Json,
    /// One JSON object per line.
    Jsonl,
    /// A Parquet file. Lossless, except that timestamps in seconds become milliseconds and Date64
    /// becomes Date32.
    Parquet,
    /// An Arrow IPC file (Feather). Lossless.
    Arrow,
}

/// The options of commands that print rows.
#[derive(Debug, Clone, Copy, Args)]
pub struct RowFormat {
    /// The format of the rows. Arrow and Parquet are lossless; the others write values as text.
    #[arg(long, value_enum, default_value = "table")]
    pub format: Format,
    /// The treatment of NaN and infinities in JSON, which cannot represent them.
    #[arg(long, value_enum, default_value = "error")]
    pub nan: Nan,
}

impl RowFormat {
    pub fn is_binary(self) -> bool {
        matches!(self.format, Format::Parquet | Format::Arrow)
    }

    /// Refuses to write a binary format to a terminal.
    pub fn refuse_terminal(self, is_terminal: bool) -> Result<(), Failed> {
        let name = match self.format {
            Format::Parquet => "parquet",
            Format::Arrow => "arrow",
            _ => return Ok(()),
        };
        if !is_terminal {
            return Ok(());
        }
        Err(Failed::Usage(format!(
            "--format {name} is binary, but stdout is a terminal; write it to a file: \
             pipeline sql RUN \"…\" --format {name} > rows.{name}"
        )))
    }
}

/// A writer of the rows of one result.
pub struct RowWriter<W: Write + Send> {
    sink: Sink<W>,
    schema: SchemaRef,
    cells: Cells,
    /// The text before the first row; empty once it is written. A query that fails before its first
    /// row writes nothing.
    header: String,
    /// The number of rows written so far.
    rows: usize,
}

/// The minimum number of rows of a printed table that are buffered before they are printed.
const PIECE_ROWS: usize = 10_000;

enum Sink<W: Write + Send> {
    /// Columns are as wide as their widest value, so rows are buffered until there are
    /// [`PIECE_ROWS`].
    Table(W, Vec<RecordBatch>),
    Markdown(W),
    Csv(W),
    Json(W, ArrayWriter<Vec<u8>>),
    JsonLines(W, LineDelimitedWriter<Vec<u8>>),
    Parquet(ParquetStream<W>),
    Arrow(Box<FileWriter<W>>),
}

impl<W: Write + Send> RowWriter<W> {
    /// Returns a writer of rows with these columns.
    pub fn begin(format: RowFormat, header: &Header, out: W) -> Result<Self, Failed> {
        if !matches!(format.format, Format::Table | Format::Markdown) {
            refuse_equal_names(header)?;
            each_type(&header.schema, &mut refuse_equal_fields)?;
        }
        let cells = Cells::new(format.nan);
        let json = || {
            let builder = WriterBuilder::new().with_explicit_nulls(true);
            builder.with_encoder_factory(Arc::new(cells.clone()))
        };
        let schema = match format.format {
            Format::Parquet => {
                each_type(&header.schema, &mut refuse_interval)?;
                with_plain_types(&header.schema, parquet_type)
            }
            _ => with_plain_types(&header.schema, DataType::clone),
        };
        let mut header = String::new();
        let sink = match format.format {
            Format::Table => Sink::Table(out, Vec::new()),
            Format::Markdown => {
                header = markdown_header(&schema);
                Sink::Markdown(out)
            }
            Format::Csv => {
                header = csv_header(&schema);
                Sink::Csv(out)
            }
            Format::Json => Sink::Json(out, json().build(Vec::new())),
            Format::Jsonl => Sink::JsonLines(out, json().build(Vec::new())),
            Format::Parquet => Sink::Parquet(ParquetStream::begin(out, &schema)?),
            Format::Arrow => Sink::Arrow(Box::new(FileWriter::try_new(out, &schema)?)),
        };
        Ok(Self {
            sink,
            schema,
            cells,
            header,
            rows: 0,
        })
    }

    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), Failed> {
        let cells = self.cells.clone();
        let first = self.rows;
        let check = |batch: &RecordBatch, place: &str, formats: &str| {
            if cells.take_non_finite() {
                return Err(non_finite(batch, first, place, formats));
            }
            Ok(())
        };
        let in_json = ", which JSON cannot represent";
        let header = std::mem::take(&mut self.header);
        match &mut self.sink {
            Sink::Table(out, batches) => {
                let kept: usize = batches.iter().map(RecordBatch::num_rows).sum();
                if kept >= PIECE_ROWS {
                    if kept == self.rows {
                        say!(
                            "more than {kept} rows: printing the table in pieces, each with its own column widths; use --format csv for a single table"
                        );
                    }
                    print_table(out, &std::mem::take(batches))?;
                }
                batches.push(shown(batch)?);
            }
            Sink::Markdown(out) => {
                let text = markdown_rows(&readable(batch, false)?)?;
                out.write_all((header + &text).as_bytes())
                    .map_err(unwritten)?;
            }
            Sink::Csv(out) => {
                let text = csv_rows(batch, &cells).map_err(not_csv)?;
                let of_nested = |&at: &usize| batch.column(at).data_type().is_nested();
                let nested: Vec<usize> = (0..batch.num_columns()).filter(of_nested).collect();
                check(
                    &batch.project(&nested)?,
                    " in a list or struct, which CSV stores as JSON, and JSON cannot represent it",
                    "`--format parquet` or `arrow`",
                )?;
                out.write_all((header + &text).as_bytes())
                    .map_err(unwritten)?;
            }
            Sink::Json(out, writer) => {
                writer.write(batch)?;
                check(batch, in_json, "`--format csv`, `parquet` or `arrow`")?;
                drain(writer.get_mut(), out)?;
            }
            Sink::JsonLines(out, writer) => {
                writer.write(batch)?;
                check(batch, in_json, "`--format csv`, `parquet` or `arrow`")?;
                drain(writer.get_mut(), out)?;
            }
            Sink::Parquet(writer) => writer.write(&fitted(batch, &self.schema)?)?,
            Sink::Arrow(writer) => writer.write(&fitted(batch, &self.schema)?)?,
        }
        self.rows += batch.num_rows();
        Ok(())
    }

    /// Writes the text after the last row.
    pub fn finish(self) -> Result<W, Failed> {
        let mut out = match self.sink {
            Sink::Table(mut out, mut batches) => {
                if batches.is_empty() {
                    batches.push(shown(&RecordBatch::new_empty(self.schema))?);
                }
                print_table(&mut out, &batches)?;
                out
            }
            Sink::Markdown(mut out) | Sink::Csv(mut out) => {
                out.write_all(self.header.as_bytes()).map_err(unwritten)?;
                out
            }
            Sink::Json(mut out, mut writer) => {
                writer.finish()?;
                drain(writer.get_mut(), &mut out)?;
                out.write_all(b"\n").map_err(unwritten)?;
                out
            }
            Sink::JsonLines(mut out, mut writer) => {
                writer.finish()?;
                drain(writer.get_mut(), &mut out)?;
                out
            }
            Sink::Parquet(writer) => writer.finish()?,
            Sink::Arrow(mut writer) => {
                writer.finish()?;
                writer.into_inner()?
            }
        };
        out.flush().map_err(unwritten)?;
        Ok(out)
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "used as a function with map_err"
)]
fn unwritten(error: io::Error) -> Failed {
    Failed::Words(format!("cannot write to stdout: {error}"))
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "used as a function with map_err"
)]
fn not_csv(error: ArrowError) -> Failed {
    Failed::Words(format!(
        "cannot write the rows as CSV, in which lists, structs and maps are JSON: {error}; use \
         `--format parquet` or `arrow`"
    ))
}

fn print_table(out: &mut impl Write, batches: &[RecordBatch]) -> Result<(), Failed> {
    writeln!(out, "{}", pretty_format_batches(batches)?).map_err(unwritten)
}

fn drain(from: &mut Vec<u8>, to: &mut impl Write) -> Result<(), Failed> {
    to.write_all(from).map_err(unwritten)?;
    from.clear();
    Ok(())
}

/// Rejects duplicate column names: readers of files drop or rename one of them, and JSON cannot
/// have two.
fn refuse_equal_names(header: &Header) -> Result<(), Failed> {
    let fields = header.schema.fields();
    for field in fields {
        let equal = |(other, _): &(&FieldRef, &Option<String>)| other.name() == field.name();
        let equal: Vec<_> = fields.iter().zip(&header.tables).filter(equal).collect();
        if equal.len() == 1 {
            continue;
        }
        let name = field.name();
        let alias = |(_, table): &(&FieldRef, &Option<String>)| {
            let table = table.as_ref()?;
            Some(format!("{table}.{name} as {table}_{name}"))
        };
        let aliases: Option<Vec<String>> = equal.iter().map(alias).collect();
        let aliases = aliases.map_or_else(
            || format!("… as {name}_1, … as {name}_2"),
            |aliases| aliases.join(", "),
        );
        let count = equal.len();
        return Err(Failed::Words(format!(
            "{count} columns are named `{name}`; give each an alias: select {aliases}"
        )));
    }
    Ok(())
}

fn refuse_equal_fields(path: &str, of: &DataType) -> Result<(), Failed> {
    equal_fields(path, of).map_or(Ok(()), |words| Err(Failed::Words(words)))
}

fn refuse_interval(path: &str, of: &DataType) -> Result<(), Failed> {
    if !matches!(of, DataType::Interval(_)) {
        return Ok(());
    }
    Err(Failed::Words(format!(
        "`{path}` is an interval, which Parquet cannot store: use cast({path} as varchar) in the query, or \
         use `--format arrow`"
    )))
}

/// Returns the type in which Parquet stores values of a type that it lacks.
fn parquet_type(of: &DataType) -> DataType {
    match of {
        DataType::Timestamp(TimeUnit::Second, zone) => {
            DataType::Timestamp(TimeUnit::Millisecond, zone.clone())
        }
        DataType::Time32(TimeUnit::Second) => DataType::Time32(TimeUnit::Millisecond),
        DataType::Date64 => DataType::Date32,
        other => other.clone(),
    }
}

/// Returns the schema with types that every reader of Parquet and Arrow supports: without views and
/// dictionaries, and with simple types replaced by the result of `simple`.
fn with_plain_types(schema: &SchemaRef, simple: fn(&DataType) -> DataType) -> SchemaRef {
    let fields = schema.fields().iter();
    let fields: Fields = fields.map(|field| plain_field(field, simple)).collect();
    Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()))
}

/// Returns the field with its plain type, and nullable, as computed columns may be.
fn plain_field(field: &FieldRef, simple: fn(&DataType) -> DataType) -> FieldRef {
    let plain = plain_type(field.data_type(), simple);
    let field = field.as_ref().clone().with_data_type(plain);
    Arc::new(field.with_nullable(true))
}

fn plain_type(of: &DataType, simple: fn(&DataType) -> DataType) -> DataType {
    let plain_item = |item: &FieldRef| plain_field(item, simple);
    match of {
        DataType::Utf8View => DataType::Utf8,
        DataType::BinaryView => DataType::Binary,
        DataType::Dictionary(_, values) => plain_type(values, simple),
        DataType::List(item) | DataType::ListView(item) => DataType::List(plain_item(item)),
        DataType::LargeList(item) | DataType::LargeListView(item) => {
            DataType::LargeList(plain_item(item))
        }
        DataType::FixedSizeList(item, size) => DataType::FixedSizeList(plain_item(item), *size),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(plain_item).collect()),
        DataType::Map(entries, sorted) => {
            // Neither entries nor keys may be null.
            let of_entry = |field: &FieldRef| {
                let plain = plain_type(field.data_type(), simple);
                Arc::new(field.as_ref().clone().with_data_type(plain))
            };
            let plain = match entries.data_type() {
                DataType::Struct(fields) => DataType::Struct(fields.iter().map(of_entry).collect()),
                other => other.clone(),
            };
            let entries = entries.as_ref().clone().with_data_type(plain);
            DataType::Map(Arc::new(entries), *sorted)
        }
        other => simple(other),
    }
}

/// Casts the rows to the types of a schema; a lossy cast is an error.
fn fitted(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, Failed> {
    let options = CastOptions {
        safe: false,
        ..CastOptions::default()
    };
    let mut columns = Vec::with_capacity(batch.num_columns());
    for (column, field) in batch.columns().iter().zip(schema.fields()) {
        let fitted = cast_with_options(column, field.data_type(), &options)?;
        let is_fine = !has_date64(column.data_type())
            || field.data_type() == column.data_type()
            || cast(&fitted, column.data_type())?.as_ref() == column.as_ref();
        if !is_fine {
            let name = field.name();
            return Err(Failed::Words(format!(
                "column `{name}` has dates with a time of day, which Parquet cannot store: use \
                 cast({name} as timestamp) in the query, or use `--format arrow`"
            )));
        }
        columns.push(fitted);
    }
    Ok(RecordBatch::try_new(schema.clone(), columns)?)
}

fn has_date64(of: &DataType) -> bool {
    let mut has = false;
    let looked = look_within::<Failed>("", of, &mut |_, of| {
        has |= *of == DataType::Date64;
        Ok(())
    });
    looked.is_ok() && has
}

impl From<ArrowError> for Failed {
    fn from(error: ArrowError) -> Self {
        Self::Query(QueryError::Other(error.to_string()))
    }
}
