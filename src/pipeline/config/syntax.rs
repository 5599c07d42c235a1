//! Complaints about a text that is not YAML, or holds no settings.

use std::sync::Arc;

use super::diagnostic::{At, Diagnostic};
use super::node::{Flaw, Node};
use super::source::{KeyPath, SourceText, Span};

/// A text that is not YAML.
pub fn not_yaml(error: &serde_yaml::Error, file: &Arc<SourceText>) -> Diagnostic {
    let raw = error.to_string();
    let message = match (raw.find(" at line "), raw.find(", ")) {
        // "A at line 3 column 1, while parsing B at line 2 column 5": the first is underlined.
        (Some(cut), Some(more)) if cut < more => format!("{}{}", &raw[..cut], &raw[more..]),
        (Some(cut), _) => raw[..cut].to_owned(),
        (None, _) => raw,
    };
    let is_second_document = message.contains("more than one document");
    let start = match error.location() {
        Some(location) => location.index(),
        None if is_second_document => file.text.rfind("\n---").map_or(0, |newline| newline + 1),
        None => 0,
    };
    let rest = &file.text[start..];
    let length = rest.find(char::is_whitespace).unwrap_or(rest.len());
    let length = length.max(rest.chars().next().map_or(0, char::len_utf8));
    let line_start = file.text[..start]
        .rfind('\n')
        .map_or(0, |newline| newline + 1);
    let line = file.text[line_start..].lines().next().unwrap_or_default();
    let indentation = line.len() - line.trim_start().len();
    let help = if line[..indentation].contains('\t') {
        "YAML is indented with spaces; this line starts with a tab"
    } else if line.contains(": ${") || line.contains("- ${") {
        "a reference must be quoted: `\"${name}\"`"
    } else if is_second_document {
        "a pipeline file is one document: take out the `---`"
    } else if message.contains("mapping values are not allowed") {
        "check the indentation, and quote texts that hold `: `"
    } else {
        "check brackets, quotes and indentation"
    };
    let place = Span {
        source: Arc::clone(file),
        span: start..start + length,
    };
    Diagnostic::new("config::yaml", At::key(KeyPath::root()), message)
        .help(help)
        .placed(place)
}

/// A file that holds something other than settings.
pub fn no_map(tree: &Node) -> Option<Diagnostic> {
    let message = match tree {
        Node::Map(_) => return None,
        Node::Null => "the file holds nothing".to_owned(),
        other => format!("the file holds {}, not a pipeline", other.noun()),
    };
    let at = At::key(KeyPath::root());
    let help = "a pipeline starts with `pipeline: name`; `pipeline init` writes an example";
    Some(Diagnostic::new("config::empty", at, message).help(help))
}

/// Complaints about what YAML allows and a pipeline file does not.
pub fn flawed(flaws: &[Flaw]) -> Vec<Diagnostic> {
    let diagnostic = |flaw: &Flaw| match flaw {
        Flaw::Duplicate(path) => {
            let first = path.parent().unwrap_or_default().key(path.name());
            Diagnostic::new(
                "config::duplicate",
                At::key(path.clone()),
                format!("`{}` is here twice", path.name()),
            )
            .label("the second time")
            .also(At::key(first), "the first time")
            .help("rename one of them, or take it out")
        }
        Flaw::Tag(path) => Diagnostic::new(
            "config::tag",
            At::value(path.clone()),
            "YAML tags have no meaning here",
        )
        .help("write a stage as `name: { verb: { … } }`"),
        Flaw::Key(path) => Diagnostic::new(
            "config::key",
            At::value(path.clone()),
            "a list or a map can't be a key",
        )
        .help("a reference must be quoted: `\"${name}\"`"),
    };
    flaws.iter().map(diagnostic).collect()
}
