//! Records of every format: the fields that are read, and rejects of records that would lose data.

use std::fs;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, MapBuilder, RecordBatch, StringArray, StringBuilder, StructArray,
};
use arrow::datatypes::{DataType, Field};
use ovchat_data::store::TableWriter;
use ovchat_data::tables::{Pair, Prompt};
use serde_json::{Value, json};

use crate::bad_input::{rejects, with_images};
use crate::judges::flat;
use crate::run::{SCRIPTED, rows};
use crate::scene::{CommandOutput, Scene};

#[test]
fn a_record_without_a_question_is_set_aside_with_its_fields() {
    let scene = Scene::new();
    scene.write(
        "prompts.json",
        r#"[{"id": "a", "promt": "Why?"}, {"id": "b", "prompt": "Why?"}]"#,
    );
    scene
        .write("p.yaml", SCRIPTED)
        .pipeline(&["run", "p.yaml", "--set", "reject_share_max=0.5"]);
    assert_eq!(
        rejects(&scene)[0].1,
        "missing field `prompt`; the record has the fields id, promt; name the column of the question as \
         `columns: { question: … }`"
    );
}

/// Loads records from a file as prompts; up to half of them may be rejects.
fn load(scene: &Scene, file: &str) -> CommandOutput {
    let pipeline = SCRIPTED.replace("from: prompts.json", &format!("from: {file}"));
    let run = [
        "run",
        "p.yaml",
        "--until",
        "prompts",
        "--set",
        "reject_share_max=0.9",
    ];
    scene.write("p.yaml", pipeline).succeeds(&run)
}

