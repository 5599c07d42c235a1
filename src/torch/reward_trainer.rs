//! The reward trainer: a LoRA adapter and a head learn to score chosen answers above rejected ones,
//! as in `RLHF/models/reward_model.py` of LLaVA-RLHF.
//!
//! A pair takes one pass over the common prefix of its two texts and the rest of both. Base, projector
//! and tower are frozen; adapter and head are in float32, activations in the dtype of the model's spec.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::budget::{TrainingBudget, packs};
use super::casts::KeptCasts;
use super::checkpoint::{Checkpoint, Purpose, Reader};
use super::device;
use super::error::{guarded, refuse};
use super::layer_stack::{LayerStack, SavedActivations};
use super::llava::LlavaRlhf;
use super::lora::{
    Adapted, Adapter, Names, SavedAdapterConfig, Start, save_adapter, seeded_uniform,
};
use super::optimizer::Parameter;
use super::reward::{RewardHead, RewardNetwork};
use super::training::{TrainingState, doing, not_finite, row_error};
use super::weights::save_torch;
use ovchat_models::checkpoint::{HEAD_FILE, TWO_LAYERS, TrainingSizes, judge_elements};
use ovchat_models::preprocess::{JudgeIds, Judged, LlavaRlhfProcessor};
use ovchat_models::{
    AnswerGroup, Checkpointing, Example, LlavaRlhfSpec, ModelError, RewardReport, RewardSettings,
    RewardTrainer, RowFault, Trainer,
};

/// The target modules of LLaVA-RLHF (`adapter_config.json` of `rm_lora_adapter_model`).
const TARGET_MODULES: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

/// The parameters of the head, after those of the adapter.
const HEAD: [&str; 2] = ["reward_head.weight", "reward_head.bias"];

/// A LLaVA-RLHF reward model in training.
pub struct LlavaRewardTrainer {
    prep: LlavaRlhfProcessor,
    network: RewardNetwork,
    training: TrainingState,
    budget: TrainingBudget,
    centering: f64,
    /// The dtype in which the adapter is saved: that of the initial adapter, or of the base's
    /// weights.
    stored: Kind,
    /// The folder of the initial adapter, whose config is kept.
    adapter: Option<PathBuf>,
    rank: usize,
    alpha: f64,
    base: PathBuf,
}

impl LlavaRewardTrainer {
    /// The training state.
    pub fn training(&self) -> &TrainingState {
        &self.training
    }

