//! Sampling: the k answers to a prompt from one look at its pictures and one reading of it.
//!
//! Each distinct picture of a call goes through the tower once, each prompt through the decoder
//! once. Its answers then grow side by side behind the one prefix, a token at a time; an answer that
//! has ended leaves the batch. Nothing about an answer depends on the other prompts of the call.

use std::collections::{HashMap, VecDeque};

use tch::Tensor;

use super::checkpoint::{Checkpoint, Purpose};
use super::decoder::Continuations;
use super::device;
use super::dpo::token_logps;
use super::edge::guarded;
use super::llava_onevision::LlavaOnevision;
use super::sampling::{Chooser, answer_seed, uniform};
use crate::models::{
    self, Emit, Generation, ModelError, Picture, Policy, Prompt, RowFault, Sampling, Stop,
};
use crate::prep::{PolicyPrep, PromptIds};

/// Bytes of picture features that are kept for prompts to come: some twenty pictures of the 7B
/// model in bfloat16.
const FEATURE_BYTES_MAX: usize = 1 << 30;

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

    fn answer(&mut self, prompt: &Prompt, how: &Sampling) -> Result<Vec<Generation>, Failure> {
        let text = self.prep.ids(prompt)?;
        let room = self.prep.context() - text.ids.len();
        let tokens_max = how.max_new_tokens.min(room);
        let seeds: Vec<i64> = (0..how.count)
            .map(|answer| answer_seed(prompt.seed, answer))
            .collect();
        // Greedy answers are all the same; one is made.
        let distinct = if how.temperature == 0.0 {
            how.count.min(1)
        } else {
            how.count
        };
        let features = self.features_of(prompt)?;
        let what = format!("sampling answers to prompt {}", prompt.id);
        let length = text.ids.len() + tokens_max;
        let drafts = guarded(&what, distinct, length, || {
            self.draft(&text, &features, &seeds[..distinct], how, tokens_max)
        })?;
        let drafts = drafts.ok_or_else(|| {
            let problem = "the model's logits are not numbers: its weights hold infinities or NaN, \
                           or the precision does not suffice";
            RowFault(problem.to_owned())
        })?;
        let answers = seeds.iter().enumerate().map(|(answer, &seed)| {
            let draft = &drafts[answer.min(distinct - 1)];
            self.generation(draft, seed)
        });
        Ok(answers.collect())
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

    /// Lets one answer grow for each seed, up to `tokens_max` tokens. `None` when the logits are
    /// not numbers.
    fn draft(
        &self,
        text: &PromptIds,
        features: &[Tensor],
        seeds: &[i64],
        how: &Sampling,
        tokens_max: usize,
    ) -> Option<Vec<Draft>> {
        let mut drafts = vec![Draft::default(); seeds.len()];
        if seeds.is_empty() || tokens_max == 0 {
            return Some(drafts);
        }
        let _no_grad = tch::no_grad_guard();
        let (decoder, lm_head) = (&self.network.language_model, &self.network.lm_head);
        let device = self.network.device();
        let vocab = self.prep.card.text_config.vocab_size as i64;
        let rows = seeds.len();

        let embeds = self.network.embed_prompt(text, features);
        let (hidden, prefix) = decoder.prefill(&embeds);
        let last = hidden.narrow(0, prefix.tokens() - 1, 1);
        let mut logits = lm_head.forward(&last).expand([rows as i64, -1], false); // [rows, vocab]
        let mut chooser = Chooser::new(how, rows, &text.ids, vocab, &self.banned, device);
        let mut continuations = Continuations::new();
        let mut live: Vec<usize> = (0..rows).collect();

        for position in 0..tokens_max {
            let numbers: Vec<f64> = live
                .iter()
                .map(|&row| uniform(seeds[row], position))
                .collect();
            let tokens = chooser.choose(&logits, &numbers)?;
            let chosen = Tensor::from_slice(&tokens).to_device(device);
            let logps = token_logps(&logits, &chosen);
            let logps = Vec::<f32>::try_from(logps).expect("a vector of float32");
            let mut going_on = Vec::with_capacity(live.len());
            for (place, &row) in live.iter().enumerate() {
                drafts[row].token_ids.push(tokens[place]);
                drafts[row].token_logps.push(logps[place]);
                drafts[row].stopped = self.prep.chat.stops().contains(&tokens[place]);
                if !drafts[row].stopped {
                    going_on.push(place as i64);
                }
            }
            if going_on.is_empty() || position + 1 == tokens_max {
                break;
            }
            let mut next = chosen;
            if going_on.len() < live.len() {
                live = going_on.iter().map(|&place| live[place as usize]).collect();
                let kept = Tensor::from_slice(&going_on).to_device(device);
                next = next.index_select(0, &kept);
                chooser.keep(&kept);
                continuations.keep(&kept);
            }
            let hidden = decoder.step(&decoder.embed(&next), &prefix, &mut continuations);
            logits = lm_head.forward(&hidden);
        }
        Some(drafts)
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
        for index in by_first_picture(prompts) {
            let outcome = match self.answer(&prompts[index], how) {
                Ok(answers) => Ok(answers),
                Err(Failure::Row(fault)) => Err(fault),
                Err(Failure::Model(error)) => return Err(error),
            };
            if emit(index, outcome).is_break() {
                break;
            }
        }
        Ok(())
    }
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
