//! The tiny LLaVA-OneVision of `tests/parity/onevision` (`tests/parity/record_onevision.py`), its
//! prompts, and sampling from it.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ovchat_models::{
    ChatPrompt, DeviceSpec, Dtype, Generation, ModelTelemetry, Policy, RowFault, Sampling,
    VisionLanguageSpec, Visual,
};

/// The checkpoint's folder.
pub fn folder() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/parity/onevision")
}

pub fn spec(dtype: Dtype) -> VisionLanguageSpec {
    VisionLanguageSpec {
        weights: folder(),
        adapter: None,
        device: DeviceSpec::Cpu,
        dtype,
        memory_gb: None,
    }
}

/// The recorded prompts: with a large image, a small one, two, and none.
pub fn prompts() -> Vec<ChatPrompt> {
    let texts: [(&[&str], &str); 4] = [
        (&["large.png"], "What is this?"),
        (&["small.png"], "Why?"),
        (&["large.png", "wide.png"], "Which is wider?"),
        (&[], "Say something."),
    ];
    let prompts = texts
        .iter()
        .enumerate()
        .map(|(index, (names, question))| ChatPrompt {
            places: Vec::new(),
            id: format!("prompt {index}"),
            images: names.iter().map(|name| image(name)).collect(),
            system: None,
            turns: Vec::new(),
            question: (*question).to_owned(),
            captions: None,
            answer: None,
            seed: 40 + index as u64,
        });
    prompts.collect()
}

fn image(name: &str) -> Visual {
    Visual::new(
        name.to_owned(),
        std::fs::read(folder().join(name)).unwrap().into(),
    )
}

/// The recorded prompts, `rounds` times with other questions and seeds: in mixed order about three
/// images.
pub fn many(rounds: u64) -> Vec<ChatPrompt> {
    let mut all = Vec::new();
    for round in 0..rounds {
        for mut prompt in prompts() {
            prompt.seed += 100 * round;
            prompt.question.push_str(&" more".repeat(round as usize));
            all.push(prompt);
        }
    }
    all
}

pub fn how(count: usize, temperature: f64) -> Sampling {
    Sampling {
        count,
        temperature,
        top_p: 0.9,
        top_k: 0,
        min_p: 0.0,
        stop_strings: Vec::new(),
        stop_token_ids: Vec::new(),
        repetition_penalty: 1.0,
        max_new_tokens: 12,
    }
}

/// Settings whose answers do not depend on the last bits of the logits: no probability is close to
/// the threshold.
pub fn clear(count: usize) -> Sampling {
    Sampling {
        top_p: 1.0,
        ..how(count, 0.5)
    }
}

/// Returns the answers to each prompt.
pub fn sample(
    policy: &mut impl Policy,
    prompts: &[ChatPrompt],
    how: &Sampling,
) -> Vec<Result<Vec<Generation>, RowFault>> {
    measured(policy, prompts, how).0
}

/// Returns the answers to each prompt, and the telemetry of the call.
pub fn measured(
    policy: &mut impl Policy,
    prompts: &[ChatPrompt],
    how: &Sampling,
) -> (Vec<Result<Vec<Generation>, RowFault>>, ModelTelemetry) {
    let mut rows: Vec<_> = prompts.iter().map(|_| None).collect();
    let mut emit = |index: usize, answers| {
        assert!(rows[index].is_none(), "row {index} is returned twice");
        rows[index] = Some(answers);
        ControlFlow::Continue(())
    };
    let telemetry = policy.sample(prompts, how, &mut emit).unwrap();
    let rows = rows
        .into_iter()
        .map(|row| row.expect("every row is returned"));
    (rows.collect(), telemetry)
}

/// Asserts equal tokens, and log-probabilities within `1e-4`.
pub fn assert_same(
    left: &[Result<Vec<Generation>, RowFault>],
    right: &[Result<Vec<Generation>, RowFault>],
) {
    assert_eq!(left.len(), right.len());
    for (left, right) in left.iter().zip(right) {
        let (left, right) = (left.as_ref().unwrap(), right.as_ref().unwrap());
        assert_eq!(left.len(), right.len());
        for (left, right) in left.iter().zip(right) {
            assert_eq!(left.token_ids, right.token_ids);
            for (one, other) in left.token_logps.iter().zip(&right.token_logps) {
                assert!((one - other).abs() < 1e-4, "{one} {other}");
            }
        }
    }
}
