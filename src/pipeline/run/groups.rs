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
use arrow::datatypes::{DataType, FieldRef, Schema, SchemaRef};

use crate::stages::{BatchStage, Failure};
use ovchat_data::store::{Lookup, Name, TableReader};

/// The number of rows that are gathered at once, unless a single prompt has more.
const ROWS_AT_ONCE: u32 = 32_768;

/// The number of rows up to which reading on is cheaper than opening the table again at a row group.
const NEAR: u64 = 4096;

/// An iterator over the groups of a table.
pub struct Groups {
    rows: Rows,
    /// The unread remainder: a batch, its prompt ids, and its first row that was not returned.
    rest: Option<(RecordBatch, ArrayRef, usize)>,
    /// The number of rows returned or skipped.
    position: u64,
}

/// A source of rows in which the rows of each prompt are adjacent.
enum Rows {
    /// The table as it is.
    Adjacent {
        reader: TableReader,
        files: Vec<PathBuf>,
        columns: SchemaRef,
    },
    /// The table, reordered.
    Gathered {
        lookup: Box<Lookup>,
        /// The prompts, each with its number of rows, and the first one not yet returned.
        names: Vec<(Name, u32)>,
        next: usize,
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

    /// Opens groups whose rows are known to be adjacent, without an index of the table.
    pub fn open_adjacent(files: Vec<PathBuf>, columns: SchemaRef) -> Self {
        let rows = Rows::Adjacent {
            reader: TableReader::new(files.clone()).only(columns.clone()),
            files,
            columns,
        };
        Self {
            rows,
            rest: None,
            position: 0,
        }
    }

    fn gathering(files: Vec<PathBuf>, columns: SchemaRef, at_once: u32) -> Result<Self, Failure> {
        let lookup = Lookup::open(files.clone(), "prompt_id")?;
        if lookup.torn().is_none() {
            return Ok(Self::open_adjacent(files, columns));
        }
        let rows = Rows::Gathered {
            names: lookup.names(),
            next: 0,
            lookup: Box::new(lookup.only(columns)),
            at_once,
        };
        Ok(Self {
            rows,
            rest: None,
            position: 0,
        })
    }

    /// True if the rows of any prompt are not adjacent in the table.
    pub fn is_gathered(&self) -> bool {
        matches!(self.rows, Rows::Gathered { .. })
    }

    /// The number of rows before the next group.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Continues at the group that begins at this row, in the order of the groups. Reads on if that is
    /// near, as for workers that take turns.
    pub fn seek(&mut self, row: u64) -> Result<(), Failure> {
        if (self.position..=self.position + NEAR).contains(&row) {
            return self.skip(row);
        }
        self.rest = None;
        self.position = row;
        match &mut self.rows {
            Rows::Adjacent {
                reader,
                files,
                columns,
            } => {
                let opened = TableReader::new(files.clone()).only(columns.clone());
                *reader = opened.from_row(row);
            }
            Rows::Gathered { names, next, .. } => {
                let mut before = 0;
                let ends = names.iter().take_while(|(_, count)| {
                    before += u64::from(*count);
                    before <= row
                });
                *next = ends.count();
            }
        }
        Ok(())
    }

    /// Reads up to a row.
    fn skip(&mut self, row: u64) -> Result<(), Failure> {
        while self.position < row {
            let Some((batch, ids, start)) = self.next()? else {
                return Ok(());
            };
            let wanted = (row - self.position) as usize;
            let there = batch.num_rows() - start;
            self.position += wanted.min(there) as u64;
            if wanted < there {
                self.rest = Some((batch, ids, start + wanted));
            }
        }
        Ok(())
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
        self.position += taken.lengths.iter().sum::<usize>() as u64;
        Ok(taken)
    }

    /// Returns the prompt ids of the next `count` groups.
    pub fn ids(&mut self, count: usize) -> Result<Vec<String>, Failure> {
        let Taken { rows, lengths } = self.take(count)?;
        let mut all = Vec::new();
        for batch in &rows {
            let ids = prompt_ids(batch)?;
            let texts = ids.as_string::<i32>();
            all.extend((0..texts.len()).map(|row| texts.value(row).to_owned()));
        }
        let mut first = 0;
        let firsts = lengths.iter().map(|length| {
            let id = all[first].clone();
            first += length;
            id
        });
        Ok(firsts.collect())
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
            Self::Adjacent { reader, .. } => Ok(reader.next().transpose()?),
            Self::Gathered {
                lookup,
                names,
                next,
                at_once,
            } => {
                let mut wanted: Vec<Name> = Vec::new();
                let mut rows = 0;
                while let Some(&(name, count)) = names.get(*next)
                    && (wanted.is_empty() || rows + count <= *at_once)
                {
                    wanted.push(name);
                    rows += count;
                    *next += 1;
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

/// Opens groups of a table of which it is known if its rows have to be gathered.
pub fn groups_of(
    files: Vec<PathBuf>,
    columns: SchemaRef,
    is_gathered: bool,
) -> Result<Groups, Failure> {
    if is_gathered {
        Groups::open(files, columns)
    } else {
        Ok(Groups::open_adjacent(files, columns))
    }
}

/// Returns the columns that tell where the groups of a table end.
pub fn id_columns(work: &dyn BatchStage) -> SchemaRef {
    let reads = work.reads();
    let is_id = |field: &&FieldRef| field.name() == "prompt_id";
    let fields: Vec<_> = reads.fields().iter().filter(is_id).cloned().collect();
    SchemaRef::new(Schema::new(fields))
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
        let mut starts = Vec::new();
        loop {
            starts.push(groups.position());
            let one = numbers(&groups.take(count).unwrap());
            if one.is_empty() {
                break;
            }
            all.push(one);
        }
        // Each part is the same if it is sought, in any order.
        let parts = starts.iter().zip(&all);
        let every_other = parts.clone().step_by(2);
        for (start, expected) in every_other.chain(parts.rev()) {
            groups.seek(*start).unwrap();
            assert_eq!(numbers(&groups.take(count).unwrap()), *expected);
        }
        groups.seek(ids.len() as u64).unwrap();
        assert!(groups.take(count).unwrap().lengths.is_empty());
        all
    }

    /// Returns the row numbers of each group.
    fn numbers(Taken { rows, lengths }: &Taken) -> Vec<Vec<i32>> {
        let rows = rows
            .iter()
            .flat_map(|batch| Reward::from_batch(batch).unwrap());
        let mut numbers = rows.map(|row| row.candidate);
        let cut = |&length: &usize| numbers.by_ref().take(length).collect();
        lengths.iter().map(cut).collect()
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
