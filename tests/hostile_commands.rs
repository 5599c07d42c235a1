//! Commands of `exec` stages that flood their output, leave processes behind, or look for secrets.

use std::time::{Duration, Instant};

use crate::exec::{COLUMNS, fails, flag_answers, pipeline};
use crate::judges::flat;
use crate::run::SCRIPTED;
use crate::scene::{CommandOutput, ROOT, Scene, said, stream_of_ids};

#[test]
fn a_line_without_an_end_is_kept_at_both_ends() {
    let script = "cat > /dev/null; (echo first words; head -c 400000000 /dev/zero | tr '\\\\0' x; echo last words) >&2; exit 3";
    let told = fails(&format!("[sh, -c, \"{script}\"]"), COLUMNS);
    assert!(
        told.err.contains("exited with code 3"),
        "{}",
        told.err.len()
    );
    for words in ["first words", "last words", "bytes left out"] {
        assert!(flat(&told.err).contains(words), "{words}");
    }
    assert!(told.err.len() < 200_000, "{}", told.err.len());
}

#[test]
fn bytes_that_are_no_text_are_shown_as_what_they_are() {
    let script = "cat > /dev/null; printf 'caf\\\\351 broke\\\\n' >&2; echo and more >&2; exit 3";
    let told = fails(&format!("[sh, -c, \"{script}\"]"), COLUMNS);
    assert!(told.err.contains("caf\\xe9 broke"), "{}", told.err);
    assert!(told.err.contains("and more"), "{}", told.err);
}

/// The exit code of the program decides.
#[test]
fn what_a_command_leaves_behind_keeps_nobody_waiting() {
    let begun = Instant::now();
    let flag = flag_answers();
    let scene = Scene::new();
    let script = format!("[sh, -c, \"{flag}; sleep 600 &\"]");
    let of_one_round = pipeline(&script, COLUMNS).replace("rounds: 2", "rounds: 1");
    scene.prompts(5).write("p.yaml", of_one_round);
    scene.succeeds(&["run", "p.yaml"]);
    let query = "select count(*) as n from flags";
    let found = scene.succeeds(&["sql", "scripted", query, "--format", "csv"]);
    assert_eq!(found.out, "n\n25\n");
    let told = fails("[sh, -c, \"cat > /dev/null; sleep 600 &\"]", COLUMNS);
    assert!(
        flat(&told.err).contains("holds its standard output open"),
        "{}",
        told.err
    );
    let told = fails("[sh, -c, \"cat > /dev/null; sleep 600 & exit 4\"]", COLUMNS);
    assert!(told.err.contains("exited with code 4"), "{}", told.err);
    assert!(begun.elapsed() < Duration::from_mins(1));
}

/// Prints its environment and fails.
const PRINTS: &str = "[sh, -c, 'cat > /dev/null; env >&2; exit 3']";

fn run(scene: &Scene, arguments: &[&str]) -> CommandOutput {
    let mut command = scene.command(arguments);
    command
        .env("OVCHAT_TEST_JUDGE", "http://127.0.0.1:9/v1")
        .env("OVCHAT_TEST_OF_JUDGE", "a-key-by-another-name")
        .env("OVCHAT_TEST_TOKEN", "one-of-the-machine")
        .env("MYSQL_PASSWORD_FILE", "another-one")
        .env("AWS_REGION", "eu-west-1")
        .env("CUDA_VISIBLE_DEVICES", "0")
        .env("HTTPS_PROXY", "http://127.0.0.1:8")
        .env("LC_CTYPE", "C.UTF-8");
    said(command.output().unwrap())
}

