//! `pipeline export`: write pairs, answers or checkpoints for other programs.

mod samples;
mod target;
mod trl;

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::engine;
use super::failed::Failed;
use super::file::{read_run, run_folder};
use super::out::say;
use super::verify::refuse_flaws;
use ovchat_data::store::{
    CheckpointRecord, Images, Lookup, RunFolder, StoreError, TableReader, TableVersion,
    copy_folder, create_folder, sync_folder, write_atomically, write_folder,
};
use ovchat_data::tables::{Image, Pair, Row};
use ovchat_io::files;
use ovchat_models::{Layout, ModelLoader};
use ovchat_pipeline::run::best_round;
use ovchat_pipeline::stages::Shown;

/// Export pairs, answers or a checkpoint of a run for other programs.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline export runs/small-world pairs --to export/pairs.json\n  \
    pipeline export runs/small-world pairs --format trl --to export/pairs.parquet\n  \
    pipeline export runs/small-world answers --to export/samples.jsonl\n  \
    pipeline export runs/small-world checkpoint --round 2 --to /models/mine\n  \
    pipeline export runs/adapted checkpoint --merge --to /models/merged\n  \
    pipeline export runs/small-world checkpoint --layout llava-next --to /models/mine"
)]
pub struct Export {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Export pairs for another trainer.
    Pairs {
        /// The file to write.
        #[arg(long)]
        to: PathBuf,
        /// The format of the file.
        #[arg(long, default_value = "llava-next")]
        format: PairFormat,
        /// The round [default: the last one].
        #[arg(long)]
        round: Option<u32>,
        /// The table, if the run has several tables of pairs.
        #[arg(long)]
        table: Option<String>,
    },
    /// Export answers as the samples that lmms-eval logs, one JSON object a line.
    Answers {
        /// The file to write.
        #[arg(long)]
        to: PathBuf,
        /// The table of answers, if the run has several.
        #[arg(long)]
        table: Option<String>,
        /// The table of their prompts, if the run has several.
        #[arg(long)]
        prompts: Option<String>,
        /// The round [default: the last one].
        #[arg(long)]
        round: Option<u32>,
    },
    /// Export a trained model: a policy in the format of transformers; of a reward model the
    /// trained ones of the folders `base`, `vision` and `adapter`.
    Checkpoint {
        /// The folder to write; it must not exist.
        #[arg(long)]
        to: PathBuf,
        /// The round [default: the best one with `rounds: { keep: best }`, else the last one].
        #[arg(long)]
        round: Option<u32>,
        /// The model, if the run trains several.
        #[arg(long)]
        model: Option<String>,
        /// Merge an adapter into its base weights, and write the full model.
        #[arg(long)]
        merge: bool,
        /// The folder of the base weights to merge into, if it has moved since training.
        #[arg(long, requires = "merge")]
        base: Option<PathBuf>,
        /// The checkpoint layout of a policy [default: the same as before training].
        #[arg(long)]
        layout: Option<LayoutName>,
    },
}

/// A trainer whose format of pairs to use.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum PairFormat {
    /// The JSON list that LLaVA-NeXT's train_dpo.py reads. Images go to the folder `images` next to
    /// it. Pairs that the script would misread are refused: those with earlier turns, a system
    /// prompt, no image or several images.
    LlavaNext,
    /// A Parquet file for TRL's DPOTrainer: conversations with image parts in place, and the images.
    Trl,
}

/// A program whose checkpoint layout to use.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum LayoutName {
    /// transformers 4.45 or later, and programs that serve its models.
    Transformers,
    /// LLaVA-NeXT, like the checkpoints of lmms-lab.
    LlavaNext,
}

impl From<LayoutName> for Layout {
    fn from(name: LayoutName) -> Self {
        match name {
            LayoutName::Transformers => Self::Transformers,
            LayoutName::LlavaNext => Self::LlavaNext,
        }
    }
}

