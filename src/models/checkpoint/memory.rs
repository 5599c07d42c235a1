//! Memory estimates of networks in bytes, computed from their configs alone before anything is
//! loaded.

use crate::architecture::Architecture;
use crate::checkpoint::config::{DecoderConfig, LlavaRlhfConfig, VisionConfig};
use crate::checkpoint::names::part_of;
use crate::{Optimizer, Room, Tower, Trained};

/// Float32 copies of a row's logits that exist at the same time while a token is sampled.
const LOGITS_COPIES: u64 = 6;

/// Float32 copies of the logits of a target token in training: the logits, their log-softmax, and
/// the gradients of both.
const LEARNED_LOGITS_COPIES: u64 = 4;

/// Bytes of a float32 number.
const WHOLE: u64 = 4;

/// Maximum number of images decoded in parallel, one per thread.
pub const IMAGES_AT_ONCE_MAX: usize = 8;

/// Number of decoded images that wait for the network, in addition to those being decoded.
pub const IMAGES_AHEAD: usize = 2;

/// Returns the maximum length of a packed batch in training, in tokens, unless a single row is longer.
/// Small matrix products leave a processor idle; the activations of this many tokens are no larger
/// than those of one large image.
pub const fn pack_tokens_max(on_gpu: bool) -> usize {
    if on_gpu { 8192 } else { 2048 }
}

/// Formats a number of bytes with its unit: `2.8 MB`.
pub fn size_in_words(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes >= 1e8 => format!("{:.1} GB", bytes / 1e9),
        bytes if bytes >= 1e5 => format!("{:.1} MB", bytes / 1e6),
        bytes => format!("{:.0} KB", bytes / 1e3),
    }
}

/// Batch limits of sampling and scoring for a given amount of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtOnce {
    /// Maximum number of answers decoded in one batch; more would hardly lower the cost per answer.
    pub rows: usize,
    /// Maximum number of prompt and answer tokens in the KV cache.
    pub tokens: usize,
    /// Maximum number of tokens in a prefill batch, unless a single prompt is longer.
    pub read_tokens: usize,
}

impl AtOnce {
    pub fn in_room(room: Room, sizes: Sizes) -> Self {
        let (rows, read_tokens) = if room.on_gpu { (256, 8192) } else { (64, 2048) };
        let beside_weights = room.bytes.saturating_sub(sizes.weights);
        // Rows may use a quarter of the rest, but at least one prompt's rows always run.
        let rows = rows.min(beside_weights / 4 / sizes.row.max(1)).max(1);
        let working = rows * sizes.row + read_tokens * sizes.read;
        let tokens = beside_weights.saturating_sub(working) / sizes.token.max(1);
        Self {
            rows: rows as usize,
            tokens: tokens as usize,
            read_tokens: read_tokens as usize,
        }
    }
}

/// Memory of sampling and scoring, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    pub weights: u64,
    /// KV cache of one token in all layers.
    pub token: u64,
    /// Activations of one token during prefill.
    pub read: u64,
    /// Memory of one answer during a decoding step, in addition to the KV cache.
    pub row: u64,
}

impl Sizes {
    /// Computes the sizes for a decoder with `element` bytes per number, in a network of `elements`
    /// weights.
    pub fn new(elements: u64, config: &DecoderConfig, element: u64) -> Self {
        let size = |length: usize| length as u64 * element;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = 2 * config.num_key_value_heads * config.head_dim;
        let token =
            2 * size(config.num_hidden_layers * config.num_key_value_heads * config.head_dim);
        // On a CPU, a packed head is a copy of a tied embedding.
        let packed = match config.tie_word_embeddings && element == WHOLE {
            true => (config.vocab_size * config.hidden_size) as u64,
            false => 0,
        };
        Self {
            weights: (elements + packed) * element,
            token,
            // The embedding, the input of a layer and of its MLP, and their norms; keys and values; the
            // larger of what attention and MLP need: queries with five tensors of the rotary embedding,
            // or gate, up projection and their product. And keys and values of all layers, until they
            // are in the cache.
            read: token
                + size(
                    5 * config.hidden_size
                        + keys
                        + (6 * queries + keys).max(3 * config.intermediate_size),
                ),
            row: LOGITS_COPIES * config.vocab_size as u64 * WHOLE,
        }
    }
}

