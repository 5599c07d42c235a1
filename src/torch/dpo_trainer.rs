//! The DPO trainer: full, partial or LoRA training of a policy.
//!
//! A step minimizes the mean over its pairs of a loss of four numbers, for DPO
//! `-log sigmoid(beta ((c - c_ref) - (r - r_ref)))`, where `c` and `r` are the log-probabilities of
//! the chosen and the rejected answer ([`super::dpo`] has all losses). [`pass`] computes `c` and `r`;
//! the loss and its derivatives with respect to them are computed in float64; the backward pass
//! starts from these derivatives. Gradients of all pairs add up, are clipped by their norm, and the
//! optimizer updates the weights ([`super::training`]).
//!
//! A pair takes one pass over `[prompt | chosen | rejected]`: the prompt is processed once,
//! followed by both answers, and logits are computed only where they predict an answer's token.
//! Short pairs are packed together, long ones run one by one; their gradients accumulate. Trained
//! weights are in float32; activations have the dtype of the model's spec. No published config uses
//! dropout (`attention_dropout` is 0), so training and inference compute the same.
//!
//! The counted tokens are those of the answer and its stop token, or those that other programs
//! count ([`Mask`]).

mod pass;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc;

use rayon::prelude::*;
use tch::{Device, Kind};

use self::pass::{Counting, PairTokens, Pass, measure, prepare};
use super::budget::{TrainingBudget, packs};
use super::casts::KeptCasts;
use super::checkpoint::{Checkpoint, Parts, Purpose, Reader};
use super::device;
use super::dpo::{PairLogps, PairLoss, losses};
use super::error::{guarded, refuse};
use super::layer_stack::SavedActivations;
use super::layers::Dropout;
use super::lora::{Adapted, Adapter, Names, SavedAdapterConfig, Start, save_adapter};
use super::networks;
use super::optimizer::Parameter;
use super::training::{TrainingState, doing, not_finite, row_error};
use super::vlm::VisionLanguageModel;
use ovchat_models::checkpoint::{AdapterConfig, TrainingSizes, elements, part_of};
use ovchat_models::preprocess::Processor;
use ovchat_models::{
    self as models, Architecture, DpoReport, DpoSettings, DpoTrainer, Example, LoraSettings, Loss,
    Mask, ModelError, Newlines, Objective, Part, Trained, Trainer,
};

/// The number of pairs whose images are preprocessed together, in parallel.
const PREPARED_MAX: usize = 8;

/// The number of logits in memory at once: 256 MB in float32, and as much again for their
/// gradients.
const LOGITS_MAX: i64 = 1 << 26;

/// A policy in DPO training.
pub struct PolicyDpo {
    prep: Processor,
    network: Box<dyn VisionLanguageModel>,
    training: TrainingState,
    objective: Objective,
    counting: Counting,
    /// The parts that are trained.
    parts: Parts,
    budget: TrainingBudget,
    /// Tokens and tiles of the largest known pair.
    largest: [usize; 2],
    /// The maximum number of logits in memory at once.
    pub logits_max: i64,
    written: TrainingOutput,
}

/// The result of the training.
enum TrainingOutput {
    /// The checkpoint, with the trained weights in place of its own.
    Checkpoint(Checkpoint),
    /// An adapter for the weights in the folder `base`.
    Adapter {
        base: PathBuf,
        settings: LoraSettings,
        dropout: Rc<Dropout>,
    },
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

impl Sums {
    fn add(&mut self, pair: &PairLogps, loss: &PairLoss, beta: f64, tokens: usize) {
        let rewards = pair.rewards(beta);
        self.loss += loss.loss;
        self.accurate += f64::from(u8::from(rewards[0] > rewards[1]));
        self.tokens += tokens as u64;
        let add = |sums: &mut [f64; 2], [chosen, rejected]: [f64; 2]| {
            sums[0] += chosen;
            sums[1] += rejected;
        };
        add(&mut self.rewards, rewards);
        add(&mut self.logps, pair.policy);
    }
}

impl PolicyDpo {
    /// The training state.
    pub fn training(&self) -> &TrainingState {
        &self.training
    }

