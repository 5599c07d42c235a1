//! Building of pairs from chosen answers, shared by the selection stages and `ask_people`.

use std::collections::HashMap;
use std::ops::Range;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use super::pairing::{
    Answers, CandidatePair, PairDraft, PairingCandidate, Place, Prompts, Scores, pairs,
};
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
        let mut building = PairBuilder {
            answers: &answers,
            prompts: &Prompts::new(&asked)?,
            outcomes: Vec::new(),
            drafts: Vec::new(),
            computed: 0,
        };
        for group in &answers.groups {
            let prompt_id = answers.prompt_id(group.start);
            let pairs = match choices.get(prompt_id) {
                None => {
                    // A prompt without scored answers was rejected, with the reason, by an earlier
                    // stage.
                    if let Some(reason) = self.stage.unchosen() {
                        building.set_aside(prompt_id, RejectClass::Dropped, reason);
                    }
                    continue;
                }
                Some(PairChoice::SetAside { class, reason }) => {
                    building.set_aside(prompt_id, *class, reason);
                    continue;
                }
                Some(PairChoice::Pairs(pairs)) => pairs,
            };
            let (prompt, prompt_key) = building.prompts.find(table, prompt_id)?;
            let chosen = Chosen::of(&answers, group, pairs)?;
            let key = chosen.key(&answers, base.clone().with(prompt_key).with(prompt_id));
            if let Some(rows) = known(&key)? {
                building.flush()?;
                building.outcomes.push(Outcome::Rows(rows));
            } else if chosen.is_different(&answers) {
                building.draft(&key, prompt, &chosen);
                (ctx.progress)(group.end as u64);
            } else {
                let reason = "the best and the worst answer have the same text";
                building.set_aside(prompt_id, RejectClass::Dropped, reason);
            }
        }
        building.flush()?;
        Ok((building.outcomes, building.computed))
    }
}

/// The pairs that were chosen for a prompt, each with the rows of its two answers.
struct Chosen<'c>(Vec<(&'c CandidatePair, [usize; 2])>);

impl<'c> Chosen<'c> {
    /// Finds the answers of the pairs among those of the prompt.
    fn of(
        answers: &Answers<'_>,
        group: &Range<usize>,
        pairs: &'c [CandidatePair],
    ) -> Result<Self, Failure> {
        let mut chosen = Vec::with_capacity(pairs.len());
        for pair in pairs {
            let rows = [
                answers.numbered(group, pair.chosen)?,
                answers.numbered(group, pair.rejected)?,
            ];
            chosen.push((pair, rows));
        }
        Ok(Self(chosen))
    }

    /// Adds the rewards and the answers of the pairs to a key.
    fn key(&self, answers: &Answers<'_>, mut key: Key) -> String {
        for (pair, rows) in &self.0 {
            if let Some(scores) = &pair.scores {
                key = key
                    .with(scores.chosen.to_le_bytes())
                    .with(scores.rejected.to_le_bytes());
            }
            for (&row, number) in rows.iter().zip([pair.chosen, pair.rejected]) {
                key = key
                    .with(answers.row_key(row))
                    .with(answers.text(row))
                    .with(number.to_le_bytes());
            }
        }
        key.finish()
    }

    /// True if the answers of any pair differ.
    fn is_different(&self, answers: &Answers<'_>) -> bool {
        let mut pairs = self.0.iter();
        pairs.any(|(_, [chosen, rejected])| answers.text(*chosen) != answers.text(*rejected))
    }
}

/// The outcomes of a part, as its pairs are built.
struct PairBuilder<'p> {
    answers: &'p Answers<'p>,
    prompts: &'p Prompts,
    outcomes: Vec<Outcome<RecordBatch>>,
    /// Consecutive pairs, which are joined into one batch.
    drafts: Vec<PairDraft>,
    /// The number of pairs that were not reused.
    computed: u64,
}

impl PairBuilder<'_> {
    fn set_aside(&mut self, prompt_id: &str, class: RejectClass, reason: &str) {
        self.outcomes.push(Outcome::SetAside {
            id: prompt_id.to_owned(),
            class,
            reason: reason.to_owned(),
        });
    }

    /// Drafts the pairs of a prompt; `key` is that of its group.
    fn draft(&mut self, key: &str, prompt: Place, chosen: &Chosen<'_>) {
        let several = chosen.0.len() > 1;
        for &(pair, [chosen, rejected]) in &chosen.0 {
            // Each pair has a unique key. A prompt's only pair has the key of its group, by which
            // the next run finds it.
            let row_key = if several {
                Key::new("pair")
                    .with(key)
                    .with(pair.chosen.to_le_bytes())
                    .with(pair.rejected.to_le_bytes())
                    .finish()
            } else {
                key.to_owned()
            };
            self.drafts.push(PairDraft {
                row_key,
                prompt,
                matched: *pair,
                chosen,
                rejected,
            });
            self.computed += 1;
        }
    }

    /// Builds the drafted pairs and clears the drafts.
    fn flush(&mut self) -> Result<(), Failure> {
        if !self.drafts.is_empty() {
            let rows = pairs(self.answers, self.prompts, &self.drafts)?;
            self.outcomes.push(Outcome::Rows(rows));
            self.drafts.clear();
        }
        Ok(())
    }
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
