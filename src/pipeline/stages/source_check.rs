//! A quick check of a source's first records and of the end of its file.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::num::NonZeroU32;
use std::path::Path;

use super::formats;
use super::names::Names;
use super::work::{Failure, Record};
use ovchat_io::files;

/// The number of records that are checked.
const LOOKED_AT: usize = 20;

/// The maximum size of a JSON list that is read to its end, in bytes.
const LIST_MAX: u64 = 16 << 20;

/// The number of bytes that are checked at the start and the end of a file.
const END: i64 = 4096;

/// The maximum size of a file that is checked if it is not JSON, in bytes.
const OTHERS_MAX: u64 = 16 << 20;

/// A problem of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceProblem {
    pub words: String,
    /// True if nothing can be loaded; false if records after the checked ones may be valid.
    pub is_certain: bool,
}

/// True for a file whose first records cannot be read alone: the rows of a large Parquet file may hold
/// images, and a thousand rows are read at once.
fn is_slow_to_begin(path: &Path) -> bool {
    let is_large = path.metadata().is_ok_and(|found| found.len() > OTHERS_MAX);
    is_large && formats::is_not_json(path)
}

/// Returns the first records of the source at `path`; none if they cannot be read, or not without
/// reading much more.
pub fn first_records(path: &Path, names: &Names) -> Vec<Record> {
    if is_slow_to_begin(path) {
        return Vec::new();
    }
    let records = formats::records(path, names).into_iter().flatten();
    records.take(LOOKED_AT).map_while(Result::ok).collect()
}

/// Checks the first records of the source at `path`, of which `limit` are loaded. `read` returns
/// the reason why a record is rejected.
pub fn source_problem(
    path: &Path,
    names: &Names,
    limit: Option<NonZeroU32>,
    mut read: impl FnMut(&Record) -> Result<(), String>,
) -> Option<SourceProblem> {
    let certain = |words: String| {
        Some(SourceProblem {
            words,
            is_certain: true,
        })
    };
    if is_slow_to_begin(path) {
        return None;
    }
    let records = match formats::records(path, names) {
        Ok(records) => records,
        Err(failure) => return certain(problem(failure)),
    };
    let mut count = 0;
    let mut first = None;
    let limit = limit.map_or(usize::MAX, |limit| limit.get() as usize);
    let is_read_whole = limit == usize::MAX;
    let mut records = records.take(limit);
    for record in records.by_ref().take(LOOKED_AT) {
        match record {
            Err(failure) => return certain(problem(failure)),
            Ok(record) => match read(&record) {
                Ok(()) if is_read_whole && is_cut_off(path) => return Some(cut_off()),
                // A list with a syntax error anywhere is not loaded at all.
                Ok(()) if path.metadata().is_ok_and(|found| found.len() <= LIST_MAX) => {
                    let failure = records.find_map(Result::err)?;
                    return certain(problem(failure));
                }
                Ok(()) => return None,
                Err(reason) => {
                    count += 1;
                    first.get_or_insert_with(|| format!("{}: {reason}", record.place));
                }
            },
        }
    }
    let first = first?;
    let of = match count {
        count if count == limit => format!("none of the first {count} records can be used"),
        1 => "the only record cannot be used".to_owned(),
        LOOKED_AT => format!("none of the first {LOOKED_AT} records can be used"),
        count => format!("none of the {count} records can be used"),
    };
    Some(SourceProblem {
        words: format!("{of}; {first}"),
        is_certain: count < LOOKED_AT,
    })
}

/// Returns the message of a failure without the name of the file.
fn problem(failure: Failure) -> String {
    match failure {
        Failure::Input { problem, .. } => problem,
        other => other.to_string(),
    }
}

fn cut_off() -> SourceProblem {
    SourceProblem {
        words: "truncated JSON list: missing `]` at the end".to_owned(),
        is_certain: true,
    }
}

/// True if a file begins like a JSON list but does not end like one.
fn is_cut_off(path: &Path) -> bool {
    if formats::is_not_json(path) {
        return false;
    }
    let ends = || -> std::io::Result<bool> {
        let mut file = files::open(path)?;
        let mut start = Vec::new();
        file.by_ref().take(END as u64).read_to_end(&mut start)?;
        if start.trim_ascii_start().first() != Some(&b'[') {
            return Ok(true);
        }
        let length = file.seek(SeekFrom::End(0))?.cast_signed();
        file.seek(SeekFrom::End(-END.min(length)))?;
        let mut end = Vec::new();
        file.read_to_end(&mut end)?;
        let end = end.trim_ascii_end();
        Ok(end.is_empty() || end.ends_with(b"]"))
    };
    ends().is_ok_and(|ends| !ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, is_certain: bool, words: &str) {
        check_with_limit(None, text, is_certain, words);
    }

    #[track_caller]
    fn check_with_limit(limit: Option<NonZeroU32>, text: &str, is_certain: bool, words: &str) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.json");
        std::fs::write(&path, text).unwrap();
        let found = source_problem(&path, &Names::default(), limit, |record| {
            match &record.fields {
                Ok(fields) if fields["prompt"].is_string() => Ok(()),
                Ok(_) => Err("missing field `prompt`".to_owned()),
                Err(problem) => Err(problem.clone()),
            }
        });
        let found = found.unwrap_or(SourceProblem {
            words: String::new(),
            is_certain: false,
        });
        assert_eq!((found.is_certain, &*found.words), (is_certain, words));
    }

    #[test]
    fn what_lies_behind_the_limit_is_not_looked_at() {
        let two = NonZeroU32::new(2);
        let text = r#"[{"prompt": "a"}, {"prompt": "b"}, {"prompt" "c"}]"#;
        check_with_limit(two, text, false, "");
        let none = "{\"x\": 1}\n{\"x\": 1}\n{\"prompt\": \"a\"}\n";
        let words = "none of the first 2 records can be used; line 1: missing field `prompt`";
        check_with_limit(two, none, true, words);
    }

    #[test]
    fn the_beginning_and_the_end_are_looked_at() {
        check(r#"[{"prompt": "a"}, {"image": "b"}] "#, false, "");
        check(
            r#"[{"prompt": "a"}, {"prompt" "b"}, {"prompt": "c"}]"#,
            true,
            "not a JSON list: expected `:` at line 1 column 29",
        );
        check(r#"{"prompt": "a"}"#, false, "");
        check("{\"x\": 1}\n{\"prompt\": \"a\"}\n", false, "");
        check("", true, "no records found");
        check(" [ ]", true, "no records found");
        check(
            r#"[{"prompt": "a"}, {"prompt": "#,
            true,
            "truncated JSON list: missing `]` at the end",
        );
        check(
            r#"[{"prompt": "#,
            true,
            "not a JSON list: EOF while parsing a value at line 1 column 12",
        );
        check(
            r#"{"data": [{"prompt": "a"}]}"#,
            true,
            "the only record cannot be used; line 1: missing field `prompt`",
        );
        check(
            &"{\"x\": 1}\n".repeat(50),
            false,
            "none of the first 20 records can be used; line 1: missing field `prompt`",
        );
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        std::fs::write(&path, "prompt,image\n").unwrap();
        let found = source_problem(&path, &Names::default(), None, |_| Ok(())).unwrap();
        assert!(found.is_certain);
        let begin = "unknown format: expected a JSON list, JSON Lines, or ";
        assert!(found.words.starts_with(begin), "{}", found.words);
    }
}
