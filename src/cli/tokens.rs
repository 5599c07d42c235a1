//! How many tokens prompts take, counted as the networks will, for `pipeline plan`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::Failed;
use crate::config::Plan;
use crate::models::{self, ModelSpec, Picture};
use crate::prep::PolicyPrep;
use crate::stages::{StageSpec, turns};
use crate::store::{Images, RunFolder};
use crate::tables::{Prompt, Row as _};

/// Prompts that are counted; a plan should take a second, and the first so many tell enough.
const COUNTED_MAX: usize = 20_000;

/// The tokens of the prompts that a stage answers, pictures included.
pub struct Tokens {
    stage: String,
    prompts: usize,
    /// Whether there are more prompts than were counted.
    is_sample: bool,
    sum: usize,
    shortest: usize,
    longest: usize,
    /// The id of the longest.
    longest_id: String,
    /// Prompts that leave no room for an answer of `max_new_tokens`.
    too_long: usize,
    context: usize,
    room: usize,
}

/// Counts the prompts of every stage that samples, where its table of prompts is there already.
pub fn count(plan: &Plan, folder: &Path) -> Result<Vec<Tokens>, Failed> {
    let Ok(run) = RunFolder::read(folder) else {
        return Ok(Vec::new());
    };
    let mut images = Images::open(run.root(), &run.manifest().images)?;
    let mut pictures: HashMap<String, Picture> = HashMap::new();
    let mut all = Vec::new();
    for stage in plan.all() {
        let StageSpec::Sample(sample) = &stage.spec else {
            continue;
        };
        let ModelSpec::LlavaOnevision(spec) = &plan.models[&sample.model] else {
            continue;
        };
        // A folder that can't be read is what the check complains about.
        let Ok(prep) = PolicyPrep::open(&spec.weights) else {
            continue;
        };
        let round = plan.round_of(&sample.prompts, Some(1));
        let made = run.manifest().find(sample.prompts.as_str(), round);
        if made.is_none_or(|made| !made.complete) {
            continue;
        }
        let mut tokens = Tokens {
            stage: stage.name.to_string(),
            prompts: 0,
            is_sample: false,
            sum: 0,
            shortest: usize::MAX,
            longest: 0,
            longest_id: String::new(),
            too_long: 0,
            context: prep.context(),
            room: sample.max_new_tokens.get() as usize,
        };
        for batch in run.reader(sample.prompts.as_str(), round) {
            if tokens.is_sample {
                break;
            }
            let rows = Prompt::from_batch(&batch?);
            for row in rows.map_err(|misfit| Failed::Words(misfit.to_string()))? {
                if tokens.prompts == COUNTED_MAX {
                    tokens.is_sample = true;
                    break;
                }
                for id in &row.image_ids {
                    if !pictures.contains_key(id) {
                        let bytes = images.bytes(id)?;
                        let picture = Picture {
                            id: id.clone(),
                            bytes,
                        };
                        pictures.insert(id.clone(), picture);
                    }
                }
                let prompt = models::Prompt {
                    id: row.prompt_id.clone(),
                    pictures: row
                        .image_ids
                        .iter()
                        .map(|id| pictures[id].clone())
                        .collect(),
                    system: row.system.clone(),
                    turns: turns(&row.turns),
                    question: row.question.clone(),
                    captions: None,
                    answer: None,
                    seed: 0,
                };
                // What can't be counted is set aside when it is sampled.
                if let Ok(count) = prep.count(&prompt) {
                    tokens.add(count, row.id.as_deref().unwrap_or(&row.prompt_id));
                }
            }
        }
        if tokens.prompts > 0 {
            all.push(tokens);
        }
    }
    Ok(all)
}

impl Tokens {
    /// Whether they are of the prompts that this stage answers.
    pub fn is_of(&self, stage: &str) -> bool {
        self.stage == stage
    }

    pub fn longest(&self) -> usize {
        self.longest
    }

    /// The prompt that takes most, in words.
    pub fn worst(&self) -> String {
        let (id, tokens) = (&self.longest_id, self.longest);
        format!("the longest prompt is `{id}` with {tokens} tokens")
    }

    fn add(&mut self, count: usize, id: &str) {
        self.prompts += 1;
        self.sum += count;
        self.shortest = self.shortest.min(count);
        if count > self.longest {
            self.longest = count;
            id.clone_into(&mut self.longest_id);
        }
        self.too_long += usize::from(count + self.room > self.context);
    }
}

/// A line for each stage.
pub fn render(all: &[Tokens]) -> String {
    let mut text = String::new();
    for tokens in all {
        let Tokens {
            stage,
            prompts,
            shortest,
            longest,
            longest_id,
            too_long,
            context,
            room,
            ..
        } = tokens;
        if text.is_empty() {
            text.push_str("\ntokens of a prompt, its pictures included\n");
        }
        let of = if tokens.is_sample { "the first " } else { "" };
        let mean = tokens.sum / prompts;
        let mut line = format!(
            "  {stage:<20} {of}{prompts} prompts: {shortest} to {longest}, {mean} on average; the \
             longest is `{longest_id}`"
        );
        if *too_long > 0 {
            write!(
                line,
                "; {too_long} leave no room for {room} more in the context of {context} and will be set aside"
            )
            .expect("a string takes any text");
        }
        text.push_str(&line);
        text.push('\n');
    }
    text
}

/// The same for programs.
pub fn to_json(all: &[Tokens]) -> Value {
    let one = |tokens: &Tokens| {
        json!({
            "table": tokens.stage, "prompts": tokens.prompts, "all": !tokens.is_sample,
            "shortest": tokens.shortest, "longest": tokens.longest, "longest_id": tokens.longest_id,
            "sum": tokens.sum, "too_long": tokens.too_long, "context": tokens.context,
        })
    };
    all.iter().map(one).collect()
}
