//! The `combine` stage: the rewards of several judges as one weighted sum.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Input, NonNegative, Query, Stage, StageError, StageKind, TableName};
use ovchat_data::tables::{Reward, Row};

/// Combines the rewards of several judges for the same candidates into a weighted sum. The reward
/// of a candidate that one of them did not score is NaN, so that selection stages reject its
/// prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Combine {
    /// The tables of rewards to combine, two or more.
    pub rewards: Vec<TableName>,
    /// The weight of each table, by name. Default: 1.
    #[serde(default)]
    pub weights: BTreeMap<TableName, NonNegative>,
    /// The normalization before the sum: none (`as_they_are`), or the z-score of a reward among the
    /// answers to its prompt (`by_prompt`) or among all rewards of its judge (`by_judge`).
    #[serde(default)]
    pub normalize: Normalize,
}

/// The normalization that makes rewards of different scales comparable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Normalize {
    AsTheyAre,
    #[default]
    ByPrompt,
    ByJudge,
}

impl Stage for Combine {
    fn inputs(&self) -> Vec<Input<'_>> {
        let input = |table| Input {
            field: "rewards",
            table: Some(table),
            needs: Reward::schema(),
            kind: Reward::KIND,
        };
        self.rewards.iter().map(input).collect()
    }

    fn kind(&self) -> Option<&'static str> {
        Some(Reward::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        if self.rewards.len() < 2 {
            let message = "fewer than two tables are listed".to_owned();
            return Err(StageError::at(
                "rewards",
                message,
                "list two or more tables of rewards",
            ));
        }
        let mut tables = self.rewards.iter().enumerate();
        if let Some((_, twice)) = tables.find(|(at, table)| self.rewards[..*at].contains(table)) {
            let message = format!("`{twice}` is listed twice");
            return Err(StageError::at(
                "rewards",
                message,
                "list it once, and set its weight under `weights`",
            ));
        }
        let mut weighed = self.weights.keys();
        if let Some(other) = weighed.find(|table| !self.rewards.contains(table)) {
            let message = format!("`{other}` has a weight but is not listed in `rewards`");
            return Err(StageError::at(
                "weights",
                message,
                "add it to `rewards`, or remove its weight",
            ));
        }
        if self.rewards.iter().all(|table| self.weight(table) == 0.0) {
            let message = "every weight is 0".to_owned();
            return Err(StageError::at(
                "weights",
                message,
                "set at least one weight above 0",
            ));
        }
        Ok(Reward::schema())
    }

    fn expected_rows(&self, input: u64) -> Option<u64> {
        Some(input)
    }

    /// Since version 2, a reward that is not a number does not affect those of other prompts.
    fn version(&self) -> String {
        match self.normalize {
            Normalize::ByJudge => "2".to_owned(),
            Normalize::AsTheyAre | Normalize::ByPrompt => "1".to_owned(),
        }
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Query(Query { sql: self.sql() })
    }
}

impl Combine {
    fn weight(&self, table: &TableName) -> f64 {
        self.weights.get(table).map_or(1.0, |weight| weight.get())
    }

