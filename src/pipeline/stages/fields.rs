//! The fields of a record, and the placeholders of images and videos in its texts.

use super::media::placeholder;
use ovchat_data::tables::{Role, Turn};
use ovchat_models::{IMAGE_PLACEHOLDER as PLACEHOLDER, VIDEO_PLACEHOLDER as VIDEO};

/// The fields of a record, before its images and videos are opened.
#[derive(Debug)]
pub struct Fields {
    pub id: Option<String>,
    pub paths: Vec<String>,
    pub video_paths: Vec<String>,
    pub system: Option<String>,
    pub turns: Vec<Turn>,
    pub question: String,
    pub captions: Option<Vec<String>>,
    pub answer: Option<String>,
    pub chosen: Option<String>,
    pub rejected: Option<String>,
    /// The number of images.
    pub images: usize,
    /// The numbers of message parts of the types `image` and `video`, each of which is a placeholder
    /// in its text.
    pub parts: [usize; 2],
    /// A placeholder that stands where no image or video can: in the system prompt or in an answer of
    /// the conversation.
    pub elsewhere: Option<&'static str>,
    /// True if the record had placeholders for its images and videos.
    pub has_places: bool,
}

impl Fields {
    /// The texts of the user, in which images and videos can stand.
    fn asked(&mut self) -> impl Iterator<Item = &mut String> {
        let turns = self.turns.iter_mut().filter(|turn| turn.role == Role::User);
        turns.map(|turn| &mut turn.text).chain([&mut self.question])
    }

    /// The number of a placeholder in the texts of the user.
    fn placed(&mut self, placeholder: &str) -> usize {
        let texts = self.asked();
        texts.map(|text| text.matches(placeholder).count()).sum()
    }

    /// Checks that there are as many placeholders as images and videos, or none, and brings them into
    /// the form of all prompts. Without images, an `<image>` is the place of a video, as in LLaVA-NeXT.
    /// The only placeholder of a turn moves before its text, as LLaVA-NeXT trains it
    /// (`preprocess_multimodal` of `llava/train/train.py`). Where all images and then all videos stand
    /// before the user's first text, one line each, no text has a placeholder.
    pub fn arrange(&mut self) -> Result<(), String> {
        let (images, videos) = (self.images, self.video_paths.len());
        if images + videos == 0 {
            return match self.parts {
                [0, 0] => Ok(()),
                [0, parts] => Err(misfit("video", 0, parts, "video part")),
                [parts, _] => Err(misfit("image", 0, parts, "image part")),
            };
        }
        let parts: usize = self.parts.iter().sum();
        if images == 0 && self.placed(VIDEO) == 0 {
            for text in self.asked() {
                *text = text.replace(PLACEHOLDER, VIDEO);
            }
        }
        let image_places = if images > 0 {
            self.placed(PLACEHOLDER)
        } else {
            0
        };
        let video_places = if videos > 0 { self.placed(VIDEO) } else { 0 };
        let placed = image_places + video_places;
        if let Some(placeholder) = self.elsewhere {
            return Err(format!(
                "`{placeholder}` stands in the system prompt or in an answer; move it into a user turn"
            ));
        }
        if parts > 0 && placed > parts {
            let is_video = images == 0 || video_places > self.parts[1];
            let kind = if is_video { "video" } else { "image" };
            return Err(format!(
                "the record has {kind} parts and the text `<{kind}>`; use one of the two"
            ));
        }
        for (kind, count, places) in [
            ("image", images, image_places),
            ("video", videos, video_places),
        ] {
            if placed != 0 && places != count {
                let thing = match parts {
                    0 => format!("`<{kind}>` placeholder"),
                    _ => format!("{kind} part"),
                };
                return Err(misfit(kind, count, places, &thing));
            }
        }
        self.has_places = placed > 0;
        if placed == 0 {
            return Ok(());
        }
        self.move_to_front();
        let left = [(PLACEHOLDER, images), (VIDEO, videos)];
        for (placeholder, count) in left {
            if count > 0 && self.placed(placeholder) != count {
                return Err(format!(
                    "a `{placeholder}` placeholder stands within another one; write one for each image and video, or none"
                ));
            }
        }
        if let Some(first) = self.asked().next()
            && let Some(rest) = behind_all(first, images, videos)
        {
            *first = rest;
        }
        Ok(())
    }

