//! Nesting depth of the columns of a Parquet file, read from its footer. The parquet crate descends
//! by recursion, and a file of 160 kB may have more levels than fit on a thread's stack.
//!
//! The footer is a struct `FileMetaData` of parquet.thrift in Thrift's compact protocol; its field
//! 2 is the list of columns and groups in depth-first order, each group before its members.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// The maximum nesting depth.
const LEVELS_MAX: usize = 100;

/// The magic bytes at the end of a file, after the length of the footer.
const END: &[u8] = b"PAR1";

/// Type IDs of Thrift's compact protocol.
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const SET: u8 = 10;
const STRUCT: u8 = 12;

/// Types of the first fields of the footer, and of those of a column.
const FOOTER: [u8; 6] = [I32, LIST, I64, LIST, LIST, BINARY];
const COLUMN: [u8; 10] = [I32, I32, I32, BINARY, I32, I32, I32, I32, I32, STRUCT];

/// IDs of the field with the list of columns, and of the field with the number of members of a
/// group.
const COLUMNS: i64 = 2;
const CHILDREN: i64 = 5;

/// True if a Parquet file's columns are nested no deeper than [`LEVELS_MAX`].
pub(super) fn is_shallow(file: &File) -> io::Result<bool> {
    let length = file.metadata()?.len();
    let Some(end) = length.checked_sub(8) else {
        return Ok(false);
    };
    let mut tail = [0; 8];
    file.read_exact_at(&mut tail, end)?;
    let (size, magic) = tail.split_at(4);
    let size = u32::from_le_bytes(size.try_into().expect("four bytes"));
    let Some(start) = end.checked_sub(size.into()).filter(|_| magic == END) else {
        return Ok(false);
    };
    let mut footer = vec![0; size as usize];
    file.read_exact_at(&mut footer, start)?;
    Ok(Thrift(&footer).footer().is_some())
}

/// The unread rest of a buffer in the compact protocol.
struct Thrift<'a>(&'a [u8]);

impl<'a> Thrift<'a> {
    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(count).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    /// Reads a varint: seven bits per byte, lowest first.
    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for place in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << place;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn signed(&mut self) -> Option<i64> {
        let number = self.number()?;
        Some((number >> 1).cast_signed() ^ -(number & 1).cast_signed())
    }

    /// Reads the ID and the type of the next field of a struct; `before` is the previous ID. The
    /// outer `None` is malformed input, the inner one the end of the struct.
    fn field(&mut self, before: i64) -> Option<Option<(i64, u8)>> {
        let byte = self.byte()?;
        if byte == 0 {
            return Some(None);
        }
        let number = match byte >> 4 {
            0 => self.signed()?,
            more => before.checked_add(more.into())?,
        };
        Some(Some((number, byte & 15)))
    }

    /// Reads the header of a list: the number of items and their type.
    fn list(&mut self) -> Option<(u64, u8)> {
        let byte = self.byte()?;
        let count = match byte >> 4 {
            15 => self.number()?,
            count => count.into(),
        };
        Some((count, byte & 15))
    }

    /// Skips a value that is nested at most `levels` deep.
    fn skip(&mut self, kind: u8, levels: usize) -> Option<()> {
        let levels = levels.checked_sub(1)?;
        match kind {
            // For booleans, the type is the value.
            1 | 2 => {}
            3 => {
                self.byte()?;
            }
            4..=I64 => {
                self.number()?;
            }
            DOUBLE => {
                self.take(8)?;
            }
            BINARY => {
                let length = self.number()?;
                self.take(length)?;
            }
            LIST | SET => {
                let (count, kind) = self.list()?;
                for _ in 0..count {
                    match kind {
                        1 | 2 => self.byte().map(|_| ())?,
                        kind => self.skip(kind, levels)?,
                    }
                }
            }
            STRUCT => {
                let mut before = 0;
                while let Some((number, kind)) = self.field(before)? {
                    self.skip(kind, levels)?;
                    before = number;
                }
            }
            _ => return None,
        }
        Some(())
    }

    /// Reads the footer; `None` if it is malformed or its columns are nested too deep.
    fn footer(&mut self) -> Option<()> {
        let mut before = 0;
        while let Some((number, kind)) = self.field(before)? {
            fits(&FOOTER, number, kind)?;
            if number == COLUMNS {
                self.columns()?;
            } else {
                self.skip(kind, LEVELS_MAX)?;
            }
            before = number;
        }
        Some(())
    }

    fn columns(&mut self) -> Option<()> {
        let (count, kind) = self.list()?;
        if kind != STRUCT {
            return None;
        }
        // Number of members still to come in each open group.
        let mut open = Vec::new();
        for _ in 0..count {
            let children = self.column()?;
            if let Some(left) = open.last_mut() {
                *left -= 1;
            }
            if children > 0 {
                open.push(children);
            }
            while open.last() == Some(&0) {
                open.pop();
            }
            if open.len() > LEVELS_MAX {
                return None;
            }
        }
        Some(())
    }

    /// Reads a schema element and returns its number of members, 0 for a column.
    fn column(&mut self) -> Option<i64> {
        let (mut before, mut children) = (0, 0);
        while let Some((number, kind)) = self.field(before)? {
            fits(&COLUMN, number, kind)?;
            if number == CHILDREN {
                children = self.signed()?;
            } else {
                self.skip(kind, LEVELS_MAX)?;
            }
            before = number;
        }
        Some(children)
    }
}

/// Returns `Some` if a field has the required type.
fn fits(kinds: &[u8], number: i64, kind: u8) -> Option<()> {
    let place = usize::try_from(number).ok()?.checked_sub(1)?;
    kinds
        .get(place)
        .is_none_or(|wanted| *wanted == kind)
        .then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a footer of a column within `groups` nested groups.
    fn nested(groups: u8) -> Vec<u8> {
        let mut footer = vec![0x15, 2, 0x19, 0xfc, groups + 1];
        for _ in 0..groups {
            footer.extend([0x48, 1, b'g', 0x15, 2, 0]);
        }
        footer.extend([0x15, 12, 0x25, 2, 0x18, 1, b'a', 0, 0x16, 0, 0x19, 0x0c, 0]);
        footer
    }

    #[test]
    fn a_footer_is_read_as_far_as_its_columns_lie_no_deeper_than_a_hundred_levels() {
        for (groups, is_read) in [(1, true), (100, true), (101, false), (120, false)] {
            let read = Thrift(&nested(groups)).footer();
            assert_eq!(read.is_some(), is_read, "{groups}");
        }
        let whole = nested(2);
        for length in 0..whole.len() {
            assert!(Thrift(&whole[..length]).footer().is_none(), "{length}");
        }
    }
}
