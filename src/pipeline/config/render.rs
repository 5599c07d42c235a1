//! Rendering of diagnostics with miette.
//!
//! The output underlines the text in question, is bounded in length, and contains no characters
//! that control a terminal.

use std::fmt;
use std::sync::Arc;

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, SourceCode};
use textwrap::{WordSeparator, WordSplitter};

use super::diagnostic::{Diagnostic, Diagnostics, Severity};
use super::source::{SourceText, Span};
use ovchat_io::visible::{visible, visible_in_place};

/// The maximum number of characters drawn of a message, a label or a help line.
const DRAWN_LETTERS: usize = 4_000;

/// The maximum number of bytes underlined, and drawn before and after the underlined text on the
/// same line.
const DRAWN_BYTES: usize = 400;

impl Diagnostic {
    /// Draws the diagnostic with the text that it underlines, ending with a newline.
    pub fn render(&self, look: RenderStyle) -> String {
        let theme = match look {
            RenderStyle::Color => GraphicalTheme::unicode(),
            RenderStyle::Plain => GraphicalTheme::unicode_nocolor(),
            RenderStyle::Ascii => GraphicalTheme::none(),
        };
        let drawer = GraphicalReportHandler::new_themed(theme)
            .with_width(100)
            .with_context_lines(1)
            .with_urls(false)
            // Texts to copy, such as paths, URLs and patterns, stay whole.
            .with_word_separator(WordSeparator::AsciiSpace)
            .with_word_splitter(WordSplitter::NoHyphenation)
            .with_break_words(false)
            .without_syntax_highlighting();
        let mut text = String::new();
        match drawer.render_report(&mut text, &self.drawable()) {
            Ok(()) => text,
            Err(_) => format!("{self}\n"),
        }
    }

    /// Returns a copy of the diagnostic that is safe to show in a terminal.
    fn drawable(&self) -> Self {
        let mut drawn = self.clone();
        drawn.message = words(&self.message);
        drawn.label = words(&self.label);
        drawn.help = self.help.as_deref().map(words);
        let Some((main, _)) = self.drawing.first() else {
            return drawn;
        };
        let is_near = |place: &Span| {
            let (from, to) = (
                main.span.start.min(place.span.start),
                main.span.end.max(place.span.end),
            );
            place.source != main.source
                || to - from <= DRAWN_BYTES
                || main.source.text[from..to].contains('\n')
        };
        drawn
            .drawing
            .retain(|(place, _)| place == main || is_near(place));
        let source = Arc::new(SourceText {
            name: visible(&main.source.name).into_owned(),
            text: visible_in_place(&main.source.text).into_owned(),
        });
        for (place, label) in &mut drawn.drawing {
            *label = words(label);
            if place.source == main.source {
                place.source = Arc::clone(&source);
            }
            let end = place.span.end.min(place.span.start + DRAWN_BYTES);
            place.span.end = place.source.text.floor_char_boundary(end);
        }
        drawn
    }
}

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

/// Returns text that is safe for a terminal; a long one is truncated.
fn words(text: &str) -> String {
    let text = visible(text);
    match text.char_indices().nth(DRAWN_LETTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into_owned(),
    }
}

impl miette::Diagnostic for Diagnostic {
    fn code<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        Some(Box::new(self.code))
    }

    fn severity(&self) -> Option<miette::Severity> {
        Some(match self.severity {
            Severity::Error => miette::Severity::Error,
            Severity::Warning => miette::Severity::Warning,
            Severity::Note => miette::Severity::Advice,
        })
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        let help = self.help.as_ref()?;
        Some(Box::new(help))
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        let place = self.place()?;
        Some(&*place.source)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let source = &self.place()?.source;
        let here = self
            .drawing
            .iter()
            .filter(move |(place, _)| place.source == *source);
        Some(Box::new(here.enumerate().map(
            |(position, (place, label))| {
                let label = Some(label.clone()).filter(|label| !label.is_empty());
                if position == 0 {
                    LabeledSpan::new_primary_with_span(label, place.span.clone())
                } else {
                    LabeledSpan::new_with_span(label, place.span.clone())
                }
            },
        )))
    }
}

impl SourceCode for SourceText {
    /// Reads a span for miette, which passes context lines for the text to draw, and none to find
    /// the line and column. Draws the whole lines of the span, shortened if they are too long, and
    /// no lines around them.
    fn read_span<'a>(
        &'a self,
        span: &miette::SourceSpan,
        lines_before: usize,
        lines_after: usize,
    ) -> Result<Box<dyn miette::SpanContents<'a> + 'a>, miette::MietteError> {
        let mut drawn = *span;
        if lines_before + lines_after > 0 {
            let (start, end) = (span.offset(), span.offset() + span.len());
            let before = self.text[..start]
                .rfind('\n')
                .map_or(0, |newline| newline + 1);
            let after = self.text[end..]
                .find('\n')
                .map_or(self.text.len(), |at| end + at);
            let first = self
                .text
                .ceil_char_boundary(start.saturating_sub(DRAWN_BYTES));
            let last = self
                .text
                .floor_char_boundary(end.saturating_add(DRAWN_BYTES));
            drawn = (before.max(first)..after.min(last)).into();
        }
        let inner = self.text.read_span(&drawn, 0, 0)?;
        Ok(Box::new(miette::MietteSpanContents::new_named(
            self.name.clone(),
            inner.data(),
            *inner.span(),
            inner.line(),
            inner.column(),
            inner.line_count(),
        )))
    }
}

/// The style in which diagnostics are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenderStyle {
    /// Colors and line-drawing characters, for a terminal.
    Color,
    /// Line-drawing characters only.
    Plain,
    /// Only ASCII around the texts, for logs.
    Ascii,
}

impl RenderStyle {
    /// Detects the style: color on a terminal, plain if `NO_COLOR` is set, ASCII if the output is
    /// not a terminal or a `dumb` one.
    pub fn detect(is_terminal: bool) -> Self {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        match (is_terminal && !is_dumb, no_color) {
            (false, _) => Self::Ascii,
            (true, true) => Self::Plain,
            (true, false) => Self::Color,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::diagnostic::At;
    use crate::config::source::KeyPath;

    fn draw(text: &str, span: std::ops::Range<usize>, message: &str) -> String {
        let source = Arc::new(SourceText::new("p.yaml".to_owned(), text));
        let diagnostic = Diagnostic::new("config::test", At::key(KeyPath::root()), message);
        let diagnostic = diagnostic.label("here").placed(Span { source, span });
        diagnostic.render(RenderStyle::Ascii)
    }

    #[test]
    fn long_lines_are_drawn_around_what_is_meant() {
        let far = format!(
            "{}bad: 1{}\nnext: 2\n",
            "ä".repeat(70_000),
            " x".repeat(70_000)
        );
        let drawn = draw(&far, 140_000..140_003, "it is bad");
        assert!(drawn.len() < 5_000 && drawn.contains("bad: 1"), "{drawn}");
        let key = "k".repeat(65_536);
        let drawn = draw(&format!("{key}: 1"), 0..key.len(), &key);
        assert!(drawn.len() < 10_000, "{}", drawn.len());
    }

    #[test]
    fn nothing_that_is_drawn_is_obeyed_by_a_terminal() {
        let drawn = draw("a: \u{1b}[2J\u{202e}b\n", 3..4, "`\u{1b}[2J` is bad");
        assert!(drawn.contains("`\\u001b[2J` is bad"), "{drawn}");
        assert!(drawn.contains("a: ?[2J\u{fffd}b"), "{drawn}");
    }
}
