//! Tests of the operators of our own against plain ones.

use tch::{Device, Kind, Tensor};

use ovchat_torch::lora::seeded_uniform;
use ovchat_torch::shim::{Sequences, attend_varlen};

fn noise(name: &str, shape: &[i64]) -> Tensor {
    seeded_uniform(3, name, shape, 2.0)
}

/// Sequences of (queries, first key, keys).
fn sequences(all: &[(i32, i32, i32)]) -> Sequences {
    let mut q_starts = vec![0];
    for (queries, _, _) in all {
        q_starts.push(q_starts[q_starts.len() - 1] + queries);
    }
    let k_starts: Vec<i32> = all.iter().map(|(_, start, _)| *start).chain([0]).collect();
    let k_lengths: Vec<i32> = all.iter().map(|(_, _, length)| *length).collect();
    let most = |of: fn(&(i32, i32, i32)) -> i32| i64::from(all.iter().map(of).max().unwrap());
    Sequences {
        q_starts: Tensor::from_slice(&q_starts),
        k_starts: Tensor::from_slice(&k_starts),
        k_lengths: Tensor::from_slice(&k_lengths),
        q_max: most(|one| one.0),
        k_max: most(|one| one.2),
    }
}

/// Attention of each sequence by matrix products in float64.
fn expected(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    all: &[(i32, i32, i32)],
    scale: f64,
) -> [Tensor; 2] {
    let (mut outs, mut sums) = (Vec::new(), Vec::new());
    let mut first = 0;
    for &(queries, start, length) in all {
        let part = |xs: &Tensor, start: i32, length: i32| {
            let part = xs.narrow(0, start.into(), length.into());
            part.transpose(0, 1).to_kind(Kind::Double)
        };
        let scores =
            part(q, first, queries).matmul(&part(k, start, length).transpose(1, 2)) * scale;
        sums.push(scores.logsumexp([2i64].as_slice(), false));
        let out = scores
            .softmax(2, Kind::Double)
            .matmul(&part(v, start, length));
        outs.push(out.transpose(0, 1));
        first += queries;
    }
    [Tensor::cat(&outs, 0), Tensor::cat(&sums, 1)]
}

fn apart(found: &Tensor, expected: &Tensor) -> f64 {
    (found.to_kind(Kind::Double) - expected)
        .abs()
        .max()
        .double_value(&[])
}

#[test]
fn attention_of_sequences_equals_products_in_double_precision() {
    let all = [
        (5, 100, 600),
        (1, 0, 1),
        (35, 3, 512),
        (2, 690, 10),
        (7, 100, 600),
    ];
    let sequences = sequences(&all);
    for size in [4, 16, 64, 72, 80, 128] {
        let q = noise("q", &[50, 3, size]);
        // The pool has the heads first: a view of it has the strides of another order.
        let pool = |name: &str| noise(name, &[3, 700, size]).transpose(0, 1);
        let (k, v) = (pool("k"), pool("v"));
        let scale = (size as f64).powf(-0.5);
        let [out, sums] = expected(&q, &k, &v, &all, scale);
        for plain in [false, true] {
            let (found, lse) = attend_varlen(&q, [&k, &v], &sequences, scale, plain);
            assert!(
                apart(&found, &out) < 3e-6,
                "{size} {plain} {}",
                apart(&found, &out)
            );
            assert!(
                apart(&lse, &sums) < 3e-6,
                "{size} {plain} {}",
                apart(&lse, &sums)
            );
        }
        let [q, k, v] = [&q, &k, &v].map(|xs| xs.to_kind(Kind::BFloat16));
        let (found, lse) = attend_varlen(&q, [&k, &v], &sequences, scale, false);
        assert_eq!((found.kind(), lse.kind()), (Kind::BFloat16, Kind::Float));
        assert!(apart(&found, &out) < 0.05, "{}", apart(&found, &out));
    }
}

#[test]
#[should_panic(expected = "sequence 1 is out of bounds")]
fn keys_out_of_bounds_are_an_error_and_no_memory_is_read() {
    let q = noise("q", &[2, 1, 4]);
    let k = noise("k", &[10, 1, 4]);
    let sequences = sequences(&[(1, 0, 10), (1, 8, 3)]);
    let _ = attend_varlen(&q, [&k, &k], &sequences, 1.0, false);
}

#[test]
#[should_panic(expected = "queries [2, 1, 4], keys [10, 1, 8]")]
fn shapes_that_do_not_fit_are_an_error() {
    let q = noise("q", &[2, 1, 4]);
    let k = Tensor::zeros([10, 1, 8], (Kind::Float, Device::Cpu));
    let _ = attend_varlen(&q, [&k, &k], &sequences(&[(2, 0, 10)]), 1.0, false);
}
