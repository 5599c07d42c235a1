//! Validation of untrusted Parquet files before decoding. A few bytes can declare billions of
//! values, and the parquet crate allocates memory for what is declared until the process is killed.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ::parquet::arrow::arrow_reader::{
    ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder, RowGroups,
};
use ::parquet::arrow::{ProjectionMask, parquet_to_arrow_field_levels};
use ::parquet::basic::{Encoding, Type};
use ::parquet::column::page::{Page, PageIterator, PageMetadata, PageReader};
use ::parquet::errors::{ParquetError, Result};
use ::parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use ::parquet::file::reader::{ChunkReader, FileReader, Length};
use ::parquet::file::serialized_reader::SerializedFileReader;
use ::parquet::schema::types::ColumnDescPtr;
use arrow::datatypes::{DataType, FieldRef};
use bytes::Bytes;

/// The maximum number of values in a file: a base that is always allowed, plus a number per byte of
/// the file.
const VALUES_MAX: u64 = 1 << 24;
const VALUES_A_BYTE: u64 = 32;

/// The maximum length of fixed-length values in bytes, or of fixed-size lists in items.
const LENGTH_MAX: i64 = 1 << 18;

/// The maximum length of a varint, in bytes.
const NUMBER_BYTES_MAX: usize = 10;

/// Returns a validating reader of some columns of an untrusted file.
pub(super) fn reader(
    file: File,
    builder: &ParquetRecordBatchReaderBuilder<File>,
    columns: ProjectionMask,
    batch_rows: usize,
) -> Result<ParquetRecordBatchReader> {
    let fields = builder.schema().fields();
    let schema = builder.parquet_schema();
    if schema.num_columns() == 0 {
        return Err(wrong("it has no columns"));
    }
    for column in schema.columns() {
        let length = i64::from(column.type_length());
        let is_fixed = column.physical_type() == Type::FIXED_LEN_BYTE_ARRAY;
        if is_fixed && !(0..=LENGTH_MAX).contains(&length) {
            return Err(wrong(format!("its column `{}` {TOO_LONG}", column.path())));
        }
    }
    for field in fields {
        if length(field.data_type()).is_none_or(|length| length > LENGTH_MAX) {
            return Err(wrong(format!("its column `{}` {TOO_LONG}", field.name())));
        }
    }
    let levels = parquet_to_arrow_field_levels(schema, columns, Some(fields))?;
    let values = VALUES_MAX.saturating_add(file.metadata()?.len().saturating_mul(VALUES_A_BYTE));
    let groups = Groups {
        file: Arc::new(SerializedFileReader::new(Whole(file))?),
        values: Arc::new(AtomicU64::new(values)),
    };
    ParquetRecordBatchReader::try_new_with_row_groups(&levels, &groups, batch_rows, None)
}

/// The end of the error message about a column beyond [`LENGTH_MAX`].
const TOO_LONG: &str = "has fixed-size lists or values that are too long";

fn wrong(problem: impl Into<String>) -> ParquetError {
    ParquetError::General(problem.into())
}

/// Returns the number of items and bytes that a null of this type takes, by the fixed lengths in
/// the schema; `None` on overflow.
fn length(data_type: &DataType) -> Option<i64> {
    let longest = |fields: &[FieldRef]| {
        let mut lengths = fields.iter().map(|field| length(field.data_type()));
        lengths.try_fold(1, |longest: i64, length| Some(longest.max(length?)))
    };
    match data_type {
        DataType::FixedSizeBinary(bytes) => Some(i64::from(*bytes).max(1)),
        DataType::FixedSizeList(item, count) => {
            length(item.data_type())?.checked_mul(i64::from(*count).max(1))
        }
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::Map(item, _) => length(item.data_type()),
        DataType::Struct(fields) => longest(fields),
        _ => Some(1),
    }
}

/// A file that fails on reads past its end. The parquet crate skips unknown fields of a page
/// header, and would do so a billion times at the end of a file.
struct Whole(File);

/// A [`Whole`] file from an offset on.
struct Rest(File);

impl Read for Rest {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 if !buffer.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }
}

impl Length for Whole {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Whole {
    type T = BufReader<Rest>;

    fn get_read(&self, start: u64) -> Result<Self::T> {
        let mut file = self.0.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(BufReader::new(Rest(file)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        self.0.get_bytes(start, length)
    }
}

/// The row groups of an untrusted file.
struct Groups {
    file: Arc<dyn FileReader>,
    /// The number of values that its pages may still contain.
    values: Arc<AtomicU64>,
}

impl RowGroups for Groups {
    fn num_rows(&self) -> usize {
        let groups = self.row_groups().map(RowGroupMetaData::num_rows);
        groups.fold(0, |sum: usize, rows| {
            sum.saturating_add(usize::try_from(rows).unwrap_or(0))
        })
    }

    fn column_chunks(&self, column: usize) -> Result<Box<dyn PageIterator>> {
        let schema = self.metadata().file_metadata().schema_descr();
        Ok(Box::new(Chunks {
            column: schema.column(column),
            chunks: self.file.column_chunks(column)?,
            values: Arc::clone(&self.values),
        }))
    }

    fn row_groups(&self) -> Box<dyn Iterator<Item = &RowGroupMetaData> + '_> {
        self.file.row_groups()
    }

    fn metadata(&self) -> &ParquetMetaData {
        RowGroups::metadata(&self.file)
    }
}

/// The column chunks of a column, one per row group.
struct Chunks {
    column: ColumnDescPtr,
    chunks: Box<dyn PageIterator>,
    values: Arc<AtomicU64>,
}

impl Iterator for Chunks {
    type Item = Result<Box<dyn PageReader>>;

