//! Models as a pipeline file names them.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::http::Http;
use super::hub::located;
use super::judge_prompt::JudgePromptSettings;

/// A model: what network it is and where its weights lie.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelSpec {
    /// LLaVA-OneVision (SigLIP, Qwen2), in the folder layout of transformers. Answers and learns.
    LlavaOnevision(LlavaOnevisionSpec),
    /// The reward model of LLaVA-RLHF (CLIP, Llama, LoRA, reward head). Scores.
    LlavaRlhf(LlavaRlhfSpec),
    /// A LLaVA-OneVision checkpoint that scores in writing, as LLaVA-Critic does.
    Critic(CriticSpec),
    /// A model of this pipeline, as it is in the round, that scores in writing: the policy as its own
    /// critic.
    #[serde(rename = "self")]
    SelfJudge(SelfJudge),
    /// A model behind an OpenAI-compatible endpoint, that scores in writing.
    Http(Http),
    /// An expression of SQL, that scores.
    Sql(SqlReward),
    /// No network: answers and scores by rule, to try a pipeline without weights.
    Scripted(Scripted),
}

/// A LLaVA-OneVision checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LlavaOnevisionSpec {
    /// The checkpoint's folder: config.json, the weights and the tokenizer, as transformers or LLaVA-NeXT writes
    /// them; or `hf://org/name` (`@revision`), what the Hugging Face hub's cache has of it, fetched by
    /// `pipeline run` where it has nothing.
    pub weights: PathBuf,
    /// The folder of a LoRA adapter to these weights, as peft writes it.
    #[serde(default)]
    pub adapter: Option<PathBuf>,
    /// Where it computes: `auto` (the first CUDA device, or the CPU where there is no NVIDIA GPU), `cpu`,
    /// `cuda`, `cuda:1`.
    #[serde(default)]
    pub device: DeviceSpec,
    /// Precision of what is computed. `auto` is float32 on the CPU, bfloat16 on CUDA. Weights that are
    /// trained are in float32 in any case.
    #[serde(default)]
    pub dtype: Dtype,
    /// Memory, in GB, that the weights and what is computed at once may take in sampling and
    /// scoring. Left out: nine tenths of the GPU's; half of the machine's or the container's.
    #[serde(default)]
    pub memory_gb: Option<Gigabytes>,
}

/// A LLaVA-RLHF reward model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LlavaRlhfSpec {
    /// The LLaVA folder that the adapter was trained on (`sft_model`): Llama and projector.
    pub base: PathBuf,
    /// The CLIP folder.
    pub vision: PathBuf,
    /// The LoRA adapter's folder, with the file `reward_head` beside the adapter. Without one the
    /// model can't score before `train_reward` has made one.
    #[serde(default)]
    pub adapter: Option<PathBuf>,
    /// The text file that asks for the score, with the placeholder `{factual_prompt}` for captions.
    pub prompt: PathBuf,
    /// Orders of a picture's captions over which a reward is averaged; 1 takes them as they stand.
    #[serde(default = "LlavaRlhfSpec::caption_orders")]
    pub caption_orders: NonZeroU32,
    /// Where it computes: `auto`, `cpu`, `cuda`, `cuda:1`.
    #[serde(default)]
    pub device: DeviceSpec,
    /// Precision. `auto` is float32 on the CPU, bfloat16 on CUDA.
    #[serde(default)]
    pub dtype: Dtype,
    /// Memory, in GB, that the weights and what is computed at once may take in sampling and
    /// scoring. Left out: nine tenths of the GPU's; half of the machine's or the container's.
    #[serde(default)]
    pub memory_gb: Option<Gigabytes>,
    /// What it must show before it scores.
    #[serde(default)]
    pub exam: Option<Exam>,
}

impl LlavaRlhfSpec {
    fn caption_orders() -> NonZeroU32 {
        const { NonZeroU32::new(1).unwrap() }
    }
}

