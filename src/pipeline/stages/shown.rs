//! The content of a prompt for a model, taken from a row of prompts or of pairs.

use ovchat_data::store::Key;
use ovchat_data::tables::{Pair, Prompt, PromptVideo, Role, Turn};
use ovchat_models::{ChatPrompt, ChatRole, ChatTurn, Visual};

/// The content of a prompt for a model.
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a> {
    pub image_ids: &'a [String],
    pub videos: &'a [PromptVideo],
    pub system: Option<&'a str>,
    pub turns: &'a [Turn],
    pub question: &'a str,
}

impl<'a> From<&'a Prompt> for Shown<'a> {
    fn from(prompt: &'a Prompt) -> Self {
        Self {
            image_ids: &prompt.image_ids,
            videos: prompt.videos.as_deref().unwrap_or_default(),
            system: prompt.system.as_deref(),
            turns: &prompt.turns,
            question: &prompt.question,
        }
    }
}

impl<'a> From<&'a Pair> for Shown<'a> {
    fn from(pair: &'a Pair) -> Self {
        Self {
            image_ids: &pair.image_ids,
            videos: pair.videos.as_deref().unwrap_or_default(),
            system: pair.system.as_deref(),
            turns: &pair.turns,
            question: &pair.prompt,
        }
    }
}

impl Shown<'_> {
    /// Adds everything to a key. The prompt's id alone is not enough: an `sql` stage may keep the id
    /// and change the rest.
    pub fn add_to(self, key: Key) -> Key {
        let mut key = key.with((self.image_ids.len() as u64).to_le_bytes());
        for id in self.image_ids {
            key = key.with(id);
        }
        key = key
            .with(if self.system.is_some() { "+" } else { "-" })
            .with(self.system.unwrap_or_default());
        for turn in self.turns {
            key = key.with(turn.role.as_str()).with(&turn.text);
        }
        key = key.with(self.question);
        // Prompts without videos keep the keys that they had before there were videos.
        for video in self.videos {
            key = key
                .with("video")
                .with((video.frame_ids.len() as u64).to_le_bytes());
            key = video.frame_ids.iter().fold(key, Key::with);
        }
        key
    }

    /// Returns the prompt in the form that models take; `image` returns an image or frame by its id.
    pub fn chat_prompt<E>(
        self,
        id: &str,
        mut image: impl FnMut(&str, ImageUse) -> Result<Visual, E>,
    ) -> Result<ChatPrompt, E> {
        let mut images = Vec::with_capacity(self.image_ids.len() + self.videos.len());
        for id in self.image_ids {
            images.push(image(id, ImageUse::Image)?);
        }
        for video in self.videos {
            let ids = video.frame_ids.iter();
            let frames = ids.map(|id| image(id, ImageUse::Frame));
            images.push(Visual::video(frames.collect::<Result<_, _>>()?));
        }
        let prompt = ChatPrompt {
            places: Vec::new(),
            id: id.to_owned(),
            images,
            system: self.system.map(str::to_owned),
            turns: turns(self.turns),
            question: self.question.to_owned(),
            captions: None,
            answer: None,
            seed: 0,
        };
        Ok(prompt.with_places())
    }
}

/// The use of an image in a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageUse {
    Image,
    /// A frame of a video; its size does not change the number of tokens.
    Frame,
}

/// Converts the turns of a table row to those of a chat prompt.
fn turns(turns: &[Turn]) -> Vec<ChatTurn> {
    let role = |role| match role {
        Role::User => ChatRole::User,
        Role::Assistant => ChatRole::Assistant,
    };
    turns
        .iter()
        .map(|turn| ChatTurn {
            role: role(turn.role),
            text: turn.text.clone(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::super::test_pipeline::prompt;
    use super::*;

    #[test]
    fn every_frame_is_part_of_the_key_and_of_the_prompt() {
        let video = |ids: &[&str]| PromptVideo {
            video_id: "v".to_owned(),
            frame_ids: ids.iter().map(|&id| id.to_owned()).collect(),
        };
        let with = |videos: Option<Vec<PromptVideo>>| Prompt {
            image_ids: vec!["i".to_owned()],
            videos,
            ..prompt("p", "What moves?")
        };
        let key = |prompt: &Prompt| Shown::from(prompt).add_to(Key::new("test")).finish();
        let plain = with(None);
        assert_eq!(key(&plain), key(&with(Some(Vec::new()))));
        let one = with(Some(vec![video(&["a", "b"]), video(&["c"])]));
        let other = with(Some(vec![video(&["a"]), video(&["b", "c"])]));
        assert_ne!(key(&plain), key(&one));
        assert_ne!(key(&one), key(&other));
        let image = |id: &str, _| Ok::<_, Infallible>(Visual::new(id.to_owned(), [].into()));
        let chat = Shown::from(&one).chat_prompt("p", image).unwrap();
        let shown: Vec<Vec<&str>> = chat
            .images
            .iter()
            .map(|visual| visual.shown().iter().map(|one| &*one.id).collect())
            .collect();
        assert_eq!(shown, [vec!["i"], vec!["a", "b"], vec!["c"]]);
    }
}
