//! The pipelines in `pipelines/benchmarks` on files with the hub's layout and columns, with a scripted
//! endpoint as the judge.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use arrow::array::{
    ArrayRef, BinaryArray, Int64Array, ListArray, RecordBatch, StringArray, StructArray,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use ovchat_data::store::{TableWriter, digest};
use serde_json::{Value, json};
use tiny_http::{Response, Server};

use crate::judges::flat;
use crate::scene::{CommandOutput, ROOT, Scene, said};
use crate::videos::has_ffmpeg;

/// The number of items of each benchmark.
const ITEMS: usize = 12;

/// A judge that replies in each benchmark's own format, and now and then in none.
struct JudgeEndpoint {
    url: String,
    /// The requests that were answered.
    answered: Arc<Mutex<Vec<String>>>,
    /// The number of requests after which it falls silent.
    limit: Arc<AtomicUsize>,
    is_down: Arc<AtomicBool>,
    server: Arc<Server>,
}

impl JudgeEndpoint {
    fn new() -> Self {
        let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
        let judge = Self {
            url: format!("http://{}/v1", server.server_addr()),
            answered: Arc::default(),
            limit: Arc::new(AtomicUsize::new(usize::MAX)),
            is_down: Arc::default(),
            server: Arc::clone(&server),
        };
        let (answered, limit) = (Arc::clone(&judge.answered), Arc::clone(&judge.limit));
        let is_down = Arc::clone(&judge.is_down);
        thread::spawn(move || {
            for mut request in server.incoming_requests() {
                let mut body = String::new();
                request.as_reader().read_to_string(&mut body).unwrap();
                if is_down.load(Ordering::SeqCst) {
                    let gone = Response::from_string("down").with_status_code(503);
                    request.respond(gone).ok();
                    continue;
                }
                if answered.lock().unwrap().len() >= limit.load(Ordering::SeqCst) {
                    // Kept open until the client goes.
                    std::mem::forget(request);
                    continue;
                }
                let reply = reply(&serde_json::from_str(&body).unwrap());
                let message = json!({ "choices": [{ "message": { "content": reply } }],
                    "usage": { "prompt_tokens": 100, "completion_tokens": 10 } });
                answered.lock().unwrap().push(body);
                request
                    .respond(Response::from_string(message.to_string()))
                    .ok();
            }
        });
        judge
    }

    fn answered(&self) -> Vec<String> {
        self.answered.lock().unwrap().clone()
    }
}

impl Drop for JudgeEndpoint {
    fn drop(&mut self) {
        self.server.unblock();
    }
}

/// Returns the reply to a request, by the form that its text asks for.
fn reply(request: &Value) -> String {
    let parts = request["messages"].as_array().unwrap().last().unwrap()["content"].clone();
    let texts = parts
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|part| part["text"].as_str());
    let text: String = texts.collect();
    let number =
        usize::from(digest(text.as_bytes()).as_bytes()[0] + digest(text.as_bytes()).as_bytes()[1]);
    if number % 11 == 0 {
        return "I cannot tell.".to_owned();
    }
    let form = text.split_whitespace().next().unwrap();
    match form {
        "WILDVISION" => {
            let grades = ["A>>B", "A>B", "A=B", "B>A", "B>>A"];
            format!("So: [[{}]]", grades[number % 5])
        }
        "LLAVA_W" => format!("{} {}\nbecause", 5 + number % 5, 4 + number % 6),
        "WILDER" => format!("10 {}\nbecause", 4 + number % 6),
        "LIVEBENCH" => json!({"Explanation": "so", "Rating": number % 11}).to_string(),
        "VIDEO" => format!("{{'score': {}}}", number % 6),
        other => panic!("an unknown form: {other}"),
    }
}

