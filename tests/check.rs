//! Invalid pipelines, and pipelines with warnings.
//!
//! Each `tests/check/*.yaml` starts with a comment: the exact diagnostics, without color. `UPDATE=1
//! cargo test --release` rewrites the comments. A first line `# with: …` gives arguments: `--set
//! path=value` (once), `--offline`.

use std::fs;
use std::path::{Path, PathBuf};

use ovchat_pipeline::config::{Diagnostics, LoadError, RenderStyle, load};

/// Returns the diagnostics that `pipeline check` prints for a file.
fn rendering(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("the test files are readable");
    let first = text.lines().next().unwrap_or_default();
    let arguments = first.strip_prefix("# with: ").unwrap_or_default();
    let offline = arguments.contains("--offline");
    let set = arguments
        .split_once("--set ")
        .map(|(_, set)| set.trim().to_owned());
    let sets: Vec<String> = set.into_iter().collect();
    match load(path, &sets, offline) {
        Ok(plan) => Diagnostics(plan.warnings).render(RenderStyle::Plain),
        Err(LoadError::Refused(diagnostics)) => diagnostics.render(RenderStyle::Plain),
        Err(error) => panic!("{}: {error}", path.display()),
    }
}

/// Returns the lines of the expected comment of a file.
fn comment(first: &str, drawn: &str) -> Vec<String> {
    let with = first.starts_with("# with: ").then(|| first.to_owned());
    let lines = drawn
        .lines()
        .map(|line| format!("# {line}").trim_end().to_owned());
    with.into_iter().chain(lines).collect()
}

/// Rewrites the comment of a file until its line numbers are right.
fn update(path: &Path) {
    for _ in 0..4 {
        let text = fs::read_to_string(path).expect("the test files are readable");
        let end = if text.contains("\r\n") { "\r\n" } else { "\n" };
        let first = text.lines().next().unwrap_or_default();
        let body = text
            .split_inclusive('\n')
            .skip_while(|line| line.starts_with('#'));
        let mut written = comment(first, &rendering(path)).join(end);
        written.push_str(end);
        written.extend(body);
        fs::write(path, written).expect("the test files are writable");
    }
}

#[test]
fn each_pipeline_is_refused_in_the_words_at_its_top() {
    let folder = fs::read_dir("tests/check").expect("tests/check is there");
    let paths = folder.map(|entry| entry.expect("it can be listed").path());
    let mut paths: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|it| it == "yaml"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 25, "only {} cases were found", paths.len());
    let mut wrong = Vec::new();
    for path in &paths {
        if std::env::var_os("UPDATE").is_some() {
            update(path);
        }
        let text = fs::read_to_string(path).expect("the test files are readable");
        let expected = comment(text.lines().next().unwrap_or_default(), &rendering(path));
        let found: Vec<_> = text
            .lines()
            .take_while(|line| line.starts_with('#'))
            .collect();
        if found != expected || expected.is_empty() {
            wrong.push(format!("{}:\n{}", path.display(), expected.join("\n")));
        }
    }
    assert!(
        wrong.is_empty(),
        "these say something else now:\n\n{}",
        wrong.join("\n\n")
    );
}
