//! The common part of the training stages: settings, batching and the runner's interface.

use arrow::datatypes::{Schema, SchemaRef};

use super::shown::Shown;
use super::{
    BatchStage, Failure, Input, ModelName, ModelRole, ModelState, NonNegative, Positive, Stage,
    StageContext, StageError, StageKind, TableName, TrainStage, TrainingRun, Use, shuffled_batches,
};
use ovchat_data::store::Lookup;
use ovchat_data::tables::{Pair, Row};
use ovchat_models::{self as models, Example, Optimization, Optimizer, Schedule, TrainingAnswer};

/// A stage that trains a model. [`Stage`] and [`TrainStage`] have blanket implementations for it.
pub trait TrainingStage {
    /// The row type of the training examples.
    type Example: Row;
    /// The row type of the report of a step.
    type Step: Row;
    /// The setting that names the table of training examples.
    const EXAMPLES: &'static str;
    const ROLE: ModelRole;

    fn training(&self) -> TrainingSettings<'_>;

    /// Returns a model that the stage uses besides the trained one.
    fn also_uses(&self) -> Option<Use<'_>> {
        None
    }

    /// Validates settings against each other.
    fn check(&self) -> Result<(), StageError> {
        Ok(())
    }

    /// Returns a function for the approximate length of an example, if examples are grouped by
    /// length.
    fn length(&self) -> Option<fn(&Self::Example) -> usize> {
        None
    }

    /// Returns a table that is required before the first step: its name and the work that builds
    /// it.
    fn before(&self, _table: &TableName) -> Option<(TableName, Box<dyn BatchStage + '_>)> {
        None
    }

    /// Returns the settings that are key inputs of that table, besides its inputs and models.
    fn before_settings(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Opens the trainer. `before` looks up rows of the table that is required before the first
    /// step.
    fn begin(
        &self,
        ctx: &mut StageContext<'_>,
        optimization: Optimization,
        before: Option<Lookup>,
    ) -> Result<Box<dyn TrainingRun + '_>, Failure>;
}

/// The settings common to all training stages.
pub struct TrainingSettings<'a> {
    pub examples: &'a TableName,
    pub model: &'a ModelName,
    pub after: Option<&'a TableName>,
    pub epochs: u32,
    /// Rows per step.
    pub batch: u32,
    pub save_every: u32,
    /// The number of saved training states to keep.
    pub keep_last: u32,
    pub optimizer_settings: OptimizerSettings,
}

impl<T: TrainingStage> Stage for T {
    fn inputs(&self) -> Vec<Input<'_>> {
        let training = self.training();
        let examples = Input {
            field: T::EXAMPLES,
            table: Some(training.examples),
            needs: T::Example::schema(),
            kind: T::Example::KIND,
        };
        let after = training.after.map(|table| Input {
            field: AFTER,
            table: Some(table),
            needs: SchemaRef::new(Schema::empty()),
            kind: "training",
        });
        std::iter::once(examples).chain(after).collect()
    }

    fn uses(&self) -> Vec<Use<'_>> {
        let learns = Use {
            field: "model",
            model: self.training().model,
            role: T::ROLE,
            state: ModelState::Now,
        };
        std::iter::once(learns).chain(self.also_uses()).collect()
    }

    fn kind(&self) -> Option<&'static str> {
        Some(T::Step::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        self.training().optimizer_settings.check()?;
        TrainingStage::check(self)?;
        Ok(T::Step::schema())
    }

    fn draws(&self) -> bool {
        true
    }

    fn unkeyed(&self) -> &'static [&'static str] {
        &["save_every", "keep_last"]
    }

    fn expected_rows(&self, input: u64) -> Option<u64> {
        let training = self.training();
        let steps = input.div_ceil(u64::from(training.batch));
        Some(steps * u64::from(training.epochs))
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Train(Box::new(self))
    }
}

impl<T: TrainingStage> TrainStage for &T {
    fn input(&self) -> &TableName {
        self.training().examples
    }

    fn model(&self) -> &ModelName {
        self.training().model
    }

    fn batches(
        &self,
        ctx: &StageContext<'_>,
        rows: &mut Lookup,
    ) -> Result<Vec<(u32, Vec<u32>)>, Failure> {
        let training = self.training();
        let lengths = match self.length() {
            None => None,
            Some(length) => {
                let mut lengths = Vec::with_capacity(rows.len());
                for start in (0..rows.len()).step_by(ROWS_AT_ONCE) {
                    let batch = rows.range(start, ROWS_AT_ONCE.min(rows.len() - start))?;
                    lengths.extend(T::Example::from_batch(&batch)?.iter().map(length));
                }
                Some(lengths)
            }
        };
        let (epochs, batch) = (training.epochs, training.batch);
        Ok(shuffled_batches(
            ctx,
            rows.len(),
            epochs,
            batch,
            lengths.as_deref(),
        ))
    }

    fn save_every(&self) -> u32 {
        self.training().save_every
    }

    fn keep_last(&self) -> u32 {
        self.training().keep_last
    }

    fn schema(&self) -> SchemaRef {
        T::Step::schema()
    }

    fn before(&self, table: &TableName) -> Option<(TableName, Box<dyn BatchStage + '_>)> {
        TrainingStage::before(*self, table)
    }

    fn before_settings(&self) -> serde_json::Value {
        TrainingStage::before_settings(*self)
    }