#[test]
fn a_record_with_media_that_are_not_read_is_set_aside_in_every_format() {
    let video = json!({"id": "a", "prompt": "<video>\nWhat happens?", "video": "a.mp4"});
    let spoken = |from: &str, value: &str, said: Value| json!({from: "user", value: said});
    let asked = spoken("from", "value", json!("<video>\nWhat happens?"));
    let parts =
        json!([{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What happens?"}]);
    let plain = json!({"id": "b", "prompt": "Why?", "video": null, "audio": [], "image_url": ""});
    let outputs =
        json!({"output_1": {"value": "Yes."}, "output_2": {"value": "No."}, "preference": 1});
    let with = |more: Value| {
        let mut record = json!({"id": "a", "conversations": [asked]});
        let fields = more.as_object().unwrap().clone();
        record.as_object_mut().unwrap().extend(fields);
        record
    };
    let mut preferred = with(json!({"video": "a.mp4"}));
    let fields = outputs.as_object().unwrap().clone();
    preferred.as_object_mut().unwrap().extend(fields);
    let said = spoken("role", "content", parts);
    for (record, word) in [
        (video, "video not found"),
        (with(json!({"videos": ["a.mp4"]})), "video not found"),
        (with(json!({"video_2": "a.mp4"})), "`video_2`"),
        (
            with(json!({"audio": {"path": "a.wav", "bytes": null}})),
            "`audio`",
        ),
        (with(json!({"sound": "a.wav"})), "`sound`"),
        (
            with(json!({"image_url": "https://example.com/a.png"})),
            "`image_url`",
        ),
        (preferred, "video not found"),
        (json!({"id": "a", "conversations": [said]}), "`video`"),
    ] {
        let list = json!([record, plain]).to_string();
        for (file, text) in [
            ("list.json", list),
            ("lines.jsonl", format!("{record}\n{plain}\n")),
        ] {
            let scene = Scene::new();
            let said = load(scene.write(file, text), file);
            let rejects = rejects(&scene);
            assert_eq!(rejects.len(), 1, "{record}: {}", said.err);
            assert!(rejects[0].1.contains(word), "{record}: {rejects:?}");
            let prompts: Vec<Prompt> = rows(&scene, "prompts", None);
            assert_eq!(prompts[0].question, "Why?");
        }
    }
}

/// Writes `prompts.parquet`.
fn write_parquet(scene: &Scene, batch: &RecordBatch) {
    let mut writer = TableWriter::new(&scene.path(""), "prompts", batch.schema(), &[]);
    writer.write(batch).unwrap();
    writer.finish().unwrap();
}

#[test]
fn a_column_of_videos_sets_the_rows_aside_in_which_it_is_not_null() {
    let texts =
        |texts: &[Option<&str>]| -> ArrayRef { Arc::new(StringArray::from(texts.to_vec())) };
    let batch = RecordBatch::try_from_iter_with_nullable([
        (
            "prompt",
            texts(&[Some("What happens?"), Some("Why?"), Some("How?")]),
            true,
        ),
        ("video", texts(&[Some("a.mp4"), None, None]), true),
        ("category", texts(&[Some("a"), Some("b"), None]), true),
    ]);
    let scene = Scene::new();
    write_parquet(&scene, &batch.unwrap());
    let said = load(&scene, "prompts.parquet");
    let rejects = rejects(&scene);
    assert_eq!(rejects.len(), 1, "{rejects:?}");
    assert_eq!(rejects[0].0, "row 1");
    assert!(rejects[0].1.contains("video not found"), "{rejects:?}");
    assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), 2);
    let told = "prompts: `category` is ignored; 2 of 3 records have it\n";
    assert!(said.err.contains(told), "{}", said.err);
}

#[test]
fn keys_that_are_not_read_are_named_once_with_how_many_records_have_them() {
    let scene = Scene::new();
    // More than one part.
    let record =
        |number: usize| json!({"prompt": format!("{number}?"), "gpt_answer": "a", "category": 1});
    let records: Vec<Value> = (0..600).map(record).collect();
    scene.write("prompts.json", serde_json::to_vec(&records).unwrap());
    let said = load(&scene, "prompts.json");
    let told = "prompts: `category`, `gpt_answer` are ignored; 600 of 600 records have them\n";
    assert_eq!(said.err.matches("are ignored").count(), 1, "{}", said.err);
    assert!(said.err.contains(told), "{}", said.err);
    let prompts = scene.prompts(3);
    assert!(!load(prompts, "prompts.json").err.contains("are ignored"));
}

#[test]
fn as_many_placeholders_as_images_or_none() {
    let scene = with_images(&["good.png"]);
    let two = json!(["good.png", "good.png"]);
    let records = json!([
        {"image": two, "prompt": "Which is older?"},
        {"image": two, "prompt": "<image> <image> Which is older?"},
        {"image": two, "prompt": "<image> Which is older?"},
        {"image": two, "prompt": "<image> <image> <image> Which is older?"},
        {"prompt": "What does the tag <image> do?"},
        {"prompt": "<image>\nWhich is older?"},
    ]);
    scene.write("prompts.json", records.to_string());
    let run = ["run", "p.yaml", "--until", "prompts", "--set"];
    scene.succeeds(&[&run[..], &["reject_share_max=0.9"]].concat());
    let reasons = rejects(&scene);
    let reason =
        |places: &str| format!("found 2 images but {places}; write one for each image, or none");
    let lost = "the text contains the placeholder `<image>`, but the record has no image; name it in `image`, \
                or remove the placeholder";
    let expected = [
        ("record 3".to_owned(), reason("1 `<image>` placeholder")),
        ("record 4".to_owned(), reason("3 `<image>` placeholders")),
        ("record 6".to_owned(), lost.to_owned()),
    ];
    assert_eq!(reasons, expected);
    let prompts: Vec<Prompt> = rows(&scene, "prompts", None);
    let questions: Vec<&str> = prompts.iter().map(|row| row.question.as_str()).collect();
    assert_eq!(
        questions,
        [
            "Which is older?",
            "<image> <image> Which is older?",
            "What does the tag <image> do?"
        ]
    );
    // The second run gives the same prompts.
    assert_eq!(prompts[0].image_ids, prompts[1].image_ids);
}

#[test]
fn an_empty_or_broken_prompt_file_is_refused_with_its_name() {
    for (content, words) in [
        ("[]", "no records found"),
        ("", "no records found"),
        ("[{\"prompt\": }]", "line 1 column"),
    ] {
        let scene = Scene::new();
        let said = scene
            .write("prompts.json", content)
            .write("p.yaml", SCRIPTED)
            .pipeline(&["run", "p.yaml"]);
        assert_eq!(said.code, Some(2));
        assert!(
            said.err.contains("prompts.json") && said.err.contains(words),
            "{}",
            said.err
        );
    }
}

#[test]
fn a_line_that_is_no_json_costs_its_row() {
    let scene = Scene::new();
    scene.write(
        "prompts.json",
        "{\"prompt\": \"Why?\"}\n{\"prompt\": \n{\"prompt\": \"How?\"}\n",
    );
    scene
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml", "--set", "reject_share_max=0.5"]);
    assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), 2);
    let rejects = rejects(&scene);
    assert!(
        rejects[0].0 == "line 2" && rejects[0].1.contains("invalid JSON"),
        "{rejects:?}"
    );
}

