//! Row lookup by name, with an index in memory and the rows on disk.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::path::{Path, PathBuf};

use ::parquet::arrow::ProjectionMask;
use arrow::array::{Array, AsArray, RecordBatch, RecordBatchReader, UInt32Array};
use arrow::compute::{cast, concat_batches, take_record_batch};
use arrow::datatypes::{DataType, SchemaRef};
use sha2::{Digest, Sha256};

use super::StoreError;
use super::parquet::{only, open, parquet_error, typed};
use crate::tables::Row;

/// The size in bytes of the cache of row groups. Most stages read rows roughly in file order;
/// training reads them in any order.
const CACHE_BYTES: usize = 64 << 20;

/// A row group of a file, and the position of its first row in the table.
struct Group {
    file: u32,
    /// The index of the row group in the file.
    number: u32,
    start: u32,
}

/// A name in the index: 128 bits of its SHA-256, as many as keys have. The index of a million
/// prompts takes about 50 MB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(u64, u64);

impl Name {
    fn of(text: &str) -> Self {
        let digest = Sha256::digest(text);
        let half = |from: usize| {
            let bytes = digest[from..from + 8].try_into();
            u64::from_le_bytes(bytes.expect("eight bytes of a longer digest"))
        };
        Self(half(0), half(8))
    }
}

/// A hasher that uses half of a [`Name`], which is a digest already.
#[derive(Default)]
struct Half(u64);

impl Hasher for Half {
    fn write(&mut self, _: &[u8]) {
        unreachable!("a name is two numbers")
    }

    fn write_u64(&mut self, half: u64) {
        self.0 = half;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

type ByName<T> = HashMap<Name, T, BuildHasherDefault<Half>>;

/// A range of consecutive rows: the position of the first, and their number.
type Run = (u32, u32);

/// An index of rows by the value of one text column, and by their position in the table.
pub struct Lookup {
    column: String,
    /// The columns to read; `None` for all.
    columns: Option<SchemaRef>,
    files: Vec<PathBuf>,
    groups: Vec<Group>,
    rows: u32,
    /// The first range of rows of each name.
    by_name: ByName<Run>,
    /// Further ranges of a name; rarely any.
    scattered: ByName<Vec<Run>>,
    /// The first name whose rows are not adjacent.
    torn: Option<String>,
    cache: VecDeque<(usize, RecordBatch)>,
    cached_bytes: usize,
}

impl Lookup {
    /// Builds the index of `files` from the values of `column`.
    pub fn open(files: Vec<PathBuf>, column: &str) -> Result<Self, StoreError> {
        let mut lookup = Self {
            column: column.to_owned(),
            columns: None,
            files: Vec::new(),
            groups: Vec::new(),
            rows: 0,
            by_name: HashMap::default(),
            scattered: HashMap::default(),
            torn: None,
            cache: VecDeque::new(),
            cached_bytes: 0,
        };
        for path in files {
            lookup.add_file(path)?;
        }
        Ok(lookup)
    }

    /// Restricts reading to the columns of `columns`, matched by name.
    #[must_use]
    pub fn only(mut self, columns: SchemaRef) -> Self {
        self.columns = Some(columns);
        self
    }

    /// Adds a file to the index. Existing names keep their rows.
    pub fn add_file(&mut self, path: PathBuf) -> Result<(), StoreError> {
        let file = self.files.len() as u32;
        for group in 0..open(&path)?.metadata().num_row_groups() {
            self.groups.push(Group {
                file,
                number: group as u32,
                start: self.rows,
            });
            let builder = open(&path)?;
            let mask = ProjectionMask::columns(builder.parquet_schema(), [self.column.as_str()]);
            let names = builder
                .with_row_groups(vec![group])
                .with_projection(mask)
                .build();
            for batch in names.map_err(|error| parquet_error(&path, error))? {
                let problem = |problem: String| StoreError::Parquet {
                    path: path.clone(),
                    problem,
                };
                let batch = batch.map_err(|error| problem(error.to_string()))?;
                let names = cast(batch.column(0), &DataType::Utf8)
                    .map_err(|error| problem(error.to_string()))?;
                let names = names.as_string::<i32>();
                let mut row = 0;
                while row < names.len() {
                    let name = names.value(row);
                    let end = (row..names.len()).find(|&other| names.value(other) != name);
                    let end = end.unwrap_or(names.len());
                    self.index(name, (end - row) as u32);
                    row = end;
                }
            }
        }
        self.files.push(path);
        Ok(())
    }

    /// Adds the next `count` rows, all with the same name.
    fn index(&mut self, name: &str, count: u32) {
        let position = self.rows;
        self.rows += count;
        let text = name;
        let name = Name::of(name);
        let Some(first) = self.by_name.get_mut(&name) else {
            self.by_name.insert(name, (position, count));
            return;
        };
        let last = match self.scattered.get_mut(&name) {
            Some(more) => more.last_mut().expect("a range has a row"),
            None => first,
        };
        if last.0 + last.1 == position {
            last.1 += count;
        } else {
            let more = self.scattered.entry(name).or_default();
            more.push((position, count));
            self.torn.get_or_insert_with(|| text.to_owned());
        }
    }

    /// Returns the position of the first row with a name.
    pub fn position(&self, name: &str) -> Option<usize> {
        let first = self.by_name.get(&Name::of(name));
        first.map(|&(position, _)| position as usize)
    }

    /// Returns the first name whose rows are not adjacent, if any.
    pub fn torn(&self) -> Option<&str> {
        self.torn.as_deref()
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.rows as usize
    }

    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(&Name::of(name))
    }

    /// Returns the first range of rows with a name.
    pub fn get(&mut self, name: &str) -> Result<Option<RecordBatch>, StoreError> {
        let Some(&(start, count)) = self.by_name.get(&Name::of(name)) else {
            return Ok(None);
        };
        self.range(start as usize, count as usize).map(Some)
    }

    /// Returns the first row with a name.
    pub fn row<R: Row>(&mut self, name: &str) -> Result<Option<R>, StoreError> {
        match self.position(name) {
            Some(position) => self.at(position).map(Some),
            None => Ok(None),
        }
    }

    /// Returns all names in the order of their first rows, each with its number of rows.
    pub fn names(&self) -> Vec<(Name, u32)> {
        let mut firsts: Vec<(u32, Name)> = self
            .by_name
            .iter()
            .map(|(&name, &(position, _))| (position, name))
            .collect();
        firsts.sort_unstable();
        let count = |name: &Name| {
            let scattered = self.scattered.get(name).into_iter().flatten();
            let runs = self.by_name.get(name).into_iter().chain(scattered);
            runs.map(|&(_, count)| count).sum()
        };
        let names = firsts.into_iter();
        names.map(|(_, name)| (name, count(&name))).collect()
    }

    /// Returns the file that contains the first row with a name.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        let group = self.group_of(self.position(name)?);
        let file = self.groups[group].file as usize;
        Some(&self.files[file])
    }