    /// Moves the only placeholder of a text before it.
    fn move_to_front(&mut self) {
        let known = self.known_placeholders();
        let count = |text: &str| -> usize {
            let counts = known.iter().map(|known| text.matches(known).count());
            counts.sum()
        };
        for text in self.asked().filter(|text| count(text) == 1) {
            for placeholder in &known {
                if text.contains(placeholder) && !text.starts_with(placeholder) {
                    *text = format!("{placeholder}\n{}", without(text, &known));
                }
            }
        }
    }

    /// The placeholders of the kinds of media that the record has.
    fn known_placeholders(&self) -> Vec<&'static str> {
        known_placeholders(self.images, self.video_paths.len())
    }

    /// Puts several images and videos that the record had no placeholders for before the user's first
    /// text, with spaces between them, as lmms-eval does.
    pub fn separate_by_spaces(&mut self) {
        let (images, videos) = (self.images, self.video_paths.len());
        if images + videos > 1
            && !self.has_places
            && let Some(first) = self.asked().next()
        {
            let places = [vec![PLACEHOLDER; images], vec![VIDEO; videos]].concat();
            *first = format!("{}\n{first}", places.join(" "));
        }
    }
}

/// Returns the placeholders of the kinds of media that there are.
pub fn known_placeholders(images: usize, videos: usize) -> Vec<&'static str> {
    let known = [(PLACEHOLDER, images), (VIDEO, videos)];
    let known = known.iter().filter(|(_, count)| *count > 0);
    known.map(|(placeholder, _)| *placeholder).collect()
}

/// Returns the text behind all images and then all videos of a record, if they stand before it, one
/// line each. A single one may stand on the first line of the text.
fn behind_all(text: &str, images: usize, videos: usize) -> Option<String> {
    let mut rest = text;
    let all = images + videos;
    for number in 0..all {
        let placeholder = if number < images { PLACEHOLDER } else { VIDEO };
        rest = rest.strip_prefix(placeholder)?;
        let line = rest.strip_prefix("\r\n").or(rest.strip_prefix('\n'));
        rest = match line {
            Some(rest) => rest,
            None if all == 1 || rest.is_empty() => rest,
            None => return None,
        };
    }
    let is_text = all == 1 || !rest.starts_with(char::is_whitespace);
    is_text.then(|| rest.trim().to_owned())
}

/// The reason why a record with a wrong number of placeholders, or of parts, is rejected.
fn misfit(kind: &str, count: usize, places: usize, thing: &str) -> String {
    let plural = |count: usize, thing: &str| match count {
        1 => format!("1 {thing}"),
        count => format!("{count} {thing}s"),
    };
    let (there, places) = (plural(count, kind), plural(places, thing));
    format!("found {there} but {places}; write one for each {kind}, or none")
}

/// Removes placeholders from a text.
pub fn without(text: &str, placeholders: &[&str]) -> String {
    let mut text = text.to_owned();
    for placeholder in placeholders {
        text = text.replace(placeholder, "");
    }
    text.trim().to_owned()
}

/// Rejects a record whose question or earlier user turns contain a placeholder for media that the
/// record does not have: an image, a video or audio.
pub fn refuse_placeholders(fields: &mut Fields) -> Result<(), String> {
    let known = fields.known_placeholders();
    let mut texts = fields.asked().map(|text| {
        // Removal alone could join two halves of another one.
        let spaced = |text: String, known: &&str| text.replace(known, " ");
        known.iter().fold(text.clone(), spaced)
    });
    match texts.find_map(|text| placeholder(&text)) {
        None => Ok(()),
        Some(word @ (PLACEHOLDER | VIDEO)) => {
            let kind = if word == PLACEHOLDER {
                "image"
            } else {
                "video"
            };
            Err(format!(
                "the text contains the placeholder `{word}`, but the record has no {kind}; name it in \
                 `{kind}`, or remove the placeholder"
            ))
        }
        Some(word) => Err(format!(
            "the text contains the placeholder `{word}`, but only images and videos are supported; remove \
             the record, or the placeholder if the text does not need it"
        )),
    }
}