/// A LLaVA-OneVision checkpoint that is asked in writing what it thinks of answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CriticSpec {
    /// The checkpoint's folder, as that of a `llava_onevision`.
    pub weights: PathBuf,
    /// The folder of a LoRA adapter to these weights, as peft writes it.
    #[serde(default)]
    pub adapter: Option<PathBuf>,
    /// Where it computes: `auto`, `cpu`, `cuda`, `cuda:1`.
    #[serde(default)]
    pub device: DeviceSpec,
    /// Precision. `auto` is float32 on the CPU, bfloat16 on CUDA.
    #[serde(default)]
    pub dtype: Dtype,
    /// Memory, in GB, that the weights and what is computed at once may take. Left out: nine tenths of
    /// the GPU's; half of the machine's or the container's.
    #[serde(default)]
    pub memory_gb: Option<Gigabytes>,
    /// What it is asked, and how its replies are read.
    #[serde(default)]
    pub ask: JudgePromptSettings,
    /// What it must show before it scores.
    #[serde(default)]
    pub exam: Option<Exam>,
}

impl CriticSpec {
    /// The network that writes.
    pub fn network(&self) -> LlavaOnevisionSpec {
        LlavaOnevisionSpec {
            weights: self.weights.clone(),
            adapter: self.adapter.clone(),
            device: self.device,
            dtype: self.dtype,
            memory_gb: self.memory_gb,
        }
    }
}

/// A model of the pipeline that is asked in writing what it thinks of answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SelfJudge {
    /// The name of the model; it is asked as it is in the round.
    pub model: String,
    /// What it is asked, and how its replies are read.
    #[serde(default)]
    pub ask: JudgePromptSettings,
    /// What it must show before it scores.
    #[serde(default)]
    pub exam: Option<Exam>,
}

/// A reward that is an expression over what is known of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SqlReward {
    /// The expression, a number, of `text` (what the answer says), `question`, `answer` (the true one,
    /// where it is known), `captions` (a list, where there are some), `candidate` and `prompt_id`:
    /// `case when text = answer then 1 else 0 end - 0.01 * length(text)`.
    pub reward: String,
    /// What it must show before it scores.
    #[serde(default)]
    pub exam: Option<Exam>,
}

impl SqlReward {
    /// The table that the expression is about.
    pub const TABLE: &str = "answers";

    /// The query that gives the reward of each of its rows, in their order.
    pub fn sql(&self) -> String {
        let (reward, table) = (&self.reward, Self::TABLE);
        format!("select row, cast(({reward}) as double) as reward from {table} order by row")
    }

    /// The query of the reward as what it is, a number or not.
    pub fn sql_as_it_is(&self) -> String {
        let (reward, table) = (&self.reward, Self::TABLE);
        format!("select ({reward}) as reward from {table}")
    }
}

/// Preferences that are known, and how well a judge must agree with them before it scores. What it
/// thinks of each is the table `<judge>_exam`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Exam {
    /// The file of labels: JSON that `load_feedback` reads.
    pub from: PathBuf,
    /// The folder that the pictures' paths start at; the folder of `from` if left out.
    #[serde(default)]
    pub images: Option<PathBuf>,
    /// The least share of the labels that it must agree with.
    pub accuracy_min: Share,
    /// The most that its margins may correlate (Pearson, either way) with how much longer, in
    /// characters, the preferred answer is.
    #[serde(default)]
    pub length_correlation_max: Option<Share>,
    /// The largest share of the labels about which a judge that sees two answers at once may change its
    /// mind when they are shown in the other order.
    #[serde(default)]
    pub flip_rate_max: Option<Share>,
    /// A label whose reward is known.
    #[serde(default)]
    pub golden: Option<Golden>,
}

/// A reward that is known, from where the judge is known to work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    /// The `id` of the label.
    pub id: String,
    /// The reward of its preferred answer.
    pub chosen_reward: f64,
    /// How far the reward may be from it.
    #[serde(default = "Golden::tolerance")]
    pub tolerance: f32,
}

impl Golden {
    fn tolerance() -> f32 {
        0.01
    }
}

/// A share, from 0 to 1.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, PartialOrd, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "f64", into = "f64")]
pub struct Share(#[schemars(range(min = 0, max = 1))] f64);

impl Share {
    pub fn get(self) -> f64 {
        self.0
    }

    /// Whether it says nothing.
    pub fn is_zero(&self) -> bool {
        self.0 == 0.0
    }
}

impl TryFrom<f64> for Share {
    type Error = String;

    fn try_from(share: f64) -> Result<Self, String> {
        if (0.0..=1.0).contains(&share) {
            Ok(Self(share))
        } else {
            Err(format!("{share} is not from 0 to 1"))
        }
    }
}

impl From<Share> for f64 {
    fn from(share: Share) -> f64 {
        share.0
    }
}

/// Answers made by rule from the prompt and the seed; scores made by rule from the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Scripted {
    /// The most words that an answer has.
    pub words: u32,
    /// What it must show before it scores.
    pub exam: Option<Exam>,
    /// What a scripted training wrote, once there was one.
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

/// Where a model computes: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceSpec {
    #[default]
    Auto,
    Cpu,
    Cuda(usize),
}

