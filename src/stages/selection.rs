//! What the stages share that pair the answers to a prompt by their rewards.

use std::cell::RefCell;
use std::collections::HashMap;

use super::{Failure, Input, Map, Outcome, Scope, TableName, Task};
use crate::query::Param;
use crate::store::Key;
use crate::tables::{Candidate, Pair, Prompt, RejectClass, Reward, Row, rows};

/// What becomes of a prompt: its pairs, or why there are none.
pub enum Choice {
    Pairs(Vec<Match>),
    SetAside { class: RejectClass, reason: String },
}

/// Two answers that make a pair.
#[derive(Clone, Copy)]
pub struct Match {
    chosen: i32,
    rejected: i32,
    scores: Option<Scores>,
}

/// What the two answers of a pair are worth.
#[derive(Clone, Copy)]
struct Scores {
    chosen: f32,
    rejected: f32,
    margin: f32,
}

impl Match {
    /// A pair that no judge chose.
    pub fn unscored(chosen: i32, rejected: i32) -> Self {
        Self {
            chosen,
            rejected,
            scores: None,
        }
    }
}

/// Who chooses which answers make pairs.
pub trait Choose {
    fn candidates(&self) -> &TableName;
    fn prompts(&self) -> &TableName;
    /// What becomes of prompts, by their ids.
    fn choices(&self, scope: &Scope<'_>) -> Result<HashMap<String, Choice>, Failure>;
    /// Why a prompt that is not among the choices is set aside; `None`: somebody else has said why.
    fn unchosen(&self) -> Option<&'static str>;
}

/// A stage that pairs answers by a query over their rewards.
pub trait Pairs {
    fn rewards(&self) -> &TableName;
    fn candidates(&self) -> &TableName;
    fn prompts(&self) -> &TableName;
    /// The query, which makes rows of [`Ranked`]; `{rewards}` and `{candidates}` stand for the tables.
    fn sql(&self) -> String;
    /// The values of its parameters. `seed` is for what it draws.
    fn params(&self, seed: u64) -> Vec<(&'static str, Param)>;
}

/// The tables that such a stage reads; what is left out, the plan finds.
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

/// The work of such a stage. The choice is one query over numbers; the texts are then taken from the
/// candidates as these go by, so that they never lie in memory together.
pub struct Selection<'a> {
    stage: &'a dyn Choose,
    /// By prompt; chosen when the first group comes.
    choices: RefCell<Option<HashMap<String, Choice>>>,
}

/// Prompts per part.
const PART: u32 = 4096;

impl<'a> Selection<'a> {
    pub fn new(stage: &'a dyn Choose) -> Self {
        let choices = RefCell::new(None);
        Self { stage, choices }
    }
}

impl<P: Pairs> Choose for P {
    fn candidates(&self) -> &TableName {
        Pairs::candidates(self)
    }

    fn prompts(&self) -> &TableName {
        Pairs::prompts(self)
    }

    fn unchosen(&self) -> Option<&'static str> {
        None
    }

