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

pub use text::readable;

use std::io::{self, Write};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::cast;
use arrow::datatypes::{DataType, FieldRef, Fields, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::json::writer::{ArrayWriter, LineDelimitedWriter, WriterBuilder};
use arrow::util::pretty::pretty_format_batches;
use arrow_ipc::writer::FileWriter;
use clap::{Args, ValueEnum};
use json::{Cells, non_finite};
use text::{csv_rows, markdown_header, markdown_rows, push_field};

use super::Failed;
use crate::query::{Header, QueryError};
use crate::store::ParquetStream;

/// A format for rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people: a table with borders.
    Table,
    /// For people: a Markdown table.
    Markdown,
    /// Null is empty, '' is "", lists and structs are JSON, bytes are base64.
    Csv,
    /// A JSON list of objects; bytes are base64.
    Json,
    /// A JSON object a line.
    Jsonl,
    /// A Parquet file: lossless, but timestamps in seconds and Date64 become int64.
    Parquet,
    /// An Arrow IPC file (Feather): lossless.
    Arrow,
}

/// The treatment of NaN and infinities in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Nan {
    /// The command fails.
    Error,
    /// The texts "NaN", "inf" and "-inf".
    Text,
}

/// The options of commands that print rows.
#[derive(Debug, Clone, Copy, Args)]
pub struct RowFormat {
    /// The format of the rows. Arrow is lossless, Parquet nearly; the others write values as text.
    #[arg(long, value_enum, default_value = "table")]
    pub format: Format,
    /// The treatment of NaN and infinities in JSON, which has no such numbers.
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
            "--format {name} is binary, and stdout is a terminal; write it to a file: \
             pipeline sql RUN \"…\" --format {name} > rows.{name}"
        )))
    }
}

/// Writes the rows of one result.
pub struct RowWriter<W: Write + Send> {
    sink: Sink<W>,
    schema: SchemaRef,
    cells: Cells,
    /// Rows written so far.
    rows: usize,
}

enum Sink<W: Write + Send> {
    /// Columns are as wide as their widest value, so all rows are kept until the end.
    Table(W, Vec<RecordBatch>),
    Markdown(W),
    Csv(W),
    Json(W, ArrayWriter<Vec<u8>>),
    JsonLines(W, LineDelimitedWriter<Vec<u8>>),
    Parquet(ParquetStream<W>),
    Arrow(Box<FileWriter<W>>),
}

impl<W: Write + Send> RowWriter<W> {
    /// Writes what stands before the first row.
    pub fn begin(format: RowFormat, header: &Header, mut out: W) -> Result<Self, Failed> {
        if !matches!(format.format, Format::Table | Format::Markdown) {
            refuse_equal_names(header)?;
        }
        let cells = Cells::new(format.nan);
        let json = || {
            let builder = WriterBuilder::new().with_explicit_nulls(true);
            builder.with_encoder_factory(Arc::new(cells.clone()))
        };
        let schema = without_views(&header.schema);
        let names = schema.fields().iter().map(|field| field.name().as_str());
        let sink = match format.format {
            Format::Table => Sink::Table(out, Vec::new()),
            Format::Markdown => {
                out.write_all(markdown_header(&schema).as_bytes())
                    .map_err(unwritten)?;
                Sink::Markdown(out)
            }
            Format::Csv => {
                let mut line = String::new();
                for (at, name) in names.enumerate() {
                    line.push_str(if at == 0 { "" } else { "," });
                    push_field(&mut line, name);
                }
                line.push('\n');
                out.write_all(line.as_bytes()).map_err(unwritten)?;
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
            rows: 0,
        })
    }

    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), Failed> {
        let cells = self.cells.clone();
        let first = self.rows;
        let check = |batch: &RecordBatch, formats: &str| {
            if cells.take_non_finite() {
                return Err(non_finite(batch, first, formats));
            }
            Ok(())
        };
        match &mut self.sink {
            Sink::Table(_, batches) => batches.push(readable(batch, false)?),
            Sink::Markdown(out) => {
                let text = markdown_rows(&readable(batch, false)?)?;
                out.write_all(text.as_bytes()).map_err(unwritten)?;
            }
            Sink::Csv(out) => {
                let text = csv_rows(batch, &cells)?;
                let of_nested = |&at: &usize| batch.column(at).data_type().is_nested();
                let nested: Vec<usize> = (0..batch.num_columns()).filter(of_nested).collect();
                check(&batch.project(&nested)?, "`--format parquet` or `arrow`")?;
                out.write_all(text.as_bytes()).map_err(unwritten)?;
            }
            Sink::Json(out, writer) => {
                writer.write(batch)?;
                check(batch, "`--format csv`, `parquet` or `arrow`")?;
                drain(writer.get_mut(), out)?;
            }
            Sink::JsonLines(out, writer) => {
                writer.write(batch)?;
                check(batch, "`--format csv`, `parquet` or `arrow`")?;
                drain(writer.get_mut(), out)?;
            }
            Sink::Parquet(writer) => writer.write(&fitted(batch, &self.schema)?)?,
            Sink::Arrow(writer) => writer.write(&fitted(batch, &self.schema)?)?,
        }
        self.rows += batch.num_rows();
        Ok(())
    }

    /// Writes what stands behind the last row.
    pub fn finish(self) -> Result<W, Failed> {
        let mut out = match self.sink {
            Sink::Table(mut out, mut batches) => {
                if batches.is_empty() {
                    batches.push(RecordBatch::new_empty(self.schema));
                }
                writeln!(out, "{}", pretty_format_batches(&batches)?).map_err(unwritten)?;
                out
            }
            Sink::Markdown(out) | Sink::Csv(out) => out,
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
    reason = "it is used as a function on errors"
)]
fn unwritten(error: io::Error) -> Failed {
    Failed::Words(format!("cannot write to stdout: {error}"))
}

