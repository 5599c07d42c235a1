//! LLaVA-OneVision: SigLIP with anyres tiles, a projector, and Qwen2.
//!
//! Li et al. 2024, *LLaVA-OneVision: Easy Visual Task Transfer*, arXiv 2408.03326. Checkpoints come
//! in the layouts of transformers and of LLaVA-NeXT.

use std::any::Any;
use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use crate::architecture::{Architecture, ImageProcessor};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::{DecoderConfig, LlavaOnevisionConfig, VisionConfig};
use crate::checkpoint::json::JsonConfig;
use crate::checkpoint::names::Tensors;
use crate::preprocess::anyres::{Anyres, AnyresLayout, Packing, Tiles};
use crate::preprocess::chat::{
    Chat, ChatTemplate, ChatTokens, Conversation, Piece, fits_vocabulary,
};
use crate::preprocess::image::Rgb;
use crate::preprocess::image_processor::ImageProcessorConfig;
use crate::preprocess::tokenizer::PlainTokenizer;
use crate::{ChatRole, Layout, Mask, Part, RowFault};

/// The key under `models` in a pipeline file.
pub const NAME: &str = "llava_onevision";

/// The system text of prompts that have none. transformers' chat template adds none of its own.
pub const SYSTEM: &str = "You are a helpful assistant.";

/// Returns the text of one question about one image, as the chat format tokenizes it.
pub fn rendered(question: &str) -> String {
    format!(
        "<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<image>\n{question}<|im_end|>\n\
         <|im_start|>assistant\n"
    )
}

/// True if a config is that of transformers, or LLaVA-NeXT's, which also has the type `llava`.
pub fn is_of(file: &JsonConfig) -> Result<bool, CheckpointError> {
    Ok(match file.text("model_type")? {
        Some("llava_onevision" | "llava_qwen") => true,
        Some("llava") => file.get("mm_vision_tower").is_some(),
        _ => false,
    })
}

/// The architecture with the config of one checkpoint.
#[derive(Debug)]
pub struct LlavaOnevision {
    pub config: LlavaOnevisionConfig,
    layout: AnyresLayout,
}

impl LlavaOnevision {
    /// Reads the config in `folder`.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let config = LlavaOnevisionConfig::open(folder)?;
        let layout = AnyresLayout::new(&config);
        Ok(Self { config, layout })
    }
}

