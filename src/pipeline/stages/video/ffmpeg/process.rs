//! Running a decoder with limits on memory and time.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use super::super::super::programs::end_with_parent;
use super::super::fault::VideoFault;
use ovchat_io::files;
use ovchat_io::visible::visible;

/// The address space of a decoder, in KiB. It does not load with much less than 400 MB.
const MEMORY_KIB: u32 = 2_000_000;

/// Sets the limits in the child and starts the program: address space, processor time, and no writing
/// of files.
const LIMITED: &str = "ulimit -v \"$1\" && ulimit -S -t \"$2\" && ulimit -H -t \"$3\" && ulimit -f 0 && \
                       ulimit -c 0 || exit 125; shift 3; exec \"$@\"";

/// The exit code of the shell if it could not set the limits.
const NO_LIMITS: i32 = 125;

/// The interval at which interrupts are looked for.
const LOOK: Duration = Duration::from_millis(50);

/// The bytes of stderr that are kept, and those that a message shows.
const WORDS_MAX: usize = 1 << 21;
const SHOWN_MAX: usize = 300;

/// The time at which the work on a file must be done.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    until: Instant,
    /// The time that there was, in seconds.
    seconds: u64,
}

impl Deadline {
    pub fn after(seconds: u64) -> Self {
        Self {
            until: Instant::now() + Duration::from_secs(seconds),
            seconds,
        }
    }
}

/// A decoder to run.
pub struct Program<'a> {
    pub name: &'static str,
    pub path: &'a Path,
    pub arguments: &'a [OsString],
    pub until: Deadline,
}

/// The end of a program.
pub struct Ended {
    status: ExitStatus,
    /// The text of stderr.
    words: String,
}

/// A message of a reader of a program's output.
enum Output {
    /// Some bytes of stdout.
    Bytes(Vec<u8>),
    /// All of stderr.
    Words(String),
    /// The end of stdout.
    End,
}

