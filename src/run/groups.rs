//! A table's rows, cut into groups: runs of rows with one `prompt_id`.

use std::collections::VecDeque;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::DataType;

use crate::stages::Failure;
use crate::store::TableReader;

/// Streams the groups of a table.
pub struct Groups {
    reader: TableReader,
    /// The rows of the group that may go on in the next batch.
    open: Vec<RecordBatch>,
    open_id: Option<String>,
    ready: VecDeque<RecordBatch>,
}

impl Groups {
    pub fn new(reader: TableReader) -> Self {
        Self {
            reader,
            open: Vec::new(),
            open_id: None,
            ready: VecDeque::new(),
        }
    }

    /// The next `count` groups, fewer at the end.
    pub fn take(&mut self, count: usize) -> Result<Vec<RecordBatch>, Failure> {
        let mut groups = Vec::with_capacity(count);
        while groups.len() < count {
            let Some(group) = self.next()? else { break };
            groups.push(group);
        }
        Ok(groups)
    }

    fn next(&mut self) -> Result<Option<RecordBatch>, Failure> {
        loop {
            if let Some(group) = self.ready.pop_front() {
                return Ok(Some(group));
            }
            match self.reader.next() {
                Some(batch) => self.cut(&batch?)?,
                None if self.open.is_empty() => return Ok(None),
                None => {
                    self.open_id = None;
                    return Ok(Some(joined(std::mem::take(&mut self.open))));
                }
            }
        }
    }

    fn cut(&mut self, batch: &RecordBatch) -> Result<(), Failure> {
        let missing = || Failure::Other("the table has no column `prompt_id` of text".to_owned());
        let ids = batch.column_by_name("prompt_id").ok_or_else(missing)?;
        let ids = cast(ids, &DataType::Utf8).map_err(|_| missing())?;
        let ids = ids.as_string::<i32>();
        let mut start = 0;
        while start < batch.num_rows() {
            let id = ids.value(start);
            let end = (start..ids.len())
                .find(|&row| ids.value(row) != id)
                .unwrap_or(ids.len());
            if self.open_id.as_deref() != Some(id) {
                if !self.open.is_empty() {
                    self.ready.push_back(joined(std::mem::take(&mut self.open)));
                }
                self.open_id = Some(id.to_owned());
            }
            self.open.push(batch.slice(start, end - start));
            start = end;
        }
        Ok(())
    }
}

fn joined(mut pieces: Vec<RecordBatch>) -> RecordBatch {
    if pieces.len() == 1 {
        return pieces.remove(0);
    }
    let schema = pieces[0].schema();
    concat_batches(&schema, &pieces).expect("batches of one table have one schema")
}