/// Returns a PNG file of its own.
fn png(number: usize) -> Vec<u8> {
    let image = image::RgbImage::from_fn(24, 16, |x, y| {
        let level = (x * 7 + y * 11 + number as u32 * 31) % 256;
        image::Rgb([level as u8, (number * 17 % 256) as u8, 90])
    });
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn texts(value: impl Fn(usize) -> String) -> ArrayRef {
    Arc::new(StringArray::from_iter_values((0..ITEMS).map(value)))
}

/// Returns a column of images as the hub stores them.
fn images(first: usize) -> StructArray {
    let bytes: ArrayRef = Arc::new(BinaryArray::from_iter_values(
        (0..ITEMS).map(|number| png(first + number)),
    ));
    let paths: ArrayRef = Arc::new(StringArray::from(vec![None::<&str>; ITEMS]));
    let fields = [("bytes", DataType::Binary), ("path", DataType::Utf8)];
    let fields: Vec<Field> = fields.map(|(name, of)| Field::new(name, of, true)).to_vec();
    StructArray::new(fields.into(), vec![bytes, paths], None)
}

fn listed(items: ArrayRef, each: usize) -> ArrayRef {
    let item = Arc::new(Field::new("item", items.data_type().clone(), true));
    let lengths = std::iter::repeat_n(each, items.len() / each);
    Arc::new(ListArray::new(
        item,
        OffsetBuffer::from_lengths(lengths),
        items,
        None,
    ))
}

/// Writes a dataset of one Parquet file into the hub's cache.
fn dataset(scene: &Scene, name: &str, file: &str, readme: &str, columns: Vec<(&str, ArrayRef)>) {
    let folder = scene
        .path("hub")
        .join(format!("datasets--{}", name.replace('/', "--")));
    let snapshot = folder.join("snapshots/abc");
    let path = snapshot.join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::create_dir_all(folder.join("refs")).unwrap();
    fs::write(folder.join("refs/main"), "abc").unwrap();
    fs::write(snapshot.join("README.md"), readme).unwrap();
    let batch = RecordBatch::try_from_iter_with_nullable(
        columns
            .into_iter()
            .map(|(name, column)| (name, column, true)),
    )
    .unwrap();
    let stem = path.file_stem().unwrap().to_str().unwrap();
    let mut writer = TableWriter::new(path.parent().unwrap(), stem, batch.schema(), &[]);
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
}

const WILDVISION_README: &str = "---\nconfigs:\n- config_name: release_bench_0617_with_modelresponse\n  data_files:\n  \
    - split: test500\n    path: release_bench_0617_with_modelresponse/test500-*\n- config_name: other\n  \
    data_files:\n  - split: test\n    path: other/*\n---\n";

/// Returns the column of a benchmark's questions.
fn questions(of: &'static str) -> ArrayRef {
    texts(move |number| format!("{of} question {number}?"))
}

/// Returns the column of a benchmark's reference answers.
fn references(of: &'static str) -> ArrayRef {
    texts(move |number| format!("{of} reference {number}."))
}

/// Writes the two datasets whose judges compare with other answers.
fn datasets_with_answers(scene: &Scene) {
    dataset(
        scene,
        "WildVision/wildvision-arena-data",
        "release_bench_0617_with_modelresponse/test500-00000-of-00001.parquet",
        WILDVISION_README,
        vec![
            ("session_id", texts(|number| format!("s{number}"))),
            (
                "instruction",
                texts(|number| format!("  Wild question {number}? ")),
            ),
            ("claude-3-sonnet-20240229", references("Sonnet's")),
            ("gpt-4o", references("Another")),
            ("image", Arc::new(images(0))),
        ],
    );
    let captions: ArrayRef = Arc::new(StringArray::from_iter_values(
        (0..2 * ITEMS).map(|number| format!("Caption {number}.")),
    ));
    dataset(
        scene,
        "lmms-lab/llava-bench-in-the-wild",
        "data/train-00000-of-00001.parquet",
        "",
        vec![
            (
                "question_id",
                Arc::new(Int64Array::from_iter_values(0..ITEMS as i64)),
            ),
            ("image", Arc::new(images(100))),
            ("question", questions("Llava")),
            ("caption", listed(captions, 2)),
            ("gpt_answer", references("GPT's")),
            (
                "category",
                texts(|number| ["conv", "detail", "complex"][number % 3].to_owned()),
            ),
        ],
    );
}

/// Writes the other three datasets, and the videos of the last.
fn datasets_with_references(scene: &Scene) {
    dataset(
        scene,
        "lmms-lab/LLaVA-Bench-Wilder",
        "data/test-00000-of-00001.parquet",
        "",
        vec![
            ("Question", questions("Wilder")),
            ("Answer", references("True")),
            ("image", Arc::new(images(200))),
        ],
    );
    dataset(
        scene,
        "lmms-lab/LiveBench",
        "2024-06/test-00000-of-00001.parquet",
        "",
        vec![
            ("id", texts(|number| format!("l{number}"))),
            ("images", listed(Arc::new(images(300)), 1)),
            ("question", questions("Live")),
            ("answer", references("Live")),
            ("criteria", texts(|number| format!("Criteria {number}."))),
            (
                "subtask",
                texts(|number| ["Basic Understanding", "Further Insights"][number % 2].to_owned()),
            ),
        ],
    );
    dataset(
        scene,
        "lmms-lab/VideoDetailDescription",
        "data/test-00000-of-00001.parquet",
        "",
        vec![
            ("video_name", texts(|number| format!("v_{number}"))),
            ("question", questions("Video")),
            ("answer", references("Video")),
        ],
    );
    for number in 0..ITEMS - 1 {
        let ending = ["mp4", "MP4", "mkv"][number % 3];
        let from = format!("{ROOT}/data-samples/clips/heldout/{:04}.mp4", number + 1);
        scene.write(
            &format!("Test_Videos/v_{number}.{ending}"),
            fs::read(from).unwrap(),
        );
    }
}

/// Writes stand-ins for the judge texts.
fn judge_texts(scene: &Scene) {
    for (name, text) in [
        ("wildvision_system.txt", "Be fair."),
        (
            "wildvision_user.txt",
            "WILDVISION {{ question }} A: {{ first }} B: {{ second }}",
        ),
        (
            "llava_w.txt",
            "LLAVA_W {{ captions|join(' ') }} {{ question }} {{ first }} {{ second }} {{ row.category }}",
        ),
        (
            "llava_wilder.txt",
            "WILDER {{ question }} {{ first }} {{ second }}",
        ),
        (
            "livebench_2406.txt",
            "LIVEBENCH {{ question }} {{ answer }} {{ reference }} {{ row.criteria }}",
        ),
        ("video_detail_system.txt", "Compare."),
        (
            "video_detail_user.txt",
            "VIDEO {{ question }} {{ reference }} {{ answer }}",
        ),
    ] {
        scene.write(&format!("texts/{name}"), text);
    }
}

/// Writes the five datasets, the videos, stand-ins for the judge texts, and a pipeline file.
fn scene(judge: &JudgeEndpoint) -> Scene {
    let scene = Scene::new();
    datasets_with_answers(&scene);
    datasets_with_references(&scene);
    judge_texts(&scene);
    let pipeline = format!(
        "extends: {ROOT}/pipelines/benchmarks/all.yaml\npipeline: bench\nreject_share_max: 0.5\nvars:\n  texts: {}\n  \
         video_folder: {}\n  judge_url: {}\n  judge_model: m\nmodels:\n  base: {{ scripted: {{ words: 3 }} }}\n  \
         chat: {{ scripted: {{ words: 6 }} }}\n  judge: {{ http: {{ key_env: null, spend: null, wait_s: 0.01, tries: 2, concurrency_max: 4 }} }}\n",
        scene.path("texts").display(),
        scene.path("Test_Videos").display(),
        judge.url,
    );
    scene.write("p.yaml", pipeline);
    scene
}

/// Returns a command with the hub's cache, which may not be filled from the network.
fn command(scene: &Scene, arguments: &[&str]) -> Command {
    let mut command = scene.command(arguments);
    command
        .env("HF_HUB_CACHE", scene.path("hub"))
        .env("HF_HUB_OFFLINE", "1");
    command
}

fn says(scene: &Scene, arguments: &[&str]) -> CommandOutput {
    said(command(scene, arguments).output().unwrap())
}

#[track_caller]
fn succeeds(scene: &Scene, arguments: &[&str]) -> CommandOutput {
    let said = says(scene, arguments);
    assert_eq!(said.code, Some(0), "{}", said.err);
    said
}

/// Returns the rows of a query as JSON objects.
fn query(scene: &Scene, sql: &str) -> Vec<Value> {
    let said = succeeds(scene, &["sql", "bench", sql, "--format", "jsonl"]);
    let lines = said.out.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn wait_until(what: &str, mut is_done: impl FnMut() -> bool, child: &mut Child) {
    let begun = Instant::now();
    while !is_done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "no {what}");
        assert!(
            child.try_wait().unwrap().is_none(),
            "the run ended before {what}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// The five benchmarks run to the figure; a killed run asks nothing twice; another model costs no call
/// for the first.
#[test]
fn the_five_benchmarks_end_in_the_figure() {
    if !has_ffmpeg("the_five_benchmarks_end_in_the_figure") {
        return;
    }
    let judge = JudgeEndpoint::new();
    let scene = scene(&judge);
    succeeds(&scene, &["check", "p.yaml"]);
    succeeds(&scene, &["run", "p.yaml", "--until", "wildvision_prompts"]);
    let plan = succeeds(&scene, &["plan", "p.yaml"]).out;
    let calls = "wildvision_base_rewards       12 calls of judge: about ";
    assert!(
        plan.contains(calls) && plan.contains("replies of at most 1024 tokens"),
        "{plan}"
    );
    assert!(judge.answered().is_empty(), "a plan asks nobody");
    judge.limit.store(40, Ordering::SeqCst);
    let mut child = command(&scene, &["run", "p.yaml"])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("40 calls", || judge.answered().len() >= 40, &mut child);
    thread::sleep(Duration::from_millis(200));
    child.kill().unwrap();
    child.wait().unwrap();
    judge.limit.store(usize::MAX, Ordering::SeqCst);
    let said = succeeds(&scene, &["run", "p.yaml"]);
    assert!(said.out.contains("results"), "{}", said.out);
    let answered = judge.answered();
    let distinct: HashSet<&String> = answered.iter().collect();
    assert_eq!(distinct.len(), answered.len(), "no request was made twice");
    // Some answers of the two models are equal.
    let calls = answered.len();
    assert!((5 * ITEMS..=2 * 5 * ITEMS).contains(&calls), "{calls}");

    counts_every_item(&scene);
    shows_the_results(&scene.path("runs/bench/report"));
    asks_as_the_benchmarks_do(&answered);
    loads_what_it_exports(&scene);
    let said = succeeds(&scene, &["run", "p.yaml"]);
    assert!(said.err.contains("nothing to do"), "{}", said.err);
    let before = judge.answered().len();
    succeeds(
        &scene,
        &["run", "p.yaml", "--set", "models.chat.scripted.words=9"],
    );
    let more = judge.answered().len() - before;
    assert!(
        more > 0 && more <= 5 * ITEMS,
        "{more} calls for another chat model"
    );
}

/// Every item is in the results: counted, or a failure, or a reject.
fn counts_every_item(scene: &Scene) {
    let results = query(scene, "select * from results");
    let own: Vec<&Value> = results
        .iter()
        .filter(|row| row["is_published"] == false)
        .collect();
    assert_eq!(own.len(), 10);
    assert_eq!(
        results.len(),
        10 + 15,
        "with the source's 7B models and GPT-4V"
    );
    assert!(own.iter().any(|row| row["failures"].as_i64() > Some(0)));
    for row in &own {
        let items = if row["benchmark"] == "Video Detailed Description" {
            ITEMS - 1
        } else {
            ITEMS
        };
        let failures = row["failures"].as_u64().unwrap() as usize;
        let counted = row["n"].as_u64().unwrap() as usize;
        let left_out = if row["benchmark"] == "LiveBench" {
            failures
        } else {
            0
        };
        assert_eq!(counted, items - left_out, "{row}");
        if row["model"] == "chat" && row["benchmark"] != "LiveBench" {
            assert_eq!(
                row["pairs"].as_u64().unwrap(),
                row["clusters"].as_u64().unwrap(),
                "{row}"
            );
        }
    }
    let missing = query(
        scene,
        "select count(*) as n from rejects where reason like 'video not found%'",
    );
    assert_eq!(missing[0]["n"], 1);
    let by_category = query(
        scene,
        "select count(*) as n from llava_w where category is not null and metric = 'score'",
    );
    assert_eq!(by_category[0]["n"], 6);
}

fn shows_the_results(report: &Path) {
    let svg = fs::read_to_string(report.join("results.svg")).unwrap();
    assert!(
        svg.contains("WildVision") && svg.contains("url(#hatch)"),
        "{svg}"
    );
    let table = fs::read_to_string(report.join("results.md")).unwrap();
    assert!(
        table.contains("| 7b chat (published) | 67.3 (+13.3) | 100.3 (+9.6) |"),
        "{table}"
    );
    let page = fs::read_to_string(report.join("wildvision_examples.html")).unwrap();
    assert!(
        page.contains("data:image/png;base64,") && page.contains("Wild question"),
        "{page}"
    );
    let page = fs::read_to_string(report.join("video_detail_examples.html")).unwrap();
    assert!(
        page.contains("data:image/png;base64,"),
        "the frames of a video"
    );
}

/// Answers that are exported as lmms-eval's samples load as answers, and are judged without a call.
fn loads_what_it_exports(scene: &Scene) {
    let several = says(
        scene,
        &["export", "bench", "answers", "--to", "samples.jsonl"],
    );
    assert!(
        several
            .err
            .contains("choose one: --table livebench_base_answers or "),
        "{}",
        several.err
    );
    let arguments = [
        "export",
        "bench",
        "answers",
        "--table",
        "llava_w_base_answers",
    ];
    exports_only_where_it_may(scene, &arguments);
    succeeds(
        scene,
        &[&arguments[..], &["--to", "samples.jsonl"]].concat(),
    );
    scene.write(
        "again.yaml",
        "
extends: p.yaml
stages:
  again:
    load_answers: { from: samples.jsonl, prompts: llava_w_prompts, model: base }
  again_rewards:
    score: { candidates: again, judge: llava_w_judge }
",
    );
    succeeds(scene, &["run", "again.yaml"]);
    let sql = "select count(*) as n, count(*) filter (where a.text = b.text) as same from again a
        join llava_w_base_answers b on b.prompt_id = a.prompt_id";
    assert_eq!(query(scene, sql)[0], json!({"n": ITEMS, "same": ITEMS}));
    let sql = "select count(*) as n from again_rewards a join llava_w_base_rewards b
        on b.prompt_id = a.prompt_id where a.reward = b.reward or (isnan(a.reward) and isnan(b.reward))";
    assert_eq!(query(scene, sql)[0]["n"], ITEMS);
    succeeds(scene, &["run", "p.yaml"]);
}

/// An export goes into a pipe, but not over a folder or a file of the run.
fn exports_only_where_it_may(scene: &Scene, arguments: &[&str]) {
    let to = |target: &str| says(scene, &[arguments, &["--to", target]].concat());
    let piped = to("/dev/stdout");
    assert_eq!(piped.code, Some(0), "{}", piped.err);
    assert_eq!(
        piped
            .out
            .lines()
            .filter(|line| line.starts_with('{'))
            .count(),
        ITEMS
    );
    let manifest = scene.path("runs/bench/manifest.json");
    let before = fs::read(&manifest).unwrap();
    for (target, words) in [
        (
            "runs/bench/manifest.json",
            "is in the run folder; name a file elsewhere",
        ),
        ("texts", "texts is a folder; name a file in it"),
    ] {
        let told = to(target);
        assert_eq!(told.code, Some(2), "{target}");
        assert!(told.err.contains(words), "{}", told.err);
    }
    assert_eq!(fs::read(&manifest).unwrap(), before);
    let wrong = says(
        scene,
        &[
            "export",
            "bench",
            "answers",
            "--table",
            "llava_w_base_rewards",
            "--to",
            "x",
        ],
    );
    let words = "`llava_w_base_rewards` is a table of rewards, not of candidates";
    assert!(wrong.err.contains(words), "{}", wrong.err);
}

/// Checks the fields of the requests that were made.
fn asks_as_the_benchmarks_do(requests: &[String]) {
    let requests: Vec<Value> = requests
        .iter()
        .map(|text| serde_json::from_str(text).unwrap())
        .collect();
    let of = |form: &str| {
        let is_it = |request: &&Value| request.to_string().contains(form);
        requests.iter().find(is_it).unwrap()
    };
    let kinds = |request: &Value| -> Vec<String> {
        let messages = request["messages"].as_array().unwrap();
        let content = messages.last().unwrap()["content"].as_array().unwrap();
        content
            .iter()
            .map(|part| part["type"].as_str().unwrap().to_owned())
            .collect()
    };
    let wild = of("WILDVISION");
    assert_eq!(
        wild["messages"][0],
        json!({"role": "system", "content": "Be fair."})
    );
    assert_eq!(kinds(wild), ["text", "image_url"]);
    let text = wild["messages"][1]["content"][0]["text"].as_str().unwrap();
    assert!(
        text.starts_with("WILDVISION Wild question ") && text.contains("A: Sonnet's reference "),
        "{text}"
    );
    let llava = of("LLAVA_W");
    assert_eq!(
        (
            llava["messages"].as_array().unwrap().len(),
            &kinds(llava)[..]
        ),
        (1, &["text".to_owned()][..])
    );
    assert_eq!(llava["max_tokens"], 1024);
    let live = of("LIVEBENCH");
    assert_eq!(kinds(live), ["image_url", "text"]);
    assert_eq!(live["response_format"], json!({"type": "json_object"}));
    assert_eq!(live["temperature"], 0.0);
    assert!(live.to_string().contains("Criteria "), "{live}");
    let video = of("VIDEO");
    assert_eq!(
        (video["max_tokens"].as_i64(), kinds(video).len()),
        (Some(64), 1)
    );
}

/// Bad input gives one clear error before a judge is asked.
#[test]
fn what_does_not_fit_is_named_before_a_judge_is_asked() {
    let judge = JudgeEndpoint::new();
    let scene = scene(&judge);
    let refused = |sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let arguments: Vec<&str> = ["run", "p.yaml"].into_iter().chain(sets).collect();
        let said = says(&scene, &arguments);
        assert_ne!(said.code, Some(0), "{}", said.out);
        flat(&said.err)
    };
    for (set, words) in [
        (
            "stages.wildvision_prompts.load_prompts.config=release_bench_0617",
            "no configuration `release_bench_0617`; set `config` to one of `release_bench_0617_with_modelresponse`, `other`",
        ),
        (
            "stages.wildvision_prompts.load_prompts.split=test",
            "no split `test`; set `split` to one of `test500`",
        ),
        (
            "stages.llava_w_prompts.load_prompts.columns.answer=gpt4_answer",
            "no column `gpt4_answer`, which `columns.answer` names; the file has the columns question_id",
        ),
        (
            "stages.livebench_prompts.load_prompts.keep=[criteria, level]",
            "no column `level`, which `keep` names",
        ),
        (
            "vars.livebench_month=2025-01",
            "is not in the Hugging Face cache",
        ),
        (
            "stages.llava_wilder_prompts.load_prompts.from=hf://datasets/lmms-lab/LLaVA-Bench-Wilder@old",
            "is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids downloading it",
        ),
        ("vars.texts=/nowhere", "pipeline benchmarks fetch /nowhere"),
        (
            "stages.livebench_prompts.load_prompts.keep=[subtask]",
            "uses `row.criteria`, but `livebench_prompts` does not keep the column `criteria`",
        ),
        (
            "models.wildvision_judge.self.ask.other=row.claude-3-opus",
            "uses `row.claude-3-opus`, but `wildvision_prompts` does not keep the column",
        ),
    ] {
        let told = refused(&[set]);
        assert!(told.contains(&flat(words)), "{set}: {told}");
    }
    judge.is_down.store(true, Ordering::SeqCst);
    let told = refused(&["stages.video_detail_prompts.load_prompts.limit=1"]);
    assert!(told.contains("the endpoint returned HTTP 503"), "{told}");
}

/// A hub with one dataset of two configurations, and the paths that were requested.
struct DatasetHub {
    endpoint: String,
    requested: Arc<Mutex<Vec<String>>>,
    server: Arc<Server>,
}

impl DatasetHub {
    fn new() -> Self {
        let readme = "---\nconfigs:\n- config_name: a\n  data_files:\n  - split: test\n    path: a/test.jsonl\n\
            - config_name: b\n  data_files:\n  - split: test\n    path: b/test.jsonl\n---\n";
        let files: HashMap<&str, String> = HashMap::from([
            ("README.md", readme.to_owned()),
            (
                "a/test.jsonl",
                "{\"Q\": \"Why?\", \"kind\": \"x\"}\n{\"Q\": \"How?\", \"kind\": \"y\"}\n"
                    .to_owned(),
            ),
            ("b/test.jsonl", "{\"Q\": \"Who?\"}\n".to_owned()),
            ("big.zip", "never".to_owned()),
        ]);
        let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
        let requested = Arc::new(Mutex::new(Vec::new()));
        let hub = Self {
            endpoint: format!("http://{}", server.server_addr()),
            requested: Arc::clone(&requested),
            server: Arc::clone(&server),
        };
        thread::spawn(move || {
            let listed = files.iter().map(|(name, text)| {
                let lfs = json!({ "sha256": digest(text.as_bytes()), "size": text.len() });
                json!({ "rfilename": name, "size": text.len(), "blobId": "0".repeat(40), "lfs": lfs })
            });
            let listing =
                json!({ "sha": "abc", "siblings": listed.collect::<Vec<_>>() }).to_string();
            for request in server.incoming_requests() {
                let url = request.url().to_owned();
                requested.lock().unwrap().push(url.clone());
                let file = url.strip_prefix("/datasets/org/data/resolve/abc/");
                let found = match file {
                    Some(name) => files.get(name).cloned(),
                    None if url == "/api/datasets/org/data/revision/main?blobs=true" => {
                        Some(listing.clone())
                    }
                    None => None,
                };
                let answer = match found {
                    Some(text) => Response::from_string(text),
                    None => Response::from_string("what?").with_status_code(404),
                };
                request.respond(answer).ok();
            }
        });
        hub
    }
}

impl Drop for DatasetHub {
    fn drop(&mut self) {
        self.server.unblock();
    }
}

#[test]
fn a_dataset_of_the_hub_is_fetched_by_a_run_and_then_read_offline() {
    let hub = DatasetHub::new();
    let scene = Scene::new();
    scene.write(
        "p.yaml",
        "
pipeline: bench
models: { policy: { scripted: {} } }
stages:
  prompts:
    load_prompts: { from: 'hf://datasets/org/data', config: a, split: test, columns: { question: Q }, keep: [kind] }
  answers: { sample: { prompts: prompts, model: policy } }
",
    );
    let says = |arguments: &[&str], is_offline: bool| {
        let mut command = scene.command(arguments);
        command
            .env("HF_HUB_CACHE", scene.path("hub"))
            .env("HF_ENDPOINT", &hub.endpoint);
        if is_offline {
            command.env("HF_HUB_OFFLINE", "1");
        }
        said(command.output().unwrap())
    };
    let told = says(&["check", "p.yaml"], false);
    let words = "hf download org/data --repo-type dataset";
    assert!(flat(&told.err).contains(words), "{}", told.err);
    assert!(
        hub.requested.lock().unwrap().is_empty(),
        "`check` asks nobody"
    );
    let set = |setting: &str| says(&["run", "p.yaml", "--set", setting], false);
    let wrong = set("stages.prompts.load_prompts.config=c");
    let words = "no configuration `c`; set `config` to one of `a`, `b`";
    assert!(flat(&wrong.err).contains(&flat(words)), "{}", wrong.err);
    let old = set("stages.prompts.load_prompts.from=hf://datasets/org/data@v9");
    assert!(
        flat(&old.err).contains("not found on the hub"),
        "{}",
        old.err
    );
    let told = says(&["run", "p.yaml"], false);
    assert_eq!(told.code, Some(0), "{}", told.err);
    let files: Vec<String> = hub.requested.lock().unwrap().drain(..).collect();
    assert!(
        files.iter().any(|url| url.ends_with("/a/test.jsonl")),
        "{files:?}"
    );
    assert!(
        !files
            .iter()
            .any(|url| url.contains("/b/") || url.contains("big.zip")),
        "{files:?}"
    );
    let sql = "select question, kept['kind'] as kind from prompts order by question";
    let told = says(&["sql", "bench", sql, "--format", "csv"], true);
    assert_eq!(told.out, "question,kind\nHow?,y\nWhy?,x\n");
    let again = says(&["run", "p.yaml"], true);
    assert!(again.err.contains("nothing to do"), "{}", again.err);
    // The folder of the dataset is a source as well.
    let folder = scene.path("hub/datasets--org--data/snapshots/abc");
    let folder = format!("stages.prompts.load_prompts.from={}", folder.display());
    let told = says(
        &["run", "p.yaml", "--set", &folder, "--run", "runs/other"],
        true,
    );
    assert_eq!(told.code, Some(0), "{}", told.err);
    assert!(Path::new(&scene.path("runs/other")).is_dir());
}

/// A path that begins with a variable is relative to the file that has the variable.
#[test]
fn a_variable_of_an_extending_file_names_paths_beside_it() {
    let scene = Scene::new();
    scene.write(
        "shared/base.yaml",
        "
pipeline: p
vars: { data: nowhere }
models: { policy: { scripted: {} } }
stages:
  prompts: { load_prompts: { from: \"${data}/prompts.json\" } }
  answers: { sample: { prompts: prompts, model: policy } }
",
    );
    scene.write(
        "own/data/prompts.json",
        r#"[{"id": "1", "prompt": "Why?"}]"#,
    );
    scene.write(
        "own/p.yaml",
        "extends: ../shared/base.yaml\nvars: { data: data }\n",
    );
    succeeds(&scene, &["run", "own/p.yaml"]);
    let missing = says(
        &scene,
        &["check", "shared/base.yaml", "--set", "vars.data=own/data"],
    );
    let words = "it exists in the current folder, but a relative path starts at the folder of the pipeline file; write \
         `--set vars.data=$PWD/…`";
    assert!(flat(&missing.err).contains(words), "{}", missing.err);
}

/// The demo without keys, with one model as base and chat.
#[cfg(feature = "torch")]
#[test]
fn the_small_worlds_benchmarks_run_with_the_judge_of_the_examples() {
    if !has_ffmpeg("the_small_worlds_benchmarks_run_with_the_judge_of_the_examples") {
        return;
    }
    let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
    let judge = Arc::clone(&server);
    thread::spawn(move || crate::benchmark_judge::serve(&judge));
    let scene = Scene::new();
    let samples = format!("{ROOT}/data-samples");
    let pipeline = format!(
        "extends: {ROOT}/pipelines/benchmarks/small-world.yaml\npipeline: bench\nvars:\n  items: 12\n  \
         judge_url: http://{}/v1\n  chat: {samples}/policy\n  video_chat: {samples}/video-policy\n",
        server.server_addr()
    );
    scene.write("p.yaml", pipeline);
    succeeds(&scene, &["run", "p.yaml"]);
    let sql =
        "select benchmark, model, score, delta, failures from results order by benchmark, model";
    let rows = query(&scene, sql);
    assert_eq!(rows.len(), 14);
    for pair in rows.chunks(2) {
        let [base, chat] = pair else {
            panic!("two models")
        };
        assert_eq!(
            (&base["model"], &chat["model"]),
            (&json!("base"), &json!("chat"))
        );
        assert_eq!(base["score"], chat["score"], "the same model");
        assert_eq!(chat["delta"], 0.0, "{chat}");
        assert!(base["score"].as_f64() > Some(0.0), "{base}");
    }
    server.unblock();
}
