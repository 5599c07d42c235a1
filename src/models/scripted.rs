//! Scripted models: test doubles that answer, score and train by rule without a network. A pipeline
//! uses them with `scripted: {}`. Every output depends only on the inputs.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    AnswerGroup, ChatPrompt, DpoReport, DpoTrainer, Emit, Example, Generation, Judge, JudgeScore,
    ModelError, ModelTelemetry, Optimization, Policy, RewardReport, RewardTrainer, Sampling,
    Scripted, SftExample, SftReport, SftTrainer, Stop, Trainer, TrainingAnswer,
};
use ovchat_io::files;

/// The vocabulary of scripted answers.
const WORDS: [&str; 16] = [
    "a", "red", "blue", "green", "circle", "square", "star", "left", "right", "above", "below",
    "two", "three", "of", "and", "the",
];

/// The file that stands in for the weights of a scripted model.
const WEIGHTS: &str = "scripted.json";

/// Returns a number that depends only on the parts.
fn number(parts: &[&[u8]]) -> u64 {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let digest = hasher.finalize();
    u64::from_le_bytes(
        digest[..8]
            .try_into()
            .expect("eight bytes of a longer digest"),
    )
}

/// Returns a number of a pseudorandom sequence, by SplitMix64 (Steele, Lea, Flood: "Fast splittable
/// pseudorandom number generators", 2014).
fn mixed(first: u64, position: u64) -> u64 {
    let mut mixed = first.wrapping_add(position.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Maps a number to the range from 0 to 1.
fn share(number: u64) -> f64 {
    (number >> 11) as f64 / (1_u64 << 53) as f64
}

/// A policy that answers with words drawn by the prompt's seed.
pub struct ScriptedPolicy {
    words: u32,
}

impl ScriptedPolicy {
    pub fn new(spec: &Scripted) -> Self {
        Self { words: spec.words }
    }

    fn answer(&self, prompt: &ChatPrompt, how: &Sampling, candidate: u64) -> Generation {
        // Greedy answers depend on neither the seed nor the candidate.
        let (seed, draw) = if how.temperature > 0.0 {
            (prompt.seed, candidate)
        } else {
            (0, 0)
        };
        let first = number(&[
            prompt.id.as_bytes(),
            &seed.to_le_bytes(),
            &draw.to_le_bytes(),
        ]);
        let draw = |position: u64| mixed(first, position);
        let wanted = 1 + draw(0) as usize % (self.words.max(1) as usize);
        // The stop token counts as a token.
        let (length, stop) = if wanted < how.max_new_tokens {
            (wanted, Stop::Token)
        } else {
            (how.max_new_tokens, Stop::Length)
        };
        let mut token_ids: Vec<i32> = (1..=length as u64)
            .map(|position| (draw(position) % WORDS.len() as u64) as i32)
            .collect();
        let words: Vec<&str> = token_ids.iter().map(|&id| WORDS[id as usize]).collect();
        if stop == Stop::Token {
            token_ids.push(WORDS.len() as i32);
        }
        let token_logps = vec![-(WORDS.len() as f32).ln(); token_ids.len()];
        let seed = number(&[&prompt.seed.to_le_bytes(), &candidate.to_le_bytes()]).cast_signed();
        Generation {
            text: words.join(" "),
            token_ids,
            token_logps,
            stop,
            seed,
        }
    }
}

impl Policy for ScriptedPolicy {
    fn sample(
        &mut self,
        prompts: &[ChatPrompt],
        how: &Sampling,
        emit: Emit<'_, Vec<Generation>>,
    ) -> Result<ModelTelemetry, ModelError> {
        for (index, prompt) in prompts.iter().enumerate() {
            let answer = |candidate| self.answer(prompt, how, candidate);
            let answers = prompt.check_places();
            let answers = answers.map(|()| (0..how.count as u64).map(answer).collect());
            if emit(index, answers) == ControlFlow::Break(()) {
                break;
            }
        }
        Ok(ModelTelemetry::default())
    }

    fn plan(&self) -> Option<String> {
        None
    }
}

/// Returns a reward from 0 to 1 that depends only on the prompt and the text of the answer.
fn scripted_reward(prompt: &str, answer: &str) -> f32 {
    share(number(&[prompt.as_bytes(), answer.as_bytes()])) as f32
}

/// A judge that scores an answer by its text and its prompt.
pub struct ScriptedJudge;

impl Judge for ScriptedJudge {
    fn score(
        &mut self,
        groups: &[AnswerGroup<'_>],
        emit: Emit<'_, Vec<JudgeScore>>,
    ) -> Result<ModelTelemetry, ModelError> {
        for (index, group) in groups.iter().enumerate() {
            let score = |text: &&str| JudgeScore::of(scripted_reward(&group.prompt.id, text));
            if emit(index, Ok(group.answers.iter().map(score).collect())) == ControlFlow::Break(())
            {
                break;
            }
        }
        Ok(ModelTelemetry::default())
    }

    fn plan(&self) -> Option<String> {
        None
    }
}

/// A trainer that trains nothing but records exactly what it was shown, so that a resumed training
/// can be compared with an uninterrupted one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ScriptedTrainer {
    settings: (f64, usize),
    step: u64,
    /// A digest of all steps so far: two trainers are equal if and only if they saw the same
    /// examples.
    memory: u64,
}

impl ScriptedTrainer {
    /// Opens a trainer from a checkpoint, or a new one.
    pub fn open(spec: &Scripted, optimization: &Optimization) -> Result<Self, ModelError> {
        let mut trainer = Self {
            settings: (optimization.learning_rate, optimization.steps),
            step: 0,
            memory: 0,
        };
        if let Some(folder) = &spec.checkpoint {
            trainer.memory = read(folder)?.memory;
        }
        Ok(trainer)
    }

    /// Records one row of a step.
    fn remember(&mut self, id: &str, text: &str) {
        self.memory = number(&[
            &self.memory.to_le_bytes(),
            &self.step.to_le_bytes(),
            id.as_bytes(),
            text.as_bytes(),
        ]);
    }

    /// Returns the log-probability; for sampled tokens, the one that the scripted policy gives
    /// them.
    fn logp(&self, example: &Example<'_>, answer: &TrainingAnswer) -> f64 {
        if let Some(ids) = &answer.token_ids {
            return -(ids.len() as f64) * f64::from((WORDS.len() as f32).ln());
        }
        let memory = self.memory.to_le_bytes();
        -(words(&answer.text) as f64)
            * (1.0
                + share(number(&[
                    &memory,
                    example.prompt.id.as_bytes(),
                    answer.text.as_bytes(),
                ])))
    }
}

fn weights_error(path: &Path) -> impl FnOnce(std::io::Error) -> ModelError {
    let path = path.to_owned();
    move |error| ModelError::Weights {
        path,
        problem: error.to_string(),
    }
}

fn read(folder: &Path) -> Result<ScriptedTrainer, ModelError> {
    let path = folder.join(WEIGHTS);
    let text = files::read(&path).map_err(weights_error(&path))?;
    serde_json::from_slice(&text).map_err(|error| ModelError::Weights {
        path,
        problem: error.to_string(),
    })
}

impl DpoTrainer for ScriptedTrainer {
    fn reference_logps(&mut self, pairs: &[Example<'_>]) -> Result<Vec<[f64; 2]>, ModelError> {
        Ok(pairs
            .iter()
            .map(|pair| {
                [
                    self.logp(pair, &pair.chosen),
                    self.logp(pair, &pair.rejected),
                ]
            })
            .collect())
    }

    fn step(&mut self, batch: &[Example<'_>]) -> Result<DpoReport, ModelError> {
        let logps_chosen = mean(batch, |pair| self.logp(pair, &pair.chosen));
        let logps_rejected = mean(batch, |pair| self.logp(pair, &pair.rejected));
        let report = DpoReport {
            loss: std::f64::consts::LN_2,
            rewards_chosen: 0.0,
            rewards_rejected: 0.0,
            accuracy: 0.0,
            logps_chosen,
            logps_rejected,
            grad_norm: 1.0,
            learning_rate: self.settings.0,
            tokens: tokens_of(batch),
        };
        for pair in batch {
            self.remember(pair.id, &pair.chosen.text);
        }
        self.step += 1;
        Ok(report)
    }

    fn validate(&mut self, _: &[Example<'_>]) -> Result<(), ModelError> {
        Ok(())
    }

    fn plan(&self) -> Option<String> {
        None
    }
}

impl SftTrainer for ScriptedTrainer {
    fn step(&mut self, batch: &[SftExample<'_>]) -> Result<SftReport, ModelError> {
        let words: usize = batch
            .iter()
            .map(|sft_example| words(sft_example.answer))
            .sum();
        for sft_example in batch {
            self.remember(sft_example.id, sft_example.answer);
        }
        self.step += 1;
        Ok(SftReport {
            loss: (WORDS.len() as f64).ln(),
            accuracy: 0.0,
            grad_norm: 1.0,
            learning_rate: self.settings.0,
            tokens: words as u64,
            learned_tokens: words as u64,
        })
    }
}

impl RewardTrainer for ScriptedTrainer {
    fn step(&mut self, batch: &[Example<'_>]) -> Result<RewardReport, ModelError> {
        let score = |pair: &Example<'_>, answer: &TrainingAnswer| {
            f64::from(scripted_reward(&pair.prompt.id, &answer.text))
        };
        let reward_chosen = mean(batch, |pair| score(pair, &pair.chosen));
        let reward_rejected = mean(batch, |pair| score(pair, &pair.rejected));
        let agrees = |pair: &Example<'_>| score(pair, &pair.chosen) > score(pair, &pair.rejected);
        let report = RewardReport {
            loss: std::f64::consts::LN_2,
            reward_chosen,
            reward_rejected,
            accuracy: mean(batch, |pair| f64::from(u8::from(agrees(pair)))),
            grad_norm: 1.0,
            learning_rate: self.settings.0,
            tokens: tokens_of(batch),
        };
        for pair in batch {
            self.remember(pair.id, &pair.chosen.text);
        }
        self.step += 1;
        Ok(report)
    }
}

fn mean<T>(batch: &[T], value: impl Fn(&T) -> f64) -> f64 {
    batch.iter().map(value).sum::<f64>() / batch.len() as f64
}

/// Returns the number of words of a text, plus one for its end.
fn words(text: &str) -> usize {
    text.split_whitespace().count() + 1
}

fn tokens_of(batch: &[Example<'_>]) -> u64 {
    let tokens = |pair: &Example<'_>| words(&pair.chosen.text) + words(&pair.rejected.text);
    batch.iter().map(tokens).sum::<usize>() as u64
}

impl Trainer for ScriptedTrainer {
    fn save(&mut self, to: &Path) -> Result<(), ModelError> {
        self.save_state(to)
    }

    fn save_state(&mut self, to: &Path) -> Result<(), ModelError> {
        fs::create_dir_all(to).map_err(weights_error(to))?;
        let path = to.join(WEIGHTS);
        let text = serde_json::to_vec(self).expect("plain data");
        fs::write(&path, text).map_err(weights_error(&path))
    }

    fn load_state(&mut self, from: &Path) -> Result<(), ModelError> {
        *self = read(from)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(seed: u64) -> ChatPrompt {
        ChatPrompt {
            places: Vec::new(),
            id: "p".to_owned(),
            images: Vec::new(),
            system: None,
            turns: Vec::new(),
            question: "Why?".to_owned(),
            captions: None,
            answer: None,
            seed,
        }
    }

    fn sampled(seed: u64, temperature: f64, max_new_tokens: usize) -> Vec<Generation> {
        let how = Sampling {
            count: 5,
            temperature,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_new_tokens,
            stop_strings: Vec::new(),
            stop_token_ids: Vec::new(),
        };
        let mut all = Vec::new();
        let mut emit = |_, answers: Result<Vec<Generation>, _>| {
            all = answers.unwrap();
            ControlFlow::Continue(())
        };
        ScriptedPolicy::new(&Scripted::default())
            .sample(&[prompt(seed)], &how, &mut emit)
            .unwrap();
        all
    }

    #[test]
    fn answers_depend_on_the_seed_and_greedy_ones_do_not() {
        assert_eq!(sampled(1, 0.7, 99), sampled(1, 0.7, 99));
        assert_ne!(sampled(1, 0.7, 99)[0].text, sampled(2, 0.7, 99)[0].text);
        let greedy = sampled(1, 0.0, 99);
        assert!(greedy.iter().all(|answer| answer.text == greedy[0].text));
    }

    #[test]
    fn an_answer_at_the_limit_has_no_stop_token() {
        for answer in sampled(1, 0.7, 1) {
            assert_eq!((answer.stop, answer.token_ids.len()), (Stop::Length, 1));
        }
    }
}
