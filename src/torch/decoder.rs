//! The language model: Qwen2 (LLaVA-OneVision) and Llama (LLaVA-RLHF), which differ in three
//! biases.
//!
//! It serves a single workload: several continuations of one long prompt, most of which is image
//! tokens. There are four forward passes, with the same weights and equal results.
//! [`Decoder::read`] processes prompts packed with whole continuations that do not see each other,
//! and supports gradients (training). [`Decoder::prefill`] processes prompts once and returns the
//! keys and values of each, a [`PrefixKv`]. [`Decoder::branch`] processes whole continuations of
//! these (scoring). [`Decoder::step`] processes the next token of each continuation (sampling); the
//! keys and values of prompts and continuations are in one [`KvPool`] then, and all rows attend to
//! them in a constant number of operators. All continuations of a prompt share its keys and values.
//!
//! [`Decoder::read_on`] is a `prefill` of prompts that begin with a cached prefix.
//!
//! All of them take several prompts at once. Activations are `[tokens, hidden]`, heads
//! `[heads, tokens, head_dim]`, with the tokens of all prompts concatenated, without padding:
//! operations on single tokens run once over all tokens, and attention runs prompt by prompt.
//!
//! Sources: transformers' `models/qwen2/modeling_qwen2.py` and `models/llama/modeling_llama.py`.

mod layer;
mod packing;
mod pool;
mod sizes;
mod step;

use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use self::layer::DecoderLayer;
pub use self::packing::PackedSequence;
use self::packing::{PackedBatch, joined, runs};
pub use self::pool::{KvPool, Places};
pub use self::sizes::DecoderSizes;
pub use self::step::{Branches, StepRows};
use super::attention::{
    KeyValue, attend_behind, attend_causally, attend_masked, attend_to_all, branch_mask,
};
use super::casts::cast;
use super::layer_stack::{Layer, LayerStack, SavedActivations};
use super::layers::{Path, RmsNorm, Rotary, RotaryCosSin, Weight};
use ovchat_models::ModelError;

/// Embeddings, layers and the final norm; the head is separate, see [`LmHead`].
#[derive(Debug)]
pub struct Decoder {
    embed_tokens: Tensor, // [vocab, hidden]
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    rotary: Rotary,
    sizes: DecoderSizes,
    /// True if large weights are packed.
    packs: bool,
}

/// The hidden states that a pass returns. The last layer computes keys and values of every token,
/// but everything else for these tokens only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The last token's hidden state, for each prompt or continuation.
    Last,
    /// No hidden states; only the prefix is wanted.
    Nothing,
}

/// The queries of a layer, `[heads, tokens, head_dim]`.
#[derive(Clone, Copy)]
enum Queries<'a> {
    /// The queries of every token.
    All(&'a Tensor),
    /// The queries of the last token of each sequence.
    Last(&'a Tensor),
    Nothing,
}

/// The keys and values of a prompt.
#[derive(Debug)]
pub struct PrefixKv {
    layers: Vec<KeyValue>, // [kv_heads, tokens, head_dim]
    tokens: i64,
}

impl PrefixKv {
    /// The number of tokens of the prompt, which is the position of the first token after it.
    pub fn tokens(&self) -> i64 {
        self.tokens
    }
}

/// Whole continuations of one prompt.
#[derive(Debug)]
pub struct Texts<'a> {
    pub prefix: &'a PrefixKv,
    /// The number of tokens of each continuation.
    pub lengths: Vec<i64>,
}

impl Decoder {
    /// Loads `embed_tokens`, `layers` and `norm` from `path`.
    pub fn new(path: &Path, config: &DecoderSizes) -> Result<Self, ModelError> {
        let embed_tokens =
            (path / "embed_tokens").take("weight", &[config.vocab_size, config.hidden_size])?;
        let layers = path / "layers";
        let device = embed_tokens.device();
        Ok(Self {
            embed_tokens,
            layers: (0..config.num_hidden_layers)
                .map(|index| DecoderLayer::new(&(&layers / index), config))
                .collect::<Result<_, _>>()?,
            norm: RmsNorm::new(&(path / "norm"), config.hidden_size, config.rms_norm_eps)?,
            rotary: Rotary::new(config.head_dim, config.rope_theta, device),
            sizes: config.clone(),
            packs: path.packs(),
        })
    }

