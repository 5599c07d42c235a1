//! The text format of LLaVA-RLHF's reward model: a conversation, followed by the reward prompt.
//!
//! LLaVA's conversation template `v1` (`RLHF/data_utils/common_utils.py`, `preprocess_v1`):
//!
//! ```text
//! {system} USER: <image>\n{question} ASSISTANT: {answer}</s>USER: … ASSISTANT: {answer}</s> {reward prompt}
//! ```
//!
//! The score is read at the last token of the reward prompt, so nothing follows it. The text is cut
//! at `<image>` and each piece tokenized separately; `</s>` is a token of its own and the pieces
//! around it are tokenized separately, as the reference's tokenizer does. The image stands at the
//! start of its turn, wherever the turn's text has it, as LLaVA moves it there. `<image>` in the turn
//! that carries the image is removed, as LLaVA does; anywhere else `<image>` and `</s>` in text
//! from users or models are plain characters, where LLaVA would see a second image or an end.

use std::ops::Range;
use std::path::Path;

use crate::checkpoint::CheckpointError;
use crate::preprocess::tokenizer::PlainTokenizer;
use crate::{ChatPrompt, ChatRole, RowFault, TrainOn};
use ovchat_io::files;

/// LLaVA's placeholder for an image feature; no token has this id.
pub const IMAGE_TOKEN_INDEX: i64 = -200;

/// The system sentence of LLaVA's `conv_vicuna_v1`. The model was trained with no other, so a
/// prompt's own system text is not used.
const SYSTEM: &str = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.";

/// The text before the captions.
const CAPTIONS: &str = "Specifically, the AI's response should be fully supported by the combination of the following captions:\n";

/// The placeholder for captions in the reward prompt.
const PLACEHOLDER: &str = "{factual_prompt}";

/// The conversation format of one reward model.
#[derive(Debug, Clone)]
pub struct Vicuna {
    tokenizer: PlainTokenizer,
    begin: i64,
    end: i64,
    /// The reward prompt from the file, stripped.
    reward_prompt: String,
}

/// The tokens for judging one answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JudgeIds {
    /// All token ids; [`IMAGE_TOKEN_INDEX`] is repeated once per image feature.
    pub ids: Vec<i64>,
    /// The range of the image's features, if there is an image.
    pub image: Option<Range<usize>>,
}

/// A piece of a conversation that ends with an answer.
struct Spoken {
    /// Its tokens, including the `</s>` after the answer.
    piece: Range<usize>,
    /// Its text before the answer.
    before: String,
}

impl Vicuna {
    /// Reads `tokenizer.json` in the folder `base`, for an embedding of `vocab_size` rows, and the
    /// reward prompt.
    pub fn open(base: &Path, vocab_size: usize, prompt: &Path) -> Result<Self, CheckpointError> {
        let tokenizer = PlainTokenizer::open(base)?;
        let ids = [tokenizer.need("<s>")?, tokenizer.need("</s>")?];
        if tokenizer.len() > vocab_size {
            let tokens = tokenizer.len();
            let problem =
                format!("has {tokens} tokens, but the vocab_size of config.json is {vocab_size}");
            return Err(tokenizer.fault(problem));
        }
        let text =
            files::read_to_string(prompt).map_err(|error| CheckpointError::io(prompt, &error))?;
        let reward_prompt = text.trim().to_owned();
        if reward_prompt.is_empty() {
            return Err(CheckpointError::new(
                prompt,
                "the file is empty; it must contain the prompt that asks for the score",
            ));
        }
        Ok(Self {
            tokenizer,
            begin: ids[0],
            end: ids[1],
            reward_prompt,
        })
    }

    /// Returns the tokens for judging `answer` to `prompt`; the image, if there is one, takes
    /// `image_tokens` tokens.
    pub fn judged(
        &self,
        prompt: &ChatPrompt,
        answer: &str,
        image_tokens: Option<usize>,
    ) -> Result<JudgeIds, RowFault> {
        let (mut text, _) = self.conversation(prompt, answer, image_tokens)?;
        let request = format!(" {}", self.request(prompt.captions.as_deref()));
        self.tokenizer.append(&request, &mut text.ids)?;
        Ok(text)
    }