    /// Opens the base and the tower, and an adapter: the one that `spec` names, or a new one.
    pub fn open(spec: &LlavaRlhfSpec, settings: &RewardSettings) -> Result<Self, ModelError> {
        let (device, kind) = device::choose(spec.device, spec.dtype)?;
        let prep = LlavaRlhfProcessor::open(spec)?;
        let hidden = prep.config.text_config.hidden_size as i64;
        let existing = prep
            .config
            .adapter
            .as_ref()
            .map(|config| Adapter::open(config, Names::Same));
        let existing = existing.transpose()?;
        let rank = prep
            .config
            .adapter
            .as_ref()
            .map_or(settings.rank, |adapter| adapter.r);
        let element = kind.elt_size_in_bytes() as u64;
        device::prepare(judge_elements(&prep.config));
        let sizes = TrainingSizes::of_adapter(&prep.config, rank, element);
        let budget = TrainingBudget::plan(spec.memory_gb, device, sizes, Checkpointing::Auto);
        let budget = budget.map_err(|problem| refuse(&spec.base, problem))?;
        let start = match &existing {
            Some(adapter) => Start::At(adapter),
            None => Start::Fresh {
                rank: settings.rank,
                alpha: settings.alpha,
                seed: settings.seed,
                target_modules: &TARGET_MODULES,
            },
        };
        let head = if let Some(adapter) = &spec.adapter {
            let head = RewardHead::open(adapter, hidden, device)?;
            [head.weight, head.bias].map(|tensor| tensor.to_kind(Kind::Float))
        } else {
            // Initialized as by `nn.Linear`, with a bias of 0.
            let bound = (hidden as f64).sqrt().recip();
            let weight = seeded_uniform(settings.seed, HEAD[0], &[1, hidden], bound);
            let bias = Tensor::zeros([1], (Kind::Float, device));
            [weight.to_device(device), bias]
        };
        let [weight, bias] = head.map(|tensor| tensor.set_requires_grad(true));
        let base = Checkpoint::open_base(&spec.base)?;
        let vision = Checkpoint::open_clip(&spec.vision)?;
        let reader = |from| Reader::new(from, device, kind, Purpose::Inference);
        let adapted = Adapted::new(reader(&base), start, Names::Same, None);
        let two_layers = base.has(TWO_LAYERS);
        let llava = LlavaRlhf::new(&reader(&vision), &adapted, two_layers, &prep.config)?;
        let mut parameters = adapted.into_parameters();
        if let Some(adapter) = &existing {
            adapter.all_used()?;
        }
        for (name, tensor) in HEAD.into_iter().zip([&weight, &bias]) {
            parameters.push(Parameter {
                name: name.to_owned(),
                tensor: tensor.shallow_clone(),
            });
        }
        let stored = existing.as_ref().and_then(Adapter::kind);
        let stored = stored.or_else(|| base.kind("model.norm.weight"));
        Ok(Self {
            stored: stored.unwrap_or(Kind::Float),
            adapter: prep
                .config
                .adapter
                .as_ref()
                .map(|config| config.folder.clone()),
            prep,
            network: RewardNetwork {
                llava,
                head: RewardHead { weight, bias },
                kind,
                device,
            },
            budget,
            training: TrainingState::new(parameters, &settings.optimization)?,
            centering: settings.centering,
            rank: settings.rank,
            alpha: settings.alpha,
            base: spec.base.clone(),
        })
    }

    /// The rewards of the chosen and the rejected answer of each pair, `[pairs, 2]` in float64, and the
    /// layer stack that continues their backward pass.
    fn rewards(&self, pairs: &[Judged], keep: SavedActivations) -> (Tensor, LayerStack<'_>) {
        let pixels: Vec<&[f32]> = pairs
            .iter()
            .filter_map(|pair| pair.pixels.as_deref())
            .collect();
        let features = if pixels.is_empty() {
            Vec::new()
        } else {
            let _no_grad = tch::no_grad_guard();
            self.network.features(&pixels)
        };
        let mut features = features.iter();
        let prompts: Vec<(&[JudgeIds], Option<&Tensor>)> = pairs
            .iter()
            .map(|pair| {
                let features = pair.pixels.as_ref().and_then(|_| features.next());
                (pair.answers.as_slice(), features)
            })
            .collect();
        let (rewards, chain) = self.network.learned_rewards(&prompts, keep);
        (rewards.to_kind(Kind::Double).view([-1, 2]), chain)
    }

