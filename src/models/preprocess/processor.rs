//! The complete preprocessing of a vision-language model, from one checkpoint folder.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use crate::architecture::{Architecture, ImageProcessor};
use crate::architectures;
use crate::checkpoint::{CheckpointError, DecoderConfig};
use crate::preprocess::anyres::{Packing, Tiles};
use crate::preprocess::chat::{Chat, PromptIds};
use crate::preprocess::image::{PIXELS_MAX, Rgb, decode, probe};
use crate::{ChatPrompt, Newlines, RowFault, SftExample, Visual};

/// The processor of a checkpoint: everything that turns prompts into the network's input, without
/// weights.
#[derive(Debug, Clone)]
pub struct Processor {
    architecture: Arc<dyn Architecture>,
    chat: Chat,
    images: Arc<dyn ImageProcessor>,
}

/// The network's input for a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    pub text: PromptIds,
    /// The tower's input for the images, in the order of `text.images`.
    pub images: Vec<Tiles>,
}

/// The network's input for an SFT example.
#[derive(Debug, Clone, PartialEq)]
pub struct SftTokens {
    pub prepared: Prepared,
    /// The ranges of the tokens to train on.
    pub answers: Vec<Range<usize>>,
}

/// Rejects a conversation that is longer than the context.
pub(super) fn fits(tokens: usize, context: usize) -> Result<(), RowFault> {
    if tokens <= context {
        return Ok(());
    }
    let problem =
        format!("the conversation takes {tokens} tokens, but the model's context is {context}");
    Err(RowFault(problem))
}

/// The tokens of a prompt, and the number of tiles of its images.
#[derive(Debug)]
pub struct Written {
    pub text: PromptIds,
    /// Positions of the tokens that LLaVA-NeXT's DPO script counts.
    pub counted: Vec<usize>,
    /// Number of tiles of its images.
    pub tiles: usize,
}

impl Processor {
    /// Reads the config files and the tokenizer in `folder`, and checks that they agree.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let architecture = architectures::open(folder)?;
        Ok(Self {
            images: architecture.images(folder)?,
            chat: architecture.chat(folder)?,
            architecture,
        })
    }

    pub fn architecture(&self) -> &dyn Architecture {
        &*self.architecture
    }

    pub fn chat(&self) -> &Chat {
        &self.chat
    }

    pub fn text_config(&self) -> &DecoderConfig {
        self.architecture.text_config()
    }

    /// Returns the context length in tokens, for prompt, images and answer together.
    pub fn context(&self) -> usize {
        self.text_config().max_position_embeddings
    }

    /// Returns the number of tokens of `prompt`, including its images, even if it exceeds the
    /// context. Only the headers of the images are read.
    pub fn count(&self, prompt: &ChatPrompt) -> Result<usize, RowFault> {
        Ok(self.sequence(prompt)?.ids.len())
    }

    /// Returns the minimum number of tokens of a prompt without an image, and of one with an image:
    /// no text, and of the image only the base tile.
    pub fn least(&self) -> Result<[usize; 2], RowFault> {
        let prompt = ChatPrompt {
            places: Vec::new(),
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
        Ok([
            tokens(&[])?,
            tokens(&[self.architecture.image_tokens_min()])?,
        ])
    }

    /// Returns the tokens of `prompt`; a prompt that leaves no room for an answer is rejected. Only
    /// the headers of the images are read.
    pub fn ids(&self, prompt: &ChatPrompt) -> Result<PromptIds, RowFault> {
        let sequence = self.sequence(prompt)?;
        let (tokens, context) = (sequence.ids.len(), self.context());
        if tokens >= context {
            let problem =
                format!("the prompt takes {tokens} tokens, but the model's context is {context}");
            return Err(RowFault(problem));
        }
        Ok(sequence)
    }

    /// Returns the layout of each image and video of `prompt`. That of an image depends on the
    /// number of images, that of a video only on its frames.
    pub fn packings(&self, prompt: &ChatPrompt) -> Result<Vec<Packing>, RowFault> {
        let size = |image: &Visual| {
            let size = probe(&image.bytes).map_err(|fault| named(image, &fault))?;
            Ok([size.height, size.width])
        };
        let images = prompt.images.iter().filter(|image| !image.is_video());
        let sizes: Vec<[usize; 2]> = images.map(size).collect::<Result<_, RowFault>>()?;
        let mut packings = self.architecture.packings(&sizes).into_iter();
        let packing = |image: &Visual| match image.frames.len() {
            0 => Ok(packings.next().expect("a packing for each image")),
            frames => self.architecture.video_packing(frames),
        };
        prompt.images.iter().map(packing).collect()
    }

    /// Decodes an image of a prompt that has `images` of them, or the frames of a video, and
    /// converts it to the tower's input.
    pub fn tiles(&self, image: &Visual, images: usize) -> Result<Tiles, RowFault> {
        let rgb =
            |image: &Visual| decode(&image.bytes, PIXELS_MAX).map_err(|fault| named(image, &fault));
        let tiles = if image.is_video() {
            let frames: Vec<Rgb> = image.frames.par_iter().map(rgb).collect::<Result<_, _>>()?;
            self.images.frames(&frames)
        } else {
            self.images.tiles(rgb(image)?, images)
        };
        tiles.map_err(|fault| named(image, &fault))
    }

    /// Prepares a prompt: its tokens and the pixels of its images.
    pub fn prepare(&self, prompt: &ChatPrompt) -> Result<Prepared, RowFault> {
        let text = self.ids(prompt)?;
        let images = self.all_tiles(prompt)?;
        Ok(Prepared { text, images })
    }

    fn all_tiles(&self, prompt: &ChatPrompt) -> Result<Vec<Tiles>, RowFault> {
        let count = prompt.image_count();
        let images = prompt.images.iter();
        images.map(|image| self.tiles(image, count)).collect()
    }

    /// Prepares a prompt as LLaVA-NeXT's DPO script writes it, with the positions of the tokens
    /// that the script counts.
    pub fn prepare_as_llava_next(
        &self,
        prompt: &ChatPrompt,
        newlines: Newlines,
    ) -> Result<(Prepared, Vec<usize>), RowFault> {
        let Written { text, counted, .. } = self.written_as_llava_next(prompt, newlines)?;
        let images = self.all_tiles(prompt)?;
        Ok((Prepared { text, images }, counted))
    }

    /// Returns the same without pixels: only the headers of the images are read.
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

    /// Prepares an SFT example; one that does not fit in the context is rejected.
    pub fn example(&self, example: &SftExample<'_>) -> Result<SftTokens, RowFault> {
        let (text, answers) = self.spoken(example)?;
        fits(text.ids.len(), self.context())?;
        let images = self.all_tiles(example.prompt)?;
        Ok(SftTokens {
            prepared: Prepared { text, images },
            answers,
        })
    }

    /// Returns the tokens of an SFT example, even if they exceed the context, and the ranges of the
    /// tokens to train on. Only the headers of the images are read.
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

    /// Returns the tokens of `prompt`, even if they exceed the context.
    fn sequence(&self, prompt: &ChatPrompt) -> Result<PromptIds, RowFault> {
        let tokens: Vec<usize> = self.packings(prompt)?.iter().map(Packing::tokens).collect();
        self.chat.prompt(prompt, &tokens)
    }
}

