//! Replay of the fuzz corpus: each file is read or rejected within seconds.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::scene::ROOT;

#[path = "../fuzz/src/targets.rs"]
mod targets;

/// The functions that the targets call; see `fuzz/src/lib.rs`.
mod tested {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;
    use std::path::Path;
    use std::time::Duration;

    use ovchat_data::store::{Manifest, Media};
    pub use ovchat_models as models;
    pub use ovchat_pipeline::stages::endings;
    use ovchat_pipeline::stages::{StageKind, StageSpec};

    use crate::people::{Page, scene};
    use crate::scene::Scene;

    /// Reads a pipeline file and everything that depends on it, without its files.
    pub fn yaml(text: &str) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.yaml");
        std::fs::write(&path, text).unwrap();
        if let Err(ovchat_pipeline::config::LoadError::Refused(diagnostics)) =
            ovchat_pipeline::config::load(&path, &[], true)
        {
            diagnostics.render(ovchat_pipeline::config::RenderStyle::Ascii);
        }
    }

    /// Reads a file of prompts.
    pub fn records(path: &Path) {
        let stage = serde_json::json!({ "load_prompts": { "from": path, "limit": 4096 } });
        let stage: StageSpec = serde_json::from_value(stage).unwrap();
        let StageKind::Load(mut load) = stage.as_stage().work() else {
            panic!("it loads");
        };
        if let Ok(records) = load.records() {
            let records: Vec<_> = records.map_while(Result::ok).collect();
            load.validate(&records);
            let run = path.parent().unwrap();
            let mut known = Media::open(run, &Manifest::new(run, "fuzz")).unwrap();
            load.load(records, &mut known).unwrap();
            load.notes();
        }
    }

    thread_local! {
        /// A page that waits for labels, and the scene of its run.
        static PAGE: (Page, Scene) = {
            let scene = scene(4);
            assert_eq!(scene.pipeline(&["run", "p.yaml"]).code, Some(3));
            (Page::open(&scene), scene)
        };
    }

    /// Sends requests to the page, each on its own connection; the page must still answer the next
    /// one.
    pub fn label(requests: &[[&[u8]; 3]]) {
        PAGE.with(|(page, _)| {
            for [method, address, body] in requests {
                let host = page.address.trim_start_matches("http://");
                let (key, length) = (&page.key, body.len());
                let fields = format!(
                    " HTTP/1.1\r\nHost: {host}\r\nX-Key: {key}\r\nContent-Length: {length}\r\n\r\n"
                );
                let request = [*method, b" ", *address, fields.as_bytes(), *body].concat();
                let mut stream = TcpStream::connect(host).unwrap();
                let soon = Some(Duration::from_secs(2));
                stream.set_read_timeout(soon).unwrap();
                // The page may close an invalid request early.
                drop(stream.write_all(&request));
                drop(stream.read_to_end(&mut Vec::new()));
            }
            assert!(page.next("ann")["progress"].is_object());
        });
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