impl Export {
    pub fn run(&self, loader: Option<&dyn ModelLoader>) -> Result<(), Failed> {
        let run = read_run(&run_folder(&self.run))?;
        match &self.what {
            What::Pairs {
                to,
                format,
                round,
                table,
            } => {
                let made = pairs(&run, *round, table.as_deref())?;
                match format {
                    PairFormat::LlavaNext => write_llava_next(&run, made, to),
                    PairFormat::Trl => write_trl(&run, made, to),
                }
            }
            What::Answers {
                to,
                table,
                prompts,
                round,
            } => samples::write(&run, table.as_deref(), prompts.as_deref(), *round, to),
            What::Checkpoint {
                to,
                round,
                model,
                merge,
                base,
                layout,
            } => {
                let rewrites = *merge || layout.is_some();
                if rewrites && loader.is_none() {
                    return Err(engine::become_it());
                }
                let best = best_round(&run)?.filter(|_| round.is_none());
                if let Some(best) = &best {
                    say!("round {} is the best; `--round` takes another", best.round);
                }
                let round = round.or(best.map(|best| best.round));
                let trained = trained(&run, round, model.as_deref())?;
                if to.exists() {
                    let words = format!("{} already exists; choose another folder", to.display());
                    return Err(Failed::Words(words));
                }
                let is_read = |made: &&TableVersion| {
                    let checkpoint = made.checkpoint.as_ref();
                    checkpoint.is_some_and(|one| trained.contains(&one))
                };
                refuse_flaws(&run, run.manifest().made.iter().filter(is_read), false)?;
                let last = trained.last().expect("there is at least one");
                let folder = run.root().join(&last.folder);
                match loader.filter(|_| rewrites) {
                    None => {
                        write_folder(to, |to| copy(&run, to, &trained))?;
                        let (from, model) = (&last.folder, &last.model);
                        say!("wrote {from} of `{model}` to {}", to.display());
                    }
                    Some(loader) => {
                        let layout = layout.map(Layout::from);
                        rewrite(loader, &folder, *merge, base.as_deref(), layout, to)?;
                    }
                }
                Ok(())
            }
        }
    }
}

/// Returns the complete table of a round (default: the last one that has it) that passes a test.
fn find<'a>(
    run: &'a RunFolder,
    what: &str,
    round: Option<u32>,
    test: impl Fn(&TableVersion) -> bool,
) -> Result<&'a TableVersion, Failed> {
    let fitting = run
        .manifest()
        .made
        .iter()
        .filter(|made| made.complete && test(made));
    let fitting = fitting.filter(|made| round.is_none() || made.round == round);
    fitting.max_by_key(|made| made.round).ok_or_else(|| {
        let of_round = round.map_or_else(String::new, |round| format!(" of round {round}"));
        Failed::Words(format!(
            "{} has no complete {what}{of_round}; see `pipeline status`",
            run.root().display()
        ))
    })
}

/// Returns the complete table of pairs of a round (default: the last one), whose files are intact.
fn pairs<'a>(
    run: &'a RunFolder,
    round: Option<u32>,
    table: Option<&str>,
) -> Result<&'a TableVersion, Failed> {
    let made = find(run, "pairs", round, |made| {
        made.kind.as_deref() == Some(Pair::KIND) && table.is_none_or(|table| made.table == table)
    })?;
    let of_kind = |other: &&TableVersion| other.kind == made.kind && other.table != made.table;
    if let Some(other) = run.manifest().made.iter().find(of_kind)
        && table.is_none()
    {
        return Err(Failed::Usage(format!(
            "the run has several tables of pairs; choose one: --table {} or --table {}",
            made.table, other.table
        )));
    }
    refuse_flaws(run, [made], true)?;
    Ok(made)
}

/// Writes pairs as a Parquet file for TRL.
fn write_trl(run: &RunFolder, made: &TableVersion, to: &Path) -> Result<(), Failed> {
    let folder = to
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    create_folder(folder)?;
    let failed = |error: std::io::Error| StoreError::io("write", to)(error);
    let mut images = Images::open(run.root(), &run.manifest().images)?;
    let mut count = 0;
    // Renamed when it is complete.
    let file = tempfile::Builder::new()
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .map_err(failed)?;
    let mut writer = trl::Writer::begin(file.reopen().map_err(failed)?)?;
    for batch in TableReader::new(run.files(&made.table, made.round)) {
        for pair in read_pairs(&batch?)? {
            let bytes = pair.image_ids.iter().map(|id| images.bytes(id));
            let bytes = bytes.collect::<Result<Vec<_>, _>>()?;
            let size = bytes.iter().map(|bytes| bytes.len()).sum();
            if let Some(problem) = trl::problem(&pair, size) {
                let (table, key) = (&made.table, &pair.row_key);
                return Err(Failed::Words(format!(
                    "cannot export `{table}`, nothing was written: pair {key} {problem}"
                )));
            }
            writer.write(pair, bytes)?;
            count += 1;
        }
    }
    let written = writer.finish()?;
    written.sync_all().map_err(failed)?;
    file.persist(to).map_err(|error| failed(error.error))?;
    sync_folder(folder)?;
    say!("wrote {count} pairs with their images to {}", to.display());
    Ok(())
}

