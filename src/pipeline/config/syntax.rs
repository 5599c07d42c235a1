//! Diagnostics for texts that are not valid YAML or contain no settings.

use std::sync::Arc;

use super::diagnostic::{At, Diagnostic};
use super::node::{Flaw, Node};
use super::source::{KeyPath, SourceText, Span};

/// The diagnostic for a text that is not valid YAML.
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
        "indent with spaces: this line starts with a tab"
    } else if line.contains(": ${") || line.contains("- ${") {
        "quote the reference: `\"${name}\"`"
    } else if is_second_document {
        "remove the `---`: a pipeline file is a single YAML document"
    } else if message.contains("mapping values are not allowed") {
        "check the indentation, and quote strings that contain `: `"
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

/// The diagnostic for a file that is not a map of settings.
pub fn no_map(tree: &Node) -> Option<Diagnostic> {
    let message = match tree {
        Node::Map(_) => return None,
        Node::Null => "the pipeline file is empty".to_owned(),
        other => format!("expected a map of settings, got {}", other.noun()),
    };
    let at = At::key(KeyPath::root());
    let help = "start the file with `pipeline: name`, or run `pipeline init` for an example";
    Some(Diagnostic::new("config::empty", at, message).help(help))
}

/// The diagnostics for valid YAML that is not allowed in a pipeline file.
pub fn flawed(flaws: &[Flaw]) -> Vec<Diagnostic> {
    let diagnostic = |flaw: &Flaw| match flaw {
        Flaw::Duplicate(path) => {
            let first = path.parent().unwrap_or_default().key(path.name());
            Diagnostic::new(
                "config::duplicate",
                At::key(path.clone()),
                format!("duplicate key `{}`", path.name()),
            )
            .label("redefined here")
            .also(At::key(first), "first defined here")
            .help("rename or remove one of them")
        }
        Flaw::Tag(path) => Diagnostic::new(
            "config::tag",
            At::value(path.clone()),
            "YAML tags are not supported",
        )
        .help("write a stage as `name: { <stage type>: { … } }`"),
        Flaw::Key(path) => Diagnostic::new(
            "config::key",
            At::value(path.clone()),
            "a list or a map cannot be a key",
        )
        .help("quote the reference: `\"${name}\"`"),
    };
    flaws.iter().map(diagnostic).collect()
}
