//! Pairs as a Parquet file for TRL's `DPOTrainer`: conversations whose content parts are texts and
//! images in place, and the images themselves.
//!
//! `datasets.load_dataset("parquet", data_files=…)` decodes the images, because the schema's metadata
//! names their type as Hugging Face `datasets` writes it.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BinaryArray, ListArray, RecordBatch, StringArray, StructArray, new_null_array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use serde_json::json;

use ovchat_data::store::{ParquetStream, StoreError};
use ovchat_data::tables::{Pair, Role};
use ovchat_models::{IMAGE_PLACEHOLDER, misfit};
use ovchat_pipeline::stages::Shown;

/// The number of pairs that are written at once.
const AT_ONCE: usize = 256;

/// The bytes of images that are in memory at once. An Arrow column of bytes holds 2 GiB.
const BYTES_AT_ONCE: usize = 256 << 20;

/// The bytes of the images of one pair.
const BYTES_MAX: usize = 1 << 30;

/// A message of a conversation.
#[derive(Debug, PartialEq, Eq)]
struct Message {
    role: &'static str,
    parts: Vec<Part>,
}

/// A content part of a message.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    Image,
    Text(String),
}

/// Writes pairs to a file, a few at a time.
pub struct Writer {
    out: ParquetStream<File>,
    schema: SchemaRef,
    waiting: Vec<(Pair, Vec<Arc<[u8]>>)>,
    bytes: usize,
}

impl Writer {
    pub fn begin(file: File) -> Result<Self, StoreError> {
        let schema = schema();
        Ok(Self {
            out: ParquetStream::begin(file, &schema)?,
            schema,
            waiting: Vec::new(),
            bytes: 0,
        })
    }

    /// Writes a pair with the bytes of its images, at most [`BYTES_MAX`] of them.
    pub fn write(&mut self, pair: Pair, images: Vec<Arc<[u8]>>) -> Result<(), StoreError> {
        let bytes: usize = images.iter().map(|bytes| bytes.len()).sum();
        if self.bytes + bytes > BYTES_AT_ONCE || self.waiting.len() >= AT_ONCE {
            self.flush()?;
        }
        self.bytes += bytes;
        self.waiting.push((pair, images));
        Ok(())
    }

    /// Writes the rest and returns the file.
    pub fn finish(mut self) -> Result<File, StoreError> {
        self.flush()?;
        self.out.finish()
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        self.bytes = 0;
        let waiting = std::mem::take(&mut self.waiting);
        let (pairs, bytes): (Vec<Pair>, Vec<Vec<Arc<[u8]>>>) = waiting.into_iter().unzip();
        let bytes: Vec<Arc<[u8]>> = bytes.into_iter().flatten().collect();
        let counts = pairs.iter().map(|pair| pair.image_ids.len());
        let files = BinaryArray::from_iter_values(bytes);
        let names = new_null_array(&DataType::Utf8, files.len());
        let files = structs(image_fields(), vec![Arc::new(files), names]);
        let ids = pairs
            .iter()
            .map(|pair| pair.id.as_ref().unwrap_or(&pair.prompt_id));
        let answers = |answer: fn(&Pair) -> &String| {
            let said = |pair| {
                vec![Message {
                    role: "assistant",
                    parts: vec![Part::Text(answer(pair).clone())],
                }]
            };
            conversations(pairs.iter().map(said).collect())
        };
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from_iter_values(ids)),
            list(files, counts),
            conversations(pairs.iter().map(prompt).collect()),
            answers(|pair| &pair.chosen),
            answers(|pair| &pair.rejected),
        ];
        let rows = RecordBatch::try_new(self.schema.clone(), columns);
        self.out.write(&rows.expect("the columns of the schema"))
    }
}

/// Returns the reason why a pair, whose images have this many bytes, cannot be written, as the rest of
/// a sentence about it.
pub fn problem(pair: &Pair, bytes: usize) -> Option<String> {
    let messages = prompt(pair);
    let parts = || messages.iter().flat_map(|message| &message.parts);
    let places = parts().filter(|part| **part == Part::Image).count();
    let images = pair.image_ids.len();
    if !Shown::from(pair).videos.is_empty() {
        return Some("has a video, which TRL's DPOTrainer does not read".to_owned());
    }
    if places != images {
        return Some(misfit(images, places));
    }
    let texts = parts().filter_map(|part| match part {
        Part::Text(text) => Some(text),
        Part::Image => None,
    });
    let mut texts = texts.chain([&pair.chosen, &pair.rejected]);
    if texts.any(|text| text.contains(IMAGE_PLACEHOLDER)) {
        return Some(format!(
            "has the word `{IMAGE_PLACEHOLDER}` in a text, which TRL would read as an image"
        ));
    }
    (bytes > BYTES_MAX).then(|| {
        format!(
            "has {} MB of images, but a row may have {} MB",
            bytes >> 20,
            BYTES_MAX >> 20
        )
    })
}

