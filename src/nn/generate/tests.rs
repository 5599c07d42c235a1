//! The policy against what transformers says with the same tiny checkpoint, and its promises.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use tch::{Device, Kind};

use super::super::decoder::Wanted;
use super::super::recorded::{self, Expected, assert_close};
use super::*;
use crate::models::Dtype;

fn policy(dtype: Dtype) -> OnevisionPolicy {
    OnevisionPolicy::open(&recorded::spec(dtype)).unwrap()
}

fn how(count: usize, temperature: f64) -> Sampling {
    Sampling {
        count,
        temperature,
        top_p: 0.9,
        top_k: 0,
        repetition_penalty: 1.0,
        max_new_tokens: 12,
    }
}

fn sample(
    policy: &mut OnevisionPolicy,
    prompts: &[Prompt],
    how: &Sampling,
) -> Vec<Result<Vec<Generation>, RowFault>> {
    let mut rows: Vec<_> = prompts.iter().map(|_| None).collect();
    let mut emit = |index: usize, answers| {
        assert!(rows[index].is_none(), "row {index} comes twice");
        rows[index] = Some(answers);
        ControlFlow::Continue(())
    };
    policy.sample(prompts, how, &mut emit).unwrap();
    rows.into_iter()
        .map(|row| row.expect("every row comes"))
        .collect()
}

#[test]
fn token_ids_and_hidden_states_equal_those_of_transformers() {
    let (policy, expected) = (policy(Dtype::Float32), Expected::open());
    for (index, prompt) in recorded::prompts().iter().enumerate() {
        let prepared = policy.prep.prepare(prompt).unwrap();
        assert_eq!(
            prepared.text.ids,
            expected.integers(&format!("ids.{index}"))
        );
        let _no_grad = tch::no_grad_guard();
        let tiles: Vec<_> = prepared.pictures.iter().collect();
        let features = policy.network.image_features(&tiles);
        let embeds = policy.network.embed_prompt(&prepared.text, &features);
        let tokens = embeds.size()[0];
        let decoder = &policy.network.language_model;
        let (hidden, _) = decoder.prefill(&embeds, &[tokens], Wanted::All);
        let name = format!("hidden.{index}");
        assert_close(&name, &hidden, &expected.tensor(&name), 1e-4);
        let last = hidden.narrow(0, tokens - 1, 1);
        let logits = policy.network.lm_head.forward(&last).squeeze_dim(0);
        let name = format!("logits.{index}");
        assert_close(&name, &logits, &expected.tensor(&name), 1e-4);
    }
}

