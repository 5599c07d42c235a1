//! Sampling: the k answers to a prompt from one look at its pictures and one reading of it.
//!
//! Each distinct picture of a call goes through the tower once, each prompt through the decoder
//! once. Its answers then grow side by side behind the one prefix, a token at a time, and beside
//! those of other prompts, so that the weights are read once for all. An answer that has ended leaves
//! the batch; when there is room, the next prompt enters. Who is beside whom follows from the prompts
//! of the call alone, and which numbers draw an answer from its own prompt alone.

use std::collections::{HashMap, VecDeque};

use tch::{Device, Tensor};

use super::checkpoint::{Checkpoint, Purpose};
use super::decoder::{Branches, Continuations, Prefix, Wanted};
use super::device;
use super::dpo::token_logps;
use super::edge::guarded;
use super::llava_onevision::LlavaOnevision;
use super::sampling::{Chooser, answer_seed, uniform};
use crate::models::{
    self, Emit, Generation, ModelError, Picture, Policy, Prompt, RowFault, Sampling, Stop,
};
use crate::prep::PolicyPrep;

/// Bytes of picture features that are kept for prompts to come: some twenty pictures of the 7B
/// model in bfloat16.
const FEATURE_BYTES_MAX: usize = 1 << 30;

/// Answers that grow side by side. More rows would not make a step cheaper per row by much.
const ROWS_MAX: usize = 64;

/// Bytes of keys and values of prompts beyond which no other prompt enters.
const PREFIX_BYTES_MAX: usize = 1 << 30;

/// LLaVA-OneVision as a policy.
#[derive(Debug)]
pub struct OnevisionPolicy {
    prep: PolicyPrep,
    network: LlavaOnevision,
    features: FeatureCache,
    banned: Vec<i64>,
}

/// Why a prompt has no answers: something is wrong with it, or with everything.
enum Failure {
    Row(RowFault),
    Model(ModelError),
}

impl From<RowFault> for Failure {
    fn from(fault: RowFault) -> Self {
        Self::Row(fault)
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        Self::Model(error)
    }
}

/// An answer in the making.
#[derive(Debug, Clone, Default)]
struct Draft {
    token_ids: Vec<i64>,
    token_logps: Vec<f32>,
    stopped: bool,
}

/// A prompt whose answers grow.
struct Growing {
    /// The place of the prompt in the call.
    index: usize,
    /// Of all answers.
    seeds: Vec<i64>,
    drafts: Vec<Draft>,
    /// The drafts that have not ended, in their order.
    live: Vec<usize>,
    tokens_max: usize,
    prefix: Prefix,
    continuations: Continuations,
}

/// Prompts whose answers grow side by side. Their live drafts are the rows, in this order.
struct Batch<'a> {
    prompts: Vec<Growing>,
    chooser: Chooser<'a>,
    /// What the next token of each row is chosen from, `[rows, vocab]`, float32; in pieces.
    logits: Vec<Tensor>,
}

impl Growing {
    /// What draws the next token of a draft.
    fn number(&self, draft: usize) -> f64 {
        uniform(self.seeds[draft], self.drafts[draft].token_ids.len())
    }

    /// Adds a token to each live draft. A draft with a stop token, or as many tokens as it may have,
    /// is live no more. Gives the places among the live ones of those that go on.
    fn grow(&mut self, tokens: &[i64], logps: &[f32], stops: &[i64]) -> Vec<i64> {
        let mut going_on = Vec::with_capacity(self.live.len());
        for (place, &row) in self.live.iter().enumerate() {
            let draft = &mut self.drafts[row];
            draft.token_ids.push(tokens[place]);
            draft.token_logps.push(logps[place]);
            draft.stopped = stops.contains(&tokens[place]);
            if !draft.stopped && draft.token_ids.len() < self.tokens_max {
                going_on.push(place as i64);
            }
        }
        going_on
    }

    /// Goes on with the live drafts at these places.
    fn keep(&mut self, places: &[i64], device: Device) {
        if places.len() < self.live.len() {
            let kept = Tensor::from_slice(places).to_device(device);
            self.continuations.keep(&kept);
            self.live = places
                .iter()
                .map(|&place| self.live[place as usize])
                .collect();
        }
    }
}

impl Batch<'_> {
    fn rows(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.live.len()).sum()
    }

    /// Whether another prompt with `count` answers may enter.
    fn has_room(&self, count: usize) -> bool {
        let bytes: usize = self
            .prompts
            .iter()
            .map(|prompt| prompt.prefix.bytes())
            .sum();
        self.prompts.is_empty() || (self.rows() + count <= ROWS_MAX && bytes < PREFIX_BYTES_MAX)
    }
}

impl OnevisionPolicy {
    /// Opens the checkpoint of the spec.
    pub fn open(spec: &models::LlavaOnevision) -> Result<Self, ModelError> {
        let folder = &spec.weights;
        let prep = PolicyPrep::open(folder)?;
        let (device, kind) = device::choose(spec.device, spec.dtype)?;
        let checkpoint = Checkpoint::open(folder)?;
        let (network, _) =
            LlavaOnevision::open(&checkpoint, &prep.card, device, kind, Purpose::Inference)?;
        Ok(Self {
            banned: prep.chat.banned(prep.card.text_config.vocab_size),
            prep,
            network,
            features: FeatureCache::new(FEATURE_BYTES_MAX),
        })
    }

