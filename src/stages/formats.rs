//! The files that records come from: JSON lists, JSON lines, Parquet.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StructArray};
use arrow::compute::cast;
use arrow::datatypes::DataType;
use serde::de::{DeserializeSeed, Deserializer as _, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::unread::is_needed;
use super::work::{Failure, Record};
use crate::files;
use crate::store::TableReader;
use crate::tables::ImageFile;

type Records = Box<dyn Iterator<Item = Result<Record, Failure>> + Send>;

/// Records that a reading thread may be ahead of the one that uses them.
const AHEAD: usize = 256;

/// The records of a file, read as they are asked for.
pub fn records(path: &Path) -> Result<Records, Failure> {
    let file = files::open(path).map_err(|error| input(path, "", error.to_string()))?;
    let mut text = BufReader::new(file);
    if path
        .extension()
        .is_some_and(|extension| extension == "parquet")
    {
        return Ok(Box::new(parquet_records(path)?));
    }
    // What the file is, is seen from its first character, not from its name.
    let start = loop {
        let buffer = text
            .fill_buf()
            .map_err(|error| input(path, "", error.to_string()))?;
        let Some(first) = buffer.first() else {
            return Err(empty(path));
        };
        if !first.is_ascii_whitespace() {
            break *first;
        }
        text.consume(1);
    };
    match start {
        b'[' => Ok(Box::new(list_records(path, text))),
        b'{' => Ok(Box::new(line_records(path, text))),
        _ => Err(input(
            path,
            "",
            "it is neither a JSON list, nor JSON lines, nor Parquet (named *.parquet)".to_owned(),
        )),
    }
}

fn input(path: &Path, place: &str, problem: String) -> Failure {
    Failure::Input {
        path: path.to_owned(),
        place: place.to_owned(),
        problem,
    }
}

fn empty(path: &Path) -> Failure {
    input(path, "", "it has no records".to_owned())
}

/// One JSON object a line; empty lines are passed over.
fn line_records<T: BufRead + Send + 'static>(
    path: &Path,
    text: T,
) -> impl Iterator<Item = Result<Record, Failure>> + Send + use<T> {
    let path = path.to_owned();
    text.lines().enumerate().filter_map(move |(index, line)| {
        let place = format!("line {}", index + 1);
        let line = match line {
            Ok(line) if line.trim().is_empty() => return None,
            Ok(line) => line,
            Err(error) => return Some(Err(input(&path, &format!(", {place}"), error.to_string()))),
        };
        // A line that is no JSON is a bad row, not a bad file: the next one may be fine.
        let fields = serde_json::from_str(&line)
            .map_err(|error| format!("it is not JSON: {}", without_place(&error)));
        Some(Ok(Record {
            place,
            fields,
            embedded: Vec::new(),
        }))
    })
}

/// serde_json counts lines of what it was given; for JSON lines that is always line 1.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(place) => format!("{} at column {}", &text[..place], error.column()),
        None => text,
    }
}

/// The objects of a JSON list, parsed by a thread of their own: a list of millions never lies in
/// memory as a whole.
fn list_records<T: BufRead + Send + 'static>(
    path: &Path,
    text: T,
) -> impl Iterator<Item = Result<Record, Failure>> + Send + use<T> {
    let (sender, receiver) = sync_channel(AHEAD);
    let path = path.to_owned();
    std::thread::spawn(move || {
        let mut list = serde_json::Deserializer::from_reader(text);
        let parsed = (&mut list).deserialize_seq(Feed {
            sender: &sender,
            path: &path,
        });
        if let Err(error) = parsed.and_then(|()| list.end()) {
            // The receiver is gone when nobody wants more records; then there is nobody to tell.
            let _ = sender.send(Err(input(&path, "", format!("not a JSON list: {error}"))));
        }
    });
    receiver.into_iter()
}

struct Feed<'a> {
    sender: &'a SyncSender<Result<Record, Failure>>,
    path: &'a PathBuf,
}

impl<'de> Visitor<'de> for Feed<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut count = 0;
        while let Some(fields) = list.next_element_seed(AnyValue)? {
            count += 1;
            let record = Record {
                place: format!("record {count}"),
                fields: Ok(fields),
                embedded: Vec::new(),
            };
            if self.sender.send(Ok(record)).is_err() {
                return Err(serde::de::Error::custom("nobody wants more records"));
            }
        }
        if count == 0 {
            let _ = self.sender.send(Err(empty(self.path)));
        }
        Ok(())
    }
}

struct AnyValue;