    /// Opens the checkpoint and an adapter: the one that `spec` names, or a new one.
    pub fn open(
        spec: &models::VisionLanguageSpec,
        settings: &DpoSettings,
    ) -> Result<Self, ModelError> {
        let prep = Processor::open(&spec.weights)?;
        let (device, kind) = device::choose(spec.device, spec.dtype)?;
        let (architecture, on) = (prep.architecture(), (device, kind));
        counts_tokens(spec, architecture, settings)?;
        device::prepare(elements(architecture));
        let optimizer = settings.optimization.optimizer;
        let element = kind.elt_size_in_bytes() as u64;
        let sizes = TrainingSizes::new(architecture, &settings.trained, optimizer, element);
        let budget = TrainingBudget::plan(spec.memory_gb, device, sizes, settings.checkpointing);
        let budget = budget.map_err(|problem| refuse(&spec.weights, problem))?;
        let checkpoint = Checkpoint::open(&spec.weights)?;
        let opened = match &settings.trained {
            Trained::Parts(parts) => open_parts(spec, checkpoint, architecture, on, parts)?,
            Trained::Lora(lora) => open_lora(spec, &checkpoint, architecture, on, lora)?,
        };
        let mut training = TrainingState::new(opened.parameters, &settings.optimization)?;
        if let Trained::Parts(trained) = &settings.trained {
            training.set_rates(|name| {
                let own = trained.iter().find(|(part, _)| *part == part_of(name));
                own.and_then(|&(_, rate)| rate)
            });
        }
        Ok(Self {
            prep,
            network: opened.network,
            training,
            objective: settings.objective.clone(),
            counting: Counting {
                mask: settings.mask,
                newlines: settings.newlines,
            },
            parts: opened.parts,
            budget,
            largest: [0; 2],
            logits_max: LOGITS_MAX,
            written: opened.written,
        })
    }

    /// Splits pairs into packed batches and calls `visit` for each, with the range of its pairs and
    /// their tokens. The images of the next pairs are decoded meanwhile.
    fn in_packs(
        &self,
        pairs: &[Example<'_>],
        mut visit: impl FnMut(Range<usize>, &[PairTokens]) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        type Prepared = Vec<Result<PairTokens, ModelError>>;
        let (prep, counting) = (&self.prep, self.counting);
        std::thread::scope(|scope| {
            let (send, receive) = mpsc::sync_channel::<Prepared>(1);
            scope.spawn(move || {
                for pairs in pairs.chunks(PREPARED_MAX) {
                    let pairs = pairs.par_iter();
                    let tokens = pairs.map(|pair| prepare(prep, counting, pair)).collect();
                    // A pass has failed if nobody receives.
                    if send.send(tokens).is_err() {
                        return;
                    }
                }
            });
            for (chunk, tokens) in receive.iter().enumerate() {
                let tokens: Vec<PairTokens> = tokens.into_iter().collect::<Result<_, _>>()?;
                let counts: Vec<usize> = tokens.iter().map(PairTokens::count).collect();
                for pack in packs(&counts, self.budget.pack_tokens()) {
                    let first = chunk * PREPARED_MAX;
                    visit(first + pack.start..first + pack.end, &tokens[pack])?;
                }
            }
            Ok(())
        })
    }

    fn pass(&self, tokens: &[PairTokens], keep: SavedActivations) -> Pass<'_> {
        Pass::new(&*self.network, self.parts, tokens, keep, self.logits_max)
    }

