//! Sealed text, which contains its own checksum: a JSON file whose first entry is the SHA-256 of
//! the rest, and lines that begin with their CRC-32. Bit flips and truncation are detected, and
//! programs that do not know the format still read JSON.

use super::digest;

/// The text of a sealed file before the digest.
const HEAD: &[u8] = b"{\n  \"checksum\": \"";
/// The text between the digest and the rest.
const TAIL: &[u8] = b"\",\n";
const DIGEST: usize = 64;

/// Seals a JSON object serialized by `serde_json::to_vec_pretty`.
pub(super) fn seal(object: &[u8]) -> Vec<u8> {
    let rest = object.strip_prefix(b"{\n").expect("an object with entries");
    [HEAD, digest(rest).as_bytes(), TAIL, rest].concat()
}

/// Returns the problem with a sealed file, or `None` if it is intact. Files of earlier versions
/// begin with `"format"` and have no checksum; they are accepted.
pub(super) fn flaw(text: &[u8]) -> Option<&'static str> {
    if text.starts_with(b"{\n  \"format\": ") {
        return None;
    }
    let rest = text.strip_prefix(HEAD);
    let rest = rest.and_then(|rest| rest.split_at_checked(DIGEST));
    let Some((sealed, rest)) = rest else {
        return Some("invalid header");
    };
    match rest.strip_prefix(TAIL) {
        Some(rest) if digest(rest).as_bytes() == sealed => None,
        _ => Some("checksum mismatch"),
    }
}

/// Seals a line, without its line end.
pub(super) fn seal_line(line: &[u8]) -> Vec<u8> {
    let sum = format!("{:08x} ", crc32fast::hash(line));
    [sum.as_bytes(), line].concat()
}

/// Returns the text of a sealed line, or `None` if it is corrupt. Lines of earlier versions are
/// JSON without a checksum; they are accepted.
pub(super) fn unseal_line(line: &[u8]) -> Option<&[u8]> {
    if line.starts_with(b"{") {
        return Some(line);
    }
    let (sum, line) = line.split_at_checked(9)?;
    (sum == format!("{:08x} ", crc32fast::hash(line)).as_bytes()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flips(text: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
        (0..text.len() * 8).map(|bit| {
            let mut flipped = text.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            flipped
        })
    }

    #[test]
    fn every_flip_and_every_cut_of_a_file_is_found() {
        let object = serde_json::json!({ "format": 2, "made": [1, 2, 3] });
        let sealed = seal(&serde_json::to_vec_pretty(&object).unwrap());
        assert_eq!(flaw(&sealed), None);
        let read: serde_json::Value = serde_json::from_slice(&sealed).unwrap();
        assert_eq!(read["made"], object["made"]);
        assert!(flips(&sealed).all(|flipped| flaw(&flipped).is_some()));
        assert!((0..sealed.len()).all(|end| flaw(&sealed[..end]).is_some()));
    }

    #[test]
    fn every_flip_of_a_line_is_found() {
        let line = br#"{"begin":{"table":"a"}}"#;
        let sealed = seal_line(line);
        assert_eq!(unseal_line(&sealed), Some(&line[..]));
        assert!(flips(&sealed).all(|flipped| unseal_line(&flipped).is_none()));
        assert_eq!(unseal_line(line), Some(&line[..]));
    }
}