#[test]
fn greedy_answers_and_their_log_probabilities_equal_those_of_transformers() {
    let expected = Expected::open();
    let rows = sample(
        &mut policy(Dtype::Float32),
        &recorded::prompts(),
        &how(2, 0.0),
    );
    for (index, row) in rows.into_iter().enumerate() {
        let [first, second] = row.unwrap().try_into().unwrap();
        let ids: Vec<i64> = first.token_ids.iter().map(|&id| id.into()).collect();
        assert_eq!(ids, expected.integers(&format!("greedy.{index}")));
        let logps = expected.numbers(&format!("logps.{index}"));
        for (found, expected) in first.token_logps.iter().zip(&logps) {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
        assert_eq!(first.token_ids, second.token_ids);
        assert_eq!(first.stop, Stop::Length);
        assert_ne!(first.seed, second.seed);
    }
}

#[test]
fn drawn_answers_depend_on_nothing_but_their_prompt_and_number() {
    let prompts = recorded::prompts();
    let all = sample(&mut policy(Dtype::Float32), &prompts, &how(3, 1.0));
    let alone = sample(&mut policy(Dtype::Float32), &prompts[2..3], &how(2, 1.0));
    let (all, alone) = (all[2].as_ref().unwrap(), alone[0].as_ref().unwrap());
    for (left, right) in all.iter().zip(alone) {
        assert_eq!(left.token_ids, right.token_ids);
        assert_eq!(left.seed, right.seed);
    }
    assert_ne!(all[0].token_ids, all[1].token_ids);
}

/// More rows than go side by side, so that prompts wait, enter and leave at all times.
#[test]
fn who_is_beside_whom_changes_no_answer() {
    let mut prompts = Vec::new();
    for round in 0..8 {
        for mut prompt in recorded::prompts() {
            prompt.seed += 100 * round;
            prompt.question.push_str(&" more".repeat(round as usize));
            prompts.push(prompt);
        }
    }
    let how = Sampling {
        max_new_tokens: 20,
        ..how(5, 3.0)
    };
    let mut policy = policy(Dtype::Float32);
    let together = sample(&mut policy, &prompts, &how);
    let again = sample(&mut policy, &prompts, &how);
    let mut lengths = BTreeSet::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let alone = sample(&mut policy, std::slice::from_ref(prompt), &how);
        let [together, again, alone] =
            [&together[index], &again[index], &alone[0]].map(|row| row.as_ref().unwrap());
        assert_eq!(together, again, "the same bits");
        for (together, alone) in together.iter().zip(alone) {
            assert_eq!(together.token_ids, alone.token_ids);
            for (one, other) in together.token_logps.iter().zip(&alone.token_logps) {
                assert!((one - other).abs() < 1e-4, "{one} {other}");
            }
            lengths.insert(together.token_ids.len());
        }
    }
    assert!(lengths.len() > 1, "answers end at different times");
}

#[test]
fn one_answer_many_answers_and_one_token_come_out_right() {
    let prompts = recorded::prompts();
    let mut policy = policy(Dtype::Float32);
    for (count, max_new_tokens) in [(1, 7), (64, 3), (3, 1)] {
        let how = Sampling {
            max_new_tokens,
            ..how(count, 1.0)
        };
        for row in sample(&mut policy, &prompts, &how) {
            let answers = row.unwrap();
            assert_eq!(answers.len(), count);
            for answer in answers {
                let ended = answer.stop == Stop::Token;
                assert!(ended || answer.token_ids.len() == max_new_tokens);
            }
        }
    }
}

#[test]
fn an_answer_that_stops_ends_in_the_stop_token_and_its_text_does_not() {
    let mut policy = policy(Dtype::Float32);
    // So hot that every token comes, the stop tokens too.
    let hot = Sampling {
        top_p: 1.0,
        max_new_tokens: 100,
        ..how(16, 50.0)
    };
    let prompts = &recorded::prompts()[1..2];
    let rows = sample(&mut policy, prompts, &hot);
    let answers = rows[0].as_ref().unwrap();
    let stops = policy.prep.chat.stops();
    let is_stop = |id: i32| stops.contains(&i64::from(id));
    for answer in answers {
        let (last, before) = answer.token_ids.split_last().unwrap();
        assert!(!before.iter().any(|&id| is_stop(id)));
        assert_eq!(is_stop(*last), answer.stop == Stop::Token);
        assert!(!answer.text.contains("<|"), "{}", answer.text);
        assert_eq!(answer.token_ids.len(), answer.token_logps.len());
        let banned = |id: &i32| policy.banned.contains(&i64::from(*id));
        assert!(!answer.token_ids.iter().any(banned));
    }
    assert!(answers.iter().any(|answer| answer.stop == Stop::Token));
    // Rows that leave the batch leave the others as they are.
    for (number, answer) in answers.iter().enumerate() {
        let fewer = Sampling {
            count: number + 1,
            ..hot.clone()
        };
        let again = sample(&mut policy, prompts, &fewer);
        assert_eq!(
            again[0].as_ref().unwrap()[number].token_ids,
            answer.token_ids
        );
    }
}

