//! Checks of the files and folders that a pipeline names, including the model folders' contents.

use std::fs::Metadata;
use std::io::ErrorKind;
use std::path::Path;

use super::diagnostic::{At, Diagnostic};
use super::extends::plain;
use super::pipeline::PipelineSpec;
use super::secrets::Secrets;
use super::source::KeyPath;
use super::source_texts::SourceTexts;
use super::suggest::suggest;
use crate::stages::{Ffmpeg, SourceProblem, StageSpec};
use ovchat_io::files;
use ovchat_models::checkpoint::{AdapterConfig, CheckpointError, Shards};
use ovchat_models::preprocess::{LlavaRlhfProcessor, OtherText, Processor, other_text};
use ovchat_models::{
    JudgePrompt, ModelSpec, Repository, SYSTEM, TEMPLATE, Unchosen, VisionLanguageSpec,
    architectures, is_offline,
};

/// Returns the settings that name files and folders.
pub fn settings(written: &PipelineSpec) -> Vec<KeyPath> {
    let of_models = written.models.iter().flat_map(|model| {
        let paths = model.spec.iter().flat_map(ModelSpec::paths);
        paths.map(|(field, _)| model.settings.below(field))
    });
    let of_stages = written.all_stages().flat_map(|(stage, _)| {
        let files = stage.spec.iter().flat_map(|spec| spec.as_stage().files());
        files.map(|(field, _)| stage.settings.key(field))
    });
    // The files of an exam are loaded by a stage that is not in the text.
    let of_exams = written.models.iter().flat_map(|model| {
        let exam = model.settings.key("exam");
        ["from", "images"].map(|field| exam.key(field))
    });
    of_models.chain(of_stages).chain(of_exams).collect()
}

/// Reports files and folders of the user that do not exist or are of the wrong type. Paths must be
/// absolute.
pub fn missing_files(
    written: &PipelineSpec,
    sources: &SourceTexts,
    secrets: &Secrets,
) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    for model in &written.models {
        for (field, path) in model.spec.iter().flat_map(ModelSpec::paths) {
            let setting = model.settings.below(field);
            let folder = sources.folder(&setting);
            let at = At::value(setting.clone());
            let found = match Repository::of(path) {
                Some(repository) => Some(not_cached(&repository, path, at, secrets)),
                None => missing(field, path, at.clone(), secrets).map(|diagnostic| {
                    if is_benchmark_text(path) {
                        return no_benchmark_text(path, at, secrets);
                    }
                    if let Some(help) = help_of_variable(sources, &setting, path) {
                        return diagnostic.help(help);
                    }
                    let meant = (!FILES.contains(&field))
                        .then(|| almost_of_the_hub(path, &folder, at, &diagnostic, secrets));
                    meant.flatten().unwrap_or(diagnostic)
                }),
            };
            diagnostics.extend(found);
        }
    }
    for (stage, _) in written.all_stages() {
        let Some(spec) = &stage.spec else {
            continue;
        };
        let unchosen = not_chosen(spec, &At::value(stage.settings.key("from")), secrets);
        for (field, path) in spec.as_stage().files() {
            if field == "from" && unchosen.is_some() {
                continue;
            }
            let setting = stage.settings.key(field);
            let found = missing(field, path, At::value(setting.clone()), secrets);
            let help = help_of_variable(sources, &setting, path);
            diagnostics.extend(found.map(|diagnostic| match help {
                Some(help) => diagnostic.help(help),
                None => diagnostic,
            }));
        }
        diagnostics.extend(unchosen);
    }
    diagnostics
}

/// The texts that `pipeline benchmarks fetch` writes.
pub const BENCHMARK_TEXTS: [&str; 10] = [
    "livebench_2406.txt",
    "livebench_2409.txt",
    "llava_w.txt",
    "llava_wilder.txt",
    "multimodal_rewardbench.txt",
    "video_detail_system.txt",
    "video_detail_user.txt",
    "vl_rewardbench.txt",
    "wildvision_system.txt",
    "wildvision_user.txt",
];

fn is_benchmark_text(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    !path.exists() && name.is_some_and(|name| BENCHMARK_TEXTS.contains(&name))
}