impl<'de> DeserializeSeed<'de> for AnyValue {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        serde::Deserialize::deserialize(deserializer)
    }
}

/// The rows of a Parquet file. Columns of images (`image` or `images`: a struct of bytes and path, or a
/// list of them) are taken out; of the others, those that are read become JSON, as in the other formats.
fn parquet_records(
    path: &Path,
) -> Result<impl Iterator<Item = Result<Record, Failure>> + Send + use<>, Failure> {
    let mut reader = TableReader::new(vec![path.to_owned()]).peekable();
    if reader.peek().is_none() {
        return Err(empty(path));
    }
    let path = path.to_owned();
    let mut row = 0;
    Ok(reader.flat_map(move |batch| {
        let records = batch
            .map_err(Failure::from)
            .and_then(|batch| batch_records(&path, &batch, row));
        match records {
            Ok(records) => {
                row += records.len();
                records.into_iter().map(Ok).collect::<Vec<_>>()
            }
            Err(error) => vec![Err(error)],
        }
    }))
}

fn batch_records(path: &Path, batch: &RecordBatch, first: usize) -> Result<Vec<Record>, Failure> {
    let mut plain = Vec::new();
    let mut others = Vec::new();
    let mut embedded: Vec<Vec<ImageFile>> = vec![Vec::new(); batch.num_rows()];
    let schema = batch.schema();
    for (field, column) in schema.fields().iter().zip(batch.columns()) {
        if matches!(field.name().as_str(), "image" | "images") && holds_bytes(field.data_type()) {
            for (row, files) in embedded.iter_mut().enumerate() {
                files.extend(files_of(column, row));
            }
        } else if !is_needed(field.name()) {
            others.push((field.name(), column));
        } else {
            plain.push((field.name().clone(), column.clone()));
        }
    }
    let objects = json_rows(path, batch.num_rows(), plain)?;
    let record =
        |(index, (mut fields, embedded)): (usize, (Map<String, Value>, Vec<ImageFile>))| {
            // Their values may be large, as those of videos are, and nobody needs them.
            for (name, column) in &others {
                if !is_null(column, index) {
                    let value = Value::Bool(holds_anything(column, index));
                    fields.insert((*name).clone(), value);
                }
            }
            let named = ["image", "images"].map(|name| match fields.get(name) {
                None => 0,
                Some(Value::Array(names)) => names.len(),
                Some(_) => 1,
            });
            let mut others = named.into_iter().filter(|&count| count > 0);
            // As many may be other names of the same images.
            let differ = !embedded.is_empty() && others.any(|count| count != embedded.len());
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
            }
        };
    Ok(objects
        .into_iter()
        .zip(embedded)
        .enumerate()
        .map(record)
        .collect())
}

fn holds_bytes(data_type: &DataType) -> bool {
    match data_type {
        DataType::Struct(fields) => fields.iter().any(|field| field.name() == "bytes"),
        DataType::List(item) | DataType::LargeList(item) => holds_bytes(item.data_type()),
        _ => false,
    }
}

fn is_null(column: &ArrayRef, row: usize) -> bool {
    // A column of nulls only has no bitmap of them.
    column.is_null(row) || *column.data_type() == DataType::Null
}

/// False for null, false, empty texts and bytes, and lists and structs of nothing else.
fn holds_anything(column: &ArrayRef, row: usize) -> bool {
    let any = |items: ArrayRef| (0..items.len()).any(|item| holds_anything(&items, item));
    !is_null(column, row)
        && match column.data_type() {
            DataType::Boolean => column.as_boolean().value(row),
            DataType::Utf8 => !column.as_string::<i32>().value(row).trim().is_empty(),
            DataType::LargeUtf8 => !column.as_string::<i64>().value(row).trim().is_empty(),
            DataType::Utf8View => !column.as_string_view().value(row).trim().is_empty(),
            DataType::Binary => !column.as_binary::<i32>().value(row).is_empty(),
            DataType::LargeBinary => !column.as_binary::<i64>().value(row).is_empty(),
            DataType::BinaryView => !column.as_binary_view().value(row).is_empty(),
            DataType::List(_) => any(column.as_list::<i32>().value(row)),
            DataType::LargeList(_) => any(column.as_list::<i64>().value(row)),
            DataType::FixedSizeList(_, _) => any(column.as_fixed_size_list().value(row)),
            DataType::Struct(_) => {
                let mut fields = column.as_struct().columns().iter();
                fields.any(|field| holds_anything(field, row))
            }
            _ => true,
        }
}

