//! Parity of prompts with videos, alone and beside images: token ids, logits, and DPO.

use std::collections::HashMap;
use std::path::Path;

use super::interleaved::{forward, updates};
use super::{Report, compare, image_file, json};
use ovchat_models::{ChatPrompt, Visual};

#[derive(serde::Deserialize)]
struct Cases {
    /// Logits are recorded at the last position and at every n-th position before it.
    logits_every: i64,
    /// The number of frames of each video.
    clips: HashMap<String, usize>,
    cases: Vec<Case>,
}

/// A prompt, in the form in which tables have it.
#[derive(serde::Deserialize)]
struct Case {
    videos: Vec<String>,
    images: Vec<String>,
    turns: Vec<[String; 2]>,
    question: String,
}

#[test]
fn videos_are_read_as_by_the_reference() {
    compare("videos", "videos", block);
}

fn block(folder: &Path, report: &mut Report) {
    let checkpoint = folder.join("../onevision/videos");
    let recorded: Cases = json(&folder.join("cases.json"));
    let image = |name: String| image_file(&folder.join(format!("{name}.png")));
    let video = |name: &String| {
        let frames = 0..recorded.clips[name];
        Visual::video(
            frames
                .map(|number| image(format!("{name}-{number}")))
                .collect(),
        )
    };
    let prompt = |case: &Case| {
        let images = case.images.iter().map(|name| image(name.clone()));
        let images = images.chain(case.videos.iter().map(video)).collect();
        super::prompt(&case.question, &case.turns, images).with_places()
    };
    let prompts: Vec<ChatPrompt> = recorded.cases.iter().map(prompt).collect();
    let every = recorded.logits_every;
    forward(&checkpoint, folder, &prompts, every, "videos", report);
    updates(&checkpoint, folder, &prompts, "videos", report);
}
