//! Building of pairs from chosen answers, shared by the selection stages and `ask_people`.

use std::collections::HashMap;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use super::pairing::{Answers, CandidatePair, PairDraft, PairingCandidate, Prompts, Scores, pairs};
use super::{BatchStage, Failure, Input, Known, Outcome, StageContext, TableName};
use ovchat_data::store::Key;
use ovchat_data::tables::{Candidate, Pair, Prompt, RejectClass, Reward, Row, rows};
use ovchat_query::{self as query, Param};

/// The pairs of a prompt, or the reason why there are none.
pub enum PairChoice {
    Pairs(Vec<CandidatePair>),
    SetAside { class: RejectClass, reason: String },
}

/// A stage that chooses which answers are paired.
pub trait PairSelector {
    fn candidates(&self) -> &TableName;
    fn prompts(&self) -> &TableName;
    /// Returns the choices for the prompts of a part, by prompt id.
    fn choices(
        &self,
        ctx: &mut StageContext<'_>,
        part: &Answers<'_>,
    ) -> Result<HashMap<String, PairChoice>, Failure>;
    /// Returns the reason why a prompt without a choice is rejected; `None` if an earlier stage has
    /// already rejected it.
    fn unchosen(&self) -> Option<&'static str>;
}

/// A stage that pairs answers by a query over their rewards.
pub trait Pairs {
    fn rewards(&self) -> &TableName;
    fn candidates(&self) -> &TableName;
    fn prompts(&self) -> &TableName;
    /// Returns the query, which yields rows of [`Ranked`]; `{rewards}` and `{candidates}` are
    /// replaced with the table names. Its result for a prompt may depend only on the rows of that
    /// prompt, because it runs over the prompts of one part at a time.
    fn sql(&self) -> String;
    /// Returns the values of the query's parameters. `seed` seeds its random draws.
    fn params(&self, seed: u64) -> Vec<(&'static str, Param)>;
}

/// Returns the tables that such a stage reads. The plan finds the omitted ones.
pub fn inputs<'a>(
    rewards: &'a TableName,
    candidates: Option<&'a TableName>,
    prompts: Option<&'a TableName>,
) -> Vec<Input<'a>> {
    vec![
        Input {
            field: "rewards",
            table: Some(rewards),
            needs: Reward::schema(),
            kind: Reward::KIND,
        },
        Input {
            field: "candidates",
            table: candidates,
            needs: Candidate::schema(),
            kind: Candidate::KIND,
        },
        Input {
            field: "prompts",
            table: prompts,
            needs: Prompt::schema(),
            kind: Prompt::KIND,
        },
    ]
}

/// The work of such a stage. Its memory is bounded by one part, independent of the number of
/// prompts.
pub struct Selection<'a> {
    stage: &'a dyn PairSelector,
}

/// Prompts per part.
const PART: u32 = 4096;

impl<'a> Selection<'a> {
    pub fn new(stage: &'a dyn PairSelector) -> Self {
        Self { stage }
    }
}

rows! {
    /// The columns of a reward that the choice of pairs depends on.
    pub struct CandidateScore: "worth" => {
        /// The prompt's id.
        pub prompt_id: String,
        /// The candidate's number within its prompt.
        pub candidate: i32,
        /// The reward.
        pub reward: f32,
    }
}

impl<P: Pairs> PairSelector for P {
    fn candidates(&self) -> &TableName {
        Pairs::candidates(self)
    }

    fn prompts(&self) -> &TableName {
        Pairs::prompts(self)
    }

    fn unchosen(&self) -> Option<&'static str> {
        None
    }

    fn choices(
        &self,
        ctx: &mut StageContext<'_>,
        part: &Answers<'_>,
    ) -> Result<HashMap<String, PairChoice>, Failure> {
        let mut choices: HashMap<String, PairChoice> = HashMap::new();
        let rewards = ctx.input_tables.rows_of(
            self.rewards(),
            &CandidateScore::schema(),
            part.prompt_ids(),
        )?;
        if rewards.is_empty() {
            return Ok(choices);
        }
        let names = (self.rewards().as_str(), Pairs::candidates(self).as_str());
        let sql = self
            .sql()
            .replace("{rewards}", names.0)
            .replace("{candidates}", names.1);
        let params = self.params(ctx.seed_for("pairs"));
        let tables = [(names.0, rewards), (names.1, part.read.to_vec())];
        for batch in query::over(&sql, &params, tables)? {
            for ranked in Ranked::from_batch(&batch)? {
                let prompt_id = ranked.prompt_id.clone();
                match (choices.get_mut(&prompt_id), ranked.choice()) {
                    (Some(PairChoice::Pairs(pairs)), PairChoice::Pairs(more)) => pairs.extend(more),
                    (_, choice) => {
                        choices.insert(prompt_id, choice);
                    }
                }
            }
        }
        Ok(choices)
    }
}

