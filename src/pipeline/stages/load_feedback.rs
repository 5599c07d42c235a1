//! The `load_feedback` stage: preference pairs labeled by people, loaded directly as `pairs`.

use super::shown::Shown;
use super::source::{Load, Loadable, prompt_base};
use ovchat_data::store::Key;
use ovchat_data::tables::{Pair, Prompt};

/// The stage; its settings are those of every source.
pub type LoadFeedback = Load<Pair>;

impl Loadable for Pair {
    const SCHEMA: &'static str = "LoadFeedback";
    const DESCRIPTION: &'static str = "Loads preference pairs labeled by people. A record of the source is \
         `{id, image, prompt, chosen, rejected}`, or as in LLaVA-Human-Preference `{id, image, conversations, \
         output_1, output_2, preference}`. A record with an empty answer is rejected.";

    fn from_record(
        prompt: Prompt,
        chosen: Option<String>,
        rejected: Option<String>,
    ) -> Result<Self, String> {
        let chosen = chosen.ok_or("missing `chosen`")?;
        let rejected = rejected.ok_or("missing `rejected`")?;
        for (name, answer) in [("chosen", &chosen), ("rejected", &rejected)] {
            if answer.trim().is_empty() {
                return Err(format!(
                    "`{name}` is empty; write the answer, or remove the record"
                ));
            }
        }
        if chosen == rejected {
            return Err("`chosen` and `rejected` are the same text".to_owned());
        }
        Ok(Self {
            row_key: Key::new("pair")
                .with(&prompt.prompt_id)
                .with(&chosen)
                .with(&rejected)
                .finish(),
            id: prompt.id,
            image: prompt.image,
            prompt: prompt.question,
            chosen,
            rejected,
            prompt_id: prompt.prompt_id,
            image_ids: prompt.image_ids,
            videos: prompt.videos,
            system: prompt.system,
            turns: prompt.turns,
            captions: prompt.captions,
            kept: prompt.kept,
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
        })
    }

    fn base(&self) -> String {
        prompt_base(Shown::from(self))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, stage};
    use super::*;

    #[test]
    fn a_record_becomes_a_pair_or_is_rejected_with_the_reason() {
        let mut pipeline = TestPipeline::new();
        let from = pipeline.file(
            "pairs.jsonl",
            r#"{"id": "a", "prompt": "Why?", "chosen": "So.", "rejected": "No."}
{"id": "b", "prompt": "Why?", "chosen": "So.", "rejected": "So."}
{"id": "c", "prompt": "Why?", "chosen": "So."}"#,
        );
        let load = stage::<LoadFeedback>(json!({"from": from}));
        let (pairs, rejects) = pipeline.load(&load).unwrap();
        let [pair] = &pairs[..] else {
            panic!("{pairs:?}")
        };
        assert_eq!(pair.id.as_deref(), Some("a"));
        assert_eq!(
            [&*pair.prompt, &*pair.chosen, &*pair.rejected],
            ["Why?", "So.", "No."]
        );
        assert_eq!(pair.margin, None);
        let expected = [
            ("line 2, id b", "`chosen` and `rejected` are the same text"),
            ("line 3, id c", "missing `rejected`"),
        ];
        let expected = expected.map(|(id, reason)| (id.to_owned(), reason.to_owned()));
        assert_eq!(rejects, expected);
    }
}