#[test]
fn a_picture_that_does_not_decode_is_the_fault_of_its_row_only() {
    let mut prompts = recorded::prompts();
    prompts[0].pictures[0].bytes = b"no picture".to_vec().into();
    prompts[0].pictures[0].id = "broken".to_owned();
    let rows = sample(&mut policy(Dtype::Float32), &prompts, &how(1, 0.0));
    assert!(rows[0].as_ref().unwrap_err().0.contains("broken"));
    assert!(rows[1..].iter().all(Result::is_ok));
}

#[test]
fn a_prompt_that_fills_the_context_is_a_fault_and_one_that_nearly_does_is_cut_off() {
    let mut prompts = vec![recorded::prompts().remove(3), recorded::prompts().remove(3)];
    prompts[0].question = "x".repeat(400);
    let context = 256 - 71 + "Say something.".len();
    prompts[1].question = "x".repeat(context - 5);
    let rows = sample(&mut policy(Dtype::Float32), &prompts, &how(1, 0.0));
    let fault = rows[0].as_ref().unwrap_err();
    assert!(fault.0.contains("context is 256"), "{fault}");
    let answer = &rows[1].as_ref().unwrap()[0];
    assert_eq!((answer.token_ids.len(), answer.stop), (5, Stop::Length));
}

#[test]
fn bfloat16_answers_with_nearly_the_same_log_probabilities() {
    let prompts = recorded::prompts();
    let wide = sample(&mut policy(Dtype::Float32), &prompts, &how(1, 0.0));
    let narrow = sample(&mut policy(Dtype::Bfloat16), &prompts, &how(1, 0.0));
    for (wide, narrow) in wide.iter().zip(&narrow) {
        let first =
            |row: &Result<Vec<Generation>, RowFault>| row.as_ref().unwrap()[0].token_logps[0];
        assert!((first(wide) - first(narrow)).abs() < 0.1);
    }
}

#[test]
fn weights_that_are_not_numbers_are_a_fault_in_words() {
    let mut policy = policy(Dtype::Float32);
    let _no_grad = tch::no_grad_guard();
    let nan = Tensor::full([264, 24], f64::NAN, (Kind::Float, Device::Cpu));
    policy.network.lm_head = super::super::decoder::LmHead::of(nan);
    for temperature in [0.0, 1.0] {
        let rows = sample(&mut policy, &recorded::prompts()[3..], &how(1, temperature));
        assert!(rows[0].as_ref().unwrap_err().0.contains("not numbers"));
    }
}

fn prompt(picture: Option<&str>) -> Prompt {
    let pictures = picture.into_iter().map(|id| Picture {
        id: id.to_owned(),
        bytes: [].into(),
    });
    Prompt {
        pictures: pictures.collect(),
        ..recorded::prompts().remove(3)
    }
}

#[test]
fn prompts_about_one_picture_are_answered_together() {
    let prompts = ["a", "b", "a"].map(|id| prompt(Some(id)));
    assert_eq!(by_first_picture(&prompts), [0, 2, 1]);
    let wordy = [prompt(Some("a")), prompt(None), prompt(Some("a"))];
    assert_eq!(by_first_picture(&wordy), [0, 2, 1]);
}

#[test]
fn the_oldest_features_leave_the_cache_first() {
    let key = |picture: &str| FeatureKey {
        picture: picture.to_owned(),
        alone: true,
    };
    let features = |count: i64| Tensor::zeros([count], (Kind::Float, Device::Cpu));
    let mut cache = FeatureCache::new(40);
    cache.put(key("a"), features(4));
    cache.put(key("b"), features(4));
    assert!(cache.get(&key("a")).is_some());
    cache.put(key("c"), features(4));
    assert!(cache.get(&key("a")).is_none());
    assert!(cache.get(&key("b")).is_some() && cache.get(&key("c")).is_some());
    cache.put(key("d"), features(11));
    assert_eq!((cache.bytes, cache.entries.len()), (0, 0));
}
