//! DPO training of the whole network: tower, projector, newline and decoder, in float32.
//!
//! A pair is one pass over `[prompt | chosen | rejected]`: the prompt is read once, both answers
//! behind it, and logits are computed only where they predict an answer's token. Pairs go one by
//! one; their gradients add up. Dropout there is none in any published config (`attention_dropout`
//! 0), so training and inference compute the same.

use std::fs::{self, File};
use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::checkpoint::{Checkpoint, Purpose};
use super::device;
use super::dpo::{PairLoss, dpo_loss, token_logps};
use super::edge::guarded;
use super::llava_onevision::LlavaOnevision;
use super::optimizer::{
    AdamW, CosineWithWarmup, Moments, Parameter, clip_gradients, grad_norm, zero_gradients,
};
use super::weights::{Weights, save_safetensors};
use crate::models::{self, Answer, Example, Learner, ModelError, StepReport, TrainSettings};
use crate::prep::{PolicyPrep, Prepared};

/// The file in the folder of [`Learner::save_state`].
const STATE_FILE: &str = "state.safetensors";

/// LLaVA-OneVision as a learner.
#[derive(Debug)]
pub struct OnevisionLearner {
    prep: PolicyPrep,
    checkpoint: Checkpoint,
    network: LlavaOnevision,
    parameters: Vec<Parameter>,
    optimizer: AdamW,
    schedule: CosineWithWarmup,
    settings: TrainSettings,
    /// Updates that were made.
    step: usize,
}

/// A pair as the network takes it.
struct Tokens {
    prompt: Prepared,
    /// The ids of the chosen and the rejected answer, each at least one.
    answers: [Vec<i64>; 2],
}

impl Tokens {
    /// Tokens that go through the decoder.
    fn count(&self) -> usize {
        self.prompt.text.ids.len() + self.answers[0].len() + self.answers[1].len()
    }
}

/// Sums over the pairs of a step.
#[derive(Debug, Default)]
struct Sums {
    loss: f64,
    rewards: [f64; 2],
    accurate: f64,
    logps: [f64; 2],
    tokens: u64,
}

impl OnevisionLearner {
    /// Opens the checkpoint in `weights`, or else in the folder of the spec. The precision in the
    /// spec is that of sampling; training is in float32.
    pub fn open(
        spec: &models::LlavaOnevision,
        weights: Option<&Path>,
        settings: &TrainSettings,
    ) -> Result<Self, ModelError> {
        let folder = weights.unwrap_or(&spec.weights);
        let prep = PolicyPrep::open(folder)?;
        let (device, _) = device::choose(spec.device, spec.dtype)?;
        let checkpoint = Checkpoint::open(folder)?;
        let purpose = Purpose::Training;
        let (network, parameters) =
            LlavaOnevision::open(&checkpoint, &prep.card, device, Kind::Float, purpose)?;
        let optimizer = guarded("making the optimizer's state", 1, 0, || {
            let (betas, epsilon) = (settings.adam_betas, settings.adam_epsilon);
            AdamW::new(&parameters, betas, epsilon, settings.weight_decay)
        })?;
        let (peak, warmup_ratio) = (settings.learning_rate, settings.warmup_ratio);
        Ok(Self {
            prep,
            checkpoint,
            network,
            parameters,
            optimizer,
            schedule: CosineWithWarmup::new(peak, warmup_ratio, settings.steps),
            settings: settings.clone(),
            step: 0,
        })
    }

    /// Decodes, cuts and tokenizes a pair, and checks that it can be trained on.
    fn tokens(&self, example: &Example<'_>) -> Result<Tokens, ModelError> {
        let refuse = |problem: String| pair_error(example, problem);
        let prompt = self
            .prep
            .prepare(example.prompt)
            .map_err(|fault| refuse(fault.to_string()))?;
        let ids = |answer: &Answer, side: &str| {
            let ids = match &answer.token_ids {
                Some(ids) => ids.iter().map(|&id| i64::from(id)).collect(),
                None => self
                    .prep
                    .chat
                    .answer(&answer.text)
                    .map_err(|fault| refuse(format!("the {side} answer: {fault}")))?,
            };
            let vocab = self.prep.card.text_config.vocab_size as i64;
            if let Some(id) = ids.iter().find(|id| !(0..vocab).contains(id)) {
                let problem = format!("the {side} answer holds token {id}; there are {vocab}");
                return Err(refuse(problem));
            }
            let (length, context) = (prompt.text.ids.len() + ids.len(), self.prep.context());
            if ids.is_empty() {
                Err(refuse(format!("the {side} answer has no tokens")))
            } else if length > context {
                let problem = format!(
                    "prompt and {side} answer take {length} tokens, and the model's context is \
                     {context}"
                );
                Err(refuse(problem))
            } else {
                Ok(ids)
            }
        };
        let answers = [
            ids(&example.chosen, "chosen")?,
            ids(&example.rejected, "rejected")?,
        ];
        Ok(Tokens { prompt, answers })
    }

