//! `select_extremes`: the best and the worst answer to each prompt become a pair.

use std::cell::RefCell;
use std::collections::HashMap;

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Failure, Input, Map, NonNegative, Outcome, Scope, Stage, StageError, TableName, Task, Work,
};
use crate::query::Param;
use crate::store::{Key, digest};
use crate::tables::{Candidate, Pair, Prompt, RejectClass, Reward, Row, rows};

/// The ranking; `{rewards}` and `{candidates}` stand for the tables.
const SQL: &str = include_str!("select_extremes.sql");

/// Pairs the answer with the highest reward (chosen) with the one with the lowest (rejected). Ties
/// go to the lowest number; a prompt whose best and worst score or read the same is dropped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SelectExtremes {
    /// The table of rewards.
    pub rewards: TableName,
    /// The table of candidates that were scored; found through `rewards` if left out.
    #[serde(default)]
    pub candidates: Option<TableName>,
    /// The table of prompts that were answered; found through `rewards` if left out.
    #[serde(default)]
    pub prompts: Option<TableName>,
    /// Drops prompts whose best and worst reward are less than this apart; 0 keeps all.
    #[serde(default = "SelectExtremes::margin_min")]
    pub margin_min: NonNegative,
    /// Whether answers that were cut off at `max_new_tokens` take part.
    #[serde(default)]
    pub truncated: Truncated,
}

/// What becomes of answers that were cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncated {
    /// They take part like all others.
    #[default]
    Keep,
    /// They are left out.
    Drop,
}

impl SelectExtremes {
    fn candidates(&self) -> &TableName {
        self.candidates
            .as_ref()
            .expect("the plan found the candidates")
    }

    fn prompts(&self) -> &TableName {
        self.prompts.as_ref().expect("the plan found the prompts")
    }

    fn margin_min() -> NonNegative {
        0.0.try_into().expect("0 is not negative")
    }
}

impl Stage for SelectExtremes {
    fn inputs(&self) -> Vec<Input<'_>> {
        vec![
            Input {
                field: "rewards",
                table: Some(&self.rewards),
                needs: Reward::schema(),
                kind: Reward::KIND,
            },
            Input {
                field: "candidates",
                table: self.candidates.as_ref(),
                needs: Candidate::schema(),
                kind: Candidate::KIND,
            },
            Input {
                field: "prompts",
                table: self.prompts.as_ref(),
                needs: Prompt::schema(),
                kind: Prompt::KIND,
            },
        ]
    }

    fn find(&mut self, field: &str, table: TableName) {
        match field {
            "candidates" => self.candidates = Some(table),
            "prompts" => self.prompts = Some(table),
            _ => {}
        }
    }

    fn kind(&self) -> Option<&'static str> {
        Some(Pair::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        Ok(Pair::schema())
    }

    fn version(&self) -> String {
        digest(SQL.as_bytes())
    }

    fn work(&self) -> Work<'_> {
        Work::Map(Box::new(Selection {
            stage: self,
            choices: RefCell::new(None),
        }))
    }
}

/// What the ranking says of a prompt: its pair, or why there is none.
enum Choice {
    Pair(Extremes),
    SetAside { class: RejectClass, reason: String },
}

#[derive(Clone, Copy)]
struct Extremes {
    chosen: i32,
    rejected: i32,
    chosen_reward: f32,
    rejected_reward: f32,
    margin: f32,
}

/// The ranking is one query over numbers; the texts are then taken from the candidates as these go by,
/// so that they never lie in memory together.
struct Selection<'a> {
    stage: &'a SelectExtremes,
    /// By prompt; ranked when the first group comes.
    choices: RefCell<Option<HashMap<String, Choice>>>,
}

/// Prompts per part.
const PART: u32 = 4096;

impl Selection<'_> {
    fn rank(&self, scope: &Scope<'_>) -> Result<HashMap<String, Choice>, Failure> {
        let stage = self.stage;
        let candidates = stage.candidates();
        let sql = SQL
            .replace("{rewards}", stage.rewards.as_str())
            .replace("{candidates}", candidates.as_str());
        let truncated = match stage.truncated {
            Truncated::Keep => "keep",
            Truncated::Drop => "drop",
        };
        let params = [
            ("margin_min", Param::Float(stage.margin_min.get())),
            ("truncated", Param::Text(truncated.to_owned())),
        ];
        let tables = [
            (&stage.rewards, Reward::schema()),
            (candidates, Candidate::schema()),
        ];
        let mut choices = HashMap::new();
        scope.shelf.query(&sql, &params, &tables, |batch| {
            if scope.go_on().is_break() {
                return Err(Failure::Interrupted);
            }
            for ranked in Ranked::from_batch(&batch)? {
                choices.insert(ranked.prompt_id.clone(), ranked.choice());
            }
            Ok(())
        })?;
        Ok(choices)
    }
}

