//! The vision tower of a LLaVA-NeXT checkpoint, whose config names it but does not contain its
//! sizes.
//!
//! Most sizes follow from shapes of the weights. The rest (heads, pixels, epsilon) are those of the
//! tower that `mm_vision_tower` names: a folder with a `config.json`, or one of the towers known
//! here.

use std::path::Path;

use super::VisionConfig;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::json::JsonConfig;
use crate::checkpoint::names::canonical;
use crate::checkpoint::shards::Shards;

/// Known towers by the end of their names, with all their layers (huggingface.co, `config.json` of
/// each).
pub const KNOWN: [(&str, VisionConfig); 1] = [(
    "siglip-so400m-patch14-384",
    VisionConfig {
        num_hidden_layers: 27,
        ..VisionConfig::SIGLIP_SO400M
    },
)];

/// Reads the sizes of the tower of `folder`, and the number of its layers that run: LLaVA-NeXT
/// drops the last layer of a SigLIP, regardless of `mm_vision_select_layer`, and stores the others
/// (`llava/model/multimodal_encoder/siglip_encoder.py`).
pub(super) fn read(
    folder: &Path,
    file: &JsonConfig,
) -> Result<(VisionConfig, usize), CheckpointError> {
    const KEY: &str = "mm_vision_tower";
    let name = file
        .text(KEY)?
        .ok_or_else(|| file.fault(KEY, "is missing"))?;
    let named = named(folder, name)?.ok_or_else(|| {
        let known = KNOWN.map(|(name, _)| format!("google/{name}")).join(", ");
        let problem = format!(
            "is `{name}`, which is not a known tower (known: {known}); set it to the path of a folder \
             with the tower's config.json"
        );
        file.fault(KEY, problem)
    })?;
    let used = named.num_hidden_layers - 1;
    let shards = Shards::open(folder)?;
    let stored = stored(&shards)?;
    let same = |model_config: &VisionConfig| {
        let VisionConfig {
            hidden_size,
            intermediate_size,
            patch_size,
            ..
        } = *model_config;
        (
            hidden_size,
            intermediate_size,
            patch_size,
            model_config.patches(),
        )
    };
    if same(&named) != stored.sizes || stored.layers < used {
        let problem = format!(
            "is `{name}`, which has {used} layers without the last and the sizes {:?} (hidden, \
             intermediate, patch, patches), but the weights have {} layers and {:?}",
            same(&named),
            stored.layers,
            stored.sizes
        );
        return Err(file.fault(KEY, problem));
    }
    let model_config = VisionConfig {
        num_hidden_layers: stored.layers,
        ..named
    };
    Ok((model_config, used))
}

/// Returns the tower of this name, with all its layers.
fn named(folder: &Path, name: &str) -> Result<Option<VisionConfig>, CheckpointError> {
    let config = folder.join(name).join("config.json");
    if config.is_file() {
        let file = JsonConfig::open(&config)?;
        // A complete SigLIP config nests the tower's config.
        let vision = file.section("vision_config")?.unwrap_or(file);
        vision.only("model_type", "siglip_vision_model")?;
        return VisionConfig::read(&vision, VisionConfig::SIGLIP).map(Some);
    }
    let known = KNOWN.into_iter().find(|(end, _)| name.ends_with(end));
    Ok(known.map(|(_, model_config)| model_config))
}

/// Sizes that follow from the shapes of the weights.
struct Stored {
    /// Hidden size, intermediate size, side of a patch in pixels, number of patches.
    sizes: (usize, usize, usize, usize),
    layers: usize,
}

