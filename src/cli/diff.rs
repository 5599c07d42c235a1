//! `pipeline diff`: compare two runs.

use std::path::PathBuf;

use arrow::array::{Array, AsArray};
use arrow::datatypes::Int64Type;
use clap::Args;
use serde_json::{Value, json};

use super::failed::Failed;
use super::file::{read_run, run_folder};
use super::out::{Output, line};
use ovchat_data::store::{RunFolder, TableVersion};
use ovchat_data::tables::Pair;
use ovchat_data::tables::Row as _;
use ovchat_pipeline::run::{Reason, explain};
use ovchat_query::{self as query, QueryTable};

/// Compare the settings, rows and pairs of two runs, table by table.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline diff runs/small-world runs/small-world-fork-2\n  \
    pipeline diff first second --format json"
)]
pub struct Diff {
    /// The first run: its folder, or its name below runs/.
    a: PathBuf,
    /// The second run.
    b: PathBuf,
    #[command(flatten)]
    output: Output,
}

/// A table in a round, in one run or both.
struct Compared<'a> {
    table: &'a str,
    round: Option<u32>,
    rows: [Option<u64>; 2],
    /// The number of rows with the same key, if the tables have keys.
    shared: Option<u64>,
    /// The number of prompts that have pairs in both runs, and of those whose pairs differ.
    pairs: Option<[u64; 2]>,
    reasons: Vec<Reason>,
}

impl Diff {
    pub fn run(&self) -> Result<(), Failed> {
        let folders = [&self.a, &self.b].map(|run| run_folder(run));
        let a = read_run(&folders[0])?;
        let b = read_run(&folders[1])?;
        let mut slots: Vec<(&str, Option<u32>)> = Vec::new();
        for made in a.manifest().made.iter().chain(&b.manifest().made) {
            let slot = (made.table.as_str(), made.round);
            if !slots.contains(&slot) {
                slots.push(slot);
            }
        }
        // Static tables first, then round by round; within a round in build order.
        slots.sort_by_key(|(_, round)| *round);
        let mut compared = Vec::new();
        for (table, round) in slots {
            compared.push(compare(&a, &b, table, round)?);
        }
        if self.output.is_json() {
            let tables: Vec<Value> = compared.iter().map(Compared::to_json).collect();
            let json = json!({ "a": folders[0], "b": folders[1], "tables": tables });
            return line(format_args!("{json:#}"));
        }
        line(format_args!(
            "{:<22} {:>5} {:>9} {:>9} {:>9}  differences",
            "table", "round", "rows of a", "rows of b", "shared"
        ))?;
        for one in &compared {
            one.print()?;
        }
        Ok(())
    }
}

fn compare<'a>(
    a: &'a RunFolder,
    b: &'a RunFolder,
    table: &'a str,
    round: Option<u32>,
) -> Result<Compared<'a>, Failed> {
    let both = [a, b].map(|run| run.manifest().find(table, round));
    let rows = both.map(|made| made.map(TableVersion::rows));
    let mut compared = Compared {
        table,
        round,
        rows,
        shared: None,
        pairs: None,
        reasons: Vec::new(),
    };
    let [Some(of_a), Some(of_b)] = both else {
        return Ok(compared);
    };
    if of_a.key == of_b.key && of_a.content == of_b.content {
        compared.shared = rows[0];
        return Ok(compared);
    }
    compared.reasons = explain(&of_a.because, &of_b.because);
    let mut tables = Vec::new();
    for (name, run) in [("a", a), ("b", b)] {
        let Some(schema) = run.schema(table, round)? else {
            return Ok(compared);
        };
        if schema.field_with_name("row_key").is_err() {
            return Ok(compared);
        }
        tables.push(QueryTable {
            name: name.to_owned(),
            schema,
            files: vec![(None, run.table_files(table, round))],
            with_round: false,
        });
    }
    compared.shared = numbers(include_str!("diff.sql"), &tables)?.first().copied();
    if of_a.kind.as_deref() == Some(Pair::KIND) {
        let found = numbers(include_str!("diff_pairs.sql"), &tables)?;
        compared.pairs = found.try_into().ok();
    }
    Ok(compared)
}

/// Returns the numbers in a query's only row.
fn numbers(sql: &str, tables: &[QueryTable]) -> Result<Vec<u64>, Failed> {
    let mut numbers = Vec::new();
    query::run(sql, &[], tables, &[], None, |batch| -> Result<(), Failed> {
        for column in batch.columns().iter().filter(|column| !column.is_empty()) {
            numbers.push(column.as_primitive::<Int64Type>().value(0).cast_unsigned());
        }
        Ok(())
    })?;
    Ok(numbers)
}

impl Compared<'_> {
    fn to_json(&self) -> Value {
        let reasons: Vec<String> = self.reasons.iter().map(ToString::to_string).collect();
        json!({
            "table": self.table, "round": self.round, "rows": self.rows, "shared": self.shared,
            "pairs": self.pairs.map(|[prompts, other]| json!({ "prompts": prompts, "other": other })),
            "reasons": reasons,
        })
    }

    fn print(&self) -> Result<(), Failed> {
        let or_none =
            |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
        let round = self
            .round
            .map_or_else(|| "-".to_owned(), |round| round.to_string());
        let mut words: Vec<String> = match self.rows {
            [None, _] => vec!["only in b".to_owned()],
            [_, None] => vec!["only in a".to_owned()],
            _ => self.reasons.iter().map(ToString::to_string).collect(),
        };
        if let Some([prompts, other]) = self.pairs {
            words.push(format!("{other} of {prompts} prompts have different pairs"));
        }
        let [a, b] = self.rows.map(or_none);
        let text = format!(
            "{:<22} {round:>5} {a:>9} {b:>9} {:>9}  {}",
            self.table,
            or_none(self.shared),
            words.join("; ")
        );
        line(text.trim_end())
    }
}
