//! LLaVA-1.5 in the layout of transformers: CLIP, a projector of two layers, and Llama or Vicuna.
//!
//! Liu et al. 2023, *Improved Baselines with Visual Instruction Tuning*, arXiv 2310.03744;
//! transformers' `models/llava/`. An image is one tile, whatever its shape: its shorter side is
//! resized to the tower's, and the center is cut out.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use crate::architecture::{Architecture, ImageProcessor};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::{DecoderConfig, VisionConfig, eos_token_id, not_quantized};
use crate::checkpoint::json::JsonConfig;
use crate::checkpoint::names::{Tensors, clip, decoder_with_head, projector};
use crate::preprocess::anyres::{Packing, Tiles};
use crate::preprocess::chat::{
    Chat, ChatTemplate, ChatTokens, Conversation, Piece, fits_vocabulary,
};
use crate::preprocess::clip::Clip;
use crate::preprocess::image::Rgb;
use crate::preprocess::image_processor::ImageProcessorConfig;
use crate::preprocess::tokenizer::PlainTokenizer;
use crate::{ChatRole, Mask, Part, RowFault};

/// The key under `models` in a pipeline file.
pub const NAME: &str = "llava";

/// Returns the text of one question about one image, as the chat format tokenizes it.
pub fn rendered(question: &str) -> String {
    format!("USER: <image>\n{question} ASSISTANT:")
}

/// True if a config is that of transformers. LLaVA-NeXT's configs of this type name their tower.
pub fn is_of(file: &JsonConfig) -> Result<bool, CheckpointError> {
    Ok(file.text("model_type")? == Some("llava") && file.get("mm_vision_tower").is_none())
}

/// The config of a LLaVA-1.5 checkpoint, from its `config.json` and `generation_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaConfig {
    pub vision_config: VisionConfig,
    pub text_config: DecoderConfig,
    pub image_token_index: i64,
    /// For each selected feature (they are concatenated on the channel axis), the number of layers
    /// of the tower that run before it. There is no post-layernorm.
    pub vision_feature_layer: Vec<usize>,
    /// True if the class token is dropped (`vision_feature_select_strategy: default`).
    pub drops_class_token: bool,
    pub multimodal_projector_bias: bool,
    /// Tokens that end an answer, from `generation_config.json`; empty if there is no such file.
    pub eos_token_id: Vec<i64>,
}

impl LlavaConfig {
    /// Reads `config.json` and, if it exists, `generation_config.json` in `folder`.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let file = JsonConfig::open(&folder.join("config.json"))?;
        not_quantized(&file)?;
        file.only("projector_hidden_act", "gelu")?;
        let vision_config = match file.section("vision_config")? {
            Some(vision) => {
                vision.only("model_type", "clip_vision_model")?;
                VisionConfig::read(&vision, VisionConfig::CLIP)?
            }
            None => VisionConfig::CLIP_LARGE_336,
        };
        let text = match file.section("text_config")? {
            Some(text) => text,
            None => file.empty("text_config"),
        };
        text.only("model_type", "llama")?;
        let mut text_config = DecoderConfig::read(&text, DecoderConfig::LLAMA)?;
        text_config.tie_word_embeddings |= file.flag("tie_word_embeddings")?.unwrap_or(false);
        let mut layers = file.integers("vision_feature_layer")?;
        if layers.is_empty() {
            layers.push(-2);
        }
        let key = "vision_feature_select_strategy";
        let drops_class_token = match file.text(key)? {
            None | Some("default") => true,
            Some("full") => false,
            Some(other) => {
                let problem = format!("is `{other}`, expected `default` or `full`");
                return Err(file.fault(key, problem));
            }
        };
        let image_token_index = match file.integer("image_token_index")? {
            Some(found) => found,
            None => file.integer("image_token_id")?.unwrap_or(32_000),
        };
        if !(0..text_config.vocab_size as i64).contains(&image_token_index) {
            let size = text_config.vocab_size;
            let problem = format!("is {image_token_index}, outside the vocabulary of {size}");
            return Err(file.fault("image_token_index", problem));
        }
        Ok(Self {
            vision_feature_layer: vision_config.layers(&file, "vision_feature_layer", &layers)?,
            image_token_index,
            drops_class_token,
            multimodal_projector_bias: file.flag("multimodal_projector_bias")?.unwrap_or(true),
            eos_token_id: eos_token_id(folder)?,
            vision_config,
            text_config,
        })
    }

    /// Returns the number of layers of the tower that run.
    pub fn tower_layers(&self) -> usize {
        self.vision_feature_layer.iter().max().copied().unwrap_or(0)
    }

    /// Returns the width of the tower's features at the projector's input.
    pub fn feature_size(&self) -> usize {
        self.vision_config.hidden_size * self.vision_feature_layer.len()
    }

    /// Returns the number of features of an image.
    pub fn image_tokens(&self) -> usize {
        self.vision_config.patches() + usize::from(!self.drops_class_token)
    }

    /// Returns the canonical name and the shape of every tensor that the network needs, in the
    /// order of the forward pass.
    pub fn tensors(&self) -> Tensors {
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize]| tensors.push((name, shape.to_vec()));
        clip(
            &self.vision_config,
            self.tower_layers(),
            "vision_tower.",
            &mut add,
        );
        projector(
            self.text_config.hidden_size,
            self.feature_size(),
            self.multimodal_projector_bias,
            &mut add,
        );
        decoder_with_head(&self.text_config, &mut add);
        tensors
    }
}