/// Asserts that a record is a reject in both JSON formats, and returns its id and reason.
#[track_caller]
fn set_aside(record: &Value) -> (String, String) {
    let fine = json!({"id": "fine", "prompt": "Why?"});
    let mut told = Vec::new();
    for (file, text) in [
        ("list.json", json!([record, fine]).to_string()),
        ("lines.jsonl", format!("{record}\n{fine}\n")),
    ] {
        let scene = with_images(&[]);
        scene.write(file, text);
        let said = load(&scene, file);
        let mut rejects = rejects(&scene);
        assert_eq!(rejects.len(), 1, "{record}: {}", said.err);
        assert!(said.err.contains("1 faulty row rejected"), "{}", said.err);
        assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), 1);
        let (id, reason) = rejects.remove(0);
        told.push((id.replace("line", "record"), reason));
    }
    assert_eq!(told[0], told[1]);
    told.remove(0)
}

#[test]
fn an_image_beside_the_one_that_is_read_sets_the_record_aside() {
    for (key, value) in [
        ("image_2", json!("cut.png")),
        ("image_url", json!("https://example.com/b.png")),
        ("photo", json!("b.png")),
        ("mask", json!("masks/b.png")),
        ("thumbnail", json!("data:image/png;base64,iVBOR")),
        ("raw", json!({"path": null, "bytes": "aGk="})),
        ("recording", json!("talk.m4a")),
        ("document", json!(["a.pdf"])),
    ] {
        let record =
            json!({"id": 7, "image": "images/good.png", "prompt": "What is it?", key: value});
        let (id, reason) = set_aside(&record);
        assert_eq!(id, "record 1, id 7");
        assert!(reason.contains(&format!("`{key}`")), "{reason}");
    }
    // Other names of an image that is read, and values that only look like one.
    let scene = with_images(&[]);
    let record = json!({"id": "good.png", "image": "images/good.png", "image_1": "images/good.png",
        "image_url": "https://example.com/good.png", "file_name": "good.png", "source": "coco",
        "note": "it reads b.png", "prompt": "What is it?"});
    scene.write("prompts.json", json!([record]).to_string());
    let said = load(&scene, "prompts.json");
    assert_eq!(rejects(&scene), []);
    assert_eq!(
        rows::<Prompt>(&scene, "prompts", None)[0].image_ids.len(),
        1
    );
    let told = "`file_name`, `image_1`, `image_url`, `note`, `source` are ignored; 1 of 1 records have them";
    assert!(said.err.contains(told), "{}", said.err);
}

#[test]
fn media_under_any_key_set_a_record_without_images_aside() {
    for (key, value) in [
        ("file_name", json!("a.png")),
        ("main_image", json!("a")),
        ("screenshot", json!("a.webp")),
        ("picture", json!({"url": "https://example.com/1"})),
        ("frames", json!(["1.jpg", "2.jpg"])),
        (
            "media",
            json!([{"type": "image", "url": "https://example.com/a.jpg"}]),
        ),
        ("attachment", json!("report")),
        ("clip", json!("a.MP4")),
        ("wav", json!("a")),
        ("page", json!("scans/page 1.tiff")),
        ("question_audio", json!("https://example.com/a.flac?key=1")),
        ("second_image", json!("b")),
        ("leftImage", json!("b")),
        ("cat_photo", json!("https://example.com/1")),
        ("metadata", json!({"source": {"clip": "a.opus"}})),
        ("metadata", json!([{"video": "a"}])),
        ("speech", json!("a.aac")),
        ("scan", json!("a.jp2")),
    ] {
        let (_, reason) = set_aside(&json!({"prompt": "What is it?", key: value}));
        assert!(reason.contains(&format!("`{key}`")), "{reason}");
    }
}

#[test]
fn a_placeholder_without_its_medium_sets_the_record_aside() {
    for word in ["<video>", "<audio>", "<image>"] {
        let (_, reason) = set_aside(&json!({"prompt": format!("{word}\nWhat happens?")}));
        assert!(
            reason.contains(&format!("placeholder `{word}`")),
            "{reason}"
        );
    }
    let scene = Scene::new();
    let text = "What does the <video> tag do in HTML?";
    scene.write("prompts.json", json!([{"prompt": text}]).to_string());
    load(&scene, "prompts.json");
    assert_eq!(rows::<Prompt>(&scene, "prompts", None)[0].question, text);
}