    fn choices(&self, scope: &Scope<'_>) -> Result<HashMap<String, Choice>, Failure> {
        let (rewards, candidates) = (self.rewards(), Pairs::candidates(self));
        let sql = self
            .sql()
            .replace("{rewards}", rewards.as_str())
            .replace("{candidates}", candidates.as_str());
        let params = self.params(scope.seed_for("pairs"));
        let tables = [
            (rewards, Reward::schema()),
            (candidates, Candidate::schema()),
        ];
        let mut choices: HashMap<String, Choice> = HashMap::new();
        scope.shelf.query(&sql, &params, &tables, |batch| {
            if scope.go_on().is_break() {
                return Err(Failure::Interrupted);
            }
            for ranked in Ranked::from_batch(&batch)? {
                let prompt_id = ranked.prompt_id.clone();
                match (choices.get_mut(&prompt_id), ranked.choice()) {
                    (Some(Choice::Pairs(pairs)), Choice::Pairs(more)) => pairs.extend(more),
                    (_, choice) => {
                        choices.insert(prompt_id, choice);
                    }
                }
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
        let matched = || {
            Some(Match {
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
            (None, Some(matched)) => Choice::Pairs(vec![matched]),
            (reason, _) => Choice::SetAside {
                class: self.class,
                reason: reason
                    .clone()
                    .unwrap_or_else(|| "it has no rewards".to_owned()),
            },
        }
    }
}

rows! {
    /// What of a candidate goes into a pair.
    pub struct Answer: "answer" => {
        /// What decides it.
        pub row_key: String,
        /// The prompt.
        pub prompt_id: String,
        /// Its number among the answers to the prompt.
        pub candidate: i32,
        /// What it says.
        pub text: String,
        /// Its tokens.
        pub token_ids: Vec<i32>,
        /// Its log-probability.
        pub logp: f64,
        /// The model that gave it.
        pub model: String,
    }
}

impl Map for Selection<'_> {
    type In = Answer;
    type Out = Pair;

    fn input(&self) -> &TableName {
        self.stage.candidates()
    }

    fn part_groups(&self) -> u32 {
        PART
    }

    fn key(&self, scope: &mut Scope<'_>, group: &[Answer], key: Key) -> Result<Key, Failure> {
        if self.choices.borrow().is_none() {
            *self.choices.borrow_mut() = Some(self.stage.choices(scope)?);
        }
        let choices = self.choices.borrow();
        let prompt_id = &group[0].prompt_id;
        let prompt = scope.shelf.prompt_row(self.stage.prompts(), prompt_id)?;
        let mut key = key.with(&prompt.row_key).with(prompt_id);
        let Some(Choice::Pairs(pairs)) = choices.as_ref().and_then(|all| all.get(prompt_id)) else {
            return Ok(key);
        };
        for matched in pairs {
            if let Some(scores) = &matched.scores {
                let numbers = [scores.chosen, scores.rejected];
                key = numbers
                    .iter()
                    .fold(key, |key, number| key.with(number.to_le_bytes()));
            }
            for number in [matched.chosen, matched.rejected] {
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
        tasks: &[Task<Answer>],
    ) -> Result<Vec<Outcome<Vec<Pair>>>, Failure> {
        let choices = self.choices.borrow();
        let choices = choices.as_ref().expect("keys come before rows");
        let mut outcomes = Vec::with_capacity(tasks.len());
        let mut done = 0;
        for task in tasks {
            let prompt_id = &task.rows[0].prompt_id;
            outcomes.push(match choices.get(prompt_id) {
                None => match self.stage.unchosen() {
                    // Its answers were not scored; whoever set it aside then has said why.
                    None => Outcome::Made(Vec::new()),
                    Some(reason) => Outcome::SetAside {
                        id: prompt_id.clone(),
                        class: RejectClass::Dropped,
                        reason: reason.to_owned(),
                    },
                },
                Some(Choice::SetAside { class, reason }) => Outcome::SetAside {
                    id: prompt_id.clone(),
                    class: *class,
                    reason: reason.clone(),
                },
                Some(Choice::Pairs(pairs)) if read_the_same(&task.rows, pairs)? => {
                    Outcome::SetAside {
                        id: prompt_id.clone(),
                        class: RejectClass::Dropped,
                        reason: "the best and the worst answer read the same".to_owned(),
                    }
                }
                Some(Choice::Pairs(pairs)) => {
                    let prompt = scope.shelf.prompt_row(self.stage.prompts(), prompt_id)?;
                    let made = pairs.iter().map(|matched| {
                        // Each pair has a name of its own. The one of a prompt is named as its group, by
                        // which the next run finds it again.
                        let name = match pairs.len() {
                            1 => task.key.clone(),
                            _ => Key::new("pair")
                                .with(&task.key)
                                .with(matched.chosen.to_le_bytes())
                                .with(matched.rejected.to_le_bytes())
                                .finish(),
                        };
                        pair(name, &task.rows, *matched, Prompt::clone(&prompt))
                    });
                    Outcome::Made(made.collect::<Result<_, _>>()?)
                }
            });
            done += task.rows.len() as u64;
            (scope.progress)(done);
        }
        Ok(outcomes)
    }
}

/// Whether every pair is of two equal texts, which teach nothing.
fn read_the_same(group: &[Answer], pairs: &[Match]) -> Result<bool, Failure> {
    for matched in pairs {
        if answer(group, matched.chosen)?.text != answer(group, matched.rejected)?.text {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The answer with a number among those of a prompt.
fn answer(group: &[Answer], number: i32) -> Result<&Answer, Failure> {
    let found = group.iter().find(|answer| answer.candidate == number);
    found.ok_or_else(|| {
        Failure::Other(format!(
            "the candidates of prompt {} do not lie together; add `order by prompt_id, candidate` to the query \
             that makes them",
            group[0].prompt_id
        ))
    })
}

fn pair(
    row_key: String,
    group: &[Answer],
    matched: Match,
    prompt: Prompt,
) -> Result<Pair, Failure> {
    let chosen = answer(group, matched.chosen)?;
    let rejected = answer(group, matched.rejected)?;
    Ok(Pair {
        row_key,
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
        chosen_candidate: Some(matched.chosen),
        rejected_candidate: Some(matched.rejected),
        chosen_reward: matched.scores.map(|scores| scores.chosen),
        rejected_reward: matched.scores.map(|scores| scores.rejected),
        margin: matched.scores.map(|scores| scores.margin),
        chosen_token_ids: Some(chosen.token_ids.clone()),
        rejected_token_ids: Some(rejected.token_ids.clone()),
        chosen_logp: Some(chosen.logp),
        rejected_logp: Some(rejected.logp),
        model: Some(chosen.model.clone()),
    })
}