/// The diagnostic for a judge text of a benchmark that was not fetched.
fn no_benchmark_text(path: &Path, at: At, secrets: &Secrets) -> Diagnostic {
    let message = format!("`{}` does not exist", shown(path, secrets));
    let folder = shown(path.parent().unwrap_or(Path::new(".")), secrets);
    Diagnostic::new("config::missing_file", at, message).help(format!(
        "the judge texts of benchmarks are those of lmms-eval; fetch them: pipeline benchmarks fetch {folder}"
    ))
}

/// Reports record files that cannot be loaded, judged by their first and last bytes, and those whose
/// first records name videos that this machine cannot decode. Files that cannot be opened are left to
/// [`missing_files`].
pub fn records(written: &PipelineSpec, secrets: &Secrets) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    for (stage, _) in written.all_stages() {
        // Files that are not there are reported by [`missing_files`].
        let is_file = |path: &Path| path.metadata().is_ok_and(|found| found.is_file());
        let is_there = |spec: &StageSpec| {
            let mut files = spec.as_stage().files().into_iter();
            files.any(|(field, path)| field == "from" && is_file(path))
        };
        let (path, source_problem) = match &stage.spec {
            Some(spec) if !is_there(spec) => continue,
            Some(StageSpec::LoadPrompts(load)) => (load.from(), load.source_problem()),
            Some(StageSpec::LoadFeedback(load)) => (load.from(), load.source_problem()),
            _ => continue,
        };
        let first = stage.spec.iter().flat_map(|spec| spec.as_stage().files());
        let mut first = first.filter(|(field, _)| *field == "from");
        let path = first.next().map_or(path, |(_, path)| path);
        let at = At::value(stage.settings.key("from"));
        let Some(SourceProblem { words, is_certain }) = source_problem else {
            if stage
                .spec
                .as_ref()
                .is_some_and(|spec| spec.video_frames().is_some())
                && let Err(problem) = Ffmpeg::find()
            {
                let words = format!(
                    "`{}` names videos, and this machine cannot decode them: {problem}",
                    shown(path, secrets)
                );
                let help = "videos that the run has decoded already need no ffmpeg";
                diagnostics.push(Diagnostic::warning("config::no_decoder", at, words).help(help));
            }
            continue;
        };
        let words = format!("`{}`: {words}", shown(path, secrets));
        diagnostics.push(if is_certain {
            Diagnostic::new("config::records", at, words)
        } else {
            Diagnostic::warning("config::records", at, words)
        });
    }
    diagnostics
}

/// Validates the folders of the models: configs, tokenizers, and the headers of the weights, as far
/// as possible without opening a tensor. Folders that do not exist are left to [`missing_files`].
pub fn probe_models(written: &PipelineSpec, secrets: &Secrets) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    for model in &written.models {
        let Some(spec) = &model.spec else {
            continue;
        };
        let paths = spec.paths();
        if paths
            .iter()
            .any(|(field, path)| !path.metadata().is_ok_and(|it| misfit(field, &it).is_none()))
        {
            continue;
        }
        if let Some(prompt_settings) = spec.prompt_settings()
            && let Err(problem) = JudgePrompt::open(prompt_settings)
        {
            let files = [
                (TEMPLATE, &prompt_settings.template),
                (SYSTEM, &prompt_settings.system),
            ];
            let of_template = files.into_iter().find_map(|(setting, path)| {
                let path = path.as_deref()?;
                let rest = problem.strip_prefix(&path.display().to_string())?;
                Some((setting, format!("{}{rest}", shown(path, secrets))))
            });
            let (setting, problem) = of_template.unwrap_or(("ask", problem));
            let at = At::value(model.settings.below(setting));
            diagnostics.push(Diagnostic::new(
                "config::asking",
                at,
                secrets.hide(&problem),
            ));
        }
        diagnostics.extend(other_words(spec, &model.settings, secrets));
        if let Err(error) = probe(spec) {
            // The setting whose folder contains the faulty file.
            let field = paths.iter().find(|(_, path)| error.path.starts_with(path));
            let at = match field {
                Some((field, _)) => At::value(model.settings.below(field)),
                None => At::key(model.settings.clone()),
            };
            let path = shown(&error.path, secrets);
            let message = format!("`{path}`: {}", secrets.hide(&error.problem));
            diagnostics.push(Diagnostic::new("config::model_files", at, message));
        }
    }
    diagnostics
}

