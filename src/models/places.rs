//! The places of images in the texts of a prompt.
//!
//! In the text of a table, `<image>` marks the place of an image. [`ChatPrompt`] has the places
//! apart from its texts, so that nothing that people or models wrote is taken for an image later.

use crate::{ChatPrompt, ChatRole, RowFault, Visual};

/// The placeholder of an image in a text.
pub const IMAGE_PLACEHOLDER: &str = "<image>";

/// The placeholder of a video in a text.
pub const VIDEO_PLACEHOLDER: &str = "<video>";

/// The place of an image in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImagePlace {
    /// The index of the turn; the number of turns stands for the question.
    pub turn: usize,
    /// The byte of the turn's text that the image stands before.
    pub at: usize,
}

/// Removes the placeholders of a text. Returns, for each of them, the byte that it stood before, and
/// whether it stood for a video.
fn cut_out(text: &str, has_videos: bool) -> (String, Vec<(usize, bool)>) {
    let mut plain = String::with_capacity(text.len());
    let mut places = Vec::new();
    let mut rest = text;
    let next = |rest: &str| {
        let image = rest.find(IMAGE_PLACEHOLDER).map(|at| (at, false));
        let video = rest.find(VIDEO_PLACEHOLDER).map(|at| (at, true));
        image.into_iter().chain(video.filter(|_| has_videos)).min()
    };
    while let Some((at, is_video)) = next(rest) {
        let placeholder = if is_video {
            VIDEO_PLACEHOLDER
        } else {
            IMAGE_PLACEHOLDER
        };
        plain.push_str(&rest[..at]);
        places.push((plain.len(), is_video));
        rest = &rest[at + placeholder.len()..];
    }
    plain.push_str(rest);
    (plain, places)
}

impl ChatPrompt {
    /// Returns the number of images, without videos.
    pub fn image_count(&self) -> usize {
        self.images.iter().filter(|image| !image.is_video()).count()
    }

    /// Takes the placeholders out of the user's texts and notes their places; the images and videos
    /// are brought into the order of their placeholders. Without images, `<image>` is a word like
    /// any other, and so is `<video>` without videos.
    #[must_use]
    pub fn with_places(mut self) -> Self {
        if self.images.is_empty() {
            return self;
        }
        let has_videos = self.images.iter().any(Visual::is_video);
        let mut places = Vec::new();
        let mut kinds = Vec::new();
        let mut take = |turn: usize, text: &mut String| {
            let (plain, found) = cut_out(text, has_videos);
            for (at, is_video) in found {
                places.push(ImagePlace { turn, at });
                kinds.push(is_video);
            }
            *text = plain;
        };
        for (turn, said) in self.turns.iter_mut().enumerate() {
            if said.role == ChatRole::User {
                take(turn, &mut said.text);
            }
        }
        take(self.turns.len(), &mut self.question);
        self.places = places;
        if has_videos {
            self.order(&kinds);
        }
        self
    }

    /// Brings images and videos into the order of their placeholders, if there is one for each.
    fn order(&mut self, is_video: &[bool]) {
        let (videos, images): (Vec<Visual>, Vec<Visual>) =
            self.images.iter().cloned().partition(Visual::is_video);
        let wanted = is_video.iter().filter(|is_video| **is_video).count();
        if (wanted, is_video.len() - wanted) != (videos.len(), images.len()) {
            return;
        }
        let (mut videos, mut images) = (videos.into_iter(), images.into_iter());
        let next = |is_video: &bool| match is_video {
            true => videos.next(),
            false => images.next(),
        };
        self.images = is_video.iter().filter_map(next).collect();
    }

    /// Returns the places of the images in a turn, in ascending order. There are none if the images
    /// stand before the user's first text.
    pub fn places_in(&self, turn: usize) -> impl Iterator<Item = usize> {
        let places = self.places.iter().filter(move |place| place.turn == turn);
        places.map(|place| place.at)
    }

