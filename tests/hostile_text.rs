//! Untrusted text: oversized configurations and queries, and escape sequences for terminals.

use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::judges::flat;
use crate::run::SCRIPTED;
use crate::scene::{CommandOutput, Scene};

/// Returns the diagnostics of an invalid pipeline, which must appear soon.
fn refused(text: &str) -> CommandOutput {
    let scene = Scene::new();
    let begun = Instant::now();
    let said = scene
        .prompts(1)
        .write("p.yaml", text)
        .pipeline(&["check", "p.yaml"]);
    let took = begun.elapsed();
    assert_eq!(said.code, Some(2), "{}", said.err);
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(said.err.len() < 200_000, "{}", said.err.len());
    said
}

#[test]
fn thousands_of_unknown_keys_are_told_soon_and_in_few_words() {
    let keys = |indent: &str| -> String {
        let key = |number| format!("{indent}key_{number}: 1\n");
        (0..6000).map(key).collect()
    };
    let said = refused(&format!("{SCRIPTED}{}", keys("")));
    assert_eq!(said.err.matches("unknown field `key_").count(), 50);
    assert!(said.err.contains("at least 5950 more"), "{}", said.err);
    let stage = "pipeline: p\nstages:\n  prompts:\n    load_prompts:\n";
    let below = format!("{stage}{}", keys("      "));
    let said = refused(&below);
    assert!(said.err.contains("unknown field `key_0`"), "{}", said.err);
    assert!(said.err.contains("more are not shown"));
    let twice = keys("").replace("key_1", "key_2");
    refused(&format!("{SCRIPTED}{twice}"));
}

#[test]
fn long_texts_are_cut_where_they_are_shown() {
    let key = "k".repeat(65_536);
    let said = refused(&format!("{SCRIPTED}? {key}\n: 1\n"));
    assert!(said.err.contains("(65536 characters)"), "{}", said.err);
    refused(&SCRIPTED.replace("seed: 3", &format!("seed: {key}")));
    let line =
        format!("{{pipeline: p, vars: {{a: \"{key}{key}\"}}, stages: {{x: {{nonsense: 1}}}}}}");
    let said = refused(&line);
    assert!(
        said.err.contains("unknown stage type `nonsense`"),
        "{}",
        said.err
    );
    refused(&format!("{line} }}"));
}

#[test]
fn a_diagnostic_shows_no_control_of_terminals() {
    let said = refused(&format!("{SCRIPTED}\"a\\e[2Jb\": \u{202e}1\n"));
    assert!(!said.err.contains(['\u{1b}', '\u{202e}']), "{}", said.err);
    assert!(said.err.contains("a\\u001b[2Jb"), "{}", said.err);
}

/// A run whose rows contain escape sequences.
fn with_escapes() -> Scene {
    let scene = Scene::new();
    let record = json!({"id": "\u{1b}]0;owned\u{7}", "prompt": "\u{202e}Why\r?"});
    scene
        .write("prompts.json", json!([record]).to_string())
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml", "--until", "prompts"]);
    scene
}

#[test]
fn tables_for_people_show_controls_and_formats_for_programs_keep_them() {
    let scene = with_escapes();
    let ask = |format| {
        let query = "select id as \"\u{1b}c\", question, [question] as list from prompts";
        scene
            .succeeds(&["sql", "scripted", query, "--format", format])
            .out
    };
    for format in ["table", "markdown"] {
        let shown = ask(format);
        assert!(
            !shown.contains(['\u{1b}', '\u{7}', '\u{202e}', '\r']),
            "{shown:?}"
        );
        assert!(shown.contains("\\u001b]0;owned\\u0007"), "{shown}");
        assert!(shown.contains("[\\u202eWhy\\r?]"), "{shown}");
    }
    assert!(ask("csv").contains("\u{1b}]0;owned\u{7},\"\u{202e}Why\r?\""));
    let query = "select question from prompts";
    let rows = scene
        .succeeds(&["sql", "scripted", query, "--format", "json"])
        .out;
    let rows: serde_json::Value = serde_json::from_str(&rows).unwrap();
    assert_eq!(rows[0]["question"], "\u{202e}Why\r?");
    let said = scene.pipeline(&["sql", "scripted", "select * from \"\u{1b}[2J\""]);
    assert!(!said.err.contains('\u{1b}'), "{}", said.err);
}

/// Runs a query, which must have an answer or one error soon.
#[track_caller]
fn answer_or_error(scene: &Scene, name: &str, query: &str) -> CommandOutput {
    scene.write(name, query);
    let begun = Instant::now();
    let mut command = scene.command(&["sql", "scripted"]);
    let query = std::fs::File::open(scene.path(name)).unwrap();
    let output = command.stdin(query).output().unwrap();
    assert_eq!(output.status.signal(), None, "{name}");
    let said = crate::scene::said(output);
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(60), "{name}: {took:?}");
    assert!(matches!(said.code, Some(0 | 1)), "{name}");
    assert!(
        said.code == Some(0) || said.err.lines().count() == 1,
        "{}",
        said.err
    );
    said
}

