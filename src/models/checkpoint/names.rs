//! Names and shapes of LLaVA-OneVision's tensors in all layouts.
//!
//! The same tensor has four names in the wild: in the files of transformers 4.45 to 4.57, in those
//! of 5.x, in memory in transformers 5.x (which some third parties write), and in LLaVA-NeXT. Here
//! each has one canonical name, that of transformers' files without prefixes:
//! `vision_tower.encoder.layers.0.…`, `multi_modal_projector.linear_1.weight`, `image_newline`,
//! `language_model.model.layers.0.…`, `language_model.lm_head.weight`.

use std::collections::BTreeMap;

use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::{DecoderConfig, LlavaOnevisionConfig, VisionConfig};
use crate::checkpoint::shards::{Shards, TensorInfo};
use crate::{Layout, Part};

/// The names and shapes of tensors.
pub type Tensors = Vec<(String, Vec<usize>)>;

/// The prefixes of a decoder's tensor names.
const DECODER: [&str; 3] = ["embed_tokens.", "layers.", "norm."];

/// The projector's layers, by their numbers in LLaVA-NeXT and their names in transformers.
const PROJECTOR: [(&str, &str); 2] = [("0", "linear_1"), ("2", "linear_2")];

/// Returns the canonical name of a tensor, from its name in files or memory of transformers 4.45 to
/// 5.x or in LLaVA-NeXT.
pub fn canonical(name: &str) -> String {
    let name = name.strip_prefix("model.").unwrap_or(name);
    if let Some(rest) = name.strip_prefix("vision_tower.") {
        // LLaVA-NeXT wraps the tower of transformers in a module of its own.
        let rest = rest.strip_prefix("vision_tower.").unwrap_or(rest);
        let rest = rest.strip_prefix("vision_model.").unwrap_or(rest);
        return format!("vision_tower.{rest}");
    }
    for (number, layer) in PROJECTOR {
        if let Some(rest) = name.strip_prefix(&format!("mm_projector.{number}.")) {
            return format!("multi_modal_projector.{layer}.{rest}");
        }
    }
    match name.strip_prefix("language_model.") {
        Some(rest) if rest.starts_with("model.") || rest.starts_with("lm_head.") => name.to_owned(),
        // In memory, since 4.52 the decoder is `model.language_model`, without an inner `model`.
        Some(rest) => format!("language_model.model.{rest}"),
        None if name.starts_with("lm_head.") => format!("language_model.{name}"),
        // In LLaVA-NeXT the whole model is the decoder.
        None if DECODER.iter().any(|part| name.starts_with(part)) => {
            format!("language_model.model.{name}")
        }
        None => name.to_owned(),
    }
}

/// Returns the name in files of a layout of the tensor with this canonical name: that of
/// transformers 4.45 to 4.57, which 5.x reads as well, or LLaVA-NeXT's.
pub fn stored(canonical: &str, layout: Layout) -> String {
    let tower = canonical.strip_prefix("vision_tower.");
    let is_of_tower = tower.filter(|rest| !rest.starts_with("vision_model."));
    match (layout, is_of_tower) {
        (Layout::Transformers, Some(rest)) => format!("vision_tower.vision_model.{rest}"),
        (Layout::Transformers, None) => canonical.to_owned(),
        (Layout::LlavaNext, Some(rest)) => {
            format!("model.vision_tower.vision_tower.vision_model.{rest}")
        }
        (Layout::LlavaNext, None) => {
            for (number, layer) in PROJECTOR {
                let layer = format!("multi_modal_projector.{layer}.");
                if let Some(rest) = canonical.strip_prefix(&layer) {
                    return format!("model.mm_projector.{number}.{rest}");
                }
            }
            match canonical.strip_prefix("language_model.") {
                Some(rest) => rest.to_owned(),
                None => format!("model.{canonical}"),
            }
        }
    }
}

/// Returns the part of a network that the tensor with this canonical name belongs to.
pub fn part_of(name: &str) -> Part {
    if name.starts_with("vision_tower.") {
        Part::VisionTower
    } else if name.contains("projector.") {
        Part::Projector
    } else if name == "image_newline" {
        Part::Newline
    } else {
        Part::LanguageModel
    }
}