fn stored(shards: &Shards) -> Result<Stored, CheckpointError> {
    let shape = |wanted: &str| {
        let wanted = format!("vision_tower.{wanted}");
        let name = shards.names().find(|name| canonical(name) == wanted);
        let info = name.and_then(|name| shards.info(name));
        info.map(|info| info.shape).ok_or_else(|| {
            let problem = format!(
                "missing tensor `model.vision_tower.{wanted}`: the checkpoint keeps its tower in \
                 another folder; merge the tower's weights into it"
            );
            CheckpointError::new(shards.path(), problem)
        })
    };
    let size =
        |name: &str, axis: usize| Ok(shape(name)?.get(axis).map_or(0, |&size| size as usize));
    let is_layer = |name: &&str| {
        let name = canonical(name);
        name.starts_with("vision_tower.encoder.layers.") && name.ends_with(".layer_norm1.weight")
    };
    Ok(Stored {
        sizes: (
            size("embeddings.patch_embedding.weight", 0)?,
            size("encoder.layers.0.mlp.fc1.weight", 0)?,
            size("embeddings.patch_embedding.weight", 2)?,
            size("embeddings.position_embedding.weight", 0)?,
        ),
        layers: shards.names().filter(is_layer).count(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tempfile::TempDir;

    use crate::Layout;
    use crate::checkpoint::config::LlavaOnevisionConfig;
    use crate::test_util::{shard, write};

    /// Writes LLaVA-NeXT's files with a tower of four layers, three of which are stored; the
    /// tower's config is in the folder `tower`.
    fn folder(change: impl FnOnce(&mut Value)) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut config = json!({
            "model_type": "llava", "mm_vision_tower": "tower", "mm_projector_type": "mlp2x_gelu",
            "mm_patch_merge_type": "spatial_unpad", "mm_vision_select_layer": -2, "rope_scaling": null,
            "mm_resampler_type": null, "image_aspect_ratio": "anyres_max_4", "vocab_size": 264,
            "image_grid_pinpoints": [[30, 60], [30, 90]], "hidden_size": 8, "num_attention_heads": 4,
            "num_key_value_heads": 2, "tie_word_embeddings": true
        });
        change(&mut config);
        write(folder.path(), "config.json", &config);
        let tower = folder.path().join("tower");
        std::fs::create_dir(&tower).unwrap();
        let sizes = json!({"vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 30, "patch_size": 14
        }});
        write(&tower, "config.json", &sizes);
        let name = |name: &str| format!("model.vision_tower.vision_tower.vision_model.{name}");
        let mut tensors: Vec<(String, &[usize])> = vec![
            (name("embeddings.patch_embedding.weight"), &[8, 3, 14, 14]),
            (name("embeddings.position_embedding.weight"), &[4, 8]),
            (name("encoder.layers.0.mlp.fc1.weight"), &[16, 8]),
        ];
        let norm = |layer: usize| name(&format!("encoder.layers.{layer}.layer_norm1.weight"));
        tensors.extend((0..3).map(|layer| (norm(layer), [8].as_slice())));
        let tensors: Vec<(&str, &[usize])> = tensors
            .iter()
            .map(|(name, shape)| (name.as_str(), *shape))
            .collect();
        shard(&folder.path().join("model.safetensors"), &tensors);
        folder
    }

    #[test]
    fn the_tower_is_that_of_the_weights_and_of_its_name() {
        let model_config = LlavaOnevisionConfig::open(folder(|_| ()).path()).unwrap();
        assert_eq!(model_config.layout, Layout::LlavaNext);
        assert_eq!(model_config.vision_feature_layer, [3]);
        assert_eq!(model_config.vision_config.num_hidden_layers, 3);
        assert_eq!(model_config.vision_config.image_size, 30);
        assert_eq!(model_config.image_grid_pinpoints, [[60, 30], [90, 30]]);
        assert_eq!(
            (model_config.anyres_max, model_config.tie_word_embeddings),
            (4, true)
        );
        assert_eq!(
            model_config.image_token_index, 264,
            "an id that no token has"
        );
    }

    #[test]
    fn a_tower_that_is_not_that_of_the_weights_is_refused() {
        let diagnostic = |tower: &str| {
            let folder = folder(|config| config["mm_vision_tower"] = json!(tower));
            LlavaOnevisionConfig::open(folder.path())
                .unwrap_err()
                .to_string()
        };
        let unknown = diagnostic("google/other");
        assert!(
            unknown.contains("known: google/siglip-so400m-patch14-384"),
            "{unknown}"
        );
        let known = diagnostic("google/siglip-so400m-patch14-384");
        assert!(known.contains("(1152, 4304, 14, 729)"), "{known}");
        assert!(known.contains("3 layers and (8, 16, 14, 4)"), "{known}");
    }

    #[test]
    fn what_llava_next_can_do_and_the_network_can_not_is_refused() {
        for (key, value) in [
            ("mm_projector_type", json!("linear")),
            ("mm_use_im_start_end", json!(true)),
            ("mm_resampler_type", json!("qformer")),
            ("image_aspect_ratio", json!("pad")),
        ] {
            let folder = folder(|config| config[key] = value);
            let diagnostic = LlavaOnevisionConfig::open(folder.path())
                .unwrap_err()
                .to_string();
            assert!(diagnostic.contains(&format!("`{key}`")), "{diagnostic}");
        }
    }
}
