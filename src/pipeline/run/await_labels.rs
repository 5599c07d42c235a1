//! Waiting for people.

use super::Runner;
use crate::config::PlannedStage;
use crate::stages::Failure;
use ovchat_data::store::{LabelFiles, LabelTask, LabelVerdict};

impl Runner<'_> {
    /// Goes on when the stage waits for nobody, or when people have said enough; else says what they are
    /// to be asked and stops.
    pub(super) fn wait_for_people(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
    ) -> Result<(), Failure> {
        let Some(waits) = stage.spec.as_stage().waits() else {
            return Ok(());
        };
        let root = self.folder.root();
        let files = LabelFiles::new(root, stage.name.as_str(), round);
        let names = waits.rewards.iter();
        files.ask(&LabelTask {
            table: stage.name.to_string(),
            round,
            candidates: waits.candidates.to_string(),
            candidates_round: self.plan.round_of(waits.candidates, round),
            prompts: waits.prompts.to_string(),
            prompts_round: self.plan.round_of(waits.prompts, round),
            rewards: names.map(ToString::to_string).collect(),
            wanted: waits.labels,
        })?;
        let (labels, spoiled) = files.read()?;
        if spoiled > 0 {
            self.report.note(&format!(
                "{}: {spoiled} of its lines are cut off or can't be read, and do not count; \
                 `pipeline label` moves them aside",
                files.path().display()
            ));
        }
        let said = labels
            .iter()
            .filter(|label| label.said != LabelVerdict::Skip);
        let (said, wanted) = (said.count() as u64, waits.labels);
        if said >= wanted {
            return Ok(());
        }
        Err(Failure::Waiting(format!(
            "`{}` has {said} of {wanted} labels; people give them with: pipeline label {}",
            super::titled(&stage.name, round),
            root.display()
        )))
    }
}
