//! The cookbook: an analyst's queries, and the results of `pipeline sql`.
//!
//! Each `tests/query/*.sql` has a question as a comment, the query, a line `----`, and the exact
//! output. `UPDATE=1 cargo test --release` rewrites the outputs. All queries run on one run of the
//! scripted pipeline, with settings by which some answers are truncated, some pairs are dropped,
//! and the evaluation answers differ from round to round.

use std::fs::{self, File};
use std::path::Path;

use crate::run::SCRIPTED;
use crate::scene::{ROOT, Scene, said};

const SETTINGS: [&str; 3] = [
    "stages.candidates.sample.max_new_tokens=6",
    "stages.pairs.select_extremes.margin_min=0.6",
    "evaluate.answers.sample.temperature=0.7",
];

/// The line between a query and its output.
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

/// A run for queries that need no table.
fn some_run() -> Scene {
    let scene = Scene::new();
    scene
        .prompts(4)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml", "--set", "rounds=1"]);
    scene
}

/// Null and '', a number that JSON cannot represent, nested values, bytes.
const TROUBLE: &str = "select * from (values
    (1, '', 1.5, [1, null], x'6869'),
    (2, null, cast('NaN' as double), null, null),
    (3, 'a,\"b\"', cast('-inf' as double), [], x'')) as t(n, text, x, ids, bytes) order by n";

#[test]
fn each_format_writes_these_bytes() {
    let scene = some_run();
    let ask = |more: &[&str]| {
        let arguments = [&["sql", "scripted", TROUBLE], more].concat();
        let output = scene.command(&arguments).output().unwrap();
        (output.status.code(), output.stdout, output.stderr)
    };
    let text = |more: &[&str]| {
        let (code, out, err) = ask(more);
        assert_eq!(code, Some(0), "{}", String::from_utf8_lossy(&err));
        String::from_utf8(out).unwrap()
    };
    assert_eq!(
        text(&["--format", "csv"]),
        "n,text,x,ids,bytes\n1,\"\",1.5,\"[1,null]\",aGk=\n2,,NaN,,\n3,\"a,\"\"b\"\"\",-inf,[],\"\"\n"
    );
    let rows = [
        r#"{"n":1,"text":"","x":1.5,"ids":[1,null],"bytes":"aGk="}"#,
        r#"{"n":2,"text":null,"x":"NaN","ids":null,"bytes":null}"#,
        r#"{"n":3,"text":"a,\"b\"","x":"-inf","ids":[],"bytes":""}"#,
    ];
    assert_eq!(
        text(&["--format", "jsonl", "--nan", "text"]),
        format!("{}\n", rows.join("\n"))
    );
    assert_eq!(
        text(&["--format", "json", "--nan", "text"]),
        format!("[{}]\n", rows.join(","))
    );
    assert_eq!(
        text(&["--format", "markdown"]),
        "| n | text | x | ids | bytes |\n| ---: | --- | ---: | --- | --- |\n\
         | 1 |  | 1.5 | [1, ] | 2 bytes |\n| 2 |  | NaN |  |  |\n\
         | 3 | a,\"b\" | -inf | [] | 0 bytes |\n"
    );
    for (format, mark) in [("parquet", "PAR1"), ("arrow", "ARROW1")] {
        let (code, out, _) = ask(&["--format", format]);
        let is_whole = out.starts_with(mark.as_bytes()) && out.ends_with(mark.as_bytes());
        assert!(code == Some(0) && is_whole, "{format}: {out:?}");
    }

    // A value that a format cannot represent is an error, never dropped silently.
    let (code, out, err) = ask(&["--format", "json"]);
    assert_eq!((code, out), (Some(1), Vec::new()));
    assert_eq!(
        String::from_utf8(err).unwrap(),
        "error: column `x` (row 2) has NaN or an infinity, which JSON cannot represent: write it as text with \
         `--nan text`, use `--format csv`, `parquet` or `arrow`, or exclude such rows in the query\n"
    );
    let twice = "select a.round, b.round from rewards a join pairs b using (prompt_id)";
    let twice = scene.pipeline(&["sql", "scripted", twice, "--format", "json"]);
    assert_eq!((twice.code, &*twice.out), (Some(1), ""));
    assert_eq!(
        twice.err,
        "error: 2 columns are named `round`; give each an alias: \
         select a.round as a_round, b.round as b_round\n"
    );
    let none = "select prompt_id, reward from rewards where false";
    let none = |format: &str| {
        scene
            .succeeds(&["sql", "scripted", none, "--format", format])
            .out
    };
    assert_eq!(none("csv"), "prompt_id,reward\n");
    assert_eq!((&*none("json"), &*none("jsonl")), ("[]\n", ""));
}

