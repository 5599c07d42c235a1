//! Rows as text: CSV, Markdown, and readable tables.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, LargeStringArray, RecordBatch, StringArray, StructArray,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::json::writer::{EncoderOptions, NullableEncoder, make_encoder};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::json::Cells;
use ovchat_io::visible::visible;

/// Formats the rows of a batch as CSV (RFC 4180, with `\n` line endings).
pub fn csv_rows(batch: &RecordBatch, cells: &Cells) -> Result<String, ArrowError> {
    /// The conversion of a column to text.
    enum Column<'a> {
        Plain(ArrayFormatter<'a>),
        Bytes(ArrayRef),
        Json(NullableEncoder<'a>),
    }
    let display = FormatOptions::default();
    let json = EncoderOptions::default()
        .with_explicit_nulls(true)
        .with_encoder_factory(Arc::new(cells.clone()));
    let schema = batch.schema();
    let mut columns = Vec::new();
    for (field, array) in schema.fields().iter().zip(batch.columns()) {
        columns.push(match array.data_type() {
            DataType::Binary
            | DataType::LargeBinary
            | DataType::BinaryView
            | DataType::FixedSizeBinary(_) => Column::Bytes(cast(array, &DataType::LargeBinary)?),
            of if of.is_nested() => Column::Json(make_encoder(field, array, &json)?),
            _ => Column::Plain(ArrayFormatter::try_new(array, &display)?),
        });
    }
    // Dictionary and run-end encoded arrays keep their nulls in their values.
    let nulls: Vec<_> = batch.columns().iter().map(Array::logical_nulls).collect();
    let mut text = String::new();
    for row in 0..batch.num_rows() {
        for (at, column) in columns.iter_mut().enumerate() {
            if at > 0 {
                text.push(',');
            }
            if nulls[at].as_ref().is_some_and(|nulls| nulls.is_null(row)) {
                continue;
            }
            let value = match column {
                Column::Plain(values) => values.value(row).to_string(),
                Column::Bytes(values) => {
                    BASE64_STANDARD.encode(values.as_binary::<i64>().value(row))
                }
                Column::Json(encoder) => {
                    let mut json = Vec::new();
                    encoder.encode(row, &mut json);
                    String::from_utf8(json).expect("JSON is text")
                }
            };
            push_field(&mut text, &value);
        }
        text.push('\n');
    }
    Ok(text)
}

pub fn csv_header(schema: &SchemaRef) -> String {
    let mut line = String::new();
    for (at, field) in schema.fields().iter().enumerate() {
        line.push_str(if at == 0 { "" } else { "," });
        push_field(&mut line, field.name());
    }
    line.push('\n');
    line
}

/// Appends a CSV field, quoted if necessary; the empty string is quoted, to distinguish it from
/// null.
fn push_field(line: &mut String, value: &str) {
    if !value.is_empty() && !value.contains([',', '"', '\n', '\r']) {
        line.push_str(value);
        return;
    }
    line.push('"');
    line.push_str(&value.replace('"', "\"\""));
    line.push('"');
}

pub fn markdown_header(schema: &SchemaRef) -> String {
    let mut names = String::from("|");
    let mut rule = String::from("|");
    for field in schema.fields() {
        let align = if field.data_type().is_numeric() {
            "---:"
        } else {
            "---"
        };
        write!(names, " {} |", markdown_cell(field.name())).expect(ANY_TEXT);
        write!(rule, " {align} |").expect(ANY_TEXT);
    }
    format!("{names}\n{rule}\n")
}

const ANY_TEXT: &str = "writing to a string does not fail";

pub fn markdown_rows(batch: &RecordBatch) -> Result<String, ArrowError> {
    let options = FormatOptions::default();
    let columns = batch.columns().iter();
    let columns: Vec<_> = columns
        .map(|column| ArrayFormatter::try_new(column, &options))
        .collect::<Result<_, _>>()?;
    let mut text = String::new();
    for row in 0..batch.num_rows() {
        text.push('|');
        for column in &columns {
            let value = column.value(row).to_string();
            write!(text, " {} |", markdown_cell(&value)).expect(ANY_TEXT);
        }
        text.push('\n');
    }
    Ok(text)
}

/// Escapes a value so that it stays in its Markdown cell.
fn markdown_cell(value: &str) -> String {
    let value = visible(value).replace('|', "\\|").replace("\r\n", "<br>");
    value.replace(['\n', '\r'], "<br>")
}

/// Makes columns human-readable: bytes become their length and, if `flat`, lists and structs become
/// text.
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

/// Makes columns readable like [`readable`], and escapes terminal control sequences.
pub fn shown(batch: &RecordBatch) -> Result<RecordBatch, ArrowError> {
    let batch = readable(batch, true)?;
    let mut fields = Vec::new();
    let mut columns: Vec<ArrayRef> = Vec::new();
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        let mut column = column.clone();
        let of = match column.data_type() {
            DataType::Dictionary(_, of) => &**of,
            of => of,
        };
        if let DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View = of {
            let texts = cast(&column, &DataType::LargeUtf8)?;
            let texts = texts.as_string::<i64>().iter();
            let visible =
                texts.map(|text| text.map(|text| visible(cut(text).as_ref()).into_owned()));
            column = Arc::new(visible.collect::<LargeStringArray>());
        }
        let name = visible(field.name());
        fields.push(Field::new(name, column.data_type().clone(), true));
        columns.push(column);
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)
}

/// The longest text of a cell, in characters. Wider ones are for the formats that programs read.
const CELL_MAX: usize = 10_000;

/// A text that fits into a cell: of a longer one the beginning, and how much is left out.
fn cut(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(CELL_MAX) {
        None => Cow::Borrowed(text),
        Some((end, _)) => {
            let left_out = text[end..].chars().count();
            Cow::Owned(format!(
                "{} … {left_out} characters left out; --format jsonl shows all",
                &text[..end]
            ))
        }
    }
}

fn as_text(column: &ArrayRef) -> Result<ArrayRef, ArrowError> {
    let options = FormatOptions::default();
    let formatter = ArrayFormatter::try_new(column, &options)?;
    let text = |row| (!column.is_null(row)).then(|| formatter.value(row).to_string());
    Ok(Arc::new(
        (0..column.len()).map(text).collect::<StringArray>(),
    ))
}

/// Replaces bytes by `12345 bytes`, also inside structs: an image in hex is not readable.
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
