//! Vision tower configs: SigLIP of LLaVA-OneVision and CLIP of LLaVA-RLHF.

use crate::checkpoint::CheckpointError;
use crate::checkpoint::json::JsonConfig;

/// The activation function of a vision tower's MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// GELU with the tanh approximation (`gelu_pytorch_tanh`): SigLIP.
    GeluTanh,
    /// `x * sigmoid(1.702 x)` (`quick_gelu`): CLIP.
    QuickGelu,
}

impl Activation {
    /// Returns the name in `hidden_act`.
    fn name(self) -> &'static str {
        match self {
            Self::GeluTanh => "gelu_pytorch_tanh",
            Self::QuickGelu => "quick_gelu",
        }
    }
}

/// Sizes of a vision tower, SigLIP or CLIP.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VisionConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    /// Number of layers that the checkpoint stores.
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_channels: usize,
    /// Side of the square input, in pixels.
    pub image_size: usize,
    /// Side of a square patch, in pixels.
    pub patch_size: usize,
    pub hidden_act: Activation,
    pub layer_norm_eps: f64,
}

impl VisionConfig {
    /// Defaults of `SiglipVisionConfig`.
    pub const SIGLIP: Self = Self {
        hidden_size: 768,
        intermediate_size: 3072,
        num_hidden_layers: 12,
        num_attention_heads: 12,
        num_channels: 3,
        image_size: 224,
        patch_size: 16,
        hidden_act: Activation::GeluTanh,
        layer_norm_eps: 1e-6,
    };

    /// The default tower of `LlavaOnevisionConfig`, for configs without `vision_config`.
    pub const SIGLIP_SO400M: Self = Self {
        hidden_size: 1152,
        intermediate_size: 4304,
        num_hidden_layers: 26,
        num_attention_heads: 16,
        image_size: 384,
        patch_size: 14,
        ..Self::SIGLIP
    };

    /// Defaults of `CLIPVisionConfig`.
    pub const CLIP: Self = Self {
        patch_size: 32,
        hidden_act: Activation::QuickGelu,
        layer_norm_eps: 1e-5,
        ..Self::SIGLIP
    };

    /// The default tower of `LlavaConfig`, for configs without `vision_config`.
    pub const CLIP_LARGE_336: Self = Self {
        hidden_size: 1024,
        intermediate_size: 4096,
        num_hidden_layers: 24,
        num_attention_heads: 16,
        image_size: 336,
        patch_size: 14,
        ..Self::CLIP
    };

    /// Returns the number of patches per side of the input. The convolution drops the rest on the
    /// right and at the bottom.
    pub fn patches_per_side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Returns the number of patches of the input.
    pub fn patches(&self) -> usize {
        self.patches_per_side().pow(2)
    }

    /// Reads a tower's config; omitted keys have the values in `defaults`.
    pub(crate) fn read(file: &JsonConfig, defaults: Self) -> Result<Self, CheckpointError> {
        file.only("hidden_act", defaults.hidden_act.name())?;
        let size = |key, default| Ok(file.size(key)?.unwrap_or(default));
        let config = Self {
            hidden_size: size("hidden_size", defaults.hidden_size)?,
            intermediate_size: size("intermediate_size", defaults.intermediate_size)?,
            num_hidden_layers: size("num_hidden_layers", defaults.num_hidden_layers)?,
            num_attention_heads: size("num_attention_heads", defaults.num_attention_heads)?,
            num_channels: size("num_channels", defaults.num_channels)?,
            image_size: size("image_size", defaults.image_size)?,
            patch_size: size("patch_size", defaults.patch_size)?,
            hidden_act: defaults.hidden_act,
            layer_norm_eps: file
                .positive("layer_norm_eps")?
                .unwrap_or(defaults.layer_norm_eps),
        };
        if !config
            .hidden_size
            .is_multiple_of(config.num_attention_heads)
        {
            let problem = format!("does not divide hidden_size {}", config.hidden_size);
            return Err(file.fault("num_attention_heads", problem));
        }
        if config.image_size < config.patch_size {
            let problem = format!("is smaller than patch_size {}", config.patch_size);
            return Err(file.fault("image_size", problem));
        }
        if config.num_channels != 3 {
            return Err(file.fault("num_channels", "must be 3: images are RGB"));
        }
        Ok(config)
    }

    /// Converts indices into `hidden_states` (entry 0 is the embedding, entry n the output of layer
    /// n; negative ones count from the end) to numbers of layers to run.
    pub(crate) fn layers(
        &self,
        file: &JsonConfig,
        key: &str,
        indices: &[i64],
    ) -> Result<Vec<usize>, CheckpointError> {
        let states = self.num_hidden_layers as i64 + 1;
        let layer = |&index: &i64| {
            let from_start = if index < 0 {
                index.saturating_add(states)
            } else {
                index
            };
            (0..states)
                .contains(&from_start)
                .then_some(from_start as usize)
                .ok_or_else(|| {
                    let layers = self.num_hidden_layers;
                    file.fault(
                        key,
                        format!("refers to layer {index}, but the tower has {layers} layers"),
                    )
                })
        };
        indices.iter().map(layer).collect()
    }
}
