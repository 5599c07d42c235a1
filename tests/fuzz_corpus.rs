//! What the fuzz targets found or began with: each must be read or refused again, within seconds.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::scene::ROOT;

#[path = "../fuzz/src/targets.rs"]
mod targets;

/// What the targets call; see `fuzz/src/lib.rs`.
mod tested {
    use ovchat::stages::{StageSpec, Work};
    pub use ovchat::{models, prep};

    /// A pipeline file, in all that follows from it without its files.
    pub fn yaml(text: &str) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.yaml");
        std::fs::write(&path, text).unwrap();
        if let Err(ovchat::config::LoadError::Refused(complaints)) =
            ovchat::config::load(&path, &[], true)
        {
            complaints.render(ovchat::config::Look::Ascii);
        }
    }

    /// A line of a file of prompts.
    pub fn record(text: &str) {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("prompts.json");
        std::fs::write(&from, text).unwrap();
        let stage = serde_json::json!({ "load_prompts": { "from": from } });
        let stage: StageSpec = serde_json::from_value(stage).unwrap();
        let Work::Load(mut load) = stage.as_stage().work() else {
            panic!("it loads");
        };
        if let Ok(records) = load.records() {
            let records: Vec<_> = records.filter_map(Result::ok).collect();
            load.load(records).unwrap();
        }
    }
}

#[test]
fn every_file_of_the_corpus_is_read_or_refused_soon() {
    let begun = Instant::now();
    let mut all = 0;
    for (name, target) in targets::TARGETS {
        let corpus = Path::new(ROOT).join("fuzz/corpus").join(name);
        let mut count = 0;
        for entry in fs::read_dir(&corpus).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            let started = Instant::now();
            target(&bytes);
            let took = started.elapsed();
            assert!(
                took < Duration::from_secs(5),
                "{}: {took:?}",
                path.display()
            );
            count += 1;
        }
        assert!(count > 3, "{name}");
        all += count;
    }
    assert!(begun.elapsed() < Duration::from_secs(20));
    println!("{all} files of the corpus");
}
