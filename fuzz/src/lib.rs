//! The modules of ovchat that read strangers' files, taken from its sources without those that need
//! DataFusion or libtorch, and the targets that are fuzzed.
#![expect(
    dead_code,
    unused_imports,
    reason = "the modules are for the whole program"
)]

#[path = "../../src/files.rs"]
pub mod files;
#[path = "../../src/models/mod.rs"]
pub mod models;
#[path = "../../src/prep/mod.rs"]
pub mod prep;
#[path = "../../src/tables/mod.rs"]
pub mod tables;

pub mod config {
    #[path = "../../../src/config/node.rs"]
    pub mod node;
    #[path = "../../../src/config/source.rs"]
    pub mod source;
}

pub mod stages {
    #[path = "../../../src/stages/media.rs"]
    mod media;
    #[path = "../../../src/stages/records.rs"]
    pub mod records;
    #[path = "../../../src/stages/unread.rs"]
    mod unread;
}

/// The functions that the targets call; a test of ovchat has its own.
mod tested {
    use crate::config::node::{Flaw, Node};
    use crate::config::source::{Side, Source};
    pub use crate::{models, prep};

    /// A pipeline file as a tree, and the places of what is wrong in it.
    pub fn yaml(text: &str) {
        let Ok((_, flaws)) = Node::parse(text) else {
            return;
        };
        let source = Source::new("p.yaml".to_owned(), text);
        for flaw in flaws.iter().take(4) {
            let (Flaw::Duplicate(path) | Flaw::Tag(path) | Flaw::Key(path)) = flaw;
            for side in [Side::Key, Side::Value] {
                source.slice(source.find(path, side));
            }
        }
    }

    /// A record of a file of prompts, of JSON lines.
    pub fn record(text: &str) {
        let record = serde_json::from_str(text).map_err(|error| error.to_string());
        for embedded in [0, 1] {
            let _ = crate::stages::records::read_fields(&record, embedded);
        }
    }
}

pub mod targets;