/// The warning about a checkpoint whose chat template renders prompts differently from the built-in
/// one.
fn other_words(spec: &ModelSpec, settings: &KeyPath, secrets: &Secrets) -> Option<Diagnostic> {
    let opened = spec.clone().opened();
    let model = opened.vision_language()?;
    let OtherText {
        path,
        theirs,
        ours,
        is_space,
    } = other_text(&model.weights)?;
    let path = shown(&path, secrets);
    let message = format!(
        "the chat template in `{path}` is ignored: it renders {theirs:?} where the built-in template renders {ours:?}"
    );
    let at = At::value(settings.key("weights"));
    let diagnostic = match is_space {
        true => Diagnostic::note("config::chat_template", at, message),
        false => Diagnostic::warning("config::chat_template", at, message),
    };
    Some(diagnostic.help(
        "use a checkpoint that was trained with the prompt format of the model, which is always applied; \
         others may answer worse",
    ))
}

fn probe(spec: &ModelSpec) -> Result<(), CheckpointError> {
    match spec {
        ModelSpec::LlavaRlhf(model) => LlavaRlhfProcessor::open(model)?.config.check(model),
        other => match other.clone().opened().vision_language() {
            Some(model) => {
                is_architecture(other, model)?;
                probe_policy(model)
            }
            None => Ok(()),
        },
    }
}

/// The diagnostic code of weights that are not in the Hugging Face cache.
pub const NOT_FETCHED: &str = "config::not_fetched";

/// The note about a repository that is not in the Hugging Face cache, or the error if its name is
/// invalid.
fn not_cached(repository: &Repository, path: &Path, at: At, secrets: &Secrets) -> Diagnostic {
    let shown = secrets.hide(&path.display().to_string());
    if let Some(problem) = repository.problem() {
        let message = format!("`{shown}` is not a valid repository name");
        return Diagnostic::new("config::repository", at, message).help(problem);
    }
    let message = format!("`{shown}` is not in the Hugging Face cache");
    let command = secrets.hide(&repository.command());
    if is_offline() {
        let message = format!("{message}, and HF_HUB_OFFLINE forbids downloading it");
        return Diagnostic::new(NOT_FETCHED, at, message).help(format!(
            "unset HF_HUB_OFFLINE, or download it on a machine with network access: {command}"
        ));
    }
    Diagnostic::note(NOT_FETCHED, at, message).help(format!(
        "`pipeline run` downloads it; to download it now, run: {command}"
    ))
}

/// Reports a dataset that is not in the Hugging Face cache, or that lacks the part to load.
fn not_chosen(spec: &StageSpec, at: &At, secrets: &Secrets) -> Option<Diagnostic> {
    let (from, _) = spec.source()?;
    let unchosen = spec.unchosen()?;
    let repository = Repository::of(from);
    if let (Some(repository), Unchosen::Absent(_)) = (&repository, &unchosen) {
        return Some(not_cached(repository, from, at.clone(), secrets));
    }
    if let Some(repository) = repository.filter(|repository| repository.problem().is_some()) {
        return Some(not_cached(&repository, from, at.clone(), secrets));
    }
    let message = format!(
        "`{}`: {}",
        shown(from, secrets),
        secrets.hide(&unchosen.words())
    );
    Some(Diagnostic::new("config::dataset", at.clone(), message))
}

/// The fix for a missing path that begins with a variable of the pipeline.
fn help_of_variable(sources: &SourceTexts, setting: &KeyPath, path: &Path) -> Option<String> {
    let variable = sources.variable(setting)?;
    let written = path.strip_prefix(sources.folder(setting)).ok();
    Some(if written.is_some_and(Path::exists) {
        format!(
            "it exists in the current folder, but a relative path starts at the folder of the pipeline \
             file; write `--set vars.{variable}=$PWD/…`"
        )
    } else {
        format!("name it with the variable `{variable}`: `--set vars.{variable}=…`")
    })
}

/// The diagnostic for a path that does not exist and was probably meant to name a repository on the
/// Hugging Face Hub; `None` if its first folder, or one with a similar name, exists.
fn almost_of_the_hub(
    path: &Path,
    folder: &Path,
    at: At,
    diagnostic: &Diagnostic,
    secrets: &Secrets,
) -> Option<Diagnostic> {
    let written = path.strip_prefix(folder).ok()?;
    let first = written.iter().next()?;
    if folder.join(first).exists() || !diagnostic.label.is_empty() {
        return None;
    }
    let written = written.to_str()?;
    let meant = Repository::meant(written)?;
    let message = format!("folder `{}` does not exist", secrets.hide(written));
    let diagnostic =
        Diagnostic::new(diagnostic.code, at, message).suggest(Some(&secrets.hide(&meant)));
    Some(diagnostic.help(
        "write `hf://org/name` for weights on the Hugging Face Hub; anything else is a path relative to \
         the folder of the pipeline file",
    ))
}

