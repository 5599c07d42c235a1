//! House rules that the compiler does not check: comments, the map of the guide, formatting.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::scene::ROOT;

/// The folders of the crates, in dependency order.
pub const CRATES: [&str; 7] = ["io", "data", "query", "models", "torch", "pipeline", "cli"];

/// The markers around the list of all files in the guide, which is generated from their first
/// sentences.
const MAP: (&str, &str) = ("<!-- map -->\n", "<!-- end of the map -->\n");

/// Returns every file below a folder: its path in the project and its text.
pub fn files(folder: &str) -> Vec<(String, String)> {
    let mut open = vec![Path::new(ROOT).join(folder)];
    let mut found = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
                continue;
            }
            let name = path.strip_prefix(ROOT).unwrap().to_str().unwrap();
            // Binary files read as empty text.
            let text = fs::read_to_string(&path).unwrap_or_default();
            found.push((name.to_owned(), text));
        }
    }
    found.sort();
    found
}

pub fn is_rust(file: &str) -> bool {
    Path::new(file).extension().is_some_and(|end| end == "rs")
}

/// Returns the lines of the Rust files below `src`: file, `file:number`, text.
fn lines() -> Vec<(String, String, String)> {
    let mut lines = Vec::new();
    for (file, text) in files("src").iter().filter(|(file, _)| is_rust(file)) {
        for (at, line) in (1..).zip(text.lines()) {
            lines.push((file.clone(), format!("{file}:{at}"), line.to_owned()));
        }
    }
    lines
}

#[track_caller]
pub fn assert_none(rule: &str, found: &[String]) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

#[test]
fn every_file_says_what_it_is() {
    let mut silent = Vec::new();
    for (file, text) in ["src", "tests", "examples", "benches", "data-samples"]
        .map(files)
        .concat()
    {
        if is_rust(&file) && !text.starts_with("//! ") {
            silent.push(file);
        }
    }
    assert_none("these do not open with `//!` and a sentence", &silent);
}

/// Words that no program of the field uses for what they named here; the guide's glossary has better ones.
const RETIRED: [&str; 34] = [
    "picture",
    "pictures",
    "verb",
    "verbs",
    "desk",
    "survey",
    "surveys",
    "parked",
    "unparked",
    "spoiled",
    "beginnings",
    "lesson",
    "lessons",
    "student",
    "students",
    "learner",
    "learners",
    "halvings",
    "complaint",
    "complaints",
    "gravity",
    "questionnaire",
    "asking",
    "speaker",
    "shelf",
    "card",
    "cards",
    "fate",
    "sound",
    "outlook",
    "confines",
    "objection",
    "stranger",
    "strangers",
];

/// Retired words in serialized names, recorded texts and others' formats: the end of the file's path, and the word.
const SERIALIZED: [(&str, &str); 26] = [
    ("cli/check.rs", "complaints"),
    ("cli/log.rs", "complaints"),
    ("label/queue.rs", "pictures"),
    ("label/request.rs", "picture"),
    ("store/folder.rs", "spoiled"),
    ("store/manifest.rs", "parked"),
    ("tables/telemetry.rs", "halvings"),
    ("tables/telemetry.rs", "pictures"),
    ("models/judge_prompt.rs", "picture"),
    ("config/check.rs", "spoiled"),
    ("config/paths.rs", "asking"),
    ("config/reader.rs", "verb"),
    ("run/keys.rs", "pictures"),
    ("run/runner.rs", "halvings"),
    ("run/rows.rs", "halvings"),
    ("run/rows.rs", "pictures"),
    ("stages/media.rs", "picture"),
    ("stages/media.rs", "pictures"),
    ("stages/media.rs", "sound"),
    ("stages/unread.rs", "picture"),
    ("stages/unread.rs", "sound"),
    ("parity/networks.rs", "pictures"),
    ("parity/text.rs", "picture"),
    ("parity/text.rs", "pictures"),
    ("parity/training.rs", "lessons"),
    ("parity/training.rs", "pictures"),
];

/// The files that may name an architecture of vision-language models: its own, and the lists (of the models of a
/// pipeline file, of the architectures, of the networks, of modules).
const ARCHITECTURES: [&str; 13] = [
    "src/models/spec.rs",
    "src/models/architectures.rs",
    "src/models/architectures/llava.rs",
    "src/models/architectures/llava_onevision.rs",
    "src/models/checkpoint.rs",
    "src/models/checkpoint/config.rs",
    "src/models/checkpoint/config/llava_onevision.rs",
    "src/models/checkpoint/conversion.rs",
    "src/models/checkpoint/names.rs",
    "src/models/preprocess/anyres.rs",
    "src/torch/llava.rs",
    "src/torch/llava_onevision.rs",
    "src/torch/networks.rs",
];