fn drain(from: &mut Vec<u8>, to: &mut impl Write) -> Result<(), Failed> {
    to.write_all(from).map_err(unwritten)?;
    from.clear();
    Ok(())
}

/// Readers of files keep one of two columns of the same name, or rename one; JSON can't have two.
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
            "{count} columns are called `{name}`; give each a name of its own: select {aliases}"
        )));
    }
    Ok(())
}

/// The schema with the types that every reader of Parquet and Arrow knows: no views, no dictionaries.
fn without_views(schema: &SchemaRef) -> SchemaRef {
    let fields: Fields = schema.fields().iter().map(plain_field).collect();
    Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()))
}

/// Nullable, as what a query computes may be.
fn plain_field(field: &FieldRef) -> FieldRef {
    let plain = plain_type(field.data_type());
    let field = field.as_ref().clone().with_data_type(plain);
    Arc::new(field.with_nullable(true))
}

fn plain_type(of: &DataType) -> DataType {
    match of {
        DataType::Utf8View => DataType::Utf8,
        DataType::BinaryView => DataType::Binary,
        DataType::Dictionary(_, values) => plain_type(values),
        DataType::List(item) | DataType::ListView(item) => DataType::List(plain_field(item)),
        DataType::LargeList(item) | DataType::LargeListView(item) => {
            DataType::LargeList(plain_field(item))
        }
        DataType::FixedSizeList(item, size) => DataType::FixedSizeList(plain_field(item), *size),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(plain_field).collect()),
        DataType::Map(entries, sorted) => {
            // Neither entries nor keys may be null.
            let of_entry = |field: &FieldRef| {
                let plain = plain_type(field.data_type());
                Arc::new(field.as_ref().clone().with_data_type(plain))
            };
            let plain = match entries.data_type() {
                DataType::Struct(fields) => DataType::Struct(fields.iter().map(of_entry).collect()),
                other => other.clone(),
            };
            let entries = entries.as_ref().clone().with_data_type(plain);
            DataType::Map(Arc::new(entries), *sorted)
        }
        other => other.clone(),
    }
}

fn fitted(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, ArrowError> {
    let columns = batch.columns().iter().zip(schema.fields());
    let columns = columns.map(|(column, field)| cast(column, field.data_type()));
    RecordBatch::try_new(schema.clone(), columns.collect::<Result<_, _>>()?)
}

impl From<ArrowError> for Failed {
    fn from(error: ArrowError) -> Self {
        Self::Query(QueryError(error.to_string()))
    }
}