/// Writes pairs as the JSON list and the folder of images that LLaVA-NeXT's `train_dpo.py` reads.
fn write_llava_next(run: &RunFolder, made: &TableVersion, to: &Path) -> Result<(), Failed> {
    let files = run.files(&made.table, made.round);
    refuse_misread(&made.table, &files)?;
    let folder = to
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let encoded_images = folder.join("images");
    create_folder(&encoded_images)?;
    let image_files = run.manifest().images.iter();
    let image_files = image_files.map(|file| run.root().join(&file.file));
    let mut rows = Lookup::open(image_files.collect(), "image_id")?;
    let mut images = Images::open(run.root(), &run.manifest().images)?;
    let mut written = HashSet::new();
    let mut list = Vec::new();
    for batch in TableReader::new(files) {
        for pair in read_pairs(&batch?)? {
            let [id] = &pair.image_ids[..] else {
                unreachable!("pairs with no or several images were refused");
            };
            let row: Option<Image> = rows.row(id)?;
            let format = row.map_or_else(|| "png".to_owned(), |row| row.format);
            let name = format!("{id}.{format}");
            if written.insert(name.clone()) {
                write_atomically(&encoded_images.join(&name), &images.bytes(id)?)?;
            }
            list.push(json!({
                "id": pair.id.unwrap_or(pair.prompt_id),
                "image": name,
                "prompt": pair.prompt,
                // Without it, the script's grouping by length fails.
                "answer": "",
                "chosen": pair.chosen,
                "rejected": pair.rejected,
            }));
        }
    }
    let mut text = serde_json::to_vec_pretty(&list).expect("plain data serializes");
    text.write_all(b"\n")
        .expect("writing to a vector does not fail");
    target::write(run, to, &text)?;
    say!(
        "wrote {} pairs to {} and {} images to {}",
        list.len(),
        to.display(),
        written.len(),
        encoded_images.display()
    );
    Ok(())
}

fn read_pairs(batch: &RecordBatch) -> Result<Vec<Pair>, Failed> {
    Pair::from_batch(batch).map_err(|misfit| Failed::Words(misfit.to_string()))
}

/// Refuses a table of pairs that the training script would misread, before anything is written.
fn refuse_misread(table: &str, files: &[PathBuf]) -> Result<(), Failed> {
    let (mut pairs, mut misread) = (0, 0);
    let mut first = None;
    for batch in TableReader::new(files.to_vec()) {
        for pair in read_pairs(&batch?)? {
            pairs += 1;
            if let Some(problem) = misreading(&pair) {
                misread += 1;
                first.get_or_insert_with(|| format!("pair {} {problem}", pair.row_key));
            }
        }
    }
    let Some(first) = first else {
        return Ok(());
    };
    Err(Failed::Words(format!(
        "cannot export {misread} of {pairs} pairs of `{table}`, nothing was written: {first}. \
         `--format trl` writes system prompts, earlier turns and several images, too"
    )))
}

/// Returns the part of a pair that LLaVA-NeXT's `train_dpo.py` cannot represent, as a message. The
/// script reads one prompt without history, removes each `<image>` from it, prepends one, and reads
/// one image for each `<image>` of the prompt and the responses.
fn misreading(pair: &Pair) -> Option<String> {
    let texts = [&pair.prompt, &pair.chosen, &pair.rejected];
    if !Shown::from(pair).videos.is_empty() {
        return Some("has a video, of which the run stores frames only".to_owned());
    }
    Some(match (pair.turns.len(), pair.image_ids.len()) {
        (0, 1) if pair.system.is_some() => {
            "has a system prompt, which the training script's format cannot represent".to_owned()
        }
        (0, 1) if texts.iter().any(|text| text.contains("<image>")) => {
            "has the text `<image>` in its prompt or an answer, which the training script would read as an \
             image"
                .to_owned()
        }
        (0, 1) => return None,
        (0, 0) => "has no image, but the training script reads one for each pair".to_owned(),
        (0, images) => format!(
            "has {images} images, but the training script reads one for each pair: `chosen` would get \
             the first and `rejected` the second"
        ),
        (turns, _) => format!(
            "has {turns} earlier turns, which the training script's format cannot represent"
        ),
    })
}

