//! Inheritance between pipeline files: `extends: base.yaml`.
//!
//! The trees of both files are merged: maps are merged recursively, any other value in the
//! extending (upper) file replaces that of the base (lower) file, and `null` removes an entry. A
//! stage with another stage type, or a model with another network, replaces the base entry
//! entirely. The base file may itself extend another file, and `extends` may be a list of files.

use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::diagnostic::{At, Diagnostic};
use super::node::Node;
use super::source::{KeyPath, SourceText};
use super::source_texts::{Layer, SourceTexts};
use super::syntax;

/// The setting that names the base file.
const EXTENDS: &str = "extends";

/// The fields whose entries are one word (a stage type or a network) and its settings.
const ONE_WORD: [&str; 3] = ["models", "stages", "evaluate"];

/// A file that was read.
struct Read {
    path: PathBuf,
    layer: Layer,
    tree: Node,
}

/// Reads the text of the file at a path.
pub type Texts<'a> = &'a dyn Fn(&Path) -> io::Result<String>;

/// The files that were read, and the diagnostics about their YAML, already placed.
struct Reading<'a> {
    texts: Texts<'a>,
    files: Vec<Read>,
    diagnostics: Vec<Diagnostic>,
    /// The layer of a file that cannot be used, if there is one.
    unusable: Option<Layer>,
}

/// Reads a pipeline file and all files that it extends. Returns the files, the pipeline file first,
/// the merged tree (`None` if it is unusable), and the diagnostics about their YAML, already
/// placed. `texts` reads the file at a path.
///
/// A later one of several base files overrides an earlier one. A file that several files extend
/// comes after all of them.
pub fn read(
    file: Arc<SourceText>,
    path: &Path,
    texts: Texts<'_>,
) -> (Vec<Layer>, Option<Node>, Vec<Diagnostic>) {
    let mut reading = Reading {
        files: Vec::new(),
        diagnostics: Vec::new(),
        unusable: None,
        texts,
    };
    let chain = vec![plain(path)];
    let is_read = reading.add(file, path.to_owned(), &chain).is_some();
    let Reading {
        files,
        diagnostics,
        unusable,
        ..
    } = reading;
    let mut layers: Vec<Layer> = Vec::new();
    let mut tree: Option<Node> = None;
    let mut seen = Vec::new();
    // From the last one, so that each file overrides what was merged before.
    for Read {
        path,
        layer,
        tree: upper,
    } in files.into_iter().rev()
    {
        if seen.contains(&path) {
            continue;
        }
        seen.push(path);
        layers.insert(0, layer);
        tree = Some(match tree.take() {
            None => upper,
            Some(lower) => merged(lower, upper, 0, false),
        });
    }
    layers.extend(unusable);
    (layers, tree.filter(|_| is_read), diagnostics)
}

impl Reading<'_> {
    /// Adds a file, and after it the files that it extends, the last one first; `chain` has the paths
    /// from the pipeline file to this one. `None` if one of them cannot be used.
    fn add(&mut self, file: Arc<SourceText>, path: PathBuf, chain: &[PathBuf]) -> Option<()> {
        let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
        let layer = Layer {
            source: Arc::clone(&file),
            path: plain(&path),
            folder: folder.clone(),
        };
        let sources = SourceTexts::of(vec![layer.clone()]);
        let mut fails = |diagnostic| {
            self.diagnostics.extend(sources.place(vec![diagnostic]));
            self.unusable = Some(layer.clone());
        };
        let (tree, flaws) = match Node::parse(&file.text) {
            Ok(parsed) => parsed,
            Err(error) => {
                let diagnostic = syntax::not_yaml(&error, &file);
                self.diagnostics.push(diagnostic);
                self.unusable = Some(layer);
                return None;
            }
        };
        if let Some(diagnostic) = syntax::no_map(&tree) {
            fails(diagnostic);
            return None;
        }
        let bases = match tree.get(EXTENDS) {
            None => Vec::new(),
            Some(Node::List(bases)) => bases
                .iter()
                .enumerate()
                .map(|(at, base)| (Some(at), base.clone()))
                .collect(),
            Some(base) => vec![(None, base.clone())],
        };
        self.diagnostics
            .extend(sources.place(syntax::flawed(&flaws)));
        self.files.push(Read {
            path: plain(&path),
            layer: layer.clone(),
            tree,
        });
        for (number, base) in bases.iter().rev() {
            match open(*number, base, &folder, &file, chain, self.texts) {
                Ok((source, path)) => {
                    let chain = [chain, &[path.clone()]].concat();
                    self.add(source, path, &chain)?;
                }
                Err(diagnostic) => {
                    // Without the base file, nearly everything would be reported as missing.
                    self.diagnostics.extend(sources.place(vec![*diagnostic]));
                    return None;
                }
            }
        }
        Some(())
    }
}

