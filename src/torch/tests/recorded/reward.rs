//! The tiny reward model of `tests/parity/reward` (`tests/parity/record_reward.py`), its rows, and
//! scoring with it.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ovchat_models::{
    AnswerGroup, ChatPrompt, DeviceSpec, Dtype, Judge, JudgeScore, LlavaRlhfSpec, ModelTelemetry,
    RowFault, Visual,
};

/// A row of the recording.
#[derive(serde::Deserialize)]
pub struct Row {
    pub image: String,
    pub question: String,
    pub answer: String,
    pub captions: Option<Vec<String>>,
    pub reward: f32,
}

/// The folder of the model, its rows and their images.
pub fn folder() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/parity/reward")
}

pub fn rows() -> Vec<Row> {
    let text = std::fs::read(folder().join("rows.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

pub fn encoded(name: &str) -> Visual {
    Visual::new(
        name.to_owned(),
        std::fs::read(folder().join("images").join(name))
            .unwrap()
            .into(),
    )
}

pub fn prompt(row: &Row) -> ChatPrompt {
    ChatPrompt {
        places: Vec::new(),
        id: row.image.clone(),
        images: vec![encoded(&row.image)],
        system: None,
        turns: Vec::new(),
        question: row.question.clone(),
        captions: row.captions.clone(),
        answer: None,
        seed: 0,
    }
}

pub fn spec(root: &Path) -> LlavaRlhfSpec {
    LlavaRlhfSpec {
        caption_orders: std::num::NonZeroU32::MIN,
        base: root.join("base"),
        vision: root.join("vision"),
        adapter: Some(root.join("adapter")),
        prompt: root.join("prompt.txt"),
        device: DeviceSpec::Cpu,
        dtype: Dtype::Auto,
        memory_gb: None,
        exam: None,
    }
}

/// Returns the rewards of each group, and the telemetry of the call.
pub fn measured(
    judge: &mut impl Judge,
    groups: &[AnswerGroup<'_>],
) -> (Vec<Result<Vec<f32>, RowFault>>, ModelTelemetry) {
    let mut all: Vec<Option<_>> = groups.iter().map(|_| None).collect();
    let telemetry = judge
        .score(groups, &mut |index, scores| {
            assert!(all[index].is_none(), "row {index} is returned twice");
            let rewards =
                |scores: Vec<JudgeScore>| scores.iter().map(|score| score.reward).collect();
            all[index] = Some(scores.map(rewards));
            ControlFlow::Continue(())
        })
        .unwrap();
    let all = all
        .into_iter()
        .map(|row| row.expect("every row is returned"));
    (all.collect(), telemetry)
}

/// Groups the answers by prompt.
pub fn groups<'a>(rows: &'a [Row], prompts: &'a [ChatPrompt]) -> Vec<AnswerGroup<'a>> {
    let mut groups: Vec<AnswerGroup> = Vec::new();
    for (row, prompt) in rows.iter().zip(prompts) {
        match groups.last_mut() {
            Some(group) if group.prompt.id == prompt.id => group.answers.push(&row.answer),
            _ => groups.push(AnswerGroup::new(prompt, vec![&row.answer])),
        }
    }
    assert_eq!(groups.len(), 2);
    groups
}

/// Six groups; the first two are different.
pub fn threefold<'a>(once: &[AnswerGroup<'a>]) -> Vec<AnswerGroup<'a>> {
    let groups = (0..3).flat_map(|_| once);
    let again = groups.map(|group| AnswerGroup::new(group.prompt, group.answers.clone()));
    again.collect()
}

pub fn assert_near(found: &[f32], expected: &[f32], difference_max: f32) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let near = (found - expected).abs() <= difference_max;
        assert!(near, "{found} is not {expected}");
    }
}
