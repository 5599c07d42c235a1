//! The complete preprocessing of a LLaVA-RLHF reward model, from its folders.

use std::ops::Range;

use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::LlavaRlhfConfig;
use crate::preprocess::clip::Clip;
use crate::preprocess::image::{PIXELS_MAX, decode, probe};
use crate::preprocess::image_processor::ImageProcessorConfig;
use crate::preprocess::processor::{fits, named};
use crate::preprocess::vicuna::{JudgeIds, Vicuna};
use crate::{AnswerGroup, ChatPrompt, LlavaRlhfSpec, RowFault, SftExample, Visual};

/// The processor of a LLaVA-RLHF reward model: configs, text format and image processor, without
/// weights.
#[derive(Debug, Clone)]
pub struct LlavaRlhfProcessor {
    pub config: LlavaRlhfConfig,
    pub vicuna: Vicuna,
    pub clip: Clip,
}

/// The network's input for a prompt and its answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Judged {
    /// The tokens for each answer, in their order.
    pub answers: Vec<JudgeIds>,
    /// The image, if there is one: `[3, side, side]`, normalized.
    pub pixels: Option<Vec<f32>>,
}

/// The network's input for an SFT example.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardSftTokens {
    pub text: JudgeIds,
    /// The image, if there is one: `[3, side, side]`, normalized.
    pub pixels: Option<Vec<f32>>,
    /// The ranges of the tokens to train on.
    pub answers: Vec<Range<usize>>,
}

impl LlavaRlhfProcessor {
    /// Reads the config files, the tokenizer and the reward prompt.
    pub fn open(spec: &LlavaRlhfSpec) -> Result<Self, CheckpointError> {
        let config = LlavaRlhfConfig::open(spec)?;
        let processor =
            ImageProcessorConfig::open_clip(&spec.vision, config.vision_config.image_size)?;
        Ok(Self {
            vicuna: Vicuna::open(&spec.base, config.text_config.vocab_size, &spec.prompt)?,
            clip: Clip::new(&processor),
            config,
        })
    }

    /// Returns the context length in tokens, for conversation, image and reward prompt together.
    pub fn context(&self) -> usize {
        self.config.text_config.max_position_embeddings
    }

    /// Returns the number of tokens for judging `answer`, including the image, even if it exceeds
    /// the context. Only the header of the image is read.
    pub fn count(&self, prompt: &ChatPrompt, answer: &str) -> Result<usize, RowFault> {
        Ok(self.sequence(prompt, answer)?.ids.len())
    }

    /// Returns the tokens for judging each answer; one that does not fit in the context is
    /// rejected, with its index. Only the header of the image is read.
    pub fn ids(&self, group: &AnswerGroup<'_>) -> Result<Vec<JudgeIds>, RowFault> {
        let context = self.context();
        let fitting = |(index, answer): (usize, &&str)| {
            let judged = self.sequence(group.prompt, answer)?;
            let tokens = judged.ids.len();
            if tokens > context {
                return Err(RowFault(format!(
                    "judging answer {index} takes {tokens} tokens, but the judge's context is {context}"
                )));
            }
            Ok(judged)
        };
        group.answers.iter().enumerate().map(fitting).collect()
    }

    /// Decodes an image to `[3, side, side]`, normalized.
    pub fn pixels(&self, image: &Visual) -> Result<Vec<f32>, RowFault> {
        let rgb = decode(&image.bytes, PIXELS_MAX).map_err(|fault| named(image, &fault))?;
        Ok(self.clip.pixels(rgb))
    }

    /// Prepares a group: the tokens of its answers and the pixels of its image.
    pub fn prepare(&self, group: &AnswerGroup<'_>) -> Result<Judged, RowFault> {
        let pixels = group.prompt.images.first().map(|image| self.pixels(image));
        Ok(Judged {
            answers: self.ids(group)?,
            pixels: pixels.transpose()?,
        })
    }

    /// Prepares an SFT example; one that does not fit in the context is rejected.
    pub fn example(&self, example: &SftExample<'_>) -> Result<RewardSftTokens, RowFault> {
        let (text, answers) = self.spoken(example)?;
        fits(text.ids.len(), self.context())?;
        let pixels = example.prompt.images.first();
        let pixels = pixels.map(|image| self.pixels(image));
        Ok(RewardSftTokens {
            text,
            pixels: pixels.transpose()?,
            answers,
        })
    }

    /// Returns the tokens of an SFT example, even if they exceed the context, and the ranges of the
    /// tokens to train on. Only the header of the image is read.
    pub fn spoken(
        &self,
        example: &SftExample<'_>,
    ) -> Result<(JudgeIds, Vec<Range<usize>>), RowFault> {
        let SftExample {
            prompt,
            answer,
            learned,
            ..
        } = *example;
        let image_tokens = self.image_tokens(prompt)?;
        self.vicuna.example(prompt, answer, learned, image_tokens)
    }

    /// Returns the tokens for judging `answer`, even if they exceed the context. Only the header of
    /// the image is read.
    pub fn sequence(&self, prompt: &ChatPrompt, answer: &str) -> Result<JudgeIds, RowFault> {
        let image_tokens = self.image_tokens(prompt)?;
        self.vicuna.judged(prompt, answer, image_tokens)
    }

    /// Returns the number of tokens of the prompt's image, if there is one.
    fn image_tokens(&self, prompt: &ChatPrompt) -> Result<Option<usize>, RowFault> {
        prompt.check_places()?;
        match prompt.images.as_slice() {
            [] => Ok(None),
            [video] if video.is_video() => Err(RowFault(
                "the prompt has a video, which LLaVA-RLHF cannot read".to_owned(),
            )),
            [image] => {
                probe(&image.bytes).map_err(|fault| named(image, &fault))?;
                Ok(Some(self.config.vision_config.patches()))
            }
            several => {
                let count = several.len();
                let problem =
                    format!("the prompt has {count} images, but LLaVA-RLHF supports only one");
                Err(RowFault(problem))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::{png, prompt, reward_folder};

    #[test]
    fn all_answers_of_a_prompt_are_judged_by_one_image() {
        let (_folder, spec) = reward_folder();
        let prep = LlavaRlhfProcessor::open(&spec).unwrap();
        let prompt = prompt(vec![png(100, 61)], "What?");
        let group = AnswerGroup::new(&prompt, vec!["A cat.", "A dog, I think."]);
        let judged = prep.prepare(&group).unwrap();
        assert_eq!(judged.pixels.unwrap().len(), 3 * 56 * 56);
        for (answer, judged) in group.answers.iter().zip(&judged.answers) {
            assert_eq!(judged.image.clone().unwrap().len(), 16);
            assert_eq!(prep.count(&prompt, answer).unwrap(), judged.ids.len());
        }
    }

    #[test]
    fn two_images_and_an_answer_beyond_the_context_are_faults() {
        let (_folder, spec) = reward_folder();
        let prep = LlavaRlhfProcessor::open(&spec).unwrap();
        let two = prompt(vec![png(9, 9), png(9, 9)], "What?");
        assert!(prep.count(&two, "A.").unwrap_err().0.contains("2 images"));
        let one = prompt(vec![png(9, 9)], "What?");
        let long = "x".repeat(512);
        let group = AnswerGroup::new(&one, vec!["short", &long]);
        let fault = prep.ids(&group).unwrap_err();
        assert!(fault.0.starts_with("judging answer 1 takes"), "{fault}");
    }
}
