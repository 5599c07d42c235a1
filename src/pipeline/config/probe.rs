//! What the environment must offer beside files: room in the contexts of models, keys of endpoints.

use super::check::all_stages;
use super::diagnostic::{At, Diagnostic};
use super::pipeline::PipelineSpec;
use super::source::KeyPath;
use crate::stages::{ModelName, StageSpec};
use ovchat_io::mask::SECRET_MIN;
use ovchat_models::checkpoint::LlavaOnevisionConfig;
use ovchat_models::preprocess::LlavaOnevisionProcessor;
use ovchat_models::{INVALID_KEY, JudgePromptSettings, ModelSpec};

/// Answers and replies that would be longer than the whole context of their model. Models whose config
/// can't be read are complained about elsewhere.
pub fn contexts(written: &PipelineSpec) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    for (stage, _) in all_stages(written) {
        if let Some(StageSpec::Sample(sample)) = &stage.spec {
            let tokens = sample.max_new_tokens.get();
            let at = stage.settings.key("max_new_tokens");
            diagnostics.extend(beyond(written, sample.model.as_str(), tokens, at));
        }
    }
    for entry in &written.models {
        let Some((spec, asking)) = entry.spec.as_ref().and_then(|it| Some((it, it.asking()?)))
        else {
            continue;
        };
        let JudgePromptSettings { max_new_tokens, .. } = asking;
        let writer = spec.backing_model().unwrap_or(entry.name.as_str());
        let at = entry.settings.below("ask.max_new_tokens");
        diagnostics.extend(beyond(written, writer, max_new_tokens.0.get(), at));
    }
    diagnostics
}

fn beyond(written: &PipelineSpec, model: &str, tokens: u32, at: KeyPath) -> Option<Diagnostic> {
    let of_name = |name: &ModelName| name.as_str() == model;
    let entry = written.models.iter().find(|entry| of_name(&entry.name))?;
    let ModelSpec::LlavaOnevision(spec) = entry.spec.clone()?.opened() else {
        return None;
    };
    let context = |context: usize| {
        format!(
            "the context holds prompt, pictures and answer: set `max_new_tokens` well below {context}"
        )
    };
    let at = At::value(at);
    let size = LlavaOnevisionConfig::open(&spec.weights).ok()?;
    let size = size.text_config.max_position_embeddings;
    let left = size.saturating_sub(tokens as usize);
    if left == 0 {
        let message =
            format!("`max_new_tokens` is {tokens}, and the context of `{model}` is {size} tokens");
        return Some(Diagnostic::new(CONTEXT, at, message).help(context(size)));
    }
    // The rest takes a tokenizer, which is large.
    if left > size / 2 {
        return None;
    }
    let [without, with] = LlavaOnevisionProcessor::open(&spec.weights)
        .ok()?
        .least()
        .ok()?;
    let of_context = format!(
        "`max_new_tokens` {tokens} leaves {left} of the {size} tokens of the context of `{model}`"
    );
    let diagnostic = if left < without {
        let message = format!("{of_context}, and a prompt takes {without} before its first word");
        Diagnostic::new(CONTEXT, at, message)
    } else if left < with {
        let message = format!("{of_context}, and a prompt with a picture takes {with} or more");
        Diagnostic::warning(CONTEXT, at, message)
    } else {
        return None;
    };
    Some(diagnostic.help(context(size)))
}

const CONTEXT: &str = "config::context";

/// The code of notes about keys that the environment does not have.
pub const NO_KEY: &str = "config::no_key";

/// Notes about keys of endpoints that the environment does not have, which only a run needs, and complaints
/// about those that are none.
pub fn keys(written: &PipelineSpec) -> Vec<Diagnostic> {
    let missing = written.models.iter().filter_map(|entry| {
        let Some(ModelSpec::Http(http)) = &entry.spec else {
            return None;
        };
        let at = At::value(entry.settings.key("key_env"));
        if let Some(name) = http.short_key() {
            let message = format!(
                "what `{name}` holds is shorter than {SECRET_MIN} characters, which no key is"
            );
            let help = "an endpoint without a key needs no `key_env`";
            return Some(Diagnostic::new("config::short_key", at, message).help(help));
        }
        if let Some(name) = http.invalid_key() {
            let message = format!("the environment variable `{name}` {INVALID_KEY}");
            return Some(Diagnostic::new("config::invalid_key", at, message));
        }
        let name = http.missing_key()?;
        let message = format!("the environment variable `{name}` is not set");
        let help = format!(
            "`pipeline run` needs the key of `{}`: export {name}=…",
            entry.name
        );
        Some(Diagnostic::note(NO_KEY, at, message).help(help))
    });
    missing.collect()
}