    /// Puts a text at the place of each image; `mark` returns that of an image by its number.
    #[must_use]
    pub fn marked(&self, mark: impl Fn(usize) -> String) -> Self {
        let mut marked = self.clone();
        // From the last one, because a mark moves what stands behind it.
        for (image, place) in self.places.iter().enumerate().rev() {
            let text = match marked.turns.get_mut(place.turn) {
                Some(turn) => &mut turn.text,
                None => &mut marked.question,
            };
            text.insert_str(place.at, &mark(image));
        }
        marked.places = Vec::new();
        marked
    }

    /// Returns the question as tables have it, with the placeholders in their places.
    pub fn written_question(&self) -> String {
        let placeholder = |image: usize| match self.images.get(image) {
            Some(video) if video.is_video() => VIDEO_PLACEHOLDER.to_owned(),
            _ => IMAGE_PLACEHOLDER.to_owned(),
        };
        self.marked(placeholder).question
    }

    /// Checks that there are as many places as images, or none.
    pub fn check_places(&self) -> Result<(), RowFault> {
        let (images, places) = (self.images.len(), self.places.len());
        if places == 0 || places == images {
            return Ok(());
        }
        Err(RowFault(format!(
            "the prompt {}; write one for each image, or none",
            misfit(images, places)
        )))
    }
}

/// Returns the clause "has 2 images but its texts have 1 `<image>` placeholder".
pub fn misfit(images: usize, places: usize) -> String {
    format!(
        "has {images} image{} but its texts have {places} `{IMAGE_PLACEHOLDER}` placeholder{}",
        if images == 1 { "" } else { "s" },
        if places == 1 { "" } else { "s" },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ChatTurn;
    use crate::test_util::{png, prompt};

    fn talk(images: usize) -> ChatPrompt {
        let images = (0..images).map(|_| png(2, 2)).collect();
        let mut talk = prompt(images, "And é<image> or <image>?");
        let turn = |role, text: &str| ChatTurn {
            role,
            text: text.to_owned(),
        };
        talk.turns = vec![
            turn(ChatRole::User, "<image>\nThis?"),
            turn(ChatRole::Assistant, "No <image>."),
        ];
        talk.with_places()
    }

    #[test]
    fn placeholders_of_the_user_become_places() {
        let talk = talk(3);
        assert_eq!(talk.turns[0].text, "\nThis?");
        assert_eq!(talk.turns[1].text, "No <image>.");
        assert_eq!(talk.question, "And é or ?");
        let places: Vec<_> = talk.places.iter().map(|one| (one.turn, one.at)).collect();
        assert_eq!(places, [(0, 0), (2, 6), (2, 10)]);
        assert_eq!(talk.places_in(2).collect::<Vec<_>>(), [6, 10]);
        assert_eq!(talk.check_places(), Ok(()));
        assert_eq!(talk.written_question(), "And é<image> or <image>?");
        let marked = talk.marked(|image| format!("[{image}]"));
        assert_eq!(marked.turns[0].text, "[0]\nThis?");
    }

    #[test]
    fn without_images_the_word_stays() {
        let talk = talk(0);
        assert_eq!(talk.question, "And é<image> or <image>?");
        assert!(talk.places.is_empty());
    }

    #[test]
    fn counts_that_differ_are_a_fault() {
        let fault = talk(1).check_places().unwrap_err();
        assert_eq!(
            fault.0,
            "the prompt has 1 image but its texts have 3 `<image>` placeholders; write one for each image, or none"
        );
    }

    #[test]
    fn videos_have_their_own_placeholders() {
        let [one, two] = [png(2, 2), png(3, 3)];
        let video = Visual::video(vec![one.clone(), two.clone()]);
        let ask = |images: Vec<Visual>, text: &str| prompt(images, text).with_places();
        let asked = ask(vec![one.clone(), video.clone()], "<video> shows <image>?");
        assert!(asked.images[0].is_video() && !asked.images[1].is_video());
        assert_eq!(asked.image_count(), 1);
        assert_eq!(asked.written_question(), "<video> shows <image>?");
        assert!(
            ask(vec![one.clone(), video.clone()], "<video>?")
                .check_places()
                .is_err()
        );
        assert_eq!(
            ask(vec![one.clone()], "<video> <image>").question,
            "<video> "
        );
        let front = ask(vec![one, video], "What?");
        assert!(front.places.is_empty() && front.images[1].is_video());
    }
}
