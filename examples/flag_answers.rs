//! A program for an `exec` stage: flags answers that are refusals.
//!
//! Reads candidates as an Arrow IPC stream and writes `prompt_id`, `candidate` and `refuses`. In
//! Python, use `pyarrow.ipc.open_stream(sys.stdin.buffer)` and
//! `pyarrow.ipc.new_stream(sys.stdout.buffer, schema)`.

use std::error::Error;
use std::io::{BufReader, BufWriter};
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BooleanArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::StreamWriter;

/// The prefixes of refusals.
const PHRASES: [&str; 3] = ["sorry", "i can't", "i cannot"];

fn main() -> Result<(), Box<dyn Error>> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("prompt_id", DataType::Utf8, true),
        Field::new("candidate", DataType::Int32, true),
        Field::new("refuses", DataType::Boolean, true),
    ]));
    let candidates = StreamReader::try_new(BufReader::new(std::io::stdin()), None)?;
    let mut flags = StreamWriter::try_new(BufWriter::new(std::io::stdout()), &schema)?;
    for batch in candidates {
        let batch = batch?;
        let column = |name: &str| batch.column_by_name(name).cloned().ok_or(name.to_owned());
        let texts = column("text")?;
        let refuses: BooleanArray = texts
            .as_string::<i32>()
            .iter()
            .map(|text| {
                let text = text?.to_lowercase();
                Some(PHRASES.iter().any(|phrase| text.starts_with(phrase)))
            })
            .collect();
        let columns: Vec<ArrayRef> = vec![
            column("prompt_id")?,
            column("candidate")?,
            Arc::new(refuses),
        ];
        flags.write(&RecordBatch::try_new(schema.clone(), columns)?)?;
    }
    flags.finish()?;
    Ok(())
}
