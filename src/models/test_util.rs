//! Helpers shared by this crate's tests: images made by a formula, and checkpoint folders without
//! weights.
//!
//! The tokenizers in these folders have a token per character, so that tokens are readable.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::preprocess::image::Rgb;
use crate::{ChatPrompt, DeviceSpec, Dtype, LlavaRlhfSpec, Visual};

/// Returns the image whose recorded hashes the tests use: `(7 x + 13 y + 50 channel + x y) mod
/// 256`.
pub fn pattern(width: usize, height: usize) -> Rgb {
    let mut data = Vec::new();
    for y in 0..height {
        for x in 0..width {
            data.extend((0..3).map(|channel| (7 * x + 13 * y + 50 * channel + x * y) as u8));
        }
    }
    Rgb {
        width,
        height,
        data,
    }
}

/// Encodes [`pattern`] as a PNG file.
pub fn png(width: usize, height: usize) -> Visual {
    let rgb = image::RgbImage::from_raw(width as u32, height as u32, pattern(width, height).data);
    let mut bytes = std::io::Cursor::new(Vec::new());
    rgb.expect("the size fits")
        .write_to(&mut bytes, image::ImageFormat::Png)
        .expect("written to memory");
    Visual::new(format!("{width}x{height}"), Arc::from(bytes.into_inner()))
}

/// Returns the SHA-256 of bytes, in hex.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    let mut hex = String::new();
    for byte in digest {
        write!(hex, "{byte:02x}").expect("text grows");
    }
    hex
}

/// Returns the SHA-256 of floats in little endian, as in numpy's `tobytes`.
pub fn sha256_floats(floats: &[f32]) -> String {
    let bytes: Vec<u8> = floats
        .iter()
        .flat_map(|float| float.to_le_bytes())
        .collect();
    sha256(&bytes)
}

/// Returns a prompt with only images and a question.
pub fn prompt(images: Vec<Visual>, question: &str) -> ChatPrompt {
    ChatPrompt {
        places: Vec::new(),
        id: "test".to_owned(),
        images,
        system: None,
        turns: Vec::new(),
        question: question.to_owned(),
        captions: None,
        answer: None,
        seed: 0,
    }
}

/// Writes a safetensors file of float32 tensors, all zero.
pub fn shard(path: &Path, tensors: &[(&str, &[usize])]) {
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let length = 4 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [end, end + length]});
        header.insert((*name).to_owned(), entry);
        end += length;
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + end, 0);
    std::fs::write(path, bytes).unwrap();
}

/// Writes a JSON file.
pub fn write(folder: &Path, name: &str, value: &Value) {
    std::fs::write(folder.join(name), value.to_string()).expect("written");
}

/// Returns the `config.json` of a LLaVA-OneVision checkpoint with tiles of 56 pixels, 16 patches
/// each.
pub fn onevision_config() -> Value {
    let sides = || (1..=6).map(|n| 56 * n);
    let pinpoints: Vec<_> = sides().flat_map(|h| sides().map(move |w| [h, w])).collect();
    json!({
        "model_type": "llava_onevision",
        "image_token_index": 260,
        "video_token_index": 261,
        "image_grid_pinpoints": pinpoints,
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14
        },
        "text_config": {
            "model_type": "qwen2", "vocab_size": 264, "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}
        }
    })
}

/// Creates a LLaVA-OneVision folder without weights. Its tokenizer has a token per byte (0 to 255),
/// `\n\n` (256), and the special tokens from 257 on.
pub fn onevision_folder() -> TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path();
    write(path, "config.json", &onevision_config());
    let processor = json!({"size": {"height": 56, "width": 56}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]});
    write(path, "preprocessor_config.json", &processor);
    write(
        path,
        "generation_config.json",
        &json!({"eos_token_id": [257, 259]}),
    );
    let mut alphabet: Vec<char> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet()
        .into_iter()
        .collect();
    alphabet.sort_unstable();
    let mut vocab: serde_json::Map<String, Value> = alphabet
        .iter()
        .enumerate()
        .map(|(id, byte)| (byte.to_string(), json!(id)))
        .collect();
    vocab.insert("ĊĊ".to_owned(), json!(256));
    let special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<image>",
        "<video>",
    ];
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added(257, &special),
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["Ċ", "Ċ"]]}
    });
    write(path, "tokenizer.json", &tokenizer);
    folder
}

pub fn llava_config() -> Value {
    json!({
        "model_type": "llava",
        "image_token_index": 100,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14
        },
        "text_config": {
            "model_type": "llama", "vocab_size": 104, "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2
        }
    })
}

