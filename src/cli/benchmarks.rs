//! `pipeline benchmarks`: fetch the judge texts that the pipelines in `pipelines/benchmarks` use.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{Args, Subcommand};

use super::failed::Failed;
use super::out::{line, say};
use ovchat_data::store::{create_folder, digest, hash_file, write_atomically};
use ovchat_pipeline::config::BENCHMARK_TEXTS;

/// Prepare benchmarks, which `pipeline run pipelines/benchmarks/….yaml` runs.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline benchmarks fetch pipelines/benchmarks/texts\n  \
    pipeline benchmarks fetch texts --wheel lmms_eval-0.7.3-py3-none-any.whl"
)]
pub struct Benchmarks {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Download lmms-eval's wheel with pip (4 MB; MIT license), and write the texts that its judges
    /// are asked with as templates into a folder. No program of the wheel is run.
    Fetch {
        /// The folder to write.
        folder: PathBuf,
        /// A wheel that was downloaded before, in place of a download.
        #[arg(long, value_name = "FILE")]
        wheel: Option<PathBuf>,
        /// The Python that runs pip and reads the wheel.
        #[arg(long, value_name = "PROGRAM", default_value = "python3")]
        python: PathBuf,
    },
}

/// The package with the texts, and the SHA-256 of its wheel.
const PACKAGE: &str = "lmms-eval==0.7.3";
const WHEEL_SHA256: &str = "5709f9f9f56a8f5f22bf379571bd1c5e7702af5ae2bbb9637001c5dd91168895";

/// The program that reads the wheel.
const EXTRACT: &str = include_str!("benchmarks/extract.py");

impl Benchmarks {
    pub fn run(&self) -> Result<(), Failed> {
        let What::Fetch {
            folder,
            wheel,
            python,
        } = &self.what;
        let downloads = tempfile::tempdir().map_err(|error| Failed::Words(error.to_string()))?;
        let wheel = match wheel {
            Some(wheel) => {
                std::path::absolute(wheel).map_err(|error| Failed::Words(error.to_string()))?
            }
            None => download(python, downloads.path())?,
        };
        let found = hash_file(&wheel)?;
        if found != WHEEL_SHA256 {
            return Err(Failed::Words(format!(
                "{}: SHA-256 is {found}, but that of {PACKAGE} is {WHEEL_SHA256}; nothing was written",
                wheel.display()
            )));
        }
        let texts = extract(python, &wheel)?;
        if !texts.keys().eq(BENCHMARK_TEXTS) {
            let found: Vec<&str> = texts.keys().map(String::as_str).collect();
            return Err(Failed::Words(format!(
                "the wheel has other texts than the pipelines use: {}; please report this bug",
                found.join(", ")
            )));
        }
        create_folder(folder)?;
        for (name, text) in &texts {
            let path = folder.join(name);
            if path.exists() && hash_file(&path)? != digest(text.as_bytes()) {
                return Err(Failed::Words(format!(
                    "{} differs from the text of {PACKAGE}; move it away, or name another folder",
                    path.display()
                )));
            }
        }
        for (name, text) in &texts {
            write_atomically(&folder.join(name), text.as_bytes())?;
            line(format_args!(
                "{}  {}",
                digest(text.as_bytes()),
                folder.join(name).display()
            ))?;
        }
        say!("wrote {} texts of {PACKAGE} (MIT license)", texts.len());
        Ok(())
    }
}

/// Runs a command of Python, and returns what it prints.
fn python(program: &Path, arguments: &[&OsStr], what: &str) -> Result<Vec<u8>, Failed> {
    // Python finds modules in the current folder; an empty one has none.
    let empty = tempfile::tempdir().map_err(|error| Failed::Words(error.to_string()))?;
    // A name without a folder is looked up in PATH.
    let is_path = program.components().count() > 1;
    let program = if is_path {
        std::path::absolute(program).map_err(|error| Failed::Words(error.to_string()))?
    } else {
        program.to_owned()
    };
    let done = Command::new(&program)
        .args(arguments)
        .current_dir(empty.path())
        .output();
    let done = done.map_err(|error| {
        Failed::Words(format!(
            "cannot run {}: {error}; name another Python with --python",
            program.display()
        ))
    })?;
    if done.status.success() {
        return Ok(done.stdout);
    }
    let told = String::from_utf8_lossy(&done.stderr);
    let last = told.lines().rev().find(|line| !line.trim().is_empty());
    Err(Failed::Words(format!(
        "{what} failed: {}",
        ovchat_io::visible::visible(last.unwrap_or("no message"))
    )))
}

/// Downloads the wheel into a folder.
fn download(program: &Path, folder: &Path) -> Result<PathBuf, Failed> {
    let arguments = [
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--dest",
    ];
    let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    let arguments = [&arguments[..], &[folder.as_os_str(), OsStr::new(PACKAGE)]].concat();
    say!("downloading {PACKAGE} with pip");
    python(program, &arguments, &format!("the download of {PACKAGE}"))?;
    let wheels = folder.read_dir().into_iter().flatten().flatten();
    let wheel = wheels
        .map(|entry| entry.path())
        .find(|path| path.extension() == Some("whl".as_ref()));
    wheel.ok_or_else(|| Failed::Words("pip downloaded no wheel".to_owned()))
}

/// Returns the texts in the wheel by the names of their files.
fn extract(program: &Path, wheel: &Path) -> Result<BTreeMap<String, String>, Failed> {
    let arguments = [
        OsStr::new("-I"),
        OsStr::new("-c"),
        OsStr::new(EXTRACT),
        wheel.as_os_str(),
    ];
    let printed = python(program, &arguments, "the extraction of texts")?;
    serde_json::from_slice(&printed).map_err(|error| {
        Failed::Words(format!("the extraction of texts printed no texts: {error}"))
    })
}
