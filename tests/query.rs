//! The cookbook: questions of analysts, and what `pipeline sql` answers.
//!
//! Each `tests/query/*.sql` is a question as a comment, the query, a line `----`, and the answer
//! exactly as it is printed. `UPDATE=1 cargo test` writes the answers anew. They are all asked of one
//! run of the scripted pipeline, with settings by which some answers are cut off, some pairs are
//! dropped, and the answers of the evaluation differ from round to round.

use std::fs::{self, File};
use std::path::Path;

use crate::run::SCRIPTED;
use crate::scene::{ROOT, Scene, said};

const SETTINGS: [&str; 3] = [
    "stages.candidates.sample.max_new_tokens=6",
    "stages.pairs.select_extremes.margin_min=0.6",
    "evaluate.answers.sample.temperature=0.7",
];

/// The line between a query and its answer.
const LINE: &str = "\n----\n";

fn answer(scene: &Scene, query: &str) -> String {
    scene.write("question.sql", query);
    let question = File::open(scene.path("question.sql")).unwrap();
    let mut command = scene.command(&["sql", "scripted"]);
    let said = said(command.stdin(question).output().unwrap());
    assert_eq!(said.code, Some(0), "{query}\n{}", said.err);
    said.out
}

#[test]
fn each_question_has_the_answer_below_it() {
    let scene = Scene::new();
    let mut arguments = vec!["run", "p.yaml"];
    arguments.extend(SETTINGS.iter().flat_map(|setting| ["--set", setting]));
    scene
        .prompts(40)
        .write("p.yaml", SCRIPTED)
        .succeeds(&arguments);
    let folder = fs::read_dir(Path::new(ROOT).join("tests/query")).unwrap();
    let mut questions = 0;
    let mut wrong = Vec::new();
    for entry in folder {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let query = text.split_once(LINE).map_or(&*text, |(query, _)| query);
        assert!(query.starts_with("-- "), "{path:?} asks no question");
        let query = query.trim_end();
        let expected = format!("{query}{LINE}{}", answer(&scene, query));
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&path, &expected).unwrap();
        } else if text != expected {
            wrong.push(format!("{}:\n{expected}", path.display()));
        }
        questions += 1;
    }
    assert!(questions >= 6, "only {questions} questions were found");
    let wrong = wrong.join("\n");
    assert!(wrong.is_empty(), "these have another answer now:\n{wrong}");
}