impl Program<'_> {
    /// Runs the program and passes its output on in pieces of `piece` bytes; the last one may be
    /// shorter.
    pub fn run(
        &self,
        piece: usize,
        take: &mut dyn FnMut(Vec<u8>) -> Result<(), VideoFault>,
    ) -> Result<Ended, VideoFault> {
        let mut child = Killed(self.start()?);
        let (Some(stdout), Some(stderr)) = (child.0.stdout.take(), child.0.stderr.take()) else {
            unreachable!("both are piped")
        };
        // At most two pieces wait, so that a slow taker does not fill the memory.
        let (sender, receiver) = sync_channel(2);
        let words = sender.clone();
        thread::spawn(move || pass_on(stdout, piece, &sender));
        thread::spawn(move || words.send(Output::Words(kept(stderr))));
        let words = self.receive(&receiver, take)?;
        let status = child.0.wait().map_err(|error| self.broken(&error))?;
        Ok(Ended { status, words })
    }

    /// Takes the output until the program closed it; returns the text of stderr.
    fn receive(
        &self,
        receiver: &Receiver<Output>,
        take: &mut dyn FnMut(Vec<u8>) -> Result<(), VideoFault>,
    ) -> Result<String, VideoFault> {
        let mut words = None;
        let mut is_open = true;
        while is_open || words.is_none() {
            if files::stopped() {
                return Err(VideoFault::Stopped);
            }
            if Instant::now() >= self.until.until {
                return Err(self.too_slow());
            }
            match receiver.recv_timeout(LOOK) {
                Ok(Output::Bytes(bytes)) => take(bytes)?,
                Ok(Output::Words(text)) => words = Some(text),
                Ok(Output::End) => is_open = false,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Ok(words.unwrap_or_default())
    }

    fn start(&self) -> Result<Child, VideoFault> {
        let left = self.until.until.saturating_duration_since(Instant::now());
        let seconds = left.as_secs() + 1;
        let mut command = Command::new("/bin/sh");
        end_with_parent(&mut command);
        command
            .args(["-c", LIMITED, "sh"])
            .args([MEMORY_KIB.to_string(), seconds.to_string()])
            .arg((seconds + 5).to_string())
            .arg(self.path)
            .args(self.arguments)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C reaches this program only, which ends the decoder.
            .process_group(0)
            .spawn()
            .map_err(|error| self.broken(&error))
    }

    fn broken(&self, error: &io::Error) -> VideoFault {
        VideoFault::Program(format!("cannot run {}: {error}", self.path.display()))
    }

    fn too_slow(&self) -> VideoFault {
        VideoFault::File(format!(
            "{} did not finish within {} s; raise `timeout_s`, or cut the file",
            self.name, self.until.seconds
        ))
    }
}

/// A child that is killed when it is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Sends the bytes of a pipe in pieces until it is closed or nobody takes them.
fn pass_on(mut pipe: impl Read, piece: usize, sender: &SyncSender<Output>) {
    loop {
        let mut bytes = Vec::with_capacity(piece);
        let read = pipe.by_ref().take(piece as u64).read_to_end(&mut bytes);
        let is_end = read.is_err() || bytes.len() < piece;
        if !bytes.is_empty() && sender.send(Output::Bytes(bytes)).is_err() {
            return;
        }
        if is_end {
            drop(sender.send(Output::End));
            return;
        }
    }
}

/// Reads all of a pipe and returns its first [`WORDS_MAX`] bytes.
fn kept(mut pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    let read = pipe.by_ref().take(WORDS_MAX as u64).read_to_end(&mut bytes);
    if read.is_ok() {
        drop(io::copy(&mut pipe, &mut io::sink()));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Ended {
    /// Returns what the program wrote to stderr, if it succeeded.
    pub fn result(self, name: &'static str) -> Result<String, VideoFault> {
        let problem = match (self.status.code(), self.status.signal()) {
            (Some(0), _) => match cut_off(&self.words) {
                None => return Ok(self.words),
                Some(words) => return Err(VideoFault::File(format!("{name}: {words}"))),
            },
            (Some(NO_LIMITS), _) => {
                return Err(VideoFault::Program(format!(
                    "cannot limit the memory of {name}: {}",
                    said(&self.words)
                )));
            }
            (Some(126 | 127), _) => {
                return Err(VideoFault::Program(format!(
                    "cannot start {name}: {}",
                    said(&self.words)
                )));
            }
            (_, Some(libc::SIGKILL)) => {
                return Err(VideoFault::Program(format!(
                    "{name} was killed (signal 9); the machine may have run out of memory. Run again"
                )));
            }
            (_, Some(libc::SIGXCPU)) => "used up its processor time".to_owned(),
            (_, Some(signal)) => format!("crashed with signal {signal}"),
            (code, None) => format!("exited with code {}", code.unwrap_or_default()),
        };
        let words = said(&self.words);
        Err(VideoFault::File(match words.as_str() {
            "" => format!("{name} {problem}"),
            words => format!("{name}: {words}"),
        }))
    }
}

/// Returns the error of a container that is truncated or damaged, which the programs only log.
fn cut_off(log: &str) -> Option<String> {
    const CONTAINERS: [&str; 4] = [
        "[matroska,webm]",
        "[mov,mp4,m4a,3gp,3g2,mj2]",
        "[avi]",
        "[gif]",
    ];
    let has_levels = log.contains("[info]");
    let mut lines = log
        .lines()
        .filter(|line| !has_levels || line.contains("[error]"));
    lines.find_map(|line| {
        let line = without_address(line.trim());
        let is_of_container = CONTAINERS.iter().any(|name| line.starts_with(name));
        is_of_container.then(|| said(&line))
    })
}

/// Returns the first errors of a log on one line. Addresses are removed, because they differ from run
/// to run.
fn said(log: &str) -> String {
    let has_levels = log.contains("[error]") || log.contains("[fatal]");
    let is_error = |line: &&str| {
        let is_count = line.trim().starts_with("Last message repeated");
        let has_level = line.contains("[error]") || line.contains("[fatal]");
        !line.trim().is_empty() && !is_count && (!has_levels || has_level)
    };
    let errors = log.lines().filter(is_error);
    let mut lines: Vec<String> = Vec::new();
    for line in errors.map(|line| without_address(line.trim())) {
        if let Some(words) = in_own_words(&line) {
            return visible(&words).into_owned();
        }
        if lines.len() < 3 && !lines.contains(&line) {
            lines.push(line);
        }
    }
    let text: String = lines.join("; ").chars().take(SHOWN_MAX).collect();
    visible(&text).into_owned()
}

/// Returns our words for a line about a codec, format or size that is not accepted.
fn in_own_words(line: &str) -> Option<String> {
    const HOW: &str = "convert the file, as with `ffmpeg -i FILE -c:v libx264 NEW.mp4`";
    if line.contains("exceeds specified max pixel count") {
        return Some("its frames are larger than 8K (7680 x 4320)".to_owned());
    }
    if let Some((_, rest)) = line.split_once("Codec (") {
        let (codec, _) = rest.split_once(") not on whitelist")?;
        return Some(format!("the codec `{codec}` is not accepted; {HOW}"));
    }
    let (name, _) = line.split_once("] Format not on whitelist")?;
    let format = name.strip_prefix('[')?;
    Some(format!("the format `{format}` is not accepted; {HOW}"))
}

/// Returns `[h264 @ 0x55d0] broken` without the address.
fn without_address(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, after)) = rest.split_once(" @ 0x") {
        text.push_str(before);
        rest = after.trim_start_matches(|c: char| c.is_ascii_hexdigit());
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a shell script in place of a decoder.
    fn run(script: &str, seconds: u64) -> Result<(Vec<usize>, String), VideoFault> {
        let arguments = ["-c", script].map(OsString::from);
        let program = Program {
            name: "sh",
            path: Path::new("/bin/sh"),
            arguments: &arguments,
            until: Deadline::after(seconds),
        };
        let mut lengths = Vec::new();
        let ended = program.run(4, &mut |bytes| {
            lengths.push(bytes.len());
            Ok(())
        })?;
        ended.result("sh").map(|words| (lengths, words))
    }

    const LONG: u64 = 60;

    #[test]
    fn output_comes_in_pieces_beside_the_log() {
        let (lengths, words) = run("printf 123456789; echo fine >&2", LONG).unwrap();
        assert_eq!(lengths, [4, 4, 1]);
        assert_eq!(words, "fine\n");
        assert_eq!(run("exit 0", LONG).unwrap(), (vec![], String::new()));
    }

    #[test]
    fn a_program_that_hangs_or_writes_endless_logs_is_ended() {
        let begun = Instant::now();
        let fault = run("sleep 60", 1).unwrap_err();
        let expected = "sh did not finish within 1 s; raise `timeout_s`, or cut the file";
        assert_eq!(fault, VideoFault::File(expected.to_owned()));
        assert!(begun.elapsed() < Duration::from_secs(30));
        let endless = "while :; do echo noise >&2; done";
        assert!(matches!(run(endless, 1), Err(VideoFault::File(_))));
    }

    #[test]
    fn it_has_no_environment_writes_no_file_and_has_little_memory() {
        let (_, words) = run("env >&2", LONG).unwrap();
        let names = words.lines().filter(|line| !line.starts_with('_'));
        assert_eq!(
            names.filter(|line| !line.starts_with("PWD=")).count(),
            0,
            "{words}"
        );
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("written");
        let write = format!("echo long >{}", file.display());
        assert!(run(&write, LONG).is_err());
        assert_eq!(file.metadata().map_or(0, |file| file.len()), 0);
        let (_, limit) = run("ulimit -v >&2", LONG).unwrap();
        assert_eq!(limit.trim(), MEMORY_KIB.to_string());
    }

    #[test]
    fn the_reason_is_the_programs_own() {
        let broken = "echo '[h264 @ 0x55d0ab] bad \u{1b}[2J block' >&2; exit 1";
        let fault = run(broken, LONG).unwrap_err();
        let expected = "sh: [h264] bad \\u001b[2J block";
        assert_eq!(fault, VideoFault::File(expected.to_owned()));
        let strange =
            "echo \"[mpeg2video @ 0x55] Codec (mpeg2video) not on whitelist 'h264'\" >&2; exit 1";
        let VideoFault::File(words) = run(strange, LONG).unwrap_err() else {
            panic!("it is the file's fault")
        };
        assert!(
            words.starts_with("sh: the codec `mpeg2video` is not accepted; convert"),
            "{words}"
        );
        let cut = "echo '[matroska,webm @ 0x55] File ended prematurely at pos. 100' >&2";
        let expected = "sh: [matroska,webm] File ended prematurely at pos. 100";
        assert_eq!(
            run(cut, LONG).unwrap_err(),
            VideoFault::File(expected.to_owned())
        );
        let fault = run("exit 3", LONG).unwrap_err();
        assert_eq!(fault, VideoFault::File("sh exited with code 3".to_owned()));
        let fault = run("kill -11 $$", LONG).unwrap_err();
        assert_eq!(
            fault,
            VideoFault::File("sh crashed with signal 11".to_owned())
        );
        assert!(matches!(
            run("kill -9 $$", LONG),
            Err(VideoFault::Program(_))
        ));
    }
}
