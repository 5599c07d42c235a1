//! Masking of secret values in text before it leaves the program.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use memchr::memmem;

/// The minimum length, in characters, of a value that is treated as a secret. Shorter values would
/// match in any text.
pub const SECRET_MIN: usize = 6;

/// The shortest form, in bytes, that is also found where escapes or line breaks are in it.
const DECODED_MIN: usize = 8;

/// The times that a text is decoded: JSON within JSON within a percent-encoded text.
const DECODED_TIMES: usize = 3;

/// The most bytes that a text has for each byte of a form that it holds: `\\\\u0026` and a line break.
const BYTES_A_BYTE: usize = 16;

/// A mask that replaces secret values with the names of the environment variables that hold them.
/// It matches them verbatim, percent-encoded, in base64 or hex, JSON-escaped, and broken across
/// lines.
#[derive(Clone, Default)]
pub struct Mask {
    /// The longest first.
    forms: Arc<[Form]>,
}

/// A text that is hidden.
struct Form {
    text: String,
    /// The same as [`Decoded`] has it.
    bytes: Vec<u8>,
    /// The text in its place.
    place: String,
}

impl Mask {
    /// Creates a mask for pairs of a variable's name and value. A value shorter than [`SECRET_MIN`]
    /// is matched only verbatim; a value of fewer than four characters only as a separate word: `7`
    /// in `7`, not in `17`.
    pub fn new<'a>(secrets: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut all: Vec<(String, String)> = Vec::new();
        for (name, value) in secrets {
            if value.is_empty() {
                continue;
            }
            let place = format!("${{env:{name}}}");
            let forms = if value.chars().count() < SECRET_MIN {
                BTreeSet::from([value.to_owned()])
            } else {
                // Programs print a value without the line break at its end, or line by line.
                let lines = value.lines().map(str::trim);
                let lines = lines.filter(|line| line.chars().count() >= SECRET_MIN);
                std::iter::once(value)
                    .chain(lines)
                    .flat_map(forms)
                    .collect()
            };
            all.extend(forms.into_iter().map(|form| (form, place.clone())));
        }
        all.sort_by_key(|(form, _)| std::cmp::Reverse(form.len()));
        let forms = all.into_iter().map(|(text, place)| Form {
            bytes: Decoded::of(&text).bytes,
            text,
            place,
        });
        Self {
            forms: forms.collect(),
        }
    }

    /// True if there is nothing to hide.
    pub fn is_empty(&self) -> bool {
        self.forms.is_empty()
    }

    /// The most bytes of a text that stand for a secret, whatever its escapes.
    pub fn longest(&self) -> usize {
        let longest = self.forms.first();
        longest.map_or(0, |form| form.text.len() * BYTES_A_BYTE)
    }

    /// `text` with `${env:NAME}` in place of each secret.
    pub fn hide(&self, text: &str) -> String {
        let is_plain = |byte: &u8| !matches!(byte, b'\\' | b'%' | b'\n' | b'\r');
        // Keyed by start offset; the ranges do not overlap.
        let mut hidden: BTreeMap<usize, (usize, &str)> = BTreeMap::new();
        let mut hide = |range: Range<usize>, place| {
            let before = hidden.range(..range.end).next_back();
            if before.is_none_or(|(_, (end, _))| *end <= range.start) {
                hidden.insert(range.start, (range.end, place));
            }
        };
        if !text.as_bytes().iter().all(is_plain) {
            for (start, piece) in pieces(text, self.longest()) {
                for form in self.forms.iter().filter(|it| it.bytes.len() >= DECODED_MIN) {
                    for range in piece.matches(&form.bytes) {
                        hide(start + range.start..start + range.end, form.place.as_str());
                    }
                }
            }
        }
        for form in &*self.forms {
            for range in matches(text, &form.text) {
                hide(range, form.place.as_str());
            }
        }
        let mut shown = String::with_capacity(text.len());
        let mut from = 0;
        for (start, (end, place)) in hidden {
            shown.push_str(&text[from..start]);
            shown.push_str(place);
            from = end;
        }
        shown.push_str(&text[from..]);
        shown
    }
}