impl LlavaOnevisionConfig {
    /// Returns the canonical name and the shape of every tensor that the network needs, in the
    /// order of the forward pass.
    pub fn tensors(&self) -> Tensors {
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize]| tensors.push((name, shape.to_vec()));
        let used = self.vision_feature_layer.iter().max().copied().unwrap_or(0);
        siglip(&self.vision_config, used, "vision_tower.", &mut add);
        let hidden = self.text_config.hidden_size;
        let bias = self.multimodal_projector_bias;
        projector(hidden, self.feature_size(), bias, &mut add);
        add("image_newline".to_owned(), &[hidden]);
        decoder_with_head(&self.text_config, &mut add);
        tensors
    }
}

/// Adds the names and shapes of the projector's two layers.
pub(crate) fn projector(
    hidden: usize,
    features: usize,
    bias: bool,
    add: &mut impl FnMut(String, &[usize]),
) {
    for (layer, input) in [("linear_1", features), ("linear_2", hidden)] {
        add(
            format!("multi_modal_projector.{layer}.weight"),
            &[hidden, input],
        );
        if bias {
            add(format!("multi_modal_projector.{layer}.bias"), &[hidden]);
        }
    }
}

/// Adds the names and shapes of a decoder and of its head, unless that is tied to the embedding.
pub(crate) fn decoder_with_head(config: &DecoderConfig, add: &mut impl FnMut(String, &[usize])) {
    decoder(config, "language_model.model", add);
    if !config.tie_word_embeddings {
        add(
            "language_model.lm_head.weight".to_owned(),
            &[config.vocab_size, config.hidden_size],
        );
    }
}

/// Adds the names below `tower` and the shapes of the embeddings and the first `used` layers of
/// SigLIP. The post-layernorm is not used, so it is not required.
pub(crate) fn siglip(
    config: &VisionConfig,
    used: usize,
    tower: &str,
    add: &mut impl FnMut(String, &[usize]),
) {
    let (hidden, patch) = (config.hidden_size, config.patch_size);
    let embeddings = format!("{tower}embeddings");
    add(
        format!("{embeddings}.patch_embedding.weight"),
        &[hidden, config.num_channels, patch, patch],
    );
    add(format!("{embeddings}.patch_embedding.bias"), &[hidden]);
    add(
        format!("{embeddings}.position_embedding.weight"),
        &[config.patches(), hidden],
    );
    encoder(config, used, tower, add);
}

/// Adds the names below `tower` and the shapes of the embeddings and the first `used` layers of
/// CLIP.
pub(crate) fn clip(
    config: &VisionConfig,
    used: usize,
    tower: &str,
    add: &mut impl FnMut(String, &[usize]),
) {
    let (hidden, patch) = (config.hidden_size, config.patch_size);
    let embeddings = format!("{tower}embeddings");
    add(format!("{embeddings}.class_embedding"), &[hidden]);
    add(
        format!("{embeddings}.patch_embedding.weight"),
        &[hidden, config.num_channels, patch, patch],
    );
    add(
        format!("{embeddings}.position_embedding.weight"),
        &[config.patches() + 1, hidden],
    );
    for part in ["weight", "bias"] {
        add(format!("{tower}pre_layrnorm.{part}"), &[hidden]);
    }
    encoder(config, used, tower, add);
}

/// Checks, by the headers, that the files contain every required tensor once and in the right
/// shape.
pub(crate) fn check(tensors: &Tensors, shards: &Shards) -> Result<(), CheckpointError> {
    let mut found = BTreeMap::new();
    for name in shards.names() {
        if let Some(other) = found.insert(canonical(name), name) {
            let problem =
                format!("contains both `{other}` and `{name}`, which are two names of one tensor");
            return Err(CheckpointError::new(shards.path(), problem));
        }
    }
    // A checkpoint may omit a head that equals the embedding, even without declaring it.
    let optional = "language_model.lm_head.weight";
    for (name, shape) in tensors {
        let Some(tensor) = found.get(name).and_then(|stored| shards.info(stored)) else {
            if name == optional {
                continue;
            }
            return Err(CheckpointError::new(
                shards.path(),
                format!("missing tensor `{name}`"),
            ));
        };
        has_shape(&tensor, name, shape)?;
    }
    Ok(())
}

