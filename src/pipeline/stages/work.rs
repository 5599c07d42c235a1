//! The kinds of work a stage can be, and what it is given to do it with.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use super::exec::Inherited;
use super::{InputTables, ModelName, ModelState, TableName};
use ovchat_data::store::{Key, Lookup, StoreError};
use ovchat_data::tables::{self, Image, Misfit, Reject, RejectClass, Row};
use ovchat_io::mask::Mask;
use ovchat_models::{
    self as models, DpoSettings, DpoTrainer, Judge, ModelError, ModelTelemetry, Policy,
    RewardSettings, RewardTrainer, RowFault, SftSettings, SftTrainer, Trainer,
};
use ovchat_query::QueryError;

/// What the runner has to do to make a stage's table.
pub enum StageKind<'a> {
    /// Records of a user's file become rows.
    Load(Box<dyn LoadStage + 'a>),
    /// Groups of rows in, groups of rows out, each group for itself.
    Rows(Box<dyn BatchStage + 'a>),
    /// One query makes the table.
    Query(Query),
    /// Ordered steps that end in a checkpoint.
    Train(Box<dyn TrainStage + 'a>),
    /// A program of the user makes the table.
    Command(Command<'a>),
}

/// Why a stage can't go on. What was committed before stays.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Store(StoreError),
    #[error("model `{model}`: {error}")]
    Model { model: ModelName, error: ModelError },
    #[error(transparent)]
    Query(#[from] QueryError),
    /// A file of the user is not what it must be.
    #[error("{}{place}: {problem}", path.display())]
    Input {
        path: PathBuf,
        place: String,
        problem: String,
    },
    #[error(transparent)]
    Misfit(#[from] Misfit),
    /// Anything that has no better name, in words that say the way out.
    #[error("{0}")]
    Other(String),
    /// People have to do something first; in words.
    #[error("{0}")]
    Waiting(String),
    /// The user or the system asked to stop.
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
    /// Names the model at which something went wrong.
    pub fn of(model: &ModelName) -> impl FnOnce(ModelError) -> Self {
        let model = model.clone();
        move |error| Self::Model { model, error }
    }
}

/// The models of the pipeline as they are in this round. A model is opened when a stage asks for
/// it and dropped when the stage is done.
pub trait Models {
    fn policy(&mut self, model: &ModelName) -> Result<&mut dyn Policy, Failure>;
    fn judge(&mut self, model: &ModelName) -> Result<&mut dyn Judge, Failure>;
    /// A learner that starts from the model as it is for this stage in this round.
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
    /// A learner that learns nothing: a model in one of its states, which a learner is compared with.
    fn reference(
        &mut self,
        model: &ModelName,
        state: ModelState,
        settings: &DpoSettings,
    ) -> Result<Box<dyn DpoTrainer>, Failure>;
    /// Whether the model, a judge, scores answers by comparing those to one prompt.
    fn compares(&self, model: &ModelName) -> bool;
    /// What decides what the model computes.
    fn fingerprint(&self, model: &ModelName, state: ModelState) -> &str;
    /// Whether the prompt and `answer_tokens` more fit into the model's context, from the headers of
    /// its pictures and the text alone, without opening the model.
    fn fits(
        &mut self,
        model: &ModelName,
        prompt: &models::ChatPrompt,
        answer_tokens: usize,
    ) -> Result<Result<(), RowFault>, Failure>;
}

/// What a stage works with.
pub struct StageContext<'a> {
    /// The table being made.
    pub table: &'a TableName,
    /// `None` when it is made once for all rounds.
    pub round: Option<u32>,
    /// The pipeline's seed.
    pub seed: u64,
    pub models: &'a mut dyn Models,
    pub input_tables: &'a mut InputTables,
    /// Whether somebody asked to stop.
    pub stopping: &'a dyn Fn() -> bool,
    /// Told how many rows of the input are done, for the progress bar.
    pub progress: &'a mut dyn FnMut(u64),
    /// Takes what a network did.
    pub telemetry: &'a mut ModelTelemetry,
    /// Told, before a network begins, how much it computes at once; shown once a run.
    pub say: &'a mut dyn FnMut(&str),
}

impl StageContext<'_> {
    /// A seed that depends on the pipeline's seed, the table, the round and what is drawn for.
    pub fn seed_for(&self, what: &str) -> u64 {
        let round = self
            .round
            .map_or_else(String::new, |round| round.to_string());
        let key = Key::new("seed").with(self.seed.to_le_bytes());
        key.with(self.table.as_str())
            .with(round)
            .with(what)
            .finish_u64()
    }

    /// Break when somebody asked to stop.
    pub fn go_on(&self) -> ControlFlow<()> {
        if (self.stopping)() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

/// Takes into a key all that a model is shown of a prompt. Its id alone would not do: an `sql` stage
/// may keep the id and change the rest.
pub fn shown(
    key: Key,
    image_ids: &[String],
    system: Option<&str>,
    turns: &[tables::Turn],
    question: &str,
) -> Key {
    let mut key = key.with((image_ids.len() as u64).to_le_bytes());
    for id in image_ids {
        key = key.with(id);
    }
    key = key
        .with(if system.is_some() { "+" } else { "-" })
        .with(system.unwrap_or_default());
    for turn in turns {
        key = key.with(turn.role.as_str()).with(&turn.text);
    }
    key.with(question)
}

/// Turns of a table's row as models take them.
pub fn turns(turns: &[tables::Turn]) -> Vec<models::ChatTurn> {
    let role = |role| match role {
        tables::Role::User => models::ChatRole::User,
        tables::Role::Assistant => models::ChatRole::Assistant,
    };
    turns
        .iter()
        .map(|turn| models::ChatTurn {
            role: role(turn.role),
            text: turn.text.clone(),
        })
        .collect()
}

/// What became of one group of rows.
pub enum Outcome<T> {
    TableVersion(T),
    /// The group was set aside.
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

/// A group of input rows that belong together (those of one prompt), and its key.
pub struct Task<R> {
    /// What decides the group's output: becomes `row_key`.
    pub key: String,
    pub rows: Vec<R>,
}

/// Work that treats each group of rows for itself. A group is all rows with one `prompt_id`.
pub trait RowStage {
    type In: Row;
    type Out: Row;

    /// The table whose groups are worked on.
    fn input(&self) -> &TableName;

    /// Groups that are computed, committed and resumed as one.
    fn part_groups(&self) -> u32;

    /// Takes into `key` everything of the group that decides its output. Settings, models and, where
    /// the stage draws, seed and round are in it already.
    fn key(&self, ctx: &mut StageContext<'_>, group: &[Self::In], key: Key)
    -> Result<Key, Failure>;

    /// One outcome per task, in order.
    fn map(
        &self,
        ctx: &mut StageContext<'_>,
        tasks: &[Task<Self::In>],
    ) -> Result<Vec<Outcome<Vec<Self::Out>>>, Failure>;
}

/// Hands out the rows of earlier makings by their keys.
pub type Known<'a> = &'a mut dyn FnMut(&str) -> Result<Option<RecordBatch>, Failure>;

/// A [`RowStage`] as the runner sees it: record batches in and out.
pub trait BatchStage {
    fn input(&self) -> &TableName;
    fn part_groups(&self) -> u32;
    fn schema(&self) -> SchemaRef;
    /// The columns of the input that it reads.
    fn reads(&self) -> SchemaRef;

    /// Makes a part. `rows` holds its groups one after another, `lengths` how many rows each has. Rows
    /// that are known by their group's key are taken over. Returns what came out, in the order of the
    /// groups, and how many rows of it were computed.
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
        // Rows that were computed one after another become one batch.
        let mut waiting: Vec<M::Out> = Vec::new();
        let mut computed = 0;
        for earlier in found {
            if let Some(rows) = earlier {
                if !waiting.is_empty() {
                    outcomes.push(Outcome::TableVersion(M::Out::to_batch(&waiting)));
                    waiting.clear();
                }
                outcomes.push(Outcome::TableVersion(rows));
                continue;
            }
            match made.next().expect("one outcome per task") {
                Outcome::TableVersion(rows) => {
                    computed += rows.len() as u64;
                    waiting.extend(rows);
                }
                Outcome::SetAside { id, class, reason } => {
                    outcomes.push(Outcome::SetAside { id, class, reason });
                }
            }
        }
        if !waiting.is_empty() {
            outcomes.push(Outcome::TableVersion(M::Out::to_batch(&waiting)));
        }
        Ok((outcomes, computed))
    }
}

/// A record of a user's file, as it was read.
pub struct Record {
    /// Where it stands: `record 3` or `line 3`.
    pub place: String,
    /// The fields, or why there are none.
    pub fields: Result<serde_json::Value, String>,
    /// Pictures that the file itself holds, instead of paths to them.
    pub embedded: Vec<tables::ImageFile>,
}

/// What became of some records.
pub struct Loaded {
    pub rows: RecordBatch,
    /// The pictures that the rows name; those that the run has are passed over.
    pub images: Vec<Image>,
    pub rejects: Vec<(String, RejectClass, String)>,
}

/// Work that reads a user's file.
pub trait LoadStage {
    /// The records in their order, read as they are asked for.
    fn records(&self) -> Result<Box<dyn Iterator<Item = Result<Record, Failure>> + Send>, Failure>;

    /// The files that a record names.
    fn images(&self, record: &Record) -> Vec<PathBuf>;

    /// Takes notice of records, loaded now or before the run was interrupted: of their keys, those that
    /// are not read.
    fn validate(&mut self, records: &[Record]);

    /// What there is to say of the records so far: their keys that are not read, their pictures that lie
    /// elsewhere.
    fn notes(&self) -> Vec<String>;

    /// Takes notice of rows that were loaded before the run was interrupted.
    fn resume(&mut self, rows: &RecordBatch) -> Result<(), Failure>;

    /// Makes rows of the next records.
    fn load(&mut self, records: Vec<Record>) -> Result<Loaded, Failure>;
}

/// Work that is one query over tables of the pipeline, as they are in this round.
pub struct Query {
    pub sql: String,
}

/// Work that a program of the user does.
pub struct Command<'a> {
    /// The program and its arguments.
    pub words: &'a [String],
    /// The table that it reads.
    pub input: &'a TableName,
    /// Where it runs.
    pub folder: &'a Path,
    /// What it inherits.
    pub env: &'a Inherited,
}

/// Work that goes through its input in ordered steps and ends in a checkpoint.
pub trait TrainStage {
    /// The table whose rows are learned from.
    fn input(&self) -> &TableName;

    fn model(&self) -> &ModelName;

    /// The positions of the rows of each step; with the epoch, from 1.
    fn batches(
        &self,
        ctx: &StageContext<'_>,
        rows: &mut Lookup,
    ) -> Result<Vec<(u32, Vec<u32>)>, Failure>;

    /// Steps between two saved states.
    fn save_every(&self) -> u32;

    /// Saved states that are kept.
    fn keep_last(&self) -> u32;

    fn schema(&self) -> SchemaRef;

    /// A table that has to be there before the first step: its name and the work that makes it.
    fn before(&self, _table: &TableName) -> Option<(TableName, Box<dyn BatchStage + '_>)> {
        None
    }

    /// The settings that decide that table beside its inputs and models.
    fn before_settings(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Opens the learner for a training of so many steps. `before` looks rows of the table up that
    /// had to be there.
    fn begin(
        &self,
        ctx: &mut StageContext<'_>,
        steps: usize,
        before: Option<Lookup>,
    ) -> Result<Box<dyn TrainingRun + '_>, Failure>;
}

/// A training under way.
pub trait TrainingRun {
    /// Looks rows over that will be trained on, before the first step; fails at one that can't be.
    fn validate(
        &mut self,
        _scope: &mut StageContext<'_>,
        _rows: &RecordBatch,
    ) -> Result<(), Failure> {
        Ok(())
    }

    /// How it goes about it, once the rows were looked over, in words.
    fn plan(&self) -> Option<String> {
        None
    }

    /// One optimizer update on `rows` of the input; its report is a row of the table.
    fn step(
        &mut self,
        ctx: &mut StageContext<'_>,
        number: u32,
        epoch: u32,
        rows: &RecordBatch,
    ) -> Result<RecordBatch, Failure>;

    /// The learner, to be saved and to be set back to a saved state.
    fn trainer(&mut self) -> &mut dyn Trainer;
}

/// Steps whose rows are sorted together where similar lengths are grouped, as in the Hugging Face
/// trainer.
const STEPS_SORTED: usize = 50;

/// The steps of a training on `rows` rows, `batch` rows each, in another order in every epoch. With
/// `lengths` of all rows, those of many steps are sorted, the longest first, before they are cut into
/// steps.
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
        shuffle(&mut order, ctx.seed_for(&format!("epoch {epoch}")));
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

/// Fisher–Yates with numbers that depend on the seed and the position only.
fn shuffle(order: &mut [u32], seed: u64) {
    for last in (1..order.len()).rev() {
        let draw = Key::new("shuffle")
            .with(seed.to_le_bytes())
            .with((last as u64).to_le_bytes())
            .finish_u64();
        // The bias of the remainder is below 2^-32 for any table that fits on a disk.
        order.swap(last, (draw % (last as u64 + 1)) as usize);
    }
}

/// Rows for the table `rejects`, without what is masked.
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