/// Returns the byte ranges of `form` in `text`. A form of fewer than four characters matches only
/// as a separate word.
fn matches<'a>(text: &'a str, form: &'a str) -> impl Iterator<Item = Range<usize>> + 'a {
    let is_short = form.chars().count() < 4;
    text.match_indices(form).filter_map(move |(start, _)| {
        let end = start + form.len();
        let is_inside = text[..start].ends_with(char::is_alphanumeric)
            || text[end..].starts_with(char::is_alphanumeric);
        (!is_short || !is_inside).then_some(start..end)
    })
}

/// The bytes of a text that are decoded at once: each takes 17 bytes of memory while it is.
const PIECE_BYTES: usize = 1 << 20;

/// Returns the decoded pieces of a text with their offsets. Each goes on by `overlap` bytes into
/// the next, so that a secret at their border is in one of them.
fn pieces(text: &str, overlap: usize) -> impl Iterator<Item = (usize, Decoded)> {
    (0..text.len()).step_by(PIECE_BYTES).map(move |start| {
        let start = text.floor_char_boundary(start);
        let end = text.ceil_char_boundary(start + PIECE_BYTES + overlap);
        (start, Decoded::of(&text[start..end]))
    })
}

/// A text with its escapes decoded and its white space left out: JSON's escapes in JSON, percent encoding,
/// and lines that base64, terminals or formatters broke.
struct Decoded {
    bytes: Vec<u8>,
    /// The range of the original text that each byte stands for.
    ranges: Vec<Range<usize>>,
}

impl Decoded {
    fn of(text: &str) -> Self {
        let mut decoded = Self {
            bytes: text.as_bytes().to_vec(),
            ranges: (0..text.len()).map(|at| at..at + 1).collect(),
        };
        for _ in 0..DECODED_TIMES {
            let length = decoded.bytes.len();
            decoded = decoded.once();
            if decoded.bytes.len() == length {
                break;
            }
        }
        decoded
    }

    fn once(&self) -> Self {
        let mut next = Self {
            bytes: Vec::with_capacity(self.bytes.len()),
            ranges: Vec::with_capacity(self.bytes.len()),
        };
        let mut at = 0;
        while at < self.bytes.len() {
            let (character, length) = escape(&self.bytes[at..]);
            let range = self.ranges[at].start..self.ranges[at + length - 1].end;
            let mut buffer = [0; 4];
            let new: &[u8] = match &character {
                Escape::None if self.bytes[at].is_ascii_whitespace() => &[],
                Escape::None => &self.bytes[at..=at],
                Escape::Byte(byte) => std::slice::from_ref(byte),
                Escape::Char(c) => c.encode_utf8(&mut buffer).as_bytes(),
                Escape::Space => &[],
            };
            next.bytes.extend(new);
            next.ranges.extend(std::iter::repeat_n(range, new.len()));
            at += length;
        }
        next
    }

    /// The ranges of the original text that stand for `form`.
    fn matches(&self, form: &[u8]) -> Vec<Range<usize>> {
        memmem::find_iter(&self.bytes, form)
            .map(|start| {
                let end = start + form.len() - 1;
                self.ranges[start].start..self.ranges[end].end
            })
            .collect()
    }
}

/// The meaning of the bytes at the start of a text.
enum Escape {
    /// The first byte stands for itself.
    None,
    Byte(u8),
    Char(char),
    /// White space.
    Space,
}

