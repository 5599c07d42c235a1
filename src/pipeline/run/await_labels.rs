//! Waiting for labels: a stage that needs annotators stops the run until there are enough labels.

use super::runner::{Runner, titled};
use crate::config::PlannedStage;
use crate::stages::Failure;
use ovchat_data::store::{LabelFiles, LabelTask, LabelVerdict};

impl Runner<'_> {
    /// Returns if the stage needs no labels, or has enough of them. Otherwise writes the labeling
    /// task and fails with [`Failure::Waiting`].
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
        let (labels, corrupt) = files.read()?;
        if corrupt > 0 {
            self.report.note(&format!(
                "{}: ignoring {corrupt} truncated or invalid lines; \
                 `pipeline label` moves them to another file",
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
            "`{}` has {said} of {wanted} labels; to label, run: pipeline label {}",
            titled(&stage.name, round),
            root.display()
        )))
    }
}