/// Adds the names below `model` and the shapes of a decoder's tensors, without its head: Qwen2 or
/// Llama.
pub(super) fn decoder(config: &DecoderConfig, model: &str, add: &mut impl FnMut(String, &[usize])) {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    add(
        format!("{model}.embed_tokens.weight"),
        &[config.vocab_size, hidden],
    );
    for layer in 0..config.num_hidden_layers {
        let layer = format!("{model}.layers.{layer}");
        add(format!("{layer}.input_layernorm.weight"), &[hidden]);
        for (part, output) in [("q", queries), ("k", keys), ("v", keys)] {
            let part = format!("{layer}.self_attn.{part}_proj");
            add(format!("{part}.weight"), &[output, hidden]);
            if config.qkv_bias {
                add(format!("{part}.bias"), &[output]);
            }
        }
        add(
            format!("{layer}.self_attn.o_proj.weight"),
            &[hidden, queries],
        );
        add(
            format!("{layer}.post_attention_layernorm.weight"),
            &[hidden],
        );
        for (part, output, input) in [
            ("gate", inner, hidden),
            ("up", inner, hidden),
            ("down", hidden, inner),
        ] {
            add(format!("{layer}.mlp.{part}_proj.weight"), &[output, input]);
        }
    }
    add(format!("{model}.norm.weight"), &[hidden]);
}

/// Adds the names below `tower` and the shapes of the first `used` layers of SigLIP or CLIP.
pub(super) fn encoder(
    config: &VisionConfig,
    used: usize,
    tower: &str,
    add: &mut impl FnMut(String, &[usize]),
) {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    for layer in 0..used {
        let layer = format!("{tower}encoder.layers.{layer}");
        for norm in ["layer_norm1", "layer_norm2"] {
            add(format!("{layer}.{norm}.weight"), &[hidden]);
            add(format!("{layer}.{norm}.bias"), &[hidden]);
        }
        for part in ["q", "k", "v", "out"] {
            let part = format!("{layer}.self_attn.{part}_proj");
            add(format!("{part}.weight"), &[hidden, hidden]);
            add(format!("{part}.bias"), &[hidden]);
        }
        for (part, output, input) in [("fc1", inner, hidden), ("fc2", hidden, inner)] {
            add(format!("{layer}.mlp.{part}.weight"), &[output, input]);
            add(format!("{layer}.mlp.{part}.bias"), &[output]);
        }
    }
}

