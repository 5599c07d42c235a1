//! `pipeline doctor`: check libtorch, the compute devices, and the decoder of videos.

use clap::Args;
use serde_json::json;

use super::engine;
use super::failed::Failed;
use super::out::{Output, line};
use ovchat_io::visible::visible_bytes;
use ovchat_models::{Finding, ModelLoader, Severity};
use ovchat_pipeline::stages::Ffmpeg;

/// Check the libtorch, CUDA, compute devices and ffmpeg of this machine, and report what is missing.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline doctor\n  LD_LIBRARY_PATH=/opt/torch/lib pipeline doctor"
)]
pub struct Doctor {
    #[command(flatten)]
    output: Output,
}

impl Doctor {
    pub fn run(&self, loader: Option<&dyn ModelLoader>) -> Result<(), Failed> {
        let Some(loader) = loader else {
            return Self::ask_engine();
        };
        let mut findings = loader.doctor();
        findings.push(decoder());
        let word = |severity| match severity {
            Severity::Good => "good",
            Severity::Note => "note",
            Severity::Bad => "bad",
        };
        if self.output.is_json() {
            let list: Vec<_> = findings
                .iter()
                .map(|finding| json!({ "severity": word(finding.severity), "text": finding.text }))
                .collect();
            line(json!(list))?;
        } else {
            for finding in &findings {
                let mark = match finding.severity {
                    Severity::Good => "ok  ",
                    Severity::Note => "note",
                    Severity::Bad => "BAD ",
                };
                line(format_args!("{mark}  {}", finding.text))?;
            }
        }
        let bad = findings
            .iter()
            .any(|finding| finding.severity == Severity::Bad);
        if bad { Err(Failed::Code(1)) } else { Ok(()) }
    }

    /// Runs the engine's doctor. The engine may not even start; then this program reports the
    /// reason.
    fn ask_engine() -> Result<(), Failed> {
        let engine = engine::path()?;
        engine::libtorch()?;
        let output = engine::command(&engine)
            .output()
            .map_err(|error| engine::cannot_start(&engine, &error))?;
        line(String::from_utf8_lossy(&output.stdout).trim_end())?;
        eprint!("{}", visible_bytes(&output.stderr));
        match output.status.code() {
            Some(0) => Ok(()),
            // The dynamic linker exits with this code when a library is missing.
            Some(127) => Err(Failed::Words(
                "the engine does not start: a library that libtorch is linked to is missing \
                 (named above); run `make setup` again, or use the lib folder of torch 2.11"
                    .to_owned(),
            )),
            code => Err(Failed::Code(code.map_or(1, |code| code as u8))),
        }
    }
}

/// Reports whether videos can be decoded.
fn decoder() -> Finding {
    match Ffmpeg::find() {
        Ok(ffmpeg) => Finding {
            severity: Severity::Good,
            text: format!("ffmpeg {} decodes videos", ffmpeg.version),
        },
        Err(problem) => Finding {
            severity: Severity::Note,
            text: format!("videos cannot be decoded: {problem}"),
        },
    }
}
