//! The modules of ovchat that read strangers' files, taken from its sources without those that need
//! DataFusion or libtorch, and the targets that are fuzzed.

// The modules that are taken name their crate.
extern crate self as ovchat_pipeline;

/// The modules that are taken of crates which need DataFusion.
#[path = "../../src"]
mod ovchat {
    pub mod cli {
        /// The failure of `src/cli/failed.rs`, without pipelines and queries.
        pub mod failed {
            pub enum Failed {
                Words(String),
            }

            impl From<ovchat_data::store::StoreError> for Failed {
                fn from(error: ovchat_data::store::StoreError) -> Self {
                    Self::Words(error.to_string())
                }
            }
        }

        pub mod label {
            pub mod queue;
            pub mod request;
        }
    }

    #[path = "pipeline/config"]
    pub mod config {
        pub mod key_text;
        pub mod node;
        pub mod source;
    }

    #[path = "pipeline/stages"]
    pub mod stages {
        mod fields;
        pub mod formats;
        mod media;
        pub mod names;
        pub mod records;
        mod shown;
        pub mod unread;

        pub use shown::Shown;

        /// The records and failures of `src/pipeline/stages/work.rs`, without queries, models and trainings.
        pub mod work {
            use std::path::PathBuf;

            use ovchat_data::store::StoreError;
            use ovchat_data::tables::ImageFile;

            pub enum Failure {
                Store(StoreError),
                Input {
                    path: PathBuf,
                    place: String,
                    problem: String,
                },
            }

            impl From<StoreError> for Failure {
                fn from(error: StoreError) -> Self {
                    Self::Store(error)
                }
            }

            pub struct Record {
                pub place: String,
                pub fields: Result<serde_json::Value, String>,
                pub embedded: Vec<ImageFile>,
                pub kept: Vec<(String, String)>,
            }
        }
    }
}

pub use ovchat::{cli, config, stages};

/// The functions that the targets call; a test of ovchat has its own.
mod tested {
    use std::path::Path;

    use crate::cli::label::queue::{LabelQueue, Questions, sided};
    use crate::cli::label::request::{self, Request};
    use crate::config::node::{Flaw, Node};
    use crate::config::source::{Side, SourceText};
    use crate::stages::formats;
    pub use crate::stages::formats::endings;
    use crate::stages::records::{named_paths, read_fields};
    use crate::stages::unread::{Unread, own_name};
    use ovchat_data::store::{LabelFiles, LabelTask};
    use ovchat_data::tables::Prompt;
    pub use ovchat_models as models;

    /// The records that are read of a file.
    const RECORDS_MAX: usize = 4096;

    /// A pipeline file as a tree, and the places of what is wrong in it.
    pub fn yaml(text: &str) {
        let Ok((_, flaws)) = Node::parse(text) else {
            return;
        };
        let source = SourceText::new("p.yaml".to_owned(), text);
        for flaw in flaws.iter().take(4) {
            let (Flaw::Duplicate(path) | Flaw::Tag(path) | Flaw::Key(path)) = flaw;
            for side in [Side::Key, Side::Value] {
                source.slice(source.find(path, side));
            }
        }
    }

    /// A file of prompts: its records as far as they are read without opening a picture.
    pub fn records(path: &Path) {
        let Ok(records) = formats::records(path, &Default::default()) else {
            return;
        };
        let mut unread = Unread::default();
        for record in records.take(RECORDS_MAX) {
            let Ok(record) = record else {
                break;
            };
            let _ = read_fields(&record.fields, record.embedded.len());
            named_paths(&record.fields);
            if let Ok(fields) = &record.fields {
                own_name(fields);
                unread.count(fields);
            }
        }
        unread.in_words();
    }

    /// Requests to the page, of a survey of two questions. What was said is read again at the end.
    pub fn label(requests: &[[&[u8]; 3]]) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let files = LabelFiles::new(folder.path(), "pairs", Some(1));
        let (mut queue, task) = self::queue(&files);
        for [method, address, body] in requests {
            let words = [method, address].map(|word| std::str::from_utf8(word));
            let [Ok(method), Ok(address)] = words else {
                continue;
            };
            let (path, query) = address.split_once('?').unwrap_or((address, ""));
            let by = match request::read(method, path, query, body) {
                Ok(Request::Next(by)) => by,
                Ok(Request::Say(saying)) => {
                    let _ = queue.say(&saying);
                    saying.by
                }
                Ok(Request::Undo { by, label }) => {
                    assert!(queue.undo(&by, label).is_ok());
                    by
                }
                Ok(Request::Image(id)) => {
                    queue.shows(id);
                    continue;
                }
                Ok(Request::Page) | Err(_) => continue,
            };
            queue.next(&by);
        }
        let said = queue.said();
        drop(queue);
        let (queue, _) = self::queue(&files);
        assert_eq!((queue.said(), queue.wanted()), (said, task.wanted));
        assert_eq!(queue.note(), None);
    }

    /// The desk of a survey of two questions about one prompt.
    fn queue(files: &LabelFiles) -> (LabelQueue, LabelTask) {
        let task = LabelTask {
            table: "pairs".to_owned(),
            round: Some(1),
            candidates: "candidates".to_owned(),
            candidates_round: Some(1),
            prompts: "prompts".to_owned(),
            prompts_round: None,
            rewards: Vec::new(),
            wanted: 2,
        };
        let prompt = Prompt {
            row_key: "k".to_owned(),
            prompt_id: "p".to_owned(),
            id: None,
            image: None,
            image_ids: vec!["picture".to_owned()],
            videos: None,
            system: None,
            turns: Vec::new(),
            question: "Why?".to_owned(),
            captions: None,
            answer: None,
        };
        let text = |candidate: i32| {
            let text = candidate.to_string();
            (("p".to_owned(), candidate), (text.clone(), text))
        };
        let questions = Questions {
            list: [1, 2].map(|other| sided("p".to_owned(), 0, other)).into(),
            prompts: [("p".to_owned(), prompt)].into(),
            texts: [0, 1, 2].map(text).into(),
        };
        let Ok(writer) = files.write() else {
            panic!("the labels can't be written");
        };
        (LabelQueue::new(writer, task.clone(), questions), task)
    }
}

pub mod targets;
