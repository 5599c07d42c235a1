//! A pipeline for tests of stages: tables of a few rows in a temporary folder, and scripted models
//! whose faults a test chooses.

use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use arrow::array::{AsArray, RecordBatch};
use arrow::compute::concat_batches;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tempfile::TempDir;

use super::WholeTables;
use super::source::{Load, Loadable};
use super::{
    BatchStage, Failure, InputTables, ModelName, ModelState, Models, Outcome, Stage, StageContext,
    StageKind, TableName, TrainStage,
};
use ovchat_data::store::{FileRecord, Images, Key, Lookup, Manifest, Media, TableWriter, digest};
use ovchat_data::tables::{
    Candidate, Finish, Image, ImageFile, Pair, Prompt, Reference, Reward, Row,
};
use ovchat_models::scripted::{ScriptedJudge, ScriptedPolicy, ScriptedTrainer};
use ovchat_models::{
    AnswerGroup, ChatPrompt, DpoSettings, DpoTrainer, Emit, Judge, JudgeScore, ModelError,
    ModelTelemetry, Policy, RewardSettings, RewardTrainer, RowFault, Scripted, SftSettings,
    SftTrainer,
};
use ovchat_query as query;

/// Parses the settings of a stage.
pub fn stage<S: DeserializeOwned>(settings: Value) -> S {
    serde_json::from_value(settings).unwrap()
}

pub fn table(name: &str) -> TableName {
    name.to_owned().try_into().unwrap()
}

/// Returns a prompt without images, whose key and id are `id`.
pub fn prompt(id: &str, question: &str) -> Prompt {
    Prompt {
        row_key: id.to_owned(),
        prompt_id: id.to_owned(),
        id: Some(id.to_owned()),
        image: None,
        image_ids: Vec::new(),
        videos: None,
        system: None,
        turns: Vec::new(),
        question: question.to_owned(),
        captions: None,
        kept: None,
        answer: None,
    }
}

/// Returns the images and videos of an empty run.
pub fn no_media() -> Media {
    let folder = Path::new("runs/test");
    Media::open(folder, &Manifest::new(folder, "test")).unwrap()
}

/// Returns one of the answers to a prompt, with one token a letter.
pub fn candidate(prompt_id: &str, number: i32, text: &str) -> Candidate {
    Candidate {
        row_key: format!("{prompt_id} answers"),
        prompt_id: prompt_id.to_owned(),
        candidate: number,
        text: text.to_owned(),
        token_ids: text.bytes().map(i32::from).collect(),
        token_logps: vec![-1.0; text.len()],
        logp: -(text.len() as f64),
        finish: Finish::Stop,
        seed: 0,
        model: FINGERPRINT.to_owned(),
    }
}

pub fn reward(prompt_id: &str, number: i32, reward: f32) -> Reward {
    Reward {
        row_key: format!("{prompt_id} rewards"),
        prompt_id: prompt_id.to_owned(),
        candidate: number,
        judge: "judge".to_owned(),
        reward,
        reply: None,
        label: None,
        first_score: None,
        second_score: None,
        failure: None,
    }
}

/// Returns a pair written by people, whose key is that of its prompt.
pub fn pair(prompt_id: &str, chosen: &str, rejected: &str) -> Pair {
    Pair {
        row_key: format!("{prompt_id} pair"),
        id: None,
        image: None,
        prompt: "Why?".to_owned(),
        chosen: chosen.to_owned(),
        rejected: rejected.to_owned(),
        prompt_id: prompt_id.to_owned(),
        image_ids: Vec::new(),
        videos: None,
        system: None,
        turns: Vec::new(),
        captions: None,
        kept: None,
        chosen_candidate: None,
        rejected_candidate: None,
        chosen_reward: None,
        rejected_reward: None,
        margin: None,
        chosen_token_ids: None,
        rejected_token_ids: None,
        chosen_logp: None,
        rejected_logp: None,
        model: None,
    }
}

/// The fingerprint of every model.
pub const FINGERPRINT: &str = "scripted";

/// The rows that a stage built, and the ids of rejected groups with the reasons.
pub type Built<R> = (Vec<R>, Vec<(String, String)>);

