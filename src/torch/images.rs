//! The images of a call: preprocessed ahead of the network, encoded once each, and released after
//! their last use.
//!
//! A thread decodes, resizes and tiles the images in the order of their use, a few ahead, while the
//! network computes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;
use std::time::Instant;

use rayon::prelude::*;
use tch::Tensor;

use ovchat_models::checkpoint::{IMAGES_AHEAD, IMAGES_AT_ONCE_MAX};
use ovchat_models::{ChatPrompt, ModelError, RowFault, Visual};

/// The key of an image's features: the image, and whether it is the only one of its prompt (the
/// policy then splits it into tiles).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DecodedImage {
    image: String,
    alone: bool,
}

impl DecodedImage {
    /// The images of a prompt.
    pub fn of(prompt: &ChatPrompt) -> Vec<Self> {
        let alone = prompt.image_count() == 1;
        let shown = |image: &Visual| Self {
            image: image.id.clone(),
            alone: alone && !image.is_video(),
        };
        prompt.images.iter().map(shown).collect()
    }

    /// The id of the image.
    pub fn image(&self) -> &str {
        &self.image
    }
}

/// Converts an image into the network's input; the flag is true if it is the only image of its
/// prompt.
pub type Decode<'a, P> = &'a (dyn Fn(&Visual, bool) -> Result<P, RowFault> + Sync);

/// A preprocessed image from the decoding thread.
struct Arrival<P> {
    shown: DecodedImage,
    pixels: Result<P, RowFault>,
    /// Its share of the time that decoding a group of images took.
    seconds: f64,
}

/// The images of the prompts of a call.
pub struct PromptImages<'a, P> {
    decode: Decode<'a, P>,
    sources: HashMap<DecodedImage, &'a Visual>,
    /// The images that the thread has yet to deliver, in order.
    ahead: VecDeque<DecodedImage>,
    arriving: Receiver<Arrival<P>>,
    /// The images that were delivered before they were needed.
    early: HashMap<DecodedImage, Result<P, RowFault>>,
    features: HashMap<DecodedImage, Result<Tensor, RowFault>>,
    /// The number of prompts that still need each image.
    uses: HashMap<DecodedImage, usize>,
    pub tally: Tally,
}

/// The costs of the images.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Distinct images.
    pub images: u64,
    /// Images that were encoded by the network.
    pub passes: u64,
    /// Seconds spent on decoding, most of it in parallel with the network.
    pub seconds_decoding: f64,
    /// Seconds that the network waited for images.
    pub seconds_waiting: f64,
}

impl<'a, P: Send + 'a> PromptImages<'a, P> {
    /// Starts decoding the images of `prompts`, in the order of their use.
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
                    // The receiver is gone if the call was aborted.
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

    /// Encodes those images of `shown` that have no features yet; `tower` computes features from
    /// pixels, in order.
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

    /// The features of encoded images, `[tokens, hidden]` each.
    pub fn features(&self, shown: &[DecodedImage]) -> Result<Vec<Tensor>, RowFault> {
        let features = |shown: &DecodedImage| match &self.features[shown] {
            Ok(features) => Ok(features.shallow_clone()),
            Err(fault) => Err(fault.clone()),
        };
        shown.iter().map(features).collect()
    }

    /// Releases a prompt's images; the features of an image are dropped after its last use.
    pub fn done(&mut self, shown: &[DecodedImage]) {
        for shown in shown {
            let uses = self.uses.get_mut(shown).expect("an image of the call");
            *uses -= 1;
            if *uses == 0 {
                self.features.remove(shown);
            }
        }
    }

    /// Undoes [`PromptImages::done`] for a prompt that has to run again.
    pub fn again(&mut self, shown: &[DecodedImage]) {
        for shown in shown {
            *self.uses.get_mut(shown).expect("an image of the call") += 1;
        }
    }

    /// The pixels of an image: from the thread, or decoded here if it was delivered before.
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

    use super::super::recorded::onevision;
    use super::*;

    fn prompt(images: &[&str]) -> ChatPrompt {
        let image = |id: &&str| Visual::new((*id).to_owned(), [].into());
        ChatPrompt {
            images: images.iter().map(image).collect(),
            ..onevision::prompts().remove(3)
        }
    }

    #[test]
    fn each_image_is_decoded_and_seen_once_and_kept_while_it_is_needed() {
        let prompts = [&["a"][..], &["b", "a", "b"], &["a"], &["broken"], &[]].map(prompt);
        let decodings = AtomicUsize::new(0);
        let decode = |image: &Visual, alone: bool| {
            decodings.fetch_add(1, Ordering::Relaxed);
            if image.id == "broken" {
                return Err(RowFault("not an image".to_owned()));
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
            // `a` as a single image, `a` and `b` with others, and the broken one.
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
        let decode = |_: &Visual, _: bool| Ok(());
        std::thread::scope(|scope| {
            let _images = PromptImages::begin(scope, prompts.iter(), &decode);
        });
    }
}
