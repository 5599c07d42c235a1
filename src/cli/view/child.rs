//! Other processes of this program that work for a client: ended with the client's patience, at the
//! time limit, and beyond a limit on memory, whatever they do.

use std::io::{Read, Write as _};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use super::asked::{Asked, Problem};
use ovchat_pipeline::stages::end_with_parent;

/// The interval between checks of the process.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The most bytes that are read of an output.
const OUTPUT_MAX: u64 = 64 << 20;

/// The result of a process.
pub struct Output {
    pub is_success: bool,
    pub out: Vec<u8>,
    pub errors: String,
}

/// Returns a command of this program.
pub fn command(arguments: &[&str]) -> Result<Command, Problem> {
    let program = std::env::current_exe().map_err(|error| failed(&error))?;
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(command)
}

/// Runs a process with an input. Kills it when the request ends or its resident memory exceeds
/// `memory_max` bytes.
pub fn run(
    mut command: Command,
    input: &[u8],
    asked: &Asked,
    memory_max: Option<u64>,
) -> Result<Output, Problem> {
    end_with_parent(&mut command);
    let streams = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = Running(streams.spawn().map_err(|error| failed(&error))?);
    if let Some(mut stdin) = child.0.stdin.take() {
        // A process that does not read its input has another problem.
        drop(stdin.write_all(input));
    }
    let out = reader(child.0.stdout.take());
    let errors = reader(child.0.stderr.take());
    let status = loop {
        if let Some(status) = child.0.try_wait().map_err(|error| failed(&error))? {
            break status;
        }
        asked.go_on()?;
        if memory_max.is_some_and(|most| resident(&child.0) > most) {
            return Err(Problem::Refused(
                "the query exceeds its memory limit: read fewer rows or columns, or use `pipeline sql`, which has more"
                    .to_owned(),
            ));
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let [out, errors] = [out, errors].map(|bytes| bytes.join().unwrap_or_default());
    Ok(Output {
        is_success: status.success(),
        out,
        errors: String::from_utf8_lossy(&errors).into_owned(),
    })
}

/// A process that is killed when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn reader(stream: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(stream) = stream {
            drop(stream.take(OUTPUT_MAX).read_to_end(&mut bytes));
        }
        bytes
    })
}

/// Returns the resident memory of a process, in bytes; 0 once it has ended.
fn resident(child: &Child) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.unwrap_or(0) << 10
}

fn failed(error: &std::io::Error) -> Problem {
    Problem::Failed(format!("cannot start another process: {error}"))
}