fn probe_policy(model: &VisionLanguageSpec) -> Result<(), CheckpointError> {
    let prep = Processor::open(&model.weights)?;
    let architecture = prep.architecture();
    architecture.check(&Shards::open(&model.weights)?)?;
    match &model.adapter {
        Some(adapter) => architecture.check_adapter(&AdapterConfig::open(adapter)?),
        None => Ok(()),
    }
}

/// Checks that a checkpoint has the architecture that the pipeline file names. A critic takes any.
fn is_architecture(spec: &ModelSpec, model: &VisionLanguageSpec) -> Result<(), CheckpointError> {
    let found = architectures::name_of(&model.weights)?;
    if spec.vision_language().is_none() || spec.network() == found {
        return Ok(());
    }
    Err(CheckpointError {
        path: model.weights.join("config.json"),
        problem: format!(
            "this is a `{found}` checkpoint; write `{found}` in place of `{}`",
            spec.network()
        ),
    })
}

/// Settings that name a file. Those in neither list accept both.
const FILES: [&str; 6] = ["from", "captions", "prompt", "file", TEMPLATE, SYSTEM];
/// Settings that name a folder.
const FOLDERS: [&str; 6] = ["weights", "base", "vision", "adapter", "images", "videos"];

/// Describes a file in place of a folder, a folder in place of a file, or a special file.
fn misfit(field: &str, found: &Metadata) -> Option<String> {
    if let Some(kind) = files::special(found) {
        Some(format!("is {kind}, not a regular file"))
    } else if found.is_dir() && FILES.contains(&field) {
        Some("is a folder, not a file".to_owned())
    } else if found.is_file() && FOLDERS.contains(&field) {
        Some("is a file, not a folder".to_owned())
    } else {
        None
    }
}

fn missing(field: &str, path: &Path, at: At, secrets: &Secrets) -> Option<Diagnostic> {
    let problem = match path.metadata() {
        Ok(found) => {
            let problem = misfit(field, &found)?;
            let message = format!("`{}` {problem}", shown(path, secrets));
            return Some(Diagnostic::new("config::wrong_file", at, message));
        }
        Err(error) if error.kind() == ErrorKind::NotFound => "does not exist".to_owned(),
        Err(error) => format!("cannot be accessed: {error}"),
    };
    let text = path.display().to_string();
    let message = format!("`{}` {problem}", shown(path, secrets));
    let diagnostic = Diagnostic::new("config::missing_file", at, message);
    let folder = path.ancestors().skip(1).find(|folder| folder.is_dir())?;
    let is_parent = Some(folder) == path.parent();
    let wanted = path
        .strip_prefix(folder)
        .ok()?
        .iter()
        .next()?
        .to_string_lossy()
        .into_owned();
    let names: Vec<String> = folder
        .read_dir()
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let diagnostic = diagnostic.suggest(suggest(&wanted, names.iter().map(String::as_str)));
    Some(match (is_parent, diagnostic.label.is_empty()) {
        (_, false) => diagnostic,
        (true, true) => {
            diagnostic.help("give the path relative to the folder of the pipeline file")
        }
        // Part of a path from the environment would reveal part of the value.
        (false, true) if secrets.hide(&text) != text => diagnostic,
        (false, true) => {
            let folder = shown(folder, secrets);
            diagnostic.help(format!(
                "check the path: `{folder}` exists, but contains no `{wanted}`"
            ))
        }
    })
}

/// A path for a message: relative to the current folder if it lies below it, with the values of
/// environment variables hidden.
pub(super) fn shown(path: &Path, secrets: &Secrets) -> String {
    let path = secrets.hide(&plain(path).display().to_string());
    let here = std::env::current_dir().unwrap_or_default();
    let here = format!("{}/", secrets.hide(&here.display().to_string()));
    path.strip_prefix(&here).unwrap_or(&path).to_owned()
}
