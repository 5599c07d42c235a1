//! The reward model of LLaVA-RLHF as a judge: its network, a head of one number, and the order in
//! which answers are read.
//!
//! The score is what a linear layer makes of the hidden state, after the final norm, at the last
//! token of the request to judge (github llava-rlhf/LLaVA-RLHF, `RLHF/models/reward_model.py`). All
//! answers to a prompt begin with the same tokens, most of them the picture's, so these are read
//! once: the longest common beginning of the tokenized texts, for the tokens of an answer depend on
//! what stands before it, becomes a prefix in memory that every answer continues.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::budget::packs;
use super::decoder::{Texts, Wanted};
use super::device;
use super::edge::guarded;
use super::llava::{Llava, no_adapter};
use super::weights::{Weights, refuse};
use crate::models::{Emit, Group, Judge, LlavaRlhf, ModelError, Picture, RowFault, Score};
use crate::prep::{JudgeIds, JudgePrep};

/// The file of the head, beside the adapter.
pub const HEAD_FILE: &str = "reward_head";

/// Tokens of answers to one prompt that are compared with each other, unless one alone has more.
const COMPARED_MAX: usize = 512;

/// A reward model of LLaVA-RLHF with its weights.
#[derive(Debug)]
pub struct RewardJudge {
    prep: JudgePrep,
    network: RewardNetwork,
}

/// The network and its head: pictures and texts in, rewards out.
#[derive(Debug)]
pub struct RewardNetwork {
    pub llava: Llava,
    pub head: RewardHead,
    pub kind: Kind,
    pub device: Device,
}

impl RewardJudge {
    /// Reads the three folders and the request of `spec` onto its device, in its precision.
    ///
    /// Fails when the device does not exist, a file is missing or not what it must be, or a tensor
    /// is missing, of another shape, or has no place in the network.
    pub fn open(spec: &LlavaRlhf) -> Result<Self, ModelError> {
        let (device, kind) = device::choose(spec.device, spec.dtype)?;
        let prep = JudgePrep::open(spec)?;
        let hidden = prep.card.text_config.hidden_size as i64;
        let adapter = spec.adapter.as_deref().ok_or_else(|| no_adapter(spec))?;
        // The head first: it is small, and the file that is most often forgotten.
        let head = RewardHead::open(adapter, hidden, device)?;
        let llava = Llava::open(spec, &prep.card, kind, device)?;
        let network = RewardNetwork {
            llava,
            head,
            kind,
            device,
        };
        Ok(Self { prep, network })
    }

    /// The features of a picture, `[patches, hidden]`.
    fn features(&self, picture: &Picture) -> Result<Result<Tensor, RowFault>, ModelError> {
        let pixels = match self.prep.pixels(picture) {
            Ok(pixels) => pixels,
            Err(fault) => return Ok(Err(fault)),
        };
        let patches = self.prep.card.vision_config.patches();
        guarded("looking at a picture", 1, patches, || {
            Ok(self.network.features(&pixels))
        })
    }

    /// The rewards of answers to one prompt, in their order.
    fn rewards(
        &self,
        answers: &[JudgeIds],
        features: Option<&Tensor>,
    ) -> Result<Vec<f32>, ModelError> {
        let tokens = answers.iter().map(|answer| answer.ids.len()).max();
        guarded("judging", answers.len(), tokens.unwrap_or(0), || {
            let rewards = self.network.rewards(&[(answers, features)]);
            Vec::try_from(rewards.to_device(Device::Cpu)).expect("float32, one dimension")
        })
    }
}

impl RewardNetwork {
    /// The features of a picture whose pixels are `[3, side, side]`, `[patches, hidden]`.
    pub fn features(&self, pixels: &[f32]) -> Tensor {
        let side = (pixels.len() as f64 / 3.0).sqrt() as i64;
        let pixels = Tensor::from_slice(pixels)
            .view([1, 3, side, side])
            .to_device(self.device)
            .to_kind(self.kind);
        self.llava.encode_images(&pixels).squeeze_dim(0)
    }

    /// The rewards of answers to prompts, prompt by prompt, in their order: `[answers of all]`,
    /// float32, with their gradients.
    pub fn rewards(&self, prompts: &[(&[JudgeIds], Option<&Tensor>)]) -> Tensor {
        let decoder = self.llava.decoder();
        let mut beginnings = Vec::with_capacity(prompts.len());
        let mut shared_lengths = Vec::with_capacity(prompts.len());
        for (answers, features) in prompts {
            let shared = shared_tokens(answers);
            beginnings.push(self.llava.embed(&answers[0], shared, *features));
            shared_lengths.push(shared as i64);
        }
        let beginnings = Tensor::cat(&beginnings, 0);
        let (_, prefixes) = decoder.prefill(&beginnings, &shared_lengths, Wanted::Nothing);
        let mut ids: Vec<i64> = Vec::new();
        let mut texts = Vec::new();
        for ((answers, _), prefix) in prompts.iter().zip(&prefixes) {
            let own = |answer: &JudgeIds| answer.ids[prefix.tokens() as usize..].to_vec();
            let own: Vec<Vec<i64>> = answers.iter().map(own).collect();
            let lengths: Vec<usize> = own.iter().map(Vec::len).collect();
            // Each token is compared with all others of its pack, whether or not they belong to one
            // answer.
            texts.extend(packs(&lengths, COMPARED_MAX).into_iter().map(|pack| Texts {
                prefix,
                lengths: lengths[pack].iter().map(|&length| length as i64).collect(),
            }));
            ids.extend(own.concat());
        }
        let embeds = decoder.embed(&Tensor::from_slice(&ids).to_device(self.device));
        self.head
            .forward(&decoder.branch(&embeds, &texts, Wanted::Last))
    }
}

