//! Parity of rewards for both layouts of a reward model, and of a reward training.

use std::ops::ControlFlow;
use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::training::{BATCH, Trained, optimization};
use super::{Recorded, Report, compare, differences, image_file, json};
use ovchat_models::preprocess::LlavaRlhfProcessor;
use ovchat_models::{
    AnswerGroup, ChatPrompt, DeviceSpec, Dtype, Example, Judge as _, LlavaRlhfSpec, RewardSettings,
    RewardTrainer as _, TrainingAnswer,
};
use ovchat_torch::llava::LlavaRlhf;
use ovchat_torch::reward::RewardJudge;
use ovchat_torch::reward_trainer::LlavaRewardTrainer;

#[derive(serde::Deserialize)]
struct Cases {
    title: String,
    rows: Vec<Row>,
}

#[derive(serde::Deserialize)]
struct Row {
    image: Option<String>,
    question: String,
    answer: String,
    captions: Option<Vec<String>>,
    reward: f64,
}

#[derive(serde::Deserialize)]
struct Pair {
    image: Option<String>,
    question: String,
    captions: Option<Vec<String>>,
    chosen: String,
    rejected: String,
}

#[test]
fn rewards_are_those_of_the_reference() {
    compare("rewards", "rewards", block);
}

fn block(folder: &Path, report: &mut Report) {
    for name in ["one", "two"] {
        let place = folder.join(name);
        scores(folder, &place, report);
    }
    trained(folder, &folder.join("one"), report);
}

fn spec(place: &Path) -> LlavaRlhfSpec {
    LlavaRlhfSpec {
        caption_orders: std::num::NonZeroU32::MIN,
        base: place.join("base"),
        vision: place.join("vision"),
        adapter: Some(place.join("adapter")),
        prompt: place.join("prompt.txt"),
        device: DeviceSpec::Cpu,
        dtype: Dtype::Float32,
        memory_gb: None,
        exam: None,
    }
}

fn prompt(
    folder: &Path,
    image: Option<&String>,
    question: &str,
    captions: Option<&Vec<String>>,
) -> ChatPrompt {
    let file = |name: &String| image_file(&folder.join(format!("{name}.png")));
    ChatPrompt {
        captions: captions.cloned(),
        answer: None,
        ..super::prompt(question, &[], image.map(file).into_iter().collect())
    }
}

/// Compares the features that represent images among the embeddings.
fn features(folder: &Path, place: &Path, title: &str, report: &mut Report) {
    let expected = Recorded::open(&place.join("features.safetensors"));
    let spec = spec(place);
    let prep = LlavaRlhfProcessor::open(&spec).unwrap();
    let llava = LlavaRlhf::open(&spec, &prep.config, Kind::Float, Device::Cpu).unwrap();
    let side = prep.clip.side() as i64;
    let mut worst = [0.0_f64; 2];
    for name in ["wide", "tall", "square", "dot"] {
        let pixels = prep
            .pixels(&image_file(&folder.join(format!("{name}.png"))))
            .unwrap();
        let pixels = Tensor::from_slice(&pixels).view([1, 3, side, side]);
        let found = llava.encode_images(&pixels).squeeze_dim(0);
        let apart = differences(&found, &expected.tensor(name));
        worst = [worst[0].max(apart[0]), worst[1].max(apart[1])];
    }
    let case = format!("{title}: tower and projector");
    report.line(case, worst, "1e-4", worst[0] <= 1e-4);
}

fn scores(folder: &Path, place: &Path, report: &mut Report) {
    let cases: Cases = json(&place.join("rows.json"));
    features(folder, place, &cases.title, report);
    let mut judge = RewardJudge::open(&spec(place)).unwrap_or_else(|error| panic!("{error}"));
    // Answers to one prompt are judged together, whatever their lengths.
    let same = |one: &Row, other: &Row| one.image == other.image && one.question == other.question;
    let groups: Vec<&[Row]> = cases.rows.chunk_by(same).collect();
    let prompts: Vec<ChatPrompt> = groups
        .iter()
        .map(|rows| {
            let row = &rows[0];
            prompt(
                folder,
                row.image.as_ref(),
                &row.question,
                row.captions.as_ref(),
            )
        })
        .collect();
    let asked: Vec<AnswerGroup<'_>> = groups
        .iter()
        .zip(&prompts)
        .map(|(rows, prompt)| {
            AnswerGroup::new(prompt, rows.iter().map(|row| row.answer.as_str()).collect())
        })
        .collect();
    let [mut apart, mut greatest] = [0.0_f64; 2];
    let mut judged = 0;
    judge
        .score(&asked, &mut |group, scores| {
            let scores = scores.unwrap_or_else(|fault| panic!("{fault}"));
            for (row, score) in groups[group].iter().zip(scores) {
                apart = apart.max((f64::from(score.reward) - row.reward).abs());
                greatest = greatest.max(row.reward.abs());
                judged += 1;
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(judged, cases.rows.len());
    let case = format!("{}: {judged} rows", cases.title);
    report.line(case, [apart, apart / greatest], "1e-4", apart <= 1e-4);
}

fn trained(folder: &Path, place: &Path, report: &mut Report) {
    let pairs: Vec<Pair> = json(&place.join("pairs.json"));
    let expected = Recorded::open(&place.join("training.safetensors"));
    let settings = RewardSettings {
        rank: 2,
        alpha: 1.0,
        centering: 1e-3,
        seed: 0,
        optimization: optimization(),
    };
    let mut trainer = LlavaRewardTrainer::open(&spec(place), &settings).unwrap();
    let prompts: Vec<ChatPrompt> = pairs
        .iter()
        .map(|pair| {
            prompt(
                folder,
                pair.image.as_ref(),
                &pair.question,
                pair.captions.as_ref(),
            )
        })
        .collect();
    let written = |text: &String| TrainingAnswer {
        text: text.clone(),
        token_ids: None,
    };
    let examples: Vec<Example<'_>> = pairs
        .iter()
        .zip(&prompts)
        .map(|(pair, prompt)| Example {
            id: "pair",
            prompt,
            chosen: written(&pair.chosen),
            rejected: written(&pair.rejected),
            reference: None,
        })
        .collect();
    let mut trained = Trained::new(
        "a reward model's 20 updates",
        trainer.training(),
        &expected,
        ToOwned::to_owned,
    );
    for (step, batch) in examples.chunks(BATCH).enumerate() {
        let found = trainer.step(batch).unwrap();
        trained.loss(step, found.loss);
        if step == 0 {
            trained.gradients(trainer.training());
        }
    }
    trained.weights(trainer.training(), report);
}