/// The escape that a text begins with, and its length in bytes.
fn escape(bytes: &[u8]) -> (Escape, usize) {
    let hex = |range: Range<usize>| {
        let digits = std::str::from_utf8(bytes.get(range)?).ok()?;
        u32::from_str_radix(digits, 16).ok()
    };
    match bytes {
        [b'%', ..] => match hex(1..3) {
            Some(byte) => (Escape::Byte(byte as u8), 3),
            None => (Escape::None, 1),
        },
        [b'\\', b'u' | b'U', ..] => match (hex(2..6), bytes.get(6..8), hex(8..12)) {
            (Some(high @ 0xd800..=0xdbff), Some(b"\\u" | b"\\U"), Some(low @ 0xdc00..=0xdfff)) => {
                let code = 0x1_0000 + ((high - 0xd800) << 10) + (low - 0xdc00);
                (char::from_u32(code).map_or(Escape::None, Escape::Char), 12)
            }
            (Some(code), ..) => match char::from_u32(code) {
                Some(c) if c.is_whitespace() => (Escape::Space, 6),
                Some(c) => (Escape::Char(c), 6),
                None => (Escape::None, 1),
            },
            _ => (Escape::None, 1),
        },
        [b'\\', b'x', ..] => match hex(2..4) {
            Some(byte) => (Escape::Byte(byte as u8), 4),
            None => (Escape::None, 1),
        },
        [b'\\', b'n' | b'r' | b't', ..] => (Escape::Space, 2),
        [b'\\', escaped @ (b'"' | b'\\' | b'/' | b'\''), ..] => (Escape::Byte(*escaped), 2),
        _ => (Escape::None, 1),
    }
}

/// Returns the encoded forms in which a text may contain a value.
fn forms(value: &str) -> BTreeSet<String> {
    let mut forms = BTreeSet::from([value.to_owned()]);
    for json in [escaped(value, false), escaped(value, true)] {
        forms.insert(json.replace('/', "\\/"));
        forms.insert(json);
    }
    for is_plain in [
        // The unreserved characters of RFC 3986, then the sets that common programs leave
        // unescaped.
        (|byte: u8| b"-._~".contains(&byte)) as fn(u8) -> bool,
        |byte| b"-._~!*'()".contains(&byte),
        |byte| b"-._~/".contains(&byte),
        |byte| b"-._*".contains(&byte),
        |byte| b"-._~!$&'()*+,;=:@/".contains(&byte),
    ] {
        let upper = percent(value, is_plain);
        forms.insert(lower_hex(&upper));
        forms.insert(upper.replace("%20", "+"));
        forms.insert(upper);
    }
    // Base64 encodes a value in three ways, depending on its offset within a group of three bytes.
    // A longer text that contains the value shares these characters.
    for before in 0..3 {
        let mut bytes = vec![0; before];
        bytes.extend(value.as_bytes());
        let first = (before * 8).div_ceil(6);
        let behind = bytes.len() * 8 / 6;
        for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
            forms.insert(engine.encode(&bytes)[first..behind].to_owned());
        }
    }
    let hex: String = value.bytes().map(|byte| format!("{byte:02x}")).collect();
    forms.insert(hex.to_uppercase());
    forms.insert(hex);
    forms
}

/// Escapes a text as in a JSON string, without the quotes. If `is_ascii`, non-ASCII characters
/// become `\u` escapes.
fn escaped(value: &str, is_ascii: bool) -> String {
    let json = serde_json::to_string(value).expect("strings serialize");
    let mut escaped = String::new();
    for c in json[1..json.len() - 1].chars() {
        if c.is_ascii() || !is_ascii {
            escaped.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(escaped, "\\u{unit:04x}").expect("writing to a string cannot fail");
            }
        }
    }
    escaped
}

/// Percent-encodes a text, as in a URL.
fn percent(value: &str, is_plain: fn(u8) -> bool) -> String {
    let mut encoded = String::new();
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || is_plain(byte) {
            encoded.push(char::from(byte));
        } else {
            write!(encoded, "%{byte:02X}").expect("writing to a string cannot fail");
        }
    }
    encoded
}