#[test]
fn only_its_own_files_and_the_lists_name_an_architecture() {
    const NAMES: [&str; 4] = [
        "LlavaOnevision",
        "LlavaOnevisionConfig",
        "Llava",
        "LlavaConfig",
    ];
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    for (file, text) in files("src") {
        let is_test = file.contains("/tests/") || file.ends_with("/hostile.rs");
        if !is_rust(&file) || is_test || ARCHITECTURES.contains(&file.as_str()) {
            continue;
        }
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (at, line) in (1..).zip(code.lines()) {
            let is_comment = line.trim_start().starts_with("//");
            let mut words = line.split(|c| !is_word(c));
            if !is_comment && words.any(|word| NAMES.contains(&word)) {
                found.push(format!("{file}:{at}: {line}"));
            }
        }
    }
    let rule = "code outside an architecture's files and the lists names it; use `Architecture` or \
                `VisionLanguageModel`";
    assert_none(rule, &found);
}

/// The openings of a relative clause, which says that something exists and not what it is.
const RELATIVES: [&str; 9] = [
    "What", "Whether", "How", "Where", "Which", "Of", "Who", "Why", "When",
];

#[test]
fn retired_words_stay_away() {
    let mut wrong = Vec::new();
    for (file, place, line) in lines() {
        for word in line.split(|c: char| !c.is_ascii_alphanumeric()) {
            let word = word.to_ascii_lowercase();
            let is_serialized = |(end, one): &(&str, &str)| file.ends_with(end) && *one == word;
            if RETIRED.contains(&word.as_str()) && !SERIALIZED.iter().any(is_serialized) {
                wrong.push(format!("{place}: `{word}`"));
            }
        }
    }
    assert_none(
        "these words have better ones in the guide's glossary",
        &wrong,
    );
}

#[test]
fn a_comment_says_what_something_is() {
    let mut wrong = Vec::new();
    for (_, place, line) in lines() {
        let line = line.trim_start();
        let doc = line.strip_prefix("/// ").or(line.strip_prefix("//! "));
        let first = doc.and_then(|doc| doc.split(' ').next());
        if first.is_some_and(|first| RELATIVES.contains(&first)) {
            wrong.push(format!("{place}: {line}"));
        }
    }
    assert_none("these doc lines begin with a relative clause", &wrong);
}

/// The maximum number of lines of code in the body of a function.
const BODY_MAX: usize = 80;

/// A function with a body of several lines.
struct Function<'t> {
    name: &'t str,
    /// The line of its `fn`, counted from 1.
    line: usize,
    /// The lines of its body that are neither blank nor a comment.
    code: usize,
}

/// Returns the functions of a file. The file is formatted, so a body ends at the first `}` that is
/// indented as its `fn` is.
fn functions(text: &str) -> Vec<Function<'_>> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else {
            continue;
        };
        let mut rest = lines[at..].iter();
        let signature_end = rest.find(|line| line.ends_with(['{', '}', ';']));
        if !signature_end.is_some_and(|line| line.ends_with('{')) {
            continue;
        }
        let end = format!("{}}}", &line[..line.len() - line.trim_start().len()]);
        let body = rest.take_while(|line| **line != end);
        let is_code = |line: &&&str| !line.trim().is_empty() && !line.trim().starts_with("//");
        found.push(Function {
            name,
            line: at + 1,
            code: body.filter(is_code).count(),
        });
    }
    found
}

/// Returns the name of the function whose `fn` is on this line.
fn function_name(line: &str) -> Option<&str> {
    let (before, rest) = line.split_once("fn ")?;
    let modifiers = ["pub", "const", "async", "unsafe", "extern", "\"C\""];
    let is_modifier = |word: &str| modifiers.contains(&word) || word.starts_with("pub(");
    if !before.split_whitespace().all(is_modifier) {
        return None;
    }
    rest.split(|c: char| !c.is_alphanumeric() && c != '_')
        .next()
}

#[test]
fn no_function_is_long() {
    let mut long = Vec::new();
    for (file, text) in ["src", "tests", "data-samples/generator"]
        .map(files)
        .concat()
    {
        if !is_rust(&file) {
            continue;
        }
        for Function { name, line, code } in functions(&text) {
            if code > BODY_MAX {
                long.push(format!("{file}:{line}: `{name}` has {code} lines of code"));
            }
        }
    }
    let rule = format!("these functions have more than {BODY_MAX} lines of code");
    assert_none(&rule, &long);
}

/// Returns the first sentence of the comment at the start of a file.
fn first_sentence(text: &str) -> String {
    // A page begins with its doctype.
    let text = text.strip_prefix("<!doctype html>\n<!-- ").map_or_else(
        || text.to_owned(),
        |rest| format!("# {}", rest.split(" -->").next().unwrap_or_default()),
    );
    let lines = text.lines().map_while(|line| {
        let (marker, rest) = line.split_once(' ')?;
        matches!(marker, "//!" | "//" | "--" | "#").then_some(rest)
    });
    let words = lines.collect::<Vec<_>>().join(" ");
    let end = words.find(". ").unwrap_or(words.len());
    words[..end]
        .trim_end_matches(['.', ' ', '-', '>'])
        .to_owned()
}

