//! Tests of the policy against transformers on the same tiny checkpoint, and of its invariants.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor};

use super::super::recorded::{self, Expected, assert_close};
use super::*;
use ovchat_models::Dtype;

fn policy(dtype: Dtype) -> LlavaOnevisionPolicy {
    LlavaOnevisionPolicy::open(&recorded::spec(dtype)).unwrap()
}

fn how(count: usize, temperature: f64) -> Sampling {
    Sampling {
        count,
        temperature,
        top_p: 0.9,
        top_k: 0,
        min_p: 0.0,
        stop_strings: Vec::new(),
        stop_token_ids: Vec::new(),
        repetition_penalty: 1.0,
        max_new_tokens: 12,
    }
}

/// Settings whose answers do not depend on the last bits of the logits: no probability is close to
/// the threshold.
fn clear(count: usize) -> Sampling {
    Sampling {
        top_p: 1.0,
        ..how(count, 0.5)
    }
}

fn sample(
    policy: &mut LlavaOnevisionPolicy,
    prompts: &[ChatPrompt],
    how: &Sampling,
) -> Vec<Result<Vec<Generation>, RowFault>> {
    measured(policy, prompts, how).0
}

fn measured(
    policy: &mut LlavaOnevisionPolicy,
    prompts: &[ChatPrompt],
    how: &Sampling,
) -> (Vec<Result<Vec<Generation>, RowFault>>, ModelTelemetry) {
    let mut rows: Vec<_> = prompts.iter().map(|_| None).collect();
    let mut emit = |index: usize, answers| {
        assert!(rows[index].is_none(), "row {index} is returned twice");
        rows[index] = Some(answers);
        ControlFlow::Continue(())
    };
    let telemetry = policy.sample(prompts, how, &mut emit).unwrap();
    let rows = rows
        .into_iter()
        .map(|row| row.expect("every row is returned"));
    (rows.collect(), telemetry)
}

/// Asserts equal tokens, and log-probabilities within `1e-4`.
fn assert_same(
    left: &[Result<Vec<Generation>, RowFault>],
    right: &[Result<Vec<Generation>, RowFault>],
) {
    assert_eq!(left.len(), right.len());
    for (left, right) in left.iter().zip(right) {
        let (left, right) = (left.as_ref().unwrap(), right.as_ref().unwrap());
        assert_eq!(left.len(), right.len());
        for (left, right) in left.iter().zip(right) {
            assert_eq!(left.token_ids, right.token_ids);
            for (one, other) in left.token_logps.iter().zip(&right.token_logps) {
                assert!((one - other).abs() < 1e-4, "{one} {other}");
            }
        }
    }
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
        let tiles: Vec<_> = prepared.images.iter().collect();
        let features = policy.network.image_features(&tiles);
        let embeds = policy.network.embed_prompt(&prepared.text, &features);
        let tokens = embeds.size()[0];
        let decoder = &policy.network.language_model;
        let hidden = decoder.hidden(&embeds);
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

/// Takes more rows than fit into one batch, so that prompts wait, enter and leave at different
/// times.
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
        ..clear(5)
    };
    let mut policy = policy(Dtype::Float32);
    let together = sample(&mut policy, &prompts, &how);
    let again = sample(&mut policy, &prompts, &how);
    let mut lengths = BTreeSet::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let alone = sample(&mut policy, std::slice::from_ref(prompt), &how);
        let [together, again, alone] =
            [&together[index], &again[index], &alone[0]].map(|row| row.as_ref().unwrap());
        assert_eq!(together, again, "bitwise equal");
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
    // The temperature is so high that every token is sampled, the stop tokens too.
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
    // Rows that leave the batch do not change the others.
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
fn a_image_that_does_not_decode_is_the_fault_of_its_row_only() {
    let mut prompts = recorded::prompts();
    prompts[0].images[0].bytes = b"not an image".to_vec().into();
    prompts[0].images[0].id = "broken".to_owned();
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
        assert!(rows[0].as_ref().unwrap_err().0.contains("logits are NaN"));
    }
}

/// Twelve prompts about three images, in mixed order.
fn many() -> Vec<ChatPrompt> {
    let mut prompts = Vec::new();
    for round in 0..3 {
        for mut prompt in recorded::prompts() {
            prompt.seed += 100 * round;
            prompt.question.push_str(&" more".repeat(round as usize));
            prompts.push(prompt);
        }
    }
    prompts
}

