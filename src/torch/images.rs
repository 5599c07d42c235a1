//! The pictures of a call: decoded ahead of the network, seen by it once each, and kept as long as
//! they are needed.
//!
//! A thread decodes, resizes and cuts in the order in which the pictures will be asked for, a few
//! ahead, while the network computes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;
use std::time::Instant;

use rayon::prelude::*;
use tch::Tensor;

use ovchat_models::checkpoint::{IMAGES_AHEAD, IMAGES_AT_ONCE_MAX};
use ovchat_models::{ChatPrompt, EncodedImage, ModelError, RowFault};

/// What decides a picture's features: the picture, and whether it is the only one of its prompt
/// (then the policy cuts it into tiles).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DecodedImage {
    image: String,
    alone: bool,
}

impl DecodedImage {
    /// The pictures of a prompt.
    pub fn of(prompt: &ChatPrompt) -> Vec<Self> {
        let alone = prompt.images.len() == 1;
        let shown = |image: &EncodedImage| Self {
            image: image.id.clone(),
            alone,
        };
        prompt.images.iter().map(shown).collect()
    }

    /// The id of the picture.
    pub fn image(&self) -> &str {
        &self.image
    }
}

/// What turns a picture into what the network looks at; it is told whether the picture is the only
/// one of its prompt.
pub type Decode<'a, P> = &'a (dyn Fn(&EncodedImage, bool) -> Result<P, RowFault> + Sync);

/// A picture from the thread that decodes.
struct Arrival<P> {
    shown: DecodedImage,
    pixels: Result<P, RowFault>,
    /// Its share of the time that decoding it and those beside it took.
    seconds: f64,
}

/// The pictures of the prompts of a call.
pub struct PromptImages<'a, P> {
    decode: Decode<'a, P>,
    sources: HashMap<DecodedImage, &'a EncodedImage>,
    /// Those that will arrive, in this order.
    ahead: VecDeque<DecodedImage>,
    arriving: Receiver<Arrival<P>>,
    /// Those that arrived before they were asked for.
    early: HashMap<DecodedImage, Result<P, RowFault>>,
    features: HashMap<DecodedImage, Result<Tensor, RowFault>>,
    /// How many prompts still need each.
    uses: HashMap<DecodedImage, usize>,
    pub tally: Tally,
}

/// What the pictures cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Distinct ones.
    pub images: u64,
    /// Pictures that the network looked at.
    pub passes: u64,
    /// Time that decoding took, most of it beside the network.
    pub seconds_decoding: f64,
    /// Time that the network waited for pictures.
    pub seconds_waiting: f64,
}