/// Returns a term many times, joined by an operator.
fn chain(count: usize, term: &str, operator: &str) -> String {
    vec![term; count].join(operator)
}

/// Queries that are long in one direction, each with its name.
fn long_queries() -> Vec<(&'static str, String)> {
    let all = |term: &str, operator: &str| chain(20_000, term, operator);
    vec![
        ("tables", format!("select 1 from {}", all("prompts", ", "))),
        (
            "with",
            format!("with {} select 1", all("t as (select 1, 2)", ", ")),
        ),
        ("wide unions", all("select 1, 2", " union ")),
        ("some unions", chain(700, "select 1", " union ")),
        ("long sum", format!("select {}", all("1", " + "))),
        (
            "long ors",
            format!("select 1 from prompts where {}", all("id = 'a'", " or ")),
        ),
        ("unions", all("select 1", " union ")),
        ("all", all("select 1", " union all ")),
        (
            "cases",
            format!("select case {} end", "when true then 1 ".repeat(20_000)),
        ),
        (
            "joins",
            format!(
                "select 1 from prompts {}",
                "cross join prompts ".repeat(20_000)
            ),
        ),
    ]
}

/// Queries that nest deeply, each with its name.
fn nested_queries() -> Vec<(&'static str, String)> {
    let around = |open: &str, count: usize, inner: &str| {
        format!("select {}{inner}{}", open.repeat(count), ")".repeat(count))
    };
    vec![
        ("nots", format!("select {} true", "not ".repeat(20_000))),
        ("minus", format!("select {} 1", "- ".repeat(20_000))),
        ("parentheses", around("(", 20_000, "1")),
        ("casts", format!("select 1{}", "::int".repeat(20_000))),
        ("subscripts", format!("select [1]{}", "[1]".repeat(20_000))),
        ("calls", around("abs(", 20_000, "1")),
        ("nots in parentheses", around("not (", 40, "true")),
    ]
}

/// Short queries with results that would fill the memory, each with its name.
fn large_queries() -> Vec<(&'static str, String)> {
    let doubled = |n| {
        let before = n - 1;
        format!("t{n} as (select * from t{before} union all select * from t{before})")
    };
    let doubling: Vec<String> = (1..=24).map(doubled).collect();
    vec![
        (
            "doubling",
            format!(
                "with t0 as (select 1 as a), {} select count(*) from t24",
                doubling.join(", ")
            ),
        ),
        (
            "repeat",
            "select length(repeat('x', 2000000000))".to_owned(),
        ),
    ]
}

#[test]
fn a_query_of_any_length_has_an_answer_or_one_error() {
    let scene = with_escapes();
    let sum = format!("select {} as n", chain(1000, "1", " + "));
    let said = answer_or_error(&scene, "sum", &sum);
    assert!(said.out.contains("1000"), "{}", said.err);
    let ors: Vec<_> = (0..3000).map(|n| format!("question = '{n}'")).collect();
    let ors = format!(
        "select count(*) as n from prompts where {}",
        ors.join(" or ")
    );
    let said = answer_or_error(&scene, "ors", &ors);
    assert_eq!(said.code, Some(0), "{}", said.err);
    let more = [long_queries(), nested_queries(), large_queries()].concat();
    println!("{} queries of thousands of terms", 2 + more.len());
    for (name, query) in more {
        answer_or_error(&scene, name, &query);
    }
}

/// Sends a signal and asserts that the program ends within two seconds with the exit code of that
/// signal.
#[track_caller]
pub fn ends_soon(mut child: Child, signal: &str, code: i32) {
    std::thread::sleep(Duration::from_millis(1500));
    assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
    let pid = child.id().to_string();
    let sent = std::process::Command::new("kill")
        .args([signal, &pid])
        .status();
    assert!(sent.unwrap().success());
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > Duration::from_secs(2) {
            child.kill().unwrap();
            panic!("{signal} is not heard");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(child.wait().unwrap().code(), Some(code));
}

/// A query that never ends and returns no rows.
const ENDLESS: &str = "select a.id from prompts a cross join prompts b cross join prompts c \
    cross join prompts d where a.id || b.id || c.id || d.id = 'x'";

#[test]
fn a_query_without_end_hears_signals_and_leaves_nothing() {
    let scene = Scene::new();
    scene
        .prompts(1000)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml", "--until", "prompts"]);
    std::fs::create_dir(scene.path("temporary")).unwrap();
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let mut command = scene.command(&["sql", "scripted", ENDLESS]);
        command.env("TMPDIR", scene.path("temporary"));
        let child = command.stderr(Stdio::null()).spawn().unwrap();
        ends_soon(child, signal, code);
        let left = std::fs::read_dir(scene.path("temporary")).unwrap().count();
        assert_eq!(left, 0);
    }
}

