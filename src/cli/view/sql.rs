//! Queries of the page: rows as JSON with the images that they have, and downloads.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Int64Type, Schema, UInt64Type};
use serde_json::{Map, Value, json};

use super::apart::{self, Query};
use super::asked::{Asked, Problem};
use super::runs::{Run, Runs};
use crate::rows::{Format, Nan, RowFormat, RowWriter};
use ovchat_data::store::digest;
use ovchat_query::{Header, Part};

/// The most rows that the page shows, and their most bytes as JSON.
const ROWS_MAX: usize = 1000;
const BYTES_MAX: usize = 8 << 20;

/// The most bytes of a download: it is written to a file before it is sent.
const DOWNLOAD_MAX: u64 = 2 << 30;

/// The largest number that JavaScript has exactly.
const EXACT_MAX: u64 = (1 << 53) - 1;

/// Returns the first rows of a client's query.
pub fn rows(runs: &Runs, asked: &Asked) -> Result<Value, Problem> {
    let limit = asked.number("limit")?.unwrap_or(200).min(ROWS_MAX);
    let sql = asked.needed("q")?.to_owned();
    let folder = &runs.of(asked)?.folder;
    let mut found = apart::run(runs, folder, asked, Query::Rows { sql, limit })?;
    found["seconds"] = json!(asked.seconds());
    Ok(found)
}

/// Returns the first `limit` rows of a query as columns and rows.
pub fn table(runs: &Runs, asked: &Asked, sql: &str, limit: usize) -> Result<Value, Problem> {
    let run = runs.of(asked)?;
    let snapshot = run.now()?;
    let mut columns = Vec::new();
    let mut rows: Vec<Value> = Vec::new();
    let mut bytes = 0;
    let mut has_more = false;
    let ended = runs.query(&snapshot, asked, sql, |part| match part {
        Part::Header(header) => {
            let fields = header.schema.fields().iter();
            columns = fields
                .map(|field| json!({ "name": field.name(), "type": kind_of(field.data_type()) }))
                .collect();
            Ok(())
        }
        Part::Rows(batch) => {
            let left = limit - rows.len();
            has_more = batch.num_rows() > left;
            // Few at a time: images may be large.
            for start in (0..batch.num_rows().min(left)).step_by(32) {
                let count = (batch.num_rows().min(left) - start).min(32);
                let (found, size) = as_json(run, &batch.slice(start, count))?;
                rows.extend(found);
                bytes += size;
                if bytes > BYTES_MAX {
                    has_more = true;
                    return Err(Problem::Enough);
                }
            }
            if rows.len() == limit && has_more {
                return Err(Problem::Enough);
            }
            Ok(())
        }
        Part::Nothing => Ok(()),
    });
    match ended {
        Ok(()) | Err(Problem::Enough) => {}
        Err(problem) => return Err(problem),
    }
    Ok(json!({ "columns": columns, "rows": rows, "more": has_more, "seconds": asked.seconds() }))
}

/// Returns the rows of a client's query as a file in some format.
pub fn download(runs: &Runs, asked: &Asked, format: Format) -> Result<File, Problem> {
    let sql = asked.needed("q")?.to_owned();
    let (file, to) = apart::file(runs)?;
    let query = match format {
        Format::Parquet => Query::Parquet {
            sql,
            to: to.clone(),
        },
        _ => Query::Csv {
            sql,
            to: to.clone(),
        },
    };
    let done = apart::run(runs, &runs.of(asked)?.folder, asked, query);
    // The open file stays readable.
    drop(std::fs::remove_file(&to));
    done.map(|_| file)
}

/// Writes the rows of a query to a file.
pub fn write(
    runs: &Runs,
    asked: &Asked,
    sql: &str,
    format: Format,
    to: &Path,
) -> Result<Value, Problem> {
    let snapshot = runs.of(asked)?.now()?;
    let failed =
        |error: std::io::Error| Problem::Failed(format!("cannot write the download: {error}"));
    let file = File::create(to).map_err(failed)?;
    let mut out = Some(file.try_clone().map_err(failed)?);
    let mut writer: Option<RowWriter<File>> = None;
    let format = RowFormat {
        format,
        nan: Nan::Text,
    };
    runs.query(&snapshot, asked, sql, |part| {
        match (part, &mut writer) {
            (Part::Header(header), _) => {
                let out = out.take().expect("one header");
                writer = Some(RowWriter::begin(format, &header, out)?);
            }
            (Part::Rows(rows), Some(writer)) => {
                writer.write(&rows)?;
                if file.metadata().map_or(0, |data| data.len()) > DOWNLOAD_MAX {
                    return Err(Problem::Refused(
                        "the result is larger than 2 GB: use `pipeline sql RUN \"…\" --format parquet`".to_owned(),
                    ));
                }
            }
            (Part::Rows(_), None) => unreachable!("the header comes first"),
            (Part::Nothing, _) => {}
        }
        Ok(())
    })?;
    let mut written = writer.expect("the header comes first").finish()?;
    written.flush().map_err(failed)?;
    Ok(Value::Null)
}