#[test]
fn images_and_prompts_are_read_once_whatever_the_budget_and_the_answers_are_the_same() {
    let prompts = many();
    let how = clear(5);
    let mut policy = policy(Dtype::Float32);
    let (expected, telemetry) = measured(&mut policy, &prompts, &how);
    let lengths = |policy: &LlavaOnevisionPolicy| -> usize {
        let ids = prompts
            .iter()
            .map(|prompt| policy.prep.count(prompt).unwrap());
        ids.sum()
    };
    let tokens = |rows: &[Result<Vec<Generation>, RowFault>]| -> usize {
        let answers = rows.iter().flat_map(|row| row.as_ref().unwrap());
        answers.map(|answer| answer.token_ids.len()).sum()
    };
    // Three prompts share the same images each time; their common prefix is prefilled once.
    let prefix = |prompt: &ChatPrompt| {
        let ids = policy.prep.ids(prompt).unwrap();
        ids.images.last().map_or(0, |encoded| encoded.end)
    };
    let prefixes: usize = prompts.iter().map(prefix).sum();
    let shared = prefixes as u64 / 3 * 2;
    assert_eq!(telemetry.shared_tokens, shared);
    for (rows, tokens_max, read_tokens) in [
        (usize::MAX, usize::MAX, usize::MAX),
        (12, 700, 200),
        (5, usize::MAX, 1),
        (1, 1, 1),
    ] {
        policy.budget.rows = rows;
        policy.budget.tokens = tokens_max;
        policy.budget.read_tokens = read_tokens;
        let (found, telemetry) = measured(&mut policy, &prompts, &how);
        assert_same(&found, &expected);
        let counts = [telemetry.prompts, telemetry.images, telemetry.tower_passes];
        // Two images on their own, and two in one prompt.
        assert_eq!(counts, [12, 4, 4], "each image goes through the tower once");
        assert_eq!(
            telemetry.prompt_tokens,
            lengths(&policy) as u64,
            "not once per answer"
        );
        assert_eq!(
            telemetry.shared_tokens, shared,
            "independent of the batch size"
        );
        assert_eq!(telemetry.answer_tokens, tokens(&found) as u64);
        assert!(telemetry.step_rows <= telemetry.steps * telemetry.rows_max.max(5));
        assert_eq!(telemetry.oom_retries, 0);
    }
    // 60 answers of at most 12 tokens, all in one batch.
    assert_eq!((telemetry.rows_max, telemetry.steps), (60, 12));
    assert_eq!(telemetry.step_rows, telemetry.answer_tokens);
}

/// The policy of the small world and twelve of its questions.
fn small_world() -> (LlavaOnevisionPolicy, Vec<ChatPrompt>) {
    let samples =
        std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("data-samples");
    let spec = models::LlavaOnevisionSpec {
        weights: samples.join("policy"),
        adapter: None,
        ..recorded::spec(Dtype::Float32)
    };
    let text = std::fs::read(samples.join("prompts.json")).unwrap();
    let records: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    let prompts = records[..12].iter().enumerate().map(|(number, record)| {
        let name = record["image"].as_str().unwrap();
        ChatPrompt {
            images: vec![EncodedImage {
                id: name.to_owned(),
                bytes: std::fs::read(samples.join("images").join(name))
                    .unwrap()
                    .into(),
            }],
            question: record["prompt"].as_str().unwrap().to_owned(),
            seed: number as u64,
            ..recorded::prompts().remove(3)
        }
    });
    (
        LlavaOnevisionPolicy::open(&spec).unwrap(),
        prompts.collect(),
    )
}

#[test]
fn sharing_gives_the_tokens_and_log_probabilities_that_each_answer_has_alone() {
    let (mut policy, prompts) = small_world();
    let how = Sampling {
        max_new_tokens: 24,
        ..how(5, 0.7)
    };
    let (together, telemetry) = measured(&mut policy, &prompts, &how);
    assert!(
        telemetry.tower_passes < telemetry.prompts,
        "images have several questions"
    );
    policy.budget.rows = 1;
    policy.budget.read_tokens = 1;
    let apart = sample(&mut policy, &prompts, &how);
    assert_same(&together, &apart);

    // Without any sharing: each answer in a separate pass, with its prompt and its image.
    let _no_grad = tch::no_grad_guard();
    let network = &policy.network;
    for (prompt, answers) in prompts.iter().zip(&together) {
        for answer in answers.as_ref().unwrap() {
            let mut prepared = policy.prep.prepare(prompt).unwrap();
            let first = prepared.text.ids.len() as i64 - 1;
            let ids: Vec<i64> = answer.token_ids.iter().map(|&id| id.into()).collect();
            prepared.text.ids.extend(&ids);
            let features = network.image_features(&prepared.images);
            let embeds = network.embed_prompt(&prepared.text, &features);
            let hidden = network.language_model.hidden(&embeds);
            let hidden = hidden.narrow(0, first, ids.len() as i64);
            let logits = network.lm_head.forward(&hidden);
            let logps = super::super::dpo::token_logps(&logits, &Tensor::from_slice(&ids));
            let logps = Vec::<f32>::try_from(logps).unwrap();
            for (alone, shared) in logps.iter().zip(&answer.token_logps) {
                assert!((alone - shared).abs() < 1e-4, "{alone} {shared}");
            }
        }
    }
}

