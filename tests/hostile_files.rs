//! Untrusted files: their paths and contents.

use std::fs;
use std::os::unix::fs::symlink;

use ovchat_data::tables::{Image, Prompt};
use serde_json::{Value, json};

use crate::bad_input::{rejects, with_images};
use crate::hostile_text::ends_soon;
use crate::run::rows;
use crate::scene::Scene;

const LOAD: [&str; 6] = [
    "run",
    "p.yaml",
    "--until",
    "prompts",
    "--set",
    "reject_share_max=0.99",
];

/// An image outside the scene of [`with_images`], and links to it.
fn with_a_secret() -> (Scene, tempfile::TempDir) {
    let scene = with_images(&["good.png"]);
    let elsewhere = tempfile::tempdir().unwrap();
    let secret = elsewhere.path().join("secret.png");
    fs::copy(scene.path("images/good.png"), &secret).unwrap();
    symlink(&secret, scene.path("images/link.png")).unwrap();
    symlink(elsewhere.path(), scene.path("images/folder")).unwrap();
    (scene, elsewhere)
}

#[test]
fn a_image_outside_of_its_folders_is_set_aside_unless_the_pipeline_says_otherwise() {
    let (scene, elsewhere) = with_a_secret();
    let secret = elsewhere.path().join("secret.png");
    let secret = secret.to_str().unwrap();
    let up = format!("{}{secret}", "../".repeat(20));
    let root = format!("/proc/self/root{secret}");
    let good = scene.path("images/good.png");
    fs::copy(&good, scene.path("beside.png")).unwrap();
    symlink("good.png", scene.path("images/inside.png")).unwrap();
    let inside = [
        "good.png",
        "inside.png",
        "../beside.png",
        good.to_str().unwrap(),
    ];
    let outside = [secret, &up, "link.png", "folder/secret.png", &root];
    let names = inside.iter().chain(&outside);
    let record = |name| json!({"image": name, "prompt": format!("What is {name}?")});
    let list: Vec<_> = names.map(record).collect();
    scene.write("prompts.json", serde_json::to_vec(&list).unwrap());
    let said = scene.succeeds(&LOAD);
    let note = format!(
        "prompts: 5 records name files outside the allowed folders, first {secret} (record 5); set `images_anywhere: true` to read from any folder"
    );
    assert!(said.err.contains(&note), "{}", said.err);
    assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), inside.len());
    let found = rejects(&scene);
    assert_eq!(found.len(), outside.len());
    for (_, reason) in &found {
        assert!(
            reason.contains(secret) && reason.contains("`images_anywhere: true`"),
            "{reason}"
        );
    }

    let anywhere = "stages.prompts.load_prompts.images_anywhere=true";
    let said = scene.succeeds(&[&LOAD[..], &["--set", anywhere]].concat());
    assert!(!said.err.contains("outside"), "{}", said.err);
    assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), list.len());
}

#[test]
fn a_image_from_a_hub_cache_is_read_where_its_link_leads() {
    let scene = with_images(&["good.png"]);
    let snapshot = "hub/datasets--org--name/snapshots/0123/images";
    fs::create_dir_all(scene.path(snapshot)).unwrap();
    fs::create_dir_all(scene.path("hub/datasets--org--name/blobs")).unwrap();
    let blob = scene.path("hub/datasets--org--name/blobs/feed");
    fs::copy(scene.path("images/good.png"), &blob).unwrap();
    symlink("../../../blobs/feed", scene.path(snapshot).join("good.png")).unwrap();
    let images = format!("stages.prompts.load_prompts.images={snapshot}");
    scene.succeeds(&[&LOAD[..], &["--set", &images]].concat());
    assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), 1);
}

