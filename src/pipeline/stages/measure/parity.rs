//! The benchmarks of `pipelines/benchmarks` beside lmms-eval: the same replies of judges give the same
//! verdicts and the same metrics.
//!
//! `tests/parity/benchmarks.py` records what lmms-eval's own functions make of the replies. The judges'
//! settings and the rules of the scores are those in the pipeline files. `make benchmark-parity` records
//! anew, and has this test write the page.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::Measure;
use super::scores::{Item, as_written};
use ovchat_models::{JudgePrompt, JudgePromptSettings};

#[derive(Deserialize)]
struct Recording {
    seed: u64,
    lmms_eval: String,
    faults: Vec<Fault>,
    #[serde(flatten)]
    benchmarks: HashMap<String, Value>,
}

/// A case in which lmms-eval is at fault, and its result.
#[derive(Deserialize)]
struct Fault {
    case: String,
    lmms_eval: String,
}

#[derive(Deserialize)]
struct Recorded {
    items: Vec<RecordedItem>,
    metrics: BTreeMap<String, f64>,
}

#[derive(Deserialize)]
struct RecordedItem {
    reply: String,
    #[serde(default)]
    answer: Option<String>,
    #[serde(default)]
    category: Option<String>,
    #[serde(default)]
    value: Option<f64>,
    #[serde(default)]
    scores: Option<[f64; 2]>,
}

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// The benchmarks: the name of the table, and the pipeline file.
const BENCHMARKS: [(&str, &str); 5] = [
    ("wildvision", "wildvision.yaml"),
    ("llava_w", "llava-w.yaml"),
    ("llava_wilder", "llava-wilder.yaml"),
    ("livebench", "livebench.yaml"),
    ("video_detail", "video-detail.yaml"),
];

/// Returns the judge's settings and the measure of a benchmark.
fn settings(name: &str, file: &str) -> (JudgePromptSettings, Measure) {
    let path = Path::new(ROOT).join("pipelines/benchmarks").join(file);
    let text = std::fs::read_to_string(path).unwrap();
    let text = text.replace("\"${rules}\"", "lmms_eval");
    let pipeline: Value = serde_yaml::from_str(&text).unwrap();
    let mut ask = pipeline["models"][format!("{name}_judge")]["self"]["ask"].clone();
    // The texts are not in the repository; verdicts do not depend on them.
    let ask_fields = ask.as_object_mut().unwrap();
    ask_fields.remove("template");
    ask_fields.remove("system");
    let measure = pipeline["stages"][name]["measure"].clone();
    (
        serde_json::from_value(ask).unwrap(),
        serde_json::from_value(measure).unwrap(),
    )
}

/// Returns the item that a reply becomes, as the critic and the table of rewards make it.
fn item(ask: &JudgePromptSettings, judge: &JudgePrompt, recorded: &RecordedItem) -> Item {
    let in_single = |value: f64| as_written(value as f32);
    let is_empty = recorded.answer.as_deref() == Some("");
    let (reading, is_failure) = match (&ask.empty_answer, judge.read(&recorded.reply)) {
        (Some(empty), _) if is_empty => (empty.into(), false),
        (_, Some(reading)) => (reading, false),
        (_, None) => (ask.unreadable.as_ref().unwrap().into(), true),
    };
    Item {
        value: in_single(reading.value),
        scores: reading.scores.map(|scores| scores.map(in_single)),
        label: reading.label,
        is_failure,
    }
}

/// The verdict of lmms-eval on an item, as ours would be: a rating of -1 is left out.
fn expected(name: &str, recorded: &RecordedItem) -> [f64; 2] {
    match (recorded.scores, recorded.value) {
        (Some(scores), _) => scores,
        (None, Some(-1.0)) if name == "livebench" => [f64::NAN; 2],
        (None, value) => [value.unwrap(); 2],
    }
}

