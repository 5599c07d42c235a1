//! Charts of a report's views: lines and bars as SVG, and examples as a page.

mod bars;
mod columns;
mod examples;
mod lines;

pub use columns::escaped;

use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;

use super::failed::Failed;
use ovchat_data::store::{RunFolder, write_atomically};
use ovchat_pipeline::config::Chart;
use ovchat_pipeline::stages::TableName;

/// Writes the chart of a view into a folder. Returns the files.
pub fn write(
    run: &RunFolder,
    folder: &Path,
    name: &TableName,
    rows: &[RecordBatch],
    chart: &Chart,
) -> Result<Vec<PathBuf>, Failed> {
    let files: Vec<(&str, String)> = match chart {
        Chart::Lines(chart) => {
            let panels = lines::panels(rows, chart)?;
            let svg =
                lines::draw(&panels).map_err(|error| Failed::Words(format!("{name}: {error}")))?;
            vec![("svg", svg)]
        }
        Chart::Bars(chart) => {
            let results = bars::results(name.as_str(), rows)?;
            bars::refuse_mixed_judges(name.as_str(), &results, chart.mixed_judges)?;
            vec![("svg", bars::draw(&results)), ("md", bars::table(&results))]
        }
        Chart::Examples => vec![("html", examples::page(run, name, rows)?)],
    };
    let write = |(ending, text): (&str, String)| {
        let path = folder.join(format!("{name}.{ending}"));
        write_atomically(&path, text.as_bytes())?;
        Ok(path)
    };
    files.into_iter().map(write).collect()
}
