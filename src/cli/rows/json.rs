//! Values as JSON: arrow-json, except for non-finite numbers and bytes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{DataType, FieldRef, Float16Type, Float32Type, Float64Type};
use arrow::error::ArrowError;
use arrow::json::writer::{Encoder, EncoderFactory, EncoderOptions, NullableEncoder, make_encoder};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use clap::ValueEnum;

use crate::failed::Failed;

/// The treatment of NaN and infinities in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Nan {
    /// Fail with an error.
    Error,
    /// Write the strings "NaN", "inf" and "-inf".
    Text,
}

/// The encoders of values that arrow-json would write as null (NaN, infinities) or as hex (bytes).
#[derive(Debug, Clone)]
pub struct Cells {
    nan: Nan,
    /// Set on a non-finite number if `nan` does not allow them: an encoder cannot fail.
    has_non_finite: Arc<AtomicBool>,
}

impl Cells {
    pub fn new(nan: Nan) -> Self {
        let has_non_finite = Arc::default();
        Self {
            nan,
            has_non_finite,
        }
    }

    /// Returns true if there was a non-finite number since the last call.
    pub fn take_non_finite(&self) -> bool {
        self.has_non_finite.swap(false, Ordering::Relaxed)
    }
}

impl EncoderFactory for Cells {
    fn make_default_encoder<'a>(
        &self,
        field: &'a FieldRef,
        array: &'a dyn Array,
        _options: &'a EncoderOptions,
    ) -> Result<Option<NullableEncoder<'a>>, ArrowError> {
        let bytes = |of: Box<dyn Fn(usize) -> &'a [u8] + 'a>| -> Box<dyn Encoder + 'a> {
            Box::new(Base64(of))
        };
        let encoder = match array.data_type() {
            DataType::Float16 => {
                let values = array.as_primitive::<Float16Type>();
                self.number(field, array, move |row| values.value(row).to_f64())?
            }
            DataType::Float32 => {
                let values = array.as_primitive::<Float32Type>();
                self.number(field, array, move |row| values.value(row).into())?
            }
            DataType::Float64 => {
                let values = array.as_primitive::<Float64Type>();
                self.number(field, array, move |row| values.value(row))?
            }
            DataType::Binary => bytes(Box::new(|row| array.as_binary::<i32>().value(row))),
            DataType::LargeBinary => bytes(Box::new(|row| array.as_binary::<i64>().value(row))),
            DataType::BinaryView => bytes(Box::new(|row| array.as_binary_view().value(row))),
            DataType::FixedSizeBinary(_) => {
                bytes(Box::new(|row| array.as_fixed_size_binary().value(row)))
            }
            _ => return Ok(None),
        };
        Ok(Some(NullableEncoder::new(encoder, array.nulls().cloned())))
    }
}

impl Cells {
    fn number<'a>(
        &self,
        field: &'a FieldRef,
        array: &'a dyn Array,
        value: impl Fn(usize) -> f64 + 'a,
    ) -> Result<Box<dyn Encoder + 'a>, ArrowError> {
        /// The default options of arrow-json, for finite numbers.
        static PLAIN: LazyLock<EncoderOptions> = LazyLock::new(EncoderOptions::default);
        Ok(Box::new(Number {
            value,
            finite: make_encoder(field, array, &PLAIN)?,
            cells: self.clone(),
        }))
    }
}

struct Number<'a, V> {
    value: V,
    finite: NullableEncoder<'a>,
    cells: Cells,
}

impl<V: Fn(usize) -> f64> Encoder for Number<'_, V> {
    fn encode(&mut self, row: usize, out: &mut Vec<u8>) {
        let value = (self.value)(row);
        if value.is_finite() {
            self.finite.encode(row, out);
            return;
        }
        if self.cells.nan == Nan::Error {
            self.cells.has_non_finite.store(true, Ordering::Relaxed);
        }
        out.extend_from_slice(format!("\"{value}\"").as_bytes());
    }
}

struct Base64<'a>(Box<dyn Fn(usize) -> &'a [u8] + 'a>);

impl Encoder for Base64<'_> {
    fn encode(&mut self, row: usize, out: &mut Vec<u8>) {
        let text = BASE64_STANDARD.encode((self.0)(row));
        out.extend_from_slice(format!("\"{text}\"").as_bytes());
    }
}

/// Returns the error for the first non-finite number of a batch. `first` is the number of rows
/// before the batch; `why` explains why the requested format cannot hold it.
pub fn non_finite(batch: &RecordBatch, first: usize, why: &str, formats: &str) -> Failed {
    let cells = Cells::new(Nan::Error);
    let options = EncoderOptions::default().with_encoder_factory(Arc::new(cells.clone()));
    let schema = batch.schema();
    let mut place = "a column".to_owned();
    'columns: for (field, column) in schema.fields().iter().zip(batch.columns()) {
        let Ok(mut encoder) = make_encoder(field, column, &options) else {
            continue;
        };
        for row in 0..batch.num_rows() {
            if !encoder.is_null(row) {
                encoder.encode(row, &mut Vec::new());
            }
            if cells.take_non_finite() {
                place = format!("column `{}` (row {})", field.name(), first + row + 1);
                break 'columns;
            }
        }
    }
    Failed::Words(format!(
        "{place} has NaN or an infinity{why}: write it as text with `--nan text`, use {formats}, or exclude such \
         rows in the query"
    ))
}
