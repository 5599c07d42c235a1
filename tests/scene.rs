//! The test harness: a temporary folder, a pipeline in it, the programs, and the results of a run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use arrow_ipc::writer::StreamWriter;
use ovchat_data::store::{RunFolder, TableReader};
use ovchat_data::tables::is_measured;

/// The root folder of the project.
pub const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A temporary folder with pipelines and runs, deleted at the end of the test.
pub struct Scene {
    folder: tempfile::TempDir,
}

/// The output and the exit code of a program.
#[derive(Debug)]
pub struct CommandOutput {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Scene {
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file below the folder.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a file in a folder")).unwrap();
        fs::write(path, content).unwrap();
        self
    }

    /// Writes `prompts.json` with `count` questions without images.
    pub fn prompts(&self, count: usize) -> &Self {
        let record = |number| serde_json::json!({ "id": format!("q{number}"), "prompt": format!("Question {number}?") });
        let list: Vec<_> = (0..count).map(record).collect();
        self.write("prompts.json", serde_json::to_vec(&list).unwrap())
    }

    /// Returns a `pipeline` command in this folder.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipeline"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("NO_COLOR", "1");
        command
    }

    /// Runs `pipeline` in this folder.
    #[track_caller]
    pub fn pipeline(&self, arguments: &[&str]) -> CommandOutput {
        said(
            self.command(arguments)
                .output()
                .expect("the program starts"),
        )
    }

    /// Runs `pipeline`, which must succeed.
    #[track_caller]
    pub fn succeeds(&self, arguments: &[&str]) -> CommandOutput {
        let said = self.pipeline(arguments);
        assert_eq!(said.code, Some(0), "{}", said.err);
        said
    }

    /// Returns the rows of every table of a run as text, without measured columns.
    pub fn tables(&self, run: &str) -> BTreeMap<String, String> {
        let folder = RunFolder::read(&self.path(run)).expect("a run");
        let mut tables = BTreeMap::new();
        for made in &folder.manifest().made {
            let rows = TableReader::new(folder.files(&made.table, made.round));
            let batches: Vec<RecordBatch> = rows
                .map(|batch| without_measured(&batch.unwrap()))
                .collect();
            let text = arrow::util::pretty::pretty_format_batches(&batches)
                .unwrap()
                .to_string();
            assert!(made.complete, "{} is not complete", made.table);
            tables.insert(format!("{} {:?}", made.table, made.round), text);
        }
        tables
    }

    /// Returns every checkpoint file of a run, by name.
    pub fn checkpoints(&self, run: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let folder = self.path(run).join("checkpoints");
        if folder.exists() {
            collect(&folder, &mut files);
        }
        files
    }
}

/// Reproducible pseudorandom numbers: the generator of Knuth's MMIX.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

/// Returns the Arrow IPC stream of a table with a column `prompt_id`.
pub fn stream_of_ids(ids: &[&str]) -> Vec<u8> {
    let column: ArrayRef = Arc::new(StringArray::from(ids.to_vec()));
    let rows = RecordBatch::try_from_iter([("prompt_id", column)]).unwrap();
    let mut writer = StreamWriter::try_new(Vec::new(), &rows.schema()).unwrap();
    writer.write(&rows).unwrap();
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

/// A progress listener that ignores everything.
pub struct Quiet;

impl ovchat_pipeline::run::Report for Quiet {
    fn start(&mut self, _: ovchat_pipeline::run::Start<'_>) {}
    fn progress(&mut self, _: u64) {}
    fn finished(
        &mut self,
        _: &ovchat_pipeline::stages::TableName,
        _: Option<u32>,
        _: u64,
        _: u64,
        _: u64,
    ) {
    }
    fn reused(&mut self, _: &ovchat_pipeline::stages::TableName, _: Option<u32>, _: u64) {}
    fn note(&mut self, _: &str) {}
}

pub fn said(output: Output) -> CommandOutput {
    let text = |bytes| String::from_utf8(bytes).expect("text");
    CommandOutput {
        code: output.status.code(),
        out: text(output.stdout),
        err: text(output.stderr),
    }
}

/// The columns that earlier versions did not write.
const LATER: [&str; 6] = [
    "videos",
    "kept",
    "label",
    "first_score",
    "second_score",
    "failure",
];

fn without_measured(batch: &RecordBatch) -> RecordBatch {
    let schema = batch.schema();
    // Older tables lack columns that are null in all of their rows.
    let is_absent = |column: usize| {
        schema.field(column).is_nullable()
            && LATER.contains(&schema.field(column).name().as_str())
            && batch.column(column).null_count() == batch.num_rows()
    };
    let kept: Vec<usize> = (0..batch.num_columns())
        .filter(|&column| !is_measured(schema.field(column)) && !is_absent(column))
        .collect();
    batch.project(&kept).unwrap()
}

fn collect(folder: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
}