/// Memory runs out anywhere in a part, once or repeatedly.
#[test]
fn memory_that_runs_out_costs_time_and_no_answer() {
    let prompts = many();
    let how = clear(5);
    let mut policy = policy(Dtype::Float32);
    let budget = policy.budget;
    let (expected, _) = measured(&mut policy, &prompts, &how);
    for calls in 0..14 {
        policy.budget = budget;
        super::super::error::tests::run_out_after(calls);
        let (found, telemetry) = measured(&mut policy, &prompts, &how);
        assert_eq!(telemetry.oom_retries, 1, "{calls}");
        assert_same(&found, &expected);
        assert_eq!((policy.budget.rows, policy.budget.oom_retries), (32, 0));
    }
}

#[test]
fn a_prompt_that_is_too_much_alone_costs_its_row_only() {
    let prompts = recorded::prompts();
    let mut policy = policy(Dtype::Float32);
    policy.budget.rows = 1;
    // The tower, then the prefill, of the first prompt; a decode step of the next one.
    for (calls, lost) in [(1, 0), (14 + 2, 2)] {
        super::super::error::tests::run_out_after(calls);
        let rows = sample(&mut policy, &prompts, &how(2, 3.0));
        for (index, row) in rows.iter().enumerate() {
            match row {
                Ok(_) => assert_ne!(index, lost),
                Err(fault) => {
                    assert_eq!(index, lost);
                    assert!(fault.0.contains("out of memory"), "{fault}");
                }
            }
        }
    }
}

#[test]
fn a_prompt_that_can_never_fit_is_refused_before_it_is_read() {
    let spec = models::LlavaOnevisionSpec {
        memory_gb: Some(models::Gigabytes::try_from(125e-6).unwrap()),
        ..recorded::spec(Dtype::Float32)
    };
    let mut policy = LlavaOnevisionPolicy::open(&spec).unwrap();
    let (rows, telemetry) = measured(&mut policy, &recorded::prompts(), &how(5, 1.0));
    let fault = rows[0].as_ref().unwrap_err();
    assert!(fault.0.contains("memory_gb"), "{fault}");
    assert!(rows[3].is_ok(), "{rows:?}");
    let refused = rows.iter().filter(|row| row.is_err()).count() as u64;
    assert_eq!(telemetry.prompts, 4 - refused);
}

#[test]
fn stop_strings_and_stop_tokens_end_answers() {
    let prompts = &recorded::prompts()[..2];
    let mut policy = policy(Dtype::Float32);
    let plain = Sampling {
        max_new_tokens: 40,
        ..how(4, 3.0)
    };
    let free = sample(&mut policy, prompts, &plain);
    let first = &free[0].as_ref().unwrap()[0];
    let middle: String = first.text.chars().skip(10).take(2).collect();
    let by_string = Sampling {
        stop_strings: vec!["never said".to_owned(), middle.clone()],
        ..plain.clone()
    };
    let stopped = sample(&mut policy, prompts, &by_string);
    for (free, stopped) in free.iter().zip(&stopped) {
        for (free, stopped) in free.as_ref().unwrap().iter().zip(stopped.as_ref().unwrap()) {
            match free.text.find(&middle) {
                Some(end) => {
                    assert_eq!(stopped.stop, Stop::String);
                    assert_eq!(stopped.text, free.text[..end]);
                    assert!(free.token_ids.starts_with(&stopped.token_ids));
                    let said = policy.prep.chat.decode(
                        &stopped
                            .token_ids
                            .iter()
                            .map(|&id| id.into())
                            .collect::<Vec<i64>>(),
                    );
                    assert!(said.contains(&middle));
                }
                None => assert_eq!(stopped.token_ids, free.token_ids),
            }
        }
    }
    assert_eq!(stopped[0].as_ref().unwrap()[0].stop, Stop::String);

    let id = first.token_ids[5];
    let by_token = Sampling {
        stop_token_ids: vec![id.into()],
        ..plain.clone()
    };
    let rows = sample(&mut policy, prompts, &by_token);
    let answer = &rows[0].as_ref().unwrap()[0];
    let end = first.token_ids.iter().position(|&one| one == id).unwrap();
    assert_eq!(answer.token_ids, first.token_ids[..=end]);
    assert_eq!(answer.stop, Stop::Token);

    let unknown = Sampling {
        stop_token_ids: vec![264],
        ..plain
    };
    let outcome = policy.sample(prompts, &unknown, &mut |_, _| ControlFlow::Continue(()));
    let error = outcome.unwrap_err().to_string();
    assert!(
        error.contains("264") && error.contains("0 to 263"),
        "{error}"
    );
}