/// The tables and models of a pipeline in round 1, seed 0.
pub struct TestPipeline {
    folder: TempDir,
    files: HashMap<TableName, Vec<PathBuf>>,
    images: Vec<FileRecord>,
    pub models: TestModels,
    /// True if the run has been interrupted.
    pub is_interrupted: bool,
    /// True if the rows of the reference pass are missing.
    pub lose_references: bool,
    /// The numbers of finished rows that the stage reported.
    pub progress: Vec<u64>,
}

impl TestPipeline {
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            files: HashMap::new(),
            images: Vec::new(),
            models: TestModels::default(),
            is_interrupted: false,
            lose_references: false,
            progress: Vec::new(),
        }
    }

    /// Returns the run folder.
    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file of the user and returns its path.
    pub fn file(&mut self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.root().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Adds an image and returns its id.
    pub fn image(&mut self, bytes: &[u8]) -> String {
        let image = Image {
            image_id: digest(bytes),
            image: ImageFile {
                bytes: Some(bytes.to_vec()),
                path: None,
            },
            width: 1,
            height: 1,
            format: "pnm".to_owned(),
            pixels: None,
            look: None,
        };
        let id = image.image_id.clone();
        let written = Images::write(self.root(), self.images.len(), &[image]);
        self.images.extend(written.unwrap());
        id
    }

    /// Writes a table.
    pub fn table<R: Row>(&mut self, name: &str, rows: &[R]) {
        self.batch(&table(name), &R::to_batch(rows));
    }

    fn batch(&mut self, name: &TableName, rows: &RecordBatch) {
        let mut writer = TableWriter::new(self.root(), name.as_str(), rows.schema(), &[]);
        writer.write(rows).unwrap();
        let written = writer.finish().unwrap();
        let paths = written.iter().map(|file| self.root().join(&file.file));
        let paths = paths.collect();
        self.files.insert(name.clone(), paths);
    }

    /// Returns the rows of a table, in one batch.
    fn rows_of(&self, name: &TableName) -> RecordBatch {
        let mut lookup = Lookup::open(self.files[name].clone(), "row_key").unwrap();
        lookup.range(0, lookup.len()).unwrap()
    }

    /// Runs work in the context of a stage.
    pub fn with_context<T>(&mut self, work: impl FnOnce(&mut StageContext<'_>) -> T) -> T {
        let root = self.root().to_owned();
        let images = Images::open(&root, &self.images).unwrap();
        let mut input_tables = InputTables::new(images, self.files.clone(), root);
        let is_interrupted = self.is_interrupted;
        let progress = &mut self.progress;
        work(&mut StageContext {
            table: &table("built"),
            round: Some(1),
            seed: 0,
            models: &mut self.models,
            input_tables: &mut input_tables,
            stopping: &|| is_interrupted,
            progress: &mut |done| progress.push(done),
            telemetry: &mut ModelTelemetry::default(),
            say: &mut |_| {},
        })
    }

    /// Builds the table of a stage that maps groups of rows.
    pub fn map<R: Row>(&mut self, stage: &dyn Stage) -> Result<Built<R>, Failure> {
        let StageKind::Rows(work) = stage.work() else {
            panic!("not a stage of rows")
        };
        self.map_batches(&*work)
    }

    /// Builds the rows of work that maps groups of rows.
    pub fn map_batches<R: Row>(&mut self, work: &dyn BatchStage) -> Result<Built<R>, Failure> {
        let all = self.rows_of(work.input());
        let schema = all.schema();
        let reads = work.reads();
        let columns: Vec<usize> = reads
            .fields()
            .iter()
            .map(|field| schema.index_of(field.name()).unwrap())
            .collect();
        let rows = all.project(&columns).unwrap();
        let groups = group_lengths(&all);
        let mut known = |_: &str| Ok(None);
        let base = Key::new("row");
        let (outcomes, _) =
            self.with_context(|ctx| work.make(ctx, &[rows], &groups, &base, &mut known))?;
        let mut built = Vec::new();
        let mut rejects = Vec::new();
        for outcome in outcomes {
            match outcome {
                Outcome::Rows(rows) => built.extend(R::from_batch(&rows)?),
                Outcome::SetAside { id, reason, .. } => rejects.push((id, reason)),
            }
        }
        Ok((built, rejects))
    }

    /// Builds the table of a stage that loads a file.
    pub fn load<R: Loadable>(&mut self, stage: &Load<R>) -> Result<Built<R>, Failure> {
        let StageKind::Load(mut work) = stage.work() else {
            panic!("not a loading stage")
        };
        let records = work.records()?.collect::<Result<Vec<_>, _>>()?;
        work.validate(&records);
        let loaded = work.load(records, &mut no_media())?;
        let rejects = loaded.rejects.into_iter();
        let rejects = rejects.map(|(id, _, reason)| (id, reason)).collect();
        Ok((R::from_batch(&loaded.rows)?, rejects))
    }

    /// Builds the table of a stage that is one query over the tables `inputs`.
    pub fn query(&mut self, stage: &dyn Stage, inputs: &[&str]) -> Result<RecordBatch, Failure> {
        let StageKind::Query(work) = stage.work() else {
            panic!("not a query stage")
        };
        let inputs = inputs
            .iter()
            .map(|name| (*name, vec![self.rows_of(&table(name))]));
        let batches = query::over(&work.sql, &[], inputs)?;
        Ok(concat_batches(&batches[0].schema(), &batches).unwrap())
    }

    /// Builds the table of a stage that computes it from whole tables.
    pub fn compute(&mut self, stage: &dyn Stage) -> Result<RecordBatch, Failure> {
        let images = self.images.iter().map(|file| self.root().join(&file.file));
        self.compute_with(stage, images.collect())
    }

    /// Builds such a table with the files of a table in place of the images.
    pub fn compute_with(
        &mut self,
        stage: &dyn Stage,
        images: Vec<PathBuf>,
    ) -> Result<RecordBatch, Failure> {
        let StageKind::Compute(work) = stage.work() else {
            panic!("not a stage that computes from whole tables")
        };
        work.compute(&WholeTables {
            judges: std::collections::HashMap::new(),
            files: self.files.clone(),
            images,
            stopping: &|| self.is_interrupted,
        })
    }

    /// Returns the files of a table.
    pub fn files_of(&self, name: &str) -> Vec<PathBuf> {
        self.files[&table(name)].clone()
    }

    /// Runs a training and returns its steps.
    pub fn train<R: Row>(&mut self, stage: &dyn Stage) -> Result<Vec<R>, Failure> {
        let StageKind::Train(work) = stage.work() else {
            panic!("not a training stage")
        };
        let before = match work.before(&table("built")) {
            None => None,
            Some((name, work)) => {
                let (mut rows, _) = self.map_batches(&*work)?;
                if self.lose_references {
                    rows.clear();
                }
                self.table::<Reference>(name.as_str(), &rows);
                Some(Lookup::open(self.files[&name].clone(), "pair")?)
            }
        };
        let files = self.files[work.input()].clone();
        self.with_context(|ctx| steps(ctx, &*work, files, before))
    }
}

fn steps<R: Row>(
    ctx: &mut StageContext<'_>,
    work: &dyn TrainStage,
    files: Vec<PathBuf>,
    before: Option<Lookup>,
) -> Result<Vec<R>, Failure> {
    let mut examples = Lookup::open(files, "row_key")?;
    let batches = work.batches(ctx, &mut examples)?;
    let mut training = work.begin(ctx, batches.len(), before)?;
    training.validate(ctx, &examples.range(0, examples.len())?)?;
    let mut steps = Vec::new();
    for (number, (epoch, positions)) in (1..).zip(batches) {
        let rows = positions
            .iter()
            .map(|&position| examples.range(position as usize, 1));
        let rows = rows.collect::<Result<Vec<_>, _>>()?;
        let rows = concat_batches(&rows[0].schema(), &rows).unwrap();
        steps.extend(R::from_batch(&training.step(ctx, number, epoch, &rows)?)?);
    }
    Ok(steps)
}

/// Returns the number of rows of each prompt; the rows of a prompt are adjacent.
fn group_lengths(rows: &RecordBatch) -> Vec<usize> {
    let ids = rows.column_by_name("prompt_id").unwrap().as_string::<i32>();
    let ids: Vec<_> = ids.iter().collect();
    ids.chunk_by(|a, b| a == b).map(<[_]>::len).collect()
}

/// Scripted models.
#[derive(Default)]
pub struct TestModels {
    open: Option<Box<dyn Policy>>,
    judge: Option<Box<dyn Judge>>,
    /// The id of a prompt that does not fit into the model's context.
    pub too_long: Option<&'static str>,
    /// The id of a prompt that the judge cannot score.
    pub unscored: Option<&'static str>,
    /// True if no model can be opened.
    pub is_missing: bool,
}

impl TestModels {
    fn opened(&self, model: &ModelName) -> Result<(), Failure> {
        if !self.is_missing {
            return Ok(());
        }
        let error = ModelError::Weights {
            path: "model.safetensors".into(),
            problem: "not found".to_owned(),
        };
        Err(Failure::of(model)(error))
    }
}

impl Models for TestModels {
    fn policy(&mut self, model: &ModelName) -> Result<&mut dyn Policy, Failure> {
        self.opened(model)?;
        let policy = Box::new(ScriptedPolicy::new(&Scripted::default()));
        Ok(&mut **self.open.insert(policy))
    }

    fn judge(&mut self, model: &ModelName) -> Result<&mut dyn Judge, Failure> {
        self.opened(model)?;
        let judge = Box::new(FaultyJudge {
            unscored: self.unscored,
        });
        Ok(&mut **self.judge.insert(judge))
    }

    fn dpo_trainer(
        &mut self,
        model: &ModelName,
        settings: &DpoSettings,
    ) -> Result<Box<dyn DpoTrainer>, Failure> {
        self.opened(model)?;
        let trainer = ScriptedTrainer::open(&Scripted::default(), &settings.optimization);
        Ok(Box::new(trainer.map_err(Failure::of(model))?))
    }

    fn sft_trainer(
        &mut self,
        model: &ModelName,
        settings: &SftSettings,
    ) -> Result<Box<dyn SftTrainer>, Failure> {
        self.opened(model)?;
        let trainer = ScriptedTrainer::open(&Scripted::default(), &settings.optimization);
        Ok(Box::new(trainer.map_err(Failure::of(model))?))
    }

    fn reward_trainer(
        &mut self,
        model: &ModelName,
        settings: &RewardSettings,
    ) -> Result<Box<dyn RewardTrainer>, Failure> {
        self.opened(model)?;
        let trainer = ScriptedTrainer::open(&Scripted::default(), &settings.optimization);
        Ok(Box::new(trainer.map_err(Failure::of(model))?))
    }

    fn reference(
        &mut self,
        model: &ModelName,
        _: ModelState,
        settings: &DpoSettings,
    ) -> Result<Box<dyn DpoTrainer>, Failure> {
        self.dpo_trainer(model, settings)
    }

    fn compares(&self, _: &ModelName) -> bool {
        false
    }

    fn fingerprint(&self, _: &ModelName, _: ModelState) -> &str {
        FINGERPRINT
    }

    fn fits(
        &mut self,
        _: &ModelName,
        prompt: &ChatPrompt,
        _: usize,
    ) -> Result<Result<(), RowFault>, Failure> {
        Ok(if self.too_long == Some(&*prompt.id) {
            Err(RowFault("the prompt is too long".to_owned()))
        } else {
            Ok(())
        })
    }
}

/// The scripted judge, with one prompt that it cannot score.
struct FaultyJudge {
    unscored: Option<&'static str>,
}

impl Judge for FaultyJudge {
    fn score(
        &mut self,
        groups: &[AnswerGroup<'_>],
        emit: Emit<'_, Vec<JudgeScore>>,
    ) -> Result<ModelTelemetry, ModelError> {
        let unscored = self.unscored;
        ScriptedJudge.score(groups, &mut |group, scores| {
            let is_fault = unscored == Some(&*groups[group].prompt.id);
            let fault = || RowFault("no verdict in the reply".to_owned());
            let flow: ControlFlow<()> = emit(group, if is_fault { Err(fault()) } else { scores });
            flow
        })
    }

    fn plan(&self) -> Option<String> {
        None
    }
}
