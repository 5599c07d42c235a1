//! Model settings in a pipeline file: policies, judges and reward models.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::architectures::{self, llava, llava_onevision};
use super::compute::{Compute, DeviceSpec, Dtype, Gigabytes};
use super::exam::Exam;
use super::http::Http;
use super::hub::located;
use super::judge_prompt::JudgePromptSettings;
use super::scripted::ScriptedJudge;
use super::traits::Judge;

/// A model: its kind, with the settings of that kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelSpec {
    /// A LLaVA-OneVision model (SigLIP, Qwen2) in the folder layout of transformers or LLaVA-NeXT.
    /// Answers prompts and can be trained.
    LlavaOnevision(VisionLanguageSpec),
    /// A LLaVA-1.5 model (CLIP, Llama or Vicuna) in the folder layout of transformers (`llava-hf`).
    /// Answers prompts and can be trained.
    Llava(VisionLanguageSpec),
    /// A LLaVA-RLHF reward model (CLIP, Llama, LoRA, reward head). Scores answers.
    LlavaRlhf(LlavaRlhfSpec),
    /// A LLaVA-OneVision or LLaVA-1.5 checkpoint that judges in text, as LLaVA-Critic does.
    Critic(CriticSpec),
    /// Another model of this pipeline that judges in text: the policy as its own critic, or an
    /// endpoint with another judge prompt.
    #[serde(rename = "self")]
    SelfJudge(SelfJudge),
    /// A model behind an OpenAI-compatible endpoint that judges in text.
    Http(Http),
    /// A reward computed by a SQL expression.
    Sql(SqlReward),
    /// A model without a network that answers and scores by rule, for trying a pipeline without
    /// weights.
    Scripted(Scripted),
}

/// Settings of a vision-language model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VisionLanguageSpec {
    /// Checkpoint folder with config.json, the weights and the tokenizer, in the layout of
    /// transformers (for `llava_onevision`, also of LLaVA-NeXT); or `hf://org/name` (optionally `hf://org/name@revision`), which
    /// is read from the Hugging Face cache. `pipeline run` downloads what the cache lacks.
    pub weights: PathBuf,
    /// Folder of a LoRA adapter for these weights, in the format of peft. Default: no adapter.
    #[serde(default)]
    pub adapter: Option<PathBuf>,
    /// Compute device: `auto`, `cpu`, `cuda` (same as `cuda:0`) or `cuda:N`. Default: `auto`, the
    /// first CUDA device, or the CPU if there is no NVIDIA GPU.
    #[serde(default)]
    pub device: DeviceSpec,
    /// Compute dtype: `auto`, `float32` or `bfloat16`. Default: `auto`, bfloat16 on CUDA and
    /// float32 on the CPU. Weights being trained are kept in float32 in any case.
    #[serde(default)]
    pub dtype: Dtype,
    /// Memory limit for sampling and scoring (weights, KV cache and activations), in GB of 10⁹
    /// bytes. Default: 90 % of the GPU's memory, or on the CPU half of the memory of the machine or
    /// container.
    #[serde(default)]
    pub memory_gb: Option<Gigabytes>,
}

/// Settings of a LLaVA-RLHF reward model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LlavaRlhfSpec {
    /// Folder of the LLaVA model that the adapter was trained on (`sft_model`): Llama and the
    /// projector.
    pub base: PathBuf,
    /// Folder of the CLIP vision tower.
    pub vision: PathBuf,
    /// Folder of the LoRA adapter, with the file `reward_head` in it. Default: none; the model can
    /// then score only after a `train_reward` stage has trained an adapter and head.
    #[serde(default)]
    pub adapter: Option<PathBuf>,
    /// Text file with the reward prompt that asks for the score. Its placeholder `{factual_prompt}`
    /// is replaced by the captions.
    pub prompt: PathBuf,
    /// Number of caption orders over which a reward is averaged. Default: 1, the captions in their
    /// given order.
    #[serde(default = "LlavaRlhfSpec::caption_orders")]
    pub caption_orders: NonZeroU32,
    /// Compute device: `auto`, `cpu`, `cuda` (same as `cuda:0`) or `cuda:N`. Default: `auto`, the
    /// first CUDA device, or the CPU if there is no NVIDIA GPU.
    #[serde(default)]
    pub device: DeviceSpec,
    /// Compute dtype: `auto`, `float32` or `bfloat16`. Default: `auto`, bfloat16 on CUDA and
    /// float32 on the CPU.
    #[serde(default)]
    pub dtype: Dtype,
    /// Memory limit for scoring (weights, KV cache and activations), in GB of 10⁹ bytes. Default:
    /// 90 % of the GPU's memory, or on the CPU half of the memory of the machine or container.
    #[serde(default)]
    pub memory_gb: Option<Gigabytes>,
    /// Exam on known preferences that the judge must pass before it scores. Default: no exam.
    #[serde(default)]
    pub exam: Option<Exam>,
}

