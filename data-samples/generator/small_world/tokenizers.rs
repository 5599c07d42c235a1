//! The two tokenizers, trained on text of the small world.
//!
//! Each starts as the `tokenizer.json` of its family with an empty vocabulary, which training
//! fills; everything around the vocabulary is the family's own.

use std::collections::HashSet;
use std::iter;

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use super::files::Outcome;
use super::questions::{self, Topic};
use super::random::Random;
use super::scene::Scene;

/// The special tokens of LLaVA-OneVision's tokenizer in the order of their ids, which follow the
/// vocabulary.
pub const QWEN2_SPECIAL: [&str; 5] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<video>",
];

/// The size of the policy's vocabulary without special tokens: 256 bytes and the merges.
const QWEN2_VOCABULARY: usize = 507;

/// The size of the judge's vocabulary: 3 special tokens, 256 bytes, ASCII and the merges.
const LLAMA_VOCABULARY: usize = 640;

/// The text around questions that both models read, and plain English for everything else.
const PLAIN_ENGLISH: &str = "\
system
user
assistant
You are a helpful assistant.
A chat between a curious user and an artificial intelligence assistant. The assistant gives \
helpful, detailed, and polite answers to the user's questions.
USER: ASSISTANT:
Specifically, the AI's response should be fully supported by the combination of the following \
captions:
I can see a small picture with a few shapes in it. I do not know what it is.
Is there a red circle in this image? Yes, there is. No, there is not.
Is that true? Yes. Is that true? No. Is that true? Yes. Is that true? No.
Which of these is larger, and which one is closer to the left? It was on the right before.
Please look at the picture again and tell me what you would like to know about it.
The first answer was good, but the second was better because it was true and short.
They have been here for a long time, and we will see them when we get there.
";

/// The training text of the tokenizers: questions and answers about scenes outside both splits, and
/// plain English, one per line.
pub fn corpus(seed: u64) -> Vec<String> {
    let mut lines: Vec<String> = PLAIN_ENGLISH.lines().map(str::to_owned).collect();
    for number in 0..1000 {
        let mut random = Random::named(seed, &format!("corpus/{number}"));
        let scene = Scene::draw(&mut random);
        lines.extend(questions::places(&scene).into_iter().flatten());
        for topic in Topic::ALL {
            if let Some(question) = questions::ask(&scene, topic, &mut random) {
                lines.extend([question.text, question.answer, question.slip]);
            }
        }
    }
    lines.extend(super::judge::PROMPT.lines().map(str::to_owned));
    lines
}

/// Qwen2's tokenizer with a small vocabulary: byte-level BPE, special tokens last.
pub fn qwen2(corpus: &[String]) -> Outcome<Tokenizer> {
    // Qwen2's pre-tokenization; see transformers `tokenization_qwen2.py`.
    const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
    });
    let mut tokenizer = untrained(&json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": false},
            bytes,
        ]},
        "post_processor": bytes,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": {}, "merges": [],
        },
    }))?;
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(QWEN2_VOCABULARY)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut TrainerWrapper::from(trainer), corpus.iter())?;
    tokenizer.add_special_tokens(QWEN2_SPECIAL.map(special))?;
    Ok(tokenizer)
}

/// Llama's tokenizer with a small vocabulary: spaces become U+2581, text outside the vocabulary
/// falls back to bytes, and `<s>` starts each text.
pub fn llama(corpus: &[String]) -> Outcome<Tokenizer> {
    let mut tokenizer = untrained(&json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        ]},
        // For training only: it keeps merges inside words.
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {
                "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "never",
                "split": true,
            },
            {"type": "Punctuation", "behavior": "Isolated"},
        ]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false, "vocab": {}, "merges": [],
        },
    }))?;
    let bytes = (0..256).map(|byte| AddedToken::from(format!("<0x{byte:02X}>"), false));
    let printable: HashSet<char> = ('!'..='~').chain(iter::once('\u{2581}')).collect();
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(LLAMA_VOCABULARY)
        .special_tokens(
            ["<unk>", "<s>", "</s>"]
                .map(special)
                .into_iter()
                .chain(bytes)
                .collect(),
        )
        .initial_alphabet(printable)
        .build();
    tokenizer.train(&mut TrainerWrapper::from(trainer), corpus.iter())?;
    tokenizer.with_pre_tokenizer(None::<PreTokenizerWrapper>);
    Ok(tokenizer)
}

fn untrained(description: &Value) -> Outcome<Tokenizer> {
    Tokenizer::from_bytes(description.to_string())
}

fn special(text: &str) -> AddedToken {
    AddedToken::from(text, true).normalized(false)
}

/// Returns the id of a special token.
pub fn id(tokenizer: &Tokenizer, token: &str) -> Outcome<u32> {
    Ok(tokenizer
        .token_to_id(token)
        .ok_or_else(|| format!("the tokenizer has no `{token}`"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tokenizers_give_any_text_back() {
        let corpus = corpus(0);
        let text = "What color are the circles? Größe: 12 \u{1f600}";
        for tokenizer in [qwen2(&corpus).unwrap(), llama(&corpus).unwrap()] {
            let ids = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
    }

    #[test]
    fn words_of_the_world_are_single_tokens_and_special_tokens_are_never_split() {
        let tokenizer = qwen2(&corpus(0)).unwrap();
        let encoding = tokenizer
            .encode("<|im_start|>user\n<image>\nThe star is red.", false)
            .unwrap();
        let expected = [
            "<|im_start|>",
            "user",
            "Ċ",
            "<image>",
            "Ċ",
            "The",
            "Ġstar",
            "Ġis",
            "Ġred",
            ".",
        ];
        assert_eq!(encoding.get_tokens(), expected);
    }
}
