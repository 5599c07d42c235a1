//! The groups of a table: all rows of one `prompt_id`.
//!
//! The rows of a prompt are nearly always adjacent, and the table is read once, as a stream. Where
//! they are not (a query without `order by`, a `union all`), the rows of some prompts at a time are
//! gathered. Prompts come in the order of their first rows, the rows of a prompt in the order of
//! the table.

use std::collections::HashMap;
use std::path::PathBuf;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, UInt32Array};
use arrow::compute::{cast, concat_batches, take_record_batch};
use arrow::datatypes::{DataType, SchemaRef};

use crate::stages::Failure;
use ovchat_data::store::{Lookup, Name, TableReader};

/// The number of rows that are gathered at once, unless a single prompt has more.
const ROWS_AT_ONCE: u32 = 32_768;

/// An iterator over the groups of a table.
pub struct Groups {
    rows: Rows,
    /// The unread remainder: a batch, its prompt ids, and its first row that was not returned.
    rest: Option<(RecordBatch, ArrayRef, usize)>,
}

/// A source of rows in which the rows of each prompt are adjacent.
enum Rows {
    /// The table as it is.
    Adjacent(TableReader),
    /// The table, reordered.
    Gathered {
        lookup: Box<Lookup>,
        /// The prompts not yet returned, each with its number of rows.
        names: std::iter::Peekable<std::vec::IntoIter<(Name, u32)>>,
        at_once: u32,
    },
}

/// Several groups: their rows, in order, and the number of rows in each group.
#[derive(Debug, Default)]
pub struct Taken {
    pub rows: Vec<RecordBatch>,
    pub lengths: Vec<usize>,
}

impl Groups {
    /// Opens the groups of the table in `files`, with the given columns.
    pub fn open(files: Vec<PathBuf>, columns: SchemaRef) -> Result<Self, Failure> {
        Self::gathering(files, columns, ROWS_AT_ONCE)
    }

    fn gathering(files: Vec<PathBuf>, columns: SchemaRef, at_once: u32) -> Result<Self, Failure> {
        let lookup = Lookup::open(files.clone(), "prompt_id")?;
        let rows = if lookup.torn().is_none() {
            Rows::Adjacent(TableReader::new(files).only(columns))
        } else {
            Rows::Gathered {
                names: lookup.names().into_iter().peekable(),
                lookup: Box::new(lookup.only(columns)),
                at_once,
            }
        };
        Ok(Self { rows, rest: None })
    }

    /// True if the rows of any prompt are not adjacent in the table.
    pub fn is_gathered(&self) -> bool {
        matches!(self.rows, Rows::Gathered { .. })
    }

    /// Returns the next `count` groups, fewer at the end.
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

    /// Returns the next batch, its prompt ids, and its first row that was not returned.
    fn next(&mut self) -> Result<Option<(RecordBatch, ArrayRef, usize)>, Failure> {
        if let Some(rest) = self.rest.take() {
            return Ok(Some(rest));
        }
        let Some(batch) = self.rows.next()? else {
            return Ok(None);
        };
        let ids = prompt_ids(&batch)?;
        Ok(Some((batch, ids, 0)))
    }
}

impl Rows {
    fn next(&mut self) -> Result<Option<RecordBatch>, Failure> {
        match self {
            Self::Adjacent(reader) => Ok(reader.next().transpose()?),
            Self::Gathered {
                lookup,
                names,
                at_once,
            } => {
                let mut wanted: Vec<Name> = Vec::new();
                let mut rows = 0;
                while let Some((name, count)) =
                    names.next_if(|(_, count)| wanted.is_empty() || rows + count <= *at_once)
                {
                    wanted.push(name);
                    rows += count;
                }
                if wanted.is_empty() {
                    return Ok(None);
                }
                let batches = lookup.all_named(wanted.into_iter())?;
                let schema = batches[0].schema();
                let batch = concat_batches(&schema, &batches).expect("one table has one schema");
                Ok(Some(adjacent(&batch)?))
            }
        }
    }
}

