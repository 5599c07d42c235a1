//! The `ask_people` stage: preference pairs labeled by annotators.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::pairing::{Answers, CandidatePair};
use super::selection::{PairChoice, PairSelector, Selection};
use super::{Failure, Input, Stage, StageContext, StageError, StageKind, TableName, Waits};
use ovchat_data::store::{LabelFiles, LabelVerdict, digest};
use ovchat_data::tables::{Candidate, Pair, Prompt, RejectClass, Reward, Row};

/// Pairs answers by the choices of annotators. Until there are enough labels, the run stops with a
/// dedicated exit code; `pipeline label RUN` serves the labeling tasks, and the same `pipeline run`
/// command then resumes the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AskPeople {
    /// The table of candidates.
    pub candidates: TableName,
    /// The table of prompts of the candidates. Default: found through `candidates`.
    #[serde(default)]
    pub prompts: Option<TableName>,
    /// Tables of rewards of the candidates that order the label queue: the answers on which the
    /// judges disagree most come first; with a single table, those with the closest rewards.
    #[serde(default)]
    pub rewards: Vec<TableName>,
    /// The number of labels required before the table is built. Skipped tasks do not count.
    pub labels_min: NonZeroU32,
}

impl Stage for AskPeople {
    fn inputs(&self) -> Vec<Input<'_>> {
        let mut inputs = vec![
            Input {
                field: "candidates",
                table: Some(&self.candidates),
                needs: Candidate::schema(),
                kind: Candidate::KIND,
            },
            Input {
                field: "prompts",
                table: self.prompts.as_ref(),
                needs: Prompt::schema(),
                kind: Prompt::KIND,
            },
        ];
        inputs.extend(self.rewards.iter().map(|table| Input {
            field: "rewards",
            table: Some(table),
            needs: Reward::schema(),
            kind: Reward::KIND,
        }));
        inputs
    }

    fn find(&mut self, field: &str, table: TableName) {
        if field == "prompts" {
            self.prompts = Some(table);
        }
    }

    fn kind(&self) -> Option<&'static str> {
        Some(Pair::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        Ok(Pair::schema())
    }

    fn unkeyed(&self) -> &'static [&'static str] {
        &["labels_min"]
    }

    fn waits(&self) -> Option<Waits<'_>> {
        Some(Waits {
            candidates: &self.candidates,
            prompts: self.prompts.as_ref().expect("the plan found the prompts"),
            rewards: &self.rewards,
            labels: self.labels_min.get().into(),
        })
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Rows(Box::new(Selection::new(self)))
    }
}

impl PairSelector for AskPeople {
    fn candidates(&self) -> &TableName {
        &self.candidates
    }

    fn prompts(&self) -> &TableName {
        self.prompts.as_ref().expect("the plan found the prompts")
    }

    fn choices(
        &self,
        ctx: &mut StageContext<'_>,
        part: &Answers<'_>,
    ) -> Result<HashMap<String, PairChoice>, Failure> {
        let files = LabelFiles::new(&ctx.input_tables.root, ctx.table.as_str(), ctx.round);
        let (labels, _) = files.read()?;
        let asked: HashSet<&str> = labels.iter().map(|label| &*label.prompt_id).collect();
        let mut texts: HashMap<&str, HashMap<String, i32>> = HashMap::new();
        for group in &part.groups {
            let prompt_id = part.prompt_id(group.start);
            if !asked.contains(prompt_id) {
                continue;
            }
            let known = texts.entry(prompt_id).or_default();
            for row in group.clone() {
                let digest = digest(part.text(row).as_bytes());
                known.entry(digest).or_insert(part.candidate(row));
            }
        }
        // The verdicts on two answers, in the order of the first.
        let mut verdicts: Vec<(String, Vec<Verdict>)> = Vec::new();
        let mut places: HashMap<(String, [i32; 2]), usize> = HashMap::new();
        for label in labels {
            let Some(known) = texts.get(&*label.prompt_id) else {
                continue;
            };
            // A label of an answer that no longer exists applies to none of the current answers.
            let (Some(&left), Some(&right)) = (
                known.get(&label.left_digest),
                known.get(&label.right_digest),
            ) else {
                continue;
            };
            let Some(verdict) = Verdict::of(label.said, left, right) else {
                continue;
            };
            let both = [left.min(right), left.max(right)];
            let place = *places
                .entry((label.prompt_id.clone(), both))
                .or_insert(verdicts.len());
            match verdicts.get_mut(place) {
                Some((_, all)) => all.push(verdict),
                None => verdicts.push((label.prompt_id, vec![verdict])),
            }
        }
        let mut choices: HashMap<String, PairChoice> = HashMap::new();
        for (prompt_id, verdicts) in verdicts {
            let choice = agreed(&verdicts);
            match (choices.get_mut(&prompt_id), choice) {
                (Some(PairChoice::Pairs(pairs)), PairChoice::Pairs(more)) => pairs.extend(more),
                (Some(PairChoice::Pairs(_)), PairChoice::SetAside { .. }) => {}
                (_, choice) => {
                    choices.insert(prompt_id, choice);
                }
            }
        }
        Ok(choices)
    }

    fn unchosen(&self) -> Option<&'static str> {
        Some("not labeled")
    }
}

