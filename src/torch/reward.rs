//! The LLaVA-RLHF reward model as a judge: its network, its scalar head, and the batching of
//! answers.
//!
//! The score is the output of a linear layer for the hidden state, after the final norm, of the
//! last token of the judge prompt with the answer (github llava-rlhf/LLaVA-RLHF,
//! `RLHF/models/reward_model.py`). All answers to a prompt share their first tokens, most of which
//! are the image's, so these are prefilled once, batched with those of other prompts. The shared
//! prefix is the longest common prefix of the tokenized texts, since the tokens of an answer depend
//! on the text before it; every answer continues from its KV cache. Equal answers are scored once.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::budget::{Budget, packs, too_large};
use super::decoder::{PackedSequence, Texts, Wanted};
use super::device;
use super::error::{guarded, refuse};
use super::images::{DecodedImage, PromptImages};
use super::layer_stack::{LayerStack, SavedActivations};
use super::llava::{LlavaRlhf, no_adapter};
use super::weights::Weights;
use ovchat_models::checkpoint::{HEAD_FILE, Sizes, judge_elements};
use ovchat_models::preprocess::{JudgeIds, LlavaRlhfProcessor};
use ovchat_models::{
    AnswerGroup, Emit, Judge, JudgeScore, LlavaRlhfSpec, ModelError, ModelTelemetry, RowFault,
    Visual,
};

/// Tokens of answers to one prompt per pack, unless a single answer has more.
const COMPARED_MAX: usize = 512;

/// A LLaVA-RLHF reward model with its weights.
#[derive(Debug)]
pub struct RewardJudge {
    prep: LlavaRlhfProcessor,
    network: RewardNetwork,
    /// The batch limits of the next call.
    pub budget: Budget,
}

/// The network and its head; maps images and texts to rewards.
#[derive(Debug)]
pub struct RewardNetwork {
    pub llava: LlavaRlhf,
    pub head: RewardHead,
    pub kind: Kind,
    pub device: Device,
}

impl RewardJudge {
    /// Loads the three folders and the judge prompt of `spec` onto its device, in its dtype.
    ///
    /// Fails if the device does not exist, a file is missing or invalid, or a tensor is missing,
    /// has another shape, or does not belong to the network.
    pub fn open(spec: &LlavaRlhfSpec) -> Result<Self, ModelError> {
        let (device, kind) = device::choose(spec.device, spec.dtype)?;
        let prep = LlavaRlhfProcessor::open(spec)?;
        let hidden = prep.config.text_config.hidden_size as i64;
        let adapter = spec.adapter.as_deref().ok_or_else(|| no_adapter(spec))?;
        device::prepare(judge_elements(&prep.config));
        // The head first: it is small, and the file that is most often missing.
        let head = RewardHead::open(adapter, hidden, device)?;
        let llava = LlavaRlhf::open(spec, &prep.config, kind, device)?;
        let element = kind.elt_size_in_bytes() as u64;
        let sizes = Sizes {
            // A scored answer leaves only one number.
            row: 0,
            ..Sizes::new(
                judge_elements(&prep.config),
                &prep.config.text_config,
                element,
            )
        };
        let network = RewardNetwork {
            llava,
            head,
            kind,
            device,
        };
        Ok(Self {
            prep,
            network,
            budget: Budget::plan(spec.memory_gb, device, sizes),
        })
    }

