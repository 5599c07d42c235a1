//! The prefix cache: prompts that begin alike up to the end of an image share the prefill of that
//! prefix.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;

use tch::Tensor;

use super::super::images::DecodedImage;
use super::pending_prompt::PendingPrompt;
use crate::decoder::{KvPool, Places, PrefixKv, Wanted};
use crate::device;
use crate::error::guarded;
use crate::vlm::VisionLanguageModel;
use ovchat_models::ModelError;
use ovchat_models::preprocess::PromptIds;

/// A prompt and the features of its images.
pub type Seen<'w> = (&'w PendingPrompt, Vec<Tensor>);

impl PendingPrompt {
    /// True if both have the same cacheable prefix.
    fn begins_like(&self, other: &Self) -> bool {
        self.prefix > 0
            && self.prefix == other.prefix
            && self.up_to(self.prefix) == other.up_to(other.prefix)
    }

    /// The first tokens, and the images among them.
    fn up_to(&self, tokens: usize) -> (&[i64], &[DecodedImage]) {
        let images = self.text.images.iter();
        let images = images.take_while(|image| image.end <= tokens).count();
        (&self.text.ids[..tokens], &self.shown[..images])
    }

    /// The number of tokens after the prefix.
    fn behind(&self) -> usize {
        self.text.ids.len() - self.prefix
    }

    /// The tokens after the prefix, and the places and features of the images among them.
    fn rest<'f>(&self, features: &'f [Tensor]) -> (PromptIds, &'f [Tensor]) {
        let is_behind = |image: &&Range<usize>| image.start >= self.prefix;
        let images = self.text.images.iter().filter(is_behind);
        let images: Vec<Range<usize>> = images
            .map(|image| image.start - self.prefix..image.end - self.prefix)
            .collect();
        let features = &features[self.text.images.len() - images.len()..];
        let ids = self.text.ids[self.prefix..].to_vec();
        (PromptIds { ids, images }, features)
    }
}

/// Finds the prompts that begin alike up to the end of an image, as many images as possible, and
/// groups them. Prompts about the same first image are already adjacent.
pub fn share(queue: &mut VecDeque<PendingPrompt>) {
    let waiting = queue.make_contiguous();
    let first = |one: &PendingPrompt| one.shown.first().map(|shown| shown.image().to_owned());
    for run in waiting.chunk_by_mut(|one, other| first(one) == first(other)) {
        let prefixes = shared_prefixes(run);
        for (one, prefix) in run.iter_mut().zip(prefixes) {
            one.prefix = prefix;
        }
        let likes = |one: &PendingPrompt| run.iter().position(|other| other.begins_like(one));
        let order: HashMap<usize, Option<usize>> =
            run.iter().map(|one| (one.index, likes(one))).collect();
        run.sort_by_key(|one| order[&one.index]);
    }
}

/// The length of the prefix that each prompt shares with another one, or 0.
fn shared_prefixes(run: &[PendingPrompt]) -> Vec<usize> {
    let mut prefixes = vec![0; run.len()];
    let images = run.iter().map(|one| one.text.images.len());
    for image in (0..images.max().unwrap_or(0)).rev() {
        let mut alike: HashMap<_, Vec<usize>> = HashMap::new();
        for (place, one) in run.iter().enumerate() {
            if let Some(range) = one.text.images.get(image)
                && prefixes[place] == 0
            {
                alike.entry(one.up_to(range.end)).or_default().push(place);
            }
        }
        for places in alike.into_values().filter(|places| places.len() > 1) {
            for place in places {
                prefixes[place] = run[place].text.images[image].end;
            }
        }
    }
    prefixes
}

/// A prefix shared by some prompts.
struct CachedPrefix {
    /// One of these prompts.
    of: PendingPrompt,
    places: Rc<Places>,
}

/// Prefills prompts; keeps the last prefix as long as the following prompts share it.
#[derive(Default)]
pub struct PrefixCache {
    held: Option<CachedPrefix>,
}

/// The result of a prefill.
pub struct Read {
    /// The places of each prompt in the pool, in order, and the logits of its next token,
    /// `[1, vocab]`.
    pub prompts: Vec<(Vec<Rc<Places>>, Tensor)>,
    /// Prompt tokens that were not prefilled, because another prompt shares them.
    pub shared_tokens: usize,
}

impl PrefixCache {
    /// The number of cached tokens.
    pub fn tokens(&self) -> usize {
        self.held.as_ref().map_or(0, |held| held.of.prefix)
    }

    /// The number of tokens to prefill for each of these consecutive prompts.
    pub fn lengths(&self, prompts: &[PendingPrompt]) -> Vec<usize> {
        let mut before = self.held.as_ref().map(|held| &held.of);
        let length = |one| {
            let before = before.replace(one);
            if before.is_some_and(|before| before.begins_like(one)) {
                one.behind()
            } else {
                one.text.ids.len()
            }
        };
        prompts.iter().map(length).collect()
    }