    /// Scores the pairs of a batch, and adds to the gradients. Returns the rewards and the loss.
    fn learn(&self, ids: &[&str], pairs: &[Judged]) -> Result<(Vec<[f64; 2]>, f64), ModelError> {
        let counts: Vec<usize> = pairs.iter().map(tokens).collect();
        let packs = packs(&counts, self.budget.pack_tokens());
        let keep = |pack: &Range<usize>| self.budget.keep(counts[pack.clone()].iter().sum(), 0);
        let longest = packs.iter().map(|pack| counts[pack.clone()].iter().sum());
        let has_room = self.budget.keeps_casts(longest.max().unwrap_or(0), 0);
        let _casts = KeptCasts::new(has_room);
        let mut rewards: Vec<[f64; 2]> = Vec::with_capacity(pairs.len());
        let mut with_gradients = None;
        for pack in &packs {
            let what = doing("judging", "pair", &ids[pack.clone()]);
            let length = counts[pack.clone()].iter().sum();
            let judged = guarded(&what, 2 * pack.len(), length, || {
                let pairs = &pairs[pack.clone()];
                if packs.len() > 1 {
                    let _no_grad = tch::no_grad_guard();
                    self.rewards(pairs, SavedActivations::Nothing)
                } else {
                    self.rewards(pairs, keep(pack))
                }
            })?;
            let values = Vec::<Vec<f64>>::try_from(&judged.0).expect("a matrix of float64");
            rewards.extend(values.iter().map(|judged| [judged[0], judged[1]]));
            with_gradients = (packs.len() == 1).then_some(judged);
        }
        for (id, rewards) in ids.iter().zip(&rewards) {
            if !rewards.iter().all(|reward| reward.is_finite()) {
                let rows = ids.iter().map(|&id| id.to_owned()).collect();
                return Err(not_finite(format!("a reward of pair {id}"), rows));
            }
        }
        let (loss, slopes) = loss_and_slopes(&rewards, self.centering);
        for pack in packs {
            let what = doing("training on", "pair", &ids[pack.clone()]);
            let length = counts[pack.clone()].iter().sum();
            guarded(&what, 2 * pack.len(), length, || {
                let slopes = Tensor::from_slice(&slopes[pack.clone()].concat())
                    .view([-1, 2])
                    .to_device(self.network.device);
                let (judged, chain) = with_gradients
                    .take()
                    .unwrap_or_else(|| self.rewards(&pairs[pack.clone()], keep(&pack)));
                (judged * slopes).sum(Kind::Double).backward();
                chain.backward();
            })?;
        }
        Ok((rewards, loss))
    }
}

/// The number of tokens of a pair, counting what its answers share twice.
fn tokens(pair: &Judged) -> usize {
    let answers = pair.answers.iter();
    answers.map(|text| text.ids.len()).sum()
}

/// The loss of a batch of rewards, the mean of `-log sigmoid(r_chosen - r_rejected)` plus
/// `centering` times the absolute value of the mean of `r_chosen + r_rejected`, and its partial
/// derivatives with respect to the two rewards of each pair.
fn loss_and_slopes(rewards: &[[f64; 2]], centering: f64) -> (f64, Vec<[f64; 2]>) {
    let count = rewards.len() as f64;
    let center = rewards.iter().flatten().sum::<f64>() / count;
    // ln(1 + e^-margin), which is equal and does not overflow.
    let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
    let preference = rewards
        .iter()
        .map(|[chosen, rejected]| softplus(rejected - chosen));
    let loss = preference.sum::<f64>() / count + centering * center.abs();
    let pull = if center == 0.0 {
        0.0
    } else {
        centering * center.signum() / count
    };
    let slopes = rewards.iter().map(|[chosen, rejected]| {
        let push = 1.0 / (1.0 + (chosen - rejected).exp()) / count;
        [pull - push, pull + push]
    });
    (loss, slopes.collect())
}

impl RewardTrainer for LlavaRewardTrainer {
    /// The centering term depends on all pairs of a batch, so they are scored before the loss
    /// gradient of any reward is known. Pairs that do not fit into one pass are scored again, in
    /// parts, for the backward pass.
    fn step(&mut self, batch: &[Example<'_>]) -> Result<RewardReport, ModelError> {
        assert!(!batch.is_empty(), "a step needs at least one pair");
        let rows = || batch.iter().map(|pair| pair.id.to_owned()).collect();
        let prep = &self.prep;
        let prepare = |pair: &Example<'_>| {
            prep.prepare(&AnswerGroup::new(
                pair.prompt,
                vec![&pair.chosen.text, &pair.rejected.text],
            ))
        };
        let prepared: Vec<Result<Judged, RowFault>> = batch.par_iter().map(prepare).collect();
        let mut pairs = Vec::with_capacity(batch.len());
        for (row, prepared) in batch.iter().zip(prepared) {
            pairs.push(prepared.map_err(|fault| row_error(row.id, fault.to_string()))?);
        }
        let ids: Vec<&str> = batch.iter().map(|pair| pair.id).collect();
        let (rewards, loss, update) = loop {
            self.training.begin_step();
            let learned = self.learn(&ids, &pairs);
            let updated = learned.and_then(|(rewards, loss)| {
                let update = self.training.update(rows, |_| true)?;
                Ok((rewards, loss, update))
            });
            match updated {
                Err(ModelError::OutOfMemory { .. }) if self.budget.relieve() => {}
                done => break done?,
            }
        };
        let count = batch.len() as f64;
        let mean =
            |value: &dyn Fn(&[f64; 2]) -> f64| rewards.iter().map(value).sum::<f64>() / count;
        Ok(RewardReport {
            loss,
            reward_chosen: mean(&|rewards| rewards[0]),
            reward_rejected: mean(&|rewards| rewards[1]),
            accuracy: mean(&|rewards| f64::from(u8::from(rewards[0] > rewards[1]))),
            grad_norm: update.grad_norm,
            learning_rate: update.learning_rate,
            tokens: pairs.iter().map(tokens).sum::<usize>() as u64,
        })
    }
}