    /// The groups that can be scored, with their tokens, and the faults of the others.
    fn queue(
        &self,
        groups: &[AnswerGroup<'_>],
    ) -> (VecDeque<PendingGroup>, Vec<(usize, RowFault)>) {
        let (prep, budget) = (&self.prep, self.budget);
        let prepared: Vec<Result<PendingGroup, RowFault>> = groups
            .par_iter()
            .enumerate()
            .map(|(index, group)| {
                let (answers, places) = distinct(prep.ids(group)?);
                let shared = shared_tokens(&answers);
                let own = answers.iter().map(|answer| answer.ids.len() - shared);
                let waiting = PendingGroup {
                    index,
                    shown: DecodedImage::of(group.prompt),
                    tokens: [shared, own.sum()],
                    answers,
                    places,
                };
                budget.admit(waiting.tokens.iter().sum())?;
                Ok(waiting)
            })
            .collect();
        let mut queue = VecDeque::with_capacity(groups.len());
        let mut faults = Vec::new();
        for (index, waiting) in prepared.into_iter().enumerate() {
            match waiting {
                Ok(waiting) => queue.push_back(waiting),
                Err(fault) => faults.push((index, fault)),
            }
        }
        (queue, faults)
    }

    /// The next groups that fit into one batch.
    fn next(waiting: &mut VecDeque<PendingGroup>, budget: &Budget) -> Vec<PendingGroup> {
        let tokens_max = budget.read_tokens.min(budget.tokens);
        let lengths: Vec<usize> = waiting.iter().map(|one| one.tokens.iter().sum()).collect();
        let first = packs(&lengths, tokens_max).first().map_or(0, Range::len);
        waiting.drain(..first).collect()
    }

    /// The scores of the groups of one batch, in order, or the fault of a group whose image cannot
    /// be decoded.
    fn judge(
        &self,
        groups: &[PendingGroup],
        images: &mut PromptImages<'_, Vec<f32>>,
        telemetry: &mut ModelTelemetry,
    ) -> Result<Vec<Result<Vec<JudgeScore>, RowFault>>, ModelError> {
        let shown: Vec<DecodedImage> = groups.iter().flat_map(|one| one.shown.clone()).collect();
        let patches = self.prep.config.vision_config.patches();
        images.look(&shown, |pixels| {
            let begun = Instant::now();
            let features = guarded("encoding images", pixels.len(), patches, || {
                let features = self.network.features(pixels);
                device::wait(self.network.device);
                features
            });
            telemetry.seconds_tower += begun.elapsed().as_secs_f64();
            features
        })?;
        let begun = Instant::now();
        let features: Vec<Result<Vec<Tensor>, RowFault>> = groups
            .iter()
            .map(|group| images.features(&group.shown))
            .collect();
        let seen: Vec<(&[JudgeIds], Option<&Tensor>)> = groups
            .iter()
            .zip(&features)
            .filter_map(|(group, features)| {
                let features = features.as_ref().ok()?;
                Some((group.answers.as_slice(), features.first()))
            })
            .collect();
        let rows = seen.iter().map(|(answers, _)| answers.len()).sum();
        let tokens = groups.iter().flat_map(|group| group.tokens).sum();
        let rewards: Vec<f32> = if seen.is_empty() {
            Vec::new()
        } else {
            guarded("judging", rows, tokens, || {
                let rewards = self.network.rewards(&seen).to_device(Device::Cpu);
                Vec::try_from(rewards).expect("float32, one dimension")
            })?
        };
        let mut rewards = rewards.into_iter();
        let scored = groups.iter().zip(features).map(|(group, features)| {
            features?;
            let [prompt, answers] = group.tokens.map(|tokens| tokens as u64);
            telemetry.prompt_tokens += prompt;
            telemetry.answer_tokens += answers;
            let rewards: Vec<f32> = rewards.by_ref().take(group.answers.len()).collect();
            let score = |&place: &usize| JudgeScore::of(rewards[place]);
            Ok(group.places.iter().map(score).collect())
        });
        let scored = scored.collect();
        telemetry.seconds_decode += begun.elapsed().as_secs_f64();
        Ok(scored)
    }
}

/// A group that waits to be scored.
struct PendingGroup {
    /// Its index in the call.
    index: usize,
    shown: Vec<DecodedImage>,
    /// The distinct answers.
    answers: Vec<JudgeIds>,
    /// The index in `answers` of each answer of the group.
    places: Vec<usize>,
    /// The number of tokens that all answers share, and of all other tokens.
    tokens: [usize; 2],
}

impl RewardNetwork {
    /// Encodes images with pixels `[3, side, side]` as features, `[patches, hidden]` each.
    pub fn features<P: AsRef<[f32]>>(&self, images: &[P]) -> Vec<Tensor> {
        let pixels: Vec<Tensor> = images
            .iter()
            .map(|pixels| {
                let pixels = pixels.as_ref();
                let side = (pixels.len() as f64 / 3.0).sqrt() as i64;
                Tensor::from_slice(pixels).view([1, 3, side, side])
            })
            .collect();
        let pixels = Tensor::cat(&pixels, 0)
            .to_device(self.device)
            .to_kind(self.kind);
        self.llava.encode_images(&pixels).unbind(0)
    }

