//! Tokenization of conversations by a chat template.
//!
//! A template ([`ChatTemplate`]) splits a conversation into pieces: special tokens, texts, images
//! and answers. An image may stand anywhere in a user's text, which is cut there. Each piece is
//! tokenized on its own, as the reference splits a string at its special tokens before anything else
//! happens.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::checkpoint::{CheckpointError, DecoderConfig};
use crate::preprocess::tokenizer::PlainTokenizer;
use crate::{ChatPrompt, ChatRole, Newlines, RowFault, TrainOn};

/// A conversation up to the start of its last answer.
#[derive(Debug, Clone)]
pub struct Conversation<'a> {
    pub system: Option<&'a str>,
    /// The messages, the last of which is the question.
    pub messages: Vec<Message<'a>>,
}

/// A message of a conversation.
#[derive(Debug, Clone)]
pub struct Message<'a> {
    pub role: ChatRole,
    pub text: &'a str,
    /// The number of images before the text, one line each.
    in_front: usize,
    /// Newlines between these images and the text.
    newlines: Newlines,
    /// The bytes of the text that images stand before, in ascending order.
    places: Vec<usize>,
}

impl<'a> Conversation<'a> {
    /// Returns the conversation of `prompt`. A prompt that has not one place for each image is
    /// rejected.
    fn of(prompt: &'a ChatPrompt, images: usize, newlines: Newlines) -> Result<Self, RowFault> {
        prompt.check_places()?;
        let turns = prompt.turns.iter();
        let turns = turns.map(|turn| (turn.role, turn.text.as_str()));
        let question = (ChatRole::User, prompt.question.as_str());
        let mut in_front = if prompt.places.is_empty() { images } else { 0 };
        let message = |(turn, (role, text))| Message {
            role,
            text,
            in_front: match role {
                ChatRole::User => std::mem::take(&mut in_front),
                ChatRole::Assistant => 0,
            },
            newlines,
            places: prompt.places_in(turn).collect(),
        };
        Ok(Self {
            system: prompt.system.as_deref(),
            messages: turns.chain([question]).enumerate().map(message).collect(),
        })
    }
}

impl Message<'_> {
    /// Adds the images and the text of the message behind the text `before`. Returns the text
    /// behind the last image, which is tokenized in one piece with what follows it. `piece` turns a
    /// text before an image into a piece.
    pub fn append<'p>(
        &self,
        before: String,
        pieces: &mut Vec<Piece<'p>>,
        mut piece: impl FnMut(String) -> Piece<'p>,
    ) -> String {
        let mut text = before;
        let mut image = |text: &mut String, pieces: &mut Vec<Piece<'p>>| {
            if !text.is_empty() {
                pieces.push(piece(std::mem::take(text)));
            }
            pieces.push(Piece::Image);
        };
        for _ in 0..self.in_front {
            image(&mut text, pieces);
            text.push('\n');
        }
        if self.newlines == Newlines::Two && self.in_front > 0 {
            pieces.push(Piece::Text("\n".into()));
        }
        let mut from = 0;
        for &at in &self.places {
            text.push_str(&self.text[from..at]);
            image(&mut text, pieces);
            from = at;
        }
        text.push_str(&self.text[from..]);
        text
    }
}

/// A piece of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A special token.
    Token(i64),
    /// Text that is tokenized in one go.
    Text(Cow<'a, str>),
    /// The next image.
    Image,
    /// An answer of the model, with the token that ends it.
    Answer(&'a str),
    /// Text with earlier answers of the model, without tokens that end them, at these ranges of
    /// bytes.
    Turns(String, Vec<Range<usize>>),
    /// A piece whose tokens LLaVA-NeXT's DPO script counts, too.
    Counted(Box<Piece<'a>>),
}

/// The text format of conversations.
pub trait ChatTemplate: fmt::Debug + Send + Sync {
    /// Splits a conversation into pieces, up to the start of the answer to its question.
    fn pieces<'a>(&self, conversation: &Conversation<'a>) -> Vec<Piece<'a>>;

    /// Returns the text between the start of an answer and its first word, as the model generates
    /// it.
    fn before_answer(&self) -> &'static str {
        ""
    }
}

/// The chat format of one checkpoint.
#[derive(Debug, Clone)]
pub struct Chat {
    tokenizer: PlainTokenizer,
    template: Arc<dyn ChatTemplate>,
    tokens: ChatTokens,
}