#[test]
fn a_query_that_fails_leaves_nothing_and_speaks_of_its_format() {
    let scene = some_run();
    let ask = |query: &str, format: &str| {
        let said = scene.pipeline(&["sql", "scripted", query, "--format", format]);
        assert_eq!((said.code, &*said.out), (Some(1), ""), "{}", said.err);
        said.err
    };
    for format in ["csv", "markdown"] {
        ask(
            "select 1 / (reward - reward)::bigint as x from rewards",
            format,
        );
    }
    assert_eq!(
        ask("select [1.0, 'nan'::double] as x", "csv"),
        "error: column `x` (row 1) has NaN or an infinity in a list or struct, which CSV stores as JSON, and JSON \
         cannot represent it: write it as text with `--nan text`, use `--format parquet` or `arrow`, or exclude \
         such rows in the query\n"
    );
    assert_eq!(
        ask("select interval '1 day' as i", "parquet"),
        "error: `i` is an interval, which Parquet cannot store: use cast(i as varchar) in the query, or use \
         `--format arrow`\n"
    );
    assert_eq!(
        ask("select named_struct('x', 1, 'x', 2) as s", "json"),
        "error: 2 fields of `s` are called `x`; give each a unique name: named_struct('x_1', …, 'x_2', …)\n"
    );
    let times = "select arrow_cast(1700000000, 'Timestamp(Second, None)') as t, arrow_cast('2024-05-01', 'Date64') as d";
    let output = scene
        .command(&["sql", "scripted", times, "--format", "parquet"])
        .output()
        .unwrap();
    scene.write("rows.parquet", output.stdout);
    let mut rows = ovchat_data::store::TableReader::new(vec![scene.path("rows.parquet")]);
    let rows = rows.next().unwrap().unwrap();
    let types: Vec<String> = rows
        .columns()
        .iter()
        .map(|column| column.data_type().to_string())
        .collect();
    assert_eq!(types, ["Timestamp(ms)", "Date32"]);
}

#[test]
fn a_clause_that_would_be_ignored_is_no_answer() {
    let scene = some_run();
    let query = "select count(*) from rewards tablesample (10 percent)";
    let said = scene.pipeline(&["sql", "scripted", query]);
    assert_eq!((said.code, &*said.out), (Some(1), ""));
    assert_eq!(
        said.err,
        "error: `tablesample` is not supported (DataFusion parses and ignores it): \
         `where md5(prompt_id) < '1a'` takes about a tenth of the rows, the same ones every time\n"
    );
}

/// A subquery without rows is null even if its column is never null.
#[test]
fn a_subquery_without_rows_is_null() {
    let scene = some_run();
    for (query, expected) in [
        (
            "select (select prompt_id from prompts where prompt_id = 'x') is null as a",
            "a\ntrue\n",
        ),
        (
            "select coalesce((select prompt_id from prompts where prompt_id = 'x'), 'none') as a",
            "a\nnone\n",
        ),
    ] {
        let said = scene.succeeds(&["sql", "scripted", query, "--format", "csv"]);
        assert_eq!(said.out, expected, "{query}");
    }
}
