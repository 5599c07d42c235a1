//! Rows by name: an index in memory, the rows on disk.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;

use ::parquet::arrow::ProjectionMask;
use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::DataType;

use super::StoreError;
use super::parquet::{open, parquet_error, typed};
use crate::tables::Row;

/// Bytes of row groups that are kept in memory. Most stages ask for rows in the order in which they
/// lie, more or less; trainings ask for them in any order.
const CACHE_BYTES: usize = 64 << 20;

/// A row group of a file, and the position of its first row in the table.
struct Group {
    file: u32,
    /// Its number in the file.
    number: u32,
    start: u32,
}

/// Finds rows by the value of one text column, or by their position in the table.
pub struct Lookup {
    column: String,
    files: Vec<PathBuf>,
    groups: Vec<Group>,
    rows: u32,
    /// Name to first position and number of consecutive rows of that name.
    by_name: HashMap<String, (u32, u32)>,
    cache: VecDeque<(usize, RecordBatch)>,
    cached_bytes: usize,
}

impl Lookup {
    /// Reads the names of all rows in `files`: the values of `column`.
    pub fn open(files: Vec<PathBuf>, column: &str) -> Result<Self, StoreError> {
        let mut lookup = Self {
            column: column.to_owned(),
            files: Vec::new(),
            groups: Vec::new(),
            rows: 0,
            by_name: HashMap::new(),
            cache: VecDeque::new(),
            cached_bytes: 0,
        };
        for path in files {
            lookup.add_file(path)?;
        }
        Ok(lookup)
    }

    /// Takes one more file into the index. A name that was there before keeps its rows.
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
                for index in 0..names.len() {
                    self.index(names.value(index));
                }
            }
        }
        self.files.push(path);
        Ok(())
    }

    fn index(&mut self, name: &str) {
        let position = self.rows;
        self.rows += 1;
        match self.by_name.get_mut(name) {
            Some((start, count)) if *start + *count == position => *count += 1,
            Some(_) => {}
            None => {
                self.by_name.insert(name.to_owned(), (position, 1));
            }
        }
    }

    /// Where the first row of that name lies.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.by_name
            .get(name)
            .map(|&(position, _)| position as usize)
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows as usize
    }

    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The rows of that name that lie together.
    pub fn get(&mut self, name: &str) -> Result<Option<RecordBatch>, StoreError> {
        let Some(&(start, count)) = self.by_name.get(name) else {
            return Ok(None);
        };
        self.range(start as usize, count as usize).map(Some)
    }

    /// The first row of that name.
    pub fn row<R: Row>(&mut self, name: &str) -> Result<Option<R>, StoreError> {
        match self.by_name.get(name) {
            Some(&(position, _)) => self.at(position as usize).map(Some),
            None => Ok(None),
        }
    }

    /// The row at a position, in the order of the table.
    pub fn at<R: Row>(&mut self, position: usize) -> Result<R, StoreError> {
        let batch = self.range(position, 1)?;
        let file = self.groups[self.group_of(position)].file;
        let rows = typed::<R>(&self.files[file as usize], &batch)?;
        Ok(rows.into_iter().next().expect("one row was asked for"))
    }

    /// `count` rows from a position on.
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
        let builder = open(path)?.with_row_groups(vec![group.number as usize]);
        let schema = builder.schema().clone();
        let reader = builder
            .build()
            .map_err(|error| parquet_error(path, error))?;
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
    fn rows_of_one_name_come_together_also_across_row_groups() {
        let folder = tempfile::tempdir().unwrap();
        let mut lookup = Lookup::open(written(folder.path()), "row_key").unwrap();
        let rows = Reward::from_batch(&lookup.get("k819").unwrap().unwrap()).unwrap();
        assert_eq!(rows, (4095..4100).map(reward).collect::<Vec<_>>());
    }
}
