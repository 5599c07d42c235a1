//! The `train_dpo` stage: training on pairs with direct preference optimization or a related loss.

mod options;
mod reference;
mod settings;

use std::time::Instant;

use arrow::array::RecordBatch;

use self::reference::ReferencePass;
pub use self::settings::TrainDpo;
use super::training::{
    OptimizerSettings, TrainingSettings, TrainingStage, Warmup, example, prompts,
};
use super::{
    BatchStage, Failure, ModelRole, ModelState, StageContext, StageError, TableName, TrainingRun,
    Use,
};
use ovchat_data::store::Lookup;
use ovchat_data::tables::{DpoStep, Pair, Reference, Row};
use ovchat_models::{DpoTrainer, Optimization, Trainer};

/// The default of `warmup_ratio`.
const WARMUP_RATIO: f64 = 0.1;

/// The suffix of the name of a training stage's table of reference log-probabilities.
pub const REFERENCE: &str = "_reference";

impl TrainingStage for TrainDpo {
    type Example = Pair;
    type Step = DpoStep;
    const EXAMPLES: &'static str = "pairs";
    const ROLE: ModelRole = ModelRole::LearnsPairs;

    fn training(&self) -> TrainingSettings<'_> {
        TrainingSettings {
            examples: &self.pairs,
            model: &self.model,
            after: self.after.as_ref(),
            epochs: self.epochs.get(),
            batch: self.batch_pairs.get(),
            save_every: self.save_every.get(),
            keep_last: self.keep_last.get(),
            optimizer_settings: OptimizerSettings {
                learning_rate: self.learning_rate,
                schedule: self.schedule,
                warmup: match (self.warmup_steps, self.warmup_ratio) {
                    (Some(steps), _) => Warmup::Steps(steps),
                    (None, Some(ratio)) => Warmup::Ratio(ratio.get()),
                    (None, None) => Warmup::Ratio(WARMUP_RATIO),
                },
                weight_decay: self.weight_decay,
                max_grad_norm: self.max_grad_norm,
                optimizer: self.optimizer,
            },
        }
    }

    fn also_uses(&self) -> Option<Use<'_>> {
        let (model, state) = self.reference_model()?;
        // At the start of the round, the reference is the model in training, which is used anyway.
        let is_another = state == ModelState::Initial || *model != self.model;
        is_another.then_some(Use {
            field: "reference",
            model,
            role: ModelRole::Reads,
            state,
        })
    }

    fn check(&self) -> Result<(), StageError> {
        self.check_losses()?;
        self.check_parts()
    }

    fn length(&self) -> Option<fn(&Pair) -> usize> {
        fn words(pair: &Pair) -> usize {
            let of = |text: &str| text.split_whitespace().count();
            of(&pair.prompt) + of(&pair.chosen) + of(&pair.rejected)
        }
        self.group_by_length.then_some(words)
    }

    fn before(&self, table: &TableName) -> Option<(TableName, Box<dyn BatchStage + '_>)> {
        self.reference_model()?;
        let name = format!("{table}{REFERENCE}")
            .try_into()
            .expect("a name with a suffix is a name");
        Some((name, Box::new(ReferencePass::new(self))))
    }

    fn before_settings(&self) -> serde_json::Value {
        serde_json::to_value(self.reference_audit).expect("plain data")
    }

    fn begin(
        &self,
        ctx: &mut StageContext<'_>,
        optimization: Optimization,
        before: Option<Lookup>,
    ) -> Result<Box<dyn TrainingRun + '_>, Failure> {
        let settings = self.settings(self.trained(ctx.seed_for("adapter")), optimization);
        let start = self.reference_model().map(|(model, state)| {
            let fingerprint = ctx.models.fingerprint(model, state);
            fingerprint.to_owned()
        });
        let trainer = ctx.models.dpo_trainer(&self.model, &settings)?;
        Ok(Box::new(DpoTraining {
            stage: self,
            reference: start.zip(before),
            trainer,
        }))
    }
}

struct DpoTraining<'a> {
    stage: &'a TrainDpo,
    /// The fingerprint of the reference, if there is one, and the log-probabilities computed by the
    /// reference pass.
    reference: Option<(String, Lookup)>,
    trainer: Box<dyn DpoTrainer>,
}