impl Judge for RewardJudge {
    fn score(
        &mut self,
        groups: &[Group<'_>],
        emit: Emit<'_, Vec<Score>>,
    ) -> Result<(), ModelError> {
        let _no_grad = tch::no_grad_guard();
        let mut pictures = Pictures::of(groups);
        for (index, group) in groups.iter().enumerate() {
            let scored = match self.prep.ids(group) {
                Err(fault) => Err(fault),
                Ok(answers) => match group.prompt.pictures.first() {
                    None => Ok(self.rewards(&answers, None)?),
                    Some(picture) => match pictures.features(picture, self)? {
                        Err(fault) => Err(fault.clone()),
                        Ok(features) => Ok(self.rewards(&answers, Some(features))?),
                    },
                },
            };
            pictures.forget_after(index);
            let score = |reward| Score {
                reward,
                reply: None,
            };
            let scored = scored.map(|rewards| rewards.into_iter().map(score).collect());
            if emit(index, scored).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// The pictures of a call: the tower sees each once, and its features stay no longer than a group
/// needs them.
struct Pictures {
    /// The last group that shows a picture, by the picture's id.
    last_use: HashMap<String, usize>,
    /// What there is of features now, or why there are none.
    features: HashMap<String, Result<Tensor, RowFault>>,
}

impl Pictures {
    fn of(groups: &[Group<'_>]) -> Self {
        let mut last_use = HashMap::new();
        for (index, group) in groups.iter().enumerate() {
            for picture in &group.prompt.pictures {
                last_use.insert(picture.id.clone(), index);
            }
        }
        let features = HashMap::new();
        Self { last_use, features }
    }

    fn features(
        &mut self,
        picture: &Picture,
        judge: &RewardJudge,
    ) -> Result<&Result<Tensor, RowFault>, ModelError> {
        if !self.features.contains_key(&picture.id) {
            let features = judge.features(picture)?;
            self.features.insert(picture.id.clone(), features);
        }
        Ok(&self.features[&picture.id])
    }

    fn forget_after(&mut self, group: usize) {
        let last_use = &self.last_use;
        self.features.retain(|id, _| last_use[id] > group);
    }
}

/// How many tokens all texts begin with, short of the last token of the shortest: that of the
/// reward, which each must read for itself.
fn shared_tokens(answers: &[JudgeIds]) -> usize {
    let Some((first, others)) = answers.split_first() else {
        return 0;
    };
    others.iter().fold(first.ids.len() - 1, |shared, other| {
        let both = first.ids[..shared].iter().zip(&other.ids);
        let common = both.take_while(|(one, two)| one == two).count();
        common.min(other.ids.len() - 1)
    })
}

/// A linear layer from a hidden state to the reward.
#[derive(Debug)]
pub struct RewardHead {
    pub weight: Tensor, // [1, hidden]
    pub bias: Tensor,   // [1]
}

impl RewardHead {
    /// Reads the head beside the adapter in `folder`, in the precision that it was saved in.
    pub fn open(folder: &std::path::Path, hidden: i64, device: Device) -> Result<Self, ModelError> {
        let path = folder.join(HEAD_FILE);
        if !path.is_file() {
            let problem = format!(
                "the file `{HEAD_FILE}` is missing; a reward model of LLaVA-RLHF has it beside \
                 its adapter"
            );
            return Err(refuse(folder, problem));
        }
        let weights = Weights::open_file(&path)?;
        let kind = weights.kind("weight").unwrap_or(Kind::Float);
        let take = |name, shape: &[i64]| weights.take(name, shape, kind, device);
        Ok(Self {
            weight: take("weight", &[1, hidden])?,
            bias: take("bias", &[1])?,
        })
    }

    /// `[rows, hidden]` to one reward for each row, `[rows]`, in float32.
    fn forward(&self, hidden: &Tensor) -> Tensor {
        hidden
            .to_kind(self.weight.kind())
            .linear(&self.weight, Some(&self.bias)) // [rows, 1]
            .to_kind(Kind::Float)
            .squeeze_dim(1)
    }
}

#[cfg(test)]
mod tests;
