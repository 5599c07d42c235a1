//! Operators that libtorch has, or lets one build, but `tch` does not offer: the safe side of
//! `shim/shim.cpp`.
//!
//! A failure is a panic with libtorch's words, as in `tch`; [`guarded`](super::error::guarded)
//! recognizes it.

#![expect(
    unsafe_code,
    reason = "calls the C functions at the end of shim/shim.cpp, whose signatures are declared here"
)]

use std::ffi::{CStr, c_char, c_void};
use std::ptr::{null, null_mut};

use tch::{TchError, Tensor};

type TensorPointer = *const c_void;

unsafe extern "C" {
    fn ovchat_free(message: *mut c_char);
    fn ovchat_attend_varlen(
        out: *mut *mut c_void,
        plain: bool,
        q: TensorPointer,
        k: TensorPointer,
        v: TensorPointer,
        q_starts: TensorPointer,
        k_starts: TensorPointer,
        k_lengths: TensorPointer,
        q_max: i64,
        k_max: i64,
        scale: f64,
    ) -> *mut c_char;
    fn ovchat_attend_pieces(
        out: *mut *mut c_void,
        q: TensorPointer,
        k: TensorPointer,
        v: TensorPointer,
        entries: TensorPointer,
        pieces: TensorPointer,
        mask: TensorPointer,
        q_starts: TensorPointer,
        k_starts: TensorPointer,
        k_lengths: TensorPointer,
        q_max: i64,
        k_max: i64,
    ) -> *mut c_char;
    fn ovchat_fused_adamw(
        tensors: *const TensorPointer,
        count: i64,
        rate: f64,
        beta1: f64,
        beta2: f64,
        decay: f64,
        epsilon: f64,
    ) -> *mut c_char;
    fn ovchat_norm(out: *mut *mut c_void, tensors: *const TensorPointer, count: i64)
    -> *mut c_char;
    fn ovchat_scale(tensors: *const TensorPointer, count: i64, factor: f64) -> *mut c_char;
    fn ovchat_pack(out: *mut *mut c_void, weight: TensorPointer) -> *mut c_char;
    fn ovchat_packed_linear(
        out: *mut *mut c_void,
        xs: TensorPointer,
        weight: TensorPointer,
        bias: TensorPointer,
    ) -> *mut c_char;
    fn ovchat_empty_cache() -> *mut c_char;
    fn ovchat_peak_memory(bytes: *mut i64) -> *mut c_char;
    fn ovchat_deterministic() -> *mut c_char;
    fn ovchat_is_deterministic() -> bool;
    fn ovchat_attention_backends() -> i64;
    fn ovchat_count_begin() -> *mut c_char;
    fn ovchat_count_end(counts: *mut i64) -> *mut c_char;
}

/// Panics with the message of a failed call.
fn check(message: *mut c_char) {
    outcome(message).unwrap();
}

/// Takes over the message of a call of the shim: null if it succeeded.
pub fn outcome(message: *mut c_char) -> Result<(), TchError> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns null or a string that ends in a zero byte, which it allocated.
    let words = unsafe {
        let words = CStr::from_ptr(message).to_string_lossy().into_owned();
        ovchat_free(message);
        words
    };
    Err(TchError::Torch(words))
}

fn pointer(tensor: &Tensor) -> TensorPointer {
    tensor.as_ptr().cast()
}

/// Takes over a tensor that the shim created.
fn taken(tensor: *mut c_void) -> Tensor {
    assert!(!tensor.is_null(), "the shim returns a tensor");
    // SAFETY: the shim created the tensor with `new`, as `tch` does, and gave it away.
    unsafe { Tensor::from_ptr(tensor.cast()) }
}

/// Sequences of queries, each of which sees a range of keys. The numbers are int32, on the device of
/// the queries.
#[derive(Debug)]
pub struct Sequences {
    /// The first query of each sequence, and the number of all queries, `[sequences + 1]`.
    pub q_starts: Tensor,
    /// The first key of each sequence, and any number, `[sequences + 1]`.
    pub k_starts: Tensor,
    /// The number of keys of each sequence, at least 1, `[sequences]`.
    pub k_lengths: Tensor,
    /// The largest number of queries, and of keys, of a sequence.
    pub q_max: i64,
    pub k_max: i64,
}

