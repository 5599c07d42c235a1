//! Reading of single rows by their positions in the files of a table.

use std::collections::BTreeMap;
use std::path::Path;

use ::parquet::arrow::arrow_reader::{
    ArrowReaderOptions, ParquetRecordBatchReaderBuilder, RowSelection,
};
use ::parquet::file::metadata::PageIndexPolicy;

use super::StoreError;
use super::parquet::{only, parquet_error, typed};
use crate::tables::Row;
use ovchat_io::files;

/// Reads rows by their positions: the file, by its place in `files`, and the number of the row in it.
/// Decodes only the pages that have them. Returns them in the order of `positions`, which may not
/// repeat any.
pub fn rows_at<R: Row>(
    files: &[impl AsRef<Path>],
    positions: &[(u32, u64)],
) -> Result<Vec<R>, StoreError> {
    let mut by_file: BTreeMap<u32, Vec<(u64, usize)>> = BTreeMap::new();
    for (place, (file, row)) in positions.iter().enumerate() {
        by_file.entry(*file).or_default().push((*row, place));
    }
    let mut rows: Vec<Option<R>> = Vec::new();
    rows.resize_with(positions.len(), || None);
    for (file, mut wanted) in by_file {
        wanted.sort_unstable();
        let Some(path) = files.get(file as usize).map(AsRef::as_ref) else {
            continue;
        };
        let numbers = wanted.iter().map(|(row, _)| *row as usize);
        let read: Vec<R> = of_file(path, numbers)?;
        for ((_, place), row) in wanted.into_iter().zip(read) {
            rows[place] = Some(row);
        }
    }
    // A position beyond the files has no row.
    Ok(rows.into_iter().flatten().collect())
}

/// Reads rows of a file by their numbers, in ascending order.
fn of_file<R: Row>(
    path: &Path,
    numbers: impl Iterator<Item = usize>,
) -> Result<Vec<R>, StoreError> {
    let failed = |error| parquet_error(path, error);
    let file = files::open(path).map_err(StoreError::io("read", path))?;
    let options = ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Optional);
    let builder = ParquetRecordBatchReaderBuilder::try_new_with_options(file, options);
    let builder = builder.map_err(failed)?;
    let total = usize::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
    let ranges = numbers.filter(|row| *row < total).map(|row| row..row + 1);
    let selection = RowSelection::from_consecutive_ranges(ranges, total);
    let columns = R::schema();
    let reader = only(builder, Some(&columns)).with_row_selection(selection);
    let mut rows = Vec::new();
    for batch in reader.build().map_err(failed)? {
        let batch = batch.map_err(|error| parquet_error(path, error.into()))?;
        rows.extend(typed::<R>(path, &batch)?);
    }
    Ok(rows)
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