    fn next(&mut self) -> Option<Self::Item> {
        let pages = match self.chunks.next()? {
            Ok(pages) => pages,
            Err(error) => return Some(Err(error)),
        };
        Some(Ok(Box::new(Pages {
            column: Arc::clone(&self.column),
            pages,
            values: Arc::clone(&self.values),
        })))
    }
}

impl PageIterator for Chunks {}

/// The pages of a column chunk.
struct Pages {
    column: ColumnDescPtr,
    pages: Box<dyn PageReader>,
    values: Arc<AtomicU64>,
}

impl Iterator for Pages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        if let Some(page) = &page {
            self.look_at(page)?;
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        self.pages.at_record_boundary()
    }
}

impl Pages {
    /// Fails if a page declares more values than it can contain.
    fn look_at(&self, page: &Page) -> Result<()> {
        let count = u64::from(page.num_values());
        let path = self.column.path();
        let taken = |left: u64| left.checked_sub(count);
        let order = Ordering::Relaxed;
        if self.values.fetch_update(order, order, taken).is_err() {
            return Err(wrong(format!(
                "its columns up to `{path}` declare more values than a file of its size can contain"
            )));
        }
        let is_intact = match page.encoding() {
            Encoding::DELTA_BINARY_PACKED | Encoding::DELTA_LENGTH_BYTE_ARRAY => self
                .values_of(page)
                .and_then(Deltas::read)
                .is_some_and(|deltas| deltas.count <= count),
            // The lengths of the prefixes shared with the previous value, then the lengths of the
            // suffixes.
            Encoding::DELTA_BYTE_ARRAY => {
                let shared = self.values_of(page).and_then(Deltas::read);
                let rest = shared.as_ref().and_then(Deltas::behind);
                let rest = rest.and_then(Deltas::read);
                [shared, rest]
                    .iter()
                    .all(|deltas| deltas.as_ref().is_some_and(|deltas| deltas.count <= count))
            }
            _ => true,
        };
        if is_intact {
            Ok(())
        } else {
            Err(wrong(format!(
                "a page of its column `{path}` does not contain the {count} values that it declares"
            )))
        }
    }

    /// Returns the values of a page, which follow its repetition and definition levels.
    fn values_of<'p>(&self, page: &'p Page) -> Option<&'p [u8]> {
        match page {
            Page::DictionaryPage { buf, .. } => Some(buf),
            Page::DataPageV2 {
                buf,
                def_levels_byte_len,
                rep_levels_byte_len,
                ..
            } => buf.get(def_levels_byte_len.checked_add(*rep_levels_byte_len)? as usize..),
            Page::DataPage {
                buf,
                num_values,
                def_level_encoding,
                rep_level_encoding,
                ..
            } => {
                let mut rest: &[u8] = buf;
                for (most, encoding) in [
                    (self.column.max_rep_level(), rep_level_encoding),
                    (self.column.max_def_level(), def_level_encoding),
                ] {
                    if most == 0 {
                        continue;
                    }
                    let length = if *encoding == Encoding::RLE {
                        let (length, behind) = rest.split_first_chunk()?;
                        rest = behind;
                        u32::from_le_bytes(*length) as usize
                    } else {
                        let bits = i16::BITS - most.leading_zeros();
                        (u64::from(*num_values) * u64::from(bits)).div_ceil(8) as usize
                    };
                    rest = rest.get(length..)?;
                }
                Some(rest)
            }
        }
    }
}

/// Delta-encoded integers: blocks of miniblocks (`parts`), each with its own bit width.
struct Deltas<'p> {
    count: u64,
    parts: u64,
    part_count: u64,
    blocks: &'p [u8],
}

impl<'p> Deltas<'p> {
    /// Reads the header.
    fn read(mut bytes: &'p [u8]) -> Option<Self> {
        let [block_count, parts, count, _first] = [(); 4].map(|()| number(&mut bytes));
        let (block_count, parts) = (block_count?, parts?);
        let part_count = block_count.checked_div(parts)?;
        (part_count > 0).then_some(Self {
            count: count?,
            parts,
            part_count,
            blocks: bytes,
        })
    }

    /// Returns the bytes after the last block.
    fn behind(&self) -> Option<&'p [u8]> {
        let mut rest = self.blocks;
        // The first value is in the header.
        let mut left = self.count.saturating_sub(1);
        while left > 0 {
            number(&mut rest)?;
            let (widths, behind) = rest.split_at_checked(usize::try_from(self.parts).ok()?)?;
            rest = behind;
            for width in widths {
                if left == 0 {
                    break;
                }
                let bytes = self.part_count.checked_mul(u64::from(*width))? / 8;
                rest = rest.get(usize::try_from(bytes).ok()?..)?;
                left = left.saturating_sub(self.part_count);
            }
        }
        Some(rest)
    }
}

/// Reads a varint: seven bits per byte, lowest first.
fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for place in 0..NUMBER_BYTES_MAX {
        let (byte, behind) = bytes.split_first()?;
        *bytes = behind;
        number |= u64::from(byte & 0x7f).checked_shl(7 * place as u32)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}
