//! Escaping of untrusted text for terminals. Text from files, models and endpoints may contain
//! escape sequences, which terminals execute, and bidirectional controls.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Escapes invisible and control characters as JSON does: `\u001b`. A JSON text keeps its meaning.
/// Newlines and tabs are kept.
pub fn visible(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let ends_line = letter == '\r' && letters.peek() == Some(&'\n');
        if ends_line || !is_hidden(letter) {
            shown.push(letter);
        } else if letter == '\r' {
            shown.push_str("\\r");
        } else {
            for unit in letter.encode_utf16(&mut [0; 2]) {
                write!(shown, "\\u{unit:04x}").expect("writing to a string cannot fail");
            }
        }
    }
    Cow::Owned(shown)
}

/// Replaces invisible and control characters with visible ones of the same UTF-8 length, so that
/// byte offsets into the text stay valid.
pub fn visible_in_place(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let ends_line = letter == '\r' && letters.peek() == Some(&'\n');
        if ends_line || !is_hidden(letter) {
            shown.push(letter);
            continue;
        }
        shown.push_str(match letter.len_utf8() {
            1 => "?",
            2 => "¿",
            3 => "\u{fffd}",
            _ => "\u{fffd}?",
        });
    }
    Cow::Owned(shown)
}

/// Decodes bytes as UTF-8 and escapes them for a terminal. Invalid bytes become `\xff`.
pub fn visible_bytes(bytes: &[u8]) -> String {
    let mut shown = String::new();
    for chunk in bytes.utf8_chunks() {
        shown.push_str(&visible(chunk.valid()));
        for byte in chunk.invalid() {
            write!(shown, "\\x{byte:02x}").expect("writing to a string cannot fail");
        }
    }
    shown
}

/// True for terminal and bidirectional controls, Unicode line separators, and zero-width characters
/// that can hide text.
fn is_hidden(letter: char) -> bool {
    match letter {
        '\n' | '\t' => false,
        '\u{61c}' | '\u{200e}' | '\u{200f}' => true,
        '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' => true,
        '\u{ad}' | '\u{200b}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}' => true,
        letter => letter.is_control(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_terminals_obey_is_written_out_and_the_rest_stays() {
        for text in ["", "words", "ä 漢 🙂\n\tnext\r\nline", "עברית"] {
            assert_eq!(visible(text), text);
            assert_eq!(visible_in_place(text), text);
        }
        for (text, shown) in [
            ("\u{1b}[2J", "\\u001b[2J"),
            ("\u{9b}31m", "\\u009b31m"),
            ("a\u{feff}b\u{e0041}", "a\\ufeffb\\udb40\\udc41"),
            ("over\rwritten", "over\\rwritten"),
            ("a\u{8}\u{7f}\0", "a\\u0008\\u007f\\u0000"),
            ("a\u{202e}b\u{2069}", "a\\u202eb\\u2069"),
        ] {
            assert_eq!(visible(text), shown);
            let in_place = visible_in_place(text);
            assert_eq!(in_place.len(), text.len());
        }
        assert_eq!(visible_in_place("\u{1b}\u{9b}\u{202e}"), "?¿\u{fffd}");
        let json = serde_json::json!({ "a": "\u{9b}\u{202e}\u{1b}" }).to_string();
        let shown = visible(&json);
        assert_eq!(shown, r#"{"a":"\u009b\u202e\u001b"}"#);
        assert_eq!(visible_bytes(b"a\x1b\xff\xc3\xa4"), "a\\u001b\\xffä");
    }
}