    /// Reads a prompt, whose answers then are rows of `batch`.
    fn enter(
        &mut self,
        index: usize,
        prompt: &Prompt,
        how: &Sampling,
        batch: &mut Batch<'_>,
    ) -> Result<(), Failure> {
        let text = self.prep.ids(prompt)?;
        let room = self.prep.context() - text.ids.len();
        // Greedy answers are all the same; one is made.
        let distinct = if how.temperature == 0.0 {
            how.count.min(1)
        } else {
            how.count
        };
        let features = self.features_of(prompt)?;
        let what = format!("reading prompt {}", prompt.id);
        let (prefix, logits) = guarded(&what, distinct, text.ids.len(), || {
            let _no_grad = tch::no_grad_guard();
            let embeds = self.network.embed_prompt(&text, &features);
            let decoder = &self.network.language_model;
            let (last, mut prefixes) = decoder.prefill(&embeds, &[embeds.size()[0]], Wanted::Last);
            (prefixes.remove(0), self.network.lm_head.forward(&last))
        })?;
        batch.chooser.enter(distinct, &text.ids);
        batch
            .logits
            .push(logits.expand([distinct as i64, -1], false));
        batch.prompts.push(Growing {
            index,
            seeds: (0..how.count)
                .map(|answer| answer_seed(prompt.seed, answer))
                .collect(),
            drafts: vec![Draft::default(); distinct],
            live: (0..distinct).collect(),
            tokens_max: how.max_new_tokens.min(room),
            prefix,
            continuations: Continuations::new(),
        });
        Ok(())
    }

    /// Adds a token to all rows of `batch`, and lets the network read those that go on. Gives the
    /// prompts that are done, and for those whose logits are not numbers the fault.
    fn step(
        &self,
        batch: &mut Batch<'_>,
    ) -> Result<Vec<(Growing, Result<(), RowFault>)>, ModelError> {
        let prompts = batch.prompts.iter();
        let length = prompts.map(|prompt| prompt.prefix.tokens() as usize).max();
        let what = format!("sampling answers to {} prompts", batch.prompts.len());
        guarded(&what, batch.rows(), length.unwrap_or(0), || {
            let _no_grad = tch::no_grad_guard();
            let device = self.network.device();
            let logits = Tensor::cat(&std::mem::take(&mut batch.logits), 0); // [rows, vocab]
            let numbers: Vec<f64> = batch
                .prompts
                .iter()
                .flat_map(|prompt| prompt.live.iter().map(|&row| prompt.number(row)))
                .collect();
            let chosen = batch.chooser.choose(&logits, &numbers);
            let tokens: Vec<i64> = chosen.iter().map(|token| token.unwrap_or(0)).collect();
            let tokens_there = Tensor::from_slice(&tokens).to_device(device);
            let logps = token_logps(&logits, &tokens_there);
            let logps = Vec::<f32>::try_from(logps).expect("a vector of float32");

            let stops = self.prep.chat.stops();
            let mut gone = Vec::new();
            let mut kept = Vec::with_capacity(tokens.len());
            let mut first = 0;
            for mut prompt in std::mem::take(&mut batch.prompts) {
                let rows = first..first + prompt.live.len();
                if chosen[rows.clone()].contains(&None) {
                    gone.push((prompt, Err(not_numbers())));
                } else {
                    let going_on = prompt.grow(&tokens[rows.clone()], &logps[rows.clone()], stops);
                    kept.extend(going_on.iter().map(|&place| rows.start as i64 + place));
                    prompt.keep(&going_on, device);
                    if prompt.live.is_empty() {
                        gone.push((prompt, Ok(())));
                    } else {
                        batch.prompts.push(prompt);
                    }
                }
                first = rows.end;
            }
            if kept.is_empty() {
                batch
                    .chooser
                    .keep(&Tensor::from_slice(&kept).to_device(device));
                return gone;
            }
            let mut next = tokens_there;
            if kept.len() < tokens.len() {
                let kept = Tensor::from_slice(&kept).to_device(device);
                next = next.index_select(0, &kept);
                batch.chooser.keep(&kept);
            }
            let mut branches: Vec<Branches<'_>> = batch
                .prompts
                .iter_mut()
                .map(|prompt| Branches {
                    prefix: &prompt.prefix,
                    rows: &mut prompt.continuations,
                    count: prompt.live.len() as i64,
                })
                .collect();
            let decoder = &self.network.language_model;
            let hidden = decoder.step(&decoder.embed(&next), &mut branches);
            batch.logits.push(self.network.lm_head.forward(&hidden));
            gone
        })
    }

    /// The answers to a prompt whose last token is drawn.
    fn answers(&self, prompt: &Growing) -> Vec<Generation> {
        let seeds = prompt.seeds.iter().enumerate();
        seeds
            .map(|(answer, &seed)| {
                let draft = &prompt.drafts[answer.min(prompt.drafts.len() - 1)];
                self.generation(draft, seed)
            })
            .collect()
    }

