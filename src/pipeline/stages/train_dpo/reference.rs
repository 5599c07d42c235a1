//! Reference log-probabilities, recorded during sampling or computed by a reference pass.

use std::cell::RefCell;

use super::super::shown::Shown;
use super::super::training::{TrainingStage, example, prompts};
use super::super::{Failure, Outcome, RowStage, StageContext, TableName, Task};
use super::settings::TrainDpo;
use ovchat_data::store::Key;
use ovchat_data::tables::{Pair, Reference};
use ovchat_models::{DpoTrainer, Mask, Newlines, Trained};

impl TrainDpo {
    /// Returns the log-probabilities recorded during sampling, if they are those of the reference:
    /// the model that answered is the reference, and the mask and newlines are those of sampling.
    pub fn sampled_reference(&self, pair: &Pair, reference: &str) -> Option<[f64; 2]> {
        let as_sampled = pair.chosen_token_ids.is_some() && pair.rejected_token_ids.is_some();
        let same_model = pair.model.as_deref() == Some(reference);
        let same_tokens = (self.mask, self.newlines) == (Mask::Answer, Newlines::One);
        (as_sampled && same_model && same_tokens).then_some(())?;
        Some([pair.chosen_logp?, pair.rejected_logp?])
    }

    /// True if the recorded log-probabilities of a pair are recomputed.
    fn is_audited(&self, pair: &Pair) -> bool {
        let draw = Key::new("audit").with(&pair.row_key).finish_u64();
        (draw as f64) < self.reference_audit.share.get() * 2f64.powi(64)
    }

    /// Returns the larger drift of a pair's two answers: the absolute difference of
    /// log-probabilities per token.
    fn drift(pair: &Pair, [sampled, found]: [[f64; 2]; 2]) -> f64 {
        let tokens = [&pair.chosen_token_ids, &pair.rejected_token_ids]
            .map(|ids| ids.as_ref().map_or(1, |ids| ids.len().max(1)) as f64);
        let apart = |side: usize| (sampled[side] - found[side]).abs() / tokens[side];
        apart(0).max(apart(1))
    }
}

/// The pass that computes the reference log-probabilities that sampling did not record: those of
/// pairs labeled by people, and of pairs whose answers come from another model.
pub struct ReferencePass<'a> {
    stage: &'a TrainDpo,
    /// The reference model, opened for the first pair that needs it and kept for all parts.
    trainer: RefCell<Option<Box<dyn DpoTrainer>>>,
}

impl<'a> ReferencePass<'a> {
    pub fn new(stage: &'a TrainDpo) -> Self {
        let trainer = RefCell::new(None);
        Self { stage, trainer }
    }
}

/// Pairs per part of the reference pass.
const REFERENCE_PART: u32 = 64;