rows! {
    /// A row of the ranking.
    pub struct Ranked: "ranked" => {
        /// The prompt.
        pub prompt_id: String,
        /// Its best answer.
        pub chosen_candidate: Option<i32>,
        /// Its worst answer.
        pub rejected_candidate: Option<i32>,
        /// The best answer's reward.
        pub chosen_reward: Option<f32>,
        /// The worst answer's reward.
        pub rejected_reward: Option<f32>,
        /// Their difference.
        pub margin: Option<f32>,
        /// Why the prompt makes no pair, if it makes none.
        pub reason: Option<String>,
        /// `fault` or `dropped`, for the reason.
        pub class: RejectClass,
    }
}

impl Ranked {
    fn choice(self) -> Choice {
        let extremes = || {
            Some(Extremes {
                chosen: self.chosen_candidate?,
                rejected: self.rejected_candidate?,
                chosen_reward: self.chosen_reward?,
                rejected_reward: self.rejected_reward?,
                margin: self.margin?,
            })
        };
        match (&self.reason, extremes()) {
            (None, Some(extremes)) => Choice::Pair(extremes),
            (reason, _) => Choice::SetAside {
                class: self.class,
                reason: reason
                    .clone()
                    .unwrap_or_else(|| "it has no rewards".to_owned()),
            },
        }
    }
}

impl Map for Selection<'_> {
    type In = Candidate;
    type Out = Pair;

    fn input(&self) -> &TableName {
        self.stage.candidates()
    }

    fn part_groups(&self) -> u32 {
        PART
    }

    fn key(&self, scope: &mut Scope<'_>, group: &[Candidate], key: Key) -> Result<Key, Failure> {
        if self.choices.borrow().is_none() {
            *self.choices.borrow_mut() = Some(self.rank(scope)?);
        }
        let choices = self.choices.borrow();
        let prompt_id = &group[0].prompt_id;
        let prompt = scope.shelf.prompt_row(self.stage.prompts(), prompt_id)?;
        let mut key = key.with(&prompt.row_key).with(prompt_id);
        if let Some(Choice::Pair(extremes)) = choices.as_ref().and_then(|all| all.get(prompt_id)) {
            let numbers = [extremes.chosen_reward, extremes.rejected_reward];
            key = numbers
                .iter()
                .fold(key, |key, number| key.with(number.to_le_bytes()));
            for number in [extremes.chosen, extremes.rejected] {
                let answer = answer(group, number)?;
                key = key
                    .with(&answer.row_key)
                    .with(&answer.text)
                    .with(number.to_le_bytes());
            }
        }
        Ok(key)
    }

    fn map(
        &self,
        scope: &mut Scope<'_>,
        tasks: &[Task<Candidate>],
    ) -> Result<Vec<Outcome<Vec<Pair>>>, Failure> {
        let choices = self.choices.borrow();
        let choices = choices.as_ref().expect("keys come before rows");
        let mut outcomes = Vec::with_capacity(tasks.len());
        let mut done = 0;
        for task in tasks {
            let prompt_id = &task.rows[0].prompt_id;
            outcomes.push(match choices.get(prompt_id) {
                // Its answers were not scored; whoever set it aside then has said why.
                None => Outcome::Made(Vec::new()),
                Some(Choice::SetAside { class, reason }) => Outcome::SetAside {
                    id: prompt_id.clone(),
                    class: *class,
                    reason: reason.clone(),
                },
                Some(Choice::Pair(extremes)) => {
                    let prompt = scope.shelf.prompt_row(self.stage.prompts(), prompt_id)?;
                    Outcome::Made(vec![pair(task, *extremes, prompt)?])
                }
            });
            done += task.rows.len() as u64;
            (scope.progress)(done);
        }
        Ok(outcomes)
    }
}

/// The answer with a number among those of a prompt.
fn answer(group: &[Candidate], number: i32) -> Result<&Candidate, Failure> {
    let found = group.iter().find(|answer| answer.candidate == number);
    found.ok_or_else(|| {
        Failure::Other(format!(
            "the candidates of prompt {} do not lie together; add `order by prompt_id, candidate` to the query \
             that makes them",
            group[0].prompt_id
        ))
    })
}

fn pair(task: &Task<Candidate>, extremes: Extremes, prompt: Prompt) -> Result<Pair, Failure> {
    let chosen = answer(&task.rows, extremes.chosen)?;
    let rejected = answer(&task.rows, extremes.rejected)?;
    Ok(Pair {
        row_key: task.key.clone(),
        id: prompt.id,
        image: prompt.image,
        prompt: prompt.question,
        chosen: chosen.text.clone(),
        rejected: rejected.text.clone(),
        prompt_id: prompt.prompt_id,
        image_ids: prompt.image_ids,
        system: prompt.system,
        turns: prompt.turns,
        captions: prompt.captions,
        chosen_candidate: Some(extremes.chosen),
        rejected_candidate: Some(extremes.rejected),
        chosen_reward: Some(extremes.chosen_reward),
        rejected_reward: Some(extremes.rejected_reward),
        margin: Some(extremes.margin),
        chosen_token_ids: Some(chosen.token_ids.clone()),
        rejected_token_ids: Some(rejected.token_ids.clone()),
        chosen_logp: Some(chosen.logp),
        rejected_logp: Some(rejected.logp),
        model: Some(chosen.model.clone()),
    })
}