    /// Runs forward and backward passes for one packed batch out of a batch of `pairs`; adds to the
    /// gradients and to `sums`. `known` holds the losses if they depend on the whole batch. Stops
    /// before the backward pass at a loss that is not finite, and returns the index of its pair.
    fn learn_from(
        &self,
        tokens: &[PairTokens],
        references: &[[f64; 2]],
        known: Option<&[PairLoss]>,
        pairs: usize,
        sums: &mut Sums,
    ) -> Result<(), usize> {
        let count = tokens.iter().map(PairTokens::count).sum();
        let keep = self
            .budget
            .keep(count, tokens.iter().map(PairTokens::tiles).sum());
        let pass = self.pass(tokens, keep);
        let counts = pass.counts.clone();
        pass.learn(|logps| {
            let all = as_pairs(logps, references, &counts);
            let found = known.map_or_else(|| losses(&all, &self.objective), <[_]>::to_vec);
            for (number, ((pair, loss), tokens)) in all.iter().zip(&found).zip(tokens).enumerate() {
                sums.add(pair, loss, self.objective.beta, tokens.count());
                if !sums.loss.is_finite() {
                    return Err(number);
                }
            }
            // Gradients of the pairs add up, and the loss of a step is their mean.
            let mean = |loss: &PairLoss| loss.slopes.map(|slope| slope / pairs as f64);
            Ok(found.iter().map(mean).collect())
        })
    }