/// Attention of sequences to their keys, without a mask: queries `[queries, heads, head_dim]`, keys
/// and values `[keys, heads, head_dim]`. Returns the outputs, `[queries, heads, head_dim]`, and the
/// log-sum-exp of the scores, `[heads, queries]`, float32. `plain` chooses the implementation that
/// runs on any device and in any dtype; the other one is FlashAttention on CUDA in 16 bits.
pub fn attend_varlen(
    q: &Tensor,
    [k, v]: [&Tensor; 2],
    sequences: &Sequences,
    scale: f64,
    plain: bool,
) -> (Tensor, Tensor) {
    let mut out = [null_mut::<c_void>(); 2];
    // SAFETY: all pointers are valid during the call; `out` has room for two.
    check(unsafe {
        ovchat_attend_varlen(
            out.as_mut_ptr(),
            plain,
            pointer(q),
            pointer(k),
            pointer(v),
            pointer(&sequences.q_starts),
            pointer(&sequences.k_starts),
            pointer(&sequences.k_lengths),
            sequences.q_max,
            sequences.k_max,
            scale,
        )
    });
    (taken(out[0]), taken(out[1]))
}

/// Attention of one token of each row to keys that lie in pieces, as in FlashDecoding: the pieces are
/// attended to apart and merged by their log-sum-exps.
///
/// Queries are `[heads, rows, head_dim]`, keys and values `[kv_heads, places, head_dim]`, all of one
/// dtype; the result has the shape of the queries. `entries` (`[entries]`, int64) has the row of each
/// query of each sequence, in the order of `sequences`, whose `q_starts` and `q_max` count them times
/// `heads / kv_heads`; `pieces` (`[rows, most pieces]`, int64) has the entries of each row. If some
/// rows have fewer pieces than others, `mask` (`[rows, most pieces, 1]`, float32) is minus infinity in
/// the places that are left, and 0 elsewhere.
pub fn attend_pieces(
    q: &Tensor,
    [k, v]: [&Tensor; 2],
    entries: &Tensor,
    pieces: &Tensor,
    mask: Option<&Tensor>,
    sequences: &Sequences,
) -> Tensor {
    let mut out = null_mut::<c_void>();
    // SAFETY: all pointers are valid during the call; `out` has room for one.
    check(unsafe {
        ovchat_attend_pieces(
            &raw mut out,
            pointer(q),
            pointer(k),
            pointer(v),
            pointer(entries),
            pointer(pieces),
            mask.map_or(null(), pointer),
            pointer(&sequences.q_starts),
            pointer(&sequences.k_starts),
            pointer(&sequences.k_lengths),
            sequences.q_max,
            sequences.k_max,
        )
    });
    taken(out)
}

/// The tensors of a fused AdamW update, as many of each.
#[derive(Debug, Default)]
pub struct AdamwTensors {
    pub weights: Vec<Tensor>,
    pub gradients: Vec<Tensor>,
    /// The decaying means of the gradients, and of their squares.
    pub exp_avgs: Vec<Tensor>,
    pub exp_avg_sqs: Vec<Tensor>,
    /// The number of this update of each weight, from 1: scalars in float32, on the same device.
    pub steps: Vec<Tensor>,
}

/// Updates weights by AdamW in one operator, without memory for intermediate results: `weight -= rate
/// decay weight`, then as in [`super::optimizer`].
pub fn fused_adamw(tensors: &AdamwTensors, rate: f64, betas: [f64; 2], decay: f64, epsilon: f64) {
    let count = tensors.weights.len();
    let lists = [
        &tensors.weights,
        &tensors.gradients,
        &tensors.exp_avgs,
        &tensors.exp_avg_sqs,
        &tensors.steps,
    ];
    assert!(lists.iter().all(|list| list.len() == count));
    let all: Vec<TensorPointer> = lists.into_iter().flatten().map(pointer).collect();
    // SAFETY: `all` has five times `count` pointers, all valid during the call.
    check(unsafe {
        let [beta1, beta2] = betas;
        ovchat_fused_adamw(
            all.as_ptr(),
            count as i64,
            rate,
            beta1,
            beta2,
            decay,
            epsilon,
        )
    });
}

