//! DPO training of the whole network: tower, projector, newline and decoder, in float32.
//!
//! A pair is one pass over `[prompt | chosen | rejected]`: the prompt is read once, both answers
//! behind it, and logits are computed only where they predict an answer's token. Short pairs go side
//! by side, long ones one by one; their gradients add up. Dropout there is none in any published config (`attention_dropout`
//! 0), so training and inference compute the same.
//!
//! Which tokens count is the answer's and its stop token, or what other programs count ([`Mask`]).

use std::ops::Range;
use std::path::Path;

use tch::{Kind, Tensor};

use super::budget::{PACK_TOKENS_MAX, packs};
use super::checkpoint::{Checkpoint, Purpose};
use super::decoder::{Texts, Wanted};
use super::device;
use super::dpo::{PairLoss, dpo_loss, token_logps};
use super::edge::guarded;
use super::llava_onevision::LlavaOnevision;
use super::optimizer::Parameter;
use super::training::{Training, doing, not_finite, row_error};
use crate::models::{
    self, Answer, DpoLearner, DpoReport, DpoSettings, Example, Learner, Mask, ModelError, Newlines,
    Tower,
};
use crate::prep::{PolicyPrep, Prepared, Tiles};

/// Pairs whose pictures are decoded and cut before the first of them is read.
const PREPARED_MAX: usize = 8;

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

    /// The log-probabilities of the chosen and the rejected answer of each pair, scalars in float64.
    fn logps(&self, pairs: &[Tokens]) -> Vec<[Tensor; 2]> {
        let network = &self.network;
        let decoder = &network.language_model;
        let on_device = |ids: &[i64]| Tensor::from_slice(ids).to_device(network.device());
        let pictures: Vec<&Tiles> = pairs
            .iter()
            .flat_map(|pair| &pair.prompt.pictures)
            .collect();
        let mut features = network.image_features(&pictures).into_iter();
        let embeds: Vec<Tensor> = pairs
            .iter()
            .map(|pair| {
                let count = pair.prompt.pictures.len();
                let features: Vec<Tensor> = features.by_ref().take(count).collect();
                network.embed_prompt(&pair.prompt.text, &features)
            })
            .collect();
        let lengths: Vec<i64> = embeds.iter().map(|embeds| embeds.size()[0]).collect();
        let counts_prompt = self.mask == Mask::LlavaNext;
        let wanted = if counts_prompt {
            Wanted::All
        } else {
            Wanted::Last
        };
        let (hidden, prefixes) = decoder.prefill(&Tensor::cat(&embeds, 0), &lengths, wanted);
        let hidden = if counts_prompt {
            hidden.split_with_sizes(lengths, 0) // [prompt, hidden] each
        } else {
            hidden.split(1, 0) // [1, hidden] each
        };

        // The prompt's last token predicts the first of each answer, each token the next; the last
        // one predicts nothing and is not read.
        let mut ids = Vec::new();
        let mut texts = Vec::new();
        for (pair, prefix) in pairs.iter().zip(&prefixes) {
            let read = pair.answers.each_ref().map(|ids| &ids[..ids.len() - 1]);
            let lengths = read.map(|ids| ids.len() as i64).to_vec();
            if lengths.iter().any(|&length| length > 0) {
                ids.extend(read.concat());
                texts.push(Texts { prefix, lengths });
            }
        }
        let mut behind = if texts.is_empty() {
            Vec::new()
        } else {
            let lengths: Vec<i64> = texts.iter().flat_map(|text| text.lengths.clone()).collect();
            let hidden = decoder.branch(&decoder.embed(&on_device(&ids)), &texts, Wanted::All);
            hidden.split_with_sizes(lengths, 0)
        }
        .into_iter();
        let mut predicting = Vec::new();
        for (pair, hidden) in pairs.iter().zip(&hidden) {
            let last = hidden.narrow(0, hidden.size()[0] - 1, 1);
            let is_read = pair.answers.iter().any(|ids| ids.len() > 1);
            for _ in &pair.answers {
                predicting.push(last.shallow_clone());
                predicting.extend(is_read.then(|| behind.next().expect("a run for each answer")));
            }
        }
        let logits = network.lm_head.forward(&Tensor::cat(&predicting, 0)); // [answers of all, vocab]
        let ids: Vec<i64> = pairs
            .iter()
            .flat_map(|pair| pair.answers.concat())
            .collect();
        let logps = token_logps(&logits, &on_device(&ids));
        let lengths: Vec<i64> = pairs
            .iter()
            .flat_map(|pair| pair.answers.each_ref().map(|ids| ids.len() as i64))
            .collect();
        let sums: Vec<Tensor> = logps
            .split_with_sizes(lengths, 0)
            .iter()
            .map(|logps| logps.sum(Kind::Double))
            .collect();
        let with_prompt = |(pair, hidden): (&Tokens, &Tensor), sums: &[Tensor]| {
            let sums = [&sums[0], &sums[1]].map(Tensor::shallow_clone);
            if pair.counted.is_empty() {
                return sums;
            }
            let places = on_device(&pair.counted);
            let logits = network
                .lm_head
                .forward(&hidden.index_select(0, &(&places - 1)));
            let ids = on_device(&pair.prompt.text.ids).index_select(0, &places);
            let prompt = token_logps(&logits, &ids).sum(Kind::Double);
            sums.map(|sum| sum + &prompt)
        };
        pairs
            .iter()
            .zip(&hidden)
            .zip(sums.chunks(2))
            .map(|(pair, sums)| with_prompt(pair, sums))
            .collect()
    }

    /// Goes through pairs in what goes side by side: `visit` is given the places of some, and these
    /// as the network takes them.
    fn in_packs(
        &self,
        pairs: &[Example<'_>],
        mut visit: impl FnMut(Range<usize>, &[Tokens]) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        for (chunk, pairs) in pairs.chunks(PREPARED_MAX).enumerate() {
            let tokens: Vec<Tokens> = pairs
                .iter()
                .map(|pair| self.tokens(pair))
                .collect::<Result<_, _>>()?;
            let counts: Vec<usize> = tokens.iter().map(Tokens::count).collect();
            for pack in packs(&counts, PACK_TOKENS_MAX) {
                let first = chunk * PREPARED_MAX;
                visit(first + pack.start..first + pack.end, &tokens[pack])?;
            }
        }
        Ok(())
    }

    /// Forward and backward of some pairs of a batch of `pairs`; adds to the gradients and to `sums`.
    /// Stops before the gradients at a loss that is not finite, and gives the number of its pair.
    fn learn_from(
        &self,
        tokens: &[Tokens],
        references: &[[f64; 2]],
        pairs: usize,
        sums: &mut Sums,
    ) -> Result<(), usize> {
        let mut losses = Vec::with_capacity(tokens.len());
        let logps = self.logps(tokens);
        for (number, ((tokens, logps), &reference)) in
            tokens.iter().zip(&logps).zip(references).enumerate()
        {
            let pair = dpo_loss([&logps[0], &logps[1]], reference, self.beta);
            sums.add(
                &pair,
                logps.each_ref().map(|logp| logp.double_value(&[])),
                tokens.count(),
            );
            if !sums.loss.is_finite() {
                return Err(number);
            }
            losses.push(pair.loss);
        }
        let loss = Tensor::stack(&losses, 0).sum(Kind::Double);
        (loss / pairs as f64).backward();
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
        let ids: Vec<&str> = pairs.iter().map(|pair| pair.id).collect();
        let mut all = Vec::with_capacity(pairs.len());
        self.in_packs(pairs, |places, tokens| {
            let count = tokens.iter().map(Tokens::count).sum();
            let what = doing("reading", "pair", &ids[places]);
            let logps = guarded(&what, tokens.len(), count, || {
                let _no_grad = tch::no_grad_guard();
                let logps = self.logps(tokens).into_iter();
                let numbers = logps.map(|logps| logps.map(|logp| logp.double_value(&[])));
                numbers.collect::<Vec<[f64; 2]>>()
            })?;
            all.extend(logps);
            Ok(())
        })?;
        for (pair, logps) in pairs.iter().zip(&all) {
            if !logps.iter().all(|logp| logp.is_finite()) {
                let what = format!("a log-probability of pair {}", pair.id);
                return Err(not_finite(what, vec![pair.id.to_owned()]));
            }
        }
        Ok(all)
    }

    fn step(&mut self, batch: &[Example<'_>]) -> Result<DpoReport, ModelError> {
        assert!(!batch.is_empty(), "a step needs pairs");
        let ids: Vec<&str> = batch.iter().map(|pair| pair.id).collect();
        let rows = || batch.iter().map(|pair| pair.id.to_owned()).collect();
        let reference = |pair: &Example<'_>| {
            let problem = "its log-probabilities under the reference are not known";
            pair.reference.ok_or_else(|| row_error(pair.id, problem))
        };
        let references: Vec<[f64; 2]> = batch.iter().map(reference).collect::<Result<_, _>>()?;
        self.training.begin_step();
        let mut sums = Sums::default();
        self.in_packs(batch, |places, tokens| {
            let references = &references[places.clone()];
            let count = tokens.iter().map(Tokens::count).sum();
            let what = doing("training on", "pair", &ids[places.clone()]);
            let learned = guarded(&what, tokens.len(), count, || {
                self.learn_from(tokens, references, batch.len(), &mut sums)
            })?;
            if let Err(number) = learned {
                let pair = batch[places.start + number].id;
                return Err(not_finite(format!("the loss of pair {pair}"), rows()));
            }
            Ok(())
        })?;
        let has_pictures = batch.iter().any(|one| !one.prompt.pictures.is_empty());
        let has_gradient =
            |parameter: &Parameter| has_pictures || parameter.name.starts_with("language_model.");
        let update = self.training.update(rows, has_gradient)?;

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
