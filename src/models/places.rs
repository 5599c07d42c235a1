//! The places of images in the texts of a prompt.
//!
//! In the text of a table, `<image>` marks the place of an image. [`ChatPrompt`] has the places
//! apart from its texts, so that nothing that people or models wrote is taken for an image later.

use crate::{ChatPrompt, ChatRole, RowFault};

/// The placeholder of an image in a text.
pub const IMAGE_PLACEHOLDER: &str = "<image>";

/// The place of an image in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImagePlace {
    /// The index of the turn; the number of turns stands for the question.
    pub turn: usize,
    /// The byte of the turn's text that the image stands before.
    pub at: usize,
}

/// Removes the placeholders of a text and returns the bytes that they stood before.
pub fn cut_out(text: &str) -> (String, Vec<usize>) {
    let mut plain = String::with_capacity(text.len());
    let mut places = Vec::new();
    let mut pieces = text.split(IMAGE_PLACEHOLDER);
    plain.push_str(pieces.next().unwrap_or_default());
    for piece in pieces {
        places.push(plain.len());
        plain.push_str(piece);
    }
    (plain, places)
}

impl ChatPrompt {
    /// Takes the placeholders out of the user's texts and notes their places. Without images,
    /// `<image>` is a word like any other.
    #[must_use]
    pub fn with_places(mut self) -> Self {
        if self.images.is_empty() {
            return self;
        }
        let mut places = Vec::new();
        let mut take = |turn: usize, text: &mut String| {
            let (plain, found) = cut_out(text);
            places.extend(found.into_iter().map(|at| ImagePlace { turn, at }));
            *text = plain;
        };
        for (turn, said) in self.turns.iter_mut().enumerate() {
            if said.role == ChatRole::User {
                take(turn, &mut said.text);
            }
        }
        take(self.turns.len(), &mut self.question);
        self.places = places;
        self
    }

    /// Returns the places of the images in a turn, in ascending order. There are none if the images
    /// stand before the user's first text.
    pub fn places_in(&self, turn: usize) -> impl Iterator<Item = usize> {
        let places = self.places.iter().filter(move |place| place.turn == turn);
        places.map(|place| place.at)
    }

    /// Checks that there are as many places as images, or none.
    pub fn check_places(&self) -> Result<(), RowFault> {
        let (images, places) = (self.images.len(), self.places.len());
        if places == 0 || places == images {
            return Ok(());
        }
        Err(RowFault(format!(
            "the prompt has {images} image{} but its texts have {places} `{IMAGE_PLACEHOLDER}` placeholder{}; write \
             one for each image, or none",
            if images == 1 { "" } else { "s" },
            if places == 1 { "" } else { "s" },
        )))
    }
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
}
