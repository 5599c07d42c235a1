//! Errors before or early in a run, and the matching diagnostics of `check`.

use std::net::TcpListener;

use crate::run::SCRIPTED;
use crate::scene::{CommandOutput, ROOT, Scene};

fn scene(pipeline: &str) -> Scene {
    let scene = Scene::new();
    scene.prompts(4).write("p.yaml", pipeline);
    scene
}

/// Returns the error output on one line, without the frame around it.
fn flat(said: &CommandOutput) -> String {
    let words = said
        .err
        .split(|one: char| one.is_whitespace() || "│|".contains(one));
    let words = words.filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn a_key_that_is_not_set_is_a_note_of_check_and_an_error_of_run() {
    let judge = "judge: { http: { base_url: \"http://127.0.0.1:9/v1\", model: m, key_env: OVCHAT_TEST_UNSET } }";
    let grades = "  grades:\n    score: { candidates: answers, judge: judge }\n";
    let scene = scene(
        &SCRIPTED
            .replace("judge: { scripted: {} }", judge)
            .replace(grades, ""),
    );
    let words = "environment variable `OVCHAT_TEST_UNSET` is not set";
    assert!(flat(&scene.succeeds(&["check", "p.yaml"])).contains(words));
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(2), "{}", said.err);
    assert!(flat(&said).contains(words), "{}", said.err);
    assert!(!scene.path("runs").exists(), "nothing was begun");
    // A run that stops before the judge needs no key.
    scene.succeeds(&["run", "p.yaml", "--until", "candidates"]);
}

#[test]
fn an_address_where_nothing_listens_is_given_up_after_seconds() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    drop(listener);
    let judge = format!(
        "judge: {{ http: {{ base_url: \"{url}\", model: m, wait_s: 2, concurrency_max: 1 }} }}"
    );
    let grades = "  grades:\n    score: { candidates: answers, judge: judge }\n";
    let scene = scene(
        &SCRIPTED
            .replace("judge: { scripted: {} }", &judge)
            .replace(grades, ""),
    );
    let begun = std::time::Instant::now();
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1));
    assert!(begun.elapsed().as_secs() < 60, "{:?}", begun.elapsed());
    let said = flat(&said);
    for words in [
        &*format!(
            "judge: {url}/chat/completions: the connection was refused; retrying for up to 5 s"
        ),
        "failed after 2 attempts; in the last one, the connection was refused; check that the server is up and that `base_url` is correct",
    ] {
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn a_value_of_several_rows_or_none_is_not_as_expected() {
    let expect = |value: &str| {
        format!(
            "{SCRIPTED}expect:\n  e: {{ table: rewards, value: \"{value}\", at_least: -1000 }}\n"
        )
    };
    let fails = |value: &str, words: &str| {
        let scene = scene(&expect(value));
        let said = scene.pipeline(&["run", "p.yaml", "--set", "rounds=1"]);
        assert_eq!(said.code, Some(1), "{}", said.err);
        assert!(flat(&said).contains(words), "{}", said.err);
    };
    // The number of rows is not apparent from the query.
    fails("unnest(array_agg(reward))", "must be one number, but");
    fails(
        "max(reward) filter (where candidate > 99)",
        "the value is null, or there are no rows",
    );
}

#[test]
fn statements_that_are_no_queries_are_told_in_plain_words() {
    let scene = scene(SCRIPTED);
    scene.succeeds(&["run", "p.yaml", "--set", "rounds=1"]);
    scene.succeeds(&["sql", "scripted", "show tables"]);
    for (sql, words) in [
        (
            "create table a as select 1",
            "`create table` is not supported: write a query that begins with `select` or `with`; \
             to write its rows to a file, use `--format parquet`",
        ),
        (
            "select * from promts",
            "there is no table `promts`; did you mean `prompts`? available tables:",
        ),
        (
            "select * from prompts where 1 = $round",
            "there is no `$round` here",
        ),
    ] {
        let said = scene.pipeline(&["sql", "scripted", sql]);
        assert_ne!(said.code, Some(0));
        assert!(flat(&said).contains(words), "{}", said.err);
        assert!(!said.err.contains("datafusion"), "{}", said.err);
    }
    std::fs::remove_file(scene.path("runs/scripted/prompts/part-00000.parquet")).unwrap();
    let said = flat(&scene.pipeline(&["sql", "scripted", "select * from prompts"]));
    assert!(
        said.contains("a file of table `prompts` is missing"),
        "{said}"
    );
}

#[test]
fn a_chat_template_that_writes_other_words_is_named() {
    let scene = scene(&SCRIPTED.replace(
        "policy: { scripted: {} }",
        "policy: { llava_onevision: { weights: policy } }",
    ));
    let policy = scene.path("policy");
    ovchat_data::store::copy_folder(format!("{ROOT}/data-samples/policy").as_ref(), &policy)
        .unwrap();
    let check = || scene.succeeds(&["check", "p.yaml"]);
    assert!(!check().err.contains("chat template"));
    let template = policy.join("chat_template.jinja");
    let text = std::fs::read_to_string(&template).unwrap();
    for (words, severity) in [("'<|user|>'", "warning"), ("'<|im_start|>' + ' '", "note")] {
        std::fs::write(&template, text.replace("'<|im_start|>'", words)).unwrap();
        let said = flat(&check());
        assert!(
            said.contains("the chat template in `policy/chat_template.jinja` is ignored"),
            "{said}"
        );
        let json = scene.succeeds(&["check", "p.yaml", "--format", "json"]).out;
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["complaints"][0]["severity"], severity, "{json}");
    }
}
