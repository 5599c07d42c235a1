//! Supervised fine-tuning: next-token loss on the answers of conversations, for every network here
//! that writes text.
//!
//! A conversation is one causal pass, whatever number of its answers is learned; logits are computed
//! only where they predict a learned token. Short conversations go side by side, long ones one by
//! one; their gradients add up, so that the loss of a step is the mean over all learned tokens of its
//! batch, as in transformers' trainer.

use std::fs;
use std::path::Path;

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::budget::packs;
use super::chain::{Chain, Keep, Link};
use super::checkpoint::{Checkpoint, Parts, Purpose, Reader, TOWER};
use super::decoder::{Decoder, DecoderConfig, LmHead, Tree};
use super::device;
use super::dpo::token_logps;
use super::edge::guarded;
use super::layers;
use super::llava::Llava;
use super::llava_onevision::LlavaOnevision;
use super::optimizer::Parameter;
use super::training::{Training, doing, not_finite, row_error};
use ovchat_models::prep::{
    JudgeLesson, JudgePrep, PACK_TOKENS_MAX, PolicyLesson, PolicyPrep, TWO_LAYERS, Tiles,
};
use ovchat_models::{
    self as models, Learner, Lesson, LlavaRlhf, ModelError, RowFault, SftLearner, SftReport,
    SftSettings,
};

/// The head of a reward model's base, which judging never needs.
const BASE_HEAD: &str = "lm_head.weight";

/// A network that learns to write.
pub trait Student {
    /// What turns conversations into [`Student::Prepared`]; shared by threads.
    type Prep: Sync;
    /// A conversation as the network takes it.
    type Prepared: Send;

    fn prep(&self) -> &Self::Prep;