impl RowStage for ReferencePass<'_> {
    type In = Pair;
    type Out = Reference;

    fn input(&self) -> &TableName {
        &self.stage.pairs
    }

    fn part_groups(&self) -> u32 {
        REFERENCE_PART
    }

    fn key(&self, _: &mut StageContext<'_>, group: &[Pair], key: Key) -> Result<Key, Failure> {
        let mut key = key.with(format!("{:?} {:?}", self.stage.mask, self.stage.newlines));
        for pair in group {
            key = key.with([u8::from(self.stage.is_audited(pair))]);
            key = Shown::from(pair).add_to(key.with(&pair.row_key));
            for (text, token_ids) in [
                (&pair.chosen, &pair.chosen_token_ids),
                (&pair.rejected, &pair.rejected_token_ids),
            ] {
                key = key.with(text);
                for id in token_ids.iter().flatten() {
                    key = key.with(id.to_le_bytes());
                }
            }
        }
        Ok(key)
    }

    fn map(
        &self,
        ctx: &mut StageContext<'_>,
        tasks: &[Task<Pair>],
    ) -> Result<Vec<Outcome<Vec<Reference>>>, Failure> {
        let stage = self.stage;
        let (model, state) = stage
            .reference_model()
            .expect("built only with a reference");
        let reference = ctx.models.fingerprint(model, state).to_owned();
        let mut outcomes = Vec::with_capacity(tasks.len());
        let mut trainer = self.trainer.borrow_mut();
        let mut done = 0;
        for task in tasks {
            let is_open = |pair: &&Pair| {
                stage.sampled_reference(pair, &reference).is_none() || stage.is_audited(pair)
            };
            let pairs: Vec<Pair> = task.rows.iter().filter(is_open).cloned().collect();
            let mut rows = Vec::with_capacity(pairs.len());
            if !pairs.is_empty() {
                if ctx.go_on().is_break() {
                    return Err(Failure::Interrupted);
                }
                let prompts = prompts(ctx, &pairs)?;
                let examples: Vec<_> = pairs
                    .iter()
                    .zip(&prompts)
                    .map(|(pair, prompt)| example(pair, prompt, None))
                    .collect();
                if trainer.is_none() {
                    // Nothing is trained here, so the schedule does not matter.
                    let optimization = stage.training().optimizer_settings.optimization(1);
                    let settings = stage.settings(Trained::Parts(Vec::new()), optimization);
                    *trainer = Some(ctx.models.reference(model, state, &settings)?);
                }
                let trainer = trainer.as_mut().expect("just opened");
                let logps = trainer
                    .reference_logps(&examples)
                    .map_err(Failure::of(model))?;
                for (pair, found) in pairs.iter().zip(logps) {
                    let sampled = stage.sampled_reference(pair, &reference);
                    let drift = sampled.map(|sampled| TrainDpo::drift(pair, [sampled, found]));
                    let drift_max = stage.reference_audit.drift_max.get();
                    if let (Some([chosen, rejected]), Some(drift)) = (sampled, drift)
                        && drift > drift_max
                    {
                        return Err(Failure::Other(format!(
                            "the log-probabilities recorded for pair {} during sampling ({chosen:.4} chosen, \
                             {rejected:.4} rejected) differ by {drift:.4} per token from those of the \
                             reference ({:.4}, {:.4}), which exceeds `reference_audit.drift_max` of \
                             {drift_max}; sample with the dtype and on the device used for training, \
                             or raise `drift_max`",
                            pair.row_key, found[0], found[1],
                        )));
                    }
                    rows.push(Reference {
                        row_key: task.key.clone(),
                        pair: pair.row_key.clone(),
                        prompt_id: pair.prompt_id.clone(),
                        chosen_logp: found[0],
                        rejected_logp: found[1],
                        model: reference.clone(),
                        drift,
                    });
                }
            }
            done += task.rows.len() as u64;
            (ctx.progress)(done);
            outcomes.push(Outcome::Rows(rows));
        }
        Ok(outcomes)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::test_pipeline::{FINGERPRINT, TestPipeline, pair, stage};
    use super::*;
    use ovchat_data::tables::DpoStep;

    fn train(share: f64) -> TrainDpo {
        let audit = json!({"share": share});
        stage(json!({"pairs": "pairs", "model": "policy", "reference_audit": audit}))
    }

    /// A pair that was sampled with one token an answer, recorded with the given log-probability.
    fn sampled(logp: f64) -> Pair {
        Pair {
            chosen_token_ids: Some(vec![1]),
            rejected_token_ids: Some(vec![2]),
            chosen_logp: Some(logp),
            rejected_logp: Some(logp),
            model: Some(FINGERPRINT.to_owned()),
            ..pair("a", "So.", "No.")
        }
    }

    /// The log-probability of a token under the scripted model.
    fn expected() -> f64 {
        -f64::from(16.0_f32.ln())
    }

    fn references(pairs: &[Pair], share: f64) -> Result<Vec<Reference>, Failure> {
        let mut pipeline = TestPipeline::new();
        pipeline.table("pairs", pairs);
        let stage = train(share);
        let (_, work) = stage
            .before(&"steps".to_owned().try_into().unwrap())
            .unwrap();
        Ok(pipeline.map_batches(&*work)?.0)
    }

    #[test]
    fn only_what_sampling_did_not_record_is_computed() {
        let written = pair("b", "So.", "No.");
        let rows = references(&[sampled(expected()), written], 0.0).unwrap();
        let [row] = &rows[..] else {
            panic!("{} rows", rows.len())
        };
        assert_eq!((&*row.pair, &*row.model), ("b pair", FINGERPRINT));
        assert_eq!(row.drift, None);
        assert!(row.chosen_logp < 0.0);
        let other = Pair {
            model: Some("another model".to_owned()),
            ..sampled(expected())
        };
        assert_eq!(references(&[other], 0.0).unwrap()[0].drift, None);
    }

    #[test]
    fn an_audit_recomputes_what_was_recorded_and_fails_on_a_drift() {
        let rows = references(&[sampled(expected())], 1.0).unwrap();
        assert_eq!(rows[0].drift, Some(0.0));
        let failure = references(&[sampled(expected() - 1.0)], 1.0).unwrap_err();
        let failure = failure.to_string();
        assert!(failure.contains("differ by 1.0000 per token"), "{failure}");
        assert!(failure.contains("reference_audit.drift_max"), "{failure}");
    }

    #[test]
    fn a_pair_without_reference_log_probabilities_ends_the_training() {
        let mut pipeline = TestPipeline::new();
        pipeline.table("pairs", &[pair("a", "So.", "No.")]);
        pipeline.lose_references = true;
        let failure = pipeline.train::<DpoStep>(&train(0.0)).unwrap_err();
        let expected = "pair a pair has no reference log-probabilities";
        assert_eq!(failure.to_string(), expected);
    }
}
