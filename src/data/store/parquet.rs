//! Reading and writing the Parquet files of a table. Files are written under a temporary name that
//! readers ignore, hashed while they are written, synced and renamed; they are read as a stream of
//! record batches.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use ::parquet::arrow::{ArrowWriter, ProjectionMask};
use ::parquet::basic::{Compression, ZstdLevel};
use ::parquet::file::metadata::KeyValue;
use ::parquet::file::properties::{EnabledStatistics, WriterProperties};
use ::parquet::schema::types::ColumnPath;
use arrow::array::{ArrayRef, Int32Array, RecordBatch, new_null_array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use sha2::{Digest, Sha256};

use super::key::hex;
use super::{FileRecord, StoreError, create_folder, footer, pages, sync_folder};
use crate::tables::{Image, Row};
use ovchat_io::files;

/// The size in bytes at which a file is closed and the next one started.
const FILE_BYTES: u64 = 128 << 20;
/// The maximum size of a row group, so that reading one takes little memory.
const GROUP_BYTES: usize = 8 << 20;
/// The maximum size of a row group of images. It is smaller because training reads single images in
/// any order, and each read decodes a whole row group.
const IMAGE_GROUP_BYTES: usize = 1 << 20;
const GROUP_ROWS: usize = 4096;
/// Rows per record batch when reading.
const BATCH_ROWS: usize = 1024;

/// The column with the round of a table's rows, in files of tables that have rounds.
///
/// It is for other programs, which read a file or a glob and see the rounds. This program knows the
/// round of a file from the manifest, so its readers skip the column, which is marked in its
/// metadata.
const ROUND: &str = "round";
const MARK: &str = "ovchat.column";

fn round_field() -> Field {
    let metadata = HashMap::from([
        (MARK.to_owned(), ROUND.to_owned()),
        ("doc".to_owned(), "Round of the row.".to_owned()),
    ]);
    Field::new(ROUND, DataType::Int32, false).with_metadata(metadata)
}

/// True for the column that [`TableWriter::in_round`] adds.
fn is_round(field: &Field) -> bool {
    field.metadata().get(MARK).is_some_and(|name| name == ROUND)
}

/// Returns the first column of a type that Parquet cannot store.
pub fn unstorable(schema: &Schema) -> Option<&Field> {
    let mut fields = schema.fields().iter().map(AsRef::as_ref);
    fields.find(|field: &&Field| {
        let column = new_null_array(field.data_type(), 1);
        let nullable = Arc::new(Field::new(field.name(), field.data_type().clone(), true));
        let one = Arc::new(Schema::new(vec![nullable]));
        let written = ArrowWriter::try_new(Vec::new(), one.clone(), None).and_then(|mut writer| {
            writer.write(&RecordBatch::try_new(one, vec![column])?)?;
            writer.close()
        });
        written.is_err()
    })
}

/// A writer of one Parquet file to a stream outside of a run, such as stdout.
pub struct ParquetStream<W: Write + Send>(ArrowWriter<W>);

impl<W: Write + Send> ParquetStream<W> {
    pub fn begin(out: W, schema: &SchemaRef) -> Result<Self, StoreError> {
        let zstd = Compression::ZSTD(ZstdLevel::default());
        let properties = WriterProperties::builder().set_compression(zstd).build();
        let writer = ArrowWriter::try_new(out, schema.clone(), Some(properties));
        Ok(Self(writer.map_err(of_stream)?))
    }

    pub fn write(&mut self, rows: &RecordBatch) -> Result<(), StoreError> {
        self.0.write(rows).map_err(of_stream)?;
        if self.0.in_progress_size() >= FILE_BYTES as usize {
            self.0.flush().map_err(of_stream)?;
        }
        Ok(())
    }

    /// Finishes the file and returns the stream.
    pub fn finish(self) -> Result<W, StoreError> {
        self.0.into_inner().map_err(of_stream)
    }
}

fn of_stream(error: ::parquet::errors::ParquetError) -> StoreError {
    parquet_error(Path::new("the output"), error)
}

/// The size in bytes of a block with its own CRC-32.
pub const BLOCK: u64 = 1 << 20;

/// A file writer that hashes all written bytes.
struct Hashing {
    file: File,
    sha256: Sha256,
    /// The checksums of full blocks.
    crc32: Vec<u32>,
    block: crc32fast::Hasher,
    bytes: u64,
}

impl Hashing {
    fn add(&mut self, mut written: &[u8]) {
        self.sha256.update(written);
        while !written.is_empty() {
            let left = (BLOCK - self.bytes % BLOCK) as usize;
            let (now, later) = written.split_at(left.min(written.len()));
            self.block.update(now);
            self.bytes += now.len() as u64;
            if self.bytes.is_multiple_of(BLOCK) {
                self.end_block();
            }
            written = later;
        }
    }

    fn end_block(&mut self) {
        let block = std::mem::take(&mut self.block);
        self.crc32.push(block.finalize());
    }
}

impl Write for Hashing {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let count = self.file.write(buffer)?;
        self.add(&buffer[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

struct Open {
    writer: ArrowWriter<Hashing>,
    /// The temporary path, and the final name.
    hidden: PathBuf,
    name: String,
    rows: u64,
}

/// A writer of the rows of one part, as one file or, if they are many, several.
pub struct TableWriter {
    root: PathBuf,
    /// The path of the files relative to the root, without the number of a second file and
    /// `.parquet`.
    stem: String,
    schema: SchemaRef,
    /// Footer metadata that records how the rows were built.
    footer: Vec<(String, String)>,
    /// The value of the column [`ROUND`], if there is one.
    round: Option<i32>,
    open: Option<Open>,
    done: Vec<FileRecord>,
}

impl TableWriter {
    /// Creates a writer of `<root>/<stem>.parquet`. No file is created before the first row.
    pub fn new(root: &Path, stem: &str, schema: SchemaRef, footer: &[(&str, String)]) -> Self {
        let footer = footer
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect();
        Self {
            root: root.to_owned(),
            stem: stem.to_owned(),
            schema,
            footer,
            round: None,
            open: None,
            done: Vec::new(),
        }
    }

    /// Adds the column `round` (int32, the same value in every row) to the files.
    #[must_use]
    pub fn in_round(mut self, round: Option<u32>) -> Self {
        let Some(round) = round else {
            return self;
        };
        let fields = self.schema.fields().iter().cloned();
        let fields: Vec<_> = fields.chain([Arc::new(round_field())]).collect();
        let schema = Schema::new_with_metadata(fields, self.schema.metadata().clone());
        self.schema = Arc::new(schema);
        self.round = Some(round.cast_signed());
        self
    }

    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), StoreError> {
        // Large batches are split, so that a row group stays within its limits.
        let mut start = 0;
        while start < batch.num_rows() {
            let count = GROUP_ROWS.min(batch.num_rows() - start);
            let rows = self.with_round(batch.slice(start, count))?;
            self.write_slice(&rows)?;
            start += count;
        }
        Ok(())
    }

    fn with_round(&self, rows: RecordBatch) -> Result<RecordBatch, StoreError> {
        let Some(round) = self.round else {
            return Ok(rows);
        };
        let rounds: ArrayRef = Arc::new(Int32Array::from_value(round, rows.num_rows()));
        let columns = rows.columns().iter().cloned().chain([rounds]).collect();
        RecordBatch::try_new(self.schema.clone(), columns).map_err(|error| StoreError::Parquet {
            path: self.root.join(format!("{}.parquet", self.stem)),
            problem: error.to_string(),
        })
    }

    /// Creates a file without rows, if there is no file yet.
    pub fn write_nothing(&mut self) -> Result<(), StoreError> {
        if self.open.is_none() && self.done.is_empty() {
            self.open = Some(self.create()?);
        }
        Ok(())
    }

    fn write_slice(&mut self, batch: &RecordBatch) -> Result<(), StoreError> {
        if self.open.is_none() {
            self.open = Some(self.create()?);
        }
        let group_bytes = match self.schema.metadata().get("kind") {
            Some(kind) if kind == Image::KIND => IMAGE_GROUP_BYTES,
            _ => GROUP_BYTES,
        };
        let open = self.open.as_mut().expect("just opened");
        let failed = |error| parquet_error(&open.hidden, error);
        open.writer.write(batch).map_err(failed)?;
        open.rows += batch.num_rows() as u64;
        if open.writer.in_progress_size() >= group_bytes
            || open.writer.in_progress_rows() >= GROUP_ROWS
        {
            open.writer.flush().map_err(failed)?;
        }
        if open.writer.bytes_written() as u64 >= FILE_BYTES {
            self.close()?;
        }
        Ok(())
    }

    /// Finishes the last file. The returned records go into the manifest; before that, the files
    /// are not part of the run.
    pub fn finish(mut self) -> Result<Vec<FileRecord>, StoreError> {
        self.close()?;
        Ok(std::mem::take(&mut self.done))
    }

    fn create(&self) -> Result<Open, StoreError> {
        let number = self.done.len();
        let suffix = if number == 0 {
            String::new()
        } else {
            format!("-{number}")
        };
        let name = format!("{}{suffix}.parquet", self.stem);
        let hidden = self.root.join(format!("{name}.new"));
        let folder = hidden.parent().expect("a file in a folder");
        create_folder(folder)?;
        let file = File::create(&hidden).map_err(StoreError::io("write", &hidden))?;
        let sink = Hashing {
            file,
            sha256: Sha256::new(),
            crc32: Vec::new(),
            block: crc32fast::Hasher::new(),
            bytes: 0,
        };
        let properties = properties(&self.schema, &self.footer);
        let writer = ArrowWriter::try_new(sink, self.schema.clone(), Some(properties))
            .map_err(|error| parquet_error(&hidden, error))?;
        Ok(Open {
            writer,
            hidden,
            name,
            rows: 0,
        })
    }

    fn close(&mut self) -> Result<(), StoreError> {
        let Some(mut open) = self.open.take() else {
            return Ok(());
        };
        let failed = |error| parquet_error(&open.hidden, error);
        open.writer.finish().map_err(failed)?;
        // Flushes the writer's buffer. `into_inner` would do so, too, but hide the system's error.
        open.writer
            .sync()
            .map_err(StoreError::io("write", &open.hidden))?;
        let sink = open.writer.inner_mut();
        sink.file
            .sync_all()
            .map_err(StoreError::io("sync", &open.hidden))?;
        if !sink.bytes.is_multiple_of(BLOCK) {
            sink.end_block();
        }
        let (bytes, sha256) = (sink.bytes, std::mem::take(&mut sink.sha256));
        let crc32 = std::mem::take(&mut sink.crc32);
        let path = self.root.join(&open.name);
        fs::rename(&open.hidden, &path).map_err(StoreError::io("write", &path))?;
        sync_folder(path.parent().expect("a file in a folder"))?;
        self.done.push(FileRecord {
            file: open.name,
            rows: open.rows,
            bytes,
            sha256: hex(&sha256.finalize()),
            crc32,
        });
        Ok(())
    }
}

fn properties(schema: &SchemaRef, footer: &[(String, String)]) -> WriterProperties {
    let footer = footer
        .iter()
        .map(|(name, value)| KeyValue::new(name.clone(), value.clone()))
        .collect();
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_key_value_metadata(Some(footer));
    if *schema == Image::schema() {
        // Images are already compressed, and statistics on them would be as large as the images:
        // pyarrow rejects page headers above 16 MiB.
        let bytes = ColumnPath::from(vec!["image".to_owned(), "bytes".to_owned()]);
        properties = properties
            .set_column_compression(bytes.clone(), Compression::UNCOMPRESSED)
            .set_column_dictionary_enabled(bytes.clone(), false)
            .set_column_statistics_enabled(bytes, EnabledStatistics::None);
    }
    properties.build()
}

/// An iterator over the rows of the files of one table, in order.
pub struct TableReader {
    files: std::vec::IntoIter<PathBuf>,
    current: Option<(PathBuf, ParquetRecordBatchReader)>,
    /// The columns to read; `None` for all.
    columns: Option<SchemaRef>,
    /// The number of rows to skip.
    skip: u64,
}

impl TableReader {
    pub fn new(files: Vec<PathBuf>) -> Self {
        Self {
            files: files.into_iter(),
            current: None,
            columns: None,
            skip: 0,
        }
    }

    /// Begins at a row, counted from 0, without reading the row groups before it.
    #[must_use]
    pub fn from_row(mut self, row: u64) -> Self {
        self.skip = row;
        self
    }

    /// Reads one untrusted file; see [`super::footer`] and [`super::pages`].
    pub fn of_others(path: &Path) -> Result<Self, StoreError> {
        let file = files::open(path).map_err(StoreError::io("read", path))?;
        if !footer::is_shallow(&file).map_err(StoreError::io("read", path))? {
            let problem = "its footer is invalid, or its columns are nested too deep";
            return Err(unreadable(path, problem.to_owned()));
        }
        let builder = open(path)?;
        let columns = columns(&builder, None);
        let reader = read(path, || pages::reader(file, &builder, columns, BATCH_ROWS))?;
        Ok(Self {
            current: Some((path.to_owned(), reader)),
            ..Self::new(Vec::new())
        })
    }

    /// Restricts reading to the columns of `columns`, matched by name.
    #[must_use]
    pub fn only(mut self, columns: SchemaRef) -> Self {
        self.columns = Some(columns);
        self
    }

    fn open(&mut self, path: &Path) -> Result<ParquetRecordBatchReader, StoreError> {
        let mut builder = only(open(path)?, self.columns.as_ref()).with_batch_size(BATCH_ROWS);
        if self.skip > 0 {
            let rows =
                |group: &::parquet::file::metadata::RowGroupMetaData| group.num_rows() as u64;
            let groups: Vec<u64> = builder.metadata().row_groups().iter().map(rows).collect();
            let mut first = 0;
            while first < groups.len() && self.skip >= groups[first] {
                self.skip -= groups[first];
                first += 1;
            }
            let is_left = first < groups.len();
            builder = builder.with_row_groups((first..groups.len()).collect());
            if is_left {
                builder = builder.with_offset(self.skip as usize);
                self.skip = 0;
            }
        }
        read(path, || builder.build())
    }
}

impl Iterator for TableReader {
    type Item = Result<RecordBatch, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((path, mut reader)) = self.current.take() {
                let rows = files::caught(|| reader.next());
                match rows.map_err(|words| unreadable(&path, words)) {
                    Ok(None) => {}
                    Ok(Some(Ok(batch))) => {
                        self.current = Some((path, reader));
                        return Some(Ok(batch));
                    }
                    Ok(Some(Err(error))) => return Some(Err(unreadable(&path, error.to_string()))),
                    Err(error) => return Some(Err(error)),
                }
            }
            let path = self.files.next()?;
            match self.open(&path) {
                Ok(reader) => self.current = Some((path, reader)),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Reads all rows of one small file.
pub fn read_file<R: Row>(path: &Path) -> Result<Vec<R>, StoreError> {
    let mut rows = Vec::new();
    for batch in TableReader::new(vec![path.to_owned()]) {
        rows.extend(typed::<R>(path, &batch?)?);
    }
    Ok(rows)
}

pub(super) fn typed<R: Row>(path: &Path, batch: &RecordBatch) -> Result<Vec<R>, StoreError> {
    R::from_batch(batch).map_err(|misfit| StoreError::Misfit {
        path: path.to_owned(),
        misfit,
    })
}

/// Restricts a reader to the columns of `columns`, matched by name, or to all if `None`. The column
/// of [`TableWriter::in_round`] is always excluded.
pub(super) fn only(
    builder: ParquetRecordBatchReaderBuilder<File>,
    columns: Option<&SchemaRef>,
) -> ParquetRecordBatchReaderBuilder<File> {
    let mask = self::columns(&builder, columns);
    builder.with_projection(mask)
}

/// Returns the projection for [`only`].
fn columns(
    builder: &ParquetRecordBatchReaderBuilder<File>,
    columns: Option<&SchemaRef>,
) -> ProjectionMask {
    let fields = builder.schema().fields().iter().enumerate();
    let wanted = fields.filter(|(_, field)| {
        let named = columns.is_none_or(|columns| columns.field_with_name(field.name()).is_ok());
        named && !is_round(field)
    });
    ProjectionMask::roots(builder.parquet_schema(), wanted.map(|(place, _)| place))
}

pub(super) fn open(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>, StoreError> {
    let file = files::open(path).map_err(StoreError::io("read", path))?;
    read(path, || ParquetRecordBatchReaderBuilder::try_new(file))
}

/// Runs a read of the parquet crate, which panics at some files that it should reject.
pub(super) fn read<T>(
    path: &Path,
    work: impl FnOnce() -> ::parquet::errors::Result<T>,
) -> Result<T, StoreError> {
    let read = files::caught(work).map_err(|words| unreadable(path, words))?;
    read.map_err(|error| parquet_error(path, error))
}

fn unreadable(path: &Path, problem: String) -> StoreError {
    StoreError::Parquet {
        path: path.to_owned(),
        problem,
    }
}

pub(super) fn parquet_error(path: &Path, error: ::parquet::errors::ParquetError) -> StoreError {
    use ::parquet::errors::ParquetError;
    if let ParquetError::External(inner) = error {
        return match inner.downcast::<std::io::Error>() {
            Ok(io) => StoreError::Io {
                action: "write",
                path: path.to_owned(),
                source: *io,
            },
            Err(other) => unreadable(path, other.to_string()),
        };
    }
    unreadable(path, error.to_string())
}

/// Returns the schema of a file's rows, without the column of [`TableWriter::in_round`].
pub fn schema_of_file(path: &Path) -> Result<SchemaRef, StoreError> {
    let builder = open(path)?;
    let schema = builder.schema();
    if !schema.fields().iter().any(|field| is_round(field)) {
        return Ok(Arc::clone(schema));
    }
    let fields = schema.fields().iter().filter(|field| !is_round(field));
    let fields: Vec<_> = fields.cloned().collect();
    let schema = Schema::new_with_metadata(fields, schema.metadata().clone());
    Ok(Arc::new(schema))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::{Reject, RejectClass, Reward};

    fn reject(number: usize) -> Reject {
        Reject {
            stage: "prompts".to_owned(),
            round: None,
            id: number.to_string(),
            class: RejectClass::Fault,
            reason: "no such file".to_owned(),
        }
    }

    #[test]
    fn rows_come_back_in_order_and_the_hash_is_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let rows: Vec<Reject> = (0..10_000).map(reject).collect();
        let mut writer = TableWriter::new(
            folder.path(),
            "rejects/a",
            Reject::schema(),
            &[("by", "us".to_owned())],
        );
        writer.write(&Reject::to_batch(&rows)).unwrap();
        let records = writer.finish().unwrap();
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].rows, 10_000);
        let path = folder.path().join(&records[0].file);
        let bytes = fs::read(&path).unwrap();
        assert_eq!(records[0].bytes, bytes.len() as u64);
        assert_eq!(records[0].sha256, super::super::digest(&bytes));
        assert_eq!(read_file::<Reject>(&path).unwrap(), rows);
    }

    #[test]
    fn the_round_is_a_column_of_the_file_and_not_of_what_is_read_here() {
        let folder = tempfile::tempdir().unwrap();
        let reward = Reward {
            row_key: "k".to_owned(),
            prompt_id: "p".to_owned(),
            candidate: 0,
            judge: "judge".to_owned(),
            reward: 0.5,
            reply: None,
            label: None,
            first_score: None,
            second_score: None,
            failure: None,
        };
        let rows = Reward::to_batch(&[reward]);
        let writer = TableWriter::new(folder.path(), "a", rows.schema(), &[]);
        let mut writer = writer.in_round(Some(3));
        writer.write(&rows).unwrap();
        let file = writer.finish().unwrap().remove(0).file;
        let path = folder.path().join(file);

        let mut read = TableReader::new(vec![path.clone()]);
        assert_eq!(read.next().unwrap().unwrap().columns(), rows.columns());
        assert_eq!(schema_of_file(&path).unwrap(), rows.schema());
        let all = open(&path)
            .unwrap()
            .build()
            .unwrap()
            .next()
            .unwrap()
            .unwrap();
        let rounds = all.column_by_name("round").unwrap();
        assert_eq!(rounds.as_ref(), &Int32Array::from_value(3, 1));
    }

    #[test]
    fn a_writer_without_rows_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let writer = TableWriter::new(folder.path(), "rejects/a", Reject::schema(), &[]);
        assert!(writer.finish().unwrap().is_empty());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