/// Creates a LLaVA-1.5 folder without weights. Its tokenizer has a token per printable ASCII
/// character, `<s>` before every text, and a space before the first word of a whole text only, as
/// transformers 5 writes Llama's.
pub fn llava_folder() -> TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path();
    write(path, "config.json", &llava_config());
    let processor =
        json!({"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}});
    write(path, "preprocessor_config.json", &processor);
    let special = ["<unk>", "<s>", "</s>"];
    let tokens = special.iter().map(ToString::to_string);
    let tokens = tokens.chain(["<0x0A>".to_owned(), "▁".to_owned()]);
    let printable = ('!'..='~').map(String::from);
    let mut vocab: serde_json::Map<String, Value> = tokens
        .chain(printable)
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    vocab.insert("▁▁".to_owned(), json!(99));
    let mut added_tokens = added(0, &special);
    let image = added(100, &["<image>"]);
    added_tokens
        .as_array_mut()
        .expect("a list")
        .extend(image.as_array().expect("a list").iter().cloned());
    let metaspace =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    let begin = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added_tokens,
        "pre_tokenizer": metaspace,
        "post_processor": {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        ]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocab,
            "merges": [["▁", "▁"]]}
    });
    write(path, "tokenizer.json", &tokenizer);
    folder
}

/// Creates a LLaVA-RLHF reward model without weights. Its tokenizer marks the start of every piece,
/// as Llama's does, and has a token per printable ASCII character.
pub fn reward_folder() -> (TempDir, LlavaRlhfSpec) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let spec = LlavaRlhfSpec {
        caption_orders: std::num::NonZeroU32::MIN,
        base: folder.path().join("base"),
        vision: folder.path().join("vision"),
        adapter: Some(folder.path().join("adapter")),
        prompt: folder.path().join("prompt.txt"),
        device: DeviceSpec::Auto,
        dtype: Dtype::Auto,
        memory_gb: None,
        exam: None,
    };
    let adapter_folder = folder.path().join("adapter");
    for place in [&spec.base, &spec.vision, &adapter_folder] {
        std::fs::create_dir(place).expect("a new folder");
    }
    let base = json!({"model_type": "llava", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "torch_dtype": "bfloat16", "rope_scaling": null});
    write(&spec.base, "config.json", &base);
    let vision = json!({"model_type": "clip", "vision_config": {"model_type": "clip_vision_model", "hidden_size": 8,
        "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}});
    write(&spec.vision, "config.json", &vision);
    write(
        &spec.vision,
        "preprocessor_config.json",
        &json!({"size": 56, "crop_size": 56}),
    );
    let adapter = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 1, "bias": "none", "modules_to_save": null,
        "target_modules": ["q_proj", "v_proj"]});
    write(&adapter_folder, "adapter_config.json", &adapter);
    let request = "USER: Judge. {factual_prompt}\nASSISTANT: The score is\n";
    std::fs::write(&spec.prompt, request).expect("written");

    let special = ["<unk>", "<s>", "</s>"];
    let tokens = special.iter().map(ToString::to_string);
    let tokens = tokens.chain(["<0x0A>".to_owned(), "▁".to_owned()]);
    let printable = ('!'..='~').map(String::from);
    let vocab: serde_json::Map<String, Value> = tokens
        .chain(printable)
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added(0, &special),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        ]},
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocab, "merges": []}
    });
    write(&spec.base, "tokenizer.json", &tokenizer);
    (folder, spec)
}

/// Returns special tokens with ids from `first` on.
fn added(first: usize, tokens: &[&str]) -> Value {
    let token = |(index, token): (usize, &&str)| {
        json!({"id": first + index, "content": token, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    tokens.iter().enumerate().map(token).collect()
}

/// Writes out the tokens of [`onevision_folder`] and [`reward_folder`], special ones by name, and
/// feature placeholders as `[n]`.
pub fn shown(folder: &Path, ids: &[i64], feature: i64) -> String {
    let path = folder.join("tokenizer.json");
    let tokenizer = tokenizers::Tokenizer::from_file(path).expect("a tokenizer");
    let mut text = String::new();
    for run in ids.chunk_by(|left, right| (*left == feature) == (*right == feature)) {
        if run[0] == feature {
            write!(text, "[{}]", run.len()).expect("text grows");
            continue;
        }
        for &id in run {
            let token = tokenizer.id_to_token(id as u32).expect("a known token");
            text += &token
                .replace('Ċ', "\n")
                .replace('Ġ', " ")
                .replace("<0x0A>", "\n");
        }
    }
    text
}