impl LlavaRlhfSpec {
    fn caption_orders() -> NonZeroU32 {
        const { NonZeroU32::new(1).unwrap() }
    }
}

/// Settings of a vision-language checkpoint that judges answers in text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CriticSpec {
    /// Checkpoint folder or `hf://org/name`, as for `llava_onevision` or `llava`.
    pub weights: PathBuf,
    /// Folder of a LoRA adapter for these weights, in the format of peft. Default: no adapter.
    #[serde(default)]
    pub adapter: Option<PathBuf>,
    /// Compute device: `auto`, `cpu`, `cuda` (same as `cuda:0`) or `cuda:N`. Default: `auto`, the
    /// first CUDA device, or the CPU if there is no NVIDIA GPU.
    #[serde(default)]
    pub device: DeviceSpec,
    /// Compute dtype: `auto`, `float32` or `bfloat16`. Default: `auto`, bfloat16 on CUDA and
    /// float32 on the CPU.
    #[serde(default)]
    pub dtype: Dtype,
    /// Memory limit for weights, KV cache and activations, in GB of 10⁹ bytes. Default: 90 % of the
    /// GPU's memory, or on the CPU half of the memory of the machine or container.
    #[serde(default)]
    pub memory_gb: Option<Gigabytes>,
    /// Judge prompt, and how verdicts are read from the replies. Default: pairwise with the
    /// built-in prompt.
    #[serde(default)]
    pub ask: JudgePromptSettings,
    /// Exam on known preferences that the judge must pass before it scores. Default: no exam.
    #[serde(default)]
    pub exam: Option<Exam>,
}

impl CriticSpec {
    /// Returns the settings of the network that generates the replies.
    pub fn network(&self) -> VisionLanguageSpec {
        VisionLanguageSpec {
            weights: self.weights.clone(),
            adapter: self.adapter.clone(),
            device: self.device,
            dtype: self.dtype,
            memory_gb: self.memory_gb,
        }
    }
}

/// Settings of a judge whose replies come from another model of the pipeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SelfJudge {
    /// Name of the backing model in `models`: one that answers prompts, used with its current weights
    /// in each round, or an `http` model, of which several judges can be made in this way.
    pub model: String,
    /// Judge prompt, and how verdicts are read from the replies. Default: pairwise with the
    /// built-in prompt.
    #[serde(default)]
    pub ask: JudgePromptSettings,
    /// Exam on known preferences that the judge must pass before it scores. Default: no exam.
    #[serde(default)]
    pub exam: Option<Exam>,
}

/// Settings of a reward computed by a SQL expression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SqlReward {
    /// Numeric SQL expression for the reward of one answer, such as `case when text = answer then 1
    /// else 0 end - 0.01 * length(text)`. It can use `text` (the answer being scored), `question`,
    /// `answer` (the reference answer, or null), `captions` (a list, or null), `candidate` and
    /// `prompt_id`.
    pub reward: String,
    /// Exam on known preferences that the judge must pass before it scores. Default: no exam.
    #[serde(default)]
    pub exam: Option<Exam>,
}

impl SqlReward {
    /// The table that the expression is evaluated over.
    pub const TABLE: &str = "answers";

    /// Returns the query for the rewards of all rows, in row order.
    pub fn sql(&self) -> String {
        let (reward, table) = (&self.reward, Self::TABLE);
        format!("select row, cast(({reward}) as double) as reward from {table} order by row")
    }

