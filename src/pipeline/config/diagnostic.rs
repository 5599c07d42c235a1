//! Diagnostics of a pipeline: a message, a place, a help line and a suggestion ("did you mean").
//!
//! A diagnostic is created with the *path* of the setting that it is about. [`SourceTexts::place`]
//! finds the text to underline once all diagnostics are collected. [`super::render`] draws them.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Value, json};

use super::extends::Layer;
use super::overrides::Override;
use super::reference::{Secrets, UNKNOWN_VARIABLE};
use super::render::RenderStyle;
use super::source::{KeyPath, Side, Span, around};
use super::sql::Piece;

/// The place of a diagnostic: the key or the value of a setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At {
    pub path: KeyPath,
    pub side: Side,
}

impl At {
    /// The key of a setting.
    pub fn key(path: KeyPath) -> Self {
        let side = Side::Key;
        Self { path, side }
    }

    /// The value of a setting.
    pub fn value(path: KeyPath) -> Self {
        let side = Side::Value;
        Self { path, side }
    }
}

/// The codes of diagnostics about undefined names.
const NAMES: [&str; 4] = [
    "config::unknown_table",
    "config::unknown_model",
    UNKNOWN_VARIABLE,
    "config::environment",
];

/// The severity of a diagnostic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The pipeline cannot run.
    Error,
    /// The pipeline can run, but may not be what the author intended.
    Warning,
    /// The pipeline is valid; the note is for information.
    Note,
}

/// The maximum number of diagnostics shown at once.
pub const TOLD_MAX: usize = 50;

/// One problem of a pipeline.
#[derive(Debug, Clone)]
pub struct Diagnostic {
    /// The stable name of this kind of diagnostic: `config::unknown_field`.
    pub code: &'static str,
    pub severity: Severity,
    /// The title: the problem, in lower case and without a full stop.
    pub message: String,
    /// The setting that it is about.
    pub at: At,
    /// The label below the underlined text; empty for the underline alone.
    pub label: String,
    /// Related places, each with its label.
    pub also: Vec<(At, String)>,
    /// The help line: how to fix the problem.
    pub help: Option<String>,
    /// The piece of the text at `at` to underline; `None` for all of it.
    piece: Option<Piece>,
    /// The spans to underline with their labels; the first is that of `at`.
    pub(super) drawing: Vec<(Span, String)>,
}

impl Diagnostic {
    /// Creates an error about `at`.
    pub fn new(code: &'static str, at: At, message: impl Into<String>) -> Self {
        Self {
            code,
            severity: Severity::Error,
            message: message.into(),
            at,
            label: String::new(),
            also: Vec::new(),
            help: None,
            piece: None,
            drawing: Vec::new(),
        }
    }

    /// Creates a warning about `at`.
    pub fn warning(code: &'static str, at: At, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            ..Self::new(code, at, message)
        }
    }

    /// Creates a note about `at`.
    pub fn note(code: &'static str, at: At, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Note,
            ..Self::new(code, at, message)
        }
    }

    pub fn is_warning(&self) -> bool {
        self.severity == Severity::Warning
    }

    /// Turns the diagnostic into an error.
    #[must_use]
    pub fn as_error(self) -> Self {
        Self {
            severity: Severity::Error,
            ..self
        }
    }

    #[must_use]
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        if let Some((_, drawn)) = self.drawing.first_mut() {
            drawn.clone_from(&self.label);
        }
        self
    }

    #[must_use]
    pub fn also(mut self, at: At, label: impl Into<String>) -> Self {
        self.also.push((at, label.into()));
        self
    }

    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Adds a help line if there is one.
    #[must_use]
    pub fn maybe_help(self, help: Option<String>) -> Self {
        match help {
            Some(help) => self.help(help),
            None => self,
        }
    }

    /// Labels the underlined text "did you mean …?" if there is a suggestion.
    #[must_use]
    pub fn suggest(self, suggest: Option<&str>) -> Self {
        match suggest {
            Some(suggest) => self.label(format!("did you mean `{suggest}`?")),
            None => self,
        }
    }

    /// Underlines only a piece of a query.
    #[must_use]
    pub fn piece(mut self, piece: Piece) -> Self {
        self.piece = Some(piece);
        self
    }

    /// Underlines a span that has no path.
    #[must_use]
    pub fn placed(mut self, place: Span) -> Self {
        self.drawing = vec![(place, self.label.clone())];
        self
    }

    /// Replaces values from the environment by `${env:NAME}` if the stage or model in question uses
    /// any.
    pub fn hide(&mut self, secrets: &Secrets) {
        let steps = self.at.path.steps().iter().take(2);
        let about = steps.fold(KeyPath::root(), |path, step| path.then(step.clone()));
        let is_about_secret = secrets.uses_in(&about).next().is_some();
        if is_about_secret {
            self.message = secrets.hide(&self.message);
            self.label = secrets.hide(&self.label);
            self.help = self.help.take().map(|help| secrets.hide(&help));
        }
    }

    /// The underlined span; `None` before [`SourceTexts::place`].
    pub fn place(&self) -> Option<&Span> {
        self.drawing.first().map(|(place, _)| place)
    }

    /// Returns the diagnostic as JSON: code, severity, message, path, label, help, and, once
    /// placed, file, line and column (both from 1).
    pub fn to_json(&self) -> Value {
        let mut object = json!({
            "code": self.code,
            "severity": match self.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
                Severity::Note => "note",
            },
            "message": self.message,
            "path": self.at.path.to_string(),
            "label": self.label,
            "help": self.help,
        });
        if let Some(place) = self.place() {
            let before = &place.source.text[..place.span.start];
            let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
            object["file"] = json!(place.source.name);
            object["line"] = json!(1 + before.matches('\n').count());
            object["column"] = json!(1 + before[line_start..].chars().count());
        }
        object
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Diagnostic {}

/// All diagnostics of a pipeline, in the order of the text.
#[derive(Debug, Clone)]
pub struct Diagnostics(pub Vec<Diagnostic>);

impl Diagnostics {
    /// Draws all diagnostics, separated by empty lines.
    pub fn render(&self, look: RenderStyle) -> String {
        let drawn: Vec<_> = self
            .0
            .iter()
            .map(|diagnostic| diagnostic.render(look))
            .collect();
        drawn.join("\n")
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages: Vec<_> = self
            .0
            .iter()
            .map(|diagnostic| diagnostic.message.as_str())
            .collect();
        f.write_str(&messages.join("; "))
    }
}

impl std::error::Error for Diagnostics {}

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

/// The texts of a pipeline: its files, and the changes made by `--set`.
#[derive(Debug, Clone)]
pub struct SourceTexts {
    /// The pipeline file, then the file that it extends, and so on.
    pub layers: Vec<Layer>,
    pub overrides: Vec<Override>,
}

impl SourceTexts {
    /// Creates the texts of files without overrides.
    pub fn of(layers: Vec<Layer>) -> Self {
        Self {
            layers,
            overrides: Vec::new(),
        }
    }

    /// Returns the folder that a relative path in a setting is resolved against: that of the file
    /// that contains the setting, or of the pipeline file itself for `--set`.
    pub fn folder(&self, setting: &KeyPath) -> PathBuf {
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