impl Trainer for LlavaRewardTrainer {
    /// Writes the folder `adapter` in the format of peft and LLaVA-RLHF: `adapter_config.json`,
    /// `adapter_model.safetensors`, and `reward_head` as written by `torch.save`.
    fn save(&mut self, to: &Path) -> Result<(), ModelError> {
        let folder = to.join("adapter");
        let io = |error: std::io::Error| refuse(&folder, error.to_string());
        fs::create_dir_all(&folder).map_err(io)?;
        let (adapter, head) = self
            .training
            .parameters
            .split_at(self.training.parameters.len() - HEAD.len());
        let config = SavedAdapterConfig {
            base: &self.base,
            rank: self.rank,
            alpha: self.alpha,
            dropout: 0.0,
            targets: TARGET_MODULES.to_vec(),
        };
        save_adapter(&folder, &config, Names::Same, adapter, self.stored)?;
        if let Some(begun) = &self.adapter {
            // The original config has more fields, and they are still valid.
            let name = "adapter_config.json";
            fs::copy(begun.join(name), folder.join(name)).map_err(io)?;
            let copied = File::open(folder.join(name)).and_then(|file| file.sync_all());
            copied.map_err(io)?;
        }
        // In float32, since it is small and determines the last digits of every reward.
        let head: Vec<(&str, Tensor)> = ["weight", "bias"]
            .into_iter()
            .zip(head)
            .map(|(name, parameter)| (name, parameter.tensor.detach()))
            .collect();
        save_torch(&folder.join(HEAD_FILE), &head)?;
        for written in [&folder, &to.to_owned()] {
            File::open(written)
                .and_then(|file| file.sync_all())
                .map_err(io)?;
        }
        Ok(())
    }

    fn save_state(&mut self, to: &Path) -> Result<(), ModelError> {
        self.training.save_state(to)
    }

    fn load_state(&mut self, from: &Path) -> Result<(), ModelError> {
        self.training.load_state(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rewards 1 and 0, then 0.5 and 1.5: margins 1 and -1, sums 1 and 2, so the mean of the sums
    /// is 1.5.
    #[test]
    fn the_loss_and_its_slopes_are_those_of_the_reference_by_hand() {
        let rewards = [[1.0, 0.0], [0.5, 1.5]];
        let (loss, slopes) = loss_and_slopes(&rewards, 1e-3);
        let by_hand = f64::midpoint((-1.0f64).exp().ln_1p(), 1.0f64.exp().ln_1p()) + 1e-3 * 1.5;
        assert!((loss - by_hand).abs() < 1e-12);
        for row in 0..2 {
            for side in 0..2 {
                let step = 1e-6;
                let mut moved = rewards;
                moved[row][side] += step;
                let slope = (loss_and_slopes(&moved, 1e-3).0 - loss) / step;
                assert!((slope - slopes[row][side]).abs() < 1e-6, "{slope}");
            }
        }
        let (huge, _) = loss_and_slopes(&[[-4000.0, 4000.0]], 0.0);
        assert!((huge - 8000.0).abs() < 1e-9);
    }
}
