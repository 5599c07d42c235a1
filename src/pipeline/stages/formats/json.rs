//! JSON list and JSON Lines sources.

use std::cell::Cell;
use std::fmt;
use std::io::{self, BufRead, Read as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};

use serde::de::{DeserializeSeed, Deserializer as _, MapAccess, SeqAccess, Visitor};
use serde_json::de::{Read as JsonRead, StrRead};
use serde_json::{Map, Number, Value};

use super::super::unread::shown;
use super::super::work::{Failure, Record};
use super::failure::{RECORD_MAX, empty, input};

/// The number of records that the parser thread may be ahead of its consumer.
const AHEAD: usize = 256;

/// Reads one JSON object per line; empty lines are skipped.
pub fn lines<T: BufRead + Send + 'static>(
    path: &Path,
    text: T,
) -> impl Iterator<Item = Result<Record, Failure>> + Send + use<T> {
    let path = path.to_owned();
    let mut text = text;
    let mut number = 0;
    let lines = std::iter::from_fn(move || {
        number += 1;
        let failed = |problem| Err(input(&path, &format!(", line {number}"), problem));
        let mut line = Vec::new();
        let mut limited = (&mut text).take(RECORD_MAX);
        match limited.read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) if limited.limit() == 0 && line.last() != Some(&b'\n') => {
                Some(failed(too_long()))
            }
            Ok(_) => Some(Ok((number, line))),
            Err(error) => Some(failed(error.to_string())),
        }
    });
    let mut has_failed = false;
    // After a failure, the position is no longer at the start of a line.
    let lines = lines.take_while(move |line| !std::mem::replace(&mut has_failed, line.is_err()));
    lines.filter_map(|line| match line {
        Ok((_, line)) if line.trim_ascii().is_empty() => None,
        Ok((number, line)) => Some(Ok(record_of(number, &line))),
        Err(failure) => Some(Err(failure)),
    })
}

/// Parses the record in a line. A line of invalid JSON rejects its record and not the file, since
/// later lines may be valid.
fn record_of(number: usize, line: &[u8]) -> Record {
    let fields = match std::str::from_utf8(line) {
        Ok(line) => whole(StrRead::new(line))
            .unwrap_or_else(|error| Err(format!("invalid JSON: {}", without_place(&error)))),
        Err(error) => Err(format!("invalid UTF-8 at byte {}", error.valid_up_to() + 1)),
    };
    Record {
        place: format!("line {number}"),
        fields,
        embedded: Vec::new(),
        kept: Vec::new(),
    }
}

/// The error for a record longer than [`RECORD_MAX`].
fn too_long() -> String {
    format!(
        "a record exceeds {} MB; keep images and other large values in separate files",
        RECORD_MAX >> 20
    )
}

/// A reader that fails once more than [`RECORD_MAX`] bytes are read before `read` is reset.
struct Limited<'a, T> {
    text: T,
    read: &'a Cell<u64>,
}

impl<T: io::Read> io::Read for Limited<'_, T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.text.read(buffer)?;
        self.read.set(self.read.get() + read as u64);
        if self.read.get() > RECORD_MAX {
            return Err(io::Error::other(too_long()));
        }
        Ok(read)
    }
}

/// Returns the message of an error without the position that serde_json appends.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let end = text.rfind(" at line ").unwrap_or(text.len());
    text[..end].to_owned()
}

/// Returns the message of an error with its column only: for JSON Lines, the line that serde_json
/// counts is always 1.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(place) => format!("{} at column {}", &text[..place], error.column()),
        None => text,
    }
}

/// Reads the objects of a JSON list in a separate thread, so that a list of millions is never in
/// memory as a whole.
pub fn list<T: BufRead + Send + 'static>(
    path: &Path,
    text: T,
) -> impl Iterator<Item = Result<Record, Failure>> + Send + use<T> {
    let (sender, receiver) = sync_channel(AHEAD);
    let path = path.to_owned();
    std::thread::spawn(move || {
        let read = Cell::new(0);
        let text = Limited { text, read: &read };
        let mut list = serde_json::Deserializer::from_reader(text);
        let parsed = catch_unwind(AssertUnwindSafe(|| {
            let feed = Feed {
                sender: &sender,
                path: &path,
                read: &read,
            };
            (&mut list).deserialize_seq(feed).and_then(|()| list.end())
        }));
        let problem = match parsed {
            Ok(Ok(())) => return,
            Ok(Err(error)) if error.is_io() => without_line(&error),
            Ok(Err(error)) => format!("not a JSON list: {error}"),
            // Without an error, the panic would look like the end of the list.
            Err(_) => "the JSON parser panicked; this is a bug in `pipeline`".to_owned(),
        };
        // Sending fails if the receiver was dropped; then nobody waits for the error.
        let _ = sender.send(Err(input(&path, "", problem)));
    });
    receiver.into_iter()
}