    /// Decodes, cuts and tokenizes.
    fn prepare(prep: &Self::Prep, lesson: &Lesson<'_>) -> Result<Self::Prepared, RowFault>;

    /// The whole sequences (`[tokens, hidden]`), and what gradients go through on from them.
    fn embed(&self, lessons: &[Self::Prepared]) -> (Vec<Tensor>, Vec<Chain<'_>>);

    /// The ids of the whole sequence, and where in it the tokens stand that are learned.
    fn tokens(lesson: &Self::Prepared) -> (&[i64], &[std::ops::Range<usize>]);

    fn decoder(&self) -> &Decoder;

    fn lm_head(&self) -> &LmHead;

    /// Whether the loss depends on a parameter also when there are no pictures.
    fn reads_without_pictures(parameter: &Parameter) -> bool;

    /// Writes the parameters as a checkpoint into the new folder `to`.
    fn save(&self, to: &Path, parameters: &[Parameter]) -> Result<(), ModelError>;
}

/// A student and what trains it.
pub struct Sft<S> {
    student: S,
    training: Training,
}

/// Sums over the conversations of a step.
#[derive(Default)]
struct Sums {
    loss: f64,
    accurate: f64,
    tokens: u64,
}

impl<S: Student> Sft<S> {
    /// What trains it.
    #[cfg(test)]
    pub fn training(&self) -> &Training {
        &self.training
    }

    /// Forward and backward of some conversations of a batch with `learned` learned tokens. Stops
    /// before the gradients at a loss that is not finite, and gives the number of its conversation.
    fn learn_from(
        &self,
        lessons: &[S::Prepared],
        learned: usize,
        sums: &mut Sums,
    ) -> Result<(), usize> {
        let device = self.student.decoder().device();
        let on_device = |ids: &[i64]| Tensor::from_slice(ids).to_device(device);
        let mut read = Vec::with_capacity(lessons.len());
        let mut trees = Vec::with_capacity(lessons.len());
        let mut counts = Vec::with_capacity(lessons.len());
        let (mut places, mut wanted) = (Vec::new(), Vec::new());
        let mut first = 0;
        let (embedded, pictures) = self.student.embed(lessons);
        for (lesson, embeds) in lessons.iter().zip(embedded) {
            let (ids, answers) = S::tokens(lesson);
            // A token is predicted where the one before it is read; the last one predicts nothing.
            let tree = Tree {
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
        let decoder = self.student.decoder();
        let chain = decoder.read(&Tensor::cat(&read, 0), trees, Keep::Everything);
        let hidden = chain.output().index_select(0, &on_device(&places)); // [learned, hidden]
        let logits = self.student.lm_head().forward(&hidden); // [learned, vocab]
        let wanted = on_device(&wanted);
        let losses = -token_logps(&logits, &wanted); // [learned]
        let of_lessons = losses.detach().split_with_sizes(counts, 0);
        for (number, losses) in of_lessons.iter().enumerate() {
            let loss = losses.sum(Kind::Double).double_value(&[]);
            if !loss.is_finite() {
                return Err(number);
            }
            sums.loss += loss;
        }
        (losses.sum(Kind::Double) / learned as f64).backward();
        chain.backward();
        for chain in pictures {
            chain.backward();
        }
        let likeliest = logits.detach().argmax(-1, false);
        let accurate = likeliest.eq_tensor(&wanted).sum(Kind::Double);
        sums.accurate += accurate.double_value(&[]);
        Ok(())
    }
}

impl<S: Student> SftLearner for Sft<S> {
    fn step(&mut self, batch: &[Lesson<'_>]) -> Result<SftReport, ModelError> {
        assert!(!batch.is_empty(), "a step needs conversations");
        let rows = || batch.iter().map(|lesson| lesson.id.to_owned()).collect();
        let prep = self.student.prep();
        let prepared: Vec<Result<S::Prepared, RowFault>> = batch
            .par_iter()
            .map(|lesson| S::prepare(prep, lesson))
            .collect();
        let mut lessons = Vec::with_capacity(batch.len());
        for (lesson, prepared) in batch.iter().zip(prepared) {
            lessons.push(prepared.map_err(|fault| row_error(lesson.id, fault.to_string()))?);
        }
        let learned: usize = lessons
            .iter()
            .flat_map(|lesson| S::tokens(lesson).1)
            .map(ExactSizeIterator::len)
            .sum();
        self.training.begin_step();
        let mut sums = Sums::default();
        let ids: Vec<&str> = batch.iter().map(|lesson| lesson.id).collect();
        let lengths: Vec<usize> = lessons
            .iter()
            .map(|lesson| S::tokens(lesson).0.len())
            .collect();
        for pack in packs(&lengths, PACK_TOKENS_MAX) {
            let what = doing("training on", "prompt", &ids[pack.clone()]);
            let length = lengths[pack.clone()].iter().sum();
            let learned = guarded(&what, pack.len(), length, || {
                self.learn_from(&lessons[pack.clone()], learned, &mut sums)
            })?;
            if let Err(number) = learned {
                let prompt = batch[pack.start + number].id;
                return Err(not_finite(format!("the loss of prompt {prompt}"), rows()));
            }
        }
        let has_pictures = batch.iter().any(|row| !row.prompt.pictures.is_empty());
        let has_gradient =
            |parameter: &Parameter| has_pictures || S::reads_without_pictures(parameter);
        let update = self.training.update(rows, has_gradient)?;
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

impl<S: Student> Learner for Sft<S> {
    fn save(&mut self, to: &Path) -> Result<(), ModelError> {
        self.student.save(to, &self.training.parameters)
    }

    fn save_state(&mut self, to: &Path) -> Result<(), ModelError> {
        self.training.save_state(to)
    }

    fn load_state(&mut self, from: &Path) -> Result<(), ModelError> {
        self.training.load_state(from)
    }
}

/// LLaVA-OneVision as a student.
pub struct OnevisionStudent {
    prep: PolicyPrep,
    checkpoint: Checkpoint,
    network: LlavaOnevision,
    parts: Parts,
}

impl Sft<OnevisionStudent> {
    /// Opens the checkpoint; training is in float32.
    pub fn open(spec: &models::LlavaOnevision, settings: &SftSettings) -> Result<Self, ModelError> {
        if let Some(adapter) = &spec.adapter {
            let problem = "is an adapter, and what is trained is the network; merge it first with \
                           `pipeline export --merge`";
            return Err(super::weights::refuse(adapter, problem.to_owned()));
        }
        let prep = PolicyPrep::open(&spec.weights)?;
        let (device, _) = device::choose(spec.device, spec.dtype)?;
        let checkpoint = Checkpoint::open(&spec.weights)?;
        let parts = settings.tower.into();
        let purpose = Purpose::Training(parts);
        let (network, parameters) =
            LlavaOnevision::open(&checkpoint, &prep.card, device, Kind::Float, purpose)?;
        Ok(Self {
            student: OnevisionStudent {
                prep,
                checkpoint,
                network,
                parts,
            },
            training: Training::new(parameters, &settings.optimization)?,
        })
    }
}

impl Student for OnevisionStudent {
    type Prep = PolicyPrep;
    type Prepared = PolicyLesson;

    fn prep(&self) -> &PolicyPrep {
        &self.prep
    }

    fn prepare(prep: &PolicyPrep, lesson: &Lesson<'_>) -> Result<PolicyLesson, RowFault> {
        prep.lesson(lesson)
    }

    fn embed(&self, lessons: &[PolicyLesson]) -> (Vec<Tensor>, Vec<Chain<'_>>) {
        let pictures: Vec<&Tiles> = lessons
            .iter()
            .flat_map(|lesson| &lesson.prepared.pictures)
            .collect();
        let seen = self.network.see(&pictures, Keep::Everything, self.parts);
        let mut features = seen.features.into_iter();
        let embedded = lessons.iter().map(|lesson| {
            let count = lesson.prepared.pictures.len();
            let features: Vec<Tensor> = features.by_ref().take(count).collect();
            self.network.embed_prompt(&lesson.prepared.text, &features)
        });
        (embedded.collect(), seen.chains)
    }

    fn tokens(lesson: &PolicyLesson) -> (&[i64], &[std::ops::Range<usize>]) {
        (&lesson.prepared.text.ids, &lesson.answers)
    }

    fn decoder(&self) -> &Decoder {
        &self.network.language_model
    }

    fn lm_head(&self) -> &LmHead {
        &self.network.lm_head
    }

    fn reads_without_pictures(parameter: &Parameter) -> bool {
        parameter.name.starts_with("language_model.")
    }

    fn save(&self, to: &Path, parameters: &[Parameter]) -> Result<(), ModelError> {
        self.checkpoint.save(to, parameters)
    }
}

/// The base and the tower of a LLaVA-RLHF reward model as a student.
pub struct LlavaStudent {
    prep: JudgePrep,
    base: Checkpoint,
    vision: Checkpoint,
    network: Llava,
    lm_head: LmHead,
    device: Device,
}

impl Sft<LlavaStudent> {
    /// Opens base and tower; an adapter, if there is one, has no part in this. Training is in
    /// float32.
    pub fn open(spec: &LlavaRlhf, settings: &SftSettings) -> Result<Self, ModelError> {
        let prep = JudgePrep::open(spec)?;
        let (device, _) = device::choose(spec.device, spec.dtype)?;
        let base = Checkpoint::open_base(&spec.base)?;
        let vision = Checkpoint::open_clip(&spec.vision)?;
        let purpose = Purpose::Training(settings.tower.into());
        let (network, lm_head, parameters) = {
            let base_reader = Reader::new(&base, device, Kind::Float, purpose);
            let vision_reader = Reader::new(&vision, device, Kind::Float, purpose);
            let two_layers = base.has(TWO_LAYERS);
            let network = Llava::new(&vision_reader, &base_reader, two_layers, &prep.card)?;
            let lm_head = if base.has(BASE_HEAD) {
                let config = DecoderConfig::from(&prep.card.text_config);
                LmHead::new(&(&layers::Path::root(&base_reader) / "lm_head"), &config)?
            } else {
                LmHead::tied(network.decoder())
            };
            let mut parameters = vision_reader.into_parameters();
            parameters.extend(base_reader.into_parameters());
            (network, lm_head, parameters)
        };
        Ok(Self {
            student: LlavaStudent {
                prep,
                base,
                vision,
                network,
                lm_head,
                device,
            },
            training: Training::new(parameters, &settings.optimization)?,
        })
    }
}

impl Student for LlavaStudent {
    type Prep = JudgePrep;
    type Prepared = JudgeLesson;

    fn prep(&self) -> &JudgePrep {
        &self.prep
    }

    fn prepare(prep: &JudgePrep, lesson: &Lesson<'_>) -> Result<JudgeLesson, RowFault> {
        prep.lesson(lesson)
    }

    fn embed(&self, lessons: &[JudgeLesson]) -> (Vec<Tensor>, Vec<Chain<'_>>) {
        let side = self.prep.clip.side() as i64;
        let pixels: Vec<f32> = lessons
            .iter()
            .filter_map(|lesson| lesson.pixels.as_deref())
            .flatten()
            .copied()
            .collect();
        let chain = (!pixels.is_empty()).then(|| {
            let pixels = Tensor::from_slice(&pixels)
                .view([-1, 3, side, side])
                .to_device(self.device);
            let look: Link<'_> = Box::new(|pixels| self.network.encode_images(pixels));
            Chain::run(vec![look], &pixels, Keep::Everything)
        });
        let features = chain.as_ref().map(Chain::output); // [pictures, patches, hidden]
        let mut picture = 0;
        let embedded = lessons.iter().map(|lesson| {
            let features = features.filter(|_| lesson.pixels.is_some());
            let features = features.map(|features| features.get(picture));
            picture += i64::from(lesson.pixels.is_some());
            let tokens = lesson.text.ids.len();
            self.network.embed(&lesson.text, tokens, features.as_ref())
        });
        (embedded.collect(), chain.into_iter().collect())
    }

    fn tokens(lesson: &JudgeLesson) -> (&[i64], &[std::ops::Range<usize>]) {
        (&lesson.text.ids, &lesson.answers)
    }

    fn decoder(&self) -> &Decoder {
        self.network.decoder()
    }

    fn lm_head(&self) -> &LmHead {
        &self.lm_head
    }

    fn reads_without_pictures(parameter: &Parameter) -> bool {
        !parameter.name.starts_with(TOWER) && !parameter.name.contains("mm_projector")
    }

    /// The folder `base`, and the folder `vision` beside it.
    fn save(&self, to: &Path, parameters: &[Parameter]) -> Result<(), ModelError> {
        let made = fs::create_dir(to);
        made.map_err(|error| super::weights::refuse(to, error.to_string()))?;
        self.base.save(&to.join("base"), parameters)?;
        self.vision.save(&to.join("vision"), parameters)
    }
}

#[cfg(test)]
mod tests;