impl TryFrom<String> for DeviceSpec {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let number = |digits: &str| digits.parse().ok().map(Self::Cuda);
        match text.as_str() {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            other => other.strip_prefix("cuda:").and_then(number),
        }
        .ok_or_else(|| {
            format!("unknown device `{text}`, expected `auto`, `cpu`, `cuda` or `cuda:N`")
        })
    }
}

impl From<DeviceSpec> for String {
    fn from(device: DeviceSpec) -> Self {
        match device {
            DeviceSpec::Auto => "auto".to_owned(),
            DeviceSpec::Cpu => "cpu".to_owned(),
            DeviceSpec::Cuda(index) => format!("cuda:{index}"),
        }
    }
}

impl JsonSchema for DeviceSpec {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Device".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "pattern": "^(auto|cpu|cuda(:[0-9]+)?)$"})
    }
}

/// An amount of memory in GB of 10⁹ bytes, above 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Gigabytes(f64);

impl Gigabytes {
    pub fn bytes(self) -> u64 {
        (self.0 * 1e9) as u64
    }
}

impl TryFrom<f64> for Gigabytes {
    type Error = String;

    fn try_from(value: f64) -> Result<Self, String> {
        if value > 0.0 && value.is_finite() {
            return Ok(Self(value));
        }
        Err(format!("{value} is not above 0"))
    }
}

impl From<Gigabytes> for f64 {
    fn from(value: Gigabytes) -> Self {
        value.0
    }
}

impl JsonSchema for Gigabytes {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Gigabytes".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "number", "exclusiveMinimum": 0})
    }
}

/// Precision of the arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    #[default]
    Auto,
    Float32,
    Bfloat16,
}

