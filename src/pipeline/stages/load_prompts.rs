//! The `load_prompts` stage: prompts (images and questions) from the user's file.

use super::shown::Shown;
use super::source::{Load, Loadable, prompt_base};
use ovchat_data::tables::Prompt;

/// The stage; its settings are those of every source.
pub type LoadPrompts = Load<Prompt>;

impl Loadable for Prompt {
    const SCHEMA: &'static str = "LoadPrompts";
    const DESCRIPTION: &'static str = "Loads prompts: images or videos with questions. A record of the source \
         is `{id, image, video, prompt}` or a LLaVA conversation (`from` and `value`, or `role` and `content`); in Parquet, a \
         column of images holds bytes, or structs of bytes and path as Hugging Face `datasets` writes them. A \
         record with unsupported media, such as audio or a second image under another key, is rejected.";

    fn from_record(prompt: Prompt, _: Option<String>, _: Option<String>) -> Result<Self, String> {
        Ok(prompt)
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

    fn load(text: &str, settings: serde_json::Value) -> (Vec<Prompt>, Vec<(String, String)>) {
        let mut pipeline = TestPipeline::new();
        let from = pipeline.file("p.json", text);
        pipeline.file("dot.ppm", "P6\n1 1\n255\nabc");
        let mut settings = settings;
        settings["from"] = json!(from);
        pipeline.load(&stage::<LoadPrompts>(settings)).unwrap()
    }

    #[test]
    fn a_record_becomes_a_prompt_with_its_image() {
        let text = r#"[{"id": "a", "image": "dot.ppm", "prompt": "Why?"}, {"prompt": "How?"}]"#;
        let (prompts, rejects) = load(text, json!({}));
        assert_eq!(rejects, []);
        assert_eq!(prompts.len(), 2);
        assert_eq!(prompts[0].id.as_deref(), Some("a"));
        assert_eq!(prompts[0].question, "Why?");
        assert_eq!(prompts[0].image_ids.len(), 1);
        assert_eq!(prompts[1].image_ids.len(), 0);
        let (limited, _) = load(text, json!({"limit": 1}));
        assert_eq!(limited, prompts[..1]);
    }

    #[test]
    fn a_record_without_its_image_or_its_question_is_rejected() {
        let text = r#"[{"image": "none.png", "prompt": "Why?"}, {"image": "dot.ppm"}]"#;
        let (prompts, rejects) = load(text, json!({}));
        assert_eq!(prompts, []);
        let [(place, missing), (_, unasked)] = &rejects[..] else {
            panic!("{rejects:?}")
        };
        assert_eq!(place, "record 1");
        assert!(missing.starts_with("image not found: "), "{missing}");
        assert!(unasked.contains("prompt"), "{unasked}");
    }
}