/// Converts the hex digits of percent escapes to lower case.
fn lower_hex(encoded: &str) -> String {
    let mut lower = String::new();
    let mut left = 0;
    for c in encoded.chars() {
        left = if c == '%' { 3 } else { left };
        lower.push(if left > 0 { c.to_ascii_lowercase() } else { c });
        left -= i32::from(left > 0);
    }
    lower
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::{STANDARD, URL_SAFE};

    use super::*;

    #[test]
    fn a_secret_is_hidden_in_every_form() {
        let key = "sk-ü/\"a b\\+?&key=7";
        let mask = Mask::new([("KEY", key), ("SHORT", "7")]);
        assert_eq!(
            mask.hide(&format!("({key}) 7 17")),
            "(${env:KEY}) ${env:SHORT} 17"
        );
        let json = serde_json::json!({ "echo": key }).to_string();
        assert_eq!(mask.hide(&json), "{\"echo\":\"${env:KEY}\"}");
        let python = json.replace('ü', "\\u00fc");
        assert_eq!(mask.hide(&python), "{\"echo\":\"${env:KEY}\"}");
        for encoded in [
            "sk-%C3%BC%2F%22a%20b%5C%2B%3F%26key%3D7",
            "sk-%c3%bc%2f%22a%20b%5c%2b%3f%26key%3d7",
            "sk-%C3%BC%2F%22a+b%5C%2B%3F%26key%3D7",
            "sk-%C3%BC/%22a%20b%5C%2B%3F%26key%3D7",
        ] {
            assert_eq!(mask.hide(encoded), "${env:KEY}");
        }
        for around in ["", "u", "us", "user:"] {
            for engine in [STANDARD, URL_SAFE] {
                let hidden = mask.hide(&engine.encode(format!("{around}{key}{around}")));
                assert!(hidden.contains("${env:KEY}"), "{around}: {hidden}");
                assert!(hidden.len() < 30, "{around}: {hidden}");
            }
        }
        let hex: String = key.bytes().map(|byte| format!("{byte:02X}")).collect();
        assert_eq!(mask.hide(&format!("x{hex}x")), "x${env:KEY}x");
        assert_eq!(mask.hide(&hex.to_lowercase()), "${env:KEY}");
        assert_eq!(Mask::default().hide("as it is"), "as it is");
    }

    #[test]
    fn a_secret_that_is_broken_into_lines_is_hidden() {
        let key = "hf_0123456789abcdefghijklmnopqrstuvwxyz";
        let mask = Mask::new([("KEY", key), ("SHORT", "1234567")]);
        assert_eq!(
            mask.hide("key: hf_0123456789abc\r\n  defghijklmnopqrstuvwxyz\nend"),
            "key: ${env:KEY}\nend"
        );
        let lines = STANDARD.encode(format!("user:{key}"));
        let hidden = mask.hide(&format!("{}\n{}\n", &lines[..30], &lines[30..]));
        assert!(hidden.contains("${env:KEY}"), "{hidden}");
        // Short values could match by chance.
        assert_eq!(mask.hide("123\n4567"), "123\n4567");
        // A value that ends in a line break is printed without it, one of several lines line by line.
        let mask = Mask::new([
            ("KEY", "plainSecretValue1234\r\n"),
            ("TWO", "lineOne77\nlineTwo88"),
        ]);
        assert_eq!(
            mask.hide("plainSecretValue1234; lineOne77; lineTwo88"),
            "${env:KEY}; ${env:TWO}; ${env:TWO}"
        );
    }

    #[test]
    fn a_secret_is_hidden_behind_the_escapes_of_other_languages() {
        let key = "sk-<Ab>&\"q/+=ü99";
        let mask = Mask::new([("KEY", key)]);
        for echo in [
            r#"sk-\u003cAb\u003e\u0026\"q/+=ü99"#,
            r#"sk-\u003CAb\u003E\u0026\u0022q\/+=\u00FC99"#,
            r#"sk-<Ab>&\\\"q/+=\\u00fc99"#,
            "%73%6B-%3CAb%3E%26%22q%2F%2B%3D%C3%BC99",
        ] {
            assert_eq!(mask.hide(&format!("[{echo}]")), "[${env:KEY}]", "{echo}");
        }
        let long = format!(
            "{}sk-\\u003cAb>&\\\"q/+=ü99\\n",
            "x".repeat(PIECE_BYTES - 9)
        );
        assert!(mask.hide(&long).ends_with("x${env:KEY}\\n"));
        let one = "\\ud83d\\ude00";
        let mask = Mask::new([("KEY", "smile😀smile")]);
        assert_eq!(mask.hide(&format!("smile{one}smile")), "${env:KEY}");
    }

    #[test]
    fn a_longer_secret_goes_first_and_names_are_not_searched() {
        let mask = Mask::new([("A", "secret"), ("B", "secret-of-b"), ("C", "env:AA")]);
        assert_eq!(mask.hide("secret-of-b secret"), "${env:B} ${env:A}");
    }
}