#[test]
fn a_column_of_bytes_is_read_as_images_and_a_second_column_of_files_is_refused() {
    let scene = with_images(&[]);
    let png = fs::read(scene.path("images/good.png")).unwrap();
    let texts = |texts: [&str; 2]| -> ArrayRef { Arc::new(StringArray::from(texts.to_vec())) };
    let bytes = |values: [Option<&[u8]>; 2]| -> ArrayRef {
        Arc::new(BinaryArray::from_opt_vec(values.to_vec()))
    };
    let batch = |columns: Vec<(&str, ArrayRef)>| {
        let columns = columns
            .into_iter()
            .map(|(name, column)| (name, column, true));
        RecordBatch::try_from_iter_with_nullable(columns).unwrap()
    };
    let prompts = texts(["What is it?", "What is that?"]);
    write_parquet(
        &scene,
        &batch(vec![
            ("prompt", prompts.clone()),
            ("image", bytes([Some(&png), Some(b"words")])),
        ]),
    );
    load(&scene, "prompts.parquet");
    let read: Vec<Prompt> = rows(&scene, "prompts", None);
    assert_eq!(read[0].image_ids, [ovchat_data::store::digest(&png)]);
    let told = rejects(&scene);
    assert!(told[0].0 == "row 2" && told.len() == 1, "{told:?}");

    // The bytes of a second column, under any name.
    let field = Arc::new(Field::new("bytes", DataType::Binary, true));
    let other: ArrayRef = Arc::new(StructArray::from(vec![(field, bytes([None, Some(&png)]))]));
    for (name, other) in [("scan", other), ("raw", bytes([None, Some(&png)]))] {
        let scene = Scene::new();
        let image = bytes([Some(&png), Some(&png)]);
        let columns = vec![("prompt", prompts.clone()), ("image", image), (name, other)];
        write_parquet(&scene, &batch(columns));
        load(&scene, "prompts.parquet");
        assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), 1);
        let told = rejects(&scene);
        assert_eq!(told[0].0, "row 2");
        assert!(
            told[0].1.contains(&format!("embeds a file in `{name}`")),
            "{told:?}"
        );
    }
}

#[test]
fn an_empty_answer_is_no_feedback() {
    let scene = Scene::new();
    let pair = |id: &str, chosen: &str, rejected: &str| json!({"id": id, "prompt": "Why?", "chosen": chosen, "rejected": rejected});
    let pairs = [
        pair("a", "", "No."),
        pair("b", "Yes.", " "),
        pair("c", "Yes.", "No."),
    ];
    scene.write("pairs.json", json!(pairs).to_string());
    let pipeline = "pipeline: scripted\nreject_share_max: 0.9\nstages:\n  pairs:\n    load_feedback: { from: pairs.json }\n";
    scene.write("p.yaml", pipeline).succeeds(&["run", "p.yaml"]);
    assert_eq!(rows::<Pair>(&scene, "pairs", None).len(), 1);
    let reason = |name: &str| format!("`{name}` is empty; write the answer, or remove the record");
    let expected = [
        ("record 1, id a".to_owned(), reason("chosen")),
        ("record 2, id b".to_owned(), reason("rejected")),
    ];
    assert_eq!(rejects(&scene), expected);
}

#[test]
fn a_key_that_stands_twice_sets_the_record_aside() {
    let twice = r#"{"image": "a.png", "prompt": "Why?", "image": "b.png"}"#;
    for (file, text) in [
        ("list.json", format!("[{twice}, {{\"prompt\": \"How?\"}}]")),
        (
            "lines.jsonl",
            format!("{twice}\n{{\"prompt\": \"How?\"}}\n"),
        ),
    ] {
        let scene = Scene::new();
        load(scene.write(file, text), file);
        let reason = "duplicate key `image`; keep one of the two";
        assert_eq!(rejects(&scene)[0].1, reason);
        assert_eq!(rows::<Prompt>(&scene, "prompts", None)[0].question, "How?");
    }
}

