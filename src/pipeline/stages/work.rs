//! The kinds of work that a stage declares, and the context in which the runner runs them.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use super::exec::Inherited;
use super::{InputTables, ModelName, ModelState, TableName};
use ovchat_data::store::{Key, Lookup, Media, StoreError, TableReader};
use ovchat_data::tables::{self, Image, Misfit, Reject, RejectClass, Row, Video};
use ovchat_io::mask::Mask;
use ovchat_models::{
    self as models, DpoSettings, DpoTrainer, Judge, ModelError, ModelTelemetry, Policy,
    RewardSettings, RewardTrainer, RowFault, SftSettings, SftTrainer, Trainer,
};
use ovchat_query::QueryError;

/// The work that builds a stage's table.
pub enum StageKind<'a> {
    /// Converts the records of a user's file to rows.
    Load(Box<dyn LoadStage + 'a>),
    /// Maps groups of rows to groups of rows, each group independently.
    Rows(Box<dyn BatchStage + 'a>),
    /// Builds the table with one query.
    Query(Query),
    /// Runs ordered steps that end in a checkpoint.
    Train(Box<dyn TrainStage + 'a>),
    /// Builds a table of few rows from whole tables.
    Compute(Box<dyn ComputeStage + 'a>),
    /// Builds the table with a program of the user.
    Command(Command<'a>),
}

/// An error that ends a stage. Parts committed before it are kept.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Store(StoreError),
    #[error("model `{model}`: {error}")]
    Model { model: ModelName, error: ModelError },
    #[error(transparent)]
    Query(#[from] QueryError),
    /// A file of the user is invalid.
    #[error("{}{place}: {problem}", path.display())]
    Input {
        path: PathBuf,
        place: String,
        problem: String,
    },
    #[error(transparent)]
    Misfit(#[from] Misfit),
    /// Any other error, as a message with the fix.
    #[error("{0}")]
    Other(String),
    /// The stage waits for annotators; the message says for what.
    #[error("{0}")]
    Waiting(String),
    /// The run was interrupted by the user or the system.
    #[error("interrupted")]
    Interrupted,
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Stopped => Self::Interrupted,
            error => Self::Store(error),
        }
    }
}

impl Failure {
    /// Returns a conversion that adds the name of the model to its error.
    pub fn of(model: &ModelName) -> impl FnOnce(ModelError) -> Self {
        let model = model.clone();
        move |error| Self::Model { model, error }
    }
}

/// The models of the pipeline in their current states. A model is opened when a stage requests it
/// and dropped when the stage is done.
pub trait Models {
    fn policy(&mut self, model: &ModelName) -> Result<&mut dyn Policy, Failure>;
    fn judge(&mut self, model: &ModelName) -> Result<&mut dyn Judge, Failure>;
    /// Opens a trainer that starts from the model's current state for this stage and round.
    fn dpo_trainer(
        &mut self,
        model: &ModelName,
        settings: &DpoSettings,
    ) -> Result<Box<dyn DpoTrainer>, Failure>;
    fn sft_trainer(
        &mut self,
        model: &ModelName,
        settings: &SftSettings,
    ) -> Result<Box<dyn SftTrainer>, Failure>;
    fn reward_trainer(
        &mut self,
        model: &ModelName,
        settings: &RewardSettings,
    ) -> Result<Box<dyn RewardTrainer>, Failure>;
    /// Opens a model in one of its states as a reference model, without training it.
    fn reference(
        &mut self,
        model: &ModelName,
        state: ModelState,
        settings: &DpoSettings,
    ) -> Result<Box<dyn DpoTrainer>, Failure>;
    /// True if the model is a judge that scores answers by comparing those to the same prompt.
    fn compares(&self, model: &ModelName) -> bool;
    /// Returns the hash of everything that determines the model's output.
    fn fingerprint(&self, model: &ModelName, state: ModelState) -> &str;
    /// Checks that the prompt and `answer_tokens` more tokens fit into the model's context, using
    /// only the text and the headers of the images, without opening the model.
    fn fits(
        &mut self,
        model: &ModelName,
        prompt: &models::ChatPrompt,
        answer_tokens: usize,
    ) -> Result<Result<(), RowFault>, Failure>;
}

/// The context in which a stage runs.
pub struct StageContext<'a> {
    /// The table being built.
    pub table: &'a TableName,
    /// The round; `None` if the table is built once for all rounds.
    pub round: Option<u32>,
    /// The pipeline's seed.
    pub seed: u64,
    pub models: &'a mut dyn Models,
    pub input_tables: &'a mut InputTables,
    /// Returns true once the run has been interrupted.
    pub stopping: &'a dyn Fn() -> bool,
    /// Takes the number of finished input rows, for the progress bar.
    pub progress: &'a mut dyn FnMut(u64),
    /// Telemetry of the model, set by the stage.
    pub telemetry: &'a mut ModelTelemetry,
    /// Takes a message about how much a network computes at once, before it starts; shown once per
    /// run.
    pub say: &'a mut dyn FnMut(&str),
}

impl StageContext<'_> {
    /// Returns a seed derived from the pipeline's seed, the table, the round and the purpose
    /// `what`.
    pub fn seed_for(&self, what: &str) -> u64 {
        seed_for(self.seed, self.table.as_str(), self.round, what)
    }

    /// Returns `Break` once the run has been interrupted.
    pub fn go_on(&self) -> ControlFlow<()> {
        if (self.stopping)() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

/// The outcome of one group of rows.
pub enum Outcome<T> {
    /// The group's output rows.
    Rows(T),
    /// The group was rejected.
    SetAside {
        id: String,
        class: RejectClass,
        reason: String,
    },
}

impl<T> Outcome<T> {
    pub fn fault(id: &str, reason: impl Into<String>) -> Self {
        Self::SetAside {
            id: id.to_owned(),
            class: RejectClass::Fault,
            reason: reason.into(),
        }
    }
}

/// A group of input rows that belong together (those of one prompt), with its key.
pub struct Task<R> {
    /// The hash of the group's key inputs, stored as `row_key`.
    pub key: String,
    pub rows: Vec<R>,
}

/// Work that maps each group of rows independently. A group is all rows with the same `prompt_id`.
pub trait RowStage {
    type In: Row;
    type Out: Row;

    /// Returns the table whose groups are the input.
    fn input(&self) -> &TableName;

    /// Returns the number of groups per part: a part is computed, committed and resumed as a unit.
    fn part_groups(&self) -> u32;

    /// Adds everything in the group that determines its output to `key`, which already includes the
    /// settings, the models and, if the stage draws random numbers, the seed and the round.
    fn key(&self, ctx: &mut StageContext<'_>, group: &[Self::In], key: Key)
    -> Result<Key, Failure>;

    /// Computes one outcome per task, in order.
    fn map(
        &self,
        ctx: &mut StageContext<'_>,
        tasks: &[Task<Self::In>],
    ) -> Result<Vec<Outcome<Vec<Self::Out>>>, Failure>;
}

/// Looks up rows of earlier table versions by their keys.
pub type Known<'a> = &'a mut dyn FnMut(&str) -> Result<Option<RecordBatch>, Failure>;

/// A [`RowStage`] in the form that the runner uses, with record batches as input and output.
pub trait BatchStage {
    fn input(&self) -> &TableName;
    fn part_groups(&self) -> u32;
    fn schema(&self) -> SchemaRef;
    /// Returns the columns of the input that the stage reads.
    fn reads(&self) -> SchemaRef;

    /// Builds a part. `rows` holds its groups one after another, and `lengths` their numbers of
    /// rows. Rows that `known` finds by their group's key are reused. Returns the outcomes in the
    /// order of the groups and the number of rows that were computed.
    fn make(
        &self,
        ctx: &mut StageContext<'_>,
        rows: &[RecordBatch],
        lengths: &[usize],
        base: &Key,
        known: Known<'_>,
    ) -> Result<(Vec<Outcome<RecordBatch>>, u64), Failure>;
}

impl<M: RowStage> BatchStage for M {
    fn input(&self) -> &TableName {
        RowStage::input(self)
    }

    fn part_groups(&self) -> u32 {
        RowStage::part_groups(self)
    }

    fn schema(&self) -> SchemaRef {
        M::Out::schema()
    }

    fn reads(&self) -> SchemaRef {
        M::In::schema()
    }

    fn make(
        &self,
        ctx: &mut StageContext<'_>,
        rows: &[RecordBatch],
        lengths: &[usize],
        base: &Key,
        known: Known<'_>,
    ) -> Result<(Vec<Outcome<RecordBatch>>, u64), Failure> {
        let mut inputs = Vec::with_capacity(lengths.iter().sum());
        for batch in rows {
            inputs.extend(M::In::from_batch(batch)?);
        }
        let mut inputs = inputs.into_iter();
        let mut tasks = Vec::new();
        let mut found = Vec::with_capacity(lengths.len());
        for &length in lengths {
            let rows: Vec<M::In> = inputs.by_ref().take(length).collect();
            let key = self.key(ctx, &rows, base.clone())?.finish();
            let earlier = known(&key)?;
            if earlier.is_none() {
                tasks.push(Task { key, rows });
            }
            found.push(earlier);
        }
        let made = if tasks.is_empty() {
            Vec::new()
        } else {
            self.map(ctx, &tasks)?
        };
        assert_eq!(made.len(), tasks.len(), "one outcome per task");
        let mut made = made.into_iter();
        let mut outcomes = Vec::new();
        // Consecutive computed rows are joined into one batch.
        let mut waiting: Vec<M::Out> = Vec::new();
        let mut computed = 0;
        for earlier in found {
            if let Some(rows) = earlier {
                if !waiting.is_empty() {
                    outcomes.push(Outcome::Rows(M::Out::to_batch(&waiting)));
                    waiting.clear();
                }
                outcomes.push(Outcome::Rows(rows));
                continue;
            }
            match made.next().expect("one outcome per task") {
                Outcome::Rows(rows) => {
                    computed += rows.len() as u64;
                    waiting.extend(rows);
                }
                Outcome::SetAside { id, class, reason } => {
                    outcomes.push(Outcome::SetAside { id, class, reason });
                }
            }
        }
        if !waiting.is_empty() {
            outcomes.push(Outcome::Rows(M::Out::to_batch(&waiting)));
        }
        Ok((outcomes, computed))
    }
}

/// A record as read from a user's file.
pub struct Record {
    /// The record's place in the file: `record 3`, `line 3` or `row 3`.
    pub place: String,
    /// The fields, or the reason why they cannot be read.
    pub fields: Result<serde_json::Value, String>,
    /// Images embedded in the file itself, instead of paths to them.
    pub embedded: Vec<tables::ImageFile>,
    /// The values of the columns that `keep` names.
    pub kept: Vec<(String, String)>,
}

/// The rows, images and rejects that some records were converted to.
pub struct Loaded {
    pub rows: RecordBatch,
    /// The images that the rows name, with the frames of `videos`. Those that the run already has are
    /// skipped.
    pub images: Vec<Image>,
    /// The videos that were decoded.
    pub videos: Vec<Video>,
    pub rejects: Vec<(String, RejectClass, String)>,
}

/// Work that loads a user's file.
pub trait LoadStage {
    /// Returns the records in order, read lazily.
    fn records(&self) -> Result<Box<dyn Iterator<Item = Result<Record, Failure>> + Send>, Failure>;

    /// Returns the files of images and videos that a record names, each with the largest size that is
    /// read, in bytes.
    fn media(&self, record: &Record) -> Vec<(PathBuf, u64)>;

    /// Counts the ignored keys of records, whether they are loaded now or were loaded before the
    /// run was interrupted.
    fn validate(&mut self, records: &[Record]);

    /// Returns notes about the records so far: their ignored keys, and their images outside the
    /// allowed folders.
    fn notes(&self) -> Vec<String>;

    /// Returns the reason why the table cannot be used, once all records were validated: a named column
    /// that none of them has.
    fn fault(&self) -> Option<Failure>;

    /// Restores the loader's state from rows that were loaded before the run was interrupted.
    fn resume(&mut self, rows: &RecordBatch) -> Result<(), Failure>;

    /// Returns how many of the next records to load at once, so that their decoded media fit into
    /// memory.
    fn at_once(&self, records: &[Record]) -> usize;

    /// Converts the next records to rows. `known` has the images and videos of the run.
    fn load(&mut self, records: Vec<Record>, known: &mut Media) -> Result<Loaded, Failure>;
}

/// Work that builds a table of few rows from whole tables, in one piece.
pub trait ComputeStage {
    fn compute(&self, tables: &WholeTables<'_>) -> Result<RecordBatch, Failure>;
}

/// The tables of a run as a [`ComputeStage`] reads them.
pub struct WholeTables<'a> {
    /// The files of the stage's input tables in this round.
    pub files: HashMap<TableName, Vec<PathBuf>>,
    /// The files of the table `images`.
    pub images: Vec<PathBuf>,
    /// The public names of the judges of input tables of rewards.
    pub judges: HashMap<TableName, String>,
    /// Returns true once the run has been interrupted.
    pub stopping: &'a dyn Fn() -> bool,
}

impl WholeTables<'_> {
    /// Calls `take` with the rows of a table, in order; only the columns of `R` are read.
    pub fn each<R: Row>(
        &self,
        table: &TableName,
        take: impl FnMut(R) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.read(self.files.get(table).cloned().unwrap_or_default(), take)
    }

    /// Returns all rows of a table.
    pub fn rows<R: Row>(&self, table: &TableName) -> Result<Vec<R>, Failure> {
        let mut rows = Vec::new();
        self.each(table, |row| {
            rows.push(row);
            Ok(())
        })?;
        Ok(rows)
    }

    /// Calls `take` with the rows of the table `images`.
    pub fn each_image<R: Row>(
        &self,
        take: impl FnMut(R) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.read(self.images.clone(), take)
    }

    fn read<R: Row>(
        &self,
        files: Vec<PathBuf>,
        mut take: impl FnMut(R) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        for batch in TableReader::new(files).only(R::schema()) {
            if (self.stopping)() {
                return Err(Failure::Interrupted);
            }
            for row in R::from_batch(&batch?)? {
                take(row)?;
            }
        }
        Ok(())
    }
}

/// Work that is one query over the current tables of the pipeline.
pub struct Query {
    pub sql: String,
}

/// Work that is an external command.
pub struct Command<'a> {
    /// The program and its arguments.
    pub words: &'a [String],
    /// The table that the command reads.
    pub input: &'a TableName,
    /// The working folder.
    pub folder: &'a Path,
    /// The environment variables that it inherits.
    pub env: &'a Inherited,
}

/// Work that processes its input in ordered steps and ends in a checkpoint.
pub trait TrainStage {
    /// Returns the table of training examples.
    fn input(&self) -> &TableName;

    fn model(&self) -> &ModelName;

    /// Returns the row positions of each step, with the epoch, counted from 1.
    fn batches(
        &self,
        ctx: &StageContext<'_>,
        rows: &mut Lookup,
    ) -> Result<Vec<(u32, Vec<u32>)>, Failure>;

    /// Returns the number of steps between saved training states.
    fn save_every(&self) -> u32;

    /// Returns the number of saved training states to keep.
    fn keep_last(&self) -> u32;

    fn schema(&self) -> SchemaRef;

    /// Returns a table that is required before the first step: its name and the work that builds
    /// it.
    fn before(&self, _table: &TableName) -> Option<(TableName, Box<dyn BatchStage + '_>)> {
        None
    }

    /// Returns the settings that are key inputs of that table, besides its inputs and models.
    fn before_settings(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Opens the trainer for `steps` steps. `before` looks up rows of the table that is required
    /// before the first step.
    fn begin(
        &self,
        ctx: &mut StageContext<'_>,
        steps: usize,
        before: Option<Lookup>,
    ) -> Result<Box<dyn TrainingRun + '_>, Failure>;
}

/// A training in progress.
pub trait TrainingRun {
    /// Validates rows to train on before the first step; fails at one that cannot be trained on.
    fn validate(
        &mut self,
        _scope: &mut StageContext<'_>,
        _rows: &RecordBatch,
    ) -> Result<(), Failure> {
        Ok(())
    }

    /// Returns a description of how the training runs, available once the rows have been validated.
    fn plan(&self) -> Option<String> {
        None
    }

    /// Runs one optimizer step on `rows` of the input. Returns its report, a row of the table.
    fn step(
        &mut self,
        ctx: &mut StageContext<'_>,
        number: u32,
        epoch: u32,
        rows: &RecordBatch,
    ) -> Result<RecordBatch, Failure>;

    /// Returns the trainer, whose state can be saved and restored.
    fn trainer(&mut self) -> &mut dyn Trainer;
}

/// See [`StageContext::seed_for`].
fn seed_for(seed: u64, table: &str, round: Option<u32>, what: &str) -> u64 {
    let round = round.map_or_else(String::new, |round| round.to_string());
    let key = Key::new("seed").with(seed.to_le_bytes());
    key.with(table).with(round).with(what).finish_u64()
}

/// Returns the steps, from 1, that train on row number `row` of `rows`, each with its epoch, if rows
/// are not grouped by length. `table` is that of the training stage, in a round.
pub fn steps_with(
    (seed, table, round): (u64, &str, Option<u32>),
    row: u32,
    rows: usize,
    (epochs, batch): (u32, u32),
) -> Vec<(u32, u32)> {
    let steps_an_epoch = rows.div_ceil(batch as usize) as u32;
    let step = |epoch: u32| {
        let mut order: Vec<u32> = (0..rows as u32).collect();
        shuffle(&mut order, seed_for(seed, table, round, &of_epoch(epoch)));
        let place = order.iter().position(|&other| other == row)?;
        Some((
            (epoch - 1) * steps_an_epoch + place as u32 / batch + 1,
            epoch,
        ))
    };
    (1..=epochs).filter_map(step).collect()
}

/// The purpose of the seed that shuffles an epoch.
fn of_epoch(epoch: u32) -> String {
    format!("epoch {epoch}")
}

/// Steps whose rows are sorted by length together when similar lengths are grouped, as in the
/// Hugging Face `Trainer`.
const STEPS_SORTED: usize = 50;

/// Returns the steps of a training on `rows` rows, `batch` rows each, shuffled anew in every epoch.
/// With the `lengths` of all rows, the rows of [`STEPS_SORTED`] steps at a time are sorted, longest
/// first, before they are split into steps.
pub fn shuffled_batches(
    ctx: &StageContext<'_>,
    rows: usize,
    epochs: u32,
    batch: u32,
    lengths: Option<&[usize]>,
) -> Vec<(u32, Vec<u32>)> {
    let mut batches = Vec::new();
    for epoch in 1..=epochs {
        let mut order: Vec<u32> = (0..rows as u32).collect();
        shuffle(&mut order, ctx.seed_for(&of_epoch(epoch)));
        if let Some(lengths) = lengths {
            for some in order.chunks_mut(batch as usize * STEPS_SORTED) {
                some.sort_by_key(|&row| std::cmp::Reverse(lengths[row as usize]));
            }
        }
        let steps = order.chunks(batch as usize);
        batches.extend(steps.map(|step| (epoch, step.to_vec())));
    }
    batches
}

/// Shuffles with Fisher–Yates, with random numbers that depend only on the seed and the position.
fn shuffle(order: &mut [u32], seed: u64) {
    for last in (1..order.len()).rev() {
        let draw = Key::new("shuffle")
            .with(seed.to_le_bytes())
            .with((last as u64).to_le_bytes())
            .finish_u64();
        // The modulo bias is below 2^-32 for any table that fits on a disk.
        order.swap(last, (draw % (last as u64 + 1)) as usize);
    }
}

/// Returns rows for the table `rejects`, with secrets masked.
pub fn rejects(
    scope_table: &TableName,
    round: Option<u32>,
    set_aside: Vec<(String, RejectClass, String)>,
    mask: &Mask,
) -> Vec<Reject> {
    let round = round.map(u32::cast_signed);
    let stage = scope_table.as_str();
    let row = |(id, class, reason): (String, RejectClass, String)| Reject {
        stage: stage.to_owned(),
        round,
        id: mask.hide(&id),
        class,
        reason: mask.hide(&reason),
    };
    set_aside.into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::super::test_pipeline::{TestPipeline, candidate, prompt, table};
    use super::*;
    use ovchat_data::tables::{Candidate, Prompt};

    /// Answers each prompt with its question, and rejects prompts without one.
    struct Echo {
        input: TableName,
        /// The prompts that were computed.
        computed: RefCell<Vec<String>>,
    }

    impl RowStage for Echo {
        type In = Prompt;
        type Out = Candidate;

        fn input(&self) -> &TableName {
            &self.input
        }

        fn part_groups(&self) -> u32 {
            64
        }

        fn key(
            &self,
            _: &mut StageContext<'_>,
            group: &[Prompt],
            key: Key,
        ) -> Result<Key, Failure> {
            Ok(key.with(&group[0].prompt_id))
        }

        fn map(
            &self,
            _: &mut StageContext<'_>,
            tasks: &[Task<Prompt>],
        ) -> Result<Vec<Outcome<Vec<Candidate>>>, Failure> {
            let outcome = |task: &Task<Prompt>| {
                let prompt = &task.rows[0];
                self.computed.borrow_mut().push(prompt.prompt_id.clone());
                if prompt.question.is_empty() {
                    return Outcome::fault(&prompt.prompt_id, "no question");
                }
                let answer = Candidate {
                    row_key: task.key.clone(),
                    ..candidate(&prompt.prompt_id, 0, &prompt.question)
                };
                Outcome::Rows(vec![answer])
            };
            Ok(tasks.iter().map(outcome).collect())
        }
    }

    #[test]
    fn known_rows_are_reused_and_all_outcomes_keep_their_order() {
        let echo = Echo {
            input: table("prompts"),
            computed: RefCell::default(),
        };
        let prompts = ["a", "b", "c", "d"].map(|id| prompt(id, if id == "c" { "" } else { id }));
        let rows = Prompt::to_batch(&prompts);
        let base = Key::new("row");
        let known_key = base.clone().with("b").finish();
        let earlier = Candidate::to_batch(&[candidate("b", 0, "earlier")]);
        let mut known = |key: &str| Ok::<_, Failure>((key == known_key).then(|| earlier.clone()));
        let (outcomes, computed) = TestPipeline::new()
            .with_context(|ctx| echo.make(ctx, &[rows], &[1; 4], &base, &mut known))
            .unwrap();
        assert_eq!(computed, 2);
        assert_eq!(*echo.computed.borrow(), ["a", "c", "d"]);
        let mut texts = Vec::new();
        for outcome in outcomes {
            match outcome {
                Outcome::Rows(rows) => {
                    let rows = Candidate::from_batch(&rows).unwrap();
                    texts.extend(rows.into_iter().map(|row| row.text));
                }
                Outcome::SetAside { id, reason, .. } => texts.push(format!("{id}: {reason}")),
            }
        }
        assert_eq!(texts, ["a", "earlier", "c: no question", "d"]);
    }

    #[test]
    fn seeds_differ_by_purpose_and_rejects_hide_secrets() {
        let mut pipeline = TestPipeline::new();
        let seeds = pipeline.with_context(|ctx| [ctx.seed_for("a"), ctx.seed_for("b")]);
        assert_ne!(seeds[0], seeds[1]);
        let again = TestPipeline::new().with_context(|ctx| ctx.seed_for("a"));
        assert_eq!(again, seeds[0]);
        let mask = Mask::new([("TOKEN", "hunter2hunter2")]);
        let reject = (
            "a".to_owned(),
            RejectClass::Fault,
            "cannot read /hunter2hunter2/a.png".to_owned(),
        );
        let rows = rejects(&table("prompts"), Some(1), vec![reject], &mask);
        assert!(!rows[0].reason.contains("hunter2"), "{}", rows[0].reason);
        assert_eq!((&*rows[0].stage, rows[0].round), ("prompts", Some(1)));
    }
}