/// The verdict of an annotator on two answers, whatever their sides were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Better { chosen: i32, rejected: i32 },
    Tie,
    BothBad,
    Skip,
}

impl Verdict {
    /// Returns the verdict of a label; `None` for one that was taken back.
    fn of(said: LabelVerdict, left: i32, right: i32) -> Option<Self> {
        let better = |chosen, rejected| Self::Better { chosen, rejected };
        Some(match said {
            LabelVerdict::Left => better(left, right),
            LabelVerdict::Right => better(right, left),
            LabelVerdict::Tie => Self::Tie,
            LabelVerdict::BothBad => Self::BothBad,
            LabelVerdict::Skip => Self::Skip,
            LabelVerdict::Undone => return None,
        })
    }
}

/// Returns what the verdicts of one or several annotators on two answers make of them.
fn agreed(verdicts: &[Verdict]) -> PairChoice {
    let set_aside = |reason: &str| PairChoice::SetAside {
        class: RejectClass::Dropped,
        reason: reason.to_owned(),
    };
    let mut given = verdicts.iter().filter(|verdict| **verdict != Verdict::Skip);
    let Some(first) = given.next() else {
        return set_aside("skipped by the annotator");
    };
    if given.any(|other| other != first) {
        return set_aside("its annotators disagree");
    }
    match *first {
        Verdict::Better { chosen, rejected } => {
            PairChoice::Pairs(vec![CandidatePair::unscored(chosen, rejected)])
        }
        Verdict::Tie => set_aside("labeled as a tie"),
        Verdict::BothBad => set_aside("labeled as both bad"),
        Verdict::Skip => unreachable!("skips were left out"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, candidate, prompt, stage};
    use super::*;
    use ovchat_data::store::LabelLine;

    /// Builds the pairs of prompts `a` to `d` from labels: the prompt, the verdict, and the text of
    /// the left answer when it was labeled.
    fn labeled(labels: &[(&str, LabelVerdict, &str)]) -> (Vec<Pair>, Vec<(String, String)>) {
        let mut pipeline = TestPipeline::new();
        let ids = ["a", "b", "c", "d"];
        let prompts: Vec<_> = ids.iter().map(|id| prompt(id, "Why?")).collect();
        pipeline.table("prompts", &prompts);
        let candidates: Vec<_> = ids
            .iter()
            .flat_map(|id| [candidate(id, 0, "So."), candidate(id, 1, "No.")])
            .collect();
        pipeline.table("candidates", &candidates);
        let files = LabelFiles::new(pipeline.root(), "built", Some(1));
        let mut writer = files.write().unwrap();
        for (id, (prompt_id, said, left)) in (0..).zip(labels) {
            let label = LabelLine {
                id,
                prompt_id: (*prompt_id).to_owned(),
                left: 0,
                right: 1,
                left_digest: digest(left.as_bytes()),
                right_digest: digest(b"No."),
                said: *said,
                by: "ann".to_owned(),
                at: 0,
                milliseconds: 1,
            };
            writer.add(&label).unwrap();
        }
        let settings = json!({"candidates": "candidates", "prompts": "prompts", "labels_min": 1});
        pipeline.map(&stage::<AskPeople>(settings)).unwrap()
    }

    #[test]
    fn a_choice_becomes_a_pair_and_other_verdicts_are_rejected() {
        let (pairs, rejects) = labeled(&[
            ("a", LabelVerdict::Left, "So."),
            ("b", LabelVerdict::Right, "So."),
            ("c", LabelVerdict::Tie, "So."),
        ]);
        let texts: Vec<_> = pairs
            .iter()
            .map(|pair| [&*pair.prompt_id, &*pair.chosen, &*pair.rejected])
            .collect();
        assert_eq!(texts, [["a", "So.", "No."], ["b", "No.", "So."]]);
        assert_eq!(pairs[0].margin, None);
        let expected = [("c", "labeled as a tie"), ("d", "not labeled")];
        let expected = expected.map(|(id, reason)| (id.to_owned(), reason.to_owned()));
        assert_eq!(rejects, expected);
    }

    #[test]
    fn annotators_who_disagree_make_no_pair_and_who_agree_make_one() {
        let (pairs, rejects) = labeled(&[
            ("a", LabelVerdict::Left, "So."),
            ("a", LabelVerdict::Right, "So."),
            ("b", LabelVerdict::Left, "So."),
            ("b", LabelVerdict::Left, "So."),
            ("c", LabelVerdict::Skip, "So."),
            ("c", LabelVerdict::Right, "So."),
        ]);
        let texts: Vec<_> = pairs
            .iter()
            .map(|pair| [&*pair.prompt_id, &*pair.chosen])
            .collect();
        assert_eq!(texts, [["b", "So."], ["c", "No."]]);
        let expected = ("a".to_owned(), "its annotators disagree".to_owned());
        assert!(rejects.contains(&expected), "{rejects:?}");
    }

    #[test]
    fn a_label_of_an_answer_that_has_changed_does_not_count() {
        let (pairs, rejects) = labeled(&[("a", LabelVerdict::Left, "Because.")]);
        assert_eq!(pairs, []);
        assert!(rejects.contains(&("a".to_owned(), "not labeled".to_owned())));
    }
}
