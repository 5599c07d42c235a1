//! Tests with untrusted checkpoint files: none may cause a panic, and a rejection names the file.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::architectures;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::LlavaRlhfConfig;
use crate::checkpoint::memory::{TrainingSizes, elements, judge_elements, learned_logits};
use crate::preprocess::image_processor::ImageProcessorConfig;
use crate::preprocess::tokenizer::PlainTokenizer;
use crate::test_util::{llava_folder, onevision_folder, reward_folder};
use crate::{LoraSettings, Optimizer, Tower, Trained};

/// Returns values that are invalid or out of range for most settings.
fn strange() -> Vec<Value> {
    vec![
        json!(0),
        json!(-1),
        json!(1),
        json!(i64::MAX),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(1_000_000_000),
        json!(1e300),
        json!(0.5),
        json!("many"),
        json!([]),
        json!(vec![7; 5000]),
        json!({"a": 1}),
        json!(null),
        json!(true),
    ]
}

/// Collects JSON pointers to all values below.
fn pointers(value: &Value, here: &str, found: &mut Vec<String>) {
    let mut below = |key: &str, value: &Value| {
        let pointer = format!("{here}/{key}");
        found.push(pointer.clone());
        pointers(value, &pointer, found);
    };
    match value {
        // Only a few entries of a vocabulary.
        Value::Object(map) => {
            let entries = map.iter().take(if map.len() > 50 { 3 } else { map.len() });
            entries.for_each(|(key, value)| below(key, value));
        }
        Value::Array(list) => list.iter().take(2).enumerate().for_each(|(index, value)| {
            below(&index.to_string(), value);
        }),
        _ => {}
    }
}

/// Replaces each value of a JSON file by each of [`strange`] in turn and calls `read`.
fn vary(path: &Path, read: &dyn Fn() -> Result<(), CheckpointError>) -> usize {
    let text = fs::read(path).unwrap();
    let file: Value = serde_json::from_slice(&text).unwrap();
    let mut places = Vec::new();
    pointers(&file, "", &mut places);
    let mut refused = 0;
    for place in &places {
        for value in strange() {
            let mut changed = file.clone();
            *changed.pointer_mut(place).unwrap() = value;
            fs::write(path, changed.to_string()).unwrap();
            if let Err(error) = read() {
                assert!(error.to_string().contains(".json: "), "{place}: {error}");
                refused += 1;
            }
        }
    }
    fs::write(path, text).unwrap();
    refused
}

#[test]
fn strange_numbers_of_a_policy_are_refused_or_their_memory_is_told() {
    for folder in [onevision_folder(), llava_folder()] {
        vary_a_policy(folder.path());
    }
}

/// Varies the settings in the files of a policy.
fn vary_a_policy(path: &Path) {
    let read = || -> Result<(), CheckpointError> {
        let architecture = architectures::open(path)?;
        architecture.images(path)?;
        let lora = LoraSettings {
            rank: usize::MAX,
            alpha: 1.0,
            dropout: 0.0,
            targets: vec!["o_proj".to_owned()],
            seed: 0,
        };
        for trained in [Trained::all(), Trained::Lora(lora)] {
            let sizes = TrainingSizes::new(&*architecture, &trained, Optimizer::Adamw, 4);
            assert!(!sizes.has_room(1, usize::MAX, usize::MAX));
            sizes.computed_again(usize::MAX, usize::MAX);
        }
        learned_logits(architecture.text_config(), usize::MAX);
        assert!(elements(&*architecture) > 0);
        Ok(())
    };
    for file in [
        "config.json",
        "preprocessor_config.json",
        "generation_config.json",
    ] {
        let path = path.join(file);
        assert!(!path.exists() || vary(&path, &read) > 10, "{file}");
    }
}

#[test]
fn strange_numbers_of_a_reward_model_are_refused_or_their_memory_is_told() {
    let (_folder, spec) = reward_folder();
    let read = || -> Result<(), CheckpointError> {
        let model_config = LlavaRlhfConfig::open(&spec)?;
        ImageProcessorConfig::open_clip(&spec.vision, model_config.vision_config.image_size)?;
        TrainingSizes::of_base(&model_config, Tower::Train, 4).remembered(usize::MAX, usize::MAX);
        TrainingSizes::of_adapter(&model_config, usize::MAX, 4);
        assert!(judge_elements(&model_config) > 0);
        Ok(())
    };
    let adapter = spec.adapter.as_ref().unwrap();
    for file in [
        spec.base.join("config.json"),
        spec.vision.join("config.json"),
        spec.vision.join("preprocessor_config.json"),
        adapter.join("adapter_config.json"),
    ] {
        assert!(vary(&file, &read) > 10, "{}", file.display());
    }
}

#[test]
fn the_largest_sizes_of_all_are_counted_without_overflow() {
    let folder = onevision_folder();
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, size) in [
        ("vocab_size", 1 << 24),
        ("hidden_size", 1 << 20),
        ("intermediate_size", 1 << 20),
        ("num_hidden_layers", 1000),
        ("num_attention_heads", 1 << 12),
        ("num_key_value_heads", 1 << 12),
        ("head_dim", 1 << 12),
    ] {
        config["text_config"][key] = json!(size);
    }
    for (key, size) in [
        ("hidden_size", 1 << 20),
        ("intermediate_size", 1 << 20),
        ("num_hidden_layers", 1000),
        ("image_size", 1 << 12),
        ("patch_size", 1),
    ] {
        config["vision_config"][key] = json!(size);
    }
    fs::write(&path, config.to_string()).unwrap();
    let architecture = architectures::open(folder.path()).unwrap();
    let sizes = TrainingSizes::new(&*architecture, &Trained::all(), Optimizer::Adamw, 4);
    assert!(sizes.state() > 1 << 50);
    config["text_config"]["num_hidden_layers"] = json!(1_000_000_000);
    fs::write(&path, config.to_string()).unwrap();
    let error = architectures::open(folder.path()).unwrap_err().to_string();
    assert!(
        error.ends_with("config.json: `text_config.num_hidden_layers` is 1000000000, but at most 1000 is supported"),
        "{error}"
    );
}

#[test]
fn a_normalizer_that_multiplies_text_is_refused() {
    let folder = onevision_folder();
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let doubled = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": vec![doubled; 20]});
    fs::write(&path, tokenizer.to_string()).unwrap();
    let error = PlainTokenizer::open(folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("can make a text 1048576 times as long"),
        "{error}"
    );
}

#[test]
fn a_pattern_that_backtracks_for_ever_costs_its_row_and_names_the_file() {
    let folder = onevision_folder();
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "^(?:a|aa)+$"},
        "behavior": "Isolated", "invert": false});
    fs::write(&path, tokenizer.to_string()).unwrap();
    let tokenizer = PlainTokenizer::open(folder.path()).unwrap();
    let mut ids = Vec::new();
    let fault = tokenizer
        .append(&format!("{}!", "a".repeat(64)), &mut ids)
        .unwrap_err();
    assert!(fault.0.contains("tokenizer.json: "), "{}", fault.0);
    assert!(tokenizer.append("Why?", &mut ids).is_ok());
}

#[test]
fn strange_tokenizers_are_refused_or_taken() {
    let folder = onevision_folder();
    let path = folder.path().join("tokenizer.json");
    let tokenize = || -> Result<(), CheckpointError> {
        let tokenizer = PlainTokenizer::open(folder.path())?;
        let mut ids = Vec::new();
        let _ = tokenizer.append("Why?\n\nä<image>", &mut ids);
        tokenizer.decode(&ids);
        Ok(())
    };
    assert!(vary(&path, &tokenize) > 100);
}