impl<'a, P: Send + 'a> PromptImages<'a, P> {
    /// The pictures of `prompts`, which will be asked for in this order.
    pub fn begin<'scope>(
        scope: &'scope Scope<'scope, 'a>,
        prompts: impl Iterator<Item = &'a ChatPrompt>,
        decode: Decode<'a, P>,
    ) -> Self {
        let mut sources = HashMap::new();
        let mut uses = HashMap::new();
        let mut order = Vec::new();
        for prompt in prompts {
            for (shown, image) in DecodedImage::of(prompt).into_iter().zip(&prompt.images) {
                *uses.entry(shown.clone()).or_insert(0) += 1;
                if sources.insert(shown.clone(), image).is_none() {
                    order.push((shown, image));
                }
            }
        }
        let ahead = order.iter().map(|(shown, _)| shown.clone()).collect();
        let (sender, arriving) = sync_channel(IMAGES_AHEAD);
        let images = order.len() as u64;
        scope.spawn(move || {
            let at_once = rayon::current_num_threads().min(IMAGES_AT_ONCE_MAX);
            for some in order.chunks(at_once) {
                let begun = Instant::now();
                let pixels: Vec<_> = some
                    .par_iter()
                    .map(|(shown, image)| decode(image, shown.alone))
                    .collect();
                let seconds = begun.elapsed().as_secs_f64() / some.len() as f64;
                for ((shown, _), pixels) in some.iter().zip(pixels) {
                    let arrival = Arrival {
                        shown: shown.clone(),
                        pixels,
                        seconds,
                    };
                    // Nobody waits for the rest of a call that was broken off.
                    if sender.send(arrival).is_err() {
                        return;
                    }
                }
            }
        });
        Self {
            decode,
            sources,
            ahead,
            arriving,
            early: HashMap::new(),
            features: HashMap::new(),
            uses,
            tally: Tally {
                images,
                ..Tally::default()
            },
        }
    }

    /// Has the network look at those of `shown` that it has not seen: `tower` makes features of
    /// pixels, of each in its turn.
    pub fn look(
        &mut self,
        shown: &[DecodedImage],
        tower: impl FnOnce(&[P]) -> Result<Vec<Tensor>, ModelError>,
    ) -> Result<(), ModelError> {
        let mut asked = HashSet::new();
        let mut seen = Vec::new();
        let mut pixels = Vec::new();
        for shown in shown {
            if self.features.contains_key(shown) || !asked.insert(shown) {
                continue;
            }
            let begun = Instant::now();
            let decoded = self.decoded(shown);
            self.tally.seconds_waiting += begun.elapsed().as_secs_f64();
            match decoded {
                Ok(decoded) => {
                    seen.push(shown.clone());
                    pixels.push(decoded);
                }
                Err(fault) => {
                    self.features.insert(shown.clone(), Err(fault));
                }
            }
        }
        if !pixels.is_empty() {
            let features = tower(&pixels)?;
            self.tally.passes += seen.len() as u64;
            let features = features.into_iter().map(Ok);
            self.features.extend(seen.into_iter().zip(features));
        }
        Ok(())
    }

    /// The features of pictures that were looked at, `[tokens, hidden]` each.
    pub fn features(&self, shown: &[DecodedImage]) -> Result<Vec<Tensor>, RowFault> {
        let features = |shown: &DecodedImage| match &self.features[shown] {
            Ok(features) => Ok(features.shallow_clone()),
            Err(fault) => Err(fault.clone()),
        };
        shown.iter().map(features).collect()
    }

    /// A prompt needs its pictures no more; the last one that does lets them go.
    pub fn done(&mut self, shown: &[DecodedImage]) {
        for shown in shown {
            let uses = self.uses.get_mut(shown).expect("a picture of the call");
            *uses -= 1;
            if *uses == 0 {
                self.features.remove(shown);
            }
        }
    }

    /// A prompt that was done needs its pictures again.
    pub fn again(&mut self, shown: &[DecodedImage]) {
        for shown in shown {
            *self.uses.get_mut(shown).expect("a picture of the call") += 1;
        }
    }

    /// A picture's pixels: from the thread, or, if it is not the first time, decoded here.
    fn decoded(&mut self, wanted: &DecodedImage) -> Result<P, RowFault> {
        if let Some(pixels) = self.early.remove(wanted) {
            return pixels;
        }
        if self.ahead.contains(wanted) {
            while let Ok(arrival) = self.arriving.recv() {
                self.ahead.pop_front();
                self.tally.seconds_decoding += arrival.seconds;
                if arrival.shown == *wanted {
                    return arrival.pixels;
                }
                self.early.insert(arrival.shown, arrival.pixels);
            }
        }
        (self.decode)(self.sources[wanted], wanted.alone)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tch::{Device, Kind};

    use super::super::recorded;
    use super::*;

    fn prompt(images: &[&str]) -> ChatPrompt {
        let image = |id: &&str| EncodedImage {
            id: (*id).to_owned(),
            bytes: [].into(),
        };
        ChatPrompt {
            images: images.iter().map(image).collect(),
            ..recorded::prompts().remove(3)
        }
    }

    #[test]
    fn each_picture_is_decoded_and_seen_once_and_kept_while_it_is_needed() {
        let prompts = [&["a"][..], &["b", "a", "b"], &["a"], &["broken"], &[]].map(prompt);
        let decodings = AtomicUsize::new(0);
        let decode = |image: &EncodedImage, alone: bool| {
            decodings.fetch_add(1, Ordering::Relaxed);
            if image.id == "broken" {
                return Err(RowFault("no picture".to_owned()));
            }
            Ok((image.id.clone(), alone))
        };
        let tower = |pixels: &[(String, bool)]| {
            let features = |(_, alone): &(String, bool)| {
                Tensor::full([1], i64::from(*alone), (Kind::Int64, Device::Cpu))
            };
            Ok(pixels.iter().map(features).collect())
        };
        std::thread::scope(|scope| {
            let mut images = PromptImages::begin(scope, prompts.iter(), &decode);
            let shown: Vec<Vec<DecodedImage>> = prompts.iter().map(DecodedImage::of).collect();
            // Out of order, so that some arrive early.
            for index in [1, 0, 2, 3, 4] {
                images.look(&shown[index], tower).unwrap();
                let features = images.features(&shown[index]);
                assert_eq!(features.is_err(), index == 3);
                if let Ok(features) = features {
                    let alone = i64::from(shown[index].len() == 1);
                    assert!(features.iter().all(|one| one.int64_value(&[0]) == alone));
                }
                images.done(&shown[index]);
            }
            assert!(images.features.is_empty());
            // `a` alone, `a` and `b` beside others, and the broken one.
            assert_eq!((images.tally.images, images.tally.passes), (4, 3));
            images.again(&shown[0]);
            images.look(&shown[0], tower).unwrap();
            assert!(images.features(&shown[0]).is_ok());
            images.done(&shown[0]);
        });
        assert_eq!(decodings.into_inner(), 5);
    }

    #[test]
    fn a_call_that_ends_early_leaves_nobody_waiting() {
        let names: Vec<String> = (0..50).map(|number| number.to_string()).collect();
        let prompts: Vec<ChatPrompt> = names.iter().map(|name| prompt(&[name])).collect();
        let decode = |_: &EncodedImage, _: bool| Ok(());
        std::thread::scope(|scope| {
            let _images = PromptImages::begin(scope, prompts.iter(), &decode);
        });
    }
}
