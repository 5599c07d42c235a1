//! Tests of every forward pass of the decoder against a plain causal pass.

use tch::{IndexOp, Kind, Tensor};

use ovchat_models::ModelError;
use ovchat_torch::decoder::{
    Branches, Decoder, DecoderSizes, LmHead, PackedSequence, PrefixKv, SuffixKv, Texts, Wanted,
};
use ovchat_torch::layer_stack::SavedActivations;
use ovchat_torch::layers::{Activation, Bias, Path, WeightSource};
use ovchat_torch::lora::seeded_uniform;

/// A source that fabricates every requested weight.
struct FakeSource(Kind);

impl WeightSource for FakeSource {
    fn take(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        Ok(seeded_uniform(5, name, shape, 0.5).to_kind(self.0))
    }
}

fn config() -> DecoderSizes {
    DecoderSizes {
        vocab_size: 40,
        hidden_size: 24,
        intermediate_size: 48,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 4,
        hidden_act: Activation::Silu,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        qkv_bias: Bias::Yes,
    }
}

fn decoder(kind: Kind) -> Decoder {
    Decoder::new(&(Path::root(&FakeSource(kind)) / "model"), &config()).unwrap()
}

fn ids(ids: &[i64]) -> Tensor {
    Tensor::from_slice(ids)
}

fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64) {
    let apart = (found - expected).abs().max().double_value(&[]);
    assert!(apart <= tolerance, "{apart} apart");
}

/// A plain causal pass over prompt and answer, the expected result of every other pass.
fn whole(decoder: &Decoder, prompt: &[i64], answer: &[i64]) -> Tensor {
    let all = [prompt, answer].concat();
    let hidden = decoder.hidden(&decoder.embed(&ids(&all)));
    hidden.i(prompt.len() as i64..)
}

/// The prefix of one prompt.
fn prefix_of(decoder: &Decoder, prompt: &[i64]) -> PrefixKv {
    let embeds = decoder.embed(&ids(prompt));
    let (_, mut prefixes) = decoder.prefill(&embeds, &[prompt.len() as i64], Wanted::Nothing);
    prefixes.remove(0)
}

const PROMPT: [i64; 5] = [3, 1, 4, 1, 5];
const ANSWERS: [&[i64]; 3] = [&[9, 2, 6], &[5], &[3, 5, 8, 9]];

#[test]
fn branches_equal_their_own_causal_passes() {
    let decoder = decoder(Kind::Float);
    let prefix = prefix_of(&decoder, &PROMPT);
    let embeds = decoder.embed(&ids(&ANSWERS.concat()));
    let texts = Texts {
        prefix: &prefix,
        lengths: vec![3, 1, 4],
    };
    let lasts = decoder.branch(&embeds, &[texts], Wanted::Last);
    let expected = ANSWERS.map(|answer| whole(&decoder, &PROMPT, answer).i(-1));
    assert_close(&lasts, &Tensor::stack(&expected, 0), 1e-5);
}

/// Packs two sequences, one with all hidden states wanted and one without continuations; then one
/// with only the last hidden states wanted.
#[test]
fn trees_equal_their_own_causal_passes() {
    let decoder = decoder(Kind::Float);
    let tree = |wanted_from| PackedSequence {
        prompt: 5,
        branches: vec![3, 1, 4],
        wanted_from,
    };
    let alone = |wanted_from| PackedSequence {
        prompt: 3,
        branches: Vec::new(),
        wanted_from,
    };
    let of_tree = [&PROMPT, ANSWERS[0], ANSWERS[1], ANSWERS[2]].concat();
    let embeds = decoder.embed(&ids(&[of_tree, PROMPT[1..4].to_vec()].concat()));
    let mut expected = vec![whole(&decoder, &[], &PROMPT)];
    expected.extend(ANSWERS.map(|answer| whole(&decoder, &PROMPT, answer)));
    expected.push(whole(&decoder, &[], &PROMPT[1..4]));
    let expected = Tensor::cat(&expected, 0);
    let read = |trees| decoder.read(&embeds, trees, SavedActivations::Nothing);
    let all = read(vec![tree(0), alone(0)]);
    assert_close(all.output(), &expected, 1e-5);
    let some = read(vec![tree(3), alone(1)]);
    let wanted = Tensor::cat(&[expected.i(3..13), expected.i(14..)], 0);
    assert_close(some.output(), &wanted, 1e-5);
}