#[test]
fn a_byte_order_mark_is_no_harm_and_utf16_is_refused() {
    let scene = Scene::new();
    scene.write("prompts.json", "\u{feff}[{\"prompt\": \"Why?\"}]");
    load(&scene, "prompts.json");
    assert_eq!(rows::<Prompt>(&scene, "prompts", None)[0].question, "Why?");
    let units = "\u{feff}[{\"prompt\": \"Why?\"}]".encode_utf16();
    let bytes: Vec<u8> = units.flat_map(u16::to_le_bytes).collect();
    scene.write("prompts.json", bytes);
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(2));
    let told = said.err.replace("\n  │ ", " ").replace("\n  | ", " ");
    assert!(
        told.contains("the file is UTF-16 or UTF-32, but JSON must be UTF-8; convert it: iconv -f UTF-16 -t UTF-8"),
        "{told}"
    );
}

/// A query that lists a prompt or an answer twice: a lookup by its id would find only one.
#[test]
fn a_row_that_a_query_lists_twice_is_refused_where_it_would_get_lost() {
    let again = |table: &str| {
        format!(
            "sql: {{ query: \"select * from {table} union all select * from {table}\", tables: [{table}] }}"
        )
    };
    let prompts = SCRIPTED
        .replace(
            "  candidates:\n",
            &format!("  asked:\n    {}\n  candidates:\n", again("prompts")),
        )
        .replace(
            "sample: { prompts: prompts, model: policy, part: 7 }",
            "sample: { prompts: asked, model: policy }",
        );
    let candidates = SCRIPTED
        .replace(
            "  rewards:\n",
            &format!("  both:\n    {}\n  rewards:\n", again("candidates")),
        )
        .replace(
            "score: { candidates: candidates, judge: judge, part: 5 }",
            "score: { candidates: both, judge: judge }",
        )
        .replace(
            "select_extremes: { rewards: rewards }",
            "select_extremes: { rewards: rewards, candidates: candidates }",
        );
    for (pipeline, words, reader) in [
        (
            prompts,
            "`asked` has several rows for prompt ",
            "`candidates` needs one per prompt_id",
        ),
        (
            candidates,
            "`both` has several rows for candidate 0 of prompt ",
            "`rewards` needs one per",
        ),
    ] {
        assert!(pipeline.contains("union all"), "{pipeline}");
        let scene = Scene::new();
        scene.prompts(3).write("p.yaml", &pipeline);
        let said = scene.pipeline(&["run", "p.yaml"]);
        let told = said.err.replace("\n  │ ", " ").replace("\n  | ", " ");
        assert_eq!(said.code, Some(1), "{told}");
        assert!(told.contains(words) && told.contains(reader), "{told}");
        assert!(told.contains("use `select distinct`"), "{told}");
        scene.write("p.yaml", pipeline.replace("union all", "union"));
        scene.succeeds(&["run", "p.yaml"]);
    }
}