#[test]
fn replies_give_the_metrics_of_lmms_eval() {
    let path = std::env::var_os("OVCHAT_BENCHMARKS").map(PathBuf::from);
    let path = path.unwrap_or_else(|| Path::new(ROOT).join("tests/parity/benchmarks.json"));
    let text = std::fs::read_to_string(path).unwrap();
    let recording: Recording = serde_json::from_str(&text).unwrap();
    let mut rows = String::new();
    for (name, file) in BENCHMARKS {
        let recorded: Recorded =
            serde_json::from_value(recording.benchmarks[name].clone()).unwrap();
        assert!(recorded.items.len() >= 500);
        let (ask, measure) = settings(name, file);
        let judge = JudgePrompt::open(&ask).unwrap();
        let items: Vec<Item> = recorded
            .items
            .iter()
            .map(|recorded| item(&ask, &judge, recorded))
            .collect();
        for (item, recorded) in items.iter().zip(&recorded.items) {
            let own = item.scores.unwrap_or([item.value; 2]);
            let theirs = expected(name, recorded);
            let same = own.map(f64::to_bits) == theirs.map(f64::to_bits)
                || own.iter().chain(&theirs).all(|value| value.is_nan())
                || own == theirs;
            assert!(same, "{name}: {own:?} for {theirs:?}: {:?}", recorded.reply);
        }
        let scoring = measure.scoring();
        let metrics = |category: Option<&str>| {
            let pairs = items.iter().zip(&recorded.items);
            let own = pairs.filter(|(_, recorded)| {
                category.is_none() || recorded.category.as_deref() == category
            });
            let counted = scoring.counted(own.map(|(item, _)| item));
            scoring.metrics(&counted)
        };
        for (metric, theirs) in &recorded.metrics {
            let found = metrics(None);
            let of_name = found.iter().find(|(own, _)| own == metric);
            let own = match (metric.as_str(), of_name) {
                (_, Some((_, own))) => *own,
                ("all", None) => found[0].1,
                (category, None) => metrics(Some(category))[0].1,
            };
            let own = own.unwrap_or_else(|| panic!("{name}: no {metric}"));
            assert!(
                (own - theirs).abs() < 1e-9,
                "{name}, {metric}: {own} for {theirs}"
            );
            let items = recorded.items.len();
            let _ = writeln!(rows, "| {name} | {items} | {metric} | {theirs} | {own} |");
        }
    }
    if let Some(page) = std::env::var_os("OVCHAT_BENCHMARKS_PAGE") {
        std::fs::write(page, in_words(&recording, &rows)).unwrap();
    }
}

/// Returns the page about the comparison.
fn in_words(recording: &Recording, rows: &str) -> String {
    // In the order of the recording.
    const OURS: [&str; 8] = [
        "no score with `rules: strict`, and 60 failures beside it; with `rules: lmms_eval` the same 100.0 \
         beside them",
        "90.0 with `rules: strict`, with 30 failures beside it",
        "100.0 with either rules",
        "8: a string that holds a number is a number",
        "no score, with the number of failures",
        "4 with `integer: true`, as here; 4.8 without it",
        "7; `range: [0, 5]` makes it a failure",
        "a failure that counts as 0; `rules: strict` leaves it out",
    ];
    let mut page = format!(
        "# Benchmarks beside lmms-eval\n\n\
         Written by `make benchmark-parity` (`tests/parity/benchmarks.py`, seed {}).\n\n\
         The replies of judges are made up: usual ones, and what models write instead. lmms-eval's own parsers \
         and aggregations, from `{}`, read them; the pipeline files in `pipelines/benchmarks` read the same \
         replies. Of these replies, every verdict is equal, and every metric within 1e-9.\n\n\
         | benchmark | replies | metric | lmms-eval | ovchat |\n|---|---|---|---|---|\n{rows}\n\
         ## Where lmms-eval is at fault\n\nThe column of lmms-eval is what its functions returned; that of ovchat says \
         which rule applies.\n\n| case | lmms-eval | ovchat |\n|---|---|---|\n",
        recording.seed, recording.lmms_eval
    );
    for (fault, ours) in recording.faults.iter().zip(OURS) {
        let _ = writeln!(page, "| {} | {} | {ours} |", fault.case, fault.lmms_eval);
    }
    page.push_str(
        "\nThe judge call of LLaVA-Wilder fails in lmms-eval 0.7.3: it passes the encoded image where the path of a \
         file is expected. Every item then counts as −1 for both answers, and the score is 100.0 (read in its \
         code). Its parser and its aggregation are compared above all the same.\n",
    );
    page
}