/// The images in a row of a column. A null in a list is an image without bytes, which is refused.
fn files_of(column: &ArrayRef, row: usize) -> Vec<ImageFile> {
    if column.is_null(row) {
        return Vec::new();
    }
    match column.data_type() {
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
    let part = |name: &str, to: DataType| {
        let column = files.column_by_name(name)?;
        let value = cast(&column.slice(row, 1), &to).ok()?;
        (!value.is_null(0)).then_some(value)
    };
    ImageFile {
        bytes: part("bytes", DataType::Binary)
            .map(|bytes| bytes.as_binary::<i32>().value(0).to_vec()),
        path: part("path", DataType::Utf8).map(|path| path.as_string::<i32>().value(0).to_owned()),
    }
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

/// A JSON object from a picture's path to its captions.
pub fn captions(path: &Path) -> Result<HashMap<String, Vec<String>>, Failure> {
    let file = files::open(path).map_err(|error| input(path, "", error.to_string()))?;
    serde_json::from_reader(BufReader::new(file)).map_err(|error| {
        input(
            path,
            "",
            format!("not an object from picture paths to lists of captions: {error}"),
        )
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{BinaryArray, ListArray, NullArray, StringArray, UInt32Array};
    use arrow::buffer::{NullBuffer, OffsetBuffer};
    use arrow::compute::take;
    use arrow::datatypes::Field;

    use super::*;
    use crate::store::TableWriter;
    use crate::tables::{Image, Row};

    fn read(name: &str, text: &str) -> Result<Vec<Value>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let records = records(&path).map_err(|error| error.to_string())?;
        let records: Result<Vec<_>, _> = records.collect();
        let records = records.map_err(|error| error.to_string())?;
        records.into_iter().map(|record| record.fields).collect()
    }

    #[test]
    fn lists_and_lines_give_the_same_records() {
        let list = read("a.json", "\n [{\"a\": 1},\n {\"a\": 2}]\n").unwrap();
        let lines = read("a.jsonl", "{\"a\": 1}\n\n{\"a\": 2}\n").unwrap();
        assert_eq!(list, lines);
        assert_eq!(list.len(), 2);
    }

    #[test]
    fn what_is_no_source_is_refused_with_its_place() {
        assert!(read("a.json", "").unwrap_err().contains("no records"));
        assert!(read("a.json", "[]").unwrap_err().contains("no records"));
        assert!(
            read("a.json", "hello")
                .unwrap_err()
                .contains("neither a JSON list")
        );
        assert!(
            read("a.json", "[{\"a\": 1}, {\"a\" 2}]")
                .unwrap_err()
                .contains("line 1 column")
        );
        assert!(
            read("a.jsonl", "{\"a\": 1}\n{\"a\": \n")
                .unwrap_err()
                .contains("it is not JSON")
        );
    }

    #[test]
    fn pictures_in_parquet_are_taken_out_and_the_rest_becomes_json() {
        let image = |bytes: Option<&[u8]>, path: &str| Image {
            image_id: String::new(),
            image: ImageFile {
                bytes: bytes.map(<[u8]>::to_vec),
                path: Some(path.to_owned()),
            },
            width: 0,
            height: 0,
            format: String::new(),
        };
        let images = Image::to_batch(&[image(Some(b"png"), "a.png"), image(None, "b.png")]);
        let prompts: ArrayRef = Arc::new(StringArray::from(vec!["What?", "Why?"]));
        let batch =
            RecordBatch::try_from_iter([("image", images.column(1).clone()), ("prompt", prompts)])
                .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut writer = TableWriter::new(folder.path(), "a", batch.schema(), &[]);
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        let records: Vec<Record> = records(&folder.path().join("a.parquet"))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(records[1].place, "row 2");
        assert_eq!(
            records[0].fields,
            Ok(serde_json::json!({"image": "a.png", "prompt": "What?"}))
        );
        assert_eq!(
            records[0].embedded[0].bytes.as_deref(),
            Some(b"png".as_slice())
        );
        assert_eq!(records[1].embedded[0].bytes, None);
    }

    /// The records of a Parquet file of these columns.
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
        let records = records(&folder.path().join("a.parquet")).unwrap();
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
        let path = texts(&[Some("a.mp4"), None, None, None]);
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
            ("video", video),
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
                serde_json::json!({"prompt": "What?", "video": true, "category": true}),
                serde_json::json!({"prompt": "What?", "video": true}),
                serde_json::json!({"prompt": "What?", "video": false, "category": false}),
                serde_json::json!({"prompt": "What?"}),
            ]
        );
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
