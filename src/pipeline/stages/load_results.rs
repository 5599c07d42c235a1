//! The `load_results` stage: benchmark scores that others published.

use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    ComputeStage, Failure, Input, Stage, StageError, StageKind, TableName, WholeTables, join,
};
use ovchat_data::store::{Key, TableReader};
use ovchat_data::tables::{Measured, Row};
use ovchat_io::files;

/// Loads published benchmark scores, to stand beside measured ones. Reports mark them, because they
/// are of other judges.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadResults {
    /// A CSV file with the columns `benchmark`, `model` and `score`, and optionally `family`, `judge`
    /// and `n`; or a Parquet file (`.parquet`) with results of another run, which are not marked as
    /// published: `pipeline sql RUN "select * from results" --format parquet`.
    pub from: PathBuf,
    /// The model of a family that the others are compared with. Default: `base`.
    #[serde(default = "LoadResults::usual_base")]
    pub base: String,
}

impl LoadResults {
    fn usual_base() -> String {
        "base".to_owned()
    }
}

impl Stage for LoadResults {
    fn inputs(&self) -> Vec<Input<'_>> {
        Vec::new()
    }

    fn files(&self) -> Vec<(&'static str, &Path)> {
        vec![("from", &self.from)]
    }

    fn resolve(&mut self, folder: &dyn Fn(&str) -> PathBuf) {
        join(folder, "from", &mut self.from);
    }

    fn kind(&self) -> Option<&'static str> {
        Some(Measured::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        Ok(Measured::schema())
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Compute(Box::new(self))
    }
}

/// A line of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    benchmark: String,
    #[serde(default)]
    family: Option<String>,
    model: String,
    score: f64,
    #[serde(default)]
    judge: Option<String>,
    #[serde(default)]
    n: Option<i64>,
}

impl ComputeStage for &LoadResults {
    fn compute(&self, _: &WholeTables<'_>) -> Result<RecordBatch, Failure> {
        let fails = |place: String, problem: String| Failure::Input {
            path: self.from.clone(),
            place,
            problem,
        };
        if self.from.extension() == Some("parquet".as_ref()) {
            let mut rows: Vec<Measured> = Vec::new();
            for batch in TableReader::of_others(&self.from)? {
                rows.extend(Measured::from_batch(&batch?)?);
            }
            return Ok(Measured::to_batch(&rows));
        }
        let text = files::read_to_string(&self.from)
            .map_err(|error| fails(String::new(), format!("cannot be read: {error}")))?;
        let mut reader = csv::ReaderBuilder::new()
            .trim(csv::Trim::All)
            .from_reader(text.as_bytes());
        let mut lines: Vec<Line> = Vec::new();
        for line in reader.deserialize() {
            let line: Line = line.map_err(|error| {
                let at = error.position().map(csv::Position::line);
                let place = at.map_or_else(String::new, |line| format!(", line {line}"));
                fails(place, without_position(&error))
            })?;
            if !line.score.is_finite() {
                let problem = format!("the score of `{}` is not a finite number", line.model);
                return Err(fails(String::new(), problem));
            }
            lines.push(line);
        }
        if lines.is_empty() {
            return Err(fails(String::new(), "no results found".to_owned()));
        }
        let rows: Vec<Measured> = lines.iter().map(|line| self.row(line, &lines)).collect();
        Ok(Measured::to_batch(&rows))
    }
}

/// Returns the message of an error without its position, which stands beside it.
fn without_position(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::Deserialize { err, .. } => err.to_string(),
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => {
            format!("{len} fields, but the header has {expected_len}")
        }
        _ => error.to_string(),
    }
}