/// Checks that a stored tensor has the shape that the model config requires.
pub(super) fn has_shape(
    tensor: &TensorInfo<'_>,
    name: &str,
    shape: &[usize],
) -> Result<(), CheckpointError> {
    let wanted = shape.iter().map(|&size| size as i64);
    if wanted.eq(tensor.shape.iter().copied()) {
        return Ok(());
    }
    let problem = format!(
        "tensor `{name}` has shape {:?}, but config.json requires {shape:?}",
        tensor.shape
    );
    Err(CheckpointError::new(tensor.file, problem))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::test_util::onevision_folder;

    #[test]
    fn the_names_of_every_version_become_one() {
        let names = [
            ("model.image_newline", "image_newline"),
            (
                "model.multi_modal_projector.linear_1.bias",
                "multi_modal_projector.linear_1.bias",
            ),
            (
                "vision_tower.vision_model.embeddings.patch_embedding.bias",
                "vision_tower.embeddings.patch_embedding.bias",
            ),
            (
                "model.vision_tower.vision_model.post_layernorm.bias",
                "vision_tower.post_layernorm.bias",
            ),
            (
                "vision_tower.post_layernorm.bias",
                "vision_tower.post_layernorm.bias",
            ),
            (
                "language_model.model.norm.weight",
                "language_model.model.norm.weight",
            ),
            (
                "model.language_model.norm.weight",
                "language_model.model.norm.weight",
            ),
            ("lm_head.weight", "language_model.lm_head.weight"),
            (
                "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
                "vision_tower.encoder.layers.0.mlp.fc1.bias",
            ),
            (
                "model.mm_projector.2.bias",
                "multi_modal_projector.linear_2.bias",
            ),
            (
                "model.layers.0.mlp.up_proj.weight",
                "language_model.model.layers.0.mlp.up_proj.weight",
            ),
            ("model.norm.weight", "language_model.model.norm.weight"),
            (
                "language_model.lm_head.weight",
                "language_model.lm_head.weight",
            ),
        ];
        for (name, expected) in names {
            assert_eq!(canonical(name), expected);
        }
    }

    #[test]
    fn every_layout_has_one_name_for_each_tensor() {
        let folder = onevision_folder();
        let config = LlavaOnevisionConfig::open(folder.path()).unwrap();
        let unused = "vision_tower.post_layernorm.weight".to_owned();
        let names = config.tensors().into_iter().map(|(name, _)| name);
        for name in names.chain([unused]) {
            for layout in [Layout::Transformers, Layout::LlavaNext] {
                assert_eq!(canonical(&stored(&name, layout)), name, "{layout:?}");
            }
        }
        let norm = stored("language_model.model.norm.weight", Layout::LlavaNext);
        assert_eq!(norm, "model.norm.weight");
        let head = stored("language_model.lm_head.weight", Layout::LlavaNext);
        assert_eq!(head, "lm_head.weight");
    }

    /// Returns the tensors that `config` requires, as a file might contain them.
    fn tensors(config: &LlavaOnevisionConfig) -> BTreeMap<String, Vec<i64>> {
        let size = |shape: Vec<usize>| shape.into_iter().map(|size| size as i64).collect();
        let tensors = config.tensors().into_iter();
        tensors.map(|(name, shape)| (name, size(shape))).collect()
    }

    fn check(
        config: &LlavaOnevisionConfig,
        tensors: &BTreeMap<String, Vec<i64>>,
    ) -> Result<(), CheckpointError> {
        super::check(&config.tensors(), &Shards::of(Path::new("folder"), tensors))
    }

    #[test]
    fn a_missing_or_misshapen_tensor_is_named() {
        let folder = onevision_folder();
        let config = LlavaOnevisionConfig::open(folder.path()).unwrap();
        let whole = tensors(&config);
        check(&config, &whole).unwrap();

        let name = "language_model.model.layers.1.self_attn.k_proj.weight";
        assert_eq!(whole[name], [4, 8], "two heads of two");
        let mut missing = whole.clone();
        missing.remove(name);
        let diagnostic = check(&config, &missing).unwrap_err();
        assert_eq!(diagnostic.problem, format!("missing tensor `{name}`"));

        for shape in [vec![8, 4], vec![4], vec![4, 8, 1]] {
            let mut misshapen = whole.clone();
            let expected = format!("has shape {shape:?}, but config.json requires [4, 8]");
            misshapen.insert(name.to_owned(), shape);
            let diagnostic = check(&config, &misshapen).unwrap_err();
            assert!(diagnostic.problem.contains(&expected), "{diagnostic}");
        }
    }

    #[test]
    fn a_head_may_be_left_out_but_no_tensor_may_come_twice() {
        let folder = onevision_folder();
        let config = LlavaOnevisionConfig::open(folder.path()).unwrap();
        let mut tensors = tensors(&config);
        let head = tensors.remove("language_model.lm_head.weight").unwrap();
        check(&config, &tensors).unwrap();
        tensors.insert("lm_head.weight".to_owned(), head.clone());
        check(&config, &tensors).unwrap();
        tensors.insert("model.lm_head.weight".to_owned(), head);
        let diagnostic = check(&config, &tensors).unwrap_err();
        assert!(diagnostic.problem.contains("two names of one tensor"));
    }
}
