//! Reading of single rows by their positions in the files of a table.

use std::path::{Path, PathBuf};

use ::parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder, RowSelection,
};
use ::parquet::file::metadata::PageIndexPolicy;
use rayon::prelude::*;

use super::StoreError;
use super::parquet::{only, read, typed};
use crate::tables::Row;
use ovchat_io::files;

/// Reads rows by their positions: the file, by its place in `files`, and the number of the row in it.
/// Decodes only the pages that have them, in several threads. Returns them in the order of `positions`,
/// which may not repeat any.
pub fn rows_at<R: Row + Send>(
    files: &[impl AsRef<Path>],
    positions: &[(u32, u64)],
) -> Result<Vec<R>, StoreError> {
    let mut order: Vec<usize> = (0..positions.len()).collect();
    order.sort_unstable_by_key(|place| positions[*place]);
    let mut pieces: Vec<Piece> = Vec::new();
    for place in &order {
        let (file, row) = positions[*place];
        match pieces.last_mut() {
            Some(piece) if piece.of == file => piece.rows.push(row),
            _ => pieces.push(Piece::open(files, file, row)?),
        }
    }
    let share = positions
        .len()
        .div_ceil(rayon::current_num_threads())
        .max(1);
    let pieces: Vec<Piece> = pieces
        .into_iter()
        .flat_map(|piece| piece.split(share))
        .collect();
    let read: Result<Vec<Vec<R>>, StoreError> = pieces.into_par_iter().map(Piece::read).collect();
    let mut rows: Vec<(usize, R)> = order.into_iter().zip(read?.into_iter().flatten()).collect();
    rows.sort_unstable_by_key(|(place, _)| *place);
    Ok(rows.into_iter().map(|(_, row)| row).collect())
}

/// Some rows of a file, by their numbers in ascending order.
struct Piece {
    of: u32,
    path: PathBuf,
    metadata: ArrowReaderMetadata,
    rows: Vec<u64>,
}

impl Piece {
    fn open(files: &[impl AsRef<Path>], of: u32, row: u64) -> Result<Self, StoreError> {
        let path = files.get(of as usize).map(AsRef::as_ref);
        let path = path.ok_or_else(|| StoreError::Parquet {
            path: format!("file {of}").into(),
            problem: "there are fewer files".to_owned(),
        })?;
        let file = files::open(path).map_err(StoreError::io("read", path))?;
        let options = ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Optional);
        Ok(Self {
            of,
            metadata: read(path, || ArrowReaderMetadata::load(&file, options))?,
            path: path.to_owned(),
            rows: vec![row],
        })
    }

    /// Returns pieces of at most `most` rows.
    fn split(self, most: usize) -> Vec<Self> {
        let pieces = self.rows.chunks(most).map(|rows| Self {
            of: self.of,
            path: self.path.clone(),
            metadata: self.metadata.clone(),
            rows: rows.to_vec(),
        });
        pieces.collect()
    }

    fn read<R: Row>(self) -> Result<Vec<R>, StoreError> {
        let path = &self.path;
        let file = files::open(path).map_err(StoreError::io("read", path))?;
        let wanted = self.rows.len();
        let batches = read(path, || {
            let (groups, selection) = selected(&self.metadata, &self.rows);
            let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata);
            let columns = R::schema();
            let reader = only(builder, Some(&columns))
                .with_row_groups(groups)
                .with_row_selection(selection);
            let batches: Result<Vec<_>, _> = reader.build()?.collect();
            Ok(batches?)
        })?;
        let mut rows = Vec::new();
        for batch in batches {
            rows.extend(typed::<R>(path, &batch)?);
        }
        if rows.len() != wanted {
            return Err(StoreError::Parquet {
                path: path.clone(),
                problem: "it has fewer rows than the manifest says".to_owned(),
            });
        }
        Ok(rows)
    }
}

/// Returns the row groups that have some rows, and the selection of the rows within these groups: even
/// skipping a group costs time.
fn selected(metadata: &ArrowReaderMetadata, rows: &[u64]) -> (Vec<usize>, RowSelection) {
    let mut groups = Vec::new();
    let mut ranges = Vec::new();
    // The first row of a group in the file, and in the groups that are read.
    let (mut start, mut read) = (0, 0);
    let mut rows = rows.iter().peekable();
    for (number, group) in metadata.metadata().row_groups().iter().enumerate() {
        let count = u64::try_from(group.num_rows()).unwrap_or(0);
        let mut is_read = false;
        while let Some(row) = rows.next_if(|row| **row < start + count) {
            let place = (read + row - start) as usize;
            ranges.push(place..place + 1);
            is_read = true;
        }
        if is_read {
            groups.push(number);
            read += count;
        }
        start += count;
    }
    let selection = RowSelection::from_consecutive_ranges(ranges.into_iter(), read as usize);
    (groups, selection)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TableWriter;
    use crate::tables::Reward;

    fn reward(number: i32) -> Reward {
        Reward {
            row_key: String::new(),
            prompt_id: format!("{number}"),
            candidate: number,
            judge: "judge".to_owned(),
            reward: 0.5,
            reply: None,
            label: None,
            first_score: None,
            second_score: None,
            failure: None,
        }
    }

    #[test]
    fn rows_come_in_the_order_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, from: i32| {
            let mut writer = TableWriter::new(folder.path(), name, Reward::schema(), &[]);
            // More than a row group.
            let rows: Vec<Reward> = (from..from + 5000).map(reward).collect();
            writer.write(&Reward::to_batch(&rows)).unwrap();
            folder.path().join(&writer.finish().unwrap()[0].file)
        };
        let files = [file("one", 0), file("two", 10_000)];
        let positions = [(1, 4999), (0, 0), (1, 0), (0, 4500), (0, 1)];
        let rows: Vec<Reward> = rows_at(&files, &positions).unwrap();
        let found: Vec<i32> = rows.iter().map(|row| row.candidate).collect();
        assert_eq!(found, [14_999, 0, 10_000, 4500, 1]);
    }
}
