//! Tests of the policy against transformers on the same tiny checkpoint, and of its invariants.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;

use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::common::{Expected, assert_close, open};
use crate::recorded::onevision::{
    self, assert_same, clear, how, many, measured, prompts, sample, spec,
};
use ovchat_models::preprocess::Processor;
use ovchat_models::{
    ChatPrompt, Dtype, Generation, Gigabytes, Policy as _, RowFault, Sampling, Stop,
    VisionLanguageSpec, Visual,
};
use ovchat_torch::dpo::token_logps;
use ovchat_torch::generate::NetworkPolicy;
use ovchat_torch::weights::{Weights, save_safetensors};

fn policy(dtype: Dtype) -> NetworkPolicy {
    NetworkPolicy::open(&spec(dtype)).unwrap()
}

/// The preprocessor of the recorded model.
fn prep() -> Processor {
    Processor::open(&onevision::folder()).unwrap()
}

/// A copy of the recorded model that a test may modify, and its spec.
fn copy() -> (TempDir, VisionLanguageSpec) {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(onevision::folder()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let spec = VisionLanguageSpec {
        weights: folder.path().to_owned(),
        ..spec(Dtype::Float32)
    };
    (folder, spec)
}

#[test]
fn token_ids_and_hidden_states_equal_those_of_transformers() {
    let expected = Expected::open();
    let (prep, network) = open(&onevision::folder(), Kind::Float);
    for (index, prompt) in prompts().iter().enumerate() {
        let prepared = prep.prepare(prompt).unwrap();
        assert_eq!(
            prepared.text.ids,
            expected.integers(&format!("ids.{index}"))
        );
        let _no_grad = tch::no_grad_guard();
        let tiles: Vec<_> = prepared.images.iter().collect();
        let features = network.image_features(&tiles);
        let embeds = network.embed_prompt(&prepared.text, &features);
        let tokens = embeds.size()[0];
        let hidden = network.decoder().hidden(&embeds);
        let name = format!("hidden.{index}");
        assert_close(&name, &hidden, &expected.tensor(&name), 1e-4);
        let last = hidden.narrow(0, tokens - 1, 1);
        let logits = network.lm_head().forward(&last).squeeze_dim(0);
        let name = format!("logits.{index}");
        assert_close(&name, &logits, &expected.tensor(&name), 1e-4);
    }
}

#[test]
fn greedy_answers_and_their_log_probabilities_equal_those_of_transformers() {
    let expected = Expected::open();
    let rows = sample(&mut policy(Dtype::Float32), &prompts(), &how(2, 0.0));
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
    let prompts = prompts();
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
    let prompts = many(8);
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
    let prompts = prompts();
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
    let prompts = &prompts()[1..2];
    let rows = sample(&mut policy, prompts, &hot);
    let answers = rows[0].as_ref().unwrap();
    let prep = prep();
    let stops = prep.chat().stops();
    let banned = prep.chat().banned(prep.text_config().vocab_size);
    let is_stop = |id: i32| stops.contains(&i64::from(id));
    for answer in answers {
        let (last, before) = answer.token_ids.split_last().unwrap();
        assert!(!before.iter().any(|&id| is_stop(id)));
        assert_eq!(is_stop(*last), answer.stop == Stop::Token);
        assert!(!answer.text.contains("<|"), "{}", answer.text);
        assert_eq!(answer.token_ids.len(), answer.token_logps.len());
        let is_banned = |id: &i32| banned.contains(&i64::from(*id));
        assert!(!answer.token_ids.iter().any(is_banned));
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
    let mut prompts = prompts();
    prompts[0].images[0].bytes = b"not an image".to_vec().into();
    prompts[0].images[0].id = "broken".to_owned();
    let rows = sample(&mut policy(Dtype::Float32), &prompts, &how(1, 0.0));
    assert!(rows[0].as_ref().unwrap_err().0.contains("broken"));
    assert!(rows[1..].iter().all(Result::is_ok));
}

#[test]
fn a_prompt_that_fills_the_context_is_a_fault_and_one_that_nearly_does_is_cut_off() {
    let mut prompts = vec![prompts().remove(3), prompts().remove(3)];
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
    let prompts = prompts();
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
    let (folder, spec) = copy();
    let path = folder.path().join("model.safetensors");
    let weights = Weights::open_file(&path).unwrap();
    let tensor = |name: &str| {
        let tensor = weights.read(name, Device::Cpu).unwrap();
        let is_head = name == "language_model.lm_head.weight";
        let changed = is_head.then(|| tensor.full_like(f64::NAN));
        (name.to_owned(), changed.unwrap_or(tensor))
    };
    let tensors: Vec<(String, Tensor)> = weights.names().map(tensor).collect();
    std::fs::remove_file(&path).unwrap();
    save_safetensors(&path, &tensors, &[("format", "pt")]).unwrap();
    let mut policy = NetworkPolicy::open(&spec).unwrap();
    for temperature in [0.0, 1.0] {
        let rows = sample(&mut policy, &prompts()[3..], &how(1, temperature));
        assert!(rows[0].as_ref().unwrap_err().0.contains("logits are NaN"));
    }
}

#[test]
fn images_and_prompts_are_read_once_whatever_the_budget_and_the_answers_are_the_same() {
    let prompts = many(3);
    let how = clear(5);
    let (prep, mut policy) = (prep(), policy(Dtype::Float32));
    let (expected, telemetry) = measured(&mut policy, &prompts, &how);
    let lengths = prompts.iter().map(|prompt| prep.count(prompt).unwrap());
    let lengths: usize = lengths.sum();
    let tokens = |rows: &[Result<Vec<Generation>, RowFault>]| -> usize {
        let answers = rows.iter().flat_map(|row| row.as_ref().unwrap());
        answers.map(|answer| answer.token_ids.len()).sum()
    };
    // Three prompts share the same images each time; their common prefix is prefilled once.
    let prefix = |prompt: &ChatPrompt| {
        let ids = prep.ids(prompt).unwrap();
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
            telemetry.prompt_tokens, lengths as u64,
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
fn small_world() -> (VisionLanguageSpec, Vec<ChatPrompt>) {
    let samples = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("data-samples");
    let spec = VisionLanguageSpec {
        weights: samples.join("policy"),
        ..spec(Dtype::Float32)
    };
    let text = std::fs::read(samples.join("prompts.json")).unwrap();
    let records: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    let questions = records[..12].iter().enumerate().map(|(number, record)| {
        let name = record["image"].as_str().unwrap();
        ChatPrompt {
            images: vec![Visual::new(
                name.to_owned(),
                std::fs::read(samples.join("images").join(name))
                    .unwrap()
                    .into(),
            )],
            question: record["prompt"].as_str().unwrap().to_owned(),
            seed: number as u64,
            ..prompts().remove(3)
        }
    });
    (spec, questions.collect())
}

#[test]
fn sharing_gives_the_tokens_and_log_probabilities_that_each_answer_has_alone() {
    let (spec, prompts) = small_world();
    let mut policy = NetworkPolicy::open(&spec).unwrap();
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
    let (prep, network) = open(&spec.weights, Kind::Float);
    for (prompt, answers) in prompts.iter().zip(&together) {
        for answer in answers.as_ref().unwrap() {
            let mut prepared = prep.prepare(prompt).unwrap();
            let first = prepared.text.ids.len() as i64 - 1;
            let ids: Vec<i64> = answer.token_ids.iter().map(|&id| id.into()).collect();
            prepared.text.ids.extend(&ids);
            let tiles: Vec<_> = prepared.images.iter().collect();
            let features = network.image_features(&tiles);
            let embeds = network.embed_prompt(&prepared.text, &features);
            let hidden = network.decoder().hidden(&embeds);
            let hidden = hidden.narrow(0, first, ids.len() as i64);
            let logits = network.lm_head().forward(&hidden);
            let logps = token_logps(&logits, &Tensor::from_slice(&ids));
            let logps = Vec::<f32>::try_from(logps).unwrap();
            for (alone, shared) in logps.iter().zip(&answer.token_logps) {
                assert!((alone - shared).abs() < 1e-4, "{alone} {shared}");
            }
        }
    }
}

#[test]
fn a_prompt_that_can_never_fit_is_refused_before_it_is_read() {
    let spec = VisionLanguageSpec {
        memory_gb: Some(Gigabytes::try_from(125e-6).unwrap()),
        ..spec(Dtype::Float32)
    };
    let mut policy = NetworkPolicy::open(&spec).unwrap();
    let (rows, telemetry) = measured(&mut policy, &prompts(), &how(5, 1.0));
    let fault = rows[0].as_ref().unwrap_err();
    assert!(fault.0.contains("memory_gb"), "{fault}");
    assert!(rows[3].is_ok(), "{rows:?}");
    let refused = rows.iter().filter(|row| row.is_err()).count() as u64;
    assert_eq!(telemetry.prompts, 4 - refused);
}

#[test]
fn stop_strings_and_stop_tokens_end_answers() {
    let prompts = &prompts()[..2];
    let (prep, mut policy) = (prep(), policy(Dtype::Float32));
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
                    let ids: Vec<i64> = stopped.token_ids.iter().map(|&id| id.into()).collect();
                    assert!(prep.chat().decode(&ids).contains(&middle));
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

/// A copy of the recorded model with the published grids of up to 6 x 6 tiles and a long context.
fn large_grids() -> (TempDir, VisionLanguageSpec) {
    let (folder, spec) = copy();
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
    (folder, spec)
}

fn drawn(id: &str, width: u32, height: u32) -> Visual {
    let pixels = image::RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([(x * 7) as u8, (y * 5) as u8, (x * y) as u8])
    });
    let mut bytes = std::io::Cursor::new(Vec::new());
    pixels
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    Visual::new(id.to_owned(), bytes.into_inner().into())
}

/// Each prompt gets the same answers as when it is sampled alone, whatever it is batched with.
#[test]
fn every_prompt_of_an_adversarial_part_comes_out_right() {
    let (_folder, spec) = large_grids();
    let mut policy = NetworkPolicy::open(&spec).unwrap();
    let ask = |images: &[&Visual], question: String, seed| ChatPrompt {
        images: images.iter().map(|&encoded| encoded.clone()).collect(),
        question,
        seed,
        ..prompts().remove(3)
    };
    let [dot, wall, plain] =
        [("dot", 1, 1), ("wall", 72, 60), ("plain", 30, 20)].map(|(id, x, y)| drawn(id, x, y));
    let prep = Processor::open(&spec.weights).unwrap();
    assert_eq!(prep.tiles(&wall, 1).unwrap().packing.tiles(), 31);
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

/// Prompts share what they have in common up to the end of an image, wherever it stands.
#[test]
fn prompts_that_begin_alike_up_to_an_image_share_that_prefix() {
    let (_folder, spec) = large_grids();
    let mut policy = NetworkPolicy::open(&spec).unwrap();
    let [one, two, three] =
        [("one", 12, 12), ("two", 30, 20), ("three", 20, 30)].map(|(id, x, y)| drawn(id, x, y));
    let ask = |images: &[&Visual], question: &str, seed| {
        let prompt = ChatPrompt {
            images: images.iter().map(|&encoded| encoded.clone()).collect(),
            question: question.to_owned(),
            seed,
            ..prompts().remove(3)
        };
        prompt.with_places()
    };
    let text = "Is <image> larger than <image>?";
    let prompts = [
        ask(&[&one, &two], text, 1),
        ask(&[&one, &three], text, 2),
        ask(&[&one, &two], "Is <image> larger than <image>, or not?", 3),
        ask(&[&one, &three], "It is <image> or <image>.", 4),
        ask(&[&two, &one], text, 5),
        ask(&[&one, &two], "Which is larger?", 6),
    ];
    let how = clear(2);
    let (rows, telemetry) = measured(&mut policy, &prompts, &how);
    let prep = Processor::open(&spec.weights).unwrap();
    let image_end =
        |index: usize, image: usize| prep.ids(&prompts[index]).unwrap().images[image].end;
    // Of the first four, the first and the third are alike up to their second image, and the second
    // one has nobody left to share the first image with.
    assert_eq!(telemetry.shared_tokens as usize, image_end(0, 1));
    for (index, row) in rows.iter().enumerate() {
        let alone = sample(&mut policy, &prompts[index..=index], &how);
        assert_same(std::slice::from_ref(row), &alone);
    }
    let two = [prompts[1].clone(), prompts[0].clone()];
    let (_, telemetry) = measured(&mut policy, &two, &how);
    assert_eq!(telemetry.shared_tokens as usize, image_end(0, 0));
}