/// The Euclidean norm of all tensors together, a scalar; at least one tensor.
pub fn norm(tensors: &[Tensor]) -> Tensor {
    let all: Vec<TensorPointer> = tensors.iter().map(pointer).collect();
    let mut out = null_mut::<c_void>();
    // SAFETY: all pointers are valid during the call; `out` has room for one.
    check(unsafe { ovchat_norm(&raw mut out, all.as_ptr(), all.len() as i64) });
    taken(out)
}

/// Multiplies all tensors by a number, in place.
pub fn scale(tensors: &[Tensor], factor: f64) {
    let all: Vec<TensorPointer> = tensors.iter().map(pointer).collect();
    // SAFETY: all pointers are valid during the call.
    check(unsafe { ovchat_scale(all.as_ptr(), all.len() as i64, factor) });
}

/// A weight of a linear layer, `[out, in]`, in the order in which oneDNN reads it: a product of few rows
/// need not reorder it each time. For inference on the CPU in float32.
#[derive(Debug)]
pub struct PackedWeight(Tensor);

impl PackedWeight {
    /// Packs a weight; `None` if this libtorch has no oneDNN.
    pub fn new(weight: &Tensor) -> Option<Self> {
        let mut out = null_mut::<c_void>();
        // SAFETY: the pointer is valid during the call; `out` has room for one.
        let message = unsafe { ovchat_pack(&raw mut out, pointer(weight)) };
        check(message);
        (!out.is_null()).then(|| Self(taken(out)))
    }

    /// Maps `[.., in]` to `[.., out]`.
    pub fn linear(&self, xs: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let mut out = null_mut::<c_void>();
        // SAFETY: all pointers are valid during the call; `out` has room for one.
        check(unsafe {
            ovchat_packed_linear(
                &raw mut out,
                pointer(xs),
                pointer(&self.0),
                bias.map_or(null(), pointer),
            )
        });
        taken(out)
    }
}

/// Gives memory that libtorch keeps for later back to the GPU, for other programs.
pub fn empty_cache() {
    // SAFETY: no arguments.
    check(unsafe { ovchat_empty_cache() });
}

/// Returns the largest memory that libtorch has held on all GPUs together since the process began, in
/// bytes; `None` without a GPU in use.
pub fn peak_memory() -> Option<u64> {
    let mut bytes = -1_i64;
    // SAFETY: `bytes` has room for a number.
    let found = outcome(unsafe { ovchat_peak_memory(&raw mut bytes) });
    // It fails before the first tensor on a GPU.
    found.ok().and_then(|()| u64::try_from(bytes).ok())
}

/// Lets libtorch choose kernels whose results repeat to the bit on one kind of device, where it has such
/// kernels. It prints a warning where it has none.
pub fn set_deterministic() {
    // SAFETY: no arguments.
    check(unsafe { ovchat_deterministic() });
}

/// True after [`set_deterministic`].
pub fn is_deterministic() -> bool {
    // SAFETY: no arguments.
    unsafe { ovchat_is_deterministic() }
}

/// The names of the attention backends that libtorch may choose, in its order.
pub fn attention_backends() -> Vec<&'static str> {
    // SAFETY: no arguments.
    let bits = unsafe { ovchat_attention_backends() };
    let names = ["flash", "memory-efficient", "cuDNN", "math"];
    let enabled = (0..).zip(names).filter(|(bit, _)| bits >> bit & 1 == 1);
    enabled.map(|(_, name)| name).collect()
}

/// The number of operators that libtorch ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OperatorCounts {
    /// Those that this thread called.
    pub outermost: i64,
    /// Those that other operators called.
    pub nested: i64,
}

/// Counts the operators that `compute` calls on this thread.
pub fn count_operators<T>(compute: impl FnOnce() -> T) -> (T, OperatorCounts) {
    // SAFETY: no arguments.
    check(unsafe { ovchat_count_begin() });
    let result = compute();
    let mut counts = [0; 2];
    // SAFETY: `counts` has room for two numbers.
    check(unsafe { ovchat_count_end(counts.as_mut_ptr()) });
    let [outermost, nested] = counts;
    (result, OperatorCounts { outermost, nested })
}
