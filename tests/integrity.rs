//! Flipped bits and truncated files: detected, restored or rebuilt, never used.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use ovchat_data::store::{Manifest, copy_folder};

use crate::run::SCRIPTED;
use crate::scene::{Numbers, Scene};

/// The seed of the flips.
const SEED: u64 = 20_261_128;

/// The number of flips and cuts of the manifest's files.
const TRIALS: usize = 200;

/// The number of flips of a table that a query reads.
const FLIPS: usize = 30;

fn finished() -> Scene {
    let scene = Scene::new();
    scene.prompts(6).write("p.yaml", SCRIPTED);
    scene.succeeds(&["run", "p.yaml"]);
    scene
}

/// Flips one bit of a file and keeps its modification time.
fn flip(path: &Path, bit: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[bit / 8] ^= 1 << (bit % 8);
    overwrite(path, &bytes);
}

fn overwrite(path: &Path, bytes: &[u8]) {
    let time = fs::metadata(path).unwrap().modified().unwrap();
    fs::write(path, bytes).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(time).unwrap();
}

fn manifest_files(run: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(run)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            path.is_file() && name.starts_with("manifest.")
        })
        .collect();
    files.sort();
    files
}

/// Returns the first file of a table in a round.
fn file_of(run: &Path, table: &str) -> PathBuf {
    let manifest = Manifest::read(run).unwrap();
    let made = manifest.find(table, Some(1)).unwrap();
    run.join(&made.files().next().unwrap().file)
}

#[test]
fn no_flip_or_cut_of_the_manifest_goes_unseen_or_costs_a_run() {
    let scene = finished();
    let whole = scene.path("runs/scripted");
    let before = scene.tables("runs/scripted");
    let made = Manifest::read(&whole).unwrap().made;
    assert!(Manifest::flaws(&whole).is_empty());
    let damaged = scene.path("damaged");
    let mut numbers = Numbers(SEED);
    for trial in 0..TRIALS {
        let _ = fs::remove_dir_all(&damaged);
        copy_folder(&whole, &damaged).unwrap();
        let files = manifest_files(&damaged);
        assert!(files.len() >= 2, "the manifest and the one before");
        let file = &files[numbers.below(files.len())];
        let bytes = fs::read(file).unwrap();
        let is_cut = numbers.below(4) == 0;
        if is_cut {
            overwrite(file, &bytes[..numbers.below(bytes.len())]);
        } else {
            flip(file, numbers.below(bytes.len() * 8));
        }
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let what = format!("trial {trial}: {name}, cut: {is_cut}");
        // A log that ends with a whole line is an earlier state, the older of two copies.
        let ends_well = fs::read(file)
            .unwrap()
            .last()
            .is_none_or(|byte| *byte == b'\n');
        let is_older = is_cut && name.ends_with(".log") && ends_well;
        assert!(is_older || !Manifest::flaws(&damaged).is_empty(), "{what}");
        let read = Manifest::read(&damaged).unwrap();
        assert_eq!(read.made.len(), made.len(), "{what}");
        assert!(made.iter().all(|one| read.made.contains(one)), "{what}");
        assert_eq!(read.damage.is_some(), name == "manifest.json", "{what}");
        if trial % 20 == 0 {
            let verified = scene.pipeline(&["verify", "damaged"]);
            assert_eq!(
                verified.code,
                Some(i32::from(!is_older)),
                "{what}: {}",
                verified.out
            );
            scene.succeeds(&["status", "damaged"]);
            let said = scene.succeeds(&["run", "p.yaml", "--run", "damaged"]);
            assert!(said.err.contains("nothing to do"), "{what}: {}", said.err);
            assert!(before == scene.tables("damaged"), "{what}");
            scene.succeeds(&["verify", "damaged"]);
        }
    }
    println!(
        "{TRIALS} flips and cuts of a manifest or its log, none of them lost a row, seed {SEED}"
    );
}

