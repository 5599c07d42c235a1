//! DPO training of the whole network: tower, projector, newline and decoder, in float32.
//!
//! A pair is one pass over `[prompt | chosen | rejected]`: the prompt is read once, both answers
//! behind it, and logits are computed only where they predict an answer's token. Pairs go one by
//! one; their gradients add up. Dropout there is none in any published config (`attention_dropout`
//! 0), so training and inference compute the same.
//!
//! Which tokens count is the answer's and its stop token, or what other programs count ([`Mask`]).

use std::path::Path;

use tch::{Kind, Tensor};

use super::checkpoint::{Checkpoint, Purpose};
use super::device;
use super::dpo::{PairLoss, dpo_loss, token_logps};
use super::edge::guarded;
use super::llava_onevision::LlavaOnevision;
use super::optimizer::Parameter;
use super::training::{Training, not_finite, row_error};
use crate::models::{
    self, Answer, DpoLearner, DpoReport, DpoSettings, Example, Learner, Mask, ModelError, Newlines,
    Tower,
};
use crate::prep::{PolicyPrep, Prepared};

/// LLaVA-OneVision as a learner.
#[derive(Debug)]
pub struct OnevisionDpo {
    prep: PolicyPrep,
    checkpoint: Checkpoint,
    network: LlavaOnevision,
    training: Training,
    beta: f64,
    mask: Mask,
    newlines: Newlines,
}

/// A pair as the network takes it.
struct Tokens {
    prompt: Prepared,
    /// Places in the prompt whose tokens count in both answers; never the first.
    counted: Vec<i64>,
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

impl OnevisionDpo {
    /// What trains it.
    #[cfg(test)]
    pub fn training(&self) -> &Training {
        &self.training
    }

    /// Opens the checkpoint. The precision in the spec is that of sampling; training is in float32.
    pub fn open(spec: &models::LlavaOnevision, settings: &DpoSettings) -> Result<Self, ModelError> {
        let prep = PolicyPrep::open(&spec.weights)?;
        let (device, _) = device::choose(spec.device, spec.dtype)?;
        let checkpoint = Checkpoint::open(&spec.weights)?;
        let purpose = Purpose::Training(Tower::Train);
        let (network, parameters) =
            LlavaOnevision::open(&checkpoint, &prep.card, device, Kind::Float, purpose)?;
        Ok(Self {
            prep,
            checkpoint,
            network,
            training: Training::new(parameters, &settings.optimization)?,
            beta: settings.beta,
            mask: settings.mask,
            newlines: settings.newlines,
        })
    }

    /// Decodes, cuts and tokenizes a pair, and checks that it can be trained on.
    fn tokens(&self, example: &Example<'_>) -> Result<Tokens, ModelError> {
        let refuse = |problem: String| row_error(example.id, problem);
        let prepared = self
            .prep
            .prepare_as_llava_next(example.prompt, self.newlines);
        let (prompt, counted) = prepared.map_err(|fault| refuse(fault.to_string()))?;
        // Nothing predicts the first token.
        let counted = counted.into_iter().filter(|&place| place > 0);
        let counted = match self.mask {
            Mask::Answer | Mask::Trl => Vec::new(),
            Mask::LlavaNext => counted.map(|place| place as i64).collect(),
        };
        let ids = |answer: &Answer, side: &str| {
            let mut ids: Vec<i64> = match &answer.token_ids {
                Some(ids) => ids.iter().map(|&id| i64::from(id)).collect(),
                None => self
                    .prep
                    .chat
                    .answer(&answer.text)
                    .map_err(|fault| refuse(format!("the {side} answer: {fault}")))?,
            };
            let chat = &self.prep.chat;
            if self.mask != Mask::Answer && ids.last() == Some(&chat.im_end()) {
                let newline = chat.newline();
                ids.extend(newline.map_err(|fault| refuse(fault.to_string()))?);
            }
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
        Ok(Tokens {
            prompt,
            counted,
            answers,
        })
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
        let sums = [(0, chosen), (chosen, rejected)]
            .map(|(start, length)| logps.narrow(0, start, length).sum(Kind::Double));
        if tokens.counted.is_empty() {
            return sums;
        }
        let places = on_device(&tokens.counted);
        let logits = network
            .lm_head
            .forward(&hidden.index_select(0, &(&places - 1)));
        let ids = on_device(&tokens.prompt.text.ids).index_select(0, &places);
        let prompt = token_logps(&logits, &ids).sum(Kind::Double);
        sums.map(|sum| sum + &prompt)
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
            row_error(example.id, problem)
        })?;
        let tokens = self.tokens(example)?;
        let what = format!("training on pair {}", example.id);
        let (logps, pair) = guarded(&what, 1, tokens.count(), || {
            let logps = self.logps(&tokens);
            let pair = dpo_loss([&logps[0], &logps[1]], reference, self.beta);
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

impl DpoLearner for OnevisionDpo {
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
                return Err(not_finite(what, vec![example.id.to_owned()]));
            }
            all.push(logps);
        }
        Ok(all)
    }

    fn step(&mut self, batch: &[Example<'_>]) -> Result<DpoReport, ModelError> {
        assert!(!batch.is_empty(), "a step needs pairs");
        let ids = || batch.iter().map(|pair| pair.id.to_owned()).collect();
        self.training.begin_step();
        let mut sums = Sums::default();
        for example in batch {
            self.learn_from(example, batch.len(), &mut sums)?;
            if !sums.loss.is_finite() {
                return Err(not_finite(
                    format!("the loss of pair {}", example.id),
                    ids(),
                ));
            }
        }
        let has_pictures = batch.iter().any(|one| !one.prompt.pictures.is_empty());
        let has_gradient =
            |parameter: &Parameter| has_pictures || parameter.name.starts_with("language_model.");
        let update = self.training.update(ids, has_gradient)?;

        let pairs = batch.len() as f64;
        Ok(DpoReport {
            loss: sums.loss / pairs,
            rewards_chosen: sums.rewards[0] / pairs,
            rewards_rejected: sums.rewards[1] / pairs,
            accuracy: sums.accurate / pairs,
            logps_chosen: sums.logps[0] / pairs,
            logps_rejected: sums.logps[1] / pairs,
            grad_norm: update.grad_norm,
            learning_rate: update.learning_rate,
            tokens: sums.tokens,
        })
    }
}

impl Learner for OnevisionDpo {
    fn save(&mut self, to: &Path) -> Result<(), ModelError> {
        self.checkpoint.save(to, &self.training.parameters)
    }

    fn save_state(&mut self, to: &Path) -> Result<(), ModelError> {
        self.training.save_state(to)
    }

    fn load_state(&mut self, from: &Path) -> Result<(), ModelError> {
        self.training.load_state(from)
    }
}

#[cfg(test)]
mod tests;
