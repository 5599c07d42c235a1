//! Preprocessing of images and text for the networks, without tensors.
//!
//! An image is decoded ([`image`]), resized and cut into tiles ([`anyres`] for LLaVA-OneVision,
//! [`clip`] for towers of CLIP); the text around it becomes token ids ([`tokenizer`], [`chat`],
//! [`vicuna`]). [`Processor`] and [`LlavaRlhfProcessor`] do all of this for one checkpoint, so
//! `check` and `plan` count tokens with the same code that feeds the networks.

pub(crate) mod anyres;
pub(crate) mod chat;
pub(crate) mod chat_template;
pub(crate) mod clip;
pub(crate) mod image;
pub(crate) mod image_processor;
mod llava_rlhf;
mod look;
pub(crate) mod processor;
pub(crate) mod resize;
pub(crate) mod sentencepiece;
pub(crate) mod tokenizer;
pub(crate) mod vicuna;

pub use self::image::{PIXELS_MAX, Probe, Rgb, decode, probe};
pub use anyres::{Anyres, AnyresLayout, AnyresPacking, FramesPacking, Grid, Packing, Tiles};
pub use chat::{Chat, ChatTemplate, ChatTokens, Conversation, Piece, PromptIds};
pub use chat_template::{OtherText, other_text};
pub use clip::Clip;
pub use image_processor::ImageProcessorConfig;
pub use llava_rlhf::{Judged, LlavaRlhfProcessor, RewardSftTokens};
pub use processor::{Prepared, Processor, SftTokens, Written};
pub use resize::Bicubic;
pub use tokenizer::PlainTokenizer;
pub use vicuna::{IMAGE_TOKEN_INDEX, JudgeIds, Vicuna};