#[test]
fn a_damaged_line_of_the_log_ends_what_is_known() {
    let scene = Scene::new();
    let gate = "  gate:\n    exec: { command: [\"false\"], table: pairs, columns: { prompt_id: text } }\nevaluate:\n";
    scene
        .prompts(6)
        .write("p.yaml", SCRIPTED.replace("evaluate:\n", gate));
    assert_eq!(scene.pipeline(&["run", "p.yaml"]).code, Some(1));
    let run = scene.path("runs/scripted");
    let complete = || {
        let mut made = Manifest::read(&run).unwrap().made;
        made.retain(|made| made.complete);
        made
    };
    let before = complete();
    let log = manifest_files(&run).into_iter();
    let log = log.filter(|path| path.extension() == Some("log".as_ref()));
    // The latest log has the largest number.
    let log = log.max_by_key(|path| (path.as_os_str().len(), path.clone()));
    let log = log.expect("the gate was begun");
    flip(&log, 100);
    assert_eq!(scene.pipeline(&["verify", "scripted"]).code, Some(1));
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert!(said.err.contains("line 1 is corrupt"), "{}", said.err);
    assert!(
        said.err.contains("pairs (round 1): 6 rows, up to date"),
        "{}",
        said.err
    );
    assert_eq!(before, complete());
    scene.succeeds(&["verify", "scripted"]);
}

#[test]
fn a_run_without_any_manifest_is_rebuilt_from_the_records_of_its_tables() {
    let scene = finished();
    let before = scene.tables("runs/scripted");
    let run = scene.path("runs/scripted");
    for file in manifest_files(&run) {
        fs::write(&file, "{").unwrap();
    }
    // A table that cannot be verified is rebuilt.
    flip(&file_of_record(&run, "pairs"), 300);
    let status = scene.succeeds(&["status", "scripted"]);
    assert!(
        status.err.contains("restored from the records"),
        "{}",
        status.err
    );
    let said = scene.succeeds(&["repair", "scripted"]);
    assert!(
        said.err.contains("restored from the records"),
        "{}",
        said.err
    );
    let said = scene.succeeds(&["run", "p.yaml"]);
    assert!(
        said.err.contains("rewards (round 1): 30 rows, up to date"),
        "{}",
        said.err
    );
    assert!(before == scene.tables("runs/scripted"));
    scene.succeeds(&["verify", "scripted"]);
}

/// Returns a file of a table in round 1 without using the manifest.
fn file_of_record(run: &Path, table: &str) -> PathBuf {
    let folder = run.join(table).join("round-1");
    let entry = fs::read_dir(folder).unwrap().next().unwrap();
    entry.unwrap().path()
}

#[test]
fn a_query_never_computes_with_a_flipped_bit() {
    let scene = finished();
    let file = file_of(&scene.path("runs/scripted"), "rewards");
    let query =
        "select sum(reward) as s, count(*) as n, min(prompt_id) as p, max(judge) as j from rewards";
    let sql = ["sql", "scripted", query, "--format", "csv"];
    let truth = scene.succeeds(&sql).out;
    let bytes = fs::read(&file).unwrap();
    let mut numbers = Numbers(SEED);
    for _ in 0..FLIPS {
        let bit = numbers.below(bytes.len() * 8);
        flip(&file, bit);
        let said = scene.pipeline(&sql);
        assert_eq!(said.code, Some(1), "bit {bit}: {}", said.out);
        assert!(
            said.err.contains("checksum mismatch"),
            "bit {bit}: {}",
            said.err
        );
        assert_eq!(said.out, "");
        overwrite(&file, &bytes);
    }
    assert_eq!(scene.succeeds(&sql).out, truth);
    println!("{FLIPS} flips under a query, none of them in an answer, seed {SEED}");
}

