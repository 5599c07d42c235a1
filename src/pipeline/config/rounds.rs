//! Which table belongs to which round, and which checkpoint a model means there.

use super::{Plan, PlannedStage};
use crate::stages::{ModelName, TableName};

impl Plan {
    /// Every table of every round, in running order: what is made once, then the evaluation as round
    /// 0, then the rounds, each with its evaluation.
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

    /// The round in which a table that is read in `round` lies: none if it is made once.
    pub fn round_of(&self, table: &TableName, round: Option<u32>) -> Option<u32> {
        let stage = self.stage(table).expect("the plan names every table");
        if stage.is_static { None } else { round }
    }

    /// The table and round of the training whose checkpoint a model means for a stage in a round:
    /// of this round where the stage goes on from another training, and in the evaluation; else the
    /// last round's.
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