/// The tiny checkpoint with the published grids of up to 6 x 6 tiles and a long context.
fn large_grids() -> (tempfile::TempDir, models::LlavaOnevisionSpec) {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(recorded::folder()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let grids: Vec<[usize; 2]> = (1..=6)
        .flat_map(|down| (1..=6).map(move |across| [12 * down, 12 * across]))
        .collect();
    for name in ["config.json", "preprocessor_config.json"] {
        let path = folder.path().join(name);
        let mut value: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        value["image_grid_pinpoints"] = serde_json::json!(grids);
        if name == "config.json" {
            value["vision_aspect_ratio"] = serde_json::json!("anyres_max_9");
            value["text_config"]["max_position_embeddings"] = serde_json::json!(4096);
        }
        std::fs::write(&path, value.to_string()).unwrap();
    }
    let spec = models::LlavaOnevisionSpec {
        weights: folder.path().to_owned(),
        adapter: None,
        ..recorded::spec(Dtype::Float32)
    };
    (folder, spec)
}

fn drawn(id: &str, width: u32, height: u32) -> EncodedImage {
    let pixels = image::RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([(x * 7) as u8, (y * 5) as u8, (x * y) as u8])
    });
    let mut bytes = std::io::Cursor::new(Vec::new());
    pixels
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    EncodedImage {
        id: id.to_owned(),
        bytes: bytes.into_inner().into(),
    }
}

/// Each prompt gets the same answers as when it is sampled alone, whatever it is batched with.
#[test]
fn every_prompt_of_an_adversarial_part_comes_out_right() {
    let (_folder, spec) = large_grids();
    let mut policy = LlavaOnevisionPolicy::open(&spec).unwrap();
    let ask = |images: &[&EncodedImage], question: String, seed| ChatPrompt {
        images: images.iter().map(|&encoded| encoded.clone()).collect(),
        question,
        seed,
        ..recorded::prompts().remove(3)
    };
    let [dot, wall, plain] =
        [("dot", 1, 1), ("wall", 72, 60), ("plain", 30, 20)].map(|(id, x, y)| drawn(id, x, y));
    assert_eq!(policy.prep.tiles(&wall, 1).unwrap().packing.tiles(), 31);
    let mut prompts = vec![
        ask(&[&dot], "What?".to_owned(), 1),
        ask(&[&wall], "What?".to_owned(), 2),
        ask(&[], "What?".to_owned(), 3),
        ask(&[&wall, &dot], "What?".to_owned(), 4),
    ];
    for number in 0..20 {
        let question = format!("What is at {number}?");
        prompts.push(ask(&[&plain], question, 5 + number));
    }
    for (count, max_new_tokens) in [(1, 12), (64, 3), (5, 1), (5, 12)] {
        let how = Sampling {
            max_new_tokens,
            ..clear(count)
        };
        let (rows, telemetry) = measured(&mut policy, &prompts, &how);
        assert_eq!((telemetry.images, telemetry.tower_passes), (5, 5));
        for (index, row) in rows.iter().enumerate() {
            assert_eq!(row.as_ref().unwrap().len(), count);
            if index < 6 {
                let alone = sample(&mut policy, &prompts[index..=index], &how);
                assert_same(std::slice::from_ref(row), &alone);
            }
        }
        let (again, _) = measured(&mut policy, &prompts, &how);
        assert_eq!(rows, again, "bitwise equal");
    }
}

fn prompt(encoded: Option<&str>) -> ChatPrompt {
    let images = encoded.into_iter().map(|id| EncodedImage {
        id: id.to_owned(),
        bytes: [].into(),
    });
    ChatPrompt {
        images: images.collect(),
        ..recorded::prompts().remove(3)
    }
}

#[test]
fn prompts_about_one_image_are_answered_together() {
    let prompts = ["a", "b", "a"].map(|id| prompt(Some(id)));
    assert_eq!(by_first_image(&prompts), [0, 2, 1]);
    let wordy = [prompt(Some("a")), prompt(None), prompt(Some("a"))];
    assert_eq!(by_first_image(&wordy), [0, 2, 1]);
}
