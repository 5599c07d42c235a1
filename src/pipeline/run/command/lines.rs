//! The lines that a program writes to its stderr, read in bounded memory and with any bytes.

use std::io::{ErrorKind, Read};

use ovchat_io::mask::Mask;

/// The most bytes that are kept of a line's start, and of its end.
const HEAD: usize = 16 << 10;
const TAIL: usize = 16 << 10;

/// The longest line that is kept whole, in bytes.
const WHOLE_MAX: u64 = (HEAD + TAIL) as u64;

/// Passes the lines of a stream to `take` until the stream ends or `take` returns false. The middle
/// of a very long line is left out. Secrets are masked before a line is cut, so no part of one
/// remains at the cut.
pub fn each(mut stream: impl Read, mask: &Mask, mut take: impl FnMut(String) -> bool) {
    let mut buffer = [0; 8 << 10];
    let margin = mask.longest();
    let new = || Line {
        margin,
        ..Line::default()
    };
    let mut line = new();
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        for piece in buffer[..count].split_inclusive(|byte| *byte == b'\n') {
            let end = piece.strip_suffix(b"\n");
            line.add(end.unwrap_or(piece));
            if end.is_some() && !take(std::mem::replace(&mut line, new()).text(mask)) {
                return;
            }
        }
    }
    if line.length > 0 {
        take(line.text(mask));
    }
}

/// A line that is being read.
#[derive(Default)]
struct Line {
    length: u64,
    /// The bytes beyond head and tail that are kept, so that a secret at their ends is whole.
    margin: usize,
    head: Vec<u8>,
    tail: Vec<u8>,
}

impl Line {
    fn add(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        let room = HEAD + self.margin - self.head.len();
        let (first, rest) = bytes.split_at(bytes.len().min(room));
        self.head.extend(first);
        self.tail.extend(rest);
        let kept = TAIL + self.margin;
        if self.tail.len() > 2 * kept {
            self.tail.drain(..self.tail.len() - kept);
        }
    }

    fn text(mut self, mask: &Mask) -> String {
        if self.length <= (self.head.len() + self.tail.len()) as u64 && self.length <= WHOLE_MAX {
            self.head.append(&mut self.tail);
            let text = shown(self.head.strip_suffix(b"\r").unwrap_or(&self.head));
            return mask.hide(&text);
        }
        let kept = TAIL + self.margin;
        self.tail.drain(..self.tail.len().saturating_sub(kept));
        let left_out = self.length - (HEAD + TAIL) as u64;
        // A secret that is cut at the far end of what was kept lies within the margin, which goes.
        let head = mask.hide(&shown(&self.head));
        let tail = mask.hide(&shown(&self.tail));
        let head_end = head.len().saturating_sub(self.margin).min(HEAD);
        let tail_start = tail.len() - tail.len().saturating_sub(self.margin).min(TAIL);
        let head = &head[..head.floor_char_boundary(head_end)];
        let tail = &tail[tail.ceil_char_boundary(tail_start)..];
        format!("{head} … {left_out} bytes left out … {tail}")
    }
}

/// Decodes bytes as text; invalid UTF-8 becomes `\xff`.
fn shown(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.push_str(&chunk.invalid().escape_ascii().to_string());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_but_for_the_middle_of_long_ones() {
        let lines = |bytes: &[u8]| {
            let mut lines = Vec::new();
            each(bytes, &Mask::default(), |line| {
                lines.push(line);
                true
            });
            lines
        };
        assert_eq!(
            lines(b"one\r\n\ntwo \xc3\xbc\xff\xc3"),
            ["one", "", "two ü\\xff\\xc3"]
        );
        let long = [b"first".as_slice(), &[b'x'; 1_000_000], b"last\nnext"].concat();
        let found = lines(&long);
        let [line, next] = &found[..] else {
            panic!("two lines");
        };
        assert!(line.starts_with("first") && line.ends_with("last"));
        assert!(
            line.contains(" … 967241 bytes left out … "),
            "{}",
            line.len()
        );
        assert!(line.len() < HEAD + TAIL + 60);
        assert_eq!(next, "next");
    }

    #[test]
    fn a_secret_at_the_cut_of_a_long_line_is_hidden() {
        let secret = "plainSecretValue1234";
        let mask = Mask::new([("KEY", secret)]);
        for before in HEAD - 30..HEAD + 10 {
            let long = ["x".repeat(before), secret.to_owned(), "y".repeat(100_000)].concat();
            let mirrored = ["y".repeat(100_000), secret.to_owned(), "x".repeat(before)].concat();
            for line in [long, mirrored] {
                each(line.as_bytes(), &mask, |found| {
                    assert!(
                        !found.contains("plain") && !found.contains("1234"),
                        "{before}"
                    );
                    true
                });
            }
        }
    }
}