/// Memory of training, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainingSizes {
    /// Weights: those being trained in float32, the others in the compute dtype.
    pub weights: u64,
    pub gradients: u64,
    /// Optimizer state.
    pub moments: u64,
    /// Saved activations per token in the decoder and per tile in the tower.
    pub token: u64,
    pub tile: u64,
    /// Saved activations per token and per tile if only the inputs of layers are saved and the rest
    /// is recomputed.
    pub token_inputs: u64,
    pub tile_inputs: u64,
    /// Saved activations per tile in one layer of the tower.
    tile_layer: u64,
    /// Gradients of activations per token in one layer, while its backward pass runs.
    flowing: u64,
    layers: u64,
    /// Copies of the trained weights in the compute dtype, if it is another one: a pass whose
    /// activations are saved keeps those of all layers.
    copies: u64,
    /// The largest trained weight's copy and gradients, before they are added to its own.
    working: u64,
}

impl TrainingSizes {
    /// Computes the sizes for a policy of which `trained` is trained, with `element` bytes per
    /// number in the compute dtype.
    ///
    /// Saved activations were counted operation by operation: inputs and results of norms (two of
    /// them in float32 for any compute dtype), queries, keys and values before and after rotary
    /// embedding, the output of attention, gates and their products.
    pub fn new(
        architecture: &dyn Architecture,
        trained: &Trained,
        optimizer: Optimizer,
        element: u64,
    ) -> Self {
        let all = elements(architecture);
        let learned = learned(architecture, trained);
        let frozen = match trained {
            Trained::Parts(_) => all - learned,
            Trained::Lora(_) => all,
        };
        let has_tower = matches!(trained, Trained::Parts(parts)
            if parts.iter().any(|(part, _)| *part == crate::Part::VisionTower));
        let tower = (
            architecture.vision_config(),
            if has_tower {
                architecture.tower_layers()
            } else {
                0
            },
        );
        Self::of(
            architecture.text_config(),
            tower,
            [frozen, learned],
            optimizer,
            element,
        )
    }

    /// Computes the sizes for SFT of a policy, with or without its tower.
    pub fn of_sft(architecture: &dyn Architecture, tower: Tower, element: u64) -> Self {
        let parts = architecture.parts().iter().copied();
        let parts = parts.filter(|part| tower == Tower::Train || *part != crate::Part::VisionTower);
        let trained = Trained::Parts(parts.map(|part| (part, None)).collect());
        Self::new(architecture, &trained, Optimizer::Adamw, element)
    }

    /// Computes the sizes for SFT of a reward model's base, with or without its tower.
    pub fn of_base(config: &LlavaRlhfConfig, tower: Tower, element: u64) -> Self {
        let (text, vision) = (&config.text_config, &config.vision_config);
        let head = (text.vocab_size * text.hidden_size) as u64;
        let all = judge_elements(config) + head;
        let (layers, frozen) = match tower {
            Tower::Train => (config.mm_vision_select_layer, 0),
            Tower::Freeze => (0, vision_elements(vision, config.mm_vision_select_layer)),
        };
        Self::of(
            text,
            (vision, layers),
            [frozen, all - frozen],
            Optimizer::Adamw,
            element,
        )
    }