/// Returns the checkpoints of a model up to a round, oldest first. Fails if there are none.
fn trained<'a>(
    run: &'a RunFolder,
    round: Option<u32>,
    model: Option<&str>,
) -> Result<Vec<&'a CheckpointRecord>, Failed> {
    let is_of = |record: &CheckpointRecord| model.is_none_or(|model| record.model == model);
    let last = find(run, "checkpoint", round, |made| {
        made.checkpoint.as_ref().is_some_and(is_of)
    })?;
    let mut trained: Vec<(Option<u32>, &CheckpointRecord)> = run
        .manifest()
        .made
        .iter()
        .filter(|made| made.complete && made.round <= last.round)
        .filter_map(|made| Some((made.round, made.checkpoint.as_ref()?)))
        .filter(|(_, record)| is_of(record))
        .collect();
    // Within a round, the manifest lists them in the order of training.
    trained.sort_by_key(|(round, _)| *round);
    let trained: Vec<&CheckpointRecord> = trained.into_iter().map(|(_, record)| record).collect();
    let last = trained.last().expect("there is at least one");
    if let Some(other) = trained.iter().find(|other| other.model != last.model) {
        return Err(Failed::Usage(format!(
            "the run trains several models; choose one: --model {} or --model {}",
            other.model, last.model
        )));
    }
    Ok(trained)
}

/// Writes the policy in `folder` to `to`, merged with its base or in another layout.
fn rewrite(
    loader: &dyn ModelLoader,
    folder: &Path,
    merge: bool,
    base: Option<&Path>,
    layout: Option<Layout>,
    to: &Path,
) -> Result<(), Failed> {
    let config = folder.join("adapter_config.json");
    let is_adapter = config.is_file();
    let refuse = |words: &str| Err(Failed::Usage(words.to_owned()));
    if !is_adapter && !folder.join("config.json").is_file() {
        return refuse(
            "the checkpoint is of a reward model, which cannot be converted; leave out --merge and --layout",
        );
    }
    if !is_adapter && merge {
        return refuse("the checkpoint is a full model, not an adapter; leave out --merge");
    }
    if is_adapter && !merge {
        return refuse(
            "the checkpoint is an adapter, which has only one layout; leave out --layout or add --merge",
        );
    }
    let (weights, adapter) = if is_adapter {
        (base_of(&config, base)?, Some(folder))
    } else {
        (folder.to_owned(), None)
    };
    write_folder(to, |to| {
        let written = loader.rewrite(&weights, adapter, layout, to);
        written.map_err(|error| Failed::Words(error.to_string()))
    })?;
    let with = match adapter {
        Some(adapter) => format!(" merged with {}", adapter.display()),
        None => String::new(),
    };
    say!("wrote {}{with} to {}", weights.display(), to.display());
    Ok(())
}

/// Returns the folder of the base weights of an adapter.
fn base_of(config: &Path, given: Option<&Path>) -> Result<PathBuf, Failed> {
    let text = files::read_to_string(config).map_err(StoreError::io("read", config))?;
    let config: Value = serde_json::from_str(&text).unwrap_or_default();
    let named = config["base_model_name_or_path"].as_str().map(Path::new);
    let base = given.or(named).filter(|base| base.is_dir());
    base.map(Path::to_owned).ok_or_else(|| {
        let named = named.unwrap_or(Path::new("(unknown path)")).display();
        Failed::Words(format!(
            "the base weights of the adapter are not in {named}; pass their folder with --base"
        ))
    })
}

/// Copies a checkpoint unchanged.
fn copy(run: &RunFolder, to: &Path, trained: &[&CheckpointRecord]) -> Result<(), Failed> {
    let last = run
        .root()
        .join(&trained.last().expect("there is at least one").folder);
    if last.join("config.json").is_file() {
        return Ok(copy_folder(&last, to)?);
    }
    // Each training of a reward model writes a part of it: export the last of each part.
    let mut parts: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for record in trained {
        let folder = run.root().join(&record.folder);
        for entry in fs::read_dir(&folder).map_err(StoreError::io("read", &folder))? {
            let entry = entry.map_err(StoreError::io("read", &folder))?;
            if entry.path().is_dir() {
                parts.insert(entry.file_name(), entry.path());
            }
        }
    }
    if parts.is_empty() {
        return Ok(copy_folder(&last, to)?);
    }
    for (name, folder) in parts {
        copy_folder(&folder, &to.join(name))?;
    }
    Ok(())
}
