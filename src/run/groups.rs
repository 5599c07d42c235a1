//! A table's rows, cut into groups: runs of rows with one `prompt_id`.

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::DataType;

use crate::stages::Failure;
use crate::store::TableReader;

/// Streams the groups of a table.
pub struct Groups {
    reader: TableReader,
    /// What was read and not yet handed out: a batch, its ids, and the first row of it.
    rest: Option<(RecordBatch, ArrayRef, usize)>,
}

/// Some groups: their rows, one after another, and how many of them belong to each.
#[derive(Debug, Default)]
pub struct Taken {
    pub rows: Vec<RecordBatch>,
    pub lengths: Vec<usize>,
}

impl Groups {
    pub fn new(reader: TableReader) -> Self {
        Self { reader, rest: None }
    }

    /// The next `count` groups, fewer at the end.
    pub fn take(&mut self, count: usize) -> Result<Taken, Failure> {
        let mut taken = Taken::default();
        let mut last: Option<String> = None;
        while let Some((batch, ids, start)) = self.next()? {
            let texts = ids.as_string::<i32>();
            let mut row = start;
            while row < texts.len() {
                let id = texts.value(row);
                if last.as_deref() != Some(id) {
                    if taken.lengths.len() == count {
                        break;
                    }
                    taken.lengths.push(0);
                    last = Some(id.to_owned());
                }
                let end = (row..texts.len()).find(|&other| texts.value(other) != id);
                let end = end.unwrap_or(texts.len());
                *taken.lengths.last_mut().expect("a group was begun") += end - row;
                row = end;
            }
            if row > start {
                taken.rows.push(batch.slice(start, row - start));
            }
            if row < texts.len() {
                self.rest = Some((batch, ids, row));
                break;
            }
        }
        Ok(taken)
    }

    /// What comes next: a batch, its ids, and the first row that was not handed out.
    fn next(&mut self) -> Result<Option<(RecordBatch, ArrayRef, usize)>, Failure> {
        if let Some(rest) = self.rest.take() {
            return Ok(Some(rest));
        }
        let Some(batch) = self.reader.next() else {
            return Ok(None);
        };
        let batch = batch?;
        let missing = || Failure::Other("the table has no column `prompt_id` of text".to_owned());
        let ids = batch.column_by_name("prompt_id").ok_or_else(missing)?;
        let ids = cast(ids, &DataType::Utf8).map_err(|_| missing())?;
        Ok(Some((batch, ids, 0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TableWriter;
    use crate::tables::{Reward, Row};

    /// The rows of each group that is taken, by their numbers.
    fn taken(ids: &[&str], count: usize) -> Vec<Vec<Vec<i32>>> {
        let folder = tempfile::tempdir().unwrap();
        let row = |(number, id): (usize, &&str)| Reward {
            row_key: String::new(),
            prompt_id: (*id).to_owned(),
            candidate: number as i32,
            judge: String::new(),
            reward: 0.0,
            reply: None,
        };
        let rows: Vec<Reward> = ids.iter().enumerate().map(row).collect();
        // Two files, so that groups lie across batches.
        let mut files = Vec::new();
        for (number, half) in rows.chunks(rows.len().div_ceil(2).max(1)).enumerate() {
            let stem = format!("part-{number}");
            let mut writer = TableWriter::new(folder.path(), &stem, Reward::schema(), &[]);
            writer.write(&Reward::to_batch(half)).unwrap();
            let records = writer.finish().unwrap();
            files.extend(records.iter().map(|file| folder.path().join(&file.file)));
        }
        let mut groups = Groups::new(TableReader::new(files));
        let mut all = Vec::new();
        loop {
            let Taken { rows, lengths } = groups.take(count).unwrap();
            if lengths.is_empty() {
                return all;
            }
            let rows = rows
                .iter()
                .flat_map(|batch| Reward::from_batch(batch).unwrap());
            let mut numbers = rows.map(|row| row.candidate);
            let cut = |&length: &usize| numbers.by_ref().take(length).collect();
            all.push(lengths.iter().map(cut).collect());
        }
    }

    #[test]
    fn groups_are_runs_of_one_prompt_wherever_batches_end() {
        let ids = ["a", "a", "b", "b", "b", "c"];
        assert_eq!(
            taken(&ids, 2),
            [vec![vec![0, 1], vec![2, 3, 4]], vec![vec![5]]]
        );
        assert_eq!(taken(&ids, 9), [vec![vec![0, 1], vec![2, 3, 4], vec![5]]]);
        assert_eq!(taken(&["a"], 1), [[[0]]]);
        assert!(taken(&[], 3).is_empty());
    }
}
