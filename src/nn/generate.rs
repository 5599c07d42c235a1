//! Sampling: the k answers to a prompt from one look at its pictures and one reading of it.
//!
//! Each distinct picture of a call goes through the tower once, each prompt through the decoder
//! once. Its answers then grow side by side behind the one prefix, a token at a time, and beside
//! those of other prompts, so that the weights are read once for all. An answer that has ended leaves
//! the batch; when there is room, the next prompt enters. Who is beside whom follows from the prompts
//! of the call alone, and which numbers draw an answer from its own prompt alone.

use std::collections::{HashMap, VecDeque};

use tch::Tensor;

use super::checkpoint::{Checkpoint, Purpose};
use super::decoder::{Branches, Continuations, Prefix};
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
struct Growing<'a> {
    /// The place of the prompt in the call.
    index: usize,
    /// Of all answers.
    seeds: Vec<i64>,
    drafts: Vec<Draft>,
    /// The drafts that have not ended, in their order.
    live: Vec<usize>,
    tokens_max: usize,
    chooser: Chooser<'a>,
    prefix: Prefix,
    continuations: Continuations,
    /// The last token of each live draft, `[live]`, int64; not read yet.
    next: Tensor,
}

impl Growing<'_> {
    fn is_done(&self) -> bool {
        self.live.is_empty() || self.tokens_max == 0
    }

    /// Adds a token to each live draft, chosen from `logits` (`[live, vocab]`, float32). A draft with
    /// a stop token, or as many tokens as it may have, is live no more.
    fn choose(&mut self, logits: &Tensor, stops: &[i64]) -> Result<(), RowFault> {
        let numbers: Vec<f64> = self
            .live
            .iter()
            .map(|&row| uniform(self.seeds[row], self.drafts[row].token_ids.len()))
            .collect();
        let tokens = self.chooser.choose(logits, &numbers).ok_or_else(|| {
            let problem = "the model's logits are not numbers: its weights hold infinities or NaN, \
                           or the precision does not suffice";
            RowFault(problem.to_owned())
        })?;
        self.next = Tensor::from_slice(&tokens).to_device(logits.device());
        let logps = token_logps(logits, &self.next);
        let logps = Vec::<f32>::try_from(logps).expect("a vector of float32");
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
        if going_on.len() < self.live.len() {
            self.live = going_on
                .iter()
                .map(|&place| self.live[place as usize])
                .collect();
            let kept = Tensor::from_slice(&going_on).to_device(logits.device());
            self.next = self.next.index_select(0, &kept);
            self.chooser.keep(&kept);
            self.continuations.keep(&kept);
        }
        Ok(())
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

    /// Reads a prompt and draws the first token of its answers.
    fn begin<'a>(
        &mut self,
        index: usize,
        prompt: &Prompt,
        how: &'a Sampling,
    ) -> Result<Growing<'a>, Failure> {
        let text = self.prep.ids(prompt)?;
        let room = self.prep.context() - text.ids.len();
        let tokens_max = how.max_new_tokens.min(room);
        // Greedy answers are all the same; one is made.
        let distinct = if how.temperature == 0.0 {
            how.count.min(1)
        } else {
            how.count
        };
        let features = self.features_of(prompt)?;
        let what = format!("reading prompt {}", prompt.id);
        let begun = guarded(&what, distinct, text.ids.len(), || {
            let (network, device) = (&self.network, self.network.device());
            let _no_grad = tch::no_grad_guard();
            let embeds = network.embed_prompt(&text, &features);
            let (hidden, prefix) = network.language_model.prefill(&embeds);
            let last = hidden.narrow(0, prefix.tokens() - 1, 1);
            let logits = network.lm_head.forward(&last);
            let vocab = self.prep.card.text_config.vocab_size as i64;
            let mut growing = Growing {
                index,
                seeds: (0..how.count)
                    .map(|answer| answer_seed(prompt.seed, answer))
                    .collect(),
                drafts: vec![Draft::default(); distinct],
                live: (0..distinct).collect(),
                tokens_max,
                chooser: Chooser::new(how, distinct, &text.ids, vocab, &self.banned, device),
                prefix,
                continuations: Continuations::new(),
                next: Tensor::new(),
            };
            if growing.is_done() {
                return Ok(growing);
            }
            let logits = logits.expand([distinct as i64, -1], false); // [rows, vocab]
            let chosen = growing.choose(&logits, self.prep.chat.stops());
            chosen.map(|()| growing)
        })?;
        Ok(begun?)
    }

    /// Draws the next token of all answers. Gives the faults of those prompts, by their places in
    /// `growing`, whose logits are not numbers.
    fn step(&self, growing: &mut [Growing<'_>]) -> Result<Vec<(usize, RowFault)>, ModelError> {
        let rows = growing.iter().map(|prompt| prompt.live.len()).sum();
        let length = growing
            .iter()
            .map(|prompt| prompt.prefix.tokens() as usize)
            .max();
        let what = format!("sampling answers to {} prompts", growing.len());
        guarded(&what, rows, length.unwrap_or(0), || {
            let _no_grad = tch::no_grad_guard();
            let (decoder, lm_head) = (&self.network.language_model, &self.network.lm_head);
            let next: Vec<&Tensor> = growing.iter().map(|prompt| &prompt.next).collect();
            let embeds = decoder.embed(&Tensor::cat(&next, 0));
            let mut branches: Vec<Branches<'_>> = growing
                .iter_mut()
                .map(|prompt| Branches {
                    prefix: &prompt.prefix,
                    rows: &mut prompt.continuations,
                    count: prompt.live.len() as i64,
                })
                .collect();
            let logits = lm_head.forward(&decoder.step(&embeds, &mut branches)); // [rows of all, vocab]
            let mut faults = Vec::new();
            let mut first = 0;
            for (place, prompt) in growing.iter_mut().enumerate() {
                let count = prompt.live.len() as i64;
                let logits = logits.narrow(0, first, count);
                if let Err(fault) = prompt.choose(&logits, self.prep.chat.stops()) {
                    faults.push((place, fault));
                }
                first += count;
            }
            faults
        })
    }

    /// The answers to a prompt whose last token is drawn.
    fn answers(&self, prompt: &Growing<'_>) -> Vec<Generation> {
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
                self.network.image_features(&tiles)
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
        let mut waiting = VecDeque::from(by_first_picture(prompts));
        let mut growing: Vec<Growing<'_>> = Vec::new();
        loop {
            while has_room(&growing, how)
                && let Some(index) = waiting.pop_front()
            {
                match self.begin(index, &prompts[index], how) {
                    Ok(prompt) => growing.push(prompt),
                    Err(Failure::Row(fault)) => {
                        if emit(index, Err(fault)).is_break() {
                            return Ok(());
                        }
                    }
                    Err(Failure::Model(error)) => return Err(error),
                }
            }
            // Some are done with their first token.
            for prompt in growing.extract_if(.., |prompt| prompt.is_done()) {
                if emit(prompt.index, Ok(self.answers(&prompt))).is_break() {
                    return Ok(());
                }
            }
            if growing.is_empty() {
                if waiting.is_empty() {
                    return Ok(());
                }
                continue;
            }
            for (place, fault) in self.step(&mut growing)?.into_iter().rev() {
                let prompt = growing.remove(place);
                if emit(prompt.index, Err(fault)).is_break() {
                    return Ok(());
                }
            }
        }
    }
}

/// Whether another prompt may enter beside those that are there.
fn has_room(growing: &[Growing<'_>], how: &Sampling) -> bool {
    let rows: usize = growing.iter().map(|prompt| prompt.live.len()).sum();
    let bytes: usize = growing.iter().map(|prompt| prompt.prefix.bytes()).sum();
    growing.is_empty() || (rows + how.count <= ROWS_MAX && bytes < PREFIX_BYTES_MAX)
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
