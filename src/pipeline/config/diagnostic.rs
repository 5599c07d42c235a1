//! Diagnostics of a pipeline: a message, a place, a help line and a suggestion ("did you mean").
//!
//! A diagnostic is created with the *path* of the setting that it is about. Once all diagnostics
//! are collected, [`super::source_texts`] finds the text to underline, and [`super::render`] draws
//! them.

use std::fmt;

use serde_json::{Value, json};

use super::piece::Piece;
use super::secrets::Secrets;
use super::source::{KeyPath, Side, Span};

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
    pub(super) piece: Option<Piece>,
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

    /// The underlined span; `None` before it is placed.
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
