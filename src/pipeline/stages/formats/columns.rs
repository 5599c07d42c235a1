//! Parquet sources: columns of embedded images, and columns that become fields of a record.

use std::collections::HashSet;
use std::path::Path;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StructArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Schema};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::map::Entry;
use serde_json::{Map, Value};

use super::super::media::{file_name, holds_anything};
use super::super::names::Names;
use super::super::unread::{is_needed, shown as name_shown};
use super::super::work::{Failure, Record};
use super::failure::{empty, input};
use ovchat_data::store::TableReader;
use ovchat_data::tables::ImageFile;

/// The bytes of a string or a binary value that are kept to detect media; the rest is not needed.
const TEXT_SHOWN: usize = 1024;
const BYTES_SHOWN: usize = 60;

/// Returns the rows of a Parquet file as records. Columns of images (`image` or `images`: bytes, a
/// struct of bytes and path, or a list of either) become embedded images; other columns that are
/// read or kept become JSON, as in the other formats.
pub fn records(
    path: &Path,
    names: &Names,
) -> Result<impl Iterator<Item = Result<Record, Failure>> + Send + use<>, Failure> {
    let mut reader = TableReader::of_others(path)?.peekable();
    if reader.peek().is_none() {
        return Err(empty(path));
    }
    let (path, names) = (path.to_owned(), names.clone());
    let mut row = 0;
    Ok(reader.flat_map(move |batch| {
        let records = batch
            .map_err(Failure::from)
            .and_then(|batch| batch_records(&path, &batch, row, &names));
        match records {
            Ok(records) => {
                row += records.len();
                records.into_iter().map(Ok).collect::<Vec<_>>()
            }
            Err(error) => vec![Err(error)],
        }
    }))
}

/// Returns the problem of a file with a column twice, or without a column that the settings name.
fn misnamed(schema: &Schema, columns: &Names) -> Option<String> {
    let mut names = HashSet::new();
    let mut fields = schema.fields().iter();
    if let Some(twice) = fields.find(|field| !names.insert(field.name().as_str())) {
        return Some(format!(
            "duplicate column `{}`; keep one of the two",
            name_shown(twice.name())
        ));
    }
    let (setting, column) = columns.missing(|name| names.contains(name))?;
    let there = schema.fields().iter().map(|field| name_shown(field.name()));
    Some(format!(
        "no column `{column}`, which `{setting}` names; the file has the columns {}",
        there.collect::<Vec<_>>().join(", ")
    ))
}

fn batch_records(
    path: &Path,
    batch: &RecordBatch,
    first: usize,
    columns: &Names,
) -> Result<Vec<Record>, Failure> {
    let mut plain = Vec::new();
    let mut others = Vec::new();
    let mut embedded: Vec<Vec<ImageFile>> = vec![Vec::new(); batch.num_rows()];
    // True for rows with different images in a second column.
    let mut has_others = vec![false; batch.num_rows()];
    let schema = batch.schema();
    if let Some(problem) = misnamed(&schema, columns) {
        return Err(input(path, "", problem));
    }
    for (field, column) in schema.fields().iter().zip(batch.columns()) {
        let fields: Vec<&str> = columns.fields(field.name()).collect();
        let is_image = fields
            .iter()
            .any(|name| matches!(*name, "image" | "images"));
        if is_image && holds_bytes(field.data_type()) {
            for (row, files) in embedded.iter_mut().enumerate() {
                let found = files_of(column, row);
                let bytes = |files: &[ImageFile]| -> Vec<_> {
                    files.iter().map(|file| file.bytes.clone()).collect()
                };
                if files.is_empty() {
                    *files = found;
                } else if !found.is_empty() && bytes(files) != bytes(&found) {
                    has_others[row] = true;
                }
            }
        } else if !(columns.is_kept(field.name()) || fields.iter().any(|name| is_needed(name)))
            || holds_bytes(field.data_type())
        {
            others.push((field.name(), column));
        } else {
            plain.push((field.name().clone(), column.clone()));
        }
    }
    let objects = json_rows(path, batch.num_rows(), plain)?;
    let record =
        |(index, (mut fields, embedded)): (usize, (Map<String, Value>, Vec<ImageFile>))| {
            // The values may be large, e.g. videos, and are not needed in full.
            for (name, column) in &others {
                let value = outline(column, index);
                if !value.is_null() {
                    fields.insert((*name).clone(), value);
                }
            }
            let kept = columns.apply(&mut fields);
            let named = ["image", "images"].map(|name| fields.get(name));
            let others: Vec<_> = (named.into_iter().flatten())
                .filter(|names| holds_anything(names))
                .collect();
            let is_other = |names: &&Value| !are_names(names, &embedded);
            let differ = has_others[index] || !embedded.is_empty() && others.iter().any(is_other);
            let name = embedded.first().and_then(|file| file.path.clone());
            if let Some(name) = name {
                fields.entry("image").or_insert(Value::String(name));
            }
            Record {
                place: format!("row {}", first + index + 1),
                fields: if differ {
                    Err(
                        "`image` and `images` hold different images; keep one of the two"
                            .to_owned(),
                    )
                } else {
                    Ok(Value::Object(fields))
                },
                embedded,
                kept,
            }
        };
    Ok(objects
        .into_iter()
        .zip(embedded)
        .enumerate()
        .map(record)
        .collect())
}

