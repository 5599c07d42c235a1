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
    let prep = Processor::open(&folder.join("../onevision/text")).unwrap();
    let cases: Vec<ChatCase> = json(&folder.join("chat.json"));
    let differs = |case: &&ChatCase| {
        let prompt = ChatPrompt {
            system: case.system.clone(),
            ..prompt(&case.question, &case.turns, Vec::new())
        };
        prep.chat.prompt(&prompt, &case.images).unwrap().ids != case.ids
    };
    report.equal(
        "LLaVA-OneVision's chat",
        cases.iter().filter(differs).count(),
        cases.len(),
    );

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
