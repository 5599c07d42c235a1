//! What the trainings share: all but what they learn from, how, and what they report.

use arrow::datatypes::{Schema, SchemaRef};

use super::{
    Failure, Fold, Input, MapWork, ModelName, ModelState, NonNegative, Positive, Role, Scope,
    Stage, StageError, TableName, Training, Use, Work, shuffled_batches, turns,
};
use ovchat_data::store::Lookup;
use ovchat_data::tables::{Pair, Row};
use ovchat_models::{self as models, Answer, Example, Optimization, Optimizer, Schedule};

/// A stage that trains a model. [`Stage`] and [`Fold`] are the same for all of them.
pub trait Trains {
    /// What it learns from.
    type Lesson: Row;
    /// What it reports of each step.
    type Step: Row;
    /// The setting that names the table of lessons.
    const LESSONS: &'static str;
    const ROLE: Role;

    fn course(&self) -> Course<'_>;

    /// A model that it uses beside the one that learns.
    fn also_uses(&self) -> Option<Use<'_>> {
        None
    }

    /// What no single setting shows.
    fn check(&self) -> Result<(), StageError> {
        Ok(())
    }

    /// Roughly how long a lesson is, if those of similar length go into a step.
    fn length(&self) -> Option<fn(&Self::Lesson) -> usize> {
        None
    }

    /// A table that has to be there before the first step: its name and the work that makes it.
    fn before(&self, _table: &TableName) -> Option<(TableName, Box<dyn MapWork + '_>)> {
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
        scope: &mut Scope<'_>,
        optimization: Optimization,
        before: Option<Lookup>,
    ) -> Result<Box<dyn Training + '_>, Failure>;
}

/// The settings that every training has.
pub struct Course<'a> {
    pub lessons: &'a TableName,
    pub model: &'a ModelName,
    pub after: Option<&'a TableName>,
    pub epochs: u32,
    /// Rows of a step.
    pub batch: u32,
    pub save_every: u32,
    /// Saved states that are kept.
    pub keep_last: u32,
    pub recipe: Recipe,
}

impl<T: Trains> Stage for T {
    fn inputs(&self) -> Vec<Input<'_>> {
        let course = self.course();
        let lessons = Input {
            field: T::LESSONS,
            table: Some(course.lessons),
            needs: T::Lesson::schema(),
            kind: T::Lesson::KIND,
        };
        let after = course.after.map(|table| Input {
            field: AFTER,
            table: Some(table),
            needs: SchemaRef::new(Schema::empty()),
            kind: "training",
        });
        std::iter::once(lessons).chain(after).collect()
    }

    fn uses(&self) -> Vec<Use<'_>> {
        let learns = Use {
            field: "model",
            model: self.course().model,
            role: T::ROLE,
            state: ModelState::Now,
        };
        std::iter::once(learns).chain(self.also_uses()).collect()
    }

    fn kind(&self) -> Option<&'static str> {
        Some(T::Step::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        self.course().recipe.check()?;
        Trains::check(self)?;
        Ok(T::Step::schema())
    }

    fn draws(&self) -> bool {
        true
    }

    fn unkeyed(&self) -> &'static [&'static str] {
        &["save_every", "keep_last"]
    }

    fn expected_rows(&self, input: u64) -> Option<u64> {
        let course = self.course();
        let steps = input.div_ceil(u64::from(course.batch));
        Some(steps * u64::from(course.epochs))
    }

    fn work(&self) -> Work<'_> {
        Work::Fold(Box::new(self))
    }
}

impl<T: Trains> Fold for &T {
    fn input(&self) -> &TableName {
        self.course().lessons
    }

    fn model(&self) -> &ModelName {
        self.course().model
    }

    fn batches(
        &self,
        scope: &Scope<'_>,
        rows: &mut Lookup,
    ) -> Result<Vec<(u32, Vec<u32>)>, Failure> {
        let course = self.course();
        let lengths = match self.length() {
            None => None,
            Some(length) => {
                let mut lengths = Vec::with_capacity(rows.len());
                for start in (0..rows.len()).step_by(ROWS_AT_ONCE) {
                    let batch = rows.range(start, ROWS_AT_ONCE.min(rows.len() - start))?;
                    lengths.extend(T::Lesson::from_batch(&batch)?.iter().map(length));
                }
                Some(lengths)
            }
        };
        let (epochs, batch) = (course.epochs, course.batch);
        Ok(shuffled_batches(
            scope,
            rows.len(),
            epochs,
            batch,
            lengths.as_deref(),
        ))
    }

