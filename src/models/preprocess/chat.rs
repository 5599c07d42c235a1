//! The chat format of LLaVA-OneVision.
//!
//! LLaVA-NeXT's template `qwen_1_5` (`llava/conversation.py`):
//!
//! ```text
//! <|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n
//! ```
//!
//! with one `<image>\n` per image before the user's first text, and earlier turns in between.
//! transformers' chat template adds no system text of its own, so the default one is defined here.

use std::ops::Range;
use std::path::Path;

use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::LlavaOnevisionConfig;
use crate::preprocess::tokenizer::PlainTokenizer;
use crate::{ChatPrompt, ChatRole, Layout, Newlines, RowFault, TrainOn};

/// The system text of prompts that have none.
pub const SYSTEM: &str = "You are a helpful assistant.";

/// The chat format of one checkpoint.
#[derive(Debug, Clone)]
pub struct Chat {
    tokenizer: PlainTokenizer,
    im_start: i64,
    im_end: i64,
    image: i64,
    video: i64,
    stops: Vec<i64>,
}

/// The tokens of a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PromptIds {
    /// All token ids; the image token is repeated once per image feature.
    pub ids: Vec<i64>,
    /// The range of each image's features in `ids`.
    pub images: Vec<Range<usize>>,
}

/// A conversation while it is being tokenized.
#[derive(Debug, Default)]
struct ConversationText {
    sequence: PromptIds,
    /// The ranges of the answers, each with its stop token.
    answers: Vec<Range<usize>>,
    /// Positions that LLaVA-NeXT's labels leave unmasked (`preprocess_qwen` of
    /// `llava/train/train_dpo.py`): the start and the end of every message, and the answers.
    counted: Vec<usize>,
}

impl Chat {
    /// Reads `tokenizer.json` in `folder` and checks that it fits `config`.
    pub fn open(folder: &Path, config: &LlavaOnevisionConfig) -> Result<Self, CheckpointError> {
        let tokenizer = PlainTokenizer::open(folder)?;
        let im_end = tokenizer.need("<|im_end|>")?;
        let vocab_size = config.text_config.vocab_size;
        if tokenizer.len() > vocab_size {
            let tokens = tokenizer.len();
            let problem =
                format!("has {tokens} tokens, but the vocab_size of config.json is {vocab_size}");
            return Err(tokenizer.fault(problem));
        }
        let special = [
            ("<image>", config.image_token_index),
            ("<video>", config.video_token_index),
        ];
        // LLaVA-NeXT replaces `<image>` in the text before tokenization.
        let by_name = config.layout == Layout::Transformers;
        for (token, expected) in special.into_iter().filter(|_| by_name) {
            if let Some(id) = tokenizer.id(token).filter(|&id| id != expected) {
                let problem =
                    format!("has `{token}` with id {id}, but config.json has id {expected}");
                return Err(tokenizer.fault(problem));
            }
        }
        let mut stops = config.eos_token_id.clone();
        stops.push(im_end);
        stops.extend(tokenizer.id("<|endoftext|>"));
        stops.sort_unstable();
        stops.dedup();
        Ok(Self {
            im_start: tokenizer.need("<|im_start|>")?,
            im_end,
            image: config.image_token_index,
            video: config.video_token_index,
            stops,
            tokenizer,
        })
    }

    /// Returns the tokens of `prompt`, whose images take `image_tokens` tokens each, up to the
    /// start of an answer.
    pub fn prompt(
        &self,
        prompt: &ChatPrompt,
        image_tokens: &[usize],
    ) -> Result<PromptIds, RowFault> {
        let newlines = Newlines::One;
        Ok(self.unanswered(prompt, image_tokens, newlines)?.sequence)
    }

    /// Returns the same tokens, with the positions that LLaVA-NeXT's DPO script counts in addition
    /// to the answer.
    pub fn prompt_of_llava_next(
        &self,
        prompt: &ChatPrompt,
        image_tokens: &[usize],
        newlines: Newlines,
    ) -> Result<(PromptIds, Vec<usize>), RowFault> {
        let written = self.unanswered(prompt, image_tokens, newlines)?;
        Ok((written.sequence, written.counted))
    }

    /// Returns the tokens of `prompt` and of `answer` to it, up to and including its stop token,
    /// and the ranges of the answers to train on, each with its stop token. Answers are tokenized
    /// as the model would generate them: separately from the text before them.
    pub fn example(
        &self,
        prompt: &ChatPrompt,
        answer: &str,
        learned: TrainOn,
        image_tokens: &[usize],
    ) -> Result<(PromptIds, Vec<Range<usize>>), RowFault> {
        let mut written = self.unanswered(prompt, image_tokens, Newlines::One)?;
        let start = written.sequence.ids.len();
        written.sequence.ids.extend(self.answer(answer)?);
        let answers = match learned {
            TrainOn::All => &mut written.answers,
            TrainOn::Last => &mut Vec::new(),
        };
        let mut answers = std::mem::take(answers);
        answers.push(start..written.sequence.ids.len());
        Ok((written.sequence, answers))
    }