    /// The features of the prompt's pictures, from the cache or the tower.
    fn features_of(&mut self, prompt: &Prompt) -> Result<Vec<Tensor>, Failure> {
        let count = prompt.pictures.len();
        let mut features = Vec::with_capacity(count);
        for picture in &prompt.pictures {
            let key = FeatureKey::new(picture, count);
            if let Some(known) = self.features.get(&key) {
                features.push(known);
                continue;
            }
            let tiles = self.prep.tiles(picture, count)?;
            let what = format!("looking at picture {}", picture.id);
            let (rows, length) = (tiles.packing.tiles(), tiles.packing.tokens());
            let made = guarded(&what, rows, length, || {
                let _no_grad = tch::no_grad_guard();
                self.network.image_features(&[&tiles]).remove(0)
            })?;
            features.push(made.shallow_clone());
            self.features.put(key, made);
        }
        Ok(features)
    }

    fn generation(&self, draft: &Draft, seed: i64) -> Generation {
        let spoken = draft.token_ids.len() - usize::from(draft.stopped);
        Generation {
            text: self.prep.chat.decode(&draft.token_ids[..spoken]),
            token_ids: draft.token_ids.iter().map(|&id| id as i32).collect(),
            token_logps: draft.token_logps.clone(),
            stop: if draft.stopped {
                Stop::Token
            } else {
                Stop::Length
            },
            seed,
        }
    }
}

impl Policy for OnevisionPolicy {
    /// An answer is at most as long as the model's context leaves room for behind the prompt; it
    /// then ends with [`Stop::Length`] like one that reaches `max_new_tokens`.
    fn sample(
        &mut self,
        prompts: &[Prompt],
        how: &Sampling,
        emit: Emit<'_, Vec<Generation>>,
    ) -> Result<(), ModelError> {
        assert!(how.count > 0 && how.max_new_tokens > 0, "nothing to sample");
        let mut waiting = VecDeque::from(by_first_picture(prompts));
        let vocab = self.prep.card.text_config.vocab_size as i64;
        let mut batch = Batch {
            prompts: Vec::new(),
            chooser: Chooser::new(how, vocab, &self.banned, self.network.device()),
            logits: Vec::new(),
        };
        loop {
            while batch.has_room(how.count)
                && let Some(index) = waiting.pop_front()
            {
                match self.enter(index, &prompts[index], how, &mut batch) {
                    Ok(()) => {}
                    Err(Failure::Row(fault)) => {
                        if emit(index, Err(fault)).is_break() {
                            return Ok(());
                        }
                    }
                    Err(Failure::Model(error)) => return Err(error),
                }
            }
            if batch.prompts.is_empty() {
                return Ok(());
            }
            for (prompt, outcome) in self.step(&mut batch)? {
                let outcome = outcome.map(|()| self.answers(&prompt));
                if emit(prompt.index, outcome).is_break() {
                    return Ok(());
                }
            }
        }
    }
}

fn not_numbers() -> RowFault {
    let problem = "the model's logits are not numbers: its weights hold infinities or NaN, or the \
                   precision does not suffice";
    RowFault(problem.to_owned())
}

/// The order in which prompts are answered: as given, but those about the same picture together, so
/// that its features are still in the cache.
fn by_first_picture(prompts: &[Prompt]) -> Vec<usize> {
    let mut first_seen = HashMap::new();
    let mut order: Vec<(usize, usize)> = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| match prompt.pictures.first() {
            Some(picture) => (*first_seen.entry(&picture.id).or_insert(index), index),
            None => (index, index),
        })
        .collect();
    order.sort_unstable();
    order.into_iter().map(|(_, index)| index).collect()
}

/// What decides a picture's features: the picture, and whether it is the only one of its prompt
/// (then it is cut into tiles).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct FeatureKey {
    picture: String,
    alone: bool,
}

impl FeatureKey {
    fn new(picture: &Picture, count: usize) -> Self {
        Self {
            picture: picture.id.clone(),
            alone: count == 1,
        }
    }
}

/// The features of the latest pictures, up to a bound in bytes.
#[derive(Debug)]
struct FeatureCache {
    bytes_max: usize,
    bytes: usize,
    entries: VecDeque<(FeatureKey, Tensor)>,
}

impl FeatureCache {
    fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            bytes: 0,
            entries: VecDeque::new(),
        }
    }

    fn get(&self, key: &FeatureKey) -> Option<Tensor> {
        let (_, features) = self.entries.iter().find(|(known, _)| known == key)?;
        Some(features.shallow_clone())
    }

    /// Adds features, and lets the oldest go while there are too many.
    fn put(&mut self, key: FeatureKey, features: Tensor) {
        self.bytes += bytes_of(&features);
        self.entries.push_back((key, features));
        while self.bytes > self.bytes_max
            && let Some((_, oldest)) = self.entries.pop_front()
        {
            self.bytes -= bytes_of(&oldest);
        }
    }
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

#[cfg(test)]
mod tests;