/// Returns the same rows with those of each prompt adjacent, and prompts in the order of their
/// first rows.
fn adjacent(batch: &RecordBatch) -> Result<RecordBatch, Failure> {
    let ids = prompt_ids(batch)?;
    let ids = ids.as_string::<i32>();
    let mut groups: HashMap<&str, u32> = HashMap::new();
    let mut order: Vec<(u32, u32)> = Vec::with_capacity(ids.len());
    for row in 0..ids.len() {
        let next = groups.len() as u32;
        let group = *groups.entry(ids.value(row)).or_insert(next);
        order.push((group, row as u32));
    }
    order.sort_unstable();
    let rows: Vec<u32> = order.into_iter().map(|(_, row)| row).collect();
    Ok(take_record_batch(batch, &UInt32Array::from(rows)).expect("the rows are there"))
}

fn prompt_ids(batch: &RecordBatch) -> Result<ArrayRef, Failure> {
    let missing = || Failure::Other("the table has no text column `prompt_id`".to_owned());
    let ids = batch.column_by_name("prompt_id").ok_or_else(missing)?;
    cast(ids, &DataType::Utf8).map_err(|_| missing())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovchat_data::store::TableWriter;
    use ovchat_data::tables::{Reward, Row};

    /// Returns the row numbers of each group taken; three rows are gathered at once.
    fn taken(ids: &[&str], count: usize) -> Vec<Vec<Vec<i32>>> {
        let folder = tempfile::tempdir().unwrap();
        let row = |(number, id): (usize, &&str)| Reward {
            row_key: String::new(),
            prompt_id: (*id).to_owned(),
            candidate: number as i32,
            judge: String::new(),
            reward: 0.0,
            reply: None,
            label: None,
            first_score: None,
            second_score: None,
            failure: None,
        };
        let rows: Vec<Reward> = ids.iter().enumerate().map(row).collect();
        // Two files, so that groups span batches.
        let mut files = Vec::new();
        for (number, half) in rows.chunks(rows.len().div_ceil(2).max(1)).enumerate() {
            let stem = format!("part-{number}");
            let mut writer = TableWriter::new(folder.path(), &stem, Reward::schema(), &[]);
            writer.write(&Reward::to_batch(half)).unwrap();
            let records = writer.finish().unwrap();
            files.extend(records.iter().map(|file| folder.path().join(&file.file)));
        }
        let mut groups = Groups::gathering(files, Reward::schema(), 3).unwrap();
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
    fn adjacent_rows_are_one_group_wherever_batches_end() {
        let ids = ["a", "a", "b", "b", "b", "c"];
        assert_eq!(
            taken(&ids, 2),
            [vec![vec![0, 1], vec![2, 3, 4]], vec![vec![5]]]
        );
        assert_eq!(taken(&ids, 9), [vec![vec![0, 1], vec![2, 3, 4], vec![5]]]);
        assert_eq!(taken(&["a"], 1), [[[0]]]);
        assert!(taken(&[], 3).is_empty());
    }

    #[test]
    fn a_group_has_all_rows_of_its_prompt_wherever_they_lie() {
        let ids = ["b", "a", "b", "c", "a", "b", "c", "d"];
        let all = [vec![0, 2, 5], vec![1, 4], vec![3, 6], vec![7]];
        assert_eq!(taken(&ids, 9), [all.to_vec()]);
        assert_eq!(taken(&ids, 3), [all[..3].to_vec(), all[3..].to_vec()]);
        assert_eq!(taken(&ids, 1), all.map(|group| vec![group]));
        // A prompt with more rows than are gathered at once stays whole.
        let ids = ["a", "b", "a", "a", "b", "a", "a"];
        assert_eq!(
            taken(&ids, 1),
            [vec![vec![0, 2, 3, 5, 6]], vec![vec![1, 4]]]
        );
    }
}
