//! Early stopping: evaluates `rounds.stop_when` after a round.

use arrow::array::{Array, AsArray};

use super::runner::{Runner, note_once};
use crate::config::Plan;
use crate::stages::Failure;
use ovchat_data::store::RunFolder;
use ovchat_data::tables::{Health, Row};
use ovchat_query::{self as query, Param, Part, QueryTable};

/// Evaluates the plan's `stop_when` after a round, over the tables of `folder` up to that round.
pub fn ends(
    plan: &Plan,
    folder: &RunFolder,
    round: u32,
    stopping: impl Fn() -> bool,
) -> Result<bool, Failure> {
    let Some(sql) = &plan.stop_when else {
        return Ok(false);
    };
    let mut tables = tables_up_to(plan, folder, round);
    if !tables.iter().any(|table| table.name == Health::KIND) {
        let made = folder.manifest().made.iter();
        let made = made.filter(|made| made.table == Health::KIND && made.complete);
        let made = made.filter(|made| made.round.is_some_and(|of| of <= round));
        tables.push(QueryTable {
            name: Health::KIND.to_owned(),
            schema: Health::schema(),
            files: made
                .map(|made| (made.round, folder.checked(made.files())))
                .collect(),
            with_round: true,
        });
    }
    let params = [("round", Param::Integer(round.into()))];
    let mut answers = Vec::new();
    query::stream(
        sql,
        &params,
        &tables,
        &[],
        None,
        |part| -> Result<(), Failure> {
            if stopping() {
                return Err(Failure::Interrupted);
            }
            let Part::Rows(batch) = part else {
                return Ok(());
            };
            let flags = batch
                .column(0)
                .as_boolean_opt()
                .filter(|_| batch.num_columns() == 1);
            let flags = flags.ok_or_else(|| {
                Failure::Other("`rounds.stop_when` must return a single boolean column".to_owned())
            })?;
            answers.extend((0..flags.len()).map(|row| flags.is_valid(row) && flags.value(row)));
            Ok(())
        },
    )?;
    match answers[..] {
        [answer] => Ok(answer),
        [] => Ok(false),
        _ => Err(Failure::Other(format!(
            "`rounds.stop_when` returned {} rows after round {round}, expected one: aggregate the \
             rows into one, such as `select max(reward) > 0.9 from rewards where round = $round`",
            answers.len()
        ))),
    }
}

/// Returns the tables of a plan as they are after a round, with the column `round` if they have rounds.
pub(super) fn tables_up_to(plan: &Plan, folder: &RunFolder, round: u32) -> Vec<QueryTable> {
    let mut tables = Vec::new();
    for stage in plan.all() {
        let made = folder.manifest().made.iter();
        let mut files: Vec<_> = made
            .filter(|made| made.table == stage.name.as_str() && made.complete)
            .filter(|made| made.round.is_none_or(|of| of <= round))
            .map(|made| (made.round, folder.table_files(&made.table, made.round)))
            .collect();
        files.sort_by_key(|(round, _)| *round);
        tables.push(QueryTable {
            name: stage.name.to_string(),
            schema: stage.schema.clone(),
            files,
            with_round: !stage.is_static,
        });
    }
    tables
}

impl Runner<'_> {
    /// True if `rounds.stop_when` ends the rounds with this one.
    pub(super) fn is_last(&mut self, round: u32) -> Result<bool, Failure> {
        let interrupt = self.interrupt;
        let is_last = ends(self.plan, &self.folder, round, || interrupt.raised())?;
        let words = format!("stopping after round {round}: `rounds.stop_when` is true");
        if is_last {
            note_once(&mut self.said, self.report, &words);
        }
        Ok(is_last)
    }
}
