//! House rules that the compiler doesn't know: floors, crate homes, comments, the map, formatting.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::scene::ROOT;

/// What each module may use. Neighbors on one floor do not see each other.
const FLOORS: [(&str, &str); 13] = [
    ("files", ""),
    ("visible", ""),
    ("mask", ""),
    ("tables", ""),
    ("models", "files mask"),
    ("prep", "files models"),
    ("nn", "models prep"),
    ("store", "files tables"),
    ("query", "files tables store"),
    ("stages", "files mask tables models prep store query"),
    (
        "config",
        "files mask visible tables models prep query stages",
    ),
    (
        "run",
        "files mask visible tables models prep store query stages config",
    ),
    (
        "cli",
        "files mask visible tables models prep store query stages config run",
    ),
];

/// The only places below `src` that name each of these crates.
const HOMES: [(&str, &str); 8] = [
    ("tch", "src/nn/"),
    ("datafusion", "src/query"),
    ("tokio", "src/query src/cli/label/server.rs"),
    ("hyper", "src/cli/label/server.rs"),
    ("parquet", "src/store/"),
    ("serde_yaml", "src/config/"),
    ("miette", "src/config/"),
    ("clap", "src/cli/"),
];

/// Every file below a folder, as its path in the project and its text.
fn files(folder: &str) -> Vec<(String, String)> {
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
            // Pictures and tensors are no text; nothing here asks for theirs.
            let text = fs::read_to_string(&path).unwrap_or_default();
            found.push((name.to_owned(), text));
        }
    }
    found.sort();
    found
}

fn is_rust(file: &str) -> bool {
    Path::new(file).extension().is_some_and(|end| end == "rs")
}

/// The lines of the Rust files below `src`: file, `file:number`, text.
fn lines() -> Vec<(String, String, String)> {
    let mut lines = Vec::new();
    for (file, text) in files("src").iter().filter(|(file, _)| is_rust(file)) {
        for (at, line) in (1..).zip(text.lines()) {
            lines.push((file.clone(), format!("{file}:{at}"), line.to_owned()));
        }
    }
    lines
}

/// A line without its comment.
fn code(line: &str) -> &str {
    line.split_once("//").map_or(line, |(code, _)| code)
}

fn is_in_a_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The modules of this crate that a line names, as `crate::module`.
fn modules(line: &str) -> impl Iterator<Item = &str> {
    let after = line.split("crate::").skip(1);
    after.map(|rest| match rest.split(|c| !is_in_a_word(c)).next() {
        Some("") | None => "several modules in one `use`",
        Some(module) => module,
    })
}

/// Whether a line names a crate, as `name::…` or `::name::…`, and not a module of that name.
fn names_crate(line: &str, name: &str) -> bool {
    line.match_indices(&format!("{name}::")).any(|(at, _)| {
        let before = line[..at].trim_end_matches("::");
        !before.ends_with(|c| is_in_a_word(c) || c == '.')
    })
}

#[track_caller]
fn assert_none(rule: &str, found: &[String]) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

#[test]
fn a_module_uses_only_the_floors_below_it() {
    let mut wrong = Vec::new();
    for (file, place, line) in lines() {
        let module = file["src/".len()..].split(['/', '.']).next().unwrap();
        if matches!(module, "lib" | "bin") {
            continue;
        }
        let floor = FLOORS.iter().find(|(floor, _)| *floor == module);
        let (_, below) = floor.unwrap_or_else(|| panic!("{file}: FLOORS lacks `{module}`"));
        for used in modules(code(&line)) {
            if used != module && !below.split(' ').any(|floor| floor == used) {
                wrong.push(format!("{place}: `{module}` may not use `{used}`"));
            }
        }
    }
    assert_none("these look above their floor", &wrong);
}

#[test]
fn a_crate_is_named_in_its_home_only() {
    let mut wrong = Vec::new();
    for (file, place, line) in lines() {
        for (name, home) in HOMES {
            let is_home = home.split(' ').any(|home| file.starts_with(home));
            if !is_home && names_crate(code(&line), name) {
                wrong.push(format!("{place}: `{name}` is at home in {home}"));
            }
        }
    }
    assert_none("these name a crate away from its home", &wrong);
}

#[test]
fn every_file_says_what_it_is() {
    let mut silent = Vec::new();
    for (file, text) in ["src", "tests", "examples", "benches"].map(files).concat() {
        // The comment of the library is the guide.
        let speaks = text.starts_with("//! ") || text.starts_with("#![doc = include_str!(");
        if is_rust(&file) && !speaks {
            silent.push(file);
        }
    }
    assert_none("these do not open with `//!` and a sentence", &silent);
}

#[test]
fn the_map_names_every_file_and_no_other() {
    let mut there: BTreeSet<String> = files("src").into_iter().map(|(file, _)| file).collect();
    there.remove("src/README.md");
    let guide = fs::read_to_string(Path::new(ROOT).join("src/README.md")).unwrap();
    let mut wrong = Vec::new();
    for line in guide.lines() {
        let entry = line.strip_prefix("- `").and_then(|it| it.split_once('`'));
        if let Some((name, _)) = entry
            && !there.remove(&format!("src/{name}"))
        {
            wrong.push(format!("`{name}` is not there, or named twice"));
        }
    }
    wrong.extend(there.iter().map(|file| format!("{file} has no line")));
    assert_none("the map in src/README.md is not true", &wrong);
}

#[test]
fn nothing_is_left_to_do_and_no_lint_is_silenced_without_a_reason() {
    let banned = ["todo!(", "unimplemented!(", "dbg!(", "#[ignore", "[allow("];
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

/// What stands between an opening and the next bracket, as often as it does.
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
    // It is there with the feature `torch` only.
    if let Some(engine) = option_env!("CARGO_BIN_EXE_pipeline-engine") {
        assert!(libraries(engine).contains("libtorch_cpu.so"));
    }
}

#[test]
fn every_pipeline_that_comes_with_the_project_is_right() {
    let mut pipelines = files("pipelines");
    // Runs that somebody made there lie in folders of their own.
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
