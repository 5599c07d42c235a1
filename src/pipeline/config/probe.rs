//! Checks of models against their checkpoints' configs (context sizes, parts that can be trained), and
//! of endpoint API keys.

use serde::Serialize;

use super::diagnostic::{At, Diagnostic};
use super::pipeline::PipelineSpec;
use super::source::KeyPath;
use crate::stages::{ModelName, StageSpec};
use ovchat_io::mask::SECRET_MIN;
use ovchat_models::architectures;
use ovchat_models::preprocess::Processor;
use ovchat_models::{INVALID_KEY, JudgePromptSettings, Mask, Newlines, Part};

/// Reports `max_new_tokens` settings that leave too little of the model's context for the prompt.
/// Models whose config cannot be read have a diagnostic elsewhere.
pub fn contexts(written: &PipelineSpec) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    for (stage, _) in written.all_stages() {
        if let Some(StageSpec::Sample(sample)) = &stage.spec {
            let tokens = sample.max_new_tokens.get();
            let at = stage.settings.key("max_new_tokens");
            diagnostics.extend(beyond(written, sample.model.as_str(), tokens, at));
        }
    }
    for entry in &written.models {
        let Some((spec, prompt_settings)) = entry
            .spec
            .as_ref()
            .and_then(|it| Some((it, it.prompt_settings()?)))
        else {
            continue;
        };
        let JudgePromptSettings { max_new_tokens, .. } = prompt_settings;
        let writer = spec.backing_model().unwrap_or(entry.name.as_str());
        let at = entry.settings.below("ask.max_new_tokens");
        diagnostics.extend(beyond(written, writer, max_new_tokens.0.get(), at));
    }
    diagnostics
}

fn beyond(written: &PipelineSpec, model: &str, tokens: u32, at: KeyPath) -> Option<Diagnostic> {
    let of_name = |name: &ModelName| name.as_str() == model;
    let entry = written.models.iter().find(|entry| of_name(&entry.name))?;
    let opened = entry.spec.clone()?.opened();
    let spec = opened.vision_language()?;
    let context = |context: usize| {
        format!(
            "set `max_new_tokens` well below {context}: prompt, images and answer share the context"
        )
    };
    let at = At::value(at);
    let architecture = architectures::open(&spec.weights).ok()?;
    let size = architecture.text_config().max_position_embeddings;
    let left = size.saturating_sub(tokens as usize);
    if left == 0 {
        let message = format!(
            "`max_new_tokens` is {tokens}, but the context of `{model}` is only {size} tokens"
        );
        return Some(Diagnostic::new(CONTEXT, at, message).help(context(size)));
    }
    // The remaining checks need the tokenizer, which is large.
    if left > size / 2 {
        return None;
    }
    let [without, with] = Processor::open(&spec.weights).ok()?.least().ok()?;
    let of_context = format!(
        "`max_new_tokens` of {tokens} leaves only {left} of the {size} context tokens of `{model}`"
    );
    let diagnostic = if left < without {
        let message = format!("{of_context}, but even an empty prompt takes {without}");
        Diagnostic::new(CONTEXT, at, message)
    } else if left < with {
        let message = format!("{of_context}, but a prompt with an image takes at least {with}");
        Diagnostic::warning(CONTEXT, at, message)
    } else {
        return None;
    };
    Some(diagnostic.help(context(size)))
}

const CONTEXT: &str = "config::context";

/// Reports DPO settings that the architecture of the trained model does not have: parts, and
/// conventions for counted tokens.
pub fn trainings(written: &PipelineSpec) -> Vec<Diagnostic> {
    let trainings = written.all_stages().filter_map(|(stage, _)| {
        let Some(StageSpec::TrainDpo(train)) = &stage.spec else {
            return None;
        };
        let mut models = written.models.iter();
        let model = models.find(|entry| entry.name == train.model)?;
        let weights = &model.spec.as_ref()?.vision_language()?.weights;
        let architecture = architectures::open(weights).ok()?;
        let name = architecture.name();
        let chosen = train.train.iter().flatten().chain(train.learning_rates.keys());
        let missing = |part: &&Part| !architecture.parts().contains(part);
        if let Some(part) = chosen.copied().collect::<Vec<_>>().iter().find(missing) {
            let field = match &train.train {
                Some(parts) if parts.contains(part) => "train",
                _ => "learning_rates",
            };
            let at = At::value(stage.settings.key(field));
            let message = format!("a `{name}` model has no part `{}`", word(part));
            let parts = architecture.parts().iter().map(|part| format!("`{}`", word(part)));
            let help = format!("its parts are {}", parts.collect::<Vec<_>>().join(", "));
            return Some(Diagnostic::new(TRAINING, at, message).help(help));
        }
        let masks = architecture.masks();
        let refuse = |field: &str, value: String, default: &str| {
            let at = At::value(stage.settings.key(field));
            let message = format!(
                "`{value}` does not apply to a `{name}` model, whose chat format has no such convention"
            );
            let help = format!("remove `{field}`; the default is `{default}`");
            Some(Diagnostic::new(TRAINING, at, message).help(help))
        };
        if train.mask != Mask::Answer && !masks.contains(&train.mask) {
            return refuse("mask", word(&train.mask), "answer");
        }
        if train.newlines == Newlines::Two && !masks.contains(&Mask::LlavaNext) {
            return refuse("newlines", word(&train.newlines), "one");
        }
        None
    });
    trainings.collect()
}

const TRAINING: &str = "config::training";

/// Returns a value as it is written in a pipeline file.
fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).expect("plain data");
    value.as_str().unwrap_or_default().to_owned()
}

/// The diagnostic code of API keys that are not set in the environment.
pub const NO_KEY: &str = "config::no_key";

/// Reports the API keys of endpoints: a note for one that is not set, which only a run needs, and
/// an error for one that is too short to be a key.
pub fn keys(written: &PipelineSpec) -> Vec<Diagnostic> {
    let missing = written.models.iter().filter_map(|entry| {
        let http = entry.spec.as_ref()?.endpoint()?;
        let at = At::value(entry.settings.key("key_env"));
        if let Some(name) = http.short_key() {
            let message = format!(
                "the value of `{name}` is too short for an API key: it has fewer than {SECRET_MIN} characters"
            );
            let help = "set the variable to the API key, or remove `key_env` if the endpoint needs none";
            return Some(Diagnostic::new("config::short_key", at, message).help(help));
        }
        if let Some(name) = http.invalid_key() {
            let message = format!("the environment variable `{name}` {INVALID_KEY}");
            return Some(Diagnostic::new("config::invalid_key", at, message));
        }
        let name = http.missing_key()?;
        let message = format!("environment variable `{name}` is not set");
        let help = format!(
            "set it before `pipeline run`, which needs the API key of `{}`: export {name}=…",
            entry.name
        );
        Some(Diagnostic::note(NO_KEY, at, message).help(help))
    });
    missing.collect()
}
