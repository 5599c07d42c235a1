//! Everything that the policy's network is fed with, from one checkpoint folder.

use std::ops::Range;
use std::path::Path;

use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::LlavaOnevisionConfig;
use crate::preprocess::anyres::{Anyres, Packing, Tiles};
use crate::preprocess::chat::{Chat, PromptIds};
use crate::preprocess::image::{PIXELS_MAX, decode, probe};
use crate::preprocess::image_processor::ImageProcessorConfig;
use crate::{ChatPrompt, EncodedImage, Layout, Newlines, RowFault, SftExample};

/// A LLaVA-OneVision checkpoint without its weights.
#[derive(Debug, Clone)]
pub struct LlavaOnevisionProcessor {
    pub config: LlavaOnevisionConfig,
    pub chat: Chat,
    pub anyres: Anyres,
}

/// A prompt as the network takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    pub text: PromptIds,
    /// In the order of `text.images`.
    pub images: Vec<Tiles>,
}

/// A conversation as the network takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct SftTokens {
    pub prepared: Prepared,
    /// Where the tokens stand that are to be learned.
    pub answers: Vec<Range<usize>>,
}

/// Refuses a conversation that is longer than a context.
pub(super) fn fits(tokens: usize, context: usize) -> Result<(), RowFault> {
    if tokens <= context {
        return Ok(());
    }
    let problem =
        format!("the conversation takes {tokens} tokens, and the model's context is {context}");
    Err(RowFault(problem))
}

/// A prompt as tokens, with what its pictures will be.
#[derive(Debug)]
pub struct Written {
    pub text: PromptIds,
    /// The places of its tokens that count in LLaVA-NeXT's DPO script.
    pub counted: Vec<usize>,
    /// Tiles of its pictures.
    pub tiles: usize,
}