impl Architecture for LlavaOnevision {
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
        let layers = self.config.vision_feature_layer.iter();
        layers.max().copied().unwrap_or(0)
    }

    fn tensors(&self) -> Tensors {
        self.config.tensors()
    }

    fn parts(&self) -> &'static [Part] {
        &Part::ALL
    }

    fn masks(&self) -> &'static [Mask] {
        &[Mask::Trl, Mask::LlavaNext]
    }

    fn chat(&self, folder: &Path) -> Result<Chat, CheckpointError> {
        chat(folder, &self.config)
    }

    fn images(&self, folder: &Path) -> Result<Arc<dyn ImageProcessor>, CheckpointError> {
        let side = self.config.vision_config.image_size;
        let processor = match self.config.layout {
            Layout::Transformers => ImageProcessorConfig::open_onevision(folder, side)?,
            Layout::LlavaNext => ImageProcessorConfig::of_llava_next(side),
        };
        let file = folder.join("config.json");
        let pinpoints = &self.config.image_grid_pinpoints;
        if let Some(pair) = pinpoints
            .iter()
            .find(|pair| pair.iter().any(|length| !length.is_multiple_of(side)))
        {
            let problem = format!(
                "`image_grid_pinpoints` contains {pair:?}, which is not a multiple of the tile size {side}"
            );
            return Err(CheckpointError::new(&file, problem));
        }
        if processor
            .image_grid_pinpoints
            .as_ref()
            .is_some_and(|other| other != pinpoints)
        {
            let problem =
                "`image_grid_pinpoints` differs from the image processor's; the two must be equal";
            return Err(CheckpointError::new(&file, problem));
        }
        Ok(Arc::new(Anyres::new(self.layout.clone(), &processor)))
    }

    fn packings(&self, sizes: &[[usize; 2]]) -> Vec<Packing> {
        match sizes {
            [[height, width]] => vec![Packing::Anyres(self.layout.single(*height, *width))],
            _ => vec![Packing::Anyres(self.layout.several()); sizes.len()],
        }
    }

    fn video_packing(&self, frames: usize) -> Result<Packing, RowFault> {
        match &self.config.no_video {
            None => Ok(Packing::Frames(self.layout.video(frames))),
            Some(problem) => Err(RowFault(format!(
                "the prompt has a video, but the video layout of this checkpoint is not supported: {problem}"
            ))),
        }
    }

    /// A single, very thin image has nothing after its base tile, not even a newline.
    fn image_tokens_min(&self) -> usize {
        self.layout.several().tokens() - 1
    }

    fn largest_image(&self) -> [usize; 2] {
        let sizes = self.config.image_grid_pinpoints.iter();
        let packings = sizes.map(|&[height, width]| self.layout.single(height, width));
        let largest = packings.map(|packing| [packing.tokens(), packing.tiles()]);
        largest.max().unwrap_or_default()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl ImageProcessor for Anyres {
    /// A single image is cut into tiles, one of several is padded to a square.
    fn tiles(&self, image: Rgb, images: usize) -> Result<Tiles, RowFault> {
        Ok(match images {
            1 => self.cut_single(&image),
            _ => self.cut_several(image),
        })
    }

    fn frames(&self, frames: &[Rgb]) -> Result<Tiles, RowFault> {
        Ok(self.squash_frames(frames))
    }
}

/// Reads `tokenizer.json` in `folder` and checks that it fits `config`.
fn chat(folder: &Path, config: &LlavaOnevisionConfig) -> Result<Chat, CheckpointError> {
    let tokenizer = PlainTokenizer::open(folder)?;
    let im_end = tokenizer.need("<|im_end|>")?;
    fits_vocabulary(&tokenizer, &config.text_config)?;
    let special = [
        ("<image>", config.image_token_index),
        ("<video>", config.video_token_index),
    ];
    // LLaVA-NeXT replaces `<image>` in the text before tokenization.
    let by_name = config.layout == Layout::Transformers;
    for (token, expected) in special.into_iter().filter(|_| by_name) {
        if let Some(id) = tokenizer.id(token).filter(|&id| id != expected) {
            let problem = format!("has `{token}` with id {id}, but config.json has id {expected}");
            return Err(tokenizer.fault(problem));
        }
    }
    let mut stops = config.eos_token_id.clone();
    stops.extend(tokenizer.id("<|endoftext|>"));
    let template = ChatMl {
        im_start: tokenizer.need("<|im_start|>")?,
        im_end,
    };
    let tokens = ChatTokens {
        end: im_end,
        image: config.image_token_index,
        placeholders: vec![config.video_token_index],
        stops,
    };
    Ok(Chat::new(tokenizer, Arc::new(template), tokens))
}

/// LLaVA-NeXT's template `qwen_1_5` (`llava/conversation.py`):
///
/// ```text
/// <|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n
/// ```
///
/// with earlier turns in between, and images where they stand in a text; by default, with one
/// `<image>\n` per image before the user's first text.
#[derive(Debug)]
struct ChatMl {
    im_start: i64,
    im_end: i64,
}

impl ChatMl {
    /// Adds `<|im_start|>`, the text that `content` adds, and `<|im_end|>\n`. Text between two
    /// special tokens is tokenized as one piece.
    fn message<'a>(
        &self,
        pieces: &mut Vec<Piece<'a>>,
        content: impl FnOnce(&mut Vec<Piece<'a>>) -> String,
    ) {
        pieces.push(counted(Piece::Token(self.im_start)));
        let text = content(pieces);
        pieces.push(Piece::Text(text.into()));
        pieces.push(counted(Piece::Token(self.im_end)));
        pieces.push(counted(Piece::Text("\n".into())));
    }

    /// Adds `<|im_start|>assistant\n`.
    fn begin_answer(&self, pieces: &mut Vec<Piece<'_>>) {
        pieces.push(counted(Piece::Token(self.im_start)));
        pieces.push(Piece::Text("assistant\n".into()));
    }
}

fn counted(piece: Piece<'_>) -> Piece<'_> {
    Piece::Counted(Box::new(piece))
}

impl ChatTemplate for ChatMl {
    fn pieces<'a>(&self, conversation: &Conversation<'a>) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let system = conversation.system.unwrap_or(SYSTEM);
        self.message(&mut pieces, |_| format!("system\n{system}"));
        for message in &conversation.messages {
            match message.role {
                ChatRole::User => self.message(&mut pieces, |pieces| {
                    let piece = |text: String| Piece::Text(text.into());
                    message.append("user\n".to_owned(), pieces, piece)
                }),
                ChatRole::Assistant => {
                    self.begin_answer(&mut pieces);
                    pieces.push(counted(Piece::Answer(message.text)));
                    pieces.push(counted(Piece::Text(Cow::Borrowed("\n"))));
                }
            }
        }
        self.begin_answer(&mut pieces);
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Visual;
    use crate::preprocess::Processor;
    use crate::preprocess::chat::PromptIds;
    use crate::test_util::{onevision_folder, png, prompt, shown};
    use crate::{ChatPrompt, ChatTurn};

    fn opened(folder: &Path) -> Chat {
        let architecture = LlavaOnevision::open(folder).unwrap();
        architecture.chat(folder).unwrap()
    }

    fn sequence(prompt: &ChatPrompt, image_tokens: &[usize]) -> (PromptIds, String) {
        let folder = onevision_folder();
        let chat = opened(folder.path());
        let found = chat.prompt(prompt, image_tokens).unwrap();
        let text = shown(folder.path(), &found.ids, chat.image_token());
        (found, text)
    }

    #[test]
    fn images_stand_before_the_question() {
        let (found, text) = sequence(&prompt(Vec::new(), "What is this?"), &[5, 3]);
        assert_eq!(
            text,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n\
             <|im_start|>user\n[5]\n[3]\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
        );
        for (range, tokens) in found.images.iter().zip([5, 3]) {
            assert_eq!(range.len(), tokens);
            assert!(found.ids[range.clone()].iter().all(|&id| id == 260));
        }
    }

    #[test]
    fn text_and_the_newline_before_it_are_tokenized_together() {
        let (found, _) = sequence(&prompt(Vec::new(), "\n"), &[1]);
        let behind = found.images[0].end;
        assert_eq!(found.ids[behind], 256, "the token of two newlines");
    }

    #[test]
    fn earlier_turns_come_first_and_the_first_user_turn_has_the_images() {
        let turn = |role, text: &str| ChatTurn {
            role,
            text: text.to_owned(),
        };
        let mut prompt = prompt(Vec::new(), "And now?");
        prompt.system = Some("Be brief.".to_owned());
        prompt.turns = vec![
            turn(ChatRole::User, "Hello"),
            turn(ChatRole::Assistant, "Hi."),
        ];
        let (_, text) = sequence(&prompt, &[2]);
        assert_eq!(
            text,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n[2]\nHello<|im_end|>\n\
             <|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n\
             <|im_start|>assistant\n"
        );
    }

    #[test]
    fn images_stand_where_the_text_has_them() {
        let turn = |role, text: &str| ChatTurn {
            role,
            text: text.to_owned(),
        };
        let images = (0..4).map(|_| png(56, 56)).collect();
        let mut prompt = prompt(images, "Image-1: <image>\nImage-2: <image>");
        prompt.turns = vec![
            turn(ChatRole::User, "<image><image>\nHello"),
            turn(ChatRole::Assistant, "Hi."),
        ];
        let (found, text) = sequence(&prompt.clone().with_places(), &[2, 3, 4, 5]);
        assert!(text.ends_with(
            "<|im_start|>user\n[5]\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n\
             <|im_start|>user\nImage-1: [4]\nImage-2: [5]<|im_end|>\n<|im_start|>assistant\n"
        ));
        let lengths: Vec<usize> = found.images.iter().map(ExactSizeIterator::len).collect();
        assert_eq!(lengths, [2, 3, 4, 5]);
        prompt.images.pop();
        let folder = onevision_folder();
        let fault = opened(folder.path()).prompt(&prompt.with_places(), &[2, 3, 4]);
        assert!(
            fault
                .unwrap_err()
                .0
                .starts_with("the prompt has 3 images but its texts have 4")
        );
    }

    #[test]
    fn special_tokens_in_what_people_wrote_are_plain_text() {
        let (found, text) = sequence(&prompt(Vec::new(), "<image><|im_end|>"), &[]);
        assert!(text.contains("<image><|im_end|><|im_end|>"));
        assert!(!found.ids.contains(&260));
        assert_eq!(found.ids.iter().filter(|&&id| id == 259).count(), 2);
    }

    #[test]
    fn a_video_takes_tokens_by_its_frames_and_leaves_an_image_its_tiles() {
        let folder = onevision_folder();
        let processor = Processor::open(folder.path()).unwrap();
        let frames = |count: usize| Visual::video((0..count).map(|_| png(30, 20)).collect());
        let image = png(100, 61);
        let alone = processor
            .packings(&prompt(vec![image.clone()], ""))
            .unwrap();
        // 4 patches per side of a frame are pooled to 2.
        let both = vec![image.clone(), frames(8)];
        let packings = processor.packings(&prompt(both.clone(), "")).unwrap();
        assert_eq!(packings[0], alone[0]);
        assert_eq!((packings[1].tokens(), packings[1].tiles()), (33, 8));
        let several = vec![frames(1), image.clone(), frames(3), image];
        let packings = processor.packings(&prompt(several, "")).unwrap();
        let tokens: Vec<usize> = packings.iter().map(Packing::tokens).collect();
        assert_eq!(tokens, [5, 17, 13, 17]);
        let prepared = processor.prepare(&prompt(both, "What?")).unwrap();
        assert_eq!(prepared.images[1].pixels.len(), 8 * 3 * 56 * 56);
    }

    /// A checkpoint of LLaVA-NeXT with another layout of videos.
    #[test]
    fn other_layouts_of_videos_are_refused_by_name() {
        let recorded = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/parity/recorded/onevision/llava-next-layout-d");
        let text = std::fs::read_to_string(recorded.join("config.json")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&recorded).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        let tower = folder.path().join("tower");
        std::fs::create_dir(&tower).unwrap();
        std::fs::copy(
            recorded.join("tower/config.json"),
            tower.join("config.json"),
        )
        .unwrap();
        let packing = |key: &str, value: serde_json::Value| {
            let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
            config[key] = value;
            std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
            LlavaOnevision::open(folder.path())
                .unwrap()
                .video_packing(2)
        };
        assert!(packing("mm_newline_position", "one_token".into()).is_ok());
        let fault = packing("mm_newline_position", "grid".into()).unwrap_err().0;
        let end = "not supported: `mm_newline_position` is `grid`, expected `one_token`";
        assert!(fault.ends_with(end), "{fault}");
        let fault = packing("add_faster_video", true.into()).unwrap_err().0;
        assert!(
            fault.ends_with("not supported: `add_faster_video` is true"),
            "{fault}"
        );
    }

    #[test]
    fn placeholders_and_ids_without_a_token_are_banned_and_ends_are_stops() {
        let folder = onevision_folder();
        let chat = opened(folder.path());
        assert_eq!(chat.banned(264), [260, 261, 262, 263]);
        assert_eq!(chat.stops(), [257, 259]);
        let answer = chat.answer("Yes.").unwrap();
        assert_eq!(answer.last(), Some(&259));
        assert_eq!(chat.decode(&answer), "Yes.");
    }

    #[test]
    fn a_tokenizer_without_im_end_is_refused() {
        let folder = onevision_folder();
        let path = folder.path().join("tokenizer.json");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("<|im_end|>", "<|end|>")).unwrap();
        let config = LlavaOnevisionConfig::open(folder.path()).unwrap();
        let diagnostic = chat(folder.path(), &config).unwrap_err().to_string();
        assert!(
            diagnostic.contains("tokenizer.json: has no token `<|im_end|>`"),
            "{diagnostic}"
        );
    }

    #[test]
    fn a_tokenizer_of_another_checkpoint_is_refused() {
        let folder = onevision_folder();
        let mut config = LlavaOnevisionConfig::open(folder.path()).unwrap();
        config.image_token_index = 100;
        let diagnostic = chat(folder.path(), &config).unwrap_err().to_string();
        assert!(diagnostic.contains("has `<image>` with id 260, but config.json has id 100"));
        config.text_config.vocab_size = 200;
        let diagnostic = chat(folder.path(), &config).unwrap_err().to_string();
        assert!(diagnostic.contains("has 262 tokens, but the vocab_size of config.json is 200"));
    }
}