impl ModelSpec {
    /// The word that stands for this network in a pipeline file.
    pub fn network(&self) -> &'static str {
        match self {
            Self::LlavaOnevision(_) => "llava_onevision",
            Self::LlavaRlhf(_) => "llava_rlhf",
            Self::Critic(_) => "critic",
            Self::SelfJudge(_) => "self",
            Self::Http(_) => "http",
            Self::Sql(_) => "sql",
            Self::Scripted(_) => "scripted",
        }
    }

    /// The memory that it may take, where its settings say.
    pub fn memory_gb(&self) -> Option<Gigabytes> {
        match self {
            Self::LlavaOnevision(model) => model.memory_gb,
            Self::LlavaRlhf(model) => model.memory_gb,
            Self::Critic(model) => model.memory_gb,
            Self::SelfJudge(_) | Self::Http(_) | Self::Sql(_) | Self::Scripted(_) => None,
        }
    }

    /// What it is asked, if it scores in writing.
    pub fn asking(&self) -> Option<&JudgePromptSettings> {
        match self {
            Self::Critic(model) => Some(&model.ask),
            Self::SelfJudge(model) => Some(&model.ask),
            Self::Http(model) => Some(&model.ask),
            Self::LlavaOnevision(_) | Self::LlavaRlhf(_) | Self::Sql(_) | Self::Scripted(_) => None,
        }
    }

    /// The name of the model in the pipeline that speaks for it.
    pub fn backing_model(&self) -> Option<&str> {
        match self {
            Self::SelfJudge(model) => Some(&model.model),
            _ => None,
        }
    }

    /// The model that is opened for it: the network that a critic writes with.
    #[must_use]
    pub fn opened(self) -> Self {
        match self {
            Self::Critic(model) => Self::LlavaOnevision(model.network()),
            other => other,
        }
    }

    /// Whether it can answer prompts.
    pub fn answers(&self) -> bool {
        matches!(self, Self::LlavaOnevision(_) | Self::Scripted(_))
    }

    /// Whether it can score answers.
    pub fn scores(&self) -> bool {
        !matches!(self, Self::LlavaOnevision(_))
    }

    /// Whether it lacks a part that a training has to make before it can score.
    pub fn is_unfinished(&self) -> bool {
        matches!(self, Self::LlavaRlhf(model) if model.adapter.is_none())
    }

    /// Whether it can be trained with DPO.
    pub fn learns_pairs(&self) -> bool {
        matches!(self, Self::LlavaOnevision(_) | Self::Scripted(_))
    }

    /// Whether it can be trained on answers.
    pub fn learns_answers(&self) -> bool {
        matches!(
            self,
            Self::LlavaOnevision(_) | Self::LlavaRlhf(_) | Self::Scripted(_)
        )
    }

    /// Whether it can be trained to score.
    pub fn learns_rewards(&self) -> bool {
        matches!(self, Self::LlavaRlhf(_) | Self::Scripted(_))
    }

    /// Whether libtorch is needed to open it.
    pub fn needs_torch(&self) -> bool {
        matches!(
            self,
            Self::LlavaOnevision(_) | Self::LlavaRlhf(_) | Self::Critic(_)
        )
    }

    /// The files and folders that hold the model, with the YAML field that names each.
    pub fn paths(&self) -> Vec<(&'static str, &Path)> {
        match self {
            Self::LlavaOnevision(model) => {
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
                paths.extend(template_of(&model.ask));
                paths
            }
            Self::SelfJudge(model) => template_of(&model.ask).into_iter().collect(),
            Self::Http(model) => template_of(&model.ask).into_iter().collect(),
            Self::Sql(_) | Self::Scripted(_) => Vec::new(),
        }
    }

    /// The files that say how large the network is.
    pub fn configs(&self) -> Vec<PathBuf> {
        let folders: &[&Path] = match self {
            Self::LlavaOnevision(model) => &[&model.weights],
            Self::LlavaRlhf(model) => &[&model.base, &model.vision],
            Self::Critic(model) => &[&model.weights],
            Self::SelfJudge(_) | Self::Http(_) | Self::Sql(_) | Self::Scripted(_) => &[],
        };
        let config = |folder: &&Path| folder.join("config.json");
        folders.iter().map(config).collect()
    }

    /// What it must show before it scores.
    pub fn exam(&self) -> Option<&Exam> {
        match self {
            Self::LlavaOnevision(_) => None,
            Self::LlavaRlhf(model) => model.exam.as_ref(),
            Self::Critic(model) => model.exam.as_ref(),
            Self::SelfJudge(model) => model.exam.as_ref(),
            Self::Http(model) => model.exam.as_ref(),
            Self::Sql(model) => model.exam.as_ref(),
            Self::Scripted(model) => model.exam.as_ref(),
        }
    }

    /// Takes the relative path of every setting to start at the folder that `folder` gives for it.
    pub fn resolve(&mut self, folder: &dyn Fn(&str) -> PathBuf) {
        let join = |field: &str, path: &mut PathBuf| *path = located(&folder(field), path);
        match self {
            Self::LlavaOnevision(model) => {
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
                let template = model.ask.template.iter_mut();
                template.for_each(|path| join(TEMPLATE, path));
            }
            Self::Http(model) => {
                let template = model.ask.template.iter_mut();
                template.for_each(|path| join(TEMPLATE, path));
            }
            Self::SelfJudge(model) => {
                let template = model.ask.template.iter_mut();
                template.for_each(|path| join(TEMPLATE, path));
            }
            Self::Sql(_) | Self::Scripted(_) => {}
        }
    }

    /// The model with the parts that a training wrote into `checkpoint` in the place of its own: the
    /// whole of a policy, or its adapter; of a reward model those of the folders `base`, `vision` and `adapter` that
    /// are there.
    #[must_use]
    pub fn with_checkpoint(mut self, checkpoint: &Path) -> Self {
        match &mut self {
            Self::LlavaOnevision(model) => {
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
            // These are trained by no pipeline; it is the model that speaks for them that is.
            Self::Critic(_) | Self::SelfJudge(_) | Self::Http(_) | Self::Sql(_) => {}
        }
        self
    }
}

/// The setting of the text that asks.
pub const TEMPLATE: &str = "ask.template";

fn template_of(asking: &JudgePromptSettings) -> Option<(&'static str, &Path)> {
    Some((TEMPLATE, asking.template.as_deref()?))
}
