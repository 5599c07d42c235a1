//! The texts of a pipeline, its files and `--set`, and the places of diagnostics in them.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::diagnostic::{At, Diagnostic, TOLD_MAX};
use super::overrides::Override;
use super::reference::UNKNOWN_VARIABLE;
use super::source::{KeyPath, Side, SourceText, Span, around};

/// One file of a pipeline.
#[derive(Debug, Clone)]
pub struct Layer {
    pub source: Arc<SourceText>,
    /// Its absolute path.
    pub path: PathBuf,
    /// The folder that relative paths in the file are resolved against.
    pub folder: PathBuf,
}

/// The texts of a pipeline: its files, and the changes made by `--set`.
#[derive(Debug, Clone)]
pub struct SourceTexts {
    /// The pipeline file, then the file that it extends, and so on.
    pub layers: Vec<Layer>,
    pub overrides: Vec<Override>,
    /// The settings that begin with a variable of the pipeline, with the name of the variable.
    pub begins_with: Vec<(KeyPath, String)>,
}

/// The codes of diagnostics about undefined names.
const NAMES: [&str; 4] = [
    "config::unknown_table",
    "config::unknown_model",
    UNKNOWN_VARIABLE,
    "config::environment",
];

impl SourceTexts {
    /// Creates the texts of files without overrides.
    pub fn of(layers: Vec<Layer>) -> Self {
        Self {
            layers,
            overrides: Vec::new(),
            begins_with: Vec::new(),
        }
    }

    /// Returns the variable that a setting begins with.
    pub fn variable(&self, setting: &KeyPath) -> Option<&str> {
        let mut settings = self.begins_with.iter();
        settings
            .find(|(begins, _)| begins == setting)
            .map(|(_, variable)| variable.as_str())
    }

    /// Returns the folder that a relative path in a setting is resolved against: that of the file
    /// that contains the setting, or the variable that it begins with; or that of the pipeline file
    /// itself for `--set`.
    pub fn folder(&self, setting: &KeyPath) -> PathBuf {
        if let Some(variable) = self.variable(setting) {
            return self.folder_of(&KeyPath::root().key("vars").key(variable));
        }
        self.folder_of(setting)
    }

    fn folder_of(&self, setting: &KeyPath) -> PathBuf {
        let is_set = self
            .overrides
            .iter()
            .any(|change| setting.is_in(&change.path));
        let layer = match self.layers.len() {
            _ if is_set => 0,
            1 => 0,
            _ => self.find_in_layers(setting, Side::Value).0,
        };
        self.layers[layer].folder.clone()
    }

    /// Returns the layer and span of a setting, searching the extending files first; if none
    /// contains it, those of the nearest enclosing setting.
    fn find_in_layers(&self, path: &KeyPath, side: Side) -> (usize, Range<usize>) {
        let mut path = path.clone();
        let mut side = side;
        loop {
            for (number, layer) in self.layers.iter().enumerate() {
                if path != KeyPath::root()
                    && let Some(span) = layer.source.find_exactly(&path, side)
                {
                    return (number, span);
                }
            }
            if path == KeyPath::root() {
                return (0, self.layers[0].source.find(&path, side));
            }
            (path, side) = around(path, side);
        }
    }

    /// Merges the diagnostics about the same undefined name, however many settings use it.
    pub fn once(diagnostics: Vec<Diagnostic>) -> Vec<Diagnostic> {
        let mut told: Vec<Diagnostic> = Vec::new();
        for diagnostic in diagnostics {
            let is_same = |other: &&mut Diagnostic| {
                other.code == diagnostic.code && other.message == diagnostic.message
            };
            let same = match NAMES.contains(&diagnostic.code) {
                true => told.iter_mut().find(is_same),
                false => None,
            };
            match same {
                Some(first) => first.also.push((diagnostic.at, String::new())),
                None => told.push(diagnostic),
            }
        }
        told
    }

    /// Finds the span that each diagnostic underlines, and sorts the diagnostics in the order of
    /// the text: those about the files first, then those about `--set`.
    pub fn place(&self, mut diagnostics: Vec<Diagnostic>) -> Vec<Diagnostic> {
        let more = cut(&mut diagnostics);
        for diagnostic in &mut diagnostics {
            if !diagnostic.drawing.is_empty() {
                continue;
            }
            let mut place = self.find(&diagnostic.at);
            if let Some(piece) = &diagnostic.piece {
                match piece.find(&place.source.text[place.span.start..]) {
                    Some(span) => {
                        let start = place.span.start;
                        place.span = start + span.start..start + span.end;
                    }
                    None => {
                        let words = format!(" ({})", piece.words());
                        diagnostic.message.push_str(&words);
                    }
                }
            }
            let main = (place, diagnostic.label.clone());
            diagnostic.drawing.push(main);
            for (at, label) in &diagnostic.also {
                diagnostic.drawing.push((self.find(at), label.clone()));
            }
        }
        diagnostics.sort_by_key(|diagnostic| {
            let place = diagnostic.place();
            let is_of = |layer: &Layer| place.is_some_and(|place| place.source == layer.source);
            let layer = self.layers.iter().position(is_of);
            let last = self.layers.len();
            (
                layer.unwrap_or(last),
                place.map_or(0, |place| place.span.start),
            )
        });
        // An alias (`*name`) repeats the mistakes of its anchor.
        diagnostics.dedup_by(|b, a| a.message == b.message && a.drawing == b.drawing);
        diagnostics.extend(more);
        diagnostics
    }

    /// Returns the span that determines a setting, in a file or in `--set`.
    pub fn find(&self, at: &At) -> Span {
        let mut last_first = self.overrides.iter().rev();
        if let Some(change) = last_first.find(|change| at.path.is_in(&change.path)) {
            return change.place(at);
        }
        let (layer, span) = self.find_in_layers(&at.path, at.side);
        Span {
            source: Arc::clone(&self.layers[layer].source),
            span,
        }
    }
}

/// Keeps the most severe diagnostics if there are too many, and returns one that counts the rest.
fn cut(diagnostics: &mut Vec<Diagnostic>) -> Option<Diagnostic> {
    let left = diagnostics
        .len()
        .checked_sub(TOLD_MAX)
        .filter(|left| *left > 0)?;
    diagnostics.sort_by_key(|diagnostic| diagnostic.severity);
    diagnostics.truncate(TOLD_MAX);
    let at = At::key(KeyPath::root());
    let message = format!("too many diagnostics: at least {left} more are not shown");
    let mut more = Diagnostic::new("config::more", at, message).help("fix these and check again");
    more.severity = diagnostics.last().expect("some are left").severity;
    Some(more)
}
