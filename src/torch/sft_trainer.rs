//! The SFT trainer: next-token loss on the answers of conversations, for every generative network.
//!
//! A conversation takes one causal pass, however many of its answers are trained on; logits are
//! computed only where they predict a trained token. Short conversations are packed together, long
//! ones run one by one; their gradients accumulate, so that the loss of a step is the mean over all
//! trained tokens of its batch, as in transformers' `Trainer`.

use std::fs;
use std::path::Path;

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::budget::{TrainingBudget, packs};
use super::casts::KeptCasts;
use super::checkpoint::{Checkpoint, Parts, Purpose, Reader, TOWER};
use super::decoder::{Decoder, DecoderSizes, LmHead, PackedSequence};
use super::device;
use super::dpo::token_logps;
use super::error::{guarded, refuse};
use super::layer_stack::{Layer, LayerStack, SavedActivations};
use super::layers;
use super::llava::LlavaRlhf;
use super::networks;
use super::optimizer::Parameter;
use super::training::{TrainingState, doing, not_finite, row_error};
use super::vlm::VisionLanguageModel;
use ovchat_models::checkpoint::{TWO_LAYERS, TrainingSizes, elements, judge_elements};
use ovchat_models::preprocess::{LlavaRlhfProcessor, Processor, RewardSftTokens, SftTokens, Tiles};
use ovchat_models::{
    self as models, Checkpointing, Gigabytes, LlavaRlhfSpec, ModelError, RowFault, SftExample,
    SftReport, SftSettings, SftTrainer, Trainer,
};

/// The LM head of a reward model's base, which scoring does not use.
const BASE_HEAD: &str = "lm_head.weight";

/// A network that can be fine-tuned.
pub trait SftModel {
    /// The preprocessor, which converts SFT examples to [`SftModel::Prepared`]; shared by threads.
    type Prep: Sync;
    /// A preprocessed SFT example.
    type Prepared: Send;

    fn prep(&self) -> &Self::Prep;