struct Feed<'a> {
    sender: &'a SyncSender<Result<Record, Failure>>,
    path: &'a PathBuf,
    /// The number of bytes read of the current record.
    read: &'a Cell<u64>,
}

impl<'de> Visitor<'de> for Feed<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut count = 0;
        while let Some(fields) = list.next_element_seed(Unique)? {
            count += 1;
            self.read.set(0);
            let record = Record {
                place: format!("record {count}"),
                fields,
                embedded: Vec::new(),
                kept: Vec::new(),
            };
            if self.sender.send(Ok(record)).is_err() {
                return Err(serde::de::Error::custom("the receiver was dropped"));
            }
        }
        if count == 0 {
            let _ = self.sender.send(Err(empty(self.path)));
        }
        Ok(())
    }
}

/// Parses a text that is one JSON value. The inner error reports a duplicate key.
pub fn whole<'t>(text: impl JsonRead<'t>) -> serde_json::Result<Result<Value, String>> {
    let mut text = serde_json::Deserializer::new(text);
    let value = Unique.deserialize(&mut text)?;
    text.end().map(|()| value)
}

/// A seed that parses a value and rejects duplicate keys in objects, of which serde_json keeps the
/// last.
struct Unique;

impl<'de> DeserializeSeed<'de> for Unique {
    type Value = Result<Value, String>;

    fn deserialize<D: serde::Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        let mut twice = None;
        let value = Parse { twice: &mut twice }.deserialize(from)?;
        Ok(match twice {
            None => Ok(value),
            Some(key) => Err(format!(
                "duplicate key `{}`; keep one of the two",
                shown(&key)
            )),
        })
    }
}

/// A seed that parses a value and records the first duplicate key in one of its objects.
struct Parse<'a> {
    twice: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for Parse<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Parse<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any valid JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        let twice = self.twice;
        while let Some(item) = list.next_element_seed(Parse { twice: &mut *twice })? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        let twice = self.twice;
        while let Some(key) = object.next_key::<String>()? {
            let value = object.next_value_seed(Parse { twice: &mut *twice })?;
            if fields.contains_key(&key) {
                twice.get_or_insert_with(|| key.clone());
            }
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the places of the records, each with its `id`, or the reasons for rejection.
    fn read(
        records: impl Iterator<Item = Result<Record, Failure>>,
    ) -> Result<Vec<(String, String)>, String> {
        let mut all = Vec::new();
        for record in records {
            let record = record.map_err(|failure| failure.to_string())?;
            let fields = record.fields.map(|fields| fields["id"].to_string());
            all.push((record.place, fields.unwrap_or_else(|reason| reason)));
        }
        Ok(all)
    }

    fn expected(records: &[(&str, &str)]) -> Vec<(String, String)> {
        let records = records.iter();
        records
            .map(|(place, id)| ((*place).to_owned(), (*id).to_owned()))
            .collect()
    }

    #[test]
    fn records_of_a_list_and_of_lines_are_numbered() {
        let path = Path::new("p.json");
        let all = read(list(path, &b"[{\"id\": 1}, {\"id\": 2}]"[..])).unwrap();
        assert_eq!(all, expected(&[("record 1", "1"), ("record 2", "2")]));
        let all = read(lines(path, &b"{\"id\": 1}\n\n{\"id\": 2}"[..])).unwrap();
        assert_eq!(all, expected(&[("line 1", "1"), ("line 3", "2")]));
    }

    #[test]
    fn an_invalid_line_rejects_its_record_and_an_invalid_list_ends_the_reading() {
        let path = Path::new("p.json");
        let text = b"{\"id\": 1, \"id\": 2}\n{\"id\": }\n\xff\n{\"id\": 4}";
        let all = read(lines(path, &text[..])).unwrap();
        let places = ["line 1", "line 2", "line 3", "line 4"];
        assert!(all.iter().map(|record| &*record.0).eq(places));
        assert!(all[0].1.starts_with("duplicate key `id`"), "{}", all[0].1);
        assert!(all[1].1.starts_with("invalid JSON: "), "{}", all[1].1);
        assert_eq!(all[2].1, "invalid UTF-8 at byte 1");
        assert_eq!(all[3].1, "4");
        for (text, expected) in [
            (&b"[{\"id\": 1}, {"[..], "not a JSON list"),
            (b"{\"id\": 1}", "not a JSON list"),
        ] {
            let failure = read(list(path, text)).unwrap_err();
            assert!(failure.starts_with("p.json"), "{failure}");
            assert!(failure.contains(expected), "{failure}");
        }
    }
}