    fn sql(&self) -> String {
        let scale = match self.normalize {
            Normalize::AsTheyAre => "reward",
            Normalize::ByPrompt => {
                "case when stddev_pop(reward) over of_prompt = 0 then 0 else \
                 (reward - avg(reward) over of_prompt) / stddev_pop(reward) over of_prompt end"
            }
            // A judge's rewards without a number, such as those of candidates that another `combine`
            // found incomplete, count for none of the others.
            Normalize::ByJudge => {
                "case when stddev_pop(finite) over of_judge = 0 then 0 * reward else \
                 (reward - avg(finite) over of_judge) / stddev_pop(finite) over of_judge end"
            }
        };
        let mut all = String::new();
        for (number, table) in self.rewards.iter().enumerate() {
            let (weight, union) = (
                self.weight(table),
                if number > 0 { "union all " } else { "" },
            );
            writeln!(
                all,
                "{union}select {number} as source, cast({weight} as double) as weight, prompt_id, candidate, \
                 judge, failure, cast(reward as double) as reward, \
                 case when isnan(reward) or abs(reward) = 'infinity'::real then null else cast(reward as double) end \
                 as finite from {table}"
            )
            .expect("writing to a string cannot fail");
        }
        let judges = self.rewards.len();
        format!(
            "with every as ({all}),
             scaled as (
                select *, {scale} as scaled from every
                window of_prompt as (partition by source, prompt_id), of_judge as (partition by source)
             )
             select
                md5(concat(prompt_id, ' ', candidate, ' ', cast(sum(weight * scaled) as varchar))) as row_key,
                prompt_id, candidate, string_agg(judge, '+' order by source) as judge,
                case when count(*) = {judges} then sum(weight * scaled) else cast('nan' as double) end as reward,
                cast(null as varchar) as reply, cast(null as varchar) as label,
                cast(null as real) as first_score, cast(null as real) as second_score,
                max(failure) as failure
             from scaled
             group by prompt_id, candidate
             order by prompt_id, candidate"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_pipeline::{TestPipeline, reward};
    use super::*;

    fn combine(text: &str) -> Combine {
        serde_json::from_str(text).unwrap()
    }

    fn combined(settings: &str) -> Vec<Reward> {
        let mut pipeline = TestPipeline::new();
        let first = [reward("a", 0, 1.0), reward("a", 1, 3.0)];
        pipeline.table("first", &first);
        let second = [reward("a", 0, 10.0), reward("a", 1, 30.0)];
        pipeline.table("second", &second[..]);
        let rows = pipeline.query(&combine(settings), &["first", "second"]);
        Reward::from_batch(&rows.unwrap()).unwrap()
    }

    #[test]
    fn rewards_are_normalized_weighted_and_summed() {
        for (settings, expected) in [
            (
                r#"{"rewards": ["first", "second"], "normalize": "as_they_are"}"#,
                [11.0, 33.0],
            ),
            (r#"{"rewards": ["first", "second"]}"#, [-2.0, 2.0]),
            (
                r#"{"rewards": ["first", "second"], "weights": {"first": 0.5}}"#,
                [-1.5, 1.5],
            ),
            (
                r#"{"rewards": ["first", "second"], "normalize": "by_judge"}"#,
                [-2.0, 2.0],
            ),
        ] {
            let rows = combined(settings);
            let rewards: Vec<f32> = rows.iter().map(|row| row.reward).collect();
            assert_eq!(rewards, expected, "{settings}");
            assert_eq!(rows[0].judge, "judge+judge");
        }
    }

    #[test]
    fn a_reward_that_is_no_number_affects_its_own_prompt_only() {
        let stage = |normalize: &str| {
            combine(&format!(
                r#"{{"rewards": ["first", "second"], "normalize": "{normalize}"}}"#
            ))
        };
        for normalize in ["by_judge", "by_prompt", "as_they_are"] {
            let mut pipeline = TestPipeline::new();
            let rewards = [
                reward("a", 0, f32::NAN),
                reward("a", 1, 1.0),
                reward("b", 0, 1.0),
                reward("b", 1, 3.0),
            ];
            pipeline.table("first", &rewards);
            pipeline.table("second", &rewards);
            let rows = pipeline.query(&stage(normalize), &["first", "second"]);
            let rows = Reward::from_batch(&rows.unwrap()).unwrap();
            assert!(rows[0].reward.is_nan(), "{normalize}");
            assert!(rows[2].reward < rows[3].reward, "{normalize}: {rows:?}");
        }
    }

    #[test]
    fn a_candidate_that_one_judge_did_not_score_has_no_reward() {
        let mut pipeline = TestPipeline::new();
        pipeline.table("first", &[reward("a", 0, 1.0), reward("a", 1, 3.0)]);
        pipeline.table("second", &[reward("a", 0, 1.0)]);
        let stage = combine(r#"{"rewards": ["first", "second"]}"#);
        let rows = pipeline.query(&stage, &["first", "second"]).unwrap();
        let rows = Reward::from_batch(&rows).unwrap();
        assert!(!rows[0].reward.is_nan());
        assert!(rows[1].reward.is_nan());
    }

    #[test]
    fn weights_and_tables_must_belong_together() {
        for (settings, diagnostic) in [
            (r#"{"rewards": ["a"]}"#, "fewer than two tables"),
            (r#"{"rewards": ["a", "b", "a"]}"#, "`a` is listed twice"),
            (
                r#"{"rewards": ["a", "b"], "weights": {"c": 1}}"#,
                "`c` has a weight",
            ),
            (
                r#"{"rewards": ["a", "b"], "weights": {"a": 0, "b": 0}}"#,
                "every weight is 0",
            ),
        ] {
            let error = combine(settings).output(&[]).unwrap_err();
            assert!(error.message.contains(diagnostic), "{error}");
        }
        let fine = combine(r#"{"rewards": ["a", "b"], "weights": {"a": 0.5}}"#);
        assert!(fine.output(&[]).is_ok());
    }
}