    /// Prefills prompts whose image features are known: first the shared prefixes, then the
    /// remaining tokens of their prompts, and the other prompts whole. `next` is the prompt that
    /// follows them.
    pub fn read(
        &mut self,
        network: &dyn VisionLanguageModel,
        pool: &mut KvPool,
        seen: &[Seen<'_>],
        next: Option<&PendingPrompt>,
    ) -> Result<Read, ModelError> {
        let mut known: Vec<CachedPrefix> = self.held.take().into_iter().collect();
        let mut new: Vec<&Seen<'_>> = Vec::new();
        for one in seen {
            let is_known = known.iter().any(|other| other.of.begins_like(one.0))
                || new.iter().any(|other| other.0.begins_like(one.0));
            if one.0.prefix > 0 && !is_known {
                new.push(one);
            }
        }
        for ((one, _), places) in new.iter().zip(read_prefixes(network, pool, &new)?) {
            let (of, places) = ((*one).clone(), Rc::new(places));
            known.push(CachedPrefix { of, places });
        }
        let (behind, whole): (Vec<usize>, Vec<usize>) =
            (0..seen.len()).partition(|&place| seen[place].0.prefix > 0);
        let mut prompts: Vec<Option<(Vec<Rc<Places>>, Tensor)>> =
            seen.iter().map(|_| None).collect();
        for places in [behind, whole].into_iter().filter(|some| !some.is_empty()) {
            let some: Vec<&Seen<'_>> = places.iter().map(|&place| &seen[place]).collect();
            for (place, read) in places
                .iter()
                .zip(read_behind(network, pool, &some, &known)?)
            {
                prompts[*place] = Some(read);
            }
        }
        let begun: usize = seen.iter().map(|(one, _)| one.prefix).sum();
        let read_once: usize = new.iter().map(|(one, _)| one.prefix).sum();
        // Prompts about the same images are adjacent.
        let last = seen.last().map(|(one, _)| *one);
        let last = last.filter(|last| next.is_some_and(|next| next.begins_like(last)));
        self.held = last.and_then(|last| known.into_iter().find(|one| one.of.begins_like(last)));
        let prompts = prompts.into_iter();
        Ok(Read {
            prompts: prompts
                .map(|read| read.expect("every prompt was prefilled"))
                .collect(),
            shared_tokens: begun - read_once,
        })
    }
}

/// Prefills the prefixes of prompts.
fn read_prefixes(
    network: &dyn VisionLanguageModel,
    pool: &mut KvPool,
    prompts: &[&Seen<'_>],
) -> Result<Vec<Places>, ModelError> {
    if prompts.is_empty() {
        return Ok(Vec::new());
    }
    let lengths = prompts.iter().map(|(one, _)| one.prefix as i64);
    let lengths: Vec<i64> = lengths.collect();
    let read = lengths.iter().sum::<i64>() as usize;
    guarded("prefilling shared prefixes", prompts.len(), read, || {
        let _no_grad = tch::no_grad_guard();
        let embeds = prompts.iter().map(|(one, features)| {
            let (ids, shown) = one.up_to(one.prefix);
            let prefix = PromptIds {
                ids: ids.to_vec(),
                images: one.text.images[..shown.len()].to_vec(),
            };
            network.embed_prompt(&prefix, features)
        });
        let embeds = Tensor::cat(&embeds.collect::<Vec<_>>(), 0);
        let decoder = network.decoder();
        let (_, prefixes) = decoder.prefill(&embeds, &lengths, Wanted::Nothing);
        let stored = prefixes.iter().map(|prefix| pool.store(prefix)).collect();
        device::wait(network.device());
        stored
    })
}

/// Prefills the remaining tokens of prompts whose prefixes are `known`, or prompts without a shared
/// prefix whole. Either all of them have one, or none.
fn read_behind(
    network: &dyn VisionLanguageModel,
    pool: &mut KvPool,
    prompts: &[&Seen<'_>],
    known: &[CachedPrefix],
) -> Result<Vec<(Vec<Rc<Places>>, Tensor)>, ModelError> {
    let decoder = network.decoder();
    let lengths = prompts.iter().map(|(one, _)| one.behind() as i64);
    let lengths: Vec<i64> = lengths.collect();
    let read = lengths.iter().sum::<i64>() as usize;
    guarded("prefilling prompts", prompts.len(), read, || {
        let _no_grad = tch::no_grad_guard();
        let embeds = prompts.iter().map(|(one, features)| {
            let (text, features) = one.rest(features);
            network.embed_prompt(&text, features)
        });
        let embeds = Tensor::cat(&embeds.collect::<Vec<_>>(), 0);
        let shared: Vec<Option<&CachedPrefix>> = prompts
            .iter()
            .map(|(one, _)| {
                let mut known = known.iter().rev();
                let found = (one.prefix > 0).then(|| known.find(|known| known.of.begins_like(one)));
                found.map(|found| found.expect("the prefix was prefilled"))
            })
            .collect();
        let (lasts, prefixes) = if prompts[0].0.prefix > 0 {
            let keys: Vec<PrefixKv> = shared
                .iter()
                .flatten()
                .map(|known| pool.prefix(&known.places))
                .collect();
            let behind: Vec<(&PrefixKv, i64)> = keys.iter().zip(lengths.iter().copied()).collect();
            decoder.read_on(&embeds, &behind, Wanted::Last)
        } else {
            decoder.prefill(&embeds, &lengths, Wanted::Last)
        };
        let logits = network.lm_head().forward(&lasts); // [prompts, vocab]
        let read = prefixes.iter().zip(shared).enumerate();
        let read = read.map(|(number, (prefix, shared))| {
            let shared = shared.map(|known| Rc::clone(&known.places));
            let places = shared.into_iter().chain([Rc::new(pool.store(prefix))]);
            (places.collect(), logits.narrow(0, number as i64, 1))
        });
        let read = read.collect();
        device::wait(network.device());
        read
    })
}