#[test]
fn several_prompts_are_read_as_each_alone() {
    let decoder = decoder(Kind::Float);
    let prompts: [&[i64]; 3] = [&PROMPT, &[7], &PROMPT[1..4]];
    let lengths = [5, 1, 3];
    let embeds = decoder.embed(&ids(&prompts.concat()));
    let (lasts, prefixes) = decoder.prefill(&embeds, &lengths, Wanted::Last);
    let alone = prompts.map(|prompt| whole(&decoder, &[], prompt).i(-1));
    assert_close(&lasts, &Tensor::stack(&alone, 0), 1e-5);
    let (nothing, without) = decoder.prefill(&embeds, &lengths, Wanted::Nothing);
    assert_eq!(nothing.size(), [0, 24]);
    let said = decoder.embed(&ids(
        &[ANSWERS[0], ANSWERS[1], ANSWERS[2], ANSWERS[0]].concat()
    ));
    for prefixes in [prefixes, without] {
        let texts: Vec<Texts<'_>> = prefixes
            .iter()
            .zip([vec![3], vec![1, 4], vec![3]])
            .map(|(prefix, lengths)| Texts { prefix, lengths })
            .collect();
        let lasts = decoder.branch(&said, &texts, Wanted::Last);
        let expected = [(0, 0), (1, 1), (1, 2), (2, 0)]
            .map(|(prompt, answer)| whole(&decoder, prompts[prompt], ANSWERS[answer]).i(-1));
        assert_close(&lasts, &Tensor::stack(&expected, 0), 1e-5);
    }
}

#[test]
fn prompts_with_one_beginning_are_read_as_each_alone() {
    let decoder = decoder(Kind::Float);
    let prefix = prefix_of(&decoder, &PROMPT);
    let other = prefix_of(&decoder, &PROMPT[1..4]);
    let embeds = decoder.embed(&ids(&[ANSWERS[0], ANSWERS[1], ANSWERS[2]].concat()));
    let behind = [(&prefix, 3), (&other, 1), (&prefix, 4)];
    let (lasts, prefixes) = decoder.read_on(&embeds, &behind, Wanted::Last);
    let prompts = [&PROMPT[..], &PROMPT[1..4], &PROMPT[..]];
    let alone = [0, 1, 2].map(|text| whole(&decoder, prompts[text], ANSWERS[text]).i(-1));
    assert_close(&lasts, &Tensor::stack(&alone, 0), 1e-5);
    // The resulting prefixes are equivalent to any other.
    for (text, prefix) in prefixes.iter().enumerate() {
        let whole = [prompts[text], ANSWERS[text]].concat();
        assert_eq!(prefix.tokens(), whole.len() as i64);
        let texts = [Texts {
            prefix,
            lengths: vec![1],
        }];
        let found = decoder.branch(&decoder.embed(&ids(&[8])), &texts, Wanted::Last);
        assert_close(&found, &self::whole(&decoder, &whole, &[8]), 1e-5);
    }
}

#[test]
fn steps_equal_causal_passes_also_after_a_row_has_left() {
    let decoder = decoder(Kind::Float);
    let prefix = prefix_of(&decoder, &PROMPT);
    let mut rows = SuffixKv::new();
    let step = |tokens: &[i64], rows: &mut SuffixKv| {
        let count = tokens.len() as i64;
        let prefix = &prefix;
        let prompt = Branches {
            prefix,
            rows,
            count,
        };
        decoder.step(&decoder.embed(&ids(tokens)), &mut [prompt])
    };
    let _ = step(&[9, 5, 3], &mut rows);
    rows.keep(&ids(&[0, 2]));
    let _ = step(&[2, 5], &mut rows);
    let found = step(&[6, 8], &mut rows);
    assert_close(
        &found.get(0),
        &whole(&decoder, &PROMPT, &[9, 2, 6]).get(2),
        1e-5,
    );
    assert_close(
        &found.get(1),
        &whole(&decoder, &PROMPT, &[3, 5, 8]).get(2),
        1e-5,
    );
}