#[test]
fn a_stage_whose_query_never_ends_hears_signals_and_the_run_goes_on_later() {
    let scene = Scene::new();
    let stage =
        format!("  crossed: {{ sql: {{ tables: [prompts], query: \"{ENDLESS}\" }} }}\nevaluate:");
    let pipeline = SCRIPTED.replace("evaluate:", &stage);
    scene.prompts(1000).write("p.yaml", &pipeline);
    let mut command = scene.command(&["run", "p.yaml", "--until", "crossed"]);
    let child = command.stderr(Stdio::null()).spawn().unwrap();
    ends_soon(child, "-INT", 130);
    let fewer = pipeline.replace(ENDLESS, "select id from prompts");
    scene
        .write("p.yaml", fewer)
        .succeeds(&["run", "p.yaml", "--until", "crossed"]);
}

#[test]
fn a_result_of_any_size_is_printed_in_bounded_memory() {
    let scene = Scene::new();
    scene
        .prompts(1000)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml", "--until", "prompts"]);
    let query = "select a.prompt_id as a, b.prompt_id as b, a.question from prompts a \
        cross join prompts b cross join prompts c";
    for format in ["csv", "table", "jsonl"] {
        let mut command = scene.command(&["sql", "scripted", query, "--format", format]);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut bytes = vec![0; 1 << 20];
        for _ in 0..100 {
            out.read_exact(&mut bytes).unwrap();
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let peak = status
            .lines()
            .find(|line| line.starts_with("VmHWM"))
            .unwrap();
        let kilobytes: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(kilobytes < 600_000, "{format}: {peak}");
    }
}

#[test]
fn numbers_that_would_take_all_memory_are_refused_before_anything_runs() {
    for (setting, told) in [
        (
            "candidates.count=4294967295",
            "answers per prompt exceed the maximum",
        ),
        (
            "rounds=4294967295",
            "too many rounds: 4294967295 (at most 1000)",
        ),
    ] {
        let scene = Scene::new();
        let begun = Instant::now();
        scene.prompts(2).write("p.yaml", SCRIPTED);
        let setting = setting.replace("candidates.", "stages.candidates.sample.");
        for command in ["check", "plan", "run"] {
            let said = scene.pipeline(&[command, "p.yaml", "--set", &setting]);
            assert_eq!(said.code, Some(2), "{command} {setting}: {}", said.err);
            assert!(flat(&said.err).contains(&flat(told)), "{}", said.err);
        }
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
}

#[test]
fn a_template_that_writes_without_end_is_refused() {
    for template in [
        "{% set x = 'x' * 1000000 %}{% for i in range(100000) %}{{ x }}{% endfor %}{{ answer }}",
        "{{ 'a\nb'|indent(9999999999) }}{{ answer }}",
    ] {
        let scene = Scene::new();
        scene.prompts(2).write("ask.txt", template);
        let judge =
            "judge: { self: { model: policy, ask: { mode: pointwise, template: ask.txt } } }";
        let text = SCRIPTED.replace("judge: { scripted: {} }", judge);
        assert!(text.contains("ask.txt"));
        scene.write("p.yaml", text);
        let said = scene.pipeline(&["check", "p.yaml"]);
        assert_eq!(said.code, Some(2), "{}", said.err);
        assert!(flat(&said.err).contains("ask.txt"), "{}", said.err);
    }
}

#[test]
fn a_wide_cell_is_cut_in_tables_and_whole_elsewhere() {
    let scene = Scene::new();
    let query = "select repeat('xy ', 100000) as a from prompts";
    let pipeline = format!(
        "pipeline: scripted\nstages:\n  prompts: {{ load_prompts: {{ from: prompts.json }} }}\nreport:\n  \
         wide: {{ query: \"{query}\" }}\n"
    );
    scene.prompts(1).write("p.yaml", pipeline);
    let cut = "290000 characters left out";
    let reported = scene.succeeds(&["run", "p.yaml"]);
    assert!(reported.out.contains(cut), "{} bytes", reported.out.len());
    let table = scene.succeeds(&["sql", "scripted", query, "--format", "table"]);
    assert!(table.out.contains(cut), "{} bytes", table.out.len());
    let lines = scene.succeeds(&["sql", "scripted", query, "--format", "jsonl"]);
    assert!(lines.out.len() > 300_000, "{} bytes", lines.out.len());
}
