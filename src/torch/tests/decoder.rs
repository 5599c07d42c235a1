//! Tests of every forward pass of the decoder against a plain causal pass.

use std::rc::Rc;

use tch::{IndexOp, Kind, Tensor};

use ovchat_models::ModelError;
use ovchat_torch::decoder::{
    Branches, Decoder, DecoderSizes, KvPool, LmHead, PackedSequence, Places, PrefixKv, Texts,
    Wanted,
};
use ovchat_torch::layer_stack::SavedActivations;
use ovchat_torch::layers::{Activation, Bias, Path, WeightSource};
use ovchat_torch::lora::seeded_uniform;
use ovchat_torch::shim::count_operators;

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
    decoder_of(&config(), kind)
}

fn decoder_of(sizes: &DecoderSizes, kind: Kind) -> Decoder {
    Decoder::new(&(Path::root(&FakeSource(kind)) / "model"), sizes).unwrap()
}

/// A prompt with continuations that grow.
struct Growing {
    tokens: Vec<i64>,
    places: Vec<Rc<Places>>,
    /// The tokens of each continuation so far, and its places.
    rows: Vec<(Vec<i64>, Places)>,
}

impl Growing {
    /// Reads a prompt behind `shared`, another one in the pool.
    fn new(
        decoder: &Decoder,
        pool: &mut KvPool,
        shared: Option<&Growing>,
        own: &[i64],
        rows: usize,
    ) -> Self {
        let embeds = decoder.embed(&ids(own));
        let read = match shared {
            Some(shared) => {
                let prefix = pool.prefix(&shared.places[0]);
                decoder
                    .read_on(&embeds, &[(&prefix, own.len() as i64)], Wanted::Last)
                    .1
            }
            None => {
                decoder
                    .prefill(&embeds, &[own.len() as i64], Wanted::Last)
                    .1
            }
        };
        let shared = shared.map(|shared| (shared.tokens.clone(), Rc::clone(&shared.places[0])));
        let (before, places) = shared.map_or((Vec::new(), None), |(tokens, places)| {
            (tokens, Some(places))
        });
        let places: Vec<Rc<Places>> = places
            .into_iter()
            .chain(read.iter().map(|read| Rc::new(pool.store(read))))
            .collect();
        Self {
            tokens: [&before, own].concat(),
            places,
            rows: (0..rows).map(|_| (Vec::new(), pool.reserve(40))).collect(),
        }
    }

    fn branches(&self) -> Branches<'_> {
        let rows = self.rows.iter();
        Branches {
            prompt: self.places.iter().map(|places| &**places).collect(),
            rows: rows
                .map(|(tokens, places)| (places, tokens.len() as i64 - 1))
                .collect(),
        }
    }
}

/// Decodes a token of each row, and returns the hidden states.
fn step(
    decoder: &Decoder,
    pool: &KvPool,
    growing: &mut [Growing],
    next: &mut impl FnMut() -> i64,
) -> Tensor {
    let mut tokens = Vec::new();
    for (row, _) in growing.iter_mut().flat_map(|prompt| &mut prompt.rows) {
        row.push(next());
        tokens.extend(row.last());
    }
    let branches: Vec<Branches<'_>> = growing.iter().map(Growing::branches).collect();
    let rows = decoder.rows(&branches);
    decoder.step(&decoder.embed(&ids(&tokens)), pool, &rows)
}

/// Compares the last hidden states of rows with plain passes.
fn assert_rows(decoder: &Decoder, growing: &[Growing], found: &Tensor) {
    let mut number = 0;
    for prompt in growing {
        for (tokens, _) in &prompt.rows {
            let expected = whole(decoder, &prompt.tokens, tokens).get(tokens.len() as i64 - 1);
            assert_close(&found.get(number), &expected, 2e-5);
            number += 1;
        }
    }
    assert_eq!(number, found.size()[0]);
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
    for (text, prefix) in prefixes.iter().enumerate() {
        assert_eq!(
            prefix.tokens(),
            ANSWERS[text].len() as i64,
            "the remaining tokens only"
        );
    }
}