#[test]
fn a_command_gets_no_secrets_that_it_was_not_given() {
    let scene = Scene::new();
    let base = pipeline(PRINTS, COLUMNS).replace(
        "models:",
        "models:\n  remote: { http: { base_url: \"${env:OVCHAT_TEST_JUDGE}\", model: m, key_env: OVCHAT_TEST_OF_JUDGE } }",
    );
    let secret = [
        "OVCHAT_TEST_JUDGE",
        "OVCHAT_TEST_OF_JUDGE",
        "OVCHAT_TEST_TOKEN",
        "MYSQL_PASSWORD_FILE",
        "AWS_REGION",
    ];
    let plain = ["CUDA_VISIBLE_DEVICES", "HTTPS_PROXY"];
    let basic = ["PATH", "LC_CTYPE", "OVCHAT_ROUND"];
    for (env, gets_listed, gets_plain) in [
        ("", false, true),
        ("env: [OVCHAT_TEST_TOKEN], ", true, true),
        ("env: only, ", false, false),
        ("env: { only: [OVCHAT_TEST_TOKEN] }, ", true, false),
    ] {
        let text = base.replace(
            "table: candidates, columns",
            &format!("{env}table: candidates, columns"),
        );
        scene.prompts(2).write("p.yaml", text);
        let told = run(&scene, &["run", "p.yaml"]);
        assert_eq!(told.code, Some(1), "{}", told.err);
        let has = |name: &str| told.err.contains(&format!("flags: {name}="));
        for name in secret {
            let expected = gets_listed && name == "OVCHAT_TEST_TOKEN";
            assert_eq!(has(name), expected, "{env}: {name}\n{}", told.err);
        }
        for name in plain {
            assert_eq!(has(name), gets_plain, "{env}: {name}\n{}", told.err);
        }
        for name in basic {
            assert!(has(name), "{env}: {name}\n{}", told.err);
        }
        let told = run(&scene, &["check", "p.yaml"]);
        assert_eq!(told.code, Some(0), "{}", told.err);
        let notes = told.err.contains("config::withheld");
        assert_eq!(notes, gets_plain, "{env}: {}", told.err);
        if notes {
            assert!(
                flat(&told.err).contains("the command of `flags` does not inherit "),
                "{}",
                told.err
            );
            let names = ["OVCHAT_TEST_JUDGE", "OVCHAT_TEST_OF_JUDGE", "AWS_REGION"];
            assert!(
                names.iter().all(|name| told.err.contains(name)),
                "{}",
                told.err
            );
        }
    }
    let text = base.replace(
        "table: candidates, columns",
        "env: all, table: candidates, columns",
    );
    scene.write("p.yaml", text);
    let told = run(&scene, &["check", "p.yaml"]);
    assert_eq!(told.code, Some(2), "{}", told.err);
    assert!(
        flat(&told.err).contains("names such as `[HF_TOKEN]`"),
        "{}",
        told.err
    );
}

#[test]
fn secrets_in_the_output_of_a_command_are_masked() {
    let scene = Scene::new();
    let secret = "one-of-the-machine";
    scene.write("out.arrow", stream_of_ids(&["a", &format!("x{secret}y")]));
    let base = pipeline("[sh, -c, 'cat > /dev/null; cat out.arrow']", "prompt_id: text").replace(
        "models:",
        "models:\n  remote: { http: { base_url: \"http://127.0.0.1:9/v1\", model: m, key_env: OVCHAT_TEST_TOKEN } }",
    );
    scene.prompts(2).write("p.yaml", base);
    let told = run(&scene, &["run", "p.yaml"]);
    assert_eq!(told.code, Some(0), "{}", told.err);
    let query = "select prompt_id from flags where round = 1";
    let found = scene.succeeds(&["sql", "scripted", query, "--format", "csv"]);
    assert_eq!(found.out, "prompt_id\na\nx${env:OVCHAT_TEST_TOKEN}y\n");
}

/// The Arrow crates panic at this stream, a mutated one; the run has one error and no backtrace.
#[test]
fn a_damaged_arrow_stream_is_one_error() {
    let damaged = format!("{ROOT}/tests/damaged.arrows");
    let command = format!("[sh, -c, \"cat > /dev/null; cat {damaged}\"]");
    let told = fails(&command, "prompt_id: text");
    let words = flat(&told.err);
    assert!(words.contains("Arrow IPC stream"), "{}", told.err);
    assert!(!words.contains("panicked"), "{}", told.err);
}

#[test]
fn a_key_that_no_header_carries_is_refused_before_anything_is_asked() {
    let scene = Scene::new();
    let judge = "judge: { http: { base_url: \"http://127.0.0.1:9/v1\", model: m, key_env: OVCHAT_TEST_LINE } }";
    let pipeline = SCRIPTED.replace("judge: { scripted: {} }", judge);
    assert_ne!(pipeline, SCRIPTED);
    scene.prompts(1).write("p.yaml", pipeline);
    for key in ["abcdef123\n", " abcdef123", "abcdéf123"] {
        for command in ["check", "run"] {
            let mut asked = scene.command(&[command, "p.yaml"]);
            let said = said(asked.env("OVCHAT_TEST_LINE", key).output().unwrap());
            assert_eq!(said.code, Some(2), "{key:?}: {}", said.err);
            let words = flat(&said.err);
            assert!(
                words.contains("`OVCHAT_TEST_LINE` contains a line break"),
                "{}",
                said.err
            );
            assert!(!words.contains("abcd"), "{}", said.err);
        }
    }
}