    /// Computes the sizes for training a reward head and an adapter of this rank on all linear
    /// layers of a reward model's base, which is frozen.
    pub fn of_adapter(config: &LlavaRlhfConfig, rank: usize, element: u64) -> Self {
        let text = &config.text_config;
        let (hidden, inner) = (text.hidden_size, text.intermediate_size);
        let queries = text.num_attention_heads * text.head_dim;
        let keys = text.num_key_value_heads * text.head_dim;
        // Inputs and outputs of q, k, v, o, gate, up and down.
        let sides = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner);
        let of_rank = product((text.num_hidden_layers * sides) as u64, rank);
        let learned = of_rank.saturating_add(hidden as u64 + 1);
        let weights = [judge_elements(config), learned];
        Self::of(
            text,
            (&config.vision_config, 0),
            weights,
            Optimizer::Adamw,
            element,
        )
    }

    /// Computes the sizes. `tower` gives the number of trained layers of the tower, `weights` the
    /// numbers of frozen and of trained weights.
    fn of(
        text: &DecoderConfig,
        tower: (&VisionConfig, usize),
        weights: [u64; 2],
        optimizer: Optimizer,
        element: u64,
    ) -> Self {
        let [frozen, learned] = weights;
        let (vision, tower_layers) = tower;
        let heads = text.num_attention_heads + 2 * text.num_key_value_heads;
        let of_layer = element
            * (4 * text.hidden_size
                + (2 * heads + text.num_attention_heads) * text.head_dim
                + 4 * text.intermediate_size) as u64
            + 4 * WHOLE * text.hidden_size as u64;
        // Head and embedding, or the weights of a layer.
        let largest = (text.vocab_size * text.hidden_size) as u64;
        let of_layers = decoder_elements(text).saturating_sub(2 * largest);
        let largest = largest.max(of_layers / text.num_hidden_layers.max(1) as u64);
        let copied = if element < WHOLE { element } else { 0 };
        let tile = |of_patch: usize| element * (of_patch * tower_layers * vision.patches()) as u64;
        let layers = text.num_hidden_layers as u64;
        Self {
            weights: (frozen * element).saturating_add(learned.saturating_mul(WHOLE)),
            gradients: learned.saturating_mul(WHOLE),
            moments: learned.saturating_mul(match optimizer {
                Optimizer::Adamw => 2 * WHOLE,
                Optimizer::Adamw8bit => 2,
            }),
            token: layers * of_layer,
            tile: tile(8 * vision.hidden_size + 2 * vision.intermediate_size),
            token_inputs: layers * element * text.hidden_size as u64,
            tile_inputs: tile(vision.hidden_size),
            tile_layer: tile(8 * vision.hidden_size + 2 * vision.intermediate_size)
                / tower_layers.max(1) as u64,
            // Those of gate, its activation, up projection and their product; of input, norms and sum.
            flowing: element * 4 * (text.intermediate_size + text.hidden_size) as u64,
            layers,
            copies: learned.saturating_mul(copied),
            working: largest.min(learned).saturating_mul(WHOLE + 2 * copied),
        }
    }

    /// Returns the bytes of weights, gradients and optimizer state.
    pub fn state(&self) -> u64 {
        let sums = self.weights.saturating_add(self.gradients);
        sums.saturating_add(self.moments)
    }

    /// True if a pass over this many tokens and tiles fits in memory with all activations saved.
    pub fn has_room(&self, bytes: u64, tokens: usize, tiles: usize) -> bool {
        self.state().saturating_add(self.remembered(tokens, tiles)) <= bytes
    }

    /// True if the copies of all trained weights in the compute dtype fit in memory beside a pass over
    /// this many tokens and tiles that recomputes its layers.
    pub fn has_room_for_copies(&self, bytes: u64, tokens: usize, tiles: usize) -> bool {
        let pass = self.computed_again(tokens, tiles);
        self.state()
            .saturating_add(pass)
            .saturating_add(self.copies)
            <= bytes
    }

    /// Returns the bytes of activations of a pass over this many tokens and tiles, all saved.
    pub fn remembered(&self, tokens: usize, tiles: usize) -> u64 {
        let activations = product(self.token, tokens).saturating_add(product(self.tile, tiles));
        let flowing = product(self.flowing, tokens);
        let beside = self.copies.saturating_add(self.working);
        activations.saturating_add(flowing).saturating_add(beside)
    }

    /// Returns the bytes of activations of a pass that saves layer inputs only and recomputes one
    /// layer at a time in the backward pass.
    pub fn computed_again(&self, tokens: usize, tiles: usize) -> u64 {
        let inputs = product(self.token_inputs, tokens);
        let inputs = inputs.saturating_add(product(self.tile_inputs, tiles));
        let of_layer = product(self.token / self.layers, tokens);
        let of_layer = of_layer.max(product(self.tile_layer, tiles));
        let of_layer = of_layer.saturating_add(product(self.flowing, tokens));
        inputs.saturating_add(of_layer).saturating_add(self.working)
    }
}

/// Returns the bytes of the float32 logits of this many target tokens.
pub fn learned_logits(config: &DecoderConfig, tokens: usize) -> u64 {
    product(
        LEARNED_LOGITS_COPIES * WHOLE * config.vocab_size as u64,
        tokens,
    )
}

/// Returns the number of weights of a policy.
pub fn elements(architecture: &dyn Architecture) -> u64 {
    architecture
        .tensors()
        .iter()
        .map(|(_, shape)| count(shape))
        .sum()
}

/// Returns the number of weights of a reward model with a merged adapter: Llama without a head,
/// CLIP and a projector.
pub fn judge_elements(config: &LlavaRlhfConfig) -> u64 {
    let (text, vision) = (&config.text_config, &config.vision_config);
    let projector = (vision.hidden_size + 1) * text.hidden_size;
    decoder_elements(text)
        + vision_elements(vision, config.mm_vision_select_layer)
        + projector as u64
}