    /// Returns the tokens of the conversation that ends with `answer`, and the ranges of the
    /// answers to train on, each with the `</s>` after it.
    pub fn example(
        &self,
        prompt: &ChatPrompt,
        answer: &str,
        learned: TrainOn,
        image_tokens: Option<usize>,
    ) -> Result<(JudgeIds, Vec<Range<usize>>), RowFault> {
        let (text, spoken) = self.conversation(prompt, answer, image_tokens)?;
        let skipped = match learned {
            TrainOn::All => 0,
            TrainOn::Last => spoken.len() - 1,
        };
        let mut answers = Vec::new();
        for Spoken { piece, before } in &spoken[skipped..] {
            // An answer is tokenized in one piece with the text before it; it starts where the
            // tokens of the piece differ from those of the text before it.
            let mut ids = Vec::new();
            self.tokenizer.append(before, &mut ids)?;
            let same = ids.iter().zip(&text.ids[piece.clone()]);
            let common = same.take_while(|(one, other)| one == other).count();
            answers.push(piece.start + common..piece.end);
        }
        Ok((text, answers))
    }

    /// Returns the conversation that ends with `answer`, and its pieces that end with an answer.
    fn conversation(
        &self,
        prompt: &ChatPrompt,
        answer: &str,
        image_tokens: Option<usize>,
    ) -> Result<(JudgeIds, Vec<Spoken>), RowFault> {
        let mut ids = vec![self.begin];
        let mut spoken = Vec::new();
        let mut image = None;
        let mut pending = image_tokens;
        let of_image = prompt.places.first().map(|place| place.turn);
        let mut piece = format!("{SYSTEM} ");
        let turns = prompt
            .turns
            .iter()
            .map(|turn| (turn.role, turn.text.as_str()));
        let question = (ChatRole::User, prompt.question.as_str());
        let said = turns.chain([question, (ChatRole::Assistant, answer)]);
        for (turn, (role, text)) in said.enumerate() {
            let is_here = role == ChatRole::User && of_image.is_none_or(|place| place == turn);
            match (role, pending.take_if(|_| is_here)) {
                (ChatRole::User, Some(tokens)) => {
                    piece.push_str("USER: ");
                    self.tokenizer.append(&piece, &mut ids)?;
                    let first = ids.len();
                    ids.extend(std::iter::repeat_n(IMAGE_TOKEN_INDEX, tokens));
                    image = Some(first..first + tokens);
                    let text = text.replace("<image>", "");
                    piece = format!("\n{} ", text.trim());
                }
                (ChatRole::User, None) => {
                    piece.push_str("USER: ");
                    piece.push_str(text);
                    piece.push(' ');
                }
                (ChatRole::Assistant, _) => {
                    piece.push_str("ASSISTANT:");
                    let before = piece.clone();
                    piece.push(' ');
                    piece.push_str(text);
                    let first = ids.len();
                    self.tokenizer.append(&piece, &mut ids)?;
                    ids.push(self.end);
                    let piece_ids = first..ids.len();
                    spoken.push(Spoken {
                        piece: piece_ids,
                        before,
                    });
                    piece.clear();
                }
            }
        }
        Ok((JudgeIds { ids, image }, spoken))
    }

    /// Returns the reward prompt with the captions, in their order, in place of the placeholder;
    /// without captions the placeholder is removed and the space before it stays.
    fn request(&self, captions: Option<&[String]>) -> String {
        let mut facts = String::new();
        for (index, caption) in captions.unwrap_or_default().iter().enumerate() {
            if index == 0 {
                facts.push_str(CAPTIONS);
            }
            facts.push_str("  - ");
            facts.push_str(caption);
            facts.push('\n');
        }
        let request = self.reward_prompt.replace(PLACEHOLDER, &facts);
        request.trim().to_owned()
    }

