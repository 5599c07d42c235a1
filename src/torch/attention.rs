//! Attention over a prompt and its continuations, with grouped key-value heads.
//!
//! Grouped-query attention is that of Ainslie et al. 2023, *GQA*, arXiv 2305.13245. There is one
//! function for each forward pass of the decoder. Keys and values are shared by heads and
//! continuations, never repeated for each. Queries are `[heads, tokens, head_dim]`, keys and values
//! `[kv_heads, tokens, head_dim]`, all with rotary embeddings already applied; each key-value head
//! serves `heads / kv_heads` consecutive query heads. The result has the shape of the queries.

use tch::{Device, IndexOp, Kind, Tensor};

/// The keys and values of some tokens in one layer.
#[derive(Debug)]
pub struct KeyValue {
    pub k: Tensor,
    pub v: Tensor,
}

impl KeyValue {
    /// Returns these tokens followed by `other`, copied into a new tensor.
    pub fn followed_by(&self, other: &Self) -> Self {
        Self {
            k: Tensor::cat(&[&self.k, &other.k], 1),
            v: Tensor::cat(&[&self.v, &other.v], 1),
        }
    }

    /// Returns a view of `length` tokens from `start` on.
    pub fn of_tokens(&self, start: i64, length: i64) -> Self {
        Self {
            k: self.k.narrow(1, start, length),
            v: self.v.narrow(1, start, length),
        }
    }
}

/// Causal attention of a prompt's tokens to each other.
pub fn attend_causally(q: &Tensor, own: &KeyValue) -> Tensor {
    grouped_attention(q, own, None, true)
}

/// Attention of tokens that see all of `own`.
pub fn attend_to_all(q: &Tensor, own: &KeyValue) -> Tensor {
    grouped_attention(q, own, None, false)
}

/// Attention of the tokens of continuations, which see the prompt and, subject to `mask`, each
/// other.
pub fn attend_behind(q: &Tensor, own: &KeyValue, shared: &KeyValue, mask: &Tensor) -> Tensor {
    grouped_attention(q, &shared.followed_by(own), Some(mask), false)
}

/// Attention of some tokens of a prompt and its continuations to all of them, subject to `mask`.
pub fn attend_masked(q: &Tensor, seen: &KeyValue, mask: &Tensor) -> Tensor {
    grouped_attention(q, seen, Some(mask), false)
}

/// Fused attention with grouped key-value heads. The key-value heads take the batch dimension, so
/// that none is copied for its group.
fn grouped_attention(q: &Tensor, seen: &KeyValue, mask: Option<&Tensor>, causal: bool) -> Tensor {
    let KeyValue { k, v } = seen;
    let kv_heads = k.size()[0];
    let q = q.unflatten(0, [kv_heads, -1]); // [kv_heads, group, tokens, head_dim]
    let group = q.size()[1];
    let served = |xs: &Tensor| xs.unsqueeze(1).expand([-1, group, -1, -1], false);
    Tensor::scaled_dot_product_attention(&q, &served(k), &served(v), mask, 0.0, causal, None, false)
        .flatten(0, 1)
}

/// The additive attention mask of continuations of these `lengths` after a prompt,
/// `[tokens of all, prompt + tokens of all]`: 0 for the prompt and for earlier tokens of the same
/// continuation, minus infinity elsewhere. It is made on the device, in the dtype of the queries.
pub fn branch_mask(lengths: &[i64], prompt: i64, (kind, device): (Kind, Device)) -> Tensor {
    let owners: Vec<i64> = (0..)
        .zip(lengths)
        .flat_map(|(row, &length)| std::iter::repeat_n(row, length as usize))
        .collect();
    let owners = Tensor::from_slice(&owners).to_device(device);
    let seen = owners.unsqueeze(1).eq_tensor(&owners.unsqueeze(0)).tril(0); // [tokens of all, tokens of all]
    let tokens = owners.size()[0];
    let mask = Tensor::zeros([tokens, prompt + tokens], (kind, device));
    let _ = mask
        .i((.., prompt..))
        .masked_fill_(&seen.logical_not(), f64::NEG_INFINITY);
    mask
}

/// The additive attention mask of a prompt's tokens from `from` on and of the continuations of
/// these `lengths` after it, `[tokens from there on, prompt + tokens of all]`.
pub fn tree_mask(lengths: &[i64], prompt: i64, from: i64, on: (Kind, Device)) -> Tensor {
    let branches = branch_mask(lengths, prompt, on);
    let tokens = branches.size()[1];
    let above = Tensor::full([prompt - from, tokens], f64::NEG_INFINITY, on).triu(from + 1);
    Tensor::cat(&[above, branches], 0)
}
