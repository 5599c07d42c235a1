//! User programs as `exec` stages.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use arrow_ipc::writer::StreamWriter;

use crate::run::SCRIPTED;
use crate::scene::{CommandOutput, Scene};

/// The example program, built with this test.
pub fn flag_answers() -> String {
    let test = std::env::current_exe().unwrap();
    let built = test.parent().unwrap().parent().unwrap();
    let program = built.join("examples/flag_answers");
    assert!(
        program.is_file(),
        "not built; `cargo test` does, or `cargo build --examples`"
    );
    program.display().to_string()
}

pub fn pipeline(command: &str, columns: &str) -> String {
    let stage = format!(
        "  flags: {{ exec: {{ command: {command}, table: candidates, columns: {{ {columns} }} }} }}\nevaluate:"
    );
    SCRIPTED.replace("evaluate:", &stage)
}

/// libtorch's settings are for the engine only; a user program may use its own libtorch.
#[test]
fn a_command_does_not_inherit_what_was_set_for_libtorch() {
    let scene = Scene::new();
    let command = "[sh, -c, 'echo alloc=$PYTORCH_ALLOC_CONF. cudnn=$TORCH_CUDNN_SDPA_DEPRIORITIZED. >&2; exit 3']";
    scene.prompts(2).write("p.yaml", pipeline(command, COLUMNS));
    let mut run = scene.command(&["run", "p.yaml"]);
    run.env("OVCHAT_LIBTORCH_SETTINGS", "PYTORCH_ALLOC_CONF")
        .env("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        .env("TORCH_CUDNN_SDPA_DEPRIORITIZED", "0");
    let said = crate::scene::said(run.output().unwrap());
    assert!(said.err.contains("alloc=. cudnn=0."), "{}", said.err);
}

pub const COLUMNS: &str = "prompt_id: text, candidate: int32, refuses: bool";

pub fn fails(command: &str, columns: &str) -> CommandOutput {
    let scene = Scene::new();
    scene.prompts(5).write("p.yaml", pipeline(command, columns));
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    said
}

#[test]
fn a_command_makes_a_table_that_others_read() {
    let scene = Scene::new();
    let command = format!("[{}]", flag_answers());
    scene
        .prompts(30)
        .write("p.yaml", pipeline(&command, COLUMNS));
    scene.succeeds(&["run", "p.yaml"]);
    let query = "select round, count(*) as n, count(*) filter (where refuses) as refusals from flags group by round order by round";
    let found = scene
        .succeeds(&["sql", "scripted", query, "--format", "csv"])
        .out;
    assert_eq!(found, "round,n,refusals\n1,150,0\n2,150,0\n");
    assert!(
        scene
            .succeeds(&["run", "p.yaml"])
            .err
            .contains("nothing to do")
    );

    // The key depends on the arguments of the command and on the listed files.
    let named = command.replace(']', ", --strict]");
    scene.write("p.yaml", pipeline(&named, COLUMNS));
    let plan = scene.succeeds(&["plan", "p.yaml"]).out;
    assert!(plan.contains("`command` ["), "{plan}");
    let with_file = pipeline(&command, COLUMNS)
        .replace("table: candidates", "files: [rules.txt], table: candidates");
    scene.write("rules.txt", "one").write("p.yaml", &with_file);
    scene.succeeds(&["run", "p.yaml"]);
    scene.write("rules.txt", "two");
    let plan = scene.succeeds(&["plan", "p.yaml"]).out;
    assert!(plan.contains("the content of `files` changed"), "{plan}");
}

#[test]
fn a_command_that_fails_is_told_with_its_last_words() {
    let said = fails(
        "[sh, -c, \"cat > /dev/null; echo first >&2; echo it broke >&2; exit 3\"]",
        COLUMNS,
    );
    assert!(said.err.contains("exited with code 3"), "{}", said.err);
    assert!(
        said.err.contains("it broke") && said.err.contains("flags:"),
        "{}",
        said.err
    );
    assert!(said.err.contains("failed here in round 1"), "{}", said.err);
    let said = fails("[sh, -c, \"cat > /dev/null; echo hello\"]", COLUMNS);
    assert!(
        said.err.contains("wrote an invalid Arrow IPC stream"),
        "{}",
        said.err
    );
    let said = fails("[sh, -c, \"kill -9 $$\"]", COLUMNS);
    assert!(said.err.contains("was killed by signal 9"), "{}", said.err);
}

/// A missing program is an error before anything runs; a program that cannot be started is an error
/// when it starts.
#[test]
fn a_program_that_cannot_be_started_is_named() {
    let scene = Scene::new();
    let run = |program: &str| {
        let command = format!("[{program}, flag.py]");
        scene
            .prompts(5)
            .write("p.yaml", pipeline(&command, COLUMNS));
        scene.pipeline(&["run", "p.yaml"])
    };
    let refused = |program: &str, problem: &str| {
        let said = run(program);
        assert_eq!(said.code, Some(2), "{program}: {}", said.err);
        assert!(said.err.contains("config::no_program"), "{}", said.err);
        assert!(said.err.contains(problem), "{program}: {}", said.err);
        assert!(!scene.path("runs").exists(), "nothing was run");
    };
    refused(
        "no-such-program",
        "program `no-such-program` was not found in PATH",
    );
    scene.write("flag", "#!/no/such/interpreter\n");
    refused("flag", "write `./flag`");
    refused("./flags", "program `flags` does not exist");
    refused("./flag", "`flag` is not executable");
    let flag = scene.path("flag");
    fs::set_permissions(&flag, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    refused("./flag", "program `/no/such/interpreter`");
    // A missing interpreter of the interpreter script is only found on start.
    let other = scene.path("other");
    scene.write("other", "#!/no/such/interpreter\n");
    fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    scene.write("flag", format!("#!{}\n", other.display()));
    let said = run("./flag");
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert!(said.err.contains("cannot start `./flag`"), "{}", said.err);
}

/// A program that stops early with exit code 0 omits rows.
#[test]
fn a_stream_that_is_cut_off_is_no_table() {
    let flag = flag_answers();
    let shell = |script: &str| format!("[sh, -c, \"{script}\"]");
    for (script, words) in [
        // The end-of-stream marker is the last eight bytes.
        (
            format!("{flag} | head -c -8"),
            "without an end-of-stream marker",
        ),
        (format!("{flag} | head -c -40"), "ends inside a batch"),
        ("cat > /dev/null".to_owned(), "wrote nothing"),
        (format!("{flag}; echo done"), "as one stream"),
        (format!("tee copy | {flag}; {flag} < copy"), "as one stream"),
    ] {
        let said = fails(&shell(&script), COLUMNS);
        let told = said.err.replace("\n  │ ", " ").replace("\n  | ", " ");
        assert!(told.contains(words), "{script}: {told}");
    }
    // An exit code is more informative than the truncated stream.
    let said = fails(&shell(&format!("({flag} | head -c -8); exit 4")), COLUMNS);
    let told = said.err.replace("\n  │ ", " ").replace("\n  | ", " ");
    assert!(told.contains("exited with code 4"), "{told}");
    // Arrow before 0.15 ends a stream with four zero bytes.
    let scene = Scene::new();
    let script = format!("{flag} | head -c -8; head -c 4 /dev/zero");
    scene
        .prompts(5)
        .write("p.yaml", pipeline(&shell(&script), COLUMNS))
        .succeeds(&["run", "p.yaml"]);
}

#[test]
fn columns_that_are_not_as_declared_are_named() {
    let command = format!("[{}]", flag_answers());
    let said = fails(
        &command,
        "prompt_id: text, candidate: int32, refuses: int64",
    );
    assert!(
        said.err.contains("wrote `refuses` as Boolean, but"),
        "{}",
        said.err
    );
    let said = fails(&command, "prompt_id: text, candidate: int32");
    assert!(said.err.contains("wrote column `refuses`,"), "{}", said.err);
    let said = fails(&command, &format!("{COLUMNS}, score: float32"));
    assert!(said.err.contains("wrote no column `score`"), "{}", said.err);
}

/// A command that never ends is killed with its run, however the run ends.
#[test]
fn a_command_ends_with_its_run() {
    for signal in ["-TERM", "-KILL"] {
        let scene = Scene::new();
        let script = "[sh, -c, \"echo $$ > pid.new; mv pid.new pid; exec sleep 600\"]";
        scene.prompts(5).write("p.yaml", pipeline(script, COLUMNS));
        let mut run: Child = scene
            .command(&["run", "p.yaml"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = wait_for(|| fs::read_to_string(scene.path("pid")).ok());
        let killed = Command::new("kill")
            .args([signal, &run.id().to_string()])
            .status();
        assert!(killed.unwrap().success());
        let code = run.wait().unwrap().code();
        assert_eq!(code, if signal == "-TERM" { Some(143) } else { None });
        ends(&pid);
    }
}

/// Child processes end too, if the run has time to stop them.
#[test]
fn what_a_command_has_started_ends_with_it() {
    let scene = Scene::new();
    let script = "[sh, -c, \"sleep 600 & echo $! > pid.new; mv pid.new pid; wait\"]";
    scene.prompts(5).write("p.yaml", pipeline(script, COLUMNS));
    let mut run: Child = scene
        .command(&["run", "p.yaml"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = wait_for(|| fs::read_to_string(scene.path("pid")).ok());
    let asked = Command::new("kill").arg(run.id().to_string()).status();
    assert!(asked.unwrap().success());
    assert_eq!(run.wait().unwrap().code(), Some(143));
    ends(&pid);
}

/// Waits for the end of a process.
fn ends(pid: &str) {
    let process = PathBuf::from("/proc").join(pid.trim());
    // An ended process can remain as a zombie until its parent reaps it.
    wait_for(|| {
        let state = fs::read_to_string(process.join("stat")).unwrap_or_default();
        (state.is_empty() || state.contains(") Z ")).then_some(())
    });
}

fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < Duration::from_mins(1), "it never came");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_column_that_is_written_twice_is_refused() {
    let scene = Scene::new();
    let ids: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
    let field = || Field::new("prompt_id", DataType::Utf8, false);
    let schema = Arc::new(Schema::new(vec![field(), field()]));
    let rows = RecordBatch::try_new(schema.clone(), vec![ids.clone(), ids]).unwrap();
    let mut writer = StreamWriter::try_new(Vec::new(), &schema).unwrap();
    writer.write(&rows).unwrap();
    writer.finish().unwrap();
    scene.write("out.arrow", writer.into_inner().unwrap());
    let command = "[sh, -c, 'cat > /dev/null; cat out.arrow']";
    scene
        .prompts(2)
        .write("p.yaml", pipeline(command, "prompt_id: text"));
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert!(
        said.err.contains("wrote column `prompt_id` twice"),
        "{}",
        said.err
    );
}
