//! The columns of a chart's view, and texts in markup.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};

use crate::failed::Failed;

/// Returns the values of a numeric column; `None` if there is no such column.
pub fn numbers(rows: &[RecordBatch], name: &str) -> Result<Option<Vec<Option<f64>>>, Failed> {
    let mut all = Vec::new();
    for batch in rows {
        let Some(column) = batch.column_by_name(name) else {
            return Ok(None);
        };
        let numbers = cast(column, &DataType::Float64)?;
        if numbers.null_count() > column.null_count() {
            let problem = format!("the chart's column `{name}` is not numeric");
            return Err(Failed::Words(problem));
        }
        all.extend(numbers.as_primitive::<Float64Type>().iter());
    }
    Ok(Some(all))
}

/// Returns the values of a column as texts; `None` if there is no such column.
pub fn texts(rows: &[RecordBatch], name: &str) -> Result<Option<Vec<Option<String>>>, Failed> {
    let mut all = Vec::new();
    for batch in rows {
        let Some(column) = batch.column_by_name(name) else {
            return Ok(None);
        };
        let texts = cast(column, &DataType::Utf8)?;
        let texts = texts.as_string::<i32>().iter();
        all.extend(texts.map(|text| text.map(str::to_owned)));
    }
    Ok(Some(all))
}

/// The error about a column that a chart needs.
pub fn no_column(name: &str) -> Failed {
    Failed::Words(format!("the chart's column `{name}` does not exist"))
}

/// Returns a text with the characters of markup escaped.
pub fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\n' | '\t' => safe.push(character),
            other if other.is_control() => safe.push(char::REPLACEMENT_CHARACTER),
            other => safe.push(other),
        }
    }
    safe
}