/// A column as the page reads it: some values pass through JSON as texts, because JSON and JavaScript
/// would change them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passed {
    AsIs,
    /// Floating-point numbers, which the JSON parser rounds in the last digit.
    Number,
    /// IDs of images.
    Image,
}

/// Returns rows as JSON arrays, and the size of their JSON in bytes.
fn as_json(run: &Run, batch: &RecordBatch) -> Result<(Vec<Value>, usize), Problem> {
    let mut fields = Vec::new();
    let mut columns = Vec::new();
    let mut passed = Vec::new();
    for (at, column) in batch.columns().iter().enumerate() {
        let (column, how) = passed_as(run, column);
        // Names may repeat in a result.
        fields.push(Field::new(at.to_string(), column.data_type().clone(), true));
        columns.push(column);
        passed.push(how);
    }
    let schema = Arc::new(Schema::new(fields));
    let batch = RecordBatch::try_new(schema.clone(), columns).expect("as many rows as before");
    let header = Header {
        schema,
        tables: vec![None; batch.num_columns()],
    };
    let format = RowFormat {
        format: Format::Json,
        nan: Nan::Text,
    };
    let mut writer = RowWriter::begin(format, &header, Vec::new())?;
    writer.write(&batch)?;
    let text = writer.finish()?;
    let rows: Vec<Map<String, Value>> =
        serde_json::from_slice(&text).map_err(|error| Problem::Failed(error.to_string()))?;
    let row = |mut row: Map<String, Value>| {
        let cells = passed.iter().enumerate().map(|(at, how)| {
            let value = row.remove(&at.to_string()).unwrap_or(Value::Null);
            cell(value, *how)
        });
        Value::Array(cells.collect())
    };
    Ok((rows.into_iter().map(row).collect(), text.len()))
}

/// Returns a column in a form that JSON does not change.
fn passed_as(run: &Run, column: &ArrayRef) -> (ArrayRef, Passed) {
    if let Some(ids) = image_ids(run, column) {
        return (ids, Passed::Image);
    }
    let is_exact = match column.data_type() {
        DataType::Float16 | DataType::Float32 | DataType::Float64 => {
            let texts = cast(column, &DataType::Utf8).expect("a number has a text");
            return (texts, Passed::Number);
        }
        DataType::Int64 => column
            .as_primitive::<Int64Type>()
            .iter()
            .flatten()
            .all(|value| value.unsigned_abs() <= EXACT_MAX),
        DataType::UInt64 => column
            .as_primitive::<UInt64Type>()
            .iter()
            .flatten()
            .all(|value| value <= EXACT_MAX),
        kind => !kind.is_decimal(),
    };
    match is_exact {
        true => (Arc::clone(column), Passed::AsIs),
        false => {
            let texts = cast(column, &DataType::Utf8).expect("a number has a text");
            (texts, Passed::AsIs)
        }
    }
}

/// Returns a cell as the page reads it.
fn cell(value: Value, how: Passed) -> Value {
    match (how, value) {
        (Passed::Number, Value::String(text)) => match text.parse::<f64>() {
            Ok(number) if number.is_finite() => json!(number),
            _ => Value::String(text),
        },
        (Passed::Image, Value::String(text)) if is_image(&text) => json!({ "$image": text }),
        (_, value) => value,
    }
}

/// True if a text is the ID of an image.
pub fn is_image(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Returns the IDs of the images in a column of structs of `bytes` and `path`, or the numbers of bytes
/// of what is no image of the run.
fn image_ids(run: &Run, column: &ArrayRef) -> Option<ArrayRef> {
    let parts = column.as_struct_opt()?;
    let bytes = cast(parts.column_by_name("bytes")?, &DataType::LargeBinary).ok()?;
    parts.column_by_name("path")?;
    let bytes = bytes.as_binary::<i64>();
    let id = |row: usize| {
        (parts.is_valid(row) && bytes.is_valid(row)).then(|| {
            let id = digest(bytes.value(row));
            match run.has_image(&id) {
                true => id,
                false => format!("{} bytes", bytes.value(row).len()),
            }
        })
    };
    let ids: Vec<Option<String>> = (0..column.len()).map(id).collect();
    Some(Arc::new(StringArray::from(ids)))
}

/// Returns the kind of values of a column, for the page.
fn kind_of(data_type: &DataType) -> &'static str {
    match data_type {
        kind if kind.is_numeric() => "number",
        kind if kind.is_string() => "text",
        kind if kind.is_list() => "list",
        DataType::Boolean => "boolean",
        DataType::Struct(_) | DataType::Map(..) => "struct",
        _ => "other",
    }
}