    /// Computes the log-probabilities of `[chosen, rejected]` and the number of counted tokens in
    /// each.
    fn read(&self, pairs: &[Example<'_>]) -> Result<Vec<PairLogps>, ModelError> {
        let ids: Vec<&str> = pairs.iter().map(|pair| pair.id).collect();
        let mut all = Vec::with_capacity(pairs.len());
        self.in_packs(pairs, |places, tokens| {
            let count = tokens.iter().map(PairTokens::count).sum();
            let references: Vec<[f64; 2]> = pairs[places.clone()]
                .iter()
                .map(|pair| pair.reference.unwrap_or_default())
                .collect();
            let what = doing("evaluating", "pair", &ids[places]);
            all.extend(guarded(&what, tokens.len(), count, || {
                let _no_grad = tch::no_grad_guard();
                let pass = self.pass(tokens, SavedActivations::Nothing);
                as_pairs(&pass.logps(), &references, &pass.counts)
            })?);
            Ok(())
        })?;
        for (pair, logps) in pairs.iter().zip(&all) {
            if !logps.policy.iter().all(|logp| logp.is_finite()) {
                let what = format!("a log-probability of pair {}", pair.id);
                return Err(not_finite(what, vec![pair.id.to_owned()]));
            }
        }
        Ok(all)
    }

    /// Runs forward and backward passes for a batch, and adds to the gradients. `known` holds the losses
    /// if they depend on the whole batch.
    fn learn(
        &self,
        batch: &[Example<'_>],
        references: &[[f64; 2]],
        known: Option<&[PairLoss]>,
    ) -> Result<Sums, ModelError> {
        let ids: Vec<&str> = batch.iter().map(|pair| pair.id).collect();
        let mut sums = Sums::default();
        let [tokens, tiles] = self.largest;
        let in_pack = self.budget.pack_tokens().div_ceil(tokens.max(1));
        let has_room = self.budget.keeps_casts(tokens * in_pack, tiles * in_pack);
        let _casts = KeptCasts::new(has_room);
        self.in_packs(batch, |places, tokens| {
            let references = &references[places.clone()];
            let known = known.map(|known| &known[places.clone()]);
            let count = tokens.iter().map(PairTokens::count).sum();
            let what = doing("training on", "pair", &ids[places.clone()]);
            self.set_dropout(Some(places.start));
            let learned = guarded(&what, tokens.len(), count, || {
                self.learn_from(tokens, references, known, batch.len(), &mut sums)
            })?;
            if let Err(number) = learned {
                let rows = ids.iter().map(|&id| id.to_owned()).collect();
                let pair = ids[places.start + number];
                return Err(not_finite(format!("the loss of pair {pair}"), rows));
            }
            Ok(())
        })?;
        Ok(sums)
    }

    /// Like [`PolicyDpo::read`], with smaller packs if memory runs out.
    fn read_within_memory(&mut self, pairs: &[Example<'_>]) -> Result<Vec<PairLogps>, ModelError> {
        loop {
            match self.read(pairs) {
                Err(ModelError::OutOfMemory { .. }) if self.budget.relieve() => {}
                read => return read,
            }
        }
    }

    /// Sets the adapter's dropout for a pass of a training step; `None` turns it off.
    fn set_dropout(&self, pass: Option<usize>) {
        if let TrainingOutput::Adapter {
            dropout, settings, ..
        } = &self.written
        {
            // One number for each pass of the whole training; a step has fewer than 2^20 passes.
            let of_step = (self.training.steps() as i64) << 20;
            let number = |pass: usize| settings.seed as i64 ^ (of_step + pass as i64);
            dropout.pass.set(pass.map(number));
        }
    }
}

/// Refuses conventions for counted tokens that the architecture does not have.
fn counts_tokens(
    spec: &models::VisionLanguageSpec,
    architecture: &dyn Architecture,
    settings: &DpoSettings,
) -> Result<(), ModelError> {
    let problem = |setting: &str, fix: &str| {
        let problem = format!(
            "`{setting}` does not apply to `{}`, whose chat format has no such convention; {fix}",
            architecture.name()
        );
        refuse(&spec.weights, problem)
    };
    let masks = architecture.masks();
    if settings.mask != Mask::Answer && !masks.contains(&settings.mask) {
        return Err(problem("mask", "set `mask: answer`"));
    }
    if settings.newlines == Newlines::Two && !masks.contains(&Mask::LlavaNext) {
        return Err(problem("newlines", "set `newlines: one`"));
    }
    Ok(())
}

/// A network and the parameters of it that are trained.
struct Opened {
    network: Box<dyn VisionLanguageModel>,
    parameters: Vec<Parameter>,
    parts: Parts,
    written: TrainingOutput,
}

/// Opens a network for training some parts, or none.
fn open_parts(
    spec: &models::VisionLanguageSpec,
    checkpoint: Checkpoint,
    architecture: &dyn Architecture,
    (device, kind): (Device, Kind),
    trained: &[(Part, Option<f64>)],
) -> Result<Opened, ModelError> {
    let parts = Parts::which(|part| trained.iter().any(|&(other, _)| other == part));
    networks::has_parts(spec, architecture, parts)?;
    let (network, parameters) = if trained.is_empty() {
        let network = networks::open_merged(spec, architecture, &checkpoint, device, kind)?;
        (network, Vec::new())
    } else if let Some(adapter) = &spec.adapter {
        let problem = "is an adapter, but this stage trains the network itself; train with `lora`, \
                       or merge the adapter first with `pipeline export --merge`";
        return Err(refuse(adapter, problem.to_owned()));
    } else {
        let purpose = Purpose::TrainingState(parts);
        networks::open(architecture, &checkpoint, device, kind, purpose)?
    };
    Ok(Opened {
        network,
        parameters,
        parts,
        written: TrainingOutput::Checkpoint(checkpoint),
    })
}

/// Opens a network for training an adapter.
fn open_lora(
    spec: &models::VisionLanguageSpec,
    checkpoint: &Checkpoint,
    architecture: &dyn Architecture,
    (device, kind): (Device, Kind),
    lora: &LoraSettings,
) -> Result<Opened, ModelError> {
    let existing = spec
        .adapter
        .as_deref()
        .map(|folder| open_adapter(folder, lora));
    let existing = existing.transpose()?;
    let targets: Vec<&str> = lora.targets.iter().map(String::as_str).collect();
    let start = match &existing {
        Some(adapter) => Start::At(adapter),
        None => Start::Fresh {
            rank: lora.rank,
            alpha: lora.alpha,
            seed: lora.seed,
            target_modules: &targets,
        },
    };
    let dropout = Rc::new(Dropout {
        share: lora.dropout,
        pass: None.into(),
    });
    let reader = Reader::new(checkpoint, device, kind, Purpose::Inference);
    let own = (lora.dropout > 0.0).then(|| Rc::clone(&dropout));
    let adapted = Adapted::new(reader, start, Names::Transformers, own);
    let network = networks::build(
        architecture,
        &adapted,
        networks::is_tied(checkpoint, architecture),
        kind,
    )?;
    let parameters = adapted.into_parameters();
    if let Some(adapter) = &existing {
        adapter.all_used()?;
    }
    if parameters.is_empty() {
        let problem = format!("has no linear layer named {}", targets.join(" or "));
        return Err(refuse(&spec.weights, problem));
    }
    Ok(Opened {
        network,
        parameters,
        parts: Parts::NONE,
        written: TrainingOutput::Adapter {
            // For other programs that read the adapter's config.
            base: spec
                .weights
                .canonicalize()
                .unwrap_or_else(|_| spec.weights.clone()),
            settings: lora.clone(),
            dropout,
        },
    })
}

fn as_pairs(logps: &[[f64; 2]], references: &[[f64; 2]], counts: &[[usize; 2]]) -> Vec<PairLogps> {
    let all = logps.iter().zip(references).zip(counts);
    all.map(|((&policy, &reference), counts)| PairLogps {
        policy,
        reference,
        tokens: counts.map(|count| count as f64),
    })
    .collect()
}

/// Opens an adapter to continue training it; its config must match the settings.
fn open_adapter(folder: &Path, settings: &LoraSettings) -> Result<Adapter, ModelError> {
    let config = AdapterConfig::open(folder)?;
    let asked = settings.alpha / settings.rank as f64;
    if config.r != settings.rank || (config.scale() - asked).abs() > 1e-9 {
        let problem = format!(
            "has rank {} and scale {}, but `lora` sets rank {} and scale {asked}; set the adapter's \
             own `rank` and `alpha`",
            config.r,
            config.scale(),
            settings.rank,
        );
        return Err(refuse(folder, problem));
    }
    Adapter::open(&config, Names::Transformers)
}

impl DpoTrainer for PolicyDpo {
    fn reference_logps(&mut self, pairs: &[Example<'_>]) -> Result<Vec<[f64; 2]>, ModelError> {
        self.set_dropout(None);
        let read = self.read_within_memory(pairs)?;
        Ok(read.into_iter().map(|pair| pair.policy).collect())
    }

    fn step(&mut self, batch: &[Example<'_>]) -> Result<DpoReport, ModelError> {
        assert!(!batch.is_empty(), "a step needs at least one pair");
        let rows = || batch.iter().map(|pair| pair.id.to_owned()).collect();
        let reference = |pair: &Example<'_>| {
            let problem = "its log-probabilities under the reference are missing";
            pair.reference.ok_or_else(|| row_error(pair.id, problem))
        };
        let references: Vec<[f64; 2]> = batch.iter().map(reference).collect::<Result<_, _>>()?;
        // If the loss of a pair depends on the other pairs, all are evaluated before any backward
        // pass.
        let joined = self
            .objective
            .terms
            .iter()
            .any(|(loss, _)| *loss == Loss::Aot);
        let known = if joined && batch.len() > 1 {
            self.set_dropout(None);
            Some(losses(&self.read_within_memory(batch)?, &self.objective))
        } else {
            None
        };
        let has_images = batch.iter().any(|one| !one.prompt.images.is_empty());
        let has_gradient =
            |parameter: &Parameter| has_images || part_of(&parameter.name) == Part::LanguageModel;
        let (sums, update) = loop {
            self.training.begin_step();
            let learned = self.learn(batch, &references, known.as_deref());
            let updated = learned.and_then(|sums| {
                let update = self.training.update(rows, has_gradient)?;
                Ok((sums, update))
            });
            match updated {
                Err(ModelError::OutOfMemory { .. }) if self.budget.relieve() => {}
                done => break done?,
            }
        };

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

    fn validate(&mut self, pairs: &[Example<'_>]) -> Result<(), ModelError> {
        let (prep, counting) = (&self.prep, self.counting);
        let sizes: Vec<Result<[usize; 2], ModelError>> = pairs
            .par_iter()
            .map(|pair| measure(prep, counting, pair))
            .collect();
        for size in sizes {
            self.largest = self.largest.max(size?);
        }
        Ok(())
    }

    fn plan(&self) -> Option<String> {
        Some(self.budget.in_words(self.largest))
    }
}

impl Trainer for PolicyDpo {
    /// Saves the checkpoint, or the adapter in peft's folder structure.
    fn save(&mut self, to: &Path) -> Result<(), ModelError> {
        let parameters = &self.training.parameters;
        match &self.written {
            TrainingOutput::Checkpoint(checkpoint) => checkpoint.save(to, parameters),
            TrainingOutput::Adapter { base, settings, .. } => {
                fs::create_dir(to).map_err(|error| refuse(to, error.to_string()))?;
                let config = SavedAdapterConfig {
                    base,
                    rank: settings.rank,
                    alpha: settings.alpha,
                    dropout: settings.dropout,
                    targets: settings.targets.iter().map(String::as_str).collect(),
                };
                // It is small and training resumes from it, so it is saved without rounding.
                save_adapter(to, &config, Names::Transformers, parameters, Kind::Float)
            }
        }
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
    use tch::Tensor;

    use super::super::error::tests::{run_out_after, run_out_late_after};
    use super::super::recorded::onevision;
    use super::*;
    use ovchat_models::{Checkpointing, Dtype, Optimization, Optimizer, Schedule, TrainingAnswer};

    /// The weights after a step on the recorded prompts; memory runs out after so many guarded calls.
    fn trained(
        dtype: Dtype,
        shortage: Option<(fn(usize), usize)>,
    ) -> (Vec<Tensor>, SavedActivations) {
        let settings = DpoSettings {
            objective: Objective::of(Loss::Sigmoid, 0.1),
            mask: Mask::default(),
            newlines: Newlines::default(),
            trained: Trained::all(),
            checkpointing: Checkpointing::Auto,
            optimization: Optimization {
                learning_rate: 1e-3,
                schedule: Schedule::Constant,
                warmup_steps: 0,
                steps: 6,
                optimizer: Optimizer::Adamw,
                weight_decay: 0.01,
                adam_betas: [0.9, 0.999],
                adam_epsilon: 1e-8,
                max_grad_norm: 1.0,
            },
        };
        let mut trainer = PolicyDpo::open(&onevision::spec(dtype), &settings).unwrap();
        let prompts = onevision::many(3);
        let answer = |text: &str| TrainingAnswer {
            text: text.to_owned(),
            token_ids: None,
        };
        let pairs: Vec<Example<'_>> = prompts
            .iter()
            .map(|prompt| Example {
                id: &prompt.id,
                prompt,
                chosen: answer("a cat"),
                rejected: answer("two red dogs"),
                reference: Some([-30.0, -70.0]),
            })
            .collect();
        if let Some((run_out, calls)) = shortage {
            run_out(calls);
        }
        trainer.step(&pairs).unwrap();
        let weights = trainer.training.parameters.iter();
        let weights = weights.map(|one| one.tensor.detach().copy());
        (weights.collect(), trainer.budget.keep(1, 1))
    }

    /// Memory runs out in the first pass, in a later one, and when the gradients are complete.
    #[test]
    fn a_step_without_enough_memory_is_done_again_and_comes_out_the_same() {
        let (expected, keep) = trained(Dtype::Float32, None);
        assert_eq!(keep, SavedActivations::Everything);
        for run_out in [run_out_after, run_out_late_after] {
            for calls in 0..3 {
                let (found, keep) = trained(Dtype::Float32, Some((run_out, calls)));
                assert_eq!(keep, SavedActivations::Inputs, "{calls}");
                assert_eq!(found, expected, "{calls}");
            }
        }
    }

    /// After a shortage, layers are recomputed and each weight is converted whenever it is used.
    #[test]
    fn weights_that_are_converted_once_a_step_are_trained_the_same() {
        let (expected, _) = trained(Dtype::Bfloat16, None);
        let (found, keep) = trained(Dtype::Bfloat16, Some((run_out_after, 0)));
        assert_eq!(keep, SavedActivations::Inputs);
        assert_eq!(found, expected);
    }
}