#[test]
fn files_that_are_corrupt_do_not_leave_the_run() {
    let scene = finished();
    let run = scene.path("runs/scripted");
    let weights = scene.checkpoints("runs/scripted").into_keys();
    let weights = weights.filter(|path| path.to_string_lossy().contains("round-2"));
    let weights = weights
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let bytes = fs::read(&weights).unwrap();
    flip(&weights, 17);
    let verified = scene.pipeline(&["verify", "scripted"]);
    assert_eq!(verified.code, Some(1));
    let name = weights.strip_prefix(&run).unwrap().display().to_string();
    assert_eq!(
        verified.out,
        format!("{name}: checksum mismatch: the file changed after it was written\n")
    );
    let said = scene.pipeline(&["export", "scripted", "checkpoint", "--to", "out"]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert!(said.err.contains(&name), "{}", said.err);
    assert!(!scene.path("out").exists());
    overwrite(&weights, &bytes);
    scene.succeeds(&["export", "scripted", "checkpoint", "--to", "out"]);

    flip(&file_of(&run, "candidates"), 400);
    let said = scene.pipeline(&["fork", "scripted", "--at", "2"]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert!(said.err.contains("checksum mismatch"), "{}", said.err);
    assert!(!scene.path("runs/scripted-fork-2").exists());
}

#[test]
fn a_finished_run_notices_what_has_changed_and_a_copy_is_not_made_again() {
    let scene = finished();
    let before = scene.tables("runs/scripted");
    let file = file_of(&scene.path("runs/scripted"), "pairs");
    let mut bytes = fs::read(&file).unwrap();
    bytes[200] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let said = scene.succeeds(&["run", "p.yaml"]);
    assert!(said.err.contains("checksum mismatch"), "{}", said.err);
    assert!(before == scene.tables("runs/scripted"));

    copy_folder(&scene.path("runs/scripted"), &scene.path("copy")).unwrap();
    let said = scene.succeeds(&["run", "p.yaml", "--run", "copy"]);
    assert!(said.err.contains("nothing to do"), "{}", said.err);
}

/// A corrupt fingerprint cache only costs time.
#[test]
fn a_damaged_memory_of_fingerprints_costs_a_look_and_nothing_else() {
    let scene = finished();
    let path = scene.path("runs/scripted/.cache/fingerprints.json");
    let text = fs::read_to_string(&path).unwrap();
    let at = text.rfind("\"sha256\": \"").unwrap() + 11;
    let mut other = text.into_bytes();
    other[at] = if other[at] == b'0' { b'1' } else { b'0' };
    fs::write(&path, other).unwrap();
    let said = scene.succeeds(&["run", "p.yaml"]);
    assert!(said.err.contains("nothing to do"), "{}", said.err);
}

/// `run` does not read a file whose size, time and inode are unchanged; the other commands report
/// it with a fix that works.
#[test]
fn what_is_advised_about_a_flipped_bit_helps() {
    let scene = finished();
    scene.succeeds(&["run", "p.yaml"]);
    let run = scene.path("runs/scripted");
    let before = scene.tables("runs/scripted");
    let file = file_of(&run, "steps");
    let end = fs::metadata(&file).unwrap().len() as usize * 8 - 200;
    flip(&file, end);
    // A query that does not read the file succeeds.
    let count = ["sql", "scripted", "select count(*) as n from prompts"];
    assert_eq!(scene.pipeline(&count).code, Some(0));
    let said = scene.pipeline(&["sql", "scripted", "select * from steps"]);
    assert_eq!(said.code, Some(1));
    assert!(said.err.contains("pipeline repair"), "{}", said.err);
    scene.succeeds(&["repair", "scripted"]);
    scene.succeeds(&["run", "p.yaml"]);
    scene.succeeds(&["verify", "scripted"]);
    assert_eq!(scene.tables("runs/scripted"), before);
}

#[test]
fn a_damaged_record_is_named_and_written_again() {
    let scene = finished();
    let records = fs::read_dir(scene.path("runs/scripted/.cache/records")).unwrap();
    let record = records.map(|entry| entry.unwrap().path()).min().unwrap();
    flip(&record, 4000);
    let said = scene.pipeline(&["verify", "scripted"]);
    assert_eq!(said.code, Some(1));
    assert!(said.out.contains(".cache/records/"), "{}", said.out);
    scene.succeeds(&["repair", "scripted"]);
    scene.succeeds(&["verify", "scripted"]);
}

#[test]
fn verify_tells_of_a_manifest_that_is_something_else() {
    let scene = finished();
    let run = scene.path("runs/scripted");
    let record = fs::read(file_of_record(&run, "rewards")).unwrap();
    fs::write(run.join("manifest.json"), record).unwrap();
    fs::remove_file(run.join("manifest.previous.json")).ok();
    let verified = scene.pipeline(&["verify", "scripted"]);
    assert_eq!(verified.code, Some(1), "{}", verified.err);
    assert!(verified.out.contains("manifest.json"), "{}", verified.out);
    scene.succeeds(&["repair", "scripted"]);
    scene.succeeds(&["verify", "scripted"]);
}
