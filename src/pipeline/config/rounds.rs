//! The tables of each round, and the checkpoint that a model refers to in it.

use super::plan::{Plan, PlannedStage};
use crate::stages::{ModelName, TableName};

impl Plan {
    /// Returns every table of every round in execution order: the tables that are built once, then
    /// the evaluation as round 0, then the rounds, each with its evaluation.
    pub fn slots(&self) -> Vec<(&PlannedStage, Option<u32>)> {
        let once = self.all().filter(|stage| stage.is_static);
        let mut slots: Vec<_> = once.map(|stage| (stage, None)).collect();
        for round in 0..=self.rounds.get() {
            let here = |stage: &&PlannedStage| !stage.is_static && stage.round_first <= round;
            let of_round = self.stages.iter().filter(here);
            let evaluation = self.evaluate.iter().filter(here);
            slots.extend(of_round.chain(evaluation).map(|stage| (stage, Some(round))));
        }
        slots
    }

    /// Returns the round of a table that is read in `round`; `None` if the table is built once.
    pub fn round_of(&self, table: &TableName, round: Option<u32>) -> Option<u32> {
        let stage = self.stage(table).expect("the plan names every table");
        if stage.is_static { None } else { round }
    }

    /// Returns the table and round of the training whose checkpoint a stage uses for a model in a
    /// round: that of the same round if the stage continues another training (`after`) or is an
    /// evaluation, otherwise that of the previous round.
    pub fn training(
        &self,
        stage: &PlannedStage,
        model: &ModelName,
        round: Option<u32>,
    ) -> Option<(&TableName, u32)> {
        if let Some(after) = stage.after() {
            let after = self.stage(after).expect("the plan names every table");
            return Some((&after.name, round?));
        }
        let trainer = self.trained_by(self.backing_model(model))?;
        let evaluates = self.evaluate.iter().any(|other| other.name == stage.name);
        let trained = if evaluates {
            round?
        } else {
            round?.checked_sub(1)?
        };
        (trained > 0).then_some((trainer, trained))
    }
}