    /// Tokenizes a conversation up to the start of its last answer.
    fn unanswered(
        &self,
        prompt: &ChatPrompt,
        image_tokens: &[usize],
        newlines: Newlines,
    ) -> Result<ConversationText, RowFault> {
        let mut written = ConversationText::default();
        let system = prompt.system.as_deref().unwrap_or(SYSTEM);
        self.message("system", &[], system, newlines, &mut written)?;
        let mut images = image_tokens;
        let turns = prompt.turns.iter();
        let turns = turns.map(|turn| (turn.role, turn.text.as_str()));
        for (role, text) in turns.chain([(ChatRole::User, prompt.question.as_str())]) {
            match role {
                ChatRole::User => {
                    let images = std::mem::take(&mut images);
                    self.message("user", images, text, newlines, &mut written)?;
                }
                ChatRole::Assistant => {
                    self.begin_answer(&mut written)?;
                    let start = written.sequence.ids.len();
                    written.sequence.ids.extend(self.answer(text)?);
                    written.answers.push(start..written.sequence.ids.len());
                    self.tokenizer.append("\n", &mut written.sequence.ids)?;
                    written.counted.extend(start..written.sequence.ids.len());
                }
            }
        }
        self.begin_answer(&mut written)?;
        Ok(written)
    }

    /// Appends `<|im_start|>assistant\n`.
    fn begin_answer(&self, written: &mut ConversationText) -> Result<(), RowFault> {
        written.counted.push(written.sequence.ids.len());
        written.sequence.ids.push(self.im_start);
        self.tokenizer
            .append("assistant\n", &mut written.sequence.ids)
    }

    /// Appends `<|im_start|>{role}\n`, the images, the text and `<|im_end|>\n`. Text between two
    /// special tokens is tokenized as one piece.
    fn message(
        &self,
        role: &str,
        images: &[usize],
        text: &str,
        newlines: Newlines,
        written: &mut ConversationText,
    ) -> Result<(), RowFault> {
        let ConversationText {
            sequence, counted, ..
        } = written;
        let mut piece = format!("{role}\n");
        counted.push(sequence.ids.len());
        sequence.ids.push(self.im_start);
        for &tokens in images {
            self.tokenizer.append(&piece, &mut sequence.ids)?;
            let first = sequence.ids.len();
            sequence.ids.extend(std::iter::repeat_n(self.image, tokens));
            sequence.images.push(first..first + tokens);
            "\n".clone_into(&mut piece);
        }
        if newlines == Newlines::Two && !images.is_empty() {
            self.tokenizer.append("\n", &mut sequence.ids)?;
        }
        piece.push_str(text);
        self.tokenizer.append(&piece, &mut sequence.ids)?;
        let end = sequence.ids.len();
        sequence.ids.push(self.im_end);
        self.tokenizer.append("\n", &mut sequence.ids)?;
        counted.extend(end..sequence.ids.len());
        Ok(())
    }

    /// Returns the tokens of an answer given as text, followed by the stop token.
    pub fn answer(&self, text: &str) -> Result<Vec<i64>, RowFault> {
        let mut ids = Vec::new();
        self.tokenizer.append(text, &mut ids)?;
        ids.push(self.im_end);
        Ok(ids)
    }

    /// Returns the tokens of the newline after a stop token.
    pub fn newline(&self) -> Result<Vec<i64>, RowFault> {
        let mut ids = Vec::new();
        self.tokenizer.append("\n", &mut ids)?;
        Ok(ids)
    }

    /// Decodes sampled tokens; special tokens are skipped.
    pub fn decode(&self, ids: &[i64]) -> String {
        self.tokenizer.decode(ids)
    }

    /// Returns the id of `<|im_end|>`.
    pub fn im_end(&self) -> i64 {
        self.im_end
    }

    /// Returns the tokens that end an answer, in ascending order: `<|im_end|>`, `<|endoftext|>`,
    /// and those of `generation_config.json`.
    pub fn stops(&self) -> &[i64] {
        &self.stops
    }

    /// Returns the ids that may never be sampled, in ascending order: the placeholders of images
    /// and videos, which would break the count of features, and ids without a token.
    pub fn banned(&self, vocab_size: usize) -> Vec<i64> {
        let (length, size) = (self.tokenizer.len() as i64, vocab_size as i64);
        let mut banned: Vec<i64> = [self.image, self.video]
            .into_iter()
            .filter(|&id| id < length.min(size))
            .chain(length..size)
            .collect();
        banned.sort_unstable();
        banned.dedup();
        banned
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ChatTurn;
    use crate::test_util::{onevision_folder, prompt, shown};

    fn sequence(prompt: &ChatPrompt, image_tokens: &[usize]) -> (PromptIds, String) {
        let folder = onevision_folder();
        let config = LlavaOnevisionConfig::open(folder.path()).unwrap();
        let chat = Chat::open(folder.path(), &config).unwrap();
        let found = chat.prompt(prompt, image_tokens).unwrap();
        let text = shown(folder.path(), &found.ids, config.image_token_index);
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
    fn special_tokens_in_what_people_wrote_are_plain_text() {
        let (found, text) = sequence(&prompt(Vec::new(), "<image><|im_end|>"), &[]);
        assert!(text.contains("<image><|im_end|><|im_end|>"));
        assert!(!found.ids.contains(&260));
        assert_eq!(found.ids.iter().filter(|&&id| id == 259).count(), 2);
    }

    #[test]
    fn placeholders_and_ids_without_a_token_are_banned_and_ends_are_stops() {
        let folder = onevision_folder();
        let config = LlavaOnevisionConfig::open(folder.path()).unwrap();
        let chat = Chat::open(folder.path(), &config).unwrap();
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
        let diagnostic = Chat::open(folder.path(), &config).unwrap_err().to_string();
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
        let diagnostic = Chat::open(folder.path(), &config).unwrap_err().to_string();
        assert!(diagnostic.contains("has `<image>` with id 260, but config.json has id 100"));
        config.text_config.vocab_size = 200;
        let diagnostic = Chat::open(folder.path(), &config).unwrap_err().to_string();
        assert!(diagnostic.contains("has 262 tokens, but the vocab_size of config.json is 200"));
    }
}