impl LlavaOnevisionProcessor {
    /// Reads the config files and the tokenizer in `folder`, and checks that they agree.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let config = LlavaOnevisionConfig::open(folder)?;
        let side = config.vision_config.image_size;
        let processor = match config.layout {
            Layout::Transformers => ImageProcessorConfig::open_onevision(folder, side)?,
            Layout::LlavaNext => ImageProcessorConfig::of_llava_next(side),
        };
        let file = folder.join("config.json");
        let pinpoints = &config.image_grid_pinpoints;
        if let Some(pair) = pinpoints
            .iter()
            .find(|pair| pair.iter().any(|length| !length.is_multiple_of(side)))
        {
            let problem =
                format!("`image_grid_pinpoints` holds {pair:?}, not whole tiles of {side}");
            return Err(CheckpointError::new(&file, problem));
        }
        if processor
            .image_grid_pinpoints
            .as_ref()
            .is_some_and(|other| other != pinpoints)
        {
            let problem =
                "`image_grid_pinpoints` differs from the image processor's; make them equal";
            return Err(CheckpointError::new(&file, problem));
        }
        Ok(Self {
            chat: Chat::open(folder, &config)?,
            anyres: Anyres::new(&config, &processor),
            config,
        })
    }

    /// The longest sequence, in tokens: prompt, pictures and answer together.
    pub fn context(&self) -> usize {
        self.config.text_config.max_position_embeddings
    }

    /// How many tokens `prompt` takes, pictures included, however many that is. Only the headers of
    /// the pictures are read.
    pub fn count(&self, prompt: &ChatPrompt) -> Result<usize, RowFault> {
        Ok(self.sequence(prompt)?.ids.len())
    }

    /// The fewest tokens that a prompt can take: without a picture, and with one. There is no word in it,
    /// and of its picture only the base tile.
    pub fn least(&self) -> Result<[usize; 2], RowFault> {
        let prompt = ChatPrompt {
            id: String::new(),
            images: Vec::new(),
            system: None,
            turns: Vec::new(),
            question: String::new(),
            captions: None,
            answer: None,
            seed: 0,
        };
        let tokens = |images: &[usize]| Ok(self.chat.prompt(&prompt, images)?.ids.len());
        // Of a single picture that is very thin nothing stands behind the base tile, not even a newline.
        Ok([tokens(&[])?, tokens(&[self.anyres.several().tokens() - 1])?])
    }

    /// The tokens of `prompt`; a prompt that leaves no room for an answer is refused. Only the
    /// headers of the pictures are read.
    pub fn ids(&self, prompt: &ChatPrompt) -> Result<PromptIds, RowFault> {
        let sequence = self.sequence(prompt)?;
        let (tokens, context) = (sequence.ids.len(), self.context());
        if tokens >= context {
            let problem =
                format!("the prompt takes {tokens} tokens, and the model's context is {context}");
            return Err(RowFault(problem));
        }
        Ok(sequence)
    }

    /// The layout of each picture of `prompt`.
    pub fn packings(&self, prompt: &ChatPrompt) -> Result<Vec<Packing>, RowFault> {
        if prompt.images.len() > 1 {
            for image in &prompt.images {
                probe(&image.bytes).map_err(|fault| named(image, &fault))?;
            }
            return Ok(vec![self.anyres.several(); prompt.images.len()]);
        }
        let packing = |image: &EncodedImage| {
            let size = probe(&image.bytes).map_err(|fault| named(image, &fault))?;
            Ok(self.anyres.single(size.height, size.width))
        };
        prompt.images.iter().map(packing).collect()
    }

    /// Decodes and cuts a picture of a prompt that has `images` of them: alone it is cut into
    /// tiles, one of several is padded to a square.
    pub fn tiles(&self, image: &EncodedImage, images: usize) -> Result<Tiles, RowFault> {
        let rgb = decode(&image.bytes, PIXELS_MAX).map_err(|fault| named(image, &fault))?;
        Ok(match images {
            1 => self.anyres.cut_single(&rgb),
            _ => self.anyres.cut_several(rgb),
        })
    }

    /// The whole prompt: its tokens and the pixels of its pictures.
    pub fn prepare(&self, prompt: &ChatPrompt) -> Result<Prepared, RowFault> {
        let text = self.ids(prompt)?;
        let images = self.all_tiles(prompt)?;
        Ok(Prepared { text, images })
    }

    fn all_tiles(&self, prompt: &ChatPrompt) -> Result<Vec<Tiles>, RowFault> {
        let count = prompt.images.len();
        let images = prompt.images.iter();
        images.map(|image| self.tiles(image, count)).collect()
    }

    /// The whole prompt as LLaVA-NeXT's DPO script writes it, and the places of its tokens that count
    /// there.
    pub fn prepare_as_llava_next(
        &self,
        prompt: &ChatPrompt,
        newlines: Newlines,
    ) -> Result<(Prepared, Vec<usize>), RowFault> {
        let Written { text, counted, .. } = self.written_as_llava_next(prompt, newlines)?;
        let images = self.all_tiles(prompt)?;
        Ok((Prepared { text, images }, counted))
    }

    /// The same without its pixels: only the headers of the pictures are read.
    pub fn written_as_llava_next(
        &self,
        prompt: &ChatPrompt,
        newlines: Newlines,
    ) -> Result<Written, RowFault> {
        let packings = self.packings(prompt)?;
        let tokens: Vec<usize> = packings.iter().map(Packing::tokens).collect();
        let (text, counted) = self.chat.prompt_of_llava_next(prompt, &tokens, newlines)?;
        fits(text.ids.len(), self.context())?;
        Ok(Written {
            text,
            counted,
            tiles: packings.iter().map(Packing::tiles).sum(),
        })
    }

    /// A whole conversation to learn from; one that does not fit the context is refused.
    pub fn example(&self, example: &SftExample<'_>) -> Result<SftTokens, RowFault> {
        let (text, answers) = self.spoken(example)?;
        fits(text.ids.len(), self.context())?;
        let images = self.all_tiles(example.prompt)?;
        Ok(SftTokens {
            prepared: Prepared { text, images },
            answers,
        })
    }

    /// The tokens of a whole conversation, however many, and the places of those that are learned.
    /// Only the headers of the pictures are read.
    pub fn spoken(
        &self,
        example: &SftExample<'_>,
    ) -> Result<(PromptIds, Vec<Range<usize>>), RowFault> {
        let SftExample {
            prompt,
            answer,
            learned,
            ..
        } = *example;
        let tokens: Vec<usize> = self.packings(prompt)?.iter().map(Packing::tokens).collect();
        self.chat.example(prompt, answer, learned, &tokens)
    }

    /// The tokens of `prompt`, however many.
    fn sequence(&self, prompt: &ChatPrompt) -> Result<PromptIds, RowFault> {
        let tokens: Vec<usize> = self.packings(prompt)?.iter().map(Packing::tokens).collect();
        self.chat.prompt(prompt, &tokens)
    }
}