rows! {
    /// A row of the ranking query's result.
    pub struct Ranked: "ranked" => {
        /// The prompt's id.
        pub prompt_id: String,
        /// The number of the chosen candidate.
        pub chosen_candidate: Option<i32>,
        /// The number of the rejected candidate.
        pub rejected_candidate: Option<i32>,
        /// The reward of the chosen candidate.
        pub chosen_reward: Option<f32>,
        /// The reward of the rejected candidate.
        pub rejected_reward: Option<f32>,
        /// The margin between the two.
        pub margin: Option<f32>,
        /// The reason why the prompt has no pair, if it has none.
        pub reason: Option<String>,
        /// The class of the reason: `fault` or `dropped`.
        pub class: RejectClass,
    }
}

impl Ranked {
    fn choice(self) -> PairChoice {
        let matched = || {
            Some(CandidatePair {
                chosen: self.chosen_candidate?,
                rejected: self.rejected_candidate?,
                scores: Some(Scores {
                    chosen: self.chosen_reward?,
                    rejected: self.rejected_reward?,
                    margin: self.margin?,
                }),
            })
        };
        match (&self.reason, matched()) {
            (None, Some(matched)) => PairChoice::Pairs(vec![matched]),
            (reason, _) => PairChoice::SetAside {
                class: self.class,
                reason: reason.clone().unwrap_or_else(|| "no rewards".to_owned()),
            },
        }
    }
}

impl BatchStage for Selection<'_> {
    fn input(&self) -> &TableName {
        self.stage.candidates()
    }

    fn part_groups(&self) -> u32 {
        PART
    }

    fn schema(&self) -> SchemaRef {
        Pair::schema()
    }

    fn reads(&self) -> SchemaRef {
        PairingCandidate::schema()
    }

    fn make(
        &self,
        ctx: &mut StageContext<'_>,
        rows: &[RecordBatch],
        lengths: &[usize],
        base: &Key,
        known: Known<'_>,
    ) -> Result<(Vec<Outcome<RecordBatch>>, u64), Failure> {
        let answers = Answers::new(rows, lengths)?;
        let choices = self.stage.choices(ctx, &answers)?;
        let table = self.stage.prompts();
        let asked = answers
            .prompt_ids()
            .filter(|id| matches!(choices.get(*id), Some(PairChoice::Pairs(_))));
        let asked = ctx.input_tables.rows_of(table, &Prompt::schema(), asked)?;
        let prompts = Prompts::new(&asked)?;
        let mut outcomes = Vec::new();
        // Consecutive pairs are joined into one batch.
        let mut drafts: Vec<PairDraft> = Vec::new();
        let mut computed = 0;
        for group in &answers.groups {
            let prompt_id = answers.prompt_id(group.start);
            let set_aside = |class, reason: &str| Outcome::SetAside {
                id: prompt_id.to_owned(),
                class,
                reason: reason.to_owned(),
            };
            let pairs = match choices.get(prompt_id) {
                None => {
                    // A prompt without scored answers was rejected, with the reason, by an earlier
                    // stage.
                    let reason = self.stage.unchosen();
                    outcomes.extend(reason.map(|reason| set_aside(RejectClass::Dropped, reason)));
                    continue;
                }
                Some(PairChoice::SetAside { class, reason }) => {
                    outcomes.push(set_aside(*class, reason));
                    continue;
                }
                Some(PairChoice::Pairs(pairs)) => pairs,
            };
            let (prompt, prompt_key) = prompts.find(table, prompt_id)?;
            let mut key = base.clone().with(prompt_key).with(prompt_id);
            let mut of_group = Vec::with_capacity(pairs.len());
            let mut is_different = false;
            for matched in pairs {
                if let Some(scores) = &matched.scores {
                    key = key
                        .with(scores.chosen.to_le_bytes())
                        .with(scores.rejected.to_le_bytes());
                }
                let [chosen, rejected] = [matched.chosen, matched.rejected];
                let chosen = answers.numbered(group, chosen)?;
                let rejected = answers.numbered(group, rejected)?;
                for (row, number) in [(chosen, matched.chosen), (rejected, matched.rejected)] {
                    key = key
                        .with(answers.row_key(row))
                        .with(answers.text(row))
                        .with(number.to_le_bytes());
                }
                is_different |= answers.text(chosen) != answers.text(rejected);
                of_group.push((matched, chosen, rejected));
            }
            let key = key.finish();
            if let Some(rows) = known(&key)? {
                flush(&answers, &prompts, &mut drafts, &mut outcomes)?;
                outcomes.push(Outcome::Rows(rows));
                continue;
            }
            if !is_different {
                let reason = "the best and the worst answer have the same text";
                outcomes.push(set_aside(RejectClass::Dropped, reason));
                continue;
            }
            let several = of_group.len() > 1;
            for (matched, chosen, rejected) in of_group {
                // Each pair has a unique key. A prompt's only pair has the key of its group, by
                // which the next run finds it.
                let row_key = if several {
                    Key::new("pair")
                        .with(&key)
                        .with(matched.chosen.to_le_bytes())
                        .with(matched.rejected.to_le_bytes())
                        .finish()
                } else {
                    key.clone()
                };
                drafts.push(PairDraft {
                    row_key,
                    prompt,
                    matched: *matched,
                    chosen,
                    rejected,
                });
                computed += 1;
            }
            (ctx.progress)(group.end as u64);
        }
        flush(&answers, &prompts, &mut drafts, &mut outcomes)?;
        Ok((outcomes, computed))
    }
}

