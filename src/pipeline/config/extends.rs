//! Inheritance between pipeline files: `extends: base.yaml`.
//!
//! The trees of both files are merged: maps are merged recursively, any other value in the
//! extending (upper) file replaces that of the base (lower) file, and `null` removes an entry. A
//! stage with another stage type, or a model with another network, replaces the base entry
//! entirely. The base file may itself extend another file.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::diagnostic::{At, Diagnostic};
use super::node::Node;
use super::source::{KeyPath, SourceText};
use super::source_texts::{Layer, SourceTexts};
use super::syntax;
use ovchat_io::files;

/// The setting that names the base file.
const EXTENDS: &str = "extends";

/// The fields whose entries are one word (a stage type or a network) and its settings.
const ONE_WORD: [&str; 3] = ["models", "stages", "evaluate"];

/// Reads a pipeline file and all files that it extends. Returns the files, the pipeline file first,
/// the merged tree (`None` if it is unusable), and the diagnostics about their YAML, already
/// placed.
pub fn read(file: Arc<SourceText>, path: &Path) -> (Vec<Layer>, Option<Node>, Vec<Diagnostic>) {
    let mut diagnostics = Vec::new();
    let mut layers: Vec<Layer> = Vec::new();
    let mut tree: Option<Node> = None;
    let mut seen = vec![plain(path)];
    let mut next = Some((file, path.to_owned()));
    while let Some((file, path)) = next.take() {
        let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
        let sources = SourceTexts::of(vec![Layer {
            source: Arc::clone(&file),
            folder: folder.clone(),
        }]);
        let (lower, flaws) = match Node::parse(&file.text) {
            Ok(parsed) => parsed,
            Err(error) => {
                diagnostics.push(syntax::not_yaml(&error, &file));
                layers.extend(sources.layers);
                return (layers, None, diagnostics);
            }
        };
        diagnostics.extend(sources.place(syntax::flawed(&flaws)));
        if let Some(diagnostic) = syntax::no_map(&lower) {
            diagnostics.extend(sources.place(vec![diagnostic]));
            layers.extend(sources.layers);
            return (layers, None, diagnostics);
        }
        let base = lower.get(EXTENDS).cloned();
        tree = Some(match tree.take() {
            None => lower,
            Some(upper) => merged(lower, upper, 0, false),
        });
        if let Some(base) = base {
            match open(&base, &folder, &file, &seen) {
                Ok((source, path)) => {
                    seen.push(path.clone());
                    next = Some((source, path));
                }
                Err(diagnostic) => {
                    // Without the base file, nearly everything would be reported as missing.
                    diagnostics.extend(sources.place(vec![*diagnostic]));
                    layers.extend(sources.layers);
                    return (layers, None, diagnostics);
                }
            }
        }
        layers.extend(sources.layers);
    }
    (layers, tree, diagnostics)
}

/// Reads the base file.
fn open(
    base: &Node,
    folder: &Path,
    upper: &SourceText,
    seen: &[PathBuf],
) -> Result<(Arc<SourceText>, PathBuf), Box<Diagnostic>> {
    let at = At::value(KeyPath::root().key(EXTENDS));
    let Node::Text(name) = base else {
        let message = format!(
            "`{EXTENDS}` must be the path of a pipeline file, not {}",
            base.noun()
        );
        return Err(Diagnostic::new("config::wrong_type", at, message).into());
    };
    let path = plain(&folder.join(name));
    if seen.contains(&path) {
        let message = format!("circular `extends`: `{name}` extends this file");
        return Err(Diagnostic::new("config::extends", at, message).into());
    }
    let text = files::read_to_string(&path).map_err(|error| {
        let message = format!("cannot read `{name}`: {error}");
        Diagnostic::new("config::missing_file", at, message)
            .help("give the path relative to the folder of the pipeline file")
    });
    let text = text.map_err(Box::new)?;
    // Named as the user would: relative to the file that names it.
    let shown = Path::new(&upper.name)
        .parent()
        .map(|folder| folder.join(name));
    let shown = shown.unwrap_or_else(|| path.clone());
    let source = SourceText::new(plain(&shown).display().to_string(), &text);
    Ok((Arc::new(source), path))
}

/// Normalizes a path: removes `.`, and `..` together with the name before it: `a/../b` is `b`.
/// Links are not followed.
pub(super) fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir
                if matches!(plain.components().next_back(), Some(Component::Normal(_))) =>
            {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

/// Merges the upper tree into the lower one. With `is_one_word`, the entries of these maps are
/// stage types or networks.
fn merged(lower: Node, upper: Node, depth: usize, is_one_word: bool) -> Node {
    let (Node::Map(mut entries), Node::Map(changes)) = (lower, upper.clone()) else {
        return upper;
    };
    // An entry with another stage type or network replaces the base entry.
    if is_one_word && depth == 2 {
        let word = |entries: &[(String, Node)]| entries.first().map(|(word, _)| word.clone());
        if word(&entries) != word(&changes) {
            return upper;
        }
    }
    for (key, change) in changes {
        let place = entries.iter().position(|(known, _)| *known == key);
        match (place, change) {
            (Some(place), Node::Null) => {
                entries.remove(place);
            }
            (Some(place), change) => {
                let is_one_word = match depth {
                    0 => ONE_WORD.contains(&key.as_str()),
                    _ => is_one_word,
                };
                let before = std::mem::replace(&mut entries[place].1, Node::Null);
                entries[place].1 = merged(before, change, depth + 1, is_one_word);
            }
            (None, change) => entries.push((key, change)),
        }
    }
    Node::Map(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(lower: &str, upper: &str) -> Node {
        let node = |text| Node::parse(text).unwrap().0;
        merged(node(lower), node(upper), 0, false)
    }

    #[test]
    fn plain_paths_have_no_dots() {
        let shown = |path: &str| plain(Path::new(path)).display().to_string();
        assert_eq!(shown("/a/pipelines/../runs/./x.json"), "/a/runs/x.json");
        assert_eq!(shown("../../x"), "../../x");
        assert_eq!(shown("/a/b/../../.."), "/..");
    }

    #[test]
    fn maps_are_merged_and_anything_else_replaced() {
        let lower = "{a: {b: 1, c: [1, 2]}, d: 4, e: 5}";
        let upper = "{a: {c: [3], f: 6}, d: null, g: 7}";
        let expected = "{a: {b: 1, c: [3], f: 6}, e: 5, g: 7}";
        assert_eq!(over(lower, upper), Node::parse(expected).unwrap().0);
    }

    #[test]
    fn another_stage_type_is_another_stage() {
        let lower =
            "stages: {rewards: {score: {candidates: c, judge: j}}, kept: {sql: {query: q}}}";
        let upper = "stages: {rewards: {sql: {query: select}}, kept: {sql: {tables: [c]}}}";
        let expected =
            "stages: {rewards: {sql: {query: select}}, kept: {sql: {query: q, tables: [c]}}}";
        assert_eq!(over(lower, upper), Node::parse(expected).unwrap().0);
    }
}