    fn begin(
        &self,
        ctx: &mut StageContext<'_>,
        steps: usize,
        before: Option<Lookup>,
    ) -> Result<Box<dyn TrainingRun + '_>, Failure> {
        let optimization = self.training().optimizer_settings.optimization(steps);
        TrainingStage::begin(*self, ctx, optimization, before)
    }
}

/// The setting of a training stage that names the stage of the same round that it continues from.
pub const AFTER: &str = "after";

/// Rows read at once to compute lengths.
const ROWS_AT_ONCE: usize = 1024;

/// The optimizer settings, with the same names in all training stages.
#[derive(Debug, Clone, Copy)]
pub struct OptimizerSettings {
    pub learning_rate: Positive,
    pub schedule: Schedule,
    pub warmup: Warmup,
    pub weight_decay: NonNegative,
    pub max_grad_norm: NonNegative,
    pub optimizer: Optimizer,
}

/// The length of the warmup, in which the learning rate rises from 0.
#[derive(Debug, Clone, Copy)]
pub enum Warmup {
    /// A fraction of the optimizer steps, rounded up as in the Hugging Face `Trainer`.
    Ratio(f64),
    /// A number of optimizer steps.
    Steps(u32),
}

impl OptimizerSettings {
    /// Validates the settings against each other.
    fn check(&self) -> Result<(), StageError> {
        match self.warmup {
            Warmup::Ratio(ratio) if ratio > 1.0 => Err(StageError::at(
                "warmup_ratio",
                format!("{ratio} is above 1"),
                "set a fraction from 0 to 1, e.g. 0.1",
            )),
            _ => Ok(()),
        }
    }

    /// Returns the optimization of a training with `steps` optimizer steps.
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
            // The defaults of torch's AdamW, which the document's scripts do not change.
            adam_betas: [0.9, 0.999],
            adam_epsilon: 1e-8,
            max_grad_norm: self.max_grad_norm.get(),
        }
    }
}

/// Returns a pair as a training example.
pub fn example<'a>(
    pair: &'a Pair,
    prompt: &'a models::ChatPrompt,
    reference: Option<[f64; 2]>,
) -> Example<'a> {
    let answer = |text: &str, token_ids: &Option<Vec<i32>>| TrainingAnswer {
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

/// Returns the prompts of pairs, with the bytes of their images.
pub fn prompts(
    ctx: &mut StageContext<'_>,
    pairs: &[Pair],
) -> Result<Vec<models::ChatPrompt>, Failure> {
    let mut prompts = Vec::with_capacity(pairs.len());
    for pair in pairs {
        let prompt = ctx
            .input_tables
            .chat_prompt(Shown::from(pair), &pair.prompt_id)?;
        prompts.push(models::ChatPrompt {
            captions: pair.captions.clone(),
            ..prompt
        });
    }
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::super::test_pipeline::TestPipeline;
    use super::*;

    fn settings(warmup: Warmup) -> OptimizerSettings {
        OptimizerSettings {
            learning_rate: 1e-5.try_into().unwrap(),
            schedule: Schedule::Cosine,
            warmup,
            weight_decay: 0.0.try_into().unwrap(),
            max_grad_norm: 1.0.try_into().unwrap(),
            optimizer: Optimizer::Adamw,
        }
    }

    #[test]
    fn warmup_is_a_share_rounded_up_or_a_number_of_steps() {
        let warmup_steps = |warmup, steps| settings(warmup).optimization(steps).warmup_steps;
        assert_eq!(warmup_steps(Warmup::Ratio(0.1), 41), 5);
        assert_eq!(warmup_steps(Warmup::Ratio(0.0), 41), 0);
        assert_eq!(warmup_steps(Warmup::Steps(7), 41), 7);
        assert_eq!(settings(Warmup::Ratio(1.0)).check(), Ok(()));
        let error = settings(Warmup::Ratio(1.5)).check().unwrap_err();
        assert_eq!(error.field, Some("warmup_ratio"));
    }

    #[test]
    fn every_epoch_shuffles_all_rows_anew_and_the_same_way_each_time() {
        let mut pipeline = TestPipeline::new();
        let place = pipeline.with_context(|ctx| (ctx.seed, ctx.table.to_string(), ctx.round));
        let mut batches = |lengths: Option<&[usize]>| {
            pipeline.with_context(|ctx| shuffled_batches(ctx, 7, 2, 3, lengths))
        };
        let all = batches(None);
        let sizes: Vec<_> = all
            .iter()
            .map(|(epoch, rows)| (*epoch, rows.len()))
            .collect();
        assert_eq!(sizes, [(1, 3), (1, 3), (1, 1), (2, 3), (2, 3), (2, 1)]);
        let rows = |epoch: u32| -> Vec<u32> {
            let of_epoch = all.iter().filter(|batch| batch.0 == epoch);
            of_epoch.flat_map(|(_, rows)| rows.clone()).collect()
        };
        assert_ne!(rows(1), rows(2));
        for epoch in [1, 2] {
            let mut sorted = rows(epoch);
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4, 5, 6]);
        }
        assert_eq!(batches(None), all);
        for row in 0..7 {
            let found = crate::stages::steps_with((place.0, &place.1, place.2), row, 7, (2, 3));
            let steps = (1..).zip(&all).filter(|(_, (_, rows))| rows.contains(&row));
            let expected: Vec<_> = steps.map(|(step, (epoch, _))| (step, *epoch)).collect();
            assert_eq!(found, expected);
        }
        let by_length = batches(Some(&[1, 9, 2, 8, 3, 7, 4]));
        assert_eq!(by_length[0].1, [1, 3, 5]);
    }
}