/// Builds the drafted pairs and clears the drafts.
fn flush(
    answers: &Answers<'_>,
    prompts: &Prompts,
    drafts: &mut Vec<PairDraft>,
    outcomes: &mut Vec<Outcome<RecordBatch>>,
) -> Result<(), Failure> {
    if !drafts.is_empty() {
        outcomes.push(Outcome::Rows(pairs(answers, prompts, drafts)?));
        drafts.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, candidate, prompt, reward, stage};
    use super::super::{SelectExtremes, SelectPairs};
    use super::*;

    fn pipeline(rewards: &[Reward]) -> TestPipeline {
        let mut pipeline = TestPipeline::new();
        pipeline.table("prompts", &[prompt("a", "Why?"), prompt("b", "How?")]);
        let candidates = [
            candidate("a", 0, "So."),
            candidate("a", 1, "No."),
            candidate("b", 0, "So."),
            candidate("b", 1, "No."),
        ];
        pipeline.table("candidates", &candidates);
        pipeline.table("rewards", rewards);
        pipeline
    }

    fn settings() -> serde_json::Value {
        json!({"rewards": "rewards", "candidates": "candidates", "prompts": "prompts"})
    }

    #[test]
    fn a_prompt_that_an_earlier_stage_rejected_is_not_rejected_twice() {
        let mut pipeline = pipeline(&[reward("b", 0, 1.0), reward("b", 1, 0.0)]);
        let stage = stage::<SelectExtremes>(settings());
        let (pairs, rejects) = pipeline.map::<Pair>(&stage).unwrap();
        assert_eq!(rejects, []);
        assert_eq!(pairs.len(), 1);
        assert_eq!((&*pairs[0].prompt_id, &*pairs[0].prompt), ("b", "How?"));
    }

    #[test]
    fn the_only_pair_of_a_prompt_has_the_key_of_its_group_and_others_have_their_own() {
        let rewards = [reward("a", 0, 1.0), reward("a", 1, 0.0)];
        let one = pipeline(&rewards).map::<Pair>(&stage::<SelectExtremes>(settings()));
        let again = pipeline(&rewards).map::<Pair>(&stage::<SelectExtremes>(settings()));
        let (one, again) = (one.unwrap().0, again.unwrap().0);
        assert_eq!(one, again);
        let changed = [reward("a", 0, 2.0), reward("a", 1, 0.0)];
        let other = pipeline(&changed).map::<Pair>(&stage::<SelectExtremes>(settings()));
        assert_ne!(other.unwrap().0[0].row_key, one[0].row_key);
        let mut three = pipeline(&[
            reward("a", 0, 1.0),
            reward("a", 1, 0.0),
            reward("b", 0, 1.0),
            reward("b", 1, 0.0),
        ]);
        let mut all = settings();
        all["strategy"] = json!("all_pairs");
        let (pairs, _) = three.map::<Pair>(&stage::<SelectPairs>(all)).unwrap();
        assert_ne!(pairs[0].row_key, pairs[1].row_key);
    }

    #[test]
    fn a_reward_of_an_unknown_candidate_ends_the_stage() {
        let mut pipeline = pipeline(&[reward("a", 0, 1.0), reward("a", 7, 0.0)]);
        let stage = stage::<SelectExtremes>(settings());
        let failure = pipeline.map::<Pair>(&stage).unwrap_err().to_string();
        let expected = "candidate 7 of prompt a has a reward but is not in the table of candidates";
        assert!(failure.starts_with(expected), "{failure}");
    }
}