/// Duplicate parts of a conversation are reported, and data that would be lost is an error.
#[test]
fn parts_of_a_record_that_would_be_lost_are_told() {
    let two = json!({"conversations": [{"from": "system", "value": "Be brief."},
        {"from": "system", "value": "Be kind."}, {"from": "human", "value": "Why?"}]});
    let (_, reason) = set_aside(&two);
    assert_eq!(
        reason,
        "entry 1 of `conversations` is a second system prompt; merge the two"
    );
    let (_, reason) =
        set_aside(&json!({"id": 123_456_789_012_345_678_901_234_u128 as f64, "prompt": "Why?"}));
    assert!(reason.contains("quote it to make it a string"), "{reason}");
    let (_, reason) = set_aside(
        &json!({"conversations": [{"from": "human", "value": "Why?", "role": "user", "content": "How?"}]}),
    );
    assert!(
        reason.contains("mixes `from`/`value` with `role`/`content`"),
        "{reason}"
    );
    let (_, reason) = set_aside(
        &json!({"image": "images/good.png", "system": "<image>", "prompt": "<image>Why?"}),
    );
    assert!(
        reason.contains("`<image>` stands in the system prompt or in an answer"),
        "{reason}"
    );
    let scene = Scene::new();
    let entries = json!([{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]);
    let record = json!({"conversations": entries, "answer": "B"});
    scene.write("prompts.json", json!([record]).to_string());
    let said = load(&scene, "prompts.json");
    let told = "`conversations: the final answer` is ignored; 1 of 1 records have it";
    assert!(said.err.contains(told), "{}", said.err);
}

#[test]
fn a_record_that_is_too_long_ends_the_load_in_bounded_memory() {
    let long = "x".repeat(65 << 20);
    for (file, text, place, code) in [
        (
            "list.json",
            format!("[{{\"id\": 1, \"prompt\": \"{long}\"}}]"),
            "",
            2,
        ),
        (
            "lines.jsonl",
            format!("{{\"prompt\": \"Why?\"}}\n{{\"prompt\": \"{long}\"}}\n"),
            ", line 2",
            1,
        ),
    ] {
        let scene = Scene::new();
        scene.write(file, text);
        let pipeline = SCRIPTED.replace("from: prompts.json", &format!("from: {file}"));
        let said = scene.write("p.yaml", pipeline).pipeline(&["run", "p.yaml"]);
        assert_eq!(said.code, Some(code), "{}", said.err);
        let told = flat(&said.err);
        assert!(told.contains(&format!("{file}{place}")), "{told}");
        let words = "a record exceeds 64 MB; keep images and other large values in separate files";
        assert!(told.contains(words), "{told}");
    }
}

#[test]
fn columns_that_would_be_lost_are_refused() {
    let texts = |texts: &[&str]| -> ArrayRef { Arc::new(StringArray::from(texts.to_vec())) };
    let png = fs::read(with_images(&[]).path("images/good.png")).unwrap();
    let bytes: ArrayRef = Arc::new(BinaryArray::from(vec![&png[..]]));
    let batch = |columns: Vec<(&str, ArrayRef)>| {
        let columns = columns
            .into_iter()
            .map(|(name, column)| (name, column, true));
        RecordBatch::try_from_iter_with_nullable(columns).unwrap()
    };
    let fails = |batch: &RecordBatch| {
        let scene = with_images(&[]);
        write_parquet(&scene, batch);
        let pipeline = SCRIPTED.replace("from: prompts.json", "from: prompts.parquet");
        let said = scene.write("p.yaml", pipeline).pipeline(&["run", "p.yaml"]);
        assert_eq!(said.code, Some(2), "{}", said.err);
        flat(&said.err)
    };
    let twice = batch(vec![
        ("prompt", texts(&["Why?"])),
        ("prompt", texts(&["How?"])),
    ]);
    let told = fails(&twice);
    assert!(told.contains("duplicate column `prompt`"), "{told}");
    for (name, other) in [("image", "images"), ("images", "image")] {
        let told = fails(&batch(vec![
            ("prompt", texts(&["Why?"])),
            (name, bytes.clone()),
            (other, texts(&["images/other.png"])),
        ]));
        assert!(told.contains("hold different images"), "{told}");
    }
    let jpg: ArrayRef = Arc::new(BinaryArray::from(vec![&png[..png.len() - 1]]));
    let told = fails(&batch(vec![
        ("prompt", texts(&["Why?"])),
        ("image", bytes.clone()),
        ("images", jpg),
    ]));
    assert!(told.contains("hold different images"), "{told}");
    // The same image under two names counts once.
    let scene = with_images(&[]);
    let same = batch(vec![
        ("prompt", texts(&["<image>Why?"])),
        ("image", bytes.clone()),
        ("images", bytes.clone()),
    ]);
    write_parquet(&scene, &same);
    load(&scene, "prompts.parquet");
    let read: Vec<Prompt> = rows(&scene, "prompts", None);
    assert_eq!(read[0].image_ids, [ovchat_data::store::digest(&png)]);
    let mut map = MapBuilder::new(None, StringBuilder::new(), StringBuilder::new());
    map.keys().append_value("video");
    map.values().append_value("a.mp4");
    map.append(true).unwrap();
    let told = fails(&batch(vec![
        ("prompt", texts(&["Why?"])),
        ("extra", Arc::new(map.finish())),
    ]));
    assert!(told.contains("`extra`"), "{told}");
}

#[test]
fn check_finds_that_no_image_is_there() {
    let scene = with_images(&[]);
    let record = json!([{"image": "0001.png", "prompt": "What is it?"}]);
    scene.write("prompts.json", record.to_string());
    let said = scene
        .write("p.yaml", SCRIPTED)
        .pipeline(&["check", "p.yaml"]);
    assert_eq!(said.code, Some(2), "{}", said.err);
    assert!(
        flat(&said.err).contains(&flat("image not found: 0001.png")),
        "{}",
        said.err
    );
}
