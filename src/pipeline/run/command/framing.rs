//! The framing of an Arrow IPC stream: message headers are checked before they are read, because
//! the reader allocates by the sizes in a header, and the stream is untrusted input.

use std::io::{self, Read};

use arrow_ipc::root_as_message;

/// The largest header of a message, in bytes.
const HEAD_MAX: usize = 16 << 20;

/// The largest body of a message (the rows of a batch), in bytes.
const BODY_MAX: u64 = 1 << 30;

/// The continuation marker before the length of a header, since Arrow 0.15.
const CONTINUES: [u8; 4] = [0xff; 4];

/// A stream that rejects messages that are too large, and tracks the read position.
pub struct Framed<R> {
    stream: R,
    /// The header of the message, as it is on the stream.
    head: Vec<u8>,
    /// The number of header bytes that were returned.
    given: usize,
    body_left: u64,
    /// True if the stream has ended.
    pub is_over: bool,
    /// True if the end-of-stream marker was read.
    pub is_whole: bool,
    /// The reason why a message was rejected.
    pub refused: Option<String>,
}

impl<R: Read> Framed<R> {
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            head: Vec::new(),
            given: 0,
            body_left: 0,
            is_over: false,
            is_whole: false,
            refused: None,
        }
    }

    /// Reads the header of the next message.
    fn next_head(&mut self) -> io::Result<()> {
        self.head.clear();
        self.given = 0;
        if !self.take(4)? || (self.head == CONTINUES && !self.take(4)?) {
            return Ok(());
        }
        let start = self.head.len();
        let length = self.head[start - 4..].try_into().map(i32::from_le_bytes);
        let length = length.expect("four bytes");
        if length == 0 {
            self.is_whole = true;
            return Ok(());
        }
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= HEAD_MAX);
        let Some(length) = length else {
            return Err(self.refuse("wrote an invalid Arrow IPC stream".to_owned()));
        };
        if !self.take(length)? {
            return Ok(());
        }
        // An invalid message is reported by the reader.
        if let Ok(message) = root_as_message(&self.head[start..]) {
            let length = message.bodyLength();
            let fits = u64::try_from(length).ok().filter(|body| *body <= BODY_MAX);
            let Some(body) = fits else {
                return Err(self.refuse(format!(
                    "wrote a batch of {length} bytes, which is more than the limit of {BODY_MAX}; write smaller batches"
                )));
            };
            self.body_left = body;
        }
        Ok(())
    }

    /// Reads `count` more bytes of the header; returns false if the stream ends first.
    fn take(&mut self, count: usize) -> io::Result<bool> {
        let mut limited = (&mut self.stream).take(count as u64);
        let read = limited.read_to_end(&mut self.head)?;
        self.is_over |= read < count;
        Ok(read == count)
    }

    fn refuse(&mut self, why: String) -> io::Error {
        self.refused = Some(why.clone());
        io::Error::other(why)
    }
}

impl<R: Read> Read for Framed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let is_between = self.given == self.head.len() && self.body_left == 0;
        if is_between && !self.is_whole && !self.is_over && !buffer.is_empty() {
            self.next_head()?;
        }
        let head = &self.head[self.given..];
        if !head.is_empty() {
            let count = head.len().min(buffer.len());
            buffer[..count].copy_from_slice(&head[..count]);
            self.given += count;
            return Ok(count);
        }
        let most = if self.is_whole {
            buffer.len()
        } else {
            buffer.len().min(self.body_left as usize)
        };
        let count = self.stream.read(&mut buffer[..most])?;
        self.is_over |= count == 0 && most > 0;
        self.body_left = self.body_left.saturating_sub(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int32Array, RecordBatch};
    use arrow_ipc::reader::StreamReader;
    use arrow_ipc::writer::StreamWriter;

    use super::*;

    fn stream() -> Vec<u8> {
        let numbers = std::sync::Arc::new(Int32Array::from(vec![1, 2, 3]));
        let batch = RecordBatch::try_from_iter([("n", numbers as ArrayRef)]).unwrap();
        let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.write(&batch).unwrap();
        writer.into_inner().unwrap()
    }

    #[test]
    fn a_stream_is_handed_on_as_it_is_and_its_end_is_known() {
        let bytes = stream();
        let mut reader = StreamReader::try_new(Framed::new(&bytes[..]), None).unwrap();
        assert_eq!(
            reader
                .by_ref()
                .map(|batch| batch.unwrap().num_rows())
                .sum::<usize>(),
            6
        );
        assert!(reader.get_ref().is_whole && !reader.get_ref().is_over);
        for cut in 0..bytes.len() {
            let mut framed = Framed::new(&bytes[..cut]);
            let mut out = Vec::new();
            framed.read_to_end(&mut out).unwrap();
            assert_eq!(out, &bytes[..cut]);
            assert!(framed.is_over, "cut at {cut}");
            // The marker is eight bytes; the last four are a length of zero.
            assert!(!framed.is_whole, "cut at {cut}");
        }
    }

    /// Nothing of that size is allocated: the length of a body is in the header of its message.
    #[test]
    fn a_message_is_refused_by_the_size_that_its_head_says() {
        let bytes = stream();
        // The schema has no body; the next message is the first batch.
        let length = |at: usize| i32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let start = 8 + length(4) + 8;
        let head = &bytes[start..start + length(start - 4)];
        let body = root_as_message(head).unwrap().bodyLength().to_le_bytes();
        let at = start + head.windows(8).position(|eight| eight == body).unwrap();
        for size in [2_i64 << 30, i64::MAX, -1] {
            let mut large = bytes.clone();
            large[at..at + 8].copy_from_slice(&size.to_le_bytes());
            let mut reader = StreamReader::try_new(Framed::new(&large[..]), None).unwrap();
            let failed = reader.by_ref().find_map(Result::err).unwrap().to_string();
            let refused = reader.get_ref().refused.clone().unwrap();
            assert!(
                refused.contains(&format!("a batch of {size} bytes")),
                "{refused}"
            );
            assert!(failed.contains(&refused), "{failed}");
        }
        for head in [&b"hello, world"[..], &[0xff; 12]] {
            let mut framed = Framed::new(head);
            assert!(framed.read_to_end(&mut Vec::new()).is_err());
            assert!(framed.refused.is_some());
        }
    }
}