    /// True if the reward prompt has a placeholder for captions, so that a caller can warn if there
    /// are none.
    pub fn wants_captions(&self) -> bool {
        self.reward_prompt.contains(PLACEHOLDER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ChatTurn;
    use crate::test_util::{png, prompt, reward_folder, shown};

    fn judged(prompt: &ChatPrompt, answer: &str, image: Option<usize>) -> (JudgeIds, String) {
        let (_folder, spec) = reward_folder();
        let vicuna = Vicuna::open(&spec.base, 128, &spec.prompt).unwrap();
        let found = vicuna.judged(prompt, answer, image).unwrap();
        let text = shown(&spec.base, &found.ids, IMAGE_TOKEN_INDEX);
        (found, text.replace('▁', "_"))
    }

    /// Every piece begins with a `_` of its own, as in the reference's tokenizer.
    #[test]
    fn the_conversation_is_cut_into_the_pieces_of_the_reference() {
        let (found, text) = judged(
            &prompt(Vec::new(), " What <image> is it?\n"),
            "A cat.",
            Some(16),
        );
        let system = SYSTEM.replace(' ', "_");
        assert_eq!(
            text,
            format!(
                "<s>_{system}_USER:_[16]_\nWhat__is_it?_ASSISTANT:_A_cat.</s>\
                 __USER:_Judge._\nASSISTANT:_The_score_is"
            )
        );
        let image = found.image.unwrap();
        assert!(found.ids[image].iter().all(|&id| id == IMAGE_TOKEN_INDEX));
    }

    #[test]
    fn captions_take_the_place_of_the_placeholder_in_their_order() {
        let mut prompt = prompt(Vec::new(), "What?");
        prompt.captions = Some(vec!["b cat".to_owned(), "a mat".to_owned()]);
        let (_, text) = judged(&prompt, "A.", Some(1));
        let end = "captions:\n__-_b_cat\n__-_a_mat\n\nASSISTANT:_The_score_is";
        assert!(text.ends_with(end), "{text}");
    }

    #[test]
    fn only_the_turn_with_the_image_is_stripped() {
        let turn = |role, text: &str| ChatTurn {
            role,
            text: text.to_owned(),
        };
        let mut prompt = prompt(Vec::new(), " Next ");
        prompt.turns = vec![
            turn(ChatRole::User, " One "),
            turn(ChatRole::Assistant, "Two"),
        ];
        let (_, text) = judged(&prompt, "Three", Some(2));
        let middle = "USER:_[2]_\nOne_ASSISTANT:_Two</s>_USER:__Next__ASSISTANT:_Three</s>";
        assert!(text.contains(middle), "{text}");
    }

    #[test]
    fn the_image_stands_at_the_start_of_its_turn() {
        let turn = |role, text: &str| ChatTurn {
            role,
            text: text.to_owned(),
        };
        let mut prompt = prompt(vec![png(8, 8)], "And <image> this?");
        prompt.turns = vec![
            turn(ChatRole::User, "Hello"),
            turn(ChatRole::Assistant, "Hi"),
        ];
        let (_, text) = judged(&prompt.with_places(), "Yes", Some(2));
        let middle = "USER:_Hello_ASSISTANT:_Hi</s>_USER:_[2]_\nAnd__this?_ASSISTANT:_Yes</s>";
        assert!(text.contains(middle), "{text}");
    }

    #[test]
    fn an_end_or_a_image_in_an_answer_is_plain_text() {
        let (found, text) = judged(&prompt(Vec::new(), "Q"), "x</s><image>y", Some(1));
        assert!(text.contains("x</s><image>y</s>"), "{text}");
        assert_eq!(found.ids.iter().filter(|&&id| id == 2).count(), 1);
    }

    #[test]
    fn without_a_image_there_is_no_placeholder() {
        let (found, text) = judged(&prompt(Vec::new(), "Q"), "A", None);
        assert_eq!(found.image, None);
        assert!(text.contains("USER:_Q_ASSISTANT:_A</s>"), "{text}");
    }

    #[test]
    fn an_empty_reward_prompt_is_refused() {
        let (_folder, spec) = reward_folder();
        std::fs::write(&spec.prompt, " \n").unwrap();
        let diagnostic = Vicuna::open(&spec.base, 128, &spec.prompt).unwrap_err();
        assert_eq!(diagnostic.path, spec.prompt);
    }
}
