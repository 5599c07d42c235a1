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

/// The columns of the file; the first three are required.
const COLUMNS: [&str; 6] = ["benchmark", "model", "score", "family", "judge", "n"];

/// Returns the problem of a header that lacks a required column, or has one twice.
fn header_problem(header: &csv::StringRecord) -> Option<String> {
    let count = |name: &str| header.iter().filter(|column| *column == name).count();
    if let Some(missing) = COLUMNS[..3].iter().find(|name| count(name) == 0) {
        let there: Vec<&str> = header.iter().collect();
        return Some(format!(
            "the column `{missing}` is missing; the file has {}",
            there.join(", ")
        ));
    }
    let twice = COLUMNS.iter().find(|name| count(name) > 1)?;
    Some(format!("the column `{twice}` occurs twice"))
}

/// A line of the file; other columns are notes of its author.
#[derive(Debug)]
struct Line {
    benchmark: String,
    family: Option<String>,
    model: String,
    score: f64,
    judge: Option<String>,
    n: Option<i64>,
}

impl Line {
    fn of(header: &csv::StringRecord, record: &csv::StringRecord) -> Result<Self, String> {
        let field = |name: &str| {
            let place = header.iter().position(|column| column == name)?;
            record.get(place).filter(|text| !text.is_empty())
        };
        let needed = |name: &str| {
            let text = field(name).ok_or_else(|| format!("`{name}` is empty"))?;
            Ok::<_, String>(text.to_owned())
        };
        let text = needed("score")?;
        let score = text.parse().ok().filter(|score: &f64| score.is_finite());
        let n = field("n").map(|text| {
            let count = text.parse::<i64>();
            count.map_err(|_| format!("`n` is `{text}`, not an integer"))
        });
        Ok(Self {
            benchmark: needed("benchmark")?,
            family: field("family").map(str::to_owned),
            model: needed("model")?,
            score: score.ok_or_else(|| format!("`score` is `{text}`, not a finite number"))?,
            judge: field("judge").map(str::to_owned),
            n: n.transpose()?,
        })
    }
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
        let header = reader
            .headers()
            .map_err(|error| fails(", line 1".to_owned(), error.to_string()))?;
        let header = header.clone();
        if let Some(problem) = header_problem(&header) {
            return Err(fails(", line 1".to_owned(), problem));
        }
        let mut lines: Vec<Line> = Vec::new();
        for record in reader.records() {
            let record = record.map_err(|error| {
                let at = error.position().map(csv::Position::line);
                let place = at.map_or_else(String::new, |line| format!(", line {line}"));
                fails(place, without_position(&error))
            })?;
            let at = record.position().map_or(0, csv::Position::line);
            let fails = |problem| fails(format!(", line {at}"), problem);
            let line = Line::of(&header, &record).map_err(fails)?;
            let is_same = |other: &Line| {
                (&other.benchmark, &other.family, &other.model)
                    == (&line.benchmark, &line.family, &line.model)
            };
            if lines.iter().any(is_same) {
                return Err(fails(format!(
                    "a second score of `{}` on {}; name them differently, such as by `family`",
                    line.model, line.benchmark
                )));
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
        let family = line.family.clone();
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
            items: None,
            failures: None,
            judge: line.judge.clone(),
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
                "`score` is `x`, not a finite number",
            ),
            (
                "benchmark,model\nB,m\n",
                ", line 1",
                "the column `score` is missing; the file has benchmark, model",
            ),
            (
                "benchmark,model,score\nB,m\n",
                ", line 2",
                "2 fields, but the header has 3",
            ),
            (
                "benchmark,model,score,note\nB,m,1,x\nB,m,2,\n",
                ", line 3",
                "a second score of `m` on B",
            ),
            ("benchmark,model,score\n", "", "no results found"),
            (
                "benchmark,model,score\nB,m,inf\n",
                ", line 2",
                "`score` is `inf`, not a finite number",
            ),
        ] {
            let told = loaded(text).unwrap_err().to_string();
            assert!(told.contains(&format!("published.csv{place}: ")), "{told}");
            assert!(told.contains(problem), "{told}");
        }
    }
}
