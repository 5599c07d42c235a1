//! Queries of the page: rows as JSON with the images that they have, and downloads.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema};
use serde_json::{Value, json};

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

/// The prefix of a cell that stands for an image, followed by its ID. Texts of the run that begin like
/// this are escaped.
const IMAGE: &str = "\u{0}image:";

/// Returns the first rows of a query.
pub fn rows(runs: &Runs, asked: &Asked) -> Result<Value, Problem> {
    let limit = asked.number("limit")?.unwrap_or(200).min(ROWS_MAX);
    table(runs, asked, asked.needed("q")?, limit)
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
                let (found, size) = as_json(&with_images(run, &batch.slice(start, count)))?;
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

/// Returns the rows of a query as a file in some format.
pub fn download(runs: &Runs, asked: &Asked, format: Format) -> Result<File, Problem> {
    let snapshot = runs.of(asked)?.now()?;
    let sql = asked.needed("q")?;
    let failed =
        |error: std::io::Error| Problem::Failed(format!("cannot write the download: {error}"));
    let file = tempfile::tempfile_in(runs.spill.path()).map_err(failed)?;
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
    written
        .flush()
        .and_then(|()| written.seek(SeekFrom::Start(0)))
        .map_err(failed)?;
    Ok(written)
}

/// Returns rows as JSON arrays, and the size of their JSON in bytes.
fn as_json(batch: &RecordBatch) -> Result<(Vec<Value>, usize), Problem> {
    // Names may repeat in a result.
    let fields = batch
        .schema()
        .fields()
        .iter()
        .enumerate()
        .map(|(at, field)| field.as_ref().clone().with_name(at.to_string()))
        .collect::<Vec<Field>>();
    let schema = Arc::new(Schema::new(fields));
    let batch = RecordBatch::try_new(schema.clone(), batch.columns().to_vec())
        .expect("only the names differ");
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
    let rows: Vec<serde_json::Map<String, Value>> =
        serde_json::from_slice(&text).map_err(|error| Problem::Failed(error.to_string()))?;
    let names: Vec<String> = (0..batch.num_columns()).map(|at| at.to_string()).collect();
    let row = |mut row: serde_json::Map<String, Value>| {
        let cells = names
            .iter()
            .map(|name| cell(row.remove(name).unwrap_or(Value::Null)));
        Value::Array(cells.collect())
    };
    Ok((rows.into_iter().map(row).collect(), text.len()))
}

/// Returns a cell as the page reads it.
fn cell(value: Value) -> Value {
    match value {
        Value::String(text) => match text.strip_prefix(IMAGE) {
            Some(id) => json!({ "$image": id }),
            None => Value::String(text),
        },
        other => other,
    }
}

/// Replaces columns of images (structs of `bytes` and `path`) by the IDs of these images.
fn with_images(run: &Run, batch: &RecordBatch) -> RecordBatch {
    let mut fields = Vec::new();
    let mut columns = Vec::new();
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        let ids = image_ids(run, column);
        match ids {
            Some(ids) => {
                fields.push(Field::new(field.name(), DataType::Utf8, true));
                columns.push(ids);
            }
            None => {
                fields.push(field.as_ref().clone());
                columns.push(Arc::clone(column));
            }
        }
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).expect("as many rows as before")
}

fn image_ids(run: &Run, column: &ArrayRef) -> Option<ArrayRef> {
    let parts = column.as_struct_opt()?;
    let bytes = cast(parts.column_by_name("bytes")?, &DataType::LargeBinary).ok()?;
    parts.column_by_name("path")?;
    let bytes = bytes.as_binary::<i64>();
    let id = |row: usize| {
        (parts.is_valid(row) && bytes.is_valid(row)).then(|| {
            let id = digest(bytes.value(row));
            match run.has_image(&id) {
                true => format!("{IMAGE}{id}"),
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