/// A fault of a picture, with the picture's name in front.
pub(super) fn named(image: &EncodedImage, fault: &RowFault) -> RowFault {
    RowFault(format!("picture {}: {fault}", image.id))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::test_util::{onevision_config, onevision_folder, png, prompt, write};

    #[test]
    fn counting_by_the_header_equals_preparing() {
        let folder = onevision_folder();
        let prep = LlavaOnevisionProcessor::open(folder.path()).unwrap();
        for images in [vec![], vec![png(100, 61)], vec![png(61, 200), png(30, 30)]] {
            let prompt = prompt(images, "What is this?");
            let prepared = prep.prepare(&prompt).unwrap();
            assert_eq!(prep.count(&prompt).unwrap(), prepared.text.ids.len());
            for (tiles, range) in prepared.images.iter().zip(&prepared.text.images) {
                assert_eq!(tiles.packing.tokens(), range.len());
                assert_eq!(tiles.pixels.len(), tiles.packing.tiles() * 3 * 56 * 56);
            }
        }
    }

    #[test]
    fn no_prompt_takes_less_than_the_least() {
        let folder = onevision_folder();
        let prep = LlavaOnevisionProcessor::open(folder.path()).unwrap();
        let [without, with] = prep.least().unwrap();
        assert_eq!(prep.count(&prompt(vec![], "")).unwrap(), without);
        for image in [png(1, 300), png(300, 1), png(56, 56), png(3, 3)] {
            assert!(prep.count(&prompt(vec![image], "")).unwrap() >= with);
        }
    }

    #[test]
    fn counting_does_not_decode() {
        let folder = onevision_folder();
        let prep = LlavaOnevisionProcessor::open(folder.path()).unwrap();
        let mut image = png(100, 61);
        image.bytes = image.bytes[..80].into();
        let prompt = prompt(vec![image], "What is this?");
        assert!(prep.count(&prompt).is_ok());
        let fault = prep.prepare(&prompt).unwrap_err();
        assert!(
            fault.0.starts_with("picture 100x61: is truncated"),
            "{fault}"
        );
    }

    #[test]
    fn a_prompt_that_fills_the_context_is_counted_but_not_prepared() {
        let folder = onevision_folder();
        let mut config = onevision_config();
        config["text_config"]["max_position_embeddings"] = json!(80);
        write(folder.path(), "config.json", &config);
        let prep = LlavaOnevisionProcessor::open(folder.path()).unwrap();
        let short = prep.count(&prompt(Vec::new(), "")).unwrap();
        let fill = |tokens: usize| prompt(Vec::new(), &"x".repeat(tokens - short));
        assert!(prep.ids(&fill(79)).is_ok());
        assert_eq!(prep.count(&fill(80)).unwrap(), 80);
        let fault = prep.ids(&fill(80)).unwrap_err();
        assert_eq!(
            fault.0,
            "the prompt takes 80 tokens, and the model's context is 80"
        );
    }

    #[test]
    fn resolutions_must_be_whole_tiles_and_the_same_in_both_files() {
        let folder = onevision_folder();
        let mut config = onevision_config();
        config["image_grid_pinpoints"] = json!([[56, 60]]);
        write(folder.path(), "config.json", &config);
        let diagnostic = LlavaOnevisionProcessor::open(folder.path())
            .unwrap_err()
            .to_string();
        assert!(diagnostic.contains("not whole tiles of 56"), "{diagnostic}");
        write(folder.path(), "config.json", &onevision_config());
        let settings = json!({"size": 56, "image_grid_pinpoints": [[56, 56]]});
        write(folder.path(), "preprocessor_config.json", &settings);
        let diagnostic = LlavaOnevisionProcessor::open(folder.path())
            .unwrap_err()
            .to_string();
        assert!(
            diagnostic.contains("differs from the image processor's"),
            "{diagnostic}"
        );
    }
}