    /// The rewards of answers to prompts, prompt by prompt, in order: `[answers of all]`, float32,
    /// with gradients.
    pub fn rewards(&self, prompts: &[(&[JudgeIds], Option<&Tensor>)]) -> Tensor {
        let decoder = self.llava.decoder();
        let mut prefixes = Vec::with_capacity(prompts.len());
        let mut shared_lengths = Vec::with_capacity(prompts.len());
        for (answers, features) in prompts {
            let shared = shared_tokens(answers);
            prefixes.push(self.llava.embed(&answers[0], shared, *features));
            shared_lengths.push(shared as i64);
        }
        let prefixes = Tensor::cat(&prefixes, 0);
        let (_, prefixes) = decoder.prefill(&prefixes, &shared_lengths, Wanted::Nothing);
        let mut ids: Vec<i64> = Vec::new();
        let mut texts = Vec::new();
        for ((answers, _), prefix) in prompts.iter().zip(&prefixes) {
            let own = |answer: &JudgeIds| answer.ids[prefix.tokens() as usize..].to_vec();
            let own: Vec<Vec<i64>> = answers.iter().map(own).collect();
            let lengths: Vec<usize> = own.iter().map(Vec::len).collect();
            // Attention compares each token with all others of its pack, whether or not they belong
            // to the same answer.
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

impl RewardNetwork {
    /// The rewards of answers to prompts in training, `[answers of all]`, float32, and the layer stack
    /// that continues their backward pass. Each prompt is packed with its answers.
    pub fn learned_rewards(
        &self,
        prompts: &[(&[JudgeIds], Option<&Tensor>)],
        keep: SavedActivations,
    ) -> (Tensor, LayerStack<'_>) {
        let decoder = self.llava.decoder();
        let (mut embeds, mut trees, mut lasts) = (Vec::new(), Vec::new(), Vec::new());
        let mut wanted = 0;
        for (answers, features) in prompts {
            let shared = shared_tokens(answers);
            embeds.push(self.llava.embed(&answers[0], shared, *features));
            let own = answers.iter().map(|answer| &answer.ids[shared..]);
            let own: Vec<&[i64]> = own.collect();
            embeds.push(decoder.embed(&Tensor::from_slice(&own.concat()).to_device(self.device)));
            let branches: Vec<i64> = own.iter().map(|ids| ids.len() as i64).collect();
            for length in &branches {
                wanted += length;
                lasts.push(wanted - 1);
            }
            trees.push(PackedSequence {
                prompt: shared as i64,
                branches,
                wanted_from: shared as i64,
            });
        }
        let embeds = Tensor::cat(&embeds, 0).to_kind(self.kind);
        let chain = decoder.read(&embeds, trees, keep);
        let lasts = Tensor::from_slice(&lasts).to_device(self.device);
        let rewards = self.head.forward(&chain.output().index_select(0, &lasts));
        (rewards, chain)
    }
}

impl Judge for RewardJudge {
    fn score(
        &mut self,
        groups: &[AnswerGroup<'_>],
        emit: Emit<'_, Vec<JudgeScore>>,
    ) -> Result<ModelTelemetry, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let mut telemetry = ModelTelemetry::default();
        let (mut waiting, faults) = self.queue(groups);
        telemetry.prompts = waiting.len() as u64;
        for (index, fault) in faults {
            if emit(index, Err(fault)).is_break() {
                return Ok(telemetry);
            }
        }
        let prep = &self.prep;
        let decode = |image: &Visual, _: bool| prep.pixels(image);
        let mut budget = self.budget;
        std::thread::scope(|scope| {
            let shown = waiting.iter().map(|one| groups[one.index].prompt);
            let mut images = PromptImages::begin(scope, shown, &decode);
            'groups: while !waiting.is_empty() {
                let some = Self::next(&mut waiting, &budget);
                let scored = match self.judge(&some, &mut images, &mut telemetry) {
                    Ok(scored) => scored,
                    Err(error @ ModelError::OutOfMemory { .. }) if some.len() == 1 => {
                        vec![Err(too_large(&error))]
                    }
                    Err(ModelError::OutOfMemory { .. }) => {
                        budget.halve();
                        for group in some.into_iter().rev() {
                            waiting.push_front(group);
                        }
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                for (group, scored) in some.iter().zip(scored) {
                    images.done(&group.shown);
                    if emit(group.index, scored).is_break() {
                        break 'groups;
                    }
                }
            }
            telemetry.images = images.tally.images;
            telemetry.tower_passes = images.tally.passes;
            telemetry.seconds_images = images.tally.seconds_decoding;
            telemetry.seconds_waiting = images.tally.seconds_waiting;
            Ok::<_, ModelError>(())
        })?;
        telemetry.tokens_max = budget.read_tokens.min(budget.tokens) as u64;
        telemetry.oom_retries = budget.oom_retries;
        self.budget = budget.for_next();
        Ok(telemetry)
    }

    fn plan(&self) -> Option<String> {
        Some(self.budget.of_scoring())
    }
}

/// Returns the distinct texts in order of first occurrence, and the index of each text among them.
/// Equal answers are scored once, so their rewards are bitwise equal.
fn distinct(texts: Vec<JudgeIds>) -> (Vec<JudgeIds>, Vec<usize>) {
    let mut distinct: Vec<JudgeIds> = Vec::with_capacity(texts.len());
    let mut places = Vec::with_capacity(texts.len());
    for text in texts {
        let place = distinct.iter().position(|known| *known == text);
        places.push(place.unwrap_or(distinct.len()));
        if place.is_none() {
            distinct.push(text);
        }
    }
    (distinct, places)
}

/// The length of the longest common prefix, at most up to the last token of the shortest text: the
/// reward is read from that token, which each text must process itself.
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

/// The linear layer from a hidden state to the reward.
#[derive(Debug)]
pub struct RewardHead {
    pub weight: Tensor, // [1, hidden]
    pub bias: Tensor,   // [1]
}

impl RewardHead {
    /// Loads the head next to the adapter in `folder`, in the dtype that it was saved in.
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

    /// Maps `[rows, hidden]` to one reward per row, `[rows]`, in float32.
    fn forward(&self, hidden: &Tensor) -> Tensor {
        hidden
            .to_kind(self.weight.kind())
            .linear(&self.weight, Some(&self.bias)) // [rows, 1]
            .to_kind(Kind::Float)
            .squeeze_dim(1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::tests::run_out_after;
    use super::super::recorded::reward::{
        assert_near, folder, groups, measured, prompt, rows, spec, threefold,
    };
    use super::*;
    use ovchat_models::ChatPrompt;

    #[test]
    fn memory_that_runs_out_costs_time_or_the_group_that_was_alone() {
        let rows = rows();
        let prompts: Vec<ChatPrompt> = rows.iter().map(prompt).collect();
        let groups = threefold(&groups(&rows, &prompts));
        let expected: Vec<f32> = (0..3)
            .flat_map(|_| rows.iter().map(|row| row.reward))
            .collect();
        let mut judge = RewardJudge::open(&spec(&folder())).unwrap();
        let budget = judge.budget;
        for calls in 0..2 {
            judge.budget = budget;
            run_out_after(calls);
            let (found, telemetry) = measured(&mut judge, &groups);
            assert_eq!(telemetry.oom_retries, 1);
            let found: Vec<f32> = found.into_iter().flat_map(Result::unwrap).collect();
            assert_near(&found, &expected, 1e-5);
        }
        judge.budget.read_tokens = 1;
        run_out_after(1);
        let (found, telemetry) = measured(&mut judge, &groups);
        let fault = found[0].as_ref().unwrap_err();
        assert!(fault.0.contains("in a batch of its own"), "{fault}");
        assert!(found[1..].iter().all(Result::is_ok));
        assert_eq!(telemetry.oom_retries, 0);
    }

    #[test]
    fn answers_share_all_tokens_but_the_last_of_the_shortest() {
        let text = |ids: &[i64]| JudgeIds {
            ids: ids.to_vec(),
            image: None,
        };
        assert_eq!(shared_tokens(&[]), 0);
        assert_eq!(shared_tokens(&[text(&[1, 2, 3])]), 2);
        assert_eq!(shared_tokens(&[text(&[1, 2, 3]), text(&[1, 2, 3])]), 2);
        assert_eq!(
            shared_tokens(&[text(&[1, 2, 3, 4]), text(&[1, 2, 5]), text(&[1, 2])]),
            1
        );
        assert_eq!(shared_tokens(&[text(&[1, 7, 3]), text(&[1, 2, 3])]), 1);
    }
}