    /// The log-probabilities of the chosen and the rejected answer, scalars in float64.
    fn logps(&self, tokens: &Tokens) -> [Tensor; 2] {
        let network = &self.network;
        let decoder = &network.language_model;
        let on_device = |ids: &[i64]| Tensor::from_slice(ids).to_device(network.device());
        let features: Vec<Tensor> = tokens
            .prompt
            .pictures
            .iter()
            .map(|tiles| network.image_features(tiles))
            .collect();
        let embeds = network.embed_prompt(&tokens.prompt.text, &features);
        let (hidden, prefix) = decoder.prefill(&embeds); // [prompt, hidden]
        let last = hidden.narrow(0, prefix.tokens() - 1, 1);

        // The prompt's last token predicts the first of each answer, each token the next; the last
        // one predicts nothing and is not read.
        let read = tokens.answers.each_ref().map(|ids| &ids[..ids.len() - 1]);
        let lengths = read.map(|ids| ids.len() as i64);
        let mut behind = vec![last.shallow_clone(), last];
        if lengths.iter().any(|&length| length > 0) {
            let embeds = decoder.embed(&on_device(&read.concat()));
            let hidden = decoder.branch(&embeds, &lengths, &prefix);
            let [chosen, rejected] = &hidden.split_with_sizes(lengths, 0)[..] else {
                panic!("two answers")
            };
            behind.insert(1, chosen.shallow_clone());
            behind.push(rejected.shallow_clone());
        }
        let logits = network.lm_head.forward(&Tensor::cat(&behind, 0)); // [answers, vocab]
        let logps = token_logps(&logits, &on_device(&tokens.answers.concat()));
        let [chosen, rejected] = tokens.answers.each_ref().map(|ids| ids.len() as i64);
        [(0, chosen), (chosen, rejected)]
            .map(|(start, length)| logps.narrow(0, start, length).sum(Kind::Double))
    }

    /// Forward and backward of one pair of a batch of `pairs`; adds to the gradients and to `sums`.
    fn learn_from(
        &self,
        example: &Example<'_>,
        pairs: usize,
        sums: &mut Sums,
    ) -> Result<(), ModelError> {
        let reference = example.reference.ok_or_else(|| {
            let problem = "its log-probabilities under the reference are not known";
            pair_error(example, problem.to_owned())
        })?;
        let tokens = self.tokens(example)?;
        let what = format!("training on pair {}", example.id);
        let (logps, pair) = guarded(&what, 1, tokens.count(), || {
            let logps = self.logps(&tokens);
            let pair = dpo_loss([&logps[0], &logps[1]], reference, self.settings.beta);
            if pair.loss.double_value(&[]).is_finite() {
                (&pair.loss / pairs as f64).backward();
            }
            (logps.map(|logp| logp.double_value(&[])), pair)
        })?;
        sums.add(&pair, logps, tokens.count());
        Ok(())
    }
}

impl Sums {
    fn add(&mut self, pair: &PairLoss, logps: [f64; 2], tokens: usize) {
        self.loss += pair.loss.double_value(&[]);
        self.rewards[0] += pair.reward_chosen;
        self.rewards[1] += pair.reward_rejected;
        self.accurate += f64::from(u8::from(pair.reward_chosen > pair.reward_rejected));
        self.logps[0] += logps[0];
        self.logps[1] += logps[1];
        self.tokens += tokens as u64;
    }
}