/// The special tokens of a chat format.
#[derive(Debug, Clone)]
pub struct ChatTokens {
    /// The token that ends an answer.
    pub end: i64,
    /// The token that stands for a feature of an image.
    pub image: i64,
    /// Other placeholders, which are never sampled either.
    pub placeholders: Vec<i64>,
    /// Tokens that end an answer.
    pub stops: Vec<i64>,
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
struct ConversationIds {
    sequence: PromptIds,
    /// The ranges of the answers, each with its stop token.
    answers: Vec<Range<usize>>,
    /// Positions that LLaVA-NeXT's labels leave unmasked (`preprocess_qwen` of
    /// `llava/train/train_dpo.py`): the start and the end of every message, and the answers.
    counted: Vec<usize>,
    /// True once a piece of text has been tokenized.
    has_text: bool,
}

impl Chat {
    pub fn new(
        tokenizer: PlainTokenizer,
        template: Arc<dyn ChatTemplate>,
        mut tokens: ChatTokens,
    ) -> Self {
        tokens.stops.push(tokens.end);
        tokens.stops.sort_unstable();
        tokens.stops.dedup();
        Self {
            tokenizer,
            template,
            tokens,
        }
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
    ) -> Result<ConversationIds, RowFault> {
        let conversation = Conversation::of(prompt, image_tokens.len(), newlines)?;
        let mut written = ConversationIds::default();
        let mut images = image_tokens.iter();
        for piece in self.template.pieces(&conversation) {
            self.append(piece, &mut images, &mut written)?;
        }
        assert!(images.next().is_none(), "a template has every image once");
        Ok(written)
    }

    fn append(
        &self,
        piece: Piece<'_>,
        images: &mut std::slice::Iter<'_, usize>,
        written: &mut ConversationIds,
    ) -> Result<(), RowFault> {
        let PromptIds {
            ids,
            images: places,
        } = &mut written.sequence;
        let start = ids.len();
        match piece {
            Piece::Token(id) => ids.push(id),
            Piece::Text(text) => {
                let turns = Piece::Turns(text.into_owned(), Vec::new());
                self.append(turns, images, written)?;
            }
            Piece::Image => {
                let tokens = *images.next().expect("a template has every image once");
                ids.extend(std::iter::repeat_n(self.tokens.image, tokens));
                places.push(start..ids.len());
            }
            Piece::Answer(text) => {
                ids.extend(self.answer(text)?);
                written.answers.push(start..ids.len());
            }
            Piece::Turns(text, answers) => {
                // Of a text that is cut at special tokens, only the first piece is its start.
                let append = if written.has_text {
                    PlainTokenizer::append_inner
                } else {
                    PlainTokenizer::append
                };
                append(&self.tokenizer, &text, ids)?;
                written.has_text |= !text.is_empty();
                for answer in answers {
                    // A token belongs to the text in which it ends.
                    let places = [answer.start, answer.end].map(|end| -> Result<usize, RowFault> {
                        let mut before = Vec::new();
                        append(&self.tokenizer, &text[..end], &mut before)?;
                        let same = before.iter().zip(&ids[start..]);
                        Ok(start + same.take_while(|(one, other)| one == other).count())
                    });
                    let [from, to] = places;
                    written.answers.push(from?..to?);
                }
            }
            Piece::Counted(piece) => {
                self.append(*piece, images, written)?;
                written.counted.extend(start..written.sequence.ids.len());
            }
        }
        Ok(())
    }

    /// Returns the tokens of an answer given as text, followed by the stop token.
    pub fn answer(&self, text: &str) -> Result<Vec<i64>, RowFault> {
        let mut ids = Vec::new();
        if !text.is_empty() {
            let text = [self.template.before_answer(), text].concat();
            self.tokenizer.append_inner(&text, &mut ids)?;
        }
        ids.push(self.tokens.end);
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

    /// Returns the token that ends an answer.
    pub fn end(&self) -> i64 {
        self.tokens.end
    }

    /// Returns the token that stands for a feature of an image.
    pub fn image_token(&self) -> i64 {
        self.tokens.image
    }

    /// Returns the tokens that end an answer, in ascending order.
    pub fn stops(&self) -> &[i64] {
        &self.tokens.stops
    }

    /// Returns the ids that may never be sampled, in ascending order: the placeholders of images
    /// and videos, which would break the count of features, and ids without a token.
    pub fn banned(&self, vocab_size: usize) -> Vec<i64> {
        let (length, size) = (self.tokenizer.len() as i64, vocab_size as i64);
        let placeholders = self.tokens.placeholders.iter().copied();
        let mut banned: Vec<i64> = std::iter::once(self.tokens.image)
            .chain(placeholders)
            .filter(|&id| id < length.min(size))
            .chain(length..size)
            .collect();
        banned.sort_unstable();
        banned.dedup();
        banned
    }
}

/// Checks that a tokenizer has no more tokens than the decoder's embedding has rows.
pub fn fits_vocabulary(
    tokenizer: &PlainTokenizer,
    text_config: &DecoderConfig,
) -> Result<(), CheckpointError> {
    let (tokens, vocab_size) = (tokenizer.len(), text_config.vocab_size);
    if tokens <= vocab_size {
        return Ok(());
    }
    let problem = format!("has {tokens} tokens, but the vocab_size of config.json is {vocab_size}");
    Err(tokenizer.fault(problem))
}