    /// Decodes, tiles and tokenizes.
    fn prepare(prep: &Self::Prep, example: &SftExample<'_>) -> Result<Self::Prepared, RowFault>;

    /// The embeddings of the whole sequences (`[tokens, hidden]`), and the layer stacks that
    /// continue their backward pass.
    fn embed(
        &self,
        examples: &[Self::Prepared],
        keep: SavedActivations,
    ) -> (Vec<Tensor>, Vec<LayerStack<'_>>);

    /// The number of tiles that a sequence puts through a trained tower.
    fn tiles(example: &Self::Prepared) -> usize;

    /// The ids of the whole sequence, and the ranges of its trained tokens.
    fn tokens(example: &Self::Prepared) -> (&[i64], &[std::ops::Range<usize>]);

    fn decoder(&self) -> &Decoder;

    fn lm_head(&self) -> &LmHead;

    /// True if the loss depends on the parameter even without images.
    fn reads_without_images(parameter: &Parameter) -> bool;

    /// Writes the parameters as a checkpoint to the new folder `to`.
    fn save(&self, to: &Path, parameters: &[Parameter]) -> Result<(), ModelError>;
}

/// A network in SFT and its training state.
pub struct Sft<S> {
    model: S,
    training: TrainingState,
    budget: TrainingBudget,
}

/// Sums over the conversations of a step.
#[derive(Default)]
struct Sums {
    loss: f64,
    accurate: f64,
    tokens: u64,
}

impl<S: SftModel> Sft<S> {
    /// The training state.
    pub fn training(&self) -> &TrainingState {
        &self.training
    }

    /// Runs forward and backward passes for a batch with `learned` trained tokens, and adds to the
    /// gradients.
    fn learn(
        &self,
        ids: &[&str],
        examples: &[S::Prepared],
        learned: usize,
    ) -> Result<Sums, ModelError> {
        let mut sums = Sums::default();
        let lengths = examples.iter().map(|example| S::tokens(example).0.len());
        let lengths: Vec<usize> = lengths.collect();
        let packs = packs(&lengths, self.budget.pack_tokens());
        let keeps_casts = packs.iter().all(|pack| {
            let tiles = examples[pack.clone()].iter().map(S::tiles);
            let tokens = lengths[pack.clone()].iter().sum();
            self.budget.keeps_casts(tokens, tiles.sum())
        });
        let _casts = KeptCasts::new(keeps_casts);
        for pack in packs {
            let what = doing("training on", "prompt", &ids[pack.clone()]);
            let length = lengths[pack.clone()].iter().sum();
            let done = guarded(&what, pack.len(), length, || {
                self.learn_from(&examples[pack.clone()], learned, &mut sums)
            })?;
            if let Err(number) = done {
                let rows = ids.iter().map(|&id| id.to_owned()).collect();
                let prompt = ids[pack.start + number];
                return Err(not_finite(format!("the loss of prompt {prompt}"), rows));
            }
        }
        Ok(sums)
    }

    /// Runs forward and backward passes for some conversations of a batch with `learned` trained
    /// tokens. Stops before the backward pass at a loss that is not finite, and returns the index
    /// of its conversation.
    fn learn_from(
        &self,
        examples: &[S::Prepared],
        learned: usize,
        sums: &mut Sums,
    ) -> Result<(), usize> {
        let device = self.model.decoder().device();
        let on_device = |ids: &[i64]| Tensor::from_slice(ids).to_device(device);
        let mut read = Vec::with_capacity(examples.len());
        let mut trees = Vec::with_capacity(examples.len());
        let mut counts = Vec::with_capacity(examples.len());
        let (mut places, mut wanted) = (Vec::new(), Vec::new());
        let mut first = 0;
        let tokens = examples.iter().map(|example| S::tokens(example).0.len());
        let tiles = examples.iter().map(S::tiles);
        let keep = self.budget.keep(tokens.sum(), tiles.sum());
        let (embedded, images) = self.model.embed(examples, keep);
        for (example, embeds) in examples.iter().zip(embedded) {
            let (ids, answers) = S::tokens(example);
            // A token is predicted at the token before it; the last one predicts nothing.
            let tree = PackedSequence {
                prompt: ids.len() as i64 - 1,
                branches: Vec::new(),
                wanted_from: answers.first().map_or(1, |answer| answer.start) as i64 - 1,
            };
            for answer in answers {
                let answer_read = answer.start as i64 - 1..answer.end as i64 - 1;
                places.extend(answer_read.map(|place| first + place - tree.wanted_from));
                wanted.extend_from_slice(&ids[answer.clone()]);
            }
            counts.push(answers.iter().map(|answer| answer.len() as i64).sum());
            read.push(embeds.narrow(0, 0, tree.prompt));
            first += tree.wanted();
            trees.push(tree);
            sums.tokens += ids.len() as u64;
        }
        let decoder = self.model.decoder();
        let chain = decoder.read(&Tensor::cat(&read, 0), trees, keep);
        let hidden = chain.output().index_select(0, &on_device(&places)); // [learned, hidden]
        let logits = self.model.lm_head().forward(&hidden); // [learned, vocab]
        let wanted = on_device(&wanted);
        let losses = -token_logps(&logits, &wanted); // [learned]
        let of_examples = losses.detach().split_with_sizes(counts, 0);
        for (number, losses) in of_examples.iter().enumerate() {
            let loss = losses.sum(Kind::Double).double_value(&[]);
            if !loss.is_finite() {
                return Err(number);
            }
            sums.loss += loss;
        }
        (losses.sum(Kind::Double) / learned as f64).backward();
        chain.backward();
        for chain in images {
            chain.backward();
        }
        let likeliest = logits.detach().argmax(-1, false);
        let accurate = likeliest.eq_tensor(&wanted).sum(Kind::Double);
        sums.accurate += accurate.double_value(&[]);
        Ok(())
    }
}

impl<S: SftModel> SftTrainer for Sft<S> {
    fn step(&mut self, batch: &[SftExample<'_>]) -> Result<SftReport, ModelError> {
        assert!(!batch.is_empty(), "a step needs at least one conversation");
        let rows = || batch.iter().map(|example| example.id.to_owned()).collect();
        let prep = self.model.prep();
        let prepared: Vec<Result<S::Prepared, RowFault>> = batch
            .par_iter()
            .map(|example| S::prepare(prep, example))
            .collect();
        let mut examples = Vec::with_capacity(batch.len());
        for (example, prepared) in batch.iter().zip(prepared) {
            examples.push(prepared.map_err(|fault| row_error(example.id, fault.to_string()))?);
        }
        let learned: usize = examples
            .iter()
            .flat_map(|example| S::tokens(example).1)
            .map(ExactSizeIterator::len)
            .sum();
        let has_images = batch.iter().any(|row| !row.prompt.images.is_empty());
        let has_gradient = |parameter: &Parameter| has_images || S::reads_without_images(parameter);
        let ids: Vec<&str> = batch.iter().map(|example| example.id).collect();
        let (sums, update) = loop {
            self.training.begin_step();
            let done = self.learn(&ids, &examples, learned);
            let updated = done.and_then(|sums| {
                let update = self.training.update(rows, has_gradient)?;
                Ok((sums, update))
            });
            match updated {
                Err(ModelError::OutOfMemory { .. }) if self.budget.relieve() => {}
                done => break done?,
            }
        };
        Ok(SftReport {
            loss: sums.loss / learned as f64,
            accuracy: sums.accurate / learned as f64,
            grad_norm: update.grad_norm,
            learning_rate: update.learning_rate,
            tokens: sums.tokens,
            learned_tokens: learned as u64,
        })
    }
}

impl<S: SftModel> Trainer for Sft<S> {
    fn save(&mut self, to: &Path) -> Result<(), ModelError> {
        self.model.save(to, &self.training.parameters)
    }

    fn save_state(&mut self, to: &Path) -> Result<(), ModelError> {
        self.training.save_state(to)
    }

    fn load_state(&mut self, from: &Path) -> Result<(), ModelError> {
        self.training.load_state(from)
    }
}

/// A policy's network in SFT.
pub struct PolicySft {
    prep: Processor,
    checkpoint: Checkpoint,
    network: Box<dyn VisionLanguageModel>,
    parts: Parts,
}

impl Sft<PolicySft> {
    /// Opens the checkpoint.
    pub fn open(
        spec: &models::VisionLanguageSpec,
        settings: &SftSettings,
    ) -> Result<Self, ModelError> {
        if let Some(adapter) = &spec.adapter {
            let problem = "is an adapter, but this stage trains the network itself; merge the \
                           adapter first with `pipeline export --merge`";
            return Err(refuse(adapter, problem.to_owned()));
        }
        let prep = Processor::open(&spec.weights)?;
        let (device, kind) = device::choose(spec.device, spec.dtype)?;
        let element = kind.elt_size_in_bytes() as u64;
        device::prepare(elements(prep.architecture()));
        let sizes = TrainingSizes::of_sft(prep.architecture(), settings.tower, element);
        let budget = budget(spec.memory_gb, device, sizes, &spec.weights)?;
        let checkpoint = Checkpoint::open(&spec.weights)?;
        let parts = settings.tower.into();
        let purpose = Purpose::TrainingState(parts);
        let (network, parameters) =
            networks::open(prep.architecture(), &checkpoint, device, kind, purpose)?;
        Ok(Self {
            model: PolicySft {
                prep,
                checkpoint,
                network,
                parts,
            },
            training: TrainingState::new(parameters, &settings.optimization)?,
            budget,
        })
    }
}

impl SftModel for PolicySft {
    type Prep = Processor;
    type Prepared = SftTokens;

    fn prep(&self) -> &Processor {
        &self.prep
    }

    fn prepare(prep: &Processor, example: &SftExample<'_>) -> Result<SftTokens, RowFault> {
        prep.example(example)
    }

    fn embed(
        &self,
        examples: &[SftTokens],
        keep: SavedActivations,
    ) -> (Vec<Tensor>, Vec<LayerStack<'_>>) {
        let images: Vec<&Tiles> = examples
            .iter()
            .flat_map(|example| &example.prepared.images)
            .collect();
        let seen = self.network.encode(&images, keep, self.parts);
        let mut features = seen.features.into_iter();
        let embedded = examples.iter().map(|example| {
            let count = example.prepared.images.len();
            let features: Vec<Tensor> = features.by_ref().take(count).collect();
            self.network.embed_prompt(&example.prepared.text, &features)
        });
        (embedded.collect(), seen.chains)
    }

    fn tiles(example: &SftTokens) -> usize {
        let images = example.prepared.images.iter();
        images.map(|tiles| tiles.packing.tiles()).sum()
    }

    fn tokens(example: &SftTokens) -> (&[i64], &[std::ops::Range<usize>]) {
        (&example.prepared.text.ids, &example.answers)
    }

    fn decoder(&self) -> &Decoder {
        self.network.decoder()
    }

    fn lm_head(&self) -> &LmHead {
        self.network.lm_head()
    }

    fn reads_without_images(parameter: &Parameter) -> bool {
        parameter.name.starts_with("language_model.")
    }

    fn save(&self, to: &Path, parameters: &[Parameter]) -> Result<(), ModelError> {
        self.checkpoint.save(to, parameters)
    }
}

/// Plans the memory of a training of the weights in `folder`.
fn budget(
    asked: Option<Gigabytes>,
    device: Device,
    sizes: TrainingSizes,
    folder: &Path,
) -> Result<TrainingBudget, ModelError> {
    let budget = TrainingBudget::plan(asked, device, sizes, Checkpointing::Auto);
    budget.map_err(|problem| refuse(folder, problem))
}

/// The base and the tower of a LLaVA-RLHF reward model in SFT.
pub struct RewardBaseSft {
    prep: LlavaRlhfProcessor,
    base: Checkpoint,
    vision: Checkpoint,
    network: LlavaRlhf,
    lm_head: LmHead,
    device: Device,
    kind: Kind,
}

impl Sft<RewardBaseSft> {
    /// Opens base and tower; an adapter, if there is one, is not used.
    pub fn open(spec: &LlavaRlhfSpec, settings: &SftSettings) -> Result<Self, ModelError> {
        let prep = LlavaRlhfProcessor::open(spec)?;
        let (device, kind) = device::choose(spec.device, spec.dtype)?;
        let element = kind.elt_size_in_bytes() as u64;
        device::prepare(judge_elements(&prep.config));
        let sizes = TrainingSizes::of_base(&prep.config, settings.tower, element);
        let budget = budget(spec.memory_gb, device, sizes, &spec.base)?;
        let base = Checkpoint::open_base(&spec.base)?;
        let vision = Checkpoint::open_clip(&spec.vision)?;
        let purpose = Purpose::TrainingState(settings.tower.into());
        let (network, lm_head, parameters) = {
            let base_reader = Reader::new(&base, device, kind, purpose);
            let vision_reader = Reader::new(&vision, device, kind, purpose);
            let two_layers = base.has(TWO_LAYERS);
            let network = LlavaRlhf::new(&vision_reader, &base_reader, two_layers, &prep.config)?;
            let lm_head = if base.has(BASE_HEAD) {
                let config = DecoderSizes::from(&prep.config.text_config);
                LmHead::new(&(&layers::Path::root(&base_reader) / "lm_head"), &config)?
            } else {
                LmHead::tied(network.decoder())
            };
            let mut parameters = vision_reader.into_parameters();
            parameters.extend(base_reader.into_parameters());
            (network, lm_head, parameters)
        };
        Ok(Self {
            model: RewardBaseSft {
                prep,
                base,
                vision,
                network,
                lm_head,
                device,
                kind,
            },
            training: TrainingState::new(parameters, &settings.optimization)?,
            budget,
        })
    }
}

impl SftModel for RewardBaseSft {
    type Prep = LlavaRlhfProcessor;
    type Prepared = RewardSftTokens;

    fn prep(&self) -> &LlavaRlhfProcessor {
        &self.prep
    }

    fn prepare(
        prep: &LlavaRlhfProcessor,
        example: &SftExample<'_>,
    ) -> Result<RewardSftTokens, RowFault> {
        prep.example(example)
    }

    fn embed(
        &self,
        examples: &[RewardSftTokens],
        keep: SavedActivations,
    ) -> (Vec<Tensor>, Vec<LayerStack<'_>>) {
        let side = self.prep.clip.side() as i64;
        let pixels: Vec<f32> = examples
            .iter()
            .filter_map(|example| example.pixels.as_deref())
            .flatten()
            .copied()
            .collect();
        let chain = (!pixels.is_empty()).then(|| {
            let pixels = Tensor::from_slice(&pixels)
                .view([-1, 3, side, side])
                .to_device(self.device)
                .to_kind(self.kind);
            let look: Layer<'_> = Box::new(|pixels| self.network.encode_images(pixels));
            LayerStack::run(vec![look], &pixels, keep)
        });
        let features = chain.as_ref().map(LayerStack::output); // [images, patches, hidden]
        let mut image = 0;
        let embedded = examples.iter().map(|example| {
            let features = features.filter(|_| example.pixels.is_some());
            let features = features.map(|features| features.get(image));
            image += i64::from(example.pixels.is_some());
            let tokens = example.text.ids.len();
            let embeds = self.network.embed(&example.text, tokens, features.as_ref());
            embeds.to_kind(self.kind)
        });
        (embedded.collect(), chain.into_iter().collect())
    }

    fn tiles(example: &RewardSftTokens) -> usize {
        usize::from(example.pixels.is_some())
    }

    fn tokens(example: &RewardSftTokens) -> (&[i64], &[std::ops::Range<usize>]) {
        (&example.text.ids, &example.answers)
    }

    fn decoder(&self) -> &Decoder {
        self.network.decoder()
    }

    fn lm_head(&self) -> &LmHead {
        &self.lm_head
    }

    fn reads_without_images(parameter: &Parameter) -> bool {
        !parameter.name.starts_with(TOWER) && !parameter.name.contains("mm_projector")
    }

    /// Writes the folders `base` and `vision`.
    fn save(&self, to: &Path, parameters: &[Parameter]) -> Result<(), ModelError> {
        let made = fs::create_dir(to);
        made.map_err(|error| refuse(to, error.to_string()))?;
        self.base.save(&to.join("base"), parameters)?;
        self.vision.save(&to.join("vision"), parameters)
    }
}