    /// Returns the query for the rewards without a cast, to check the type of the expression.
    pub fn sql_as_it_is(&self) -> String {
        let (reward, table) = (&self.reward, Self::TABLE);
        format!("select ({reward}) as reward from {table}")
    }
}

/// Settings of a scripted model: answers are computed by rule from the prompt and its seed, scores
/// from the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Scripted {
    /// Maximum number of words in an answer. Default: 8.
    pub words: u32,
    /// Exam on known preferences that the judge must pass before it scores. Default: no exam.
    pub exam: Option<Exam>,
    /// The checkpoint written by a scripted training stage, if there is one.
    #[serde(skip)]
    pub checkpoint: Option<PathBuf>,
}

impl Default for Scripted {
    fn default() -> Self {
        Self {
            words: 8,
            exam: None,
            checkpoint: None,
        }
    }
}

/// A judge that is asked in text: how it is asked, and what produces its replies.
#[derive(Debug, Clone, Copy)]
pub struct PromptedJudge<'a> {
    pub ask: &'a JudgePromptSettings,
    pub exam: Option<&'a Exam>,
    pub replies: Replies<'a>,
}

/// The source of a judge's replies.
#[derive(Debug, Clone, Copy)]
pub enum Replies<'a> {
    /// A checkpoint.
    Weights,
    /// A model of the pipeline, by its name.
    Model(&'a str),
    /// An endpoint.
    Endpoint(&'a Http),
}

/// A role that a model can play.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Answers prompts.
    Answers,
    /// Scores answers.
    Scores,
    /// Is trained with DPO.
    LearnsPairs,
    /// Is trained with SFT.
    LearnsAnswers,
    /// Is trained as a reward model.
    LearnsRewards,
}

/// The vision-language models by their architectures.
const VISION_LANGUAGE: [(&str, fn(VisionLanguageSpec) -> ModelSpec); 2] = [
    (llava_onevision::NAME, ModelSpec::LlavaOnevision),
    (llava::NAME, ModelSpec::Llava),
];

/// A kind of models.
struct ModelKind {
    /// The key in a pipeline file.
    name: &'static str,
    roles: &'static [Role],
}

const POLICY: &[Role] = &[Role::Answers, Role::LearnsPairs, Role::LearnsAnswers];
const JUDGE: &[Role] = &[Role::Scores];

/// The kinds of models, in the order of the variants of [`ModelSpec`].
const KINDS: [ModelKind; 8] = [
    ModelKind {
        name: llava_onevision::NAME,
        roles: POLICY,
    },
    ModelKind {
        name: llava::NAME,
        roles: POLICY,
    },
    ModelKind {
        name: "llava_rlhf",
        roles: &[Role::Scores, Role::LearnsAnswers, Role::LearnsRewards],
    },
    ModelKind {
        name: "critic",
        roles: JUDGE,
    },
    ModelKind {
        name: "self",
        roles: JUDGE,
    },
    ModelKind {
        name: "http",
        roles: JUDGE,
    },
    ModelKind {
        name: "sql",
        roles: JUDGE,
    },
    ModelKind {
        name: "scripted",
        roles: &[
            Role::Answers,
            Role::Scores,
            Role::LearnsPairs,
            Role::LearnsAnswers,
            Role::LearnsRewards,
        ],
    },
];

