//! Parity of the token ids of prompts with unusual text.

use std::path::Path;

use super::{Report, compare, json, prompt};
use ovchat_models::ChatPrompt;
use ovchat_models::preprocess::{Processor, Vicuna};

#[derive(serde::Deserialize)]
struct ChatCase {
    question: String,
    turns: Vec<[String; 2]>,
    system: Option<String>,
    #[serde(rename = "pictures")]
    images: Vec<usize>,
    ids: Vec<i64>,
}

/// Prompts of LLaVA-1.5 and answers to them.
#[derive(serde::Deserialize)]
struct LlavaCases {
    title: String,
    /// The folder of the tokenizer.
    folder: String,
    cases: Vec<LlavaCase>,
}

#[derive(serde::Deserialize)]
struct LlavaCase {
    #[serde(flatten)]
    prompt: ChatCase,
    answer: String,
    answer_ids: Vec<i64>,
}

#[derive(serde::Deserialize)]
struct VicunaCase {
    question: String,
    turns: Vec<[String; 2]>,
    answer: String,
    #[serde(rename = "picture")]
    image: Option<usize>,
    captions: Option<Vec<String>>,
    ids: Vec<i64>,
}

#[test]
fn token_ids_are_those_of_the_reference() {
    compare("prompt token ids", "text", block);
}

fn block(folder: &Path, report: &mut Report) {
    let processor = Processor::open(&folder.join("../onevision/text")).unwrap();
    let cases: Vec<ChatCase> = json(&folder.join("chat.json"));
    let differs = |case: &&ChatCase| case.differs(&processor);
    report.equal(
        "LLaVA-OneVision's chat",
        cases.iter().filter(differs).count(),
        cases.len(),
    );
    for name in ["text-transformers-4", "text-transformers-5"] {
        llava(&folder.join("../llava"), name, report);
    }

    let base = folder.join("base");
    let vicuna = Vicuna::open(&base, 1000, &base.join("prompt.txt")).unwrap();
    let cases: Vec<VicunaCase> = json(&folder.join("vicuna.json"));
    let differs = |case: &&VicunaCase| {
        let prompt = ChatPrompt {
            captions: case.captions.clone(),
            answer: None,
            ..prompt(&case.question, &case.turns, Vec::new())
        };
        vicuna
            .judged(&prompt, &case.answer, case.image)
            .unwrap()
            .ids
            != case.ids
    };
    let different = cases.iter().filter(differs).count();
    report.equal(
        "LLaVA-RLHF's request, by tokenizer.model",
        different,
        cases.len(),
    );
}

impl ChatCase {
    /// True if the prompt has other token ids.
    fn differs(&self, processor: &Processor) -> bool {
        let prompt = ChatPrompt {
            system: self.system.clone(),
            ..prompt(&self.question, &self.turns, Vec::new())
        };
        processor.chat().prompt(&prompt, &self.images).unwrap().ids != self.ids
    }
}

/// Compares prompts of LLaVA-1.5 and answers to them, by one of its tokenizers.
fn llava(folder: &Path, name: &str, report: &mut Report) {
    let recorded: LlavaCases = json(&folder.join("text").join(format!("{name}.json")));
    let processor = Processor::open(&folder.join(&recorded.folder)).unwrap();
    let (cases, title) = (recorded.cases, recorded.title);
    let differs = |case: &&LlavaCase| case.prompt.differs(&processor);
    let different = cases.iter().filter(differs).count();
    report.equal(
        format!("LLaVA-1.5's chat, tokenizer of {title}"),
        different,
        cases.len(),
    );
    let differs =
        |case: &&LlavaCase| processor.chat().answer(&case.answer).unwrap() != case.answer_ids;
    let different = cases.iter().filter(differs).count();
    report.equal(
        format!("LLaVA-1.5's answers, tokenizer of {title}"),
        different,
        cases.len(),
    );
}