/// Prompts and answers join and leave midway, some behind shared prefixes; heads are shared by one, two
/// and seven query heads; prompts are longer than a piece.
#[test]
fn steps_equal_causal_passes_while_others_come_and_go() {
    for (heads, kv_heads, rows) in [(3, 3, 1), (4, 2, 5), (7, 1, 8), (14, 2, 3)] {
        let sizes = DecoderSizes {
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            ..config()
        };
        let decoder = decoder_of(&sizes, Kind::Float);
        let mut pool = decoder.pool(1 << 20);
        let mut number = 0;
        let mut next = || {
            number = (number * 7 + 11) % 37;
            number
        };
        let tokens =
            |count: usize| -> Vec<i64> { (0..count).map(|at| (at as i64 * 5 + 3) % 40).collect() };
        let _no_grad = tch::no_grad_guard();
        let mut growing = vec![
            Growing::new(&decoder, &mut pool, None, &PROMPT, rows),
            Growing::new(&decoder, &mut pool, None, &tokens(1100), rows),
        ];
        for _ in 0..3 {
            let found = step(&decoder, &pool, &mut growing, &mut next);
            assert_rows(&decoder, &growing, &found);
        }
        // A prompt joins behind the long one, a row leaves, and a short prompt joins.
        let joined = Growing::new(&decoder, &mut pool, Some(&growing[1]), &ANSWERS[2], 2);
        growing.push(joined);
        growing[1].rows.remove(0);
        growing.push(Growing::new(&decoder, &mut pool, None, &[7], rows));
        for _ in 0..2 {
            let found = step(&decoder, &pool, &mut growing, &mut next);
            assert_rows(&decoder, &growing, &found);
        }
        // The long prompt leaves; what it shared stays.
        growing.remove(1);
        let places = tokens(30);
        growing.push(Growing::new(&decoder, &mut pool, None, &places, rows));
        for _ in 0..2 {
            let found = step(&decoder, &pool, &mut growing, &mut next);
            assert_rows(&decoder, &growing, &found);
        }
    }
}

/// The number of operators of a step depends neither on the prompts nor on their answers nor on lengths.
#[test]
fn a_step_runs_as_many_operators_for_many_prompts_as_for_few() {
    let decoder = decoder(Kind::Float);
    let _no_grad = tch::no_grad_guard();
    let counts = |prompts: usize, rows: usize, length: usize| {
        let mut pool = decoder.pool(1 << 20);
        let tokens =
            |of: usize| -> Vec<i64> { (0..length + of % 2).map(|at| (at as i64) % 40).collect() };
        let mut growing: Vec<Growing> = (0..prompts)
            .map(|of| Growing::new(&decoder, &mut pool, None, &tokens(of), rows))
            .collect();
        for prompt in &mut growing {
            prompt
                .rows
                .iter_mut()
                .for_each(|(tokens, _)| tokens.push(1));
        }
        let branches: Vec<Branches<'_>> = growing.iter().map(Growing::branches).collect();
        let ids = Tensor::ones([(prompts * rows) as i64], (Kind::Int64, tch::Device::Cpu));
        let embeds = decoder.embed(&ids);
        let rows = decoder.rows(&branches);
        let (_, counts) = count_operators(|| decoder.step(&embeds, &pool, &rows));
        counts
    };
    let expected = counts(4, 5, 9);
    for (prompts, rows, length) in [(64, 5, 9), (4, 1, 9), (64, 1, 9), (4, 5, 700), (64, 1, 30)] {
        assert_eq!(
            counts(prompts, rows, length),
            expected,
            "{prompts} {rows} {length}"
        );
    }
    let layers = config().num_hidden_layers;
    println!("a step of {layers} layers: {expected:?}");
    assert!(expected.outermost <= 60 * layers, "{expected:?}");
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