impl LoadResults {
    fn row(&self, line: &Line, lines: &[Line]) -> Measured {
        let is_base = |other: &&Line| {
            (&other.benchmark, &other.family) == (&line.benchmark, &line.family)
                && other.model == self.base
        };
        let base = lines
            .iter()
            .find(is_base)
            .filter(|_| line.model != self.base);
        let family = line.family.clone().filter(|family| !family.is_empty());
        let key = Key::new("published")
            .with(&line.benchmark)
            .with(&line.model);
        let key = key.with(family.as_deref().unwrap_or_default());
        Measured {
            row_key: key.with(line.score.to_le_bytes()).finish(),
            benchmark: line.benchmark.clone(),
            family,
            model: line.model.clone(),
            metric: "score".to_owned(),
            category: None,
            score: Some(line.score),
            n: line.n,
            failures: None,
            judge: line.judge.clone().filter(|judge| !judge.is_empty()),
            rules: None,
            base: base.map(|base| base.model.clone()),
            delta: base.map(|base| line.score - base.score),
            delta_se: None,
            delta_low: None,
            delta_high: None,
            pairs: None,
            clusters: None,
            is_published: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, stage};
    use super::*;

    fn loaded(text: &str) -> Result<Vec<Measured>, Failure> {
        let mut pipeline = TestPipeline::new();
        let from = pipeline.file("published.csv", text);
        let rows = pipeline.compute(&stage::<LoadResults>(json!({"from": from})))?;
        Ok(Measured::from_batch(&rows).unwrap())
    }

    /// The ten gains that the source states beside its table.
    #[test]
    fn the_gains_of_the_source_are_those_of_its_table() {
        let table = include_str!("../../../pipelines/benchmarks/published.csv");
        let rows = loaded(table).unwrap();
        let gain = |family: &str, benchmark: &str| {
            let is_it = |row: &&Measured| {
                row.family.as_deref() == Some(family)
                    && row.benchmark == benchmark
                    && row.model == "chat"
            };
            rows.iter().find(is_it).and_then(|row| row.delta).unwrap()
        };
        let benchmarks = [
            "WildVision",
            "LLaVA-W",
            "LLaVA-Wilder",
            "LiveBench",
            "Video Detailed Description",
        ];
        for (family, gains) in [
            ("7b", [13.3, 9.6, 3.8, 7.4, 0.12]),
            ("72b", [18.3, 10.9, 3.9, 7.0, 0.26]),
        ] {
            for (benchmark, expected) in benchmarks.iter().zip(gains) {
                let found = gain(family, benchmark);
                assert!(
                    (found - expected).abs() < 1e-9,
                    "{family} {benchmark}: {found}"
                );
            }
        }
        let other = rows.iter().find(|row| row.model == "GPT-4V").unwrap();
        assert_eq!(
            (other.family.as_deref(), other.delta, other.is_published),
            (None, None, true)
        );
    }

    #[test]
    fn results_of_another_run_stay_as_they_are() {
        let mut pipeline = TestPipeline::new();
        let row = Measured {
            is_published: false,
            failures: Some(3),
            ..loaded("benchmark,model,score,n\nB,chat,1.5,60\n")
                .unwrap()
                .remove(0)
        };
        pipeline.table("results", std::slice::from_ref(&row));
        let from = pipeline.root().join("results.parquet");
        let rows = pipeline
            .compute(&stage::<LoadResults>(json!({"from": from})))
            .unwrap();
        assert_eq!(Measured::from_batch(&rows).unwrap(), [row]);
    }

    #[test]
    fn a_line_that_cannot_be_read_is_named() {
        for (text, place, problem) in [
            (
                "benchmark,model,score\nB,m,x\n",
                ", line 2",
                "invalid float literal",
            ),
            (
                "benchmark,model\nB,m\n",
                ", line 2",
                "missing field `score`",
            ),
            (
                "benchmark,model,score\nB,m\n",
                ", line 2",
                "2 fields, but the header has 3",
            ),
            (
                "benchmark,model,score,note\nB,m,1,x\n",
                ", line 2",
                "unknown field `note`",
            ),
            ("benchmark,model,score\n", "", "no results found"),
            (
                "benchmark,model,score\nB,m,inf\n",
                "",
                "is not a finite number",
            ),
        ] {
            let told = loaded(text).unwrap_err().to_string();
            assert!(told.contains(&format!("published.csv{place}: ")), "{told}");
            assert!(told.contains(problem), "{told}");
        }
    }
}