impl ModelSpec {
    fn kind(&self) -> &'static ModelKind {
        &KINDS[match self {
            Self::LlavaOnevision(_) => 0,
            Self::Llava(_) => 1,
            Self::LlavaRlhf(_) => 2,
            Self::Critic(_) => 3,
            Self::SelfJudge(_) => 4,
            Self::Http(_) => 5,
            Self::Sql(_) => 6,
            Self::Scripted(_) => 7,
        }]
    }

    /// Returns the key for this kind of model in a pipeline file.
    pub fn network(&self) -> &'static str {
        self.kind().name
    }

    /// True if the model can play the role.
    pub fn can(&self, role: Role) -> bool {
        self.kind().roles.contains(&role)
    }

    /// Returns the keys of the kinds of models that can play the role.
    pub fn kinds_for(role: Role) -> impl Iterator<Item = &'static str> {
        let able = KINDS.iter().filter(move |kind| kind.roles.contains(&role));
        able.map(|kind| kind.name)
    }

    /// Returns the memory limit, if one is set.
    pub fn memory_gb(&self) -> Option<Gigabytes> {
        self.compute()?.memory_gb
    }

    /// Returns the judge that is asked in text, whatever produces its replies.
    pub fn prompted(&self) -> Option<PromptedJudge<'_>> {
        let (ask, exam, replies) = match self {
            Self::Critic(model) => (&model.ask, &model.exam, Replies::Weights),
            Self::SelfJudge(model) => (&model.ask, &model.exam, Replies::Model(&model.model)),
            Self::Http(model) => (&model.ask, &model.exam, Replies::Endpoint(model)),
            Self::LlavaOnevision(_)
            | Self::Llava(_)
            | Self::LlavaRlhf(_)
            | Self::Sql(_)
            | Self::Scripted(_) => return None,
        };
        let exam = exam.as_ref();
        Some(PromptedJudge { ask, exam, replies })
    }

    /// Returns the judge prompt settings, for judges that reply in text.
    pub fn prompt_settings(&self) -> Option<&JudgePromptSettings> {
        Some(self.prompted()?.ask)
    }

    fn prompt_settings_mut(&mut self) -> Option<&mut JudgePromptSettings> {
        match self {
            Self::Critic(model) => Some(&mut model.ask),
            Self::SelfJudge(model) => Some(&mut model.ask),
            Self::Http(model) => Some(&mut model.ask),
            Self::LlavaOnevision(_)
            | Self::Llava(_)
            | Self::LlavaRlhf(_)
            | Self::Sql(_)
            | Self::Scripted(_) => None,
        }
    }

    /// Returns the name of the backing model in the pipeline.
    pub fn backing_model(&self) -> Option<&str> {
        match self.prompted()?.replies {
            Replies::Model(name) => Some(name),
            Replies::Weights | Replies::Endpoint(_) => None,
        }
    }

    /// Returns the name under which others know the model: that of the served model for an endpoint,
    /// or that of the repository or folder of the weights. `None` for models without either.
    pub fn public_name(&self) -> Option<String> {
        if let Self::Http(http) = self {
            return Some(http.model.clone());
        }
        let weights = match self {
            Self::LlavaOnevision(model) | Self::Llava(model) => &model.weights,
            Self::Critic(model) => &model.weights,
            Self::LlavaRlhf(model) => model.adapter.as_ref()?,
            Self::Http(_) | Self::SelfJudge(_) | Self::Sql(_) | Self::Scripted(_) => return None,
        };
        // A repository is in the hub's cache as `models--org--name/snapshots/…`.
        let cached = weights.iter().find_map(|step| {
            let name = step.to_str()?.strip_prefix("models--")?;
            Some(name.replace("--", "/"))
        });
        let repository = || Some(weights.to_str()?.strip_prefix("hf://")?.to_owned());
        let folder = || Some(weights.file_name()?.to_string_lossy().into_owned());
        cached.or_else(repository).or_else(folder)
    }

    /// Returns the endpoint that produces the judge's replies, if it is one.
    pub fn endpoint(&self) -> Option<&Http> {
        match self.prompted()?.replies {
            Replies::Endpoint(http) => Some(http),
            Replies::Weights | Replies::Model(_) => None,
        }
    }

    /// Opens a judge that scores by rule, without a network and without queries.
    pub fn judge_by_rule(&self) -> Option<Box<dyn Judge>> {
        match self {
            Self::Scripted(_) => Some(Box::new(ScriptedJudge)),
            Self::LlavaOnevision(_)
            | Self::Llava(_)
            | Self::LlavaRlhf(_)
            | Self::Critic(_)
            | Self::SelfJudge(_)
            | Self::Http(_)
            | Self::Sql(_) => None,
        }
    }

    /// Returns the model to load: for a critic, the network that generates its replies, of the
    /// architecture that its checkpoint has.
    #[must_use]
    pub fn opened(self) -> Self {
        match self {
            Self::Critic(model) => {
                let name = architectures::name_of(&model.weights).ok();
                let own = VISION_LANGUAGE.iter().find(|(own, _)| Some(*own) == name);
                // An unreadable checkpoint fails when it is opened.
                let (_, variant) = own.unwrap_or(&VISION_LANGUAGE[0]);
                variant(model.network())
            }
            other => other,
        }
    }

    /// Returns the compute settings of a model with a network.
    pub fn compute(&self) -> Option<Compute> {
        let (device, dtype, memory_gb) = match self {
            Self::LlavaOnevision(model) | Self::Llava(model) => {
                (model.device, model.dtype, model.memory_gb)
            }
            Self::LlavaRlhf(model) => (model.device, model.dtype, model.memory_gb),
            Self::Critic(model) => (model.device, model.dtype, model.memory_gb),
            Self::SelfJudge(_) | Self::Http(_) | Self::Sql(_) | Self::Scripted(_) => return None,
        };
        Some(Compute {
            device,
            dtype,
            memory_gb,
        })
    }

    /// Returns the settings of a vision-language model, whatever its architecture.
    pub fn vision_language(&self) -> Option<&VisionLanguageSpec> {
        match self {
            Self::LlavaOnevision(model) | Self::Llava(model) => Some(model),
            Self::LlavaRlhf(_)
            | Self::Critic(_)
            | Self::SelfJudge(_)
            | Self::Http(_)
            | Self::Sql(_)
            | Self::Scripted(_) => None,
        }
    }

    /// True if the model lacks a part that must be trained before it can score.
    pub fn is_unfinished(&self) -> bool {
        matches!(self, Self::LlavaRlhf(model) if model.adapter.is_none())
    }

    /// True for a model without a network, for tests.
    pub fn is_scripted(&self) -> bool {
        matches!(self, Self::Scripted(_))
    }

    /// True if loading the model requires libtorch.
    pub fn needs_torch(&self) -> bool {
        self.compute().is_some()
    }

    /// Returns the settings that change the model's output, besides its files, its judge prompt and
    /// its precision; `scores` is true if the model is used as a judge.
    pub fn key_settings(&self, scores: bool) -> Option<Vec<u8>> {
        match self {
            Self::LlavaRlhf(model) => {
                let orders = model.caption_orders.get();
                (scores && orders > 1).then(|| orders.to_le_bytes().to_vec())
            }
            Self::Http(model) => Some(model.key_settings()),
            Self::Sql(model) => Some(model.reward.clone().into_bytes()),
            Self::Scripted(model) => Some(model.words.to_le_bytes().to_vec()),
            Self::LlavaOnevision(_) | Self::Llava(_) | Self::Critic(_) | Self::SelfJudge(_) => None,
        }
    }

    /// Returns the files and folders of the model, each with its YAML field.
    pub fn paths(&self) -> Vec<(&'static str, &Path)> {
        let mut paths = self.own_paths();
        if let Some(ask) = self.prompt_settings() {
            paths.extend(ask.template.as_deref().map(|path| (TEMPLATE, path)));
            paths.extend(ask.system.as_deref().map(|path| (SYSTEM, path)));
        }
        paths
    }

    fn own_paths(&self) -> Vec<(&'static str, &Path)> {
        match self {
            Self::LlavaOnevision(model) | Self::Llava(model) => {
                let mut paths: Vec<(_, &Path)> = vec![("weights", &model.weights)];
                paths.extend(model.adapter.as_deref().map(|path| ("adapter", path)));
                paths
            }
            Self::LlavaRlhf(model) => {
                let mut paths: Vec<(_, &Path)> =
                    vec![("base", &model.base), ("vision", &model.vision)];
                paths.extend(model.adapter.as_deref().map(|path| ("adapter", path)));
                paths.push(("prompt", &model.prompt));
                paths
            }
            Self::Critic(model) => {
                let mut paths: Vec<(_, &Path)> = vec![("weights", &model.weights)];
                paths.extend(model.adapter.as_deref().map(|path| ("adapter", path)));
                paths
            }
            Self::SelfJudge(_) | Self::Http(_) | Self::Sql(_) | Self::Scripted(_) => Vec::new(),
        }
    }

    /// Returns the paths of the `config.json` files that determine the size of the network.
    pub fn configs(&self) -> Vec<PathBuf> {
        let folders: &[&Path] = match self {
            Self::LlavaOnevision(model) | Self::Llava(model) => &[&model.weights],
            Self::LlavaRlhf(model) => &[&model.base, &model.vision],
            Self::Critic(model) => &[&model.weights],
            Self::SelfJudge(_) | Self::Http(_) | Self::Sql(_) | Self::Scripted(_) => &[],
        };
        let config = |folder: &&Path| folder.join("config.json");
        folders.iter().map(config).collect()
    }

    /// Returns the exam settings, if there are any.
    pub fn exam(&self) -> Option<&Exam> {
        match self {
            Self::LlavaOnevision(_) | Self::Llava(_) => None,
            Self::LlavaRlhf(model) => model.exam.as_ref(),
            Self::Critic(_) | Self::SelfJudge(_) | Self::Http(_) => self.prompted()?.exam,
            Self::Sql(model) => model.exam.as_ref(),
            Self::Scripted(model) => model.exam.as_ref(),
        }
    }

    /// Resolves relative paths: each setting is joined to the folder that `folder` returns for its
    /// field.
    pub fn resolve(&mut self, folder: &dyn Fn(&str) -> PathBuf) {
        let join = |field: &str, path: &mut PathBuf| *path = located(&folder(field), path);
        match self {
            Self::LlavaOnevision(model) | Self::Llava(model) => {
                join("weights", &mut model.weights);
                model
                    .adapter
                    .iter_mut()
                    .for_each(|path| join("adapter", path));
            }
            Self::LlavaRlhf(model) => {
                join("base", &mut model.base);
                join("vision", &mut model.vision);
                join("prompt", &mut model.prompt);
                model
                    .adapter
                    .iter_mut()
                    .for_each(|path| join("adapter", path));
            }
            Self::Critic(model) => {
                join("weights", &mut model.weights);
                model
                    .adapter
                    .iter_mut()
                    .for_each(|path| join("adapter", path));
            }
            Self::SelfJudge(_) | Self::Http(_) | Self::Sql(_) | Self::Scripted(_) => {}
        }
        if let Some(ask) = self.prompt_settings_mut() {
            ask.template
                .iter_mut()
                .for_each(|path| join(TEMPLATE, path));
            ask.system.iter_mut().for_each(|path| join(SYSTEM, path));
        }
    }

    /// Returns the model with the parts in `checkpoint` in place of its own: for a policy all
    /// weights or the adapter, for a reward model those of the folders `base`, `vision` and
    /// `adapter` that exist.
    #[must_use]
    pub fn with_checkpoint(mut self, checkpoint: &Path) -> Self {
        match &mut self {
            Self::LlavaOnevision(model) | Self::Llava(model) => {
                if checkpoint.join("adapter_config.json").is_file() {
                    model.adapter = Some(checkpoint.to_owned());
                } else {
                    checkpoint.clone_into(&mut model.weights);
                    model.adapter = None;
                }
            }
            Self::LlavaRlhf(model) => {
                let part = |name: &str| Some(checkpoint.join(name)).filter(|path| path.is_dir());
                if let Some(base) = part("base") {
                    model.base = base;
                }
                if let Some(vision) = part("vision") {
                    model.vision = vision;
                }
                model.adapter = part("adapter").or(model.adapter.take());
            }
            Self::Scripted(model) => model.checkpoint = Some(checkpoint.to_owned()),
            // These are not trained themselves; a judge's backing model is.
            Self::Critic(_) | Self::SelfJudge(_) | Self::Http(_) | Self::Sql(_) => {}
        }
        self
    }
}

/// The YAML fields of the judge prompt's templates.
pub const TEMPLATE: &str = "ask.template";
pub const SYSTEM: &str = "ask.system";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_model_has_its_own_entry() {
        let schema = schemars::schema_for!(ModelSpec);
        let variants = schema
            .get("oneOf")
            .and_then(|list| list.as_array())
            .unwrap();
        let names: Vec<&str> = variants
            .iter()
            .map(|variant| variant["required"][0].as_str().unwrap())
            .collect();
        assert_eq!(names, KINDS.each_ref().map(|kind| kind.name));
        let scripted = ModelSpec::Scripted(Scripted::default());
        assert_eq!(scripted.network(), "scripted");
        let sql = SqlReward {
            reward: "1".to_owned(),
            exam: None,
        };
        assert_eq!(ModelSpec::Sql(sql).network(), "sql");
    }
}