/// The architecture with the config of one checkpoint.
#[derive(Debug)]
pub struct Llava {
    pub config: LlavaConfig,
}

impl Llava {
    /// Reads the config in `folder`.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let config = LlavaConfig::open(folder)?;
        Ok(Self { config })
    }

    /// Returns the layout of every image.
    fn packing(&self) -> Packing {
        Packing::Plain(self.config.image_tokens())
    }
}

impl Architecture for Llava {
    fn name(&self) -> &'static str {
        NAME
    }

    fn text_config(&self) -> &DecoderConfig {
        &self.config.text_config
    }

    fn vision_config(&self) -> &VisionConfig {
        &self.config.vision_config
    }

    fn tower_layers(&self) -> usize {
        self.config.tower_layers()
    }

    fn tensors(&self) -> Tensors {
        self.config.tensors()
    }

    fn parts(&self) -> &'static [Part] {
        &[Part::VisionTower, Part::Projector, Part::LanguageModel]
    }

    fn masks(&self) -> &'static [Mask] {
        &[]
    }

    fn chat(&self, folder: &Path) -> Result<Chat, CheckpointError> {
        chat(folder, &self.config)
    }

    fn images(&self, folder: &Path) -> Result<Arc<dyn ImageProcessor>, CheckpointError> {
        let side = self.config.vision_config.image_size;
        Ok(Arc::new(CenterCrop {
            clip: Clip::new(&ImageProcessorConfig::open_clip(folder, side)?),
            packing: self.packing(),
        }))
    }

    fn packings(&self, sizes: &[[usize; 2]]) -> Vec<Packing> {
        vec![self.packing(); sizes.len()]
    }

    fn video_packing(&self, _frames: usize) -> Result<Packing, RowFault> {
        Err(no_video())
    }

    fn image_tokens_min(&self) -> usize {
        self.packing().tokens()
    }

    fn largest_image(&self) -> [usize; 2] {
        [self.packing().tokens(), 1]
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// CLIP's image processor, whose output is one tile.
#[derive(Debug)]
struct CenterCrop {
    clip: Clip,
    packing: Packing,
}

impl ImageProcessor for CenterCrop {
    fn tiles(&self, image: Rgb, _images: usize) -> Result<Tiles, RowFault> {
        Ok(Tiles {
            pixels: self.clip.cropped(image)?,
            side: self.clip.side(),
            packing: self.packing.clone(),
        })
    }

    fn frames(&self, _frames: &[Rgb]) -> Result<Tiles, RowFault> {
        Err(no_video())
    }
}

fn no_video() -> RowFault {
    RowFault(format!(
        "the prompt has a video, which a `{NAME}` model cannot read; use `llava_onevision`"
    ))
}

/// Reads `tokenizer.json` in `folder` and checks that it fits `config`.
fn chat(folder: &Path, config: &LlavaConfig) -> Result<Chat, CheckpointError> {
    let tokenizer = PlainTokenizer::open(folder)?;
    let end = tokenizer.need("</s>")?;
    fits_vocabulary(&tokenizer, &config.text_config)?;
    let expected = config.image_token_index;
    if let Some(id) = tokenizer.id("<image>").filter(|&id| id != expected) {
        let problem = format!("has `<image>` with id {id}, but config.json has id {expected}");
        return Err(tokenizer.fault(problem));
    }
    let template = Vicuna {
        begin: tokenizer.beginning()?,
        // With a space of the tokenizer's own, this one would be a second.
        before_answer: if tokenizer.prefixes_every_text() {
            ""
        } else {
            " "
        },
    };
    let tokens = ChatTokens {
        end,
        image: expected,
        placeholders: Vec::new(),
        stops: config.eos_token_id.clone(),
    };
    Ok(Chat::new(tokenizer, Arc::new(template), tokens))
}

/// The chat template of llava-hf's checkpoints:
///
/// ```text
/// {system} USER: <image>\n{question} ASSISTANT: {answer} USER: {question} ASSISTANT:
/// ```
///
/// without a system text by default, and with images where they stand in a text; by default, with one
/// `<image>\n` per image before the user's first text. Earlier answers end without `</s>`.
#[derive(Debug)]
struct Vicuna {
    /// The tokens before every text, `<s>`.
    begin: Vec<i64>,
    before_answer: &'static str,
}

impl ChatTemplate for Vicuna {
    fn pieces<'a>(&self, conversation: &Conversation<'a>) -> Vec<Piece<'a>> {
        let mut pieces: Vec<Piece<'a>> = self.begin.iter().map(|&id| Piece::Token(id)).collect();
        let mut text = match conversation.system {
            Some(system) => format!("{system} "),
            None => String::new(),
        };
        let mut answers = Vec::new();
        for message in &conversation.messages {
            match message.role {
                ChatRole::User => {
                    text.push_str("USER: ");
                    text = message.append(text, &mut pieces, |text| {
                        Piece::Turns(text, std::mem::take(&mut answers))
                    });
                    text.push_str(" ASSISTANT:");
                }
                ChatRole::Assistant => {
                    let start = text.len();
                    text.push(' ');
                    text.push_str(message.text);
                    answers.push(start..text.len());
                    text.push(' ');
                }
            }
        }
        pieces.push(Piece::Turns(text, answers));
        pieces
    }

    fn before_answer(&self) -> &'static str {
        self.before_answer
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::preprocess::Processor;
    use crate::test_util::{llava_config, llava_folder, png, prompt, shown, write};
    use crate::{ChatPrompt, ChatTurn, Layout, TrainOn};

    /// Returns the text of a prompt's tokens.
    fn text_of(prompt: &ChatPrompt) -> String {
        let folder = llava_folder();
        let processor = Processor::open(folder.path()).unwrap();
        let found = processor.ids(prompt).unwrap();
        spaced(folder.path(), &found.ids)
    }

    /// Returns the text of tokens, with spaces as such.
    fn spaced(folder: &Path, ids: &[i64]) -> String {
        shown(folder, ids, 100).replace('▁', " ")
    }

    #[test]
    fn an_image_takes_a_token_for_each_patch_before_the_question() {
        let image = png(100, 61);
        assert_eq!(
            text_of(&prompt(vec![image.clone()], "What is this?")),
            "<s> USER: [16]\nWhat is this? ASSISTANT:"
        );
        let twice = prompt(vec![image.clone(), image], "And?");
        assert_eq!(text_of(&twice), "<s> USER: [16]\n[16]\nAnd? ASSISTANT:");
    }

    #[test]
    fn videos_are_refused_by_name() {
        let folder = llava_folder();
        let processor = Processor::open(folder.path()).unwrap();
        let video = crate::Visual::video(vec![png(30, 20)]);
        let fault = processor.ids(&prompt(vec![video], "What?")).unwrap_err();
        assert_eq!(
            fault.0,
            "the prompt has a video, which a `llava` model cannot read; use `llava_onevision`"
        );
    }

    #[test]
    fn earlier_turns_are_written_without_an_end() {
        let turn = |role, text: &str| ChatTurn {
            role,
            text: text.to_owned(),
        };
        let mut prompt = prompt(vec![png(56, 56)], "And now?");
        prompt.system = Some("Be brief.".to_owned());
        prompt.turns = vec![
            turn(ChatRole::User, "Hello"),
            turn(ChatRole::Assistant, "Hi."),
        ];
        assert_eq!(
            text_of(&prompt),
            "<s> Be brief. USER: [16]\nHello ASSISTANT: Hi. USER: And now? ASSISTANT:"
        );
        let folder = llava_folder();
        let processor = Processor::open(folder.path()).unwrap();
        let (text, answers) = processor
            .chat()
            .example(&prompt, "Yes.", TrainOn::All, &[1])
            .unwrap();
        let texts: Vec<String> = answers
            .into_iter()
            .map(|place| spaced(folder.path(), &text.ids[place]))
            .collect();
        assert_eq!(texts, [" Hi.", " Yes.</s>"]);
    }

    #[test]
    fn an_image_in_a_later_turn_leaves_the_earlier_answers_learned() {
        let turn = |role, text: &str| ChatTurn {
            role,
            text: text.to_owned(),
        };
        let image = png(56, 56);
        let mut prompt = prompt(vec![image.clone(), image], "And <image> now?");
        prompt.turns = vec![
            turn(ChatRole::User, "<image>\nThis"),
            turn(ChatRole::Assistant, "Yes."),
        ];
        let prompt = prompt.with_places();
        assert_eq!(
            text_of(&prompt),
            "<s> USER: [16]\nThis ASSISTANT: Yes. USER: And [16] now? ASSISTANT:"
        );
        let folder = llava_folder();
        let processor = Processor::open(folder.path()).unwrap();
        let chat = processor.chat();
        let (text, answers) = chat.example(&prompt, "No.", TrainOn::All, &[1, 1]).unwrap();
        let texts: Vec<String> = answers
            .into_iter()
            .map(|place| spaced(folder.path(), &text.ids[place]))
            .collect();
        assert_eq!(texts, [" Yes.", " No.</s>"]);
    }

    #[test]
    fn an_answer_starts_with_one_space_whatever_the_tokenizer() {
        let folder = llava_folder();
        let path = folder.path().join("tokenizer.json");
        let answer = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let processor = Processor::open(folder.path()).unwrap();
            processor.chat().answer("So.").unwrap()
        };
        let first = std::fs::read_to_string(&path).unwrap();
        let always = first.replace("\"first\"", "\"always\"");
        // As transformers 4 writes Llama's tokenizer.
        let mut prepended: serde_json::Value = serde_json::from_str(&first).unwrap();
        prepended["pre_tokenizer"] = json!(null);
        prepended["normalizer"] = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        ]});
        let ids = answer(&first);
        assert_eq!(ids.len(), 5);
        assert_eq!((ids[0], ids[4]), (4, 2));
        for other in [always, prepended.to_string()] {
            assert_ne!(other, first);
            assert_eq!(answer(&other), ids);
        }
    }

    #[test]
    fn the_config_decides_on_the_class_token_and_the_layer() {
        let folder = llava_folder();
        let open = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut config = llava_config();
            change(&mut config);
            write(folder.path(), "config.json", &config);
            Llava::open(folder.path())
        };
        let plain = open(&|_| ()).unwrap();
        assert_eq!((plain.tower_layers(), plain.image_tokens_min()), (2, 16));
        let full = open(&|config| {
            config["vision_feature_select_strategy"] = json!("full");
            config["vision_feature_layer"] = json!([-1, 1]);
        });
        let full = full.unwrap();
        assert_eq!((full.tower_layers(), full.image_tokens_min()), (3, 17));
        assert_eq!(full.config.feature_size(), 16);
        for (key, value, problem) in [
            (
                "vision_feature_select_strategy",
                json!("cls"),
                "is `cls`, expected `default` or `full`",
            ),
            (
                "image_token_index",
                json!(200),
                "is 200, outside the vocabulary of 104",
            ),
            (
                "projector_hidden_act",
                json!("relu"),
                "projector_hidden_act",
            ),
        ] {
            let error = open(&|config| config[key] = value.clone()).unwrap_err();
            assert!(error.to_string().contains(problem), "{error}");
        }
    }

    #[test]
    fn a_thin_image_is_rejected_before_it_fills_the_memory() {
        let folder = llava_folder();
        let processor = Processor::open(folder.path()).unwrap();
        let tiles = processor.tiles(&png(300, 56), 1).unwrap();
        assert_eq!((tiles.pixels.len(), tiles.side), (3 * 56 * 56, 56));
        let fault = processor.tiles(&png(1, 30_000), 1).unwrap_err();
        assert!(fault.0.contains("are too thin"), "{fault}");
    }

    #[test]
    fn only_llava_onevision_has_another_layout() {
        let folder = llava_folder();
        let error = crate::checkpoint::Conversion::of(folder.path(), Layout::LlavaNext);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("is not a LLaVA-OneVision checkpoint"),
            "{error}"
        );
    }
}