    /// The hidden states of all tokens of one sequence, after the final norm.
    pub fn hidden(&self, embeds: &Tensor) -> Tensor {
        let tree = PackedSequence {
            prompt: embeds.size()[0],
            branches: Vec::new(),
            wanted_from: 0,
        };
        self.read(embeds, vec![tree], SavedActivations::Nothing)
            .output()
            .shallow_clone()
    }

    /// The device of the weights.
    pub fn device(&self) -> Device {
        self.embed_tokens.device()
    }

    /// Embeds token ids (`[tokens]`, int64) as `[tokens, hidden]`.
    pub fn embed(&self, ids: &Tensor) -> Tensor {
        Tensor::embedding(&self.embed_tokens, ids, -1, false, false)
    }

    /// Processes packed sequences, whose embeddings are concatenated in `embeds`
    /// (`[tokens of all, hidden]`); each has the prompt first, then its continuations. The returned
    /// stack outputs the wanted hidden states after the final norm, in that order.
    pub fn read(
        &self,
        embeds: &Tensor,
        trees: Vec<PackedSequence>,
        keep: SavedActivations,
    ) -> LayerStack<'_> {
        let places = trees.iter().flat_map(PackedSequence::places);
        let angles = self.positions(places, embeds.device(), embeds.kind());
        let batch = Rc::new(PackedBatch::new(trees, angles, embeds));
        let (last, before) = self.layers.split_last().expect("a layer");
        let mut links: Vec<Layer<'_>> = Vec::with_capacity(self.layers.len());
        for layer in before {
            let batch = Rc::clone(&batch);
            links.push(Box::new(move |xs| {
                let angles = &batch.angles;
                let normed = layer.input_layernorm.forward(xs);
                let own = layer.self_attn.keys_values(&normed, angles);
                layer.forward(xs, &normed, angles, |q| batch.attend_all(q, &own))
            }));
        }
        links.push(Box::new(move |xs| {
            let normed = last.input_layernorm.forward(xs);
            let own = last.self_attn.keys_values(&normed, &batch.angles);
            let angles = batch.angles.map(|angles| batch.pick(angles));
            let [xs, normed] = [xs, &normed].map(|xs| batch.pick(xs));
            let xs = last.forward(&xs, &normed, &angles, |q| batch.attend_wanted(q, &own));
            self.norm.forward(&xs)
        }));
        LayerStack::run(links, embeds, keep)
    }

    /// Processes prompts of these `lengths`, each from position 0, whose embeddings are
    /// concatenated in `embeds` (`[tokens of all, hidden]`). Returns the wanted hidden states after
    /// the final norm, in that order, and the prefixes.
    pub fn prefill(
        &self,
        embeds: &Tensor,
        lengths: &[i64],
        wanted: Wanted,
    ) -> (Tensor, Vec<PrefixKv>) {
        assert_eq!(embeds.size()[0], lengths.iter().sum::<i64>());
        let places = lengths.iter().copied().map(|length| (0, length));
        let angles = self.positions(places, embeds.device(), embeds.kind());
        let runs = runs(lengths);
        let mut prefixes: Vec<PrefixKv> = lengths
            .iter()
            .map(|&tokens| PrefixKv {
                layers: Vec::with_capacity(self.layers.len()),
                tokens,
            })
            .collect();
        let hidden = self.through_layers(embeds, &angles, lengths, wanted, |_, queries, own| {
            let mut mixed = Vec::with_capacity(runs.len());
            for (prompt, &(start, length)) in runs.iter().enumerate() {
                let own = own.of_tokens(start, length);
                match queries {
                    Queries::All(q) => {
                        mixed.push(attend_causally(&q.narrow(1, start, length), &own));
                    }
                    Queries::Last(q) => {
                        mixed.push(attend_to_all(&q.narrow(1, prompt as i64, 1), &own));
                    }
                    Queries::Nothing => {}
                }
                prefixes[prompt].layers.push(own);
            }
            joined(mixed)
        });
        (hidden, prefixes)
    }

    /// Processes prompts that begin with cached prefixes. Each is given by its prefix and the
    /// number of its remaining tokens, whose embeddings are concatenated in `embeds`. Returns the wanted
    /// hidden states, and the keys and values of the remaining tokens.
    pub fn read_on(
        &self,
        embeds: &Tensor,
        prompts: &[(&PrefixKv, i64)],
        wanted: Wanted,
    ) -> (Tensor, Vec<PrefixKv>) {
        let lengths: Vec<i64> = prompts.iter().map(|(_, length)| *length).collect();
        assert_eq!(embeds.size()[0], lengths.iter().sum::<i64>());
        let places = prompts
            .iter()
            .map(|(prefix, length)| (prefix.tokens, *length));
        let angles = self.positions(places, embeds.device(), embeds.kind());
        let runs = runs(&lengths);
        let mut prefixes = Vec::with_capacity(prompts.len());
        let mut masks = Vec::with_capacity(prompts.len());
        for (prefix, length) in prompts {
            prefixes.push(PrefixKv {
                layers: Vec::with_capacity(self.layers.len()),
                tokens: *length,
            });
            let on = (embeds.kind(), embeds.device());
            masks.push(branch_mask(&[*length], prefix.tokens, on));
        }
        let hidden =
            self.through_layers(embeds, &angles, &lengths, wanted, |layer, queries, own| {
                let mut mixed = Vec::with_capacity(runs.len());
                for (prompt, &(start, length)) in runs.iter().enumerate() {
                    let prefix = &prompts[prompt].0.layers[layer];
                    let own = own.of_tokens(start, length);
                    let seen = prefix.followed_by(&own);
                    match queries {
                        Queries::All(q) => {
                            let q = q.narrow(1, start, length);
                            mixed.push(attend_masked(&q, &seen, &masks[prompt]));
                        }
                        Queries::Last(q) => {
                            mixed.push(attend_to_all(&q.narrow(1, prompt as i64, 1), &seen));
                        }
                        Queries::Nothing => {}
                    }
                    prefixes[prompt].layers.push(own);
                }
                joined(mixed)
            });
        (hidden, prefixes)
    }

    /// Processes whole continuations of prompts. Their embeddings are concatenated in `embeds`
    /// (`[tokens of all, hidden]`), with the lengths given in `prompts`; each starts at the
    /// position after its prompt and sees the prompt and itself. Returns the wanted hidden states
    /// after the final norm, in the same order.
    pub fn branch(&self, embeds: &Tensor, prompts: &[Texts<'_>], wanted: Wanted) -> Tensor {
        let lengths: Vec<i64> = prompts
            .iter()
            .flat_map(|prompt| &prompt.lengths)
            .copied()
            .collect();
        assert_eq!(embeds.size()[0], lengths.iter().sum::<i64>());
        let device = embeds.device();
        let places = prompts.iter().flat_map(|prompt| {
            let lengths = prompt.lengths.iter();
            lengths.map(|&length| (prompt.prefix.tokens, length))
        });
        let angles = self.positions(places, device, embeds.kind());
        let of_prompts: Vec<i64> = prompts
            .iter()
            .map(|prompt| prompt.lengths.iter().sum())
            .collect();
        let runs = runs(&of_prompts);
        let masks: Vec<Tensor> = prompts
            .iter()
            .map(|prompt| {
                let on = (embeds.kind(), device);
                branch_mask(&prompt.lengths, prompt.prefix.tokens, on)
            })
            .collect();
        self.through_layers(embeds, &angles, &lengths, wanted, |layer, queries, own| {
            let mut mixed = Vec::with_capacity(runs.len());
            let mut first = 0;
            for ((prompt, mask), &(start, length)) in prompts.iter().zip(&masks).zip(&runs) {
                let own = own.of_tokens(start, length);
                let shared = &prompt.prefix.layers[layer];
                match queries {
                    Queries::All(q) => {
                        let q = q.narrow(1, start, length);
                        mixed.push(attend_behind(&q, &own, shared, mask));
                    }
                    Queries::Last(q) => {
                        let count = prompt.lengths.len() as i64;
                        let lasts = last_of_each(&prompt.lengths, device);
                        let (q, mask) = (q.narrow(1, first, count), mask.index_select(0, &lasts));
                        mixed.push(attend_behind(&q, &own, shared, &mask));
                        first += count;
                    }
                    Queries::Nothing => {}
                }
            }
            joined(mixed)
        })
    }

    /// Runs all layers on sequences of these `lengths`. `attend` gets the layer's index, the
    /// queries, and the keys and values of every token; it returns the attention output, or `None`
    /// without queries. Returns the wanted hidden states after the final norm.
    fn through_layers(
        &self,
        embeds: &Tensor,
        angles: &RotaryCosSin,
        lengths: &[i64],
        wanted: Wanted,
        mut attend: impl FnMut(usize, Queries<'_>, KeyValue) -> Option<Tensor>,
    ) -> Tensor {
        const MIXED: &str = "attention of the queries";
        let (last, before) = self.layers.split_last().expect("a layer");
        let mut xs = embeds.shallow_clone();
        for (index, layer) in before.iter().enumerate() {
            let normed = layer.input_layernorm.forward(&xs);
            let own = layer.self_attn.keys_values(&normed, angles);
            xs = layer.forward(&xs, &normed, angles, |q| {
                attend(index, Queries::All(q), own).expect(MIXED)
            });
        }
        let index = before.len();
        let normed = last.input_layernorm.forward(&xs);
        let own = last.self_attn.keys_values(&normed, angles);
        match wanted {
            Wanted::Last => {
                let lasts = last_of_each(lengths, xs.device());
                let [xs_there, normed] = [&xs, &normed].map(|xs| xs.index_select(0, &lasts));
                xs = last.forward(&xs_there, &normed, &angles.of(&lasts), |q| {
                    attend(index, Queries::Last(q), own).expect(MIXED)
                });
            }
            Wanted::Nothing => {
                let _ = attend(index, Queries::Nothing, own);
                return xs.narrow(0, 0, 0);
            }
        }
        self.norm.forward(&xs)
    }

    /// An empty pool for the keys and values of this decoder, which has at most `tokens_max` places as
    /// long as these suffice.
    pub fn pool(&self, tokens_max: i64) -> KvPool {
        let on = (self.embed_tokens.kind(), self.device());
        KvPool::new(&self.sizes, on, tokens_max)
    }

    /// The rows of a step: one token of each continuation of each prompt.
    pub fn rows(&self, prompts: &[Branches<'_>]) -> StepRows {
        let group = self.sizes.num_attention_heads / self.sizes.num_key_value_heads;
        StepRows::new(prompts, group, self.device())
    }

    /// Decodes the next token of each continuation (`[rows, hidden]`) and adds it to the pool.
    /// Returns the hidden states after the final norm. The weights are read once for all rows, each
    /// prompt once for the rows that share it. For inference.
    pub fn step(&self, embeds: &Tensor, pool: &KvPool, rows: &StepRows) -> Tensor {
        assert_eq!(embeds.size()[0], rows.count());
        let angles = self.rotary.angles(&rows.positions, embeds.kind());
        let mut xs = embeds.shallow_clone();
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = layer.input_layernorm.forward(&xs);
            let new = layer.self_attn.keys_values(&normed, &angles);
            xs = layer.forward(&xs, &normed, &angles, |q| rows.attend(pool, index, q, &new));
        }
        self.norm.forward(&xs)
    }

    /// The rotary angles of concatenated sequences, each given by its first position and length.
    fn positions(
        &self,
        texts: impl Iterator<Item = (i64, i64)>,
        device: Device,
        kind: Kind,
    ) -> RotaryCosSin {
        let places: Vec<Tensor> = texts
            .map(|(first, length)| {
                Tensor::arange_start(first, first + length, (Kind::Int64, device))
            })
            .collect();
        self.rotary.angles(&Tensor::cat(&places, 0), kind)
    }
}

/// The index of the last token of each sequence in the concatenation, `[texts]`, int64.
fn last_of_each(lengths: &[i64], device: Device) -> Tensor {
    let lasts: Vec<i64> = runs(lengths)
        .iter()
        .map(|(start, length)| start + length - 1)
        .collect();
    Tensor::from_slice(&lasts).to_device(device)
}

/// The head that turns hidden states into logits. It is separate from [`Decoder`], so that logits
/// are computed only where they are needed, and it is not loaded where they never are.
#[derive(Debug)]
pub struct LmHead {
    weight: Weight, // [vocab, hidden]
    vocab: i64,
}

impl LmHead {
    /// Loads an untied head.
    pub fn new(path: &Path, config: &DecoderSizes) -> Result<Self, ModelError> {
        let weight = path.take("weight", &[config.vocab_size, config.hidden_size])?;
        Ok(Self {
            weight: Weight::new(weight, path.packs()),
            vocab: config.vocab_size,
        })
    }

    /// Uses the embedding as the head; gradients of both uses accumulate in the one parameter. A packed
    /// head is a copy.
    pub fn tied(decoder: &Decoder) -> Self {
        let weight = decoder.embed_tokens.shallow_clone();
        Self {
            vocab: weight.size()[0],
            weight: Weight::new(weight, decoder.packs),
        }
    }

    /// Maps `[rows, hidden]` to logits `[rows, vocab]`, in float32.
    pub fn forward(&self, hidden: &Tensor) -> Tensor {
        cast(&self.weight.forward(hidden, None), Kind::Float)
    }

    /// The size of the vocabulary.
    pub fn vocab(&self) -> i64 {
        self.vocab
    }
}