/// Returns the conversation up to the question.
fn prompt(pair: &Pair) -> Vec<Message> {
    let message = |role, text: &str| Message {
        role,
        parts: vec![Part::Text(text.to_owned())],
    };
    let mut messages: Vec<Message> = Vec::new();
    messages.extend(pair.system.iter().map(|text| message("system", text)));
    let turns = pair
        .turns
        .iter()
        .map(|turn| (turn.role, turn.text.as_str()));
    let asked: Vec<(Role, &str)> = turns.chain([(Role::User, pair.prompt.as_str())]).collect();
    let is_placed =
        |(role, text): &(Role, &str)| *role == Role::User && text.contains(IMAGE_PLACEHOLDER);
    let mut in_front = match asked.iter().any(is_placed) {
        true => 0,
        false => pair.image_ids.len(),
    };
    for (role, text) in asked {
        messages.push(match role {
            Role::Assistant => message("assistant", text),
            Role::User if pair.image_ids.is_empty() => message("user", text),
            Role::User => Message {
                role: "user",
                parts: parts(std::mem::take(&mut in_front), text),
            },
        });
    }
    messages
}

/// Returns the content parts of a text with placeholders. A chat template writes the line ends
/// behind images that stand before all text.
fn parts(in_front: usize, text: &str) -> Vec<Part> {
    let line = format!("{IMAGE_PLACEHOLDER}\n");
    let mut rest = text;
    let mut parts: Vec<Part> = (0..in_front).map(|_| Part::Image).collect();
    while let Some(behind) = rest.strip_prefix(&line) {
        parts.push(Part::Image);
        rest = behind;
    }
    if rest.contains(IMAGE_PLACEHOLDER) {
        parts.clear();
        rest = text;
    }
    for (number, piece) in rest.split(IMAGE_PLACEHOLDER).enumerate() {
        if number > 0 {
            parts.push(Part::Image);
        }
        if !piece.is_empty() {
            parts.push(Part::Text(piece.to_owned()));
        }
    }
    parts
}

fn image_fields() -> Fields {
    Fields::from(vec![
        Field::new("bytes", DataType::Binary, true),
        Field::new("path", DataType::Utf8, true),
    ])
}

fn part_fields() -> Fields {
    Fields::from(vec![
        Field::new("type", DataType::Utf8, true),
        Field::new("text", DataType::Utf8, true),
    ])
}

fn list_of(fields: Fields) -> DataType {
    DataType::List(Arc::new(Field::new("item", DataType::Struct(fields), true)))
}

fn message_fields() -> Fields {
    Fields::from(vec![
        Field::new("role", DataType::Utf8, true),
        Field::new("content", list_of(part_fields()), true),
    ])
}

fn schema() -> SchemaRef {
    let text = || json!({ "dtype": "string", "_type": "Value" });
    let messages = || json!([{ "role": text(), "content": [{ "type": text(), "text": text() }] }]);
    let features = json!({ "info": { "features": {
        "id": text(),
        "images": [{ "_type": "Image" }],
        "prompt": messages(),
        "chosen": messages(),
        "rejected": messages(),
    } } });
    let fields = vec![
        Field::new("id", DataType::Utf8, true),
        Field::new("images", list_of(image_fields()), true),
        Field::new("prompt", list_of(message_fields()), true),
        Field::new("chosen", list_of(message_fields()), true),
        Field::new("rejected", list_of(message_fields()), true),
    ];
    let metadata = HashMap::from([("huggingface".to_owned(), features.to_string())]);
    Arc::new(Schema::new(fields).with_metadata(metadata))
}

fn structs(fields: Fields, columns: Vec<ArrayRef>) -> ArrayRef {
    Arc::new(StructArray::new(fields, columns, None))
}

/// Returns lists of these lengths of the items.
fn list(items: ArrayRef, lengths: impl Iterator<Item = usize>) -> ArrayRef {
    let item = Arc::new(Field::new("item", items.data_type().clone(), true));
    let offsets = OffsetBuffer::from_lengths(lengths);
    Arc::new(ListArray::new(item, offsets, items, None))
}

fn conversations(all: Vec<Vec<Message>>) -> ArrayRef {
    let lengths: Vec<usize> = all.iter().map(Vec::len).collect();
    let messages: Vec<Message> = all.into_iter().flatten().collect();
    let counts = messages.iter().map(|message| message.parts.len());
    let roles = StringArray::from_iter_values(messages.iter().map(|message| message.role));
    let parts: Vec<&Part> = messages.iter().flat_map(|message| &message.parts).collect();
    let types = parts.iter().map(|part| match part {
        Part::Image => "image",
        Part::Text(_) => "text",
    });
    let texts = parts.iter().map(|part| match part {
        Part::Image => None,
        Part::Text(text) => Some(text),
    });
    let types = StringArray::from_iter_values(types);
    let texts: StringArray = texts.collect();
    let parts = structs(part_fields(), vec![Arc::new(types), Arc::new(texts)]);
    let contents = list(parts, counts);
    let messages = structs(message_fields(), vec![Arc::new(roles), contents]);
    list(messages, lengths.into_iter())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(in_front: usize, text: &str) -> String {
        let shown = |part: &Part| match part {
            Part::Image => "[]".to_owned(),
            Part::Text(text) => format!("{text:?}"),
        };
        let parts: Vec<String> = parts(in_front, text).iter().map(shown).collect();
        parts.join(" ")
    }

    #[test]
    fn images_are_parts_where_they_stand() {
        assert_eq!(written(2, "Which?"), "[] [] \"Which?\"");
        assert_eq!(written(0, "<image>\nAnd this?"), "[] \"And this?\"");
        assert_eq!(written(0, "<image>\n<image>\nThese?"), "[] [] \"These?\"");
        assert_eq!(written(0, "<image> or <image>"), "[] \" or \" []");
        assert_eq!(written(0, "<image>\nA <image>B"), "[] \"\\nA \" [] \"B\"");
        assert_eq!(written(0, "Nothing."), "\"Nothing.\"");
    }
}