impl Learner for OnevisionLearner {
    fn reference_logps(&mut self, pairs: &[Example<'_>]) -> Result<Vec<[f64; 2]>, ModelError> {
        let mut all = Vec::with_capacity(pairs.len());
        for example in pairs {
            let tokens = self.tokens(example)?;
            let what = format!("reading pair {}", example.id);
            let logps = guarded(&what, 1, tokens.count(), || {
                let _no_grad = tch::no_grad_guard();
                self.logps(&tokens).map(|logp| logp.double_value(&[]))
            })?;
            if !logps.iter().all(|logp| logp.is_finite()) {
                let what = format!("a log-probability of pair {}", example.id);
                return Err(not_finite(what, std::slice::from_ref(example)));
            }
            all.push(logps);
        }
        Ok(all)
    }

    fn step(&mut self, batch: &[Example<'_>]) -> Result<StepReport, ModelError> {
        assert!(!batch.is_empty(), "a step needs pairs");
        zero_gradients(&mut self.parameters);
        let mut sums = Sums::default();
        for example in batch {
            self.learn_from(example, batch.len(), &mut sums)?;
            if !sums.loss.is_finite() {
                let what = format!("the loss of pair {}", example.id);
                return Err(not_finite(what, batch));
            }
        }
        let norm = guarded("taking the gradient's norm", batch.len(), 0, || {
            grad_norm(&self.parameters)
        })?;
        if !norm.is_finite() {
            return Err(not_finite("the gradient".to_owned(), batch));
        }
        if self.settings.max_grad_norm > 0.0 {
            clip_gradients(&self.parameters, norm, self.settings.max_grad_norm);
        }
        // Without pictures the tower's gradients are zero because nothing touched it, and PyTorch
        // would leave it alone.
        let has_pictures = batch.iter().any(|one| !one.prompt.pictures.is_empty());
        let has_gradient =
            |parameter: &Parameter| has_pictures || parameter.name.starts_with("language_model.");
        let learning_rate = self.schedule.learning_rate(self.step);
        self.optimizer
            .step(&self.parameters, has_gradient, learning_rate);
        self.step += 1;

        let pairs = batch.len() as f64;
        Ok(StepReport {
            loss: sums.loss / pairs,
            rewards_chosen: sums.rewards[0] / pairs,
            rewards_rejected: sums.rewards[1] / pairs,
            accuracy: sums.accurate / pairs,
            logps_chosen: sums.logps[0] / pairs,
            logps_rejected: sums.logps[1] / pairs,
            grad_norm: norm,
            learning_rate,
            tokens: sums.tokens,
        })
    }

    fn save(&mut self, to: &Path) -> Result<(), ModelError> {
        self.checkpoint.save(to, &self.parameters)
    }

    /// One safetensors file: of each parameter `weight.…`, `exp_avg.…` and `exp_avg_sq.…` in
    /// float32, its updates in `parameter_steps`, and the updates of the training in `step`.
    fn save_state(&mut self, to: &Path) -> Result<(), ModelError> {
        let io = |error: std::io::Error| state_error(to, error.to_string());
        fs::create_dir(to).map_err(io)?;
        let mut tensors = Vec::with_capacity(3 * self.parameters.len() + 2);
        let mut steps = Vec::with_capacity(self.parameters.len());
        for (Parameter { name, tensor }, moments) in
            self.parameters.iter().zip(self.optimizer.moments())
        {
            tensors.push((format!("weight.{name}"), tensor.detach()));
            tensors.push((format!("exp_avg.{name}"), moments.exp_avg.shallow_clone()));
            let squares = moments.exp_avg_sq.shallow_clone();
            tensors.push((format!("exp_avg_sq.{name}"), squares));
            steps.push(moments.steps);
        }
        tensors.push(("parameter_steps".to_owned(), Tensor::from_slice(&steps)));
        let step = Tensor::from_slice(&[self.step as i64]);
        tensors.push(("step".to_owned(), step));
        save_safetensors(&to.join(STATE_FILE), &tensors, &[])?;
        File::open(to)
            .and_then(|folder| folder.sync_all())
            .map_err(io)
    }

    fn load_state(&mut self, from: &Path) -> Result<(), ModelError> {
        let path = from.join(STATE_FILE);
        let state = Weights::open_file(&path)?;
        let device = self.network.device();
        let integers = |name: &str, count: usize| {
            let tensor = state.take(name, &[count as i64], Kind::Int64, Device::Cpu)?;
            let values = Vec::<i64>::try_from(tensor);
            values.map_err(|error| state_error(&path, error.to_string()))
        };
        let step = integers("step", 1)?[0];
        let steps = integers("parameter_steps", self.parameters.len())?;
        let mut moments = Vec::with_capacity(self.parameters.len());
        for (Parameter { name, tensor }, steps) in self.parameters.iter().zip(steps) {
            let shape = tensor.size();
            let read =
                |part: &str| state.take(&format!("{part}.{name}"), &shape, Kind::Float, device);
            let weight = read("weight")?;
            tch::no_grad(|| tensor.shallow_clone().copy_(&weight));
            moments.push(Moments {
                exp_avg: read("exp_avg")?,
                exp_avg_sq: read("exp_avg_sq")?,
                steps,
            });
        }
        self.optimizer.set_moments(moments);
        self.step = step as usize;
        Ok(())
    }
}

fn pair_error(example: &Example<'_>, problem: String) -> ModelError {
    ModelError::Pair {
        pair: example.id.to_owned(),
        problem,
    }
}

fn not_finite(what: String, pairs: &[Example<'_>]) -> ModelError {
    ModelError::NotFinite {
        what,
        pairs: pairs.iter().map(|pair| pair.id.to_owned()).collect(),
    }
}

fn state_error(path: &Path, problem: String) -> ModelError {
    ModelError::Weights {
        path: path.to_owned(),
        problem,
    }
}

#[cfg(test)]
mod tests;
