//! Source file formats: JSON lists, JSON Lines and Parquet.

mod columns;
mod failure;
mod json;

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::Value;
use serde_json::de::IoRead;

use self::failure::{empty, input};
use super::names::Names;
use super::work::{Failure, Record};
use ovchat_io::files;

type Records = Box<dyn Iterator<Item = Result<Record, Failure>> + Send>;

/// A format of files, by the ending of their names.
struct Format {
    name: &'static str,
    ending: &'static str,
    records: fn(&Path, &Names) -> Result<Records, Failure>,
}

/// The formats beside JSON. A list and lines of JSON are told apart by the first character, and may
/// have any other ending.
const FORMATS: [Format; 1] = [Format {
    name: "Parquet",
    ending: "parquet",
    records: |path, names| Ok(Box::new(columns::records(path, names)?)),
}];

/// Returns an ending of the files of each format.
pub fn endings() -> impl Iterator<Item = &'static str> {
    let others = FORMATS.iter().map(|format| format.ending);
    std::iter::once("json").chain(others)
}

/// Returns the format of a file that is not JSON.
fn format(path: &Path) -> Option<&'static Format> {
    let ending = path.extension()?;
    FORMATS.iter().find(|format| ending == format.ending)
}

/// True if only the ending of a file's name tells how to read it.
pub fn is_not_json(path: &Path) -> bool {
    format(path).is_some()
}

/// The byte order mark of UTF-8.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// Returns the records of a file, read lazily, with the columns that `names` names.
pub fn records(path: &Path, names: &Names) -> Result<Records, Failure> {
    if let Some(format) = format(path) {
        return (format.records)(path, names);
    }
    let names = names.clone();
    let named = move |mut record: Record| {
        if let Ok(Value::Object(fields)) = &mut record.fields {
            record.kept = names.apply(fields);
        }
        record
    };
    let records = of_json(path)?;
    Ok(Box::new(records.map(move |record| record.map(&named))))
}

/// Returns the records of a JSON file.
fn of_json(path: &Path) -> Result<Records, Failure> {
    let mut text = open(path)?;
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
        b'[' => Ok(Box::new(json::list(path, text))),
        b'{' => Ok(Box::new(json::lines(path, text))),
        _ => {
            let others =
                FORMATS.map(|Format { name, ending, .. }| format!("{name} (named *.{ending})"));
            let problem = format!(
                "unknown format: expected a JSON list, JSON Lines, or {}",
                others.join(" or ")
            );
            Err(input(path, "", problem))
        }
    }
}

/// Opens a JSON file and skips its byte order mark.
fn open(path: &Path) -> Result<BufReader<files::Stream>, Failure> {
    let failed = |error: std::io::Error| input(path, "", error.to_string());
    let mut text = BufReader::new(files::Stream::open(path).map_err(failed)?);
    let start = text.fill_buf().map_err(failed)?;
    // One of the two bytes of an ASCII character in UTF-16 is zero.
    if matches!(
        start,
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, _, ..] | [_, 0, ..]
    ) {
        return Err(input(
            path,
            "",
            format!(
                "the file is UTF-16 or UTF-32, but JSON must be UTF-8; convert it: iconv -f UTF-16 -t UTF-8 \
                 {} > utf8.json",
                path.display()
            ),
        ));
    }
    if start.starts_with(MARK) {
        text.consume(MARK.len());
    }
    Ok(text)
}

/// Reads a JSON object that maps image paths to captions.
pub fn captions(path: &Path) -> Result<HashMap<String, Vec<String>>, Failure> {
    let problem = |problem: String| {
        let words = "expected a JSON object that maps image paths to lists of captions";
        input(path, "", format!("{words}: {problem}"))
    };
    let captions =
        json::whole(IoRead::new(open(path)?)).map_err(|error| problem(error.to_string()))?;
    let captions = captions.map_err(|twice| input(path, "", twice))?;
    serde_json::from_value(captions).map_err(|error| problem(error.to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn read(name: &str, text: impl AsRef<[u8]>) -> Result<Vec<Value>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let records = records(&path, &Names::default()).map_err(|error| error.to_string())?;
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
                .contains("unknown format")
        );
        assert!(
            read("a.json", "[{\"a\": 1}, {\"a\" 2}]")
                .unwrap_err()
                .contains("line 1 column")
        );
        assert!(
            read("a.jsonl", "{\"a\": 1}\n{\"a\": \n")
                .unwrap_err()
                .contains("invalid JSON")
        );
    }

    #[test]
    fn a_byte_order_mark_is_passed_over_and_other_encodings_are_refused() {
        let expected = [serde_json::json!({"a": "ü"})];
        assert_eq!(
            read("a.json", "\u{feff}[{\"a\": \"ü\"}]").unwrap(),
            expected
        );
        assert_eq!(
            read("a.jsonl", "\u{feff}{\"a\": \"ü\"}\n").unwrap(),
            expected
        );
        let units = |text: &str| text.encode_utf16().collect::<Vec<u16>>();
        let little = |text: &str| -> Vec<u8> {
            units(text).into_iter().flat_map(u16::to_le_bytes).collect()
        };
        let big = |text: &str| -> Vec<u8> {
            units(text).into_iter().flat_map(u16::to_be_bytes).collect()
        };
        for text in ["\u{feff}[{\"a\": 1}]", "{\"a\": 1}"] {
            for bytes in [little(text), big(text)] {
                let problem = read("a.json", bytes).unwrap_err();
                assert!(
                    problem.contains("the file is UTF-16 or UTF-32"),
                    "{problem}"
                );
                assert!(problem.contains("iconv -f UTF-16 -t UTF-8"), "{problem}");
            }
        }
        assert!(
            read("a.json", "\u{feff}")
                .unwrap_err()
                .contains("no records")
        );
    }

    #[test]
    fn a_key_that_stands_twice_costs_its_record() {
        let reason = "duplicate key `a`; keep one of the two";
        for text in [
            "[{\"a\": 1, \"b\": 2, \"a\": 1}]",
            "{\"a\": 1, \"a\": 2}",
            "[{\"b\": [{\"a\": 1, \"a\": 2}]}]",
        ] {
            assert_eq!(read("a.json", text).unwrap_err(), reason, "{text}");
        }
        // The next record is fine.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        std::fs::write(&path, "[{\"a\": 1, \"a\": 2}, {\"a\": [1.5, null, true]}]").unwrap();
        let records: Vec<Record> = records(&path, &Names::default())
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert!(records[0].fields.is_err());
        assert_eq!(
            records[1].fields,
            Ok(serde_json::json!({"a": [1.5, null, true]}))
        );
        std::fs::write(&path, "{\"a.png\": [\"A.\"], \"a.png\": [\"B.\"]}").unwrap();
        let problem = captions(&path).unwrap_err().to_string();
        assert!(problem.contains("duplicate key `a.png`"), "{problem}");
        std::fs::write(&path, "\u{feff}{\"a.png\": [\"A.\"]}").unwrap();
        assert_eq!(captions(&path).unwrap()["a.png"], ["A."]);
    }
}
