//! A judge that scores responses with an SQL expression.

use arrow::array::AsArray;
use arrow::datatypes::Float64Type;

use ovchat_data::tables::{Judged, Row};
use ovchat_models::{
    AnswerGroup, Emit, Judge, JudgeScore, ModelError, ModelTelemetry, RowFault, SqlReward,
};
use ovchat_query as query;

/// Scores responses with an SQL expression over the columns of [`Judged`].
pub struct SqlJudge {
    sql: String,
}

impl SqlJudge {
    pub fn new(spec: &SqlReward) -> Self {
        Self { sql: spec.sql() }
    }
}

impl Judge for SqlJudge {
    fn score(
        &mut self,
        groups: &[AnswerGroup<'_>],
        emit: Emit<'_, Vec<JudgeScore>>,
    ) -> Result<ModelTelemetry, ModelError> {
        let failed = |problem: String| ModelError::Torch {
            what: "the expression `reward`".to_owned(),
            problem,
        };
        let rows = Judged::to_batch(&rows_of(groups));
        let found = query::over(&self.sql, &[], [(SqlReward::TABLE, vec![rows])]);
        let found = found.map_err(|error| failed(error.to_string()))?;
        let mut rewards: Vec<Option<f64>> = Vec::new();
        for batch in &found {
            let column = batch.column(1).as_primitive::<Float64Type>();
            rewards.extend(column.iter());
        }
        let mut first = 0;
        for (index, group) in groups.iter().enumerate() {
            let own = &rewards[first..first + group.answers.len()];
            first += group.answers.len();
            let missing = own
                .iter()
                .position(|reward| !reward.is_some_and(|reward| (reward as f32).is_finite()));
            let scores = match missing {
                Some(answer) => Err(RowFault(format!(
                    "`reward` is not a finite number for answer {answer}: {}",
                    own[answer].map_or_else(|| "null".to_owned(), |reward| reward.to_string())
                ))),
                None => Ok(own
                    .iter()
                    .map(|reward| JudgeScore::of(reward.unwrap_or_default() as f32))
                    .collect()),
            };
            if emit(index, scores).is_break() {
                break;
            }
        }
        Ok(ModelTelemetry::default())
    }

    fn plan(&self) -> Option<String> {
        None
    }
}

/// Returns the responses as rows of the table that the expression reads.
fn rows_of(groups: &[AnswerGroup<'_>]) -> Vec<Judged> {
    let mut rows = Vec::new();
    for group in groups {
        for (number, text) in group.answers.iter().enumerate() {
            rows.push(Judged {
                row: rows.len() as i64,
                prompt_id: group.prompt.id.clone(),
                candidate: group.numbers.get(number).copied().unwrap_or(number as i32),
                text: (*text).to_owned(),
                question: group.prompt.written_question(),
                answer: group.prompt.answer.clone(),
                captions: group.prompt.captions.clone(),
            });
        }
    }
    rows
}
