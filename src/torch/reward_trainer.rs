//! The reward trainer: a LoRA adapter and a head learn to score chosen answers above rejected ones,
//! as in `RLHF/models/reward_model.py` of LLaVA-RLHF.
//!
//! A pair takes one pass over the common prefix of its two texts and one over the rest of both, as
//! in scoring. Base, projector and tower are frozen. Training is in float32.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::budget::packs;
use super::checkpoint::{Checkpoint, Purpose, Reader};
use super::device;
use super::error::{guarded, refuse};
use super::llava::LlavaRlhf;
use super::lora::{
    Adapted, Adapter, Names, SavedAdapterConfig, Start, save_adapter, seeded_uniform,
};
use super::optimizer::Parameter;
use super::reward::{RewardHead, RewardNetwork};
use super::training::{TrainingState, doing, not_finite, row_error};
use super::weights::save_torch;
use ovchat_models::checkpoint::{HEAD_FILE, PACK_TOKENS_MAX, TWO_LAYERS};
use ovchat_models::preprocess::{JudgeIds, Judged, LlavaRlhfProcessor};
use ovchat_models::{
    AnswerGroup, Example, LlavaRlhfSpec, ModelError, RewardReport, RewardSettings, RewardTrainer,
    RowFault, Trainer,
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
        let (device, _) = device::choose(spec.device, spec.dtype)?;
        let prep = LlavaRlhfProcessor::open(spec)?;
        let hidden = prep.config.text_config.hidden_size as i64;
        let existing = prep
            .config
            .adapter
            .as_ref()
            .map(|config| Adapter::open(config, Names::Same));
        let existing = existing.transpose()?;
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
        let reader = |from| Reader::new(from, device, Kind::Float, Purpose::Inference);
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
                kind: Kind::Float,
                device,
            },
            training: TrainingState::new(parameters, &settings.optimization)?,
            centering: settings.centering,
            rank: settings.rank,
            alpha: settings.alpha,
            base: spec.base.clone(),
        })
    }

    /// The rewards of the chosen and the rejected answer of each pair, `[pairs, 2]` in float64,
    /// with gradients.
    fn rewards(&self, pairs: &[Judged]) -> Tensor {
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
        let rewards = self.network.rewards(&prompts);
        rewards.to_kind(Kind::Double).view([-1, 2])
    }
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
        let tokens = |pair: &Judged| {
            pair.answers
                .iter()
                .map(|text| text.ids.len())
                .sum::<usize>()
        };
        self.training.begin_step();
        let ids: Vec<&str> = batch.iter().map(|pair| pair.id).collect();
        let counts: Vec<usize> = pairs.iter().map(tokens).collect();
        let packs = packs(&counts, PACK_TOKENS_MAX);
        let mut rewards: Vec<[f64; 2]> = Vec::with_capacity(batch.len());
        let mut with_gradients = None;
        for pack in &packs {
            let what = doing("judging", "pair", &ids[pack.clone()]);
            let length = counts[pack.clone()].iter().sum();
            let judged = guarded(&what, 2 * pack.len(), length, || {
                let _no_grad = (packs.len() > 1).then(tch::no_grad_guard);
                self.rewards(&pairs[pack.clone()])
            })?;
            let values = Vec::<Vec<f64>>::try_from(&judged).expect("a matrix of float64");
            rewards.extend(values.iter().map(|judged| [judged[0], judged[1]]));
            with_gradients = (packs.len() == 1).then_some(judged);
        }
        for (row, rewards) in batch.iter().zip(&rewards) {
            if !rewards.iter().all(|reward| reward.is_finite()) {
                return Err(not_finite(format!("a reward of pair {}", row.id), rows()));
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
                let judged = with_gradients
                    .take()
                    .unwrap_or_else(|| self.rewards(&pairs[pack.clone()]));
                (judged * slopes).sum(Kind::Double).backward();
            })?;
        }
        let update = self.training.update(rows, |_| true)?;
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
            tokens: counts.iter().sum::<usize>() as u64,
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