/// Adds the image's id to a fault of an image.
pub(super) fn named(image: &Visual, fault: &RowFault) -> RowFault {
    RowFault(format!("image {}: {fault}", image.id))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::test_util::{onevision_config, onevision_folder, png, prompt, write};

    #[test]
    fn counting_by_the_header_equals_preparing() {
        let folder = onevision_folder();
        let prep = Processor::open(folder.path()).unwrap();
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
        let prep = Processor::open(folder.path()).unwrap();
        let [without, with] = prep.least().unwrap();
        assert_eq!(prep.count(&prompt(vec![], "")).unwrap(), without);
        for image in [png(1, 300), png(300, 1), png(56, 56), png(3, 3)] {
            assert!(prep.count(&prompt(vec![image], "")).unwrap() >= with);
        }
    }

    #[test]
    fn counting_does_not_decode() {
        let folder = onevision_folder();
        let prep = Processor::open(folder.path()).unwrap();
        let mut image = png(100, 61);
        image.bytes = image.bytes[..80].into();
        let prompt = prompt(vec![image], "What is this?");
        assert!(prep.count(&prompt).is_ok());
        let fault = prep.prepare(&prompt).unwrap_err();
        assert!(fault.0.starts_with("image 100x61: truncated"), "{fault}");
    }

    #[test]
    fn a_prompt_that_fills_the_context_is_counted_but_not_prepared() {
        let folder = onevision_folder();
        let mut config = onevision_config();
        config["text_config"]["max_position_embeddings"] = json!(80);
        write(folder.path(), "config.json", &config);
        let prep = Processor::open(folder.path()).unwrap();
        let short = prep.count(&prompt(Vec::new(), "")).unwrap();
        let fill = |tokens: usize| prompt(Vec::new(), &"x".repeat(tokens - short));
        assert!(prep.ids(&fill(79)).is_ok());
        assert_eq!(prep.count(&fill(80)).unwrap(), 80);
        let fault = prep.ids(&fill(80)).unwrap_err();
        assert_eq!(
            fault.0,
            "the prompt takes 80 tokens, but the model's context is 80"
        );
    }

    #[test]
    fn resolutions_must_be_whole_tiles_and_the_same_in_both_files() {
        let folder = onevision_folder();
        let mut config = onevision_config();
        config["image_grid_pinpoints"] = json!([[56, 60]]);
        write(folder.path(), "config.json", &config);
        let diagnostic = Processor::open(folder.path()).unwrap_err().to_string();
        assert!(
            diagnostic.contains("not a multiple of the tile size 56"),
            "{diagnostic}"
        );
        write(folder.path(), "config.json", &onevision_config());
        let settings = json!({"size": 56, "image_grid_pinpoints": [[56, 56]]});
        write(folder.path(), "preprocessor_config.json", &settings);
        let diagnostic = Processor::open(folder.path()).unwrap_err().to_string();
        assert!(
            diagnostic.contains("differs from the image processor's"),
            "{diagnostic}"
        );
    }
}