/// True if these are the names of the embedded images: as many, with the same file names.
fn are_names(names: &Value, images: &[ImageFile]) -> bool {
    let names = match names {
        Value::Array(names) => &names[..],
        name => std::slice::from_ref(name),
    };
    let is_name = |(name, image): (&Value, &ImageFile)| match (name.as_str(), &image.path) {
        (Some(name), Some(path)) => file_name(name) == file_name(path),
        _ => false,
    };
    names.len() == images.len() && names.iter().zip(images).all(is_name)
}

fn holds_bytes(data_type: &DataType) -> bool {
    match data_type {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => true,
        DataType::Struct(fields) => fields.iter().any(|field| field.name() == "bytes"),
        DataType::List(item) | DataType::LargeList(item) => holds_bytes(item.data_type()),
        _ => false,
    }
}

fn is_null(column: &ArrayRef, row: usize) -> bool {
    // A column of the type `Null` has no null bitmap.
    column.is_null(row) || *column.data_type() == DataType::Null
}

/// Returns as much of a value as is needed to detect media: the start of a string or of bytes (in
/// base64), and for other values whether they are empty. Lists and structs keep their structure.
fn outline(column: &ArrayRef, row: usize) -> Value {
    if is_null(column, row) {
        return Value::Null;
    }
    let text = |text: &str| {
        let end = text.floor_char_boundary(TEXT_SHOWN + 1);
        Value::String(text[..end].to_owned())
    };
    let bytes = |bytes: &[u8]| {
        let end = bytes.len().min(BYTES_SHOWN);
        Value::String(BASE64_STANDARD.encode(&bytes[..end]))
    };
    let list = |items: ArrayRef| {
        let outlines = (0..items.len()).map(|item| outline(&items, item));
        match items.data_type().is_primitive() {
            // Numbers, possibly thousands of them.
            true => Value::Array(vec![Value::Bool(!items.is_empty())]),
            false => Value::Array(outlines.collect()),
        }
    };
    match column.data_type() {
        DataType::Boolean => Value::Bool(column.as_boolean().value(row)),
        DataType::Utf8 => text(column.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => text(column.as_string::<i64>().value(row)),
        DataType::Utf8View => text(column.as_string_view().value(row)),
        DataType::Binary => bytes(column.as_binary::<i32>().value(row)),
        DataType::LargeBinary => bytes(column.as_binary::<i64>().value(row)),
        DataType::BinaryView => bytes(column.as_binary_view().value(row)),
        DataType::FixedSizeBinary(_) => bytes(column.as_fixed_size_binary().value(row)),
        DataType::List(_) => list(column.as_list::<i32>().value(row)),
        DataType::LargeList(_) => list(column.as_list::<i64>().value(row)),
        DataType::ListView(_) => list(column.as_list_view::<i32>().value(row)),
        DataType::LargeListView(_) => list(column.as_list_view::<i64>().value(row)),
        DataType::FixedSizeList(_, _) => list(column.as_fixed_size_list().value(row)),
        DataType::Struct(fields) => {
            let columns = fields.iter().zip(column.as_struct().columns());
            let mut outlined = Map::new();
            for (field, column) in columns {
                let value = outline(column, row);
                // A duplicate name: both values are kept.
                match outlined.entry(field.name()) {
                    Entry::Vacant(place) => drop(place.insert(value)),
                    Entry::Occupied(mut place) => {
                        let before = place.get_mut().take();
                        *place.get_mut() = Value::Array(vec![before, value]);
                    }
                }
            }
            Value::Object(outlined)
        }
        DataType::Map(_, _) => {
            let entries = column.as_map().value(row);
            let entry = |entry: usize| {
                let key = match outline(entries.column(0), entry) {
                    Value::String(key) => key,
                    other => other.to_string(),
                };
                (key, outline(entries.column(1), entry))
            };
            Value::Object((0..entries.len()).map(entry).collect())
        }
        DataType::Dictionary(_, of) => match cast(&column.slice(row, 1), of) {
            Ok(value) => outline(&value, 0),
            Err(_) => Value::Bool(true),
        },
        of if of.is_primitive() => Value::Bool(true),
        // A union or a similar type.
        _ => Value::Array(vec![Value::Bool(true)]),
    }
}

/// Returns the images in a row of a column. A null in a list is an image without bytes, which is
/// rejected later.
fn files_of(column: &ArrayRef, row: usize) -> Vec<ImageFile> {
    if column.is_null(row) {
        return Vec::new();
    }
    match column.data_type() {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => vec![ImageFile {
            bytes: bytes_of(column, row),
            path: None,
        }],
        DataType::Struct(_) => vec![file_of(column.as_struct(), row)],
        DataType::List(_) => files_in(&column.as_list::<i32>().value(row)),
        DataType::LargeList(_) => files_in(&column.as_list::<i64>().value(row)),
        _ => Vec::new(),
    }
}

fn files_in(items: &ArrayRef) -> Vec<ImageFile> {
    let nothing = ImageFile {
        bytes: None,
        path: None,
    };
    let file = |item| match items.is_null(item) {
        true => vec![nothing.clone()],
        false => files_of(items, item),
    };
    (0..items.len()).flat_map(file).collect()
}

fn file_of(files: &StructArray, row: usize) -> ImageFile {
    let path = files.column_by_name("path").and_then(|column| {
        let path = cast(&column.slice(row, 1), &DataType::Utf8).ok()?;
        (!path.is_null(0)).then(|| path.as_string::<i32>().value(0).to_owned())
    });
    let bytes = files.column_by_name("bytes");
    ImageFile {
        bytes: bytes.and_then(|column| bytes_of(column, row)),
        path,
    }
}

fn bytes_of(column: &ArrayRef, row: usize) -> Option<Vec<u8>> {
    let bytes = cast(&column.slice(row, 1), &DataType::Binary).ok()?;
    (!bytes.is_null(0)).then(|| bytes.as_binary::<i32>().value(0).to_vec())
}

fn json_rows(
    path: &Path,
    rows: usize,
    columns: Vec<(String, ArrayRef)>,
) -> Result<Vec<Map<String, Value>>, Failure> {
    if columns.is_empty() {
        return Ok(vec![Map::new(); rows]);
    }
    let failed = |error: arrow::error::ArrowError| input(path, "", error.to_string());
    let batch = RecordBatch::try_from_iter(columns).map_err(failed)?;
    let mut writer = arrow::json::LineDelimitedWriter::new(Vec::new());
    writer.write(&batch).map_err(failed)?;
    writer.finish().map_err(failed)?;
    let lines = writer.into_inner();
    let rows = serde_json::Deserializer::from_slice(&lines).into_iter();
    rows.collect::<Result<_, _>>()
        .map_err(|error| input(path, "", error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{BinaryArray, Float32Array, ListArray, NullArray, StringArray, UInt32Array};
    use arrow::buffer::{NullBuffer, OffsetBuffer};
    use arrow::compute::take;
    use arrow::datatypes::Field;
    use serde_json::json;

    use super::*;
    use ovchat_data::store::TableWriter;
    use ovchat_data::tables::{Image, Row};

    #[test]
    fn images_in_parquet_are_taken_out_and_the_rest_becomes_json() {
        let image = |bytes: Option<&[u8]>, path: &str| Image {
            image_id: String::new(),
            image: ImageFile {
                bytes: bytes.map(<[u8]>::to_vec),
                path: Some(path.to_owned()),
            },
            width: 0,
            height: 0,
            format: String::new(),
            pixels: None,
            look: None,
        };
        let images = Image::to_batch(&[image(Some(b"png"), "a.png"), image(None, "b.png")]);
        let prompts: ArrayRef = Arc::new(StringArray::from(vec!["What?", "Why?"]));
        let records = parquet(vec![
            ("image", images.column(1).clone()),
            ("prompt", prompts),
        ]);
        assert_eq!(records[1].place, "row 2");
        assert_eq!(
            records[0].fields,
            Ok(json!({"image": "a.png", "prompt": "What?"}))
        );
        assert_eq!(
            records[0].embedded[0].bytes.as_deref(),
            Some(b"png".as_slice())
        );
        assert_eq!(records[1].embedded[0].bytes, None);
    }

    /// Returns the records of a Parquet file with these columns.
    fn parquet(columns: Vec<(&str, ArrayRef)>) -> Vec<Record> {
        let batch = RecordBatch::try_from_iter_with_nullable(
            columns
                .into_iter()
                .map(|(name, column)| (name, column, true)),
        )
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut writer = TableWriter::new(folder.path(), "a", batch.schema(), &[]);
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        let path = folder.path().join("a.parquet");
        let records = super::records(&path, &Names::default()).unwrap();
        records.map(Result::unwrap).collect()
    }

    #[test]
    fn a_column_that_is_not_read_is_there_where_it_is_not_null() {
        let texts =
            |texts: &[Option<&str>]| -> ArrayRef { Arc::new(StringArray::from(texts.to_vec())) };
        let bytes: ArrayRef = Arc::new(BinaryArray::from(vec![
            None,
            Some(&[1_u8; 9][..]),
            None,
            None,
        ]));
        let path = texts(&[Some("a.wav"), None, None, None]);
        let fields = [("bytes", bytes), ("path", path)].map(|(name, column)| {
            (
                Arc::new(Field::new(name, column.data_type().clone(), true)),
                column,
            )
        });
        let nulls = NullBuffer::from(vec![true, true, true, false]);
        let (fields, columns): (Vec<_>, Vec<_>) = fields.into_iter().unzip();
        let video: ArrayRef = Arc::new(StructArray::new(fields.into(), columns, Some(nulls)));
        let records = parquet(vec![
            ("prompt", texts(&[Some("What?"); 4])),
            ("audio", video),
            ("category", texts(&[Some("a"), None, Some(""), None])),
            ("nothing", Arc::new(NullArray::new(4))),
        ]);
        let fields: Vec<Value> = records
            .into_iter()
            .map(|record| record.fields.unwrap())
            .collect();
        assert_eq!(
            fields,
            [
                json!({"prompt": "What?", "audio": {"bytes": null, "path": "a.wav"}, "category": "a"}),
                json!({"prompt": "What?", "audio": {"bytes": "AQEBAQEBAQEB", "path": null}}),
                json!({"prompt": "What?", "audio": {"bytes": null, "path": null}, "category": ""}),
                json!({"prompt": "What?"}),
            ]
        );
    }

    #[test]
    fn the_outline_of_a_value_is_short_and_says_what_it_is() {
        let png = [&b"\x89PNG\r\n\x1a\n"[..], &[0; 5000]].concat();
        let numbers: ArrayRef = Arc::new(Float32Array::from(vec![0.5; 4000]));
        let item = Arc::new(Field::new("item", DataType::Float32, true));
        let numbers = ListArray::new(item, OffsetBuffer::from_lengths([4000]), numbers, None);
        let records = parquet(vec![
            ("raw", Arc::new(BinaryArray::from(vec![&png[..]]))),
            ("text", Arc::new(StringArray::from(vec!["ü".repeat(4000)]))),
            ("embedding", Arc::new(numbers)),
            ("score", Arc::new(Float32Array::from(vec![0.5]))),
        ]);
        let fields = records[0].fields.as_ref().unwrap();
        let length = |name: &str| fields[name].as_str().unwrap().len();
        assert_eq!(length("raw"), 80);
        assert_eq!(length("text"), TEXT_SHOWN);
        assert!(fields["raw"].as_str().unwrap().starts_with("iVBORw0KGgo"));
        assert_eq!(
            (&fields["embedding"], &fields["score"]),
            (&json!([true]), &json!(true))
        );
    }

    #[test]
    fn a_column_of_bytes_is_a_column_of_images() {
        let bytes =
            |values: Vec<Option<&[u8]>>| -> ArrayRef { Arc::new(BinaryArray::from(values)) };
        let records = parquet(vec![("image", bytes(vec![Some(b"png"), None]))]);
        assert_eq!(records[0].embedded.len(), 1);
        assert_eq!(records[0].embedded[0].bytes.as_deref(), Some(&b"png"[..]));
        assert!(records[1].embedded.is_empty());
        let two = bytes(vec![Some(b"png"), Some(b"jpg")]);
        let item = Arc::new(Field::new("item", DataType::Binary, true));
        let list = ListArray::new(item, OffsetBuffer::from_lengths([2]), two, None);
        let records = parquet(vec![("images", Arc::new(list))]);
        assert_eq!(records[0].embedded.len(), 2);
        assert_eq!(records[0].embedded[1].bytes.as_deref(), Some(&b"jpg"[..]));
        assert_eq!(records[0].fields, Ok(json!({})));
    }

    #[test]
    fn an_image_that_is_null_in_a_list_is_not_passed_over() {
        let images = Image::to_batch(&[Image {
            image_id: String::new(),
            image: ImageFile {
                bytes: Some(b"png".to_vec()),
                path: None,
            },
            width: 0,
            height: 0,
            format: String::new(),
            pixels: None,
            look: None,
        }]);
        let image = images.column(1);
        let two = take(image, &UInt32Array::from(vec![Some(0), None]), None).unwrap();
        let item = Arc::new(Field::new("item", two.data_type().clone(), true));
        let lists = ListArray::new(item, OffsetBuffer::from_lengths([2]), two, None);
        let path: ArrayRef = Arc::new(StringArray::from(vec!["b.png"]));
        let records = parquet(vec![("images", Arc::new(lists)), ("image", path)]);
        assert_eq!(records[0].embedded.len(), 2);
        assert_eq!(records[0].embedded[1].bytes, None);
        assert!(
            records[0]
                .fields
                .as_ref()
                .unwrap_err()
                .contains("hold different images")
        );
    }
}
