//! The lines that a program writes to its standard error, in bounded memory and whatever their bytes are.

use std::io::{ErrorKind, Read};

/// What is kept of the beginning of a line, and of its end.
const HEAD: usize = 16 << 10;
const TAIL: usize = 16 << 10;

/// Hands the lines of a stream to `take` until there are no more, or none is wanted. The middle of one that is
/// very long is left out.
pub fn each(mut stream: impl Read, mut take: impl FnMut(String) -> bool) {
    let mut buffer = [0; 8 << 10];
    let mut line = Line::default();
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
            if end.is_some() && !take(std::mem::take(&mut line).text()) {
                return;
            }
        }
    }
    if line.length > 0 {
        take(line.text());
    }
}

/// A line that grows.
#[derive(Default)]
struct Line {
    length: u64,
    head: Vec<u8>,
    tail: Vec<u8>,
}

impl Line {
    fn add(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        let (first, rest) = bytes.split_at(bytes.len().min(HEAD - self.head.len()));
        self.head.extend(first);
        self.tail.extend(rest);
        if self.tail.len() > 2 * TAIL {
            self.tail.drain(..self.tail.len() - TAIL);
        }
    }

    fn text(mut self) -> String {
        if self.tail.len() > TAIL {
            self.tail.drain(..self.tail.len() - TAIL);
        }
        let left_out = self.length - (self.head.len() + self.tail.len()) as u64;
        if left_out == 0 {
            self.head.append(&mut self.tail);
            return shown(self.head.strip_suffix(b"\r").unwrap_or(&self.head));
        }
        let (head, tail) = (shown(&self.head), shown(&self.tail));
        format!("{head} … {left_out} bytes left out … {tail}")
    }
}

/// Bytes as text; those that are none as `\xff`.
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
            each(bytes, |line| {
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
}