/// Returns the list of all files of a crate, its root file first.
fn map_of(name: &str) -> String {
    let folder = format!("src/{name}/");
    let mut found = files(&folder);
    found.retain(|(file, _)| !file.ends_with("Cargo.toml") && !file.ends_with("/build.rs"));
    found.sort_by_key(|(file, _)| {
        let is_root = file.ends_with("/lib.rs");
        let beside = file.replace("/mod.rs", "").replace(".rs", "");
        (!is_root, beside)
    });
    let mut map = format!("### {name}\n\n");
    for (file, text) in found {
        map += &format!("- `{}`: {}\n", &file["src/".len()..], first_sentence(&text));
    }
    map
}

#[test]
fn the_map_is_what_the_files_say() {
    let guide = Path::new(ROOT).join("src/README.md");
    let text = fs::read_to_string(&guide).unwrap();
    let (before, rest) = text.split_once(MAP.0).expect("the guide has a map");
    let (map, behind) = rest.split_once(MAP.1).expect("the map ends");
    let wanted = CRATES.map(map_of).join("\n");
    if std::env::var_os("UPDATE").is_some() {
        let text = format!("{before}{}{wanted}{}{behind}", MAP.0, MAP.1);
        fs::write(&guide, text).unwrap();
    } else {
        assert!(map == wanted, "run `UPDATE=1 cargo test --release`");
    }
}

#[test]
fn nothing_is_left_to_do_and_no_lint_is_silenced_without_a_reason() {
    let banned = ["todo!(", "unimplemented!(", "dbg!(", "#[ignore]", "[allow("];
    let mut wrong = Vec::new();
    for (_, place, line) in lines() {
        let found = banned.iter().find(|word| line.contains(**word));
        wrong.extend(found.map(|word| format!("{place}: `{word}`")));
    }
    assert_none("these may not be here", &wrong);
}

#[test]
fn every_reference_to_an_invariant_leads_to_its_one_proof() {
    let mut tags = BTreeMap::new();
    let mut wrong = Vec::new();
    for (_, place, line) in lines() {
        for tag in bracketed(&line, "[tag:") {
            if let Some(other) = tags.insert(tag.to_owned(), place.clone()) {
                wrong.push(format!("{place}: `{tag}` has its tag at {other}, too"));
            }
        }
    }
    for (_, place, line) in lines() {
        let lost = bracketed(&line, "[ref:").find(|tag| !tags.contains_key(*tag));
        wrong.extend(lost.map(|tag| format!("{place}: there is no tag `{tag}`")));
    }
    assert_none("these references and tags do not match", &wrong);
}

/// Returns the texts between each `opening` and the next `]`.
fn bracketed<'a>(line: &'a str, opening: &'a str) -> impl Iterator<Item = &'a str> {
    let after = line.split(opening).skip(1);
    after.filter_map(|rest| Some(rest.split_once(']')?.0))
}

#[test]
fn the_code_is_formatted() {
    let format = |argument| {
        let mut command = Command::new(env!("CARGO"));
        let said = command.args(["fmt", argument]).current_dir(ROOT).output();
        said.expect("cargo starts")
    };
    if !format("--version").status.success() {
        println!("not checked: this Rust has no rustfmt (rustup component add rustfmt)");
        return;
    }
    let said = format("--check");
    let words = String::from_utf8_lossy(&said.stdout);
    assert!(said.status.success(), "run `cargo fmt`:\n{words}");
}

#[test]
fn only_the_engine_loads_libtorch() {
    let libraries = |program| {
        let mut command = Command::new(program);
        let said = command.env("LD_TRACE_LOADED_OBJECTS", "1").output();
        String::from_utf8(said.expect("it starts").stdout).unwrap()
    };
    let loaded = libraries(env!("CARGO_BIN_EXE_pipeline"));
    assert!(loaded.contains("libc.so"), "{loaded}");
    assert!(!loaded.contains("libtorch"), "{loaded}");
    // The engine exists only with the feature `torch`.
    if let Some(engine) = option_env!("CARGO_BIN_EXE_pipeline-engine") {
        assert!(libraries(engine).contains("libtorch_cpu.so"));
    }
}

#[test]
fn every_pipeline_that_comes_with_the_project_is_right() {
    let mut pipelines = files("pipelines");
    // Folders below `pipelines` are runs.
    pipelines.retain(|(file, _)| file.matches('/').count() == 1);
    assert!(!pipelines.is_empty(), "there are no pipelines");
    for (file, text) in pipelines {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipeline"));
        command
            .args(["check", "--offline", &file])
            .current_dir(ROOT);
        for variable in bracketed(&text.replace('}', "]"), "${env:") {
            command.env(variable, "/nowhere");
        }
        let said = command.env("NO_COLOR", "1").output().unwrap();
        let words = String::from_utf8_lossy(&said.stderr);
        assert!(said.status.success(), "{file}:\n{words}");
    }
}