    fn save_every(&self) -> u32 {
        self.course().save_every
    }

    fn keep_last(&self) -> u32 {
        self.course().keep_last
    }

    fn schema(&self) -> SchemaRef {
        T::Step::schema()
    }

    fn before(&self, table: &TableName) -> Option<(TableName, Box<dyn MapWork + '_>)> {
        Trains::before(*self, table)
    }

    fn before_settings(&self) -> serde_json::Value {
        Trains::before_settings(*self)
    }

    fn begin(
        &self,
        scope: &mut Scope<'_>,
        steps: usize,
        before: Option<Lookup>,
    ) -> Result<Box<dyn Training + '_>, Failure> {
        let optimization = self.course().recipe.optimization(steps);
        Trains::begin(*self, scope, optimization, before)
    }
}

/// The setting by which a training names another one of the same round that it goes on from.
pub const AFTER: &str = "after";

/// Rows whose lengths are taken at once.
const ROWS_AT_ONCE: usize = 1024;

/// The settings of the optimizer, which every training has under these names.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    pub learning_rate: Positive,
    pub schedule: Schedule,
    pub warmup: Warmup,
    pub weight_decay: NonNegative,
    pub max_grad_norm: NonNegative,
    pub optimizer: Optimizer,
}

/// How long the learning rate rises from 0.
#[derive(Debug, Clone, Copy)]
pub enum Warmup {
    /// For a share of the updates, rounded up as in the Hugging Face trainer.
    Ratio(f64),
    Steps(u32),
}

impl Recipe {
    /// What no single setting shows.
    fn check(&self) -> Result<(), StageError> {
        match self.warmup {
            Warmup::Ratio(ratio) if ratio > 1.0 => Err(StageError {
                field: Some("warmup_ratio"),
                message: format!("{ratio} is more than all updates"),
                help: Some("give a share from 0 to 1; the usual one is 0.1".to_owned()),
            }),
            _ => Ok(()),
        }
    }

    /// For a training of so many updates.
    pub fn optimization(&self, steps: usize) -> Optimization {
        Optimization {
            learning_rate: self.learning_rate.get(),
            schedule: self.schedule,
            warmup_steps: match self.warmup {
                Warmup::Ratio(ratio) => (steps as f64 * ratio).ceil() as usize,
                Warmup::Steps(steps) => steps as usize,
            },
            steps,
            optimizer: self.optimizer,
            weight_decay: self.weight_decay.get(),
            // torch's AdamW, which the document's scripts leave as it is.
            adam_betas: [0.9, 0.999],
            adam_epsilon: 1e-8,
            max_grad_norm: self.max_grad_norm.get(),
        }
    }
}

/// A pair as learners take it.
pub fn example<'a>(
    pair: &'a Pair,
    prompt: &'a models::Prompt,
    reference: Option<[f64; 2]>,
) -> Example<'a> {
    let answer = |text: &str, token_ids: &Option<Vec<i32>>| Answer {
        text: text.to_owned(),
        token_ids: token_ids.clone(),
    };
    Example {
        id: &pair.row_key,
        prompt,
        chosen: answer(&pair.chosen, &pair.chosen_token_ids),
        rejected: answer(&pair.rejected, &pair.rejected_token_ids),
        reference,
    }
}

/// The prompts of pairs, with the bytes of their pictures.
pub fn prompts(scope: &mut Scope<'_>, pairs: &[Pair]) -> Result<Vec<models::Prompt>, Failure> {
    let mut prompts = Vec::with_capacity(pairs.len());
    for pair in pairs {
        prompts.push(models::Prompt {
            id: pair.prompt_id.clone(),
            pictures: scope.shelf.pictures(&pair.image_ids)?,
            system: pair.system.clone(),
            turns: turns(&pair.turns),
            question: pair.prompt.clone(),
            captions: pair.captions.clone(),
            answer: None,
            seed: 0,
        });
    }
    Ok(prompts)
}