#[test]
fn continuations_of_several_prompts_go_side_by_side() {
    let decoder = decoder(Kind::Float);
    let prompts: [&[i64]; 2] = [&PROMPT, &PROMPT[..3]];
    let prefixes = prompts.map(|prompt| prefix_of(&decoder, prompt));
    let mut rows = [SuffixKv::new(), SuffixKv::new()];
    let mut found = Tensor::new();
    // The second prompt's answer begins one token later.
    for tokens in [&[9, 5][..], &[2, 6, 4], &[3, 1, 8]] {
        let prompts = prefixes.iter().zip(&mut rows).zip([2, 1]);
        let prompts = prompts.map(|((prefix, rows), count)| Branches {
            prefix,
            rows,
            count,
        });
        let present = if tokens.len() == 2 { 1 } else { 2 };
        let mut prompts: Vec<_> = prompts.take(present).collect();
        found = decoder.step(&decoder.embed(&ids(tokens)), &mut prompts);
    }
    let expected = [
        whole(&decoder, prompts[0], &[9, 2, 3]).get(2),
        whole(&decoder, prompts[0], &[5, 6, 1]).get(2),
        whole(&decoder, prompts[1], &[4, 8]).get(1),
    ];
    assert_close(&found, &Tensor::stack(&expected, 0), 1e-5);
}

#[test]
fn trees_give_the_prompt_the_gradients_of_all_continuations() {
    let decoder = decoder(Kind::Float);
    let leaf = || decoder.embed(&ids(&PROMPT)).set_requires_grad(true);
    let square = |hidden: &Tensor| hidden.square().sum(Kind::Float).backward();
    let shared = |keep| {
        let prompt = leaf();
        let embeds = Tensor::cat(&[&prompt, &decoder.embed(&ids(&ANSWERS.concat()))], 0);
        let tree = PackedSequence {
            prompt: 5,
            branches: vec![3, 1, 4],
            wanted_from: 4,
        };
        let chain = decoder.read(&embeds, vec![tree], keep);
        square(&chain.output().i(1..));
        chain.backward();
        prompt.grad()
    };
    let prompt = leaf();
    for answer in ANSWERS {
        let tree = PackedSequence {
            prompt: (5 + answer.len()) as i64,
            branches: Vec::new(),
            wanted_from: 0,
        };
        let embeds = Tensor::cat(&[&prompt, &decoder.embed(&ids(answer))], 0);
        let chain = decoder.read(&embeds, vec![tree], SavedActivations::Everything);
        square(&chain.output().i(5..));
        chain.backward();
    }
    let apart = prompt.grad();
    let scale = apart.abs().max().double_value(&[]);
    let shared = [SavedActivations::Everything, SavedActivations::Inputs].map(shared);
    assert_close(&(&shared[0] / scale), &(apart / scale), 1e-5);
    assert_eq!(shared[1], shared[0]);
}

#[test]
fn half_precision_stays_near_full_precision() {
    let (narrow, wide) = (decoder(Kind::BFloat16), decoder(Kind::Float));
    let hidden = whole(&narrow, &PROMPT, ANSWERS[0]);
    assert_eq!(hidden.kind(), Kind::BFloat16);
    assert_close(
        &hidden.to_kind(Kind::Float),
        &whole(&wide, &PROMPT, ANSWERS[0]),
        0.2,
    );
}

#[test]
fn a_tied_head_is_the_embedding() {
    let decoder = decoder(Kind::Float);
    let hidden = seeded_uniform(1, "hidden", &[2, 24], 1.0);
    let logits = LmHead::tied(&decoder).forward(&hidden);
    let all: Vec<i64> = (0..config().vocab_size).collect();
    assert_eq!(
        logits,
        hidden.matmul(&decoder.embed(&ids(&all)).transpose(0, 1))
    );
}