/// Images embedded in Parquet have a path that can name any file.
#[test]
fn the_bytes_of_an_embedded_image_are_kept_where_its_path_is_another_file() {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, BinaryArray, RecordBatch, StringArray, StructArray};
    use arrow::datatypes::{DataType, Field};
    let scene = with_images(&[]);
    let bytes = fs::read(scene.path("images/good.png")).unwrap();
    scene.write("other.png", &bytes[1..]);
    let other = scene.path("other.png");
    let image = StructArray::from(vec![
        (
            Arc::new(Field::new("bytes", DataType::Binary, true)),
            Arc::new(BinaryArray::from(vec![Some(bytes.as_slice())])) as ArrayRef,
        ),
        (
            Arc::new(Field::new("path", DataType::Utf8, true)),
            Arc::new(StringArray::from(vec![other.to_str().unwrap()])) as ArrayRef,
        ),
    ]);
    let prompt = StringArray::from(vec!["What is it?"]);
    let batch = RecordBatch::try_from_iter([
        ("image", Arc::new(image) as ArrayRef),
        ("prompt", Arc::new(prompt)),
    ])
    .unwrap();
    let mut writer =
        ovchat_data::store::TableWriter::new(&scene.path(""), "prompts", batch.schema(), &[]);
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    let text = fs::read_to_string(scene.path("p.yaml")).unwrap();
    let text = text.replace("prompts.json", "prompts.parquet");
    scene.write("p.yaml", format!("keep_images: reference\n{text}"));
    scene.succeeds(&LOAD);
    let kept = &rows::<Image>(&scene, "images", None);
    assert!(kept.is_empty() || kept[0].image.bytes.as_deref() == Some(&bytes[..]));
}

/// Asserts that a run can be stopped shortly after it starts.
fn is_stopped(scene: &Scene) {
    let mut command = scene.command(&LOAD);
    let child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    ends_soon(child, "-INT", 130);
}

#[test]
fn a_run_that_reads_a_large_file_hears_signals() {
    let scene = with_images(&["good.png"]);
    let captions = fs::File::create(scene.path("captions.json")).unwrap();
    // A sparse file, which takes no disk space.
    captions.set_len(1 << 40).unwrap();
    let text = fs::read_to_string(scene.path("p.yaml")).unwrap();
    let text = text.replace("images: images", "images: images, captions: captions.json");
    scene.write("p.yaml", text);
    is_stopped(&scene);
}

#[test]
fn a_run_that_decodes_images_hears_signals_and_goes_on_later() {
    let scene = with_images(&[]);
    image::GrayImage::new(5000, 5000)
        .save(scene.path("images/large.png"))
        .unwrap();
    // An image is decoded once, so each has other bytes behind its end.
    let large = fs::read(scene.path("images/large.png")).unwrap();
    let record = |number: u8| {
        let name = format!("{number}.png");
        fs::write(
            scene.path(&format!("images/{name}")),
            [&*large, &[number]].concat(),
        )
        .unwrap();
        json!({"image": name, "prompt": "What is it?"})
    };
    let records: Vec<Value> = (0..250).map(record).collect();
    let many = serde_json::to_vec(&records).unwrap();
    scene.write("prompts.json", many);
    is_stopped(&scene);
    let few = "stages.prompts.load_prompts.limit=2";
    scene.succeeds(&[&LOAD[..], &["--set", few]].concat());
    assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), 2);
    assert!(rejects(&scene).is_empty());
}

#[test]
fn a_file_of_no_end_is_refused_by_its_size() {
    let scene = with_images(&["good.png", "hole.png"]);
    let hole = |name: &str| {
        let file = fs::File::create(scene.path(name)).unwrap();
        file.set_len(1 << 40).unwrap();
    };
    hole("images/hole.png");
    scene.succeeds(&LOAD);
    let reason = &rejects(&scene)[0].1;
    assert!(
        reason.ends_with("hole.png: it is larger than 1024 MB"),
        "{reason}"
    );
    hole("base.yaml");
    let text = fs::read_to_string(scene.path("p.yaml")).unwrap();
    scene.write("q.yaml", format!("extends: base.yaml\n{text}"));
    let said = scene.pipeline(&["check", "q.yaml"]);
    assert_eq!(said.code, Some(2));
    assert!(said.err.contains("it is larger than 64 MB"), "{}", said.err);
}
