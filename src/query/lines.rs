//! JSON Lines files as a table. Corrupt lines, which are truncated or were written by another
//! program, are skipped.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow::json::ReaderBuilder;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::error::DataFusionError;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::PartitionStream;

use ovchat_data::store::LabelLine;
use ovchat_data::tables::{self, Row as _};
use ovchat_io::files::lines::Lines;

/// The number of lines per record batch.
const TOGETHER: usize = 1024;

/// Returns a table of JSON Lines files. They are read when a query scans the table.
pub fn table(schema: &SchemaRef, files: Vec<PathBuf>) -> Result<StreamingTable, DataFusionError> {
    let partition = JsonLines {
        schema: schema.clone(),
        files,
    };
    StreamingTable::try_new(schema.clone(), vec![Arc::new(partition)])
}

#[derive(Debug)]
struct JsonLines {
    schema: SchemaRef,
    files: Vec<PathBuf>,
}

impl PartitionStream for JsonLines {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        let schema = self.schema.clone();
        let is_of_labels = schema == tables::Label::schema();
        let files = self.files.clone().into_iter();
        let lines = files.flat_map(move |path| match is_of_labels {
            true => counting_lines(&path),
            false => lines(path),
        });
        let mut lines = lines.fuse();
        let batches = std::iter::from_fn(move || {
            let some: io::Result<Vec<Vec<u8>>> = lines.by_ref().take(TOGETHER).collect();
            match some {
                Ok(some) if some.is_empty() => None,
                Ok(some) => Some(Ok(rows(&schema, &some))),
                Err(error) => Some(Err(DataFusionError::IoError(error))),
            }
        });
        Box::pin(RecordBatchStreamAdapter::new(
            self.schema.clone(),
            futures::stream::iter(batches),
        ))
    }
}

/// Returns the labels in effect as lines, without retracted labels and earlier lines with the same
/// ID.
fn counting_lines(path: &Path) -> Box<dyn Iterator<Item = io::Result<Vec<u8>>> + Send> {
    let labels = match LabelLine::read(path) {
        Ok((labels, _)) => labels,
        Err(error) => return Box::new(std::iter::once(Err(io::Error::other(error)))),
    };
    let line = |label: LabelLine| Ok(serde_json::to_vec(&label)?);
    Box::new(labels.into_iter().map(line))
}

/// Returns the complete lines of a file.
fn lines(path: PathBuf) -> Box<dyn Iterator<Item = io::Result<Vec<u8>>> + Send> {
    match File::open(path) {
        Ok(file) => Box::new(Lines::new(BufReader::new(file))),
        Err(error) => Box::new(std::iter::once(Err(error))),
    }
}

/// Decodes lines into rows, skipping lines that are not valid rows.
fn rows(schema: &SchemaRef, lines: &[Vec<u8>]) -> RecordBatch {
    let decoded = |lines: &[Vec<u8>]| {
        let mut decoder = ReaderBuilder::new(schema.clone()).build_decoder().ok()?;
        let text = lines.join(&b'\n');
        let taken = decoder.decode(&text).ok()?;
        let rows = decoder.flush().ok()??;
        (taken == text.len() && rows.num_rows() == lines.len()).then_some(rows)
    };
    decoded(lines).unwrap_or_else(|| {
        let intact: Vec<RecordBatch> = lines.chunks(1).filter_map(decoded).collect();
        arrow::compute::concat_batches(schema, &intact).expect("they have one schema")
    })
}
