//! Duplicate checks: a prompt may occur once in a table of prompts, an answer once in a table of
//! answers or rewards.
//!
//! Stages look rows up by these ids; a duplicate would be lost silently. The tables of built-in
//! stage types have no duplicates; those of a user's query or program may.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Int64Type, Schema};
use sha2::{Digest, Sha256};

use super::runner::Runner;
use crate::config::PlannedStage;
use crate::stages::{Failure, StageKind, TableName};
use ovchat_data::store::TableReader;
use ovchat_data::tables::{Candidate, Prompt, Reward, Row};

impl Runner<'_> {
    /// Fails if a stage would read a user-made table with duplicate rows. Training stages read row
    /// by row and allow duplicates.
    pub(super) fn refuse_repeated(
        &self,
        stage: &PlannedStage,
        round: Option<u32>,
    ) -> Result<(), Failure> {
        let spec = stage.spec.as_stage();
        if matches!(spec.work(), StageKind::Train(_)) {
            return Ok(());
        }
        for input in spec.inputs() {
            let Some(table) = input.table else { continue };
            let is_of_user = self
                .plan
                .stage(table)
                .is_some_and(|made| made.kind.is_none());
            let has_answers = match input.kind {
                Prompt::KIND => false,
                Candidate::KIND | Reward::KIND => true,
                _ => continue,
            };
            if is_of_user {
                self.refuse_repeated_in(stage, table, round, has_answers)?;
            }
        }
        Ok(())
    }

    fn refuse_repeated_in(
        &self,
        stage: &PlannedStage,
        table: &TableName,
        round: Option<u32>,
        has_answers: bool,
    ) -> Result<(), Failure> {
        let mut columns = vec![Field::new("prompt_id", DataType::Utf8, true)];
        if has_answers {
            columns.push(Field::new("candidate", DataType::Int64, true));
        }
        let columns = Arc::new(Schema::new(columns));
        let files = self
            .folder
            .files(table.as_str(), self.plan.round_of(table, round));
        let mut seen = HashSet::new();
        for batch in TableReader::new(files).only(columns) {
            for (prompt_id, candidate) in names(&batch?, has_answers) {
                if !seen.insert(digest(&prompt_id, candidate)) {
                    return Err(Failure::Other(repeated(
                        &stage.name,
                        table,
                        &prompt_id,
                        candidate,
                    )));
                }
            }
        }
        Ok(())
    }
}

/// The first 128 bits of the SHA-256 of a row's ids: 16 bytes per row in memory, however long the
/// ids are.
fn digest(prompt_id: &str, candidate: Option<i64>) -> [u8; 16] {
    let digest = Sha256::digest(format!("{candidate:?} {prompt_id}"));
    digest[..16].try_into().expect("a SHA-256 has 32 bytes")
}

/// Returns the ids of the rows: the prompt, and the number of the answer where the table has
/// answers.
fn names(rows: &RecordBatch, has_answers: bool) -> Vec<(String, Option<i64>)> {
    let column = |name: &str, to: &DataType| {
        let column = rows.column_by_name(name)?;
        cast(column, to).ok()
    };
    let ids = column("prompt_id", &DataType::Utf8).expect("the plan checked the columns");
    let numbers = has_answers
        .then(|| column("candidate", &DataType::Int64).expect("the plan checked the columns"));
    let numbers = numbers
        .as_ref()
        .map(|numbers| numbers.as_primitive::<Int64Type>());
    let ids = ids.as_string::<i32>();
    let name = |row| {
        let number = numbers.map(|numbers| numbers.value(row));
        (ids.value(row).to_owned(), number)
    };
    (0..ids.len()).map(name).collect()
}

fn repeated(
    stage: &TableName,
    table: &TableName,
    prompt_id: &str,
    candidate: Option<i64>,
) -> String {
    match candidate {
        None => format!(
            "`{table}` has several rows for prompt {prompt_id}, but `{stage}` needs one per prompt_id: use \
             `select distinct` in `{table}`, or select one row of each"
        ),
        Some(candidate) => format!(
            "`{table}` has several rows for candidate {candidate} of prompt {prompt_id}, but `{stage}` \
             needs one per prompt_id and candidate: use `select distinct` in `{table}`, select one row of \
             each, or renumber the candidates when combining tables"
        ),
    }
}