fn decoder_elements(config: &DecoderConfig) -> u64 {
    let hidden = config.hidden_size;
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let biases = if config.qkv_bias {
        queries + 2 * keys
    } else {
        0
    };
    let of_layer =
        2 * hidden * (queries + keys) + biases + 3 * hidden * config.intermediate_size + 2 * hidden;
    (config.num_hidden_layers * of_layer + (config.vocab_size + 1) * hidden) as u64
}

fn vision_elements(config: &VisionConfig, layers: usize) -> u64 {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let of_layer =
        4 * (hidden + 1) * hidden + (hidden + 1) * inner + (inner + 1) * hidden + 4 * hidden;
    let patch = config.num_channels * config.patch_size.pow(2);
    (layers * of_layer + (patch + config.patches() + 1) * hidden) as u64
}

/// Returns the number of weights being trained.
fn learned(architecture: &dyn Architecture, trained: &Trained) -> u64 {
    let tensors = architecture.tensors();
    let tensors = tensors.iter();
    match trained {
        Trained::Parts(parts) => tensors
            .filter(|(name, _)| parts.iter().any(|(part, _)| *part == part_of(name)))
            .map(|(_, shape)| count(shape))
            .sum(),
        Trained::Lora(lora) => tensors
            .filter(|(name, _)| {
                let module = name.strip_suffix(".weight");
                name.starts_with("language_model.model.")
                    && module.is_some_and(|module| {
                        let ends = |target: &String| module.ends_with(&format!(".{target}"));
                        lora.targets.iter().any(ends)
                    })
            })
            .map(|(_, shape)| product(lora.rank as u64, shape.iter().sum()))
            .fold(0, u64::saturating_add),
    }
}

/// Multiplies bytes by a count, saturating. The sizes of a network are bounded where they are read;
/// numbers of tokens or tiles are not.
fn product(bytes: u64, times: usize) -> u64 {
    bytes.saturating_mul(times as u64)
}

fn count(shape: &[usize]) -> u64 {
    shape.iter().product::<usize>() as u64
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::architectures;
    use crate::test_util::onevision_folder;
    use crate::{LoraSettings, Part};

    fn architecture() -> Arc<dyn Architecture> {
        architectures::open(onevision_folder().path()).unwrap()
    }

    #[test]
    fn all_parts_together_are_the_whole_network() {
        let architecture = architecture();
        let config = architecture.text_config();
        let of = |parts: &[Part]| {
            let parts = parts.iter().map(|&part| (part, None)).collect();
            learned(&*architecture, &Trained::Parts(parts))
        };
        assert_eq!(of(&Part::ALL), elements(&*architecture));
        let sum: u64 = Part::ALL.iter().map(|&part| of(&[part])).sum();
        assert_eq!(sum, elements(&*architecture));
        let head = if config.tie_word_embeddings {
            0
        } else {
            config.vocab_size * config.hidden_size
        };
        let decoder = decoder_elements(config) + head as u64;
        assert_eq!(of(&[Part::LanguageModel]), decoder);
    }

    #[test]
    fn a_training_of_everything_takes_sixteen_bytes_a_weight_and_lighter_ones_less() {
        let architecture = architecture();
        let config = architecture.text_config();
        let all = elements(&*architecture);
        let whole = TrainingSizes::new(&*architecture, &Trained::all(), Optimizer::Adamw, 2);
        assert_eq!(whole.state(), 16 * all);
        let light = TrainingSizes::new(&*architecture, &Trained::all(), Optimizer::Adamw8bit, 2);
        assert_eq!(light.state(), 10 * all);
        let lora = Trained::Lora(LoraSettings {
            rank: 2,
            alpha: 1.0,
            dropout: 0.0,
            targets: vec!["o_proj".to_owned()],
            seed: 0,
        });
        let adapted = TrainingSizes::new(&*architecture, &lora, Optimizer::Adamw, 2);
        let text = config;
        let sides = text.hidden_size + text.num_attention_heads * text.head_dim;
        let adapter = (2 * sides * text.num_hidden_layers) as u64;
        assert_eq!(adapted.state(), 2 * all + 16 * adapter);
        assert_eq!(adapted.tile, 0);
        assert!(whole.remembered(100, 1) > whole.computed_again(100, 1));
    }
}