impl TrainingRun for DpoTraining<'_> {
    fn validate(&mut self, ctx: &mut StageContext<'_>, rows: &RecordBatch) -> Result<(), Failure> {
        let pairs = Pair::from_batch(rows)?;
        let prompts = prompts(ctx, &pairs)?;
        let pairs = pairs.iter().zip(&prompts);
        let examples: Vec<_> = pairs
            .map(|(pair, prompt)| example(pair, prompt, None))
            .collect();
        let looked = self.trainer.validate(&examples);
        looked.map_err(Failure::of(&self.stage.model))
    }

    fn plan(&self) -> Option<String> {
        let plan = self.trainer.plan()?;
        Some(format!("{}: {plan}", self.stage.model))
    }

    fn step(
        &mut self,
        ctx: &mut StageContext<'_>,
        number: u32,
        epoch: u32,
        rows: &RecordBatch,
    ) -> Result<RecordBatch, Failure> {
        let begun = Instant::now();
        let pairs = Pair::from_batch(rows)?;
        let prompts = prompts(ctx, &pairs)?;
        let mut examples = Vec::with_capacity(pairs.len());
        for (pair, prompt) in pairs.iter().zip(&prompts) {
            let reference = match &mut self.reference {
                // Without a reference, both answers are equally likely.
                None => [0.0; 2],
                Some((reference, computed)) => {
                    if let Some(sampled) = self.stage.sampled_reference(pair, reference) {
                        sampled
                    } else {
                        let missing = || {
                            Failure::Other(format!(
                                "pair {} has no reference log-probabilities",
                                pair.row_key
                            ))
                        };
                        let row: Option<Reference> = computed.row(&pair.row_key)?;
                        let row = row.ok_or_else(missing)?;
                        [row.chosen_logp, row.rejected_logp]
                    }
                }
            };
            examples.push(example(pair, prompt, Some(reference)));
        }
        let report = self.trainer.step(&examples);
        let report = report.map_err(Failure::of(&self.stage.model))?;
        Ok(DpoStep::to_batch(&[DpoStep {
            step: number.cast_signed(),
            epoch: epoch.cast_signed(),
            loss: report.loss,
            rewards_chosen: report.rewards_chosen,
            rewards_rejected: report.rewards_rejected,
            accuracy: report.accuracy,
            margin: report.rewards_chosen - report.rewards_rejected,
            logps_chosen: report.logps_chosen,
            logps_rejected: report.logps_rejected,
            grad_norm: report.grad_norm,
            learning_rate: report.learning_rate,
            tokens: report.tokens.cast_signed(),
            seconds: begun.elapsed().as_secs_f64(),
        }]))
    }

    fn trainer(&mut self) -> &mut dyn Trainer {
        &mut *self.trainer
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{FINGERPRINT, TestPipeline, pair, stage};
    use super::*;

    fn train(settings: serde_json::Value) -> TrainDpo {
        let mut all = json!({"pairs": "pairs", "model": "policy", "batch_pairs": 2});
        let given = settings.as_object().unwrap().clone();
        all.as_object_mut().unwrap().extend(given);
        stage(all)
    }

    /// A pair whose answers were sampled from the policy, with one token each.
    fn sampled(prompt_id: &str) -> Pair {
        Pair {
            chosen_token_ids: Some(vec![1]),
            rejected_token_ids: Some(vec![2]),
            chosen_logp: Some(-(16.0_f64.ln())),
            rejected_logp: Some(-(16.0_f64.ln())),
            model: Some(FINGERPRINT.to_owned()),
            ..pair(prompt_id, "So.", "No.")
        }
    }

    #[test]
    fn sampled_and_written_pairs_are_trained_on() {
        let mut pipeline = TestPipeline::new();
        let pairs = [sampled("a"), sampled("b"), pair("c", "So.", "No.")];
        pipeline.table("pairs", &pairs);
        let steps = pipeline
            .train::<DpoStep>(&train(json!({"epochs": 2})))
            .unwrap();
        let numbers: Vec<_> = steps.iter().map(|step| (step.step, step.epoch)).collect();
        assert_eq!(numbers, [(1, 1), (2, 1), (3, 2), (4, 2)]);
        let without = train(json!({"reference": "none", "loss": "simpo"}));
        assert_eq!(pipeline.train::<DpoStep>(&without).unwrap().len(), 2);
    }

    #[test]
    fn the_order_of_the_pairs_depends_on_their_lengths_only_if_asked() {
        let mut pipeline = TestPipeline::new();
        let long = "word ".repeat(40);
        let pairs = [
            pair("a", "So.", "No."),
            pair("b", &long, "No."),
            pair("c", "So.", "No."),
        ];
        pipeline.table("pairs", &pairs);
        let grouped = train(json!({"batch_pairs": 1, "group_by_length": true}));
        let steps = pipeline.train::<DpoStep>(&grouped).unwrap();
        let tokens: Vec<_> = steps.iter().map(|step| step.tokens).collect();
        assert_eq!(tokens, [43, 4, 4]);
    }

    #[test]
    fn a_missing_model_ends_the_training() {
        let mut pipeline = TestPipeline::new();
        pipeline.table("pairs", &[sampled("a")]);
        pipeline.models.is_missing = true;
        let stage = train(json!({"reference_audit": {"share": 0}}));
        let failure = pipeline.train::<DpoStep>(&stage).unwrap_err();
        let expected = "model `policy`: model.safetensors: not found";
        assert_eq!(failure.to_string(), expected);
    }
}