    /// Returns all rows with the given names, adjacent or not, in table order.
    pub fn all<'n>(
        &mut self,
        names: impl Iterator<Item = &'n str>,
    ) -> Result<Vec<RecordBatch>, StoreError> {
        self.all_named(names.map(Name::of))
    }

    /// Returns all rows with the given names, as [`Self::all`].
    pub fn all_named(
        &mut self,
        names: impl Iterator<Item = Name>,
    ) -> Result<Vec<RecordBatch>, StoreError> {
        let mut runs: Vec<Run> = Vec::new();
        for name in names {
            runs.extend(self.by_name.get(&name));
            runs.extend(self.scattered.get(&name).into_iter().flatten());
        }
        runs.sort_unstable();
        runs.dedup();
        let mut batches = Vec::new();
        let mut positions = runs
            .into_iter()
            .flat_map(|(start, count)| start..start + count)
            .peekable();
        while let Some(&position) = positions.peek() {
            let group = self.group_of(position as usize);
            let rows = self.read_group(group)?;
            let start = self.groups[group].start;
            let end = start + rows.num_rows() as u32;
            let of_group = std::iter::from_fn(|| positions.next_if(|&position| position < end));
            let wanted: Vec<u32> = of_group.map(|position| position - start).collect();
            let (first, last) = (wanted[0], wanted[wanted.len() - 1]);
            batches.push(if (last - first) as usize + 1 == wanted.len() {
                rows.slice(first as usize, wanted.len())
            } else {
                let taken = take_record_batch(&rows, &UInt32Array::from(wanted));
                taken.expect("the rows are there")
            });
        }
        Ok(batches)
    }

    /// Returns the row at a position, in table order.
    pub fn at<R: Row>(&mut self, position: usize) -> Result<R, StoreError> {
        let batch = self.range(position, 1)?;
        let file = self.groups[self.group_of(position)].file;
        let rows = typed::<R>(&self.files[file as usize], &batch)?;
        Ok(rows.into_iter().next().expect("one row was asked for"))
    }

    /// Returns `count` rows from a position on.
    pub fn range(&mut self, start: usize, count: usize) -> Result<RecordBatch, StoreError> {
        let mut pieces = Vec::new();
        let mut position = start;
        while position < start + count {
            let group = self.group_of(position);
            let rows = self.read_group(group)?;
            let offset = position - self.groups[group].start as usize;
            let length = (rows.num_rows() - offset).min(start + count - position);
            pieces.push(rows.slice(offset, length));
            position += length;
        }
        if pieces.len() == 1 {
            return Ok(pieces.remove(0));
        }
        let schema = pieces[0].schema();
        Ok(concat_batches(&schema, &pieces).expect("row groups of one table have one schema"))
    }

    fn group_of(&self, position: usize) -> usize {
        self.groups
            .partition_point(|group| group.start as usize <= position)
            - 1
    }

    fn read_group(&mut self, index: usize) -> Result<RecordBatch, StoreError> {
        if let Some((_, rows)) = self.cache.iter().find(|(cached, _)| *cached == index) {
            return Ok(rows.clone());
        }
        let group = &self.groups[index];
        let path = &self.files[group.file as usize];
        let problem = |problem: String| StoreError::Parquet {
            path: path.clone(),
            problem,
        };
        let builder = only(open(path)?, self.columns.as_ref());
        let builder = builder.with_row_groups(vec![group.number as usize]);
        let reader = builder
            .build()
            .map_err(|error| parquet_error(path, error))?;
        let schema = reader.schema();
        let batches: Vec<RecordBatch> = reader
            .collect::<Result<_, _>>()
            .map_err(|error| problem(error.to_string()))?;
        let rows = concat_batches(&schema, &batches).map_err(|error| problem(error.to_string()))?;
        self.cache.push_back((index, rows.clone()));
        self.cached_bytes += rows.get_array_memory_size();
        while self.cached_bytes > CACHE_BYTES
            && self.cache.len() > 1
            && let Some((_, dropped)) = self.cache.pop_front()
        {
            self.cached_bytes -= dropped.get_array_memory_size();
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TableWriter;
    use crate::tables::Reward;

    fn reward(number: i32) -> Reward {
        Reward {
            row_key: format!("k{}", number / 5),
            prompt_id: format!("p{number}"),
            candidate: 0,
            judge: "judge".to_owned(),
            reward: number as f32,
            reply: None,
            label: None,
            first_score: None,
            second_score: None,
            failure: None,
        }
    }

    fn written(folder: &std::path::Path) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for part in 0..2 {
            let rows: Vec<Reward> = (part * 9000..(part + 1) * 9000).map(reward).collect();
            let mut writer =
                TableWriter::new(folder, &format!("part-{part}"), Reward::schema(), &[]);
            writer.write(&Reward::to_batch(&rows)).unwrap();
            files.extend(
                writer
                    .finish()
                    .unwrap()
                    .into_iter()
                    .map(|file| folder.join(file.file)),
            );
        }
        files
    }

    #[test]
    fn rows_are_found_by_name_and_by_position_over_many_groups() {
        let folder = tempfile::tempdir().unwrap();
        let mut lookup = Lookup::open(written(folder.path()), "prompt_id").unwrap();
        assert_eq!(lookup.len(), 18_000);
        for number in [0, 4095, 4096, 8999, 9000, 17_999] {
            assert_eq!(
                lookup.row(&format!("p{number}")).unwrap(),
                Some(reward(number))
            );
            assert_eq!(
                lookup.at::<Reward>(number as usize).unwrap(),
                reward(number)
            );
        }
        assert!(lookup.get("p18000").unwrap().is_none());
        let cached = lookup.cache.iter();
        let bytes: usize = cached.map(|(_, rows)| rows.get_array_memory_size()).sum();
        assert_eq!(lookup.cached_bytes, bytes);
        assert!(bytes <= CACHE_BYTES);
    }

    #[test]
    fn all_rows_of_some_names_come_in_the_order_of_the_table() {
        let folder = tempfile::tempdir().unwrap();
        let files = written(folder.path());
        // The rows of the first file appear a second time after all others.
        let again = [files[0].clone(), files[1].clone(), files[0].clone()].to_vec();
        let mut lookup = Lookup::open(again, "row_key").unwrap();
        let wanted = ["k819", "k3", "k3", "k1800", "no such name"];
        let found = lookup.all(wanted.into_iter()).unwrap();
        let rows = found
            .iter()
            .flat_map(|batch| Reward::from_batch(batch).unwrap());
        let runs = [15..20, 4095..4100, 9000..9005, 15..20, 4095..4100];
        let expected: Vec<Reward> = runs.into_iter().flatten().map(reward).collect();
        assert_eq!(rows.collect::<Vec<_>>(), expected);
        assert!(lookup.all([].into_iter()).unwrap().is_empty());
        assert_eq!(lookup.torn(), Some("k0"));
    }

    #[test]
    fn rows_of_one_name_come_together_also_across_row_groups() {
        let folder = tempfile::tempdir().unwrap();
        let mut lookup = Lookup::open(written(folder.path()), "row_key").unwrap();
        assert_eq!(lookup.torn(), None);
        let rows = Reward::from_batch(&lookup.get("k819").unwrap().unwrap()).unwrap();
        assert_eq!(rows, (4095..4100).map(reward).collect::<Vec<_>>());
    }
}