/// Reads a base file, which `extends` names at this place of its list.
fn open(
    number: Option<usize>,
    base: &Node,
    folder: &Path,
    upper: &SourceText,
    chain: &[PathBuf],
    texts: Texts<'_>,
) -> Result<(Arc<SourceText>, PathBuf), Box<Diagnostic>> {
    let setting = KeyPath::root().key(EXTENDS);
    let at = At::value(match number {
        Some(number) => setting.index(number),
        None => setting,
    });
    let Node::Text(name) = base else {
        let message = format!(
            "`{EXTENDS}` must be the path of a pipeline file or a list of them, not {}",
            base.noun()
        );
        return Err(Diagnostic::new("config::wrong_type", at, message).into());
    };
    let path = plain(&folder.join(name));
    if chain.contains(&path) {
        let message = format!("circular `extends`: `{name}` extends this file");
        return Err(Diagnostic::new("config::extends", at, message).into());
    }
    let text = texts(&path).map_err(|error| {
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

    #[test]
    fn later_base_files_override_earlier_ones_and_common_ones_come_last() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("common.yaml", "{a: 0, b: 0, c: 0, d: 0, gone: 0}");
        write("one.yaml", "{extends: common.yaml, a: 1, b: 1, gone: 1}");
        write("two.yaml", "{extends: common.yaml, b: 2}");
        let text = "{extends: [one.yaml, two.yaml], c: 3, gone: null}";
        let source = Arc::new(SourceText::new("p.yaml".to_owned(), text));
        let (layers, tree, diagnostics) = read(source, &folder.path().join("p.yaml"), &|path| {
            ovchat_io::files::read_to_string(path)
        });
        assert!(diagnostics.is_empty());
        let names: Vec<&str> = layers
            .iter()
            .map(|layer| layer.source.name.as_str())
            .collect();
        assert_eq!(names, ["p.yaml", "two.yaml", "one.yaml", "common.yaml"]);
        let tree = tree.unwrap();
        let number = |key: &str| tree.get(key).map(|node| format!("{node:?}"));
        let node = |text: &str| {
            Some(format!(
                "{:?}",
                Node::parse(&format!("{{x: {text}}}"))
                    .unwrap()
                    .0
                    .get("x")
                    .unwrap()
            ))
        };
        for (key, value) in [("a", "1"), ("b", "2"), ("c", "3"), ("d", "0")] {
            assert_eq!(number(key), node(value), "{key}");
        }
        assert_eq!(number("gone"), None);
        write("two.yaml", "{extends: p.yaml}");
        let source = Arc::new(SourceText::new("p.yaml".to_owned(), text));
        let (_, tree, diagnostics) = read(source, &folder.path().join("p.yaml"), &|path| {
            ovchat_io::files::read_to_string(path)
        });
        assert!(tree.is_none());
        assert!(
            diagnostics[0].message.contains("circular"),
            "{}",
            diagnostics[0].message
        );
    }

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
