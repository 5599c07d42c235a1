//! Sampling of k answers per prompt, with one vision pass per image and one prefill per prompt.
//!
//! Each distinct image of a call goes through the tower once and each prompt through the decoder
//! once; a prefix that prompts about the same images share is also computed once. The answers to a
//! prompt then share its KV cache and are decoded one token at a time, batched with those of other
//! prompts, so that the weights are read once for all. A finished answer leaves the batch; as the
//! [`Budget`] permits, the next prompts enter. The composition of batches depends only on the
//! prompts of the call, and the random numbers of an answer only on its own prompt.
//!
//! If memory runs out nevertheless, the answers in progress start over with half the budget; a
//! prompt that was alone becomes a rejected row.

mod batch;
mod pending_prompt;
mod prefix_cache;

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use rayon::prelude::*;

use self::batch::{Batch, Ends, Growing, PartialAnswer};
use self::pending_prompt::PendingPrompt;
use self::prefix_cache::PrefixCache;
use super::budget::{Budget, packs, too_large};
use super::checkpoint::Checkpoint;
use super::device;
use super::error::guarded;
use super::images::{DecodedImage, PromptImages};
use super::networks;
use super::sampling::{Chooser, answer_seed};
use super::vlm::VisionLanguageModel;
use ovchat_models::checkpoint::{Sizes, elements};
use ovchat_models::preprocess::{Processor, Tiles};
use ovchat_models::{
    self as models, ChatPrompt, Emit, Generation, ModelError, ModelTelemetry, Policy, RowFault,
    Sampling, Stop, Visual,
};

/// A policy: a vision-language network that answers prompts.
#[derive(Debug)]
pub struct NetworkPolicy {
    prep: Processor,
    network: Box<dyn VisionLanguageModel>,
    banned: Vec<i64>,
    /// The batch limits of the next call.
    pub budget: Budget,
}

/// A call in progress.
struct Session<'a> {
    network: &'a dyn VisionLanguageModel,
    prep: &'a Processor,
    how: &'a Sampling,
    stops: Vec<i64>,
    budget: Budget,
    waiting: VecDeque<PendingPrompt>,
    batch: Batch<'a>,
    images: PromptImages<'a, Tiles>,
    prefixes: PrefixCache,
    telemetry: ModelTelemetry,
}

/// The outcome of a prompt: its index in the call, and its answers.
type Outcome = (usize, Result<Vec<Generation>, RowFault>);

impl NetworkPolicy {
    /// Opens the checkpoint of the spec.
    pub fn open(spec: &models::VisionLanguageSpec) -> Result<Self, ModelError> {
        let folder = &spec.weights;
        let prep = Processor::open(folder)?;
        let (device, kind) = device::choose(spec.device, spec.dtype)?;
        let checkpoint = Checkpoint::open(folder)?;
        let architecture = prep.architecture();
        let network = networks::open_merged(spec, architecture, &checkpoint, device, kind)?;
        let element = kind.elt_size_in_bytes() as u64;
        device::prepare(elements(architecture));
        let sizes = Sizes::new(elements(architecture), prep.text_config(), element);
        Ok(Self {
            banned: prep.chat().banned(prep.text_config().vocab_size),
            prep,
            network,
            budget: Budget::plan(spec.memory_gb, device, sizes),
        })
    }

    /// The prompts that can be answered, in processing order (see [`by_first_image`]), and the
    /// faults of the others.
    fn queue(
        &self,
        prompts: &[ChatPrompt],
        how: &Sampling,
    ) -> (VecDeque<PendingPrompt>, Vec<(usize, RowFault)>) {
        let (prep, budget) = (&self.prep, self.budget);
        let waiting: Vec<Result<PendingPrompt, RowFault>> = prompts
            .par_iter()
            .enumerate()
            .map(|(index, prompt)| {
                let text = prep.ids(prompt)?;
                let room = prep.context() - text.ids.len();
                let waiting = PendingPrompt {
                    index,
                    text,
                    shown: DecodedImage::of(prompt),
                    prefix: 0,
                    seeds: (0..how.count)
                        .map(|answer| answer_seed(prompt.seed, answer))
                        .collect(),
                    drafts: if how.temperature == 0.0 { 1 } else { how.count },
                    tokens_max: how.max_new_tokens.min(room),
                };
                budget.admit(waiting.tokens())?;
                Ok(waiting)
            })
            .collect();
        let mut queue = VecDeque::with_capacity(prompts.len());
        let mut faults = Vec::new();
        let mut waiting: Vec<Option<Result<PendingPrompt, RowFault>>> =
            waiting.into_iter().map(Some).collect();
        for index in by_first_image(prompts) {
            match waiting[index].take().expect("each prompt once") {
                Ok(prompt) => queue.push_back(prompt),
                Err(fault) => faults.push((index, fault)),
            }
        }
        prefix_cache::share(&mut queue);
        (queue, faults)
    }

    /// The tokens that end an answer: the model's own and those of the settings.
    fn stops(&self, how: &Sampling) -> Result<Vec<i64>, ModelError> {
        let vocab = self.prep.text_config().vocab_size as i64;
        let mut asked = how.stop_token_ids.iter();
        if let Some(id) = asked.find(|id| !(0..vocab).contains(*id)) {
            return Err(ModelError::Torch {
                what: "sampling".to_owned(),
                problem: format!(
                    "`stop_token_ids` contains {id}, but the model's token ids are 0 to {}",
                    vocab - 1
                ),
            });
        }
        Ok([self.prep.chat().stops(), &how.stop_token_ids].concat())
    }
}

impl Session<'_> {
    /// Advances all answers: prefills prompts that fit into the budget, then decodes one token of
    /// each answer. `None` when all are done.
    fn go_on(&mut self) -> Result<Option<Vec<Outcome>>, ModelError> {
        let mut outcomes = Vec::new();
        let (entering, tokens) = self.admit();
        match self.reserve(entering.len(), tokens) {
            Ok(()) => {}
            Err(error @ ModelError::OutOfMemory { .. }) => {
                self.begin_again(&error, entering, &mut outcomes);
                return Ok(Some(outcomes));
            }
            Err(error) => return Err(error),
        }
        let lengths = self.prefixes.lengths(&entering);
        let mut entering = VecDeque::from(entering);
        for pack in packs(&lengths, self.budget.read_tokens) {
            let some: Vec<PendingPrompt> = entering.drain(..pack.len()).collect();
            match self.read(&some, entering.front(), &mut outcomes) {
                Ok(()) => {}
                Err(error @ ModelError::OutOfMemory { .. }) => {
                    let rest = some.into_iter().chain(entering).collect();
                    self.begin_again(&error, rest, &mut outcomes);
                    return Ok(Some(outcomes));
                }
                Err(error) => return Err(error),
            }
        }
        if self.batch.prompts.is_empty() {
            let is_over = self.waiting.is_empty() && outcomes.is_empty();
            return Ok((!is_over).then_some(outcomes));
        }
        match self.step(&mut outcomes) {
            Ok(()) => {}
            Err(error @ ModelError::OutOfMemory { .. }) => {
                self.begin_again(&error, Vec::new(), &mut outcomes);
            }
            Err(error) => return Err(error),
        }
        Ok(Some(outcomes))
    }

    /// Makes room in the KV cache for a batch of so many tokens.
    fn reserve(&mut self, entering: usize, tokens: usize) -> Result<(), ModelError> {
        let pool = &mut self.batch.pool;
        if pool.capacity() >= tokens as i64 {
            return Ok(());
        }
        guarded("reserving the KV cache", entering, tokens, || {
            pool.ensure(tokens as i64);
        })
    }

    /// The next prompts that fit into the budget, at least one if the batch is empty; and the tokens of
    /// the batch with them.
    fn admit(&mut self) -> (Vec<PendingPrompt>, usize) {
        let (mut rows, mut tokens) = (self.batch.rows(), self.batch.tokens());
        tokens += self.prefixes.tokens();
        let mut entering = Vec::new();
        while let Some(next) = self.waiting.front() {
            rows += next.drafts;
            let is_first = self.batch.prompts.is_empty() && entering.is_empty();
            let has_room = rows <= self.budget.rows && tokens + next.tokens() <= self.budget.tokens;
            if !is_first && !has_room {
                break;
            }
            tokens += next.tokens();
            entering.extend(self.waiting.pop_front());
        }
        (entering, tokens)
    }

    /// Prefills prompts and adds their answers to the batch. `next` is the prompt that is prefilled
    /// after them, if it has been admitted.
    fn read(
        &mut self,
        entering: &[PendingPrompt],
        next: Option<&PendingPrompt>,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), ModelError> {
        let network = self.network;
        let device = network.device();
        let shown: Vec<DecodedImage> = entering.iter().flat_map(|one| one.shown.clone()).collect();
        let seconds_tower = &mut self.telemetry.seconds_tower;
        self.images.look(&shown, |tiles| {
            let begun = Instant::now();
            let rows = tiles.iter().map(|tiles| tiles.packing.tiles()).sum();
            let length = tiles.iter().map(|tiles| tiles.packing.tokens()).sum();
            let features = guarded("encoding images", rows, length, || {
                let _no_grad = tch::no_grad_guard();
                let tiles: Vec<&Tiles> = tiles.iter().collect();
                let features = network.image_features(&tiles);
                device::wait(device);
                features
            });
            *seconds_tower += begun.elapsed().as_secs_f64();
            features
        })?;

        let begun = Instant::now();
        let mut seen = Vec::with_capacity(entering.len());
        let mut faults = Vec::new();
        for waiting in entering {
            match self.images.features(&waiting.shown) {
                Ok(features) => seen.push((waiting, features)),
                Err(fault) => faults.push((waiting.index, Err(fault))),
            }
        }
        let read = self.prefixes.read(
            network,
            &mut self.batch.pool,
            &seen,
            next.or(self.waiting.front()),
        )?;
        self.telemetry.shared_tokens += read.shared_tokens as u64;
        let batch = &mut self.batch;
        let tokens = seen.iter().map(|(waiting, _)| waiting.tokens()).sum();
        guarded("reserving the KV cache", seen.len(), tokens, || {
            for ((waiting, _), (places, logits)) in seen.iter().zip(read.prompts) {
                let growing = Growing::new((*waiting).clone(), places, &mut batch.pool);
                batch.enter(growing, &logits);
            }
        })?;
        let read = seen
            .iter()
            .map(|(waiting, _)| waiting.text.ids.len() as u64);
        self.telemetry.prompt_tokens += read.sum::<u64>();
        outcomes.append(&mut faults);
        self.telemetry.seconds_prefill += begun.elapsed().as_secs_f64();
        for waiting in entering {
            self.images.done(&waiting.shown);
        }
        Ok(())
    }

    /// Decodes one token of every answer in the batch.
    fn step(&mut self, outcomes: &mut Vec<Outcome>) -> Result<(), ModelError> {
        let begun = Instant::now();
        let rows = self.batch.rows();
        let tokens = self.batch.tokens();
        let ends = Ends {
            token_ids: &self.stops,
            strings: &self.how.stop_strings,
            chat: self.prep.chat(),
        };
        let (batch, network) = (&mut self.batch, self.network);
        let stepped = guarded("sampling", rows, tokens, || batch.step(network, &ends));
        for (prompt, outcome) in std::mem::take(&mut self.batch.done) {
            let answers = outcome.map(|()| self.answers(&prompt));
            outcomes.push((prompt.waiting.index, answers));
        }
        stepped?;
        self.telemetry.steps += 1;
        self.telemetry.step_rows += rows as u64;
        self.telemetry.seconds_decode += begun.elapsed().as_secs_f64();
        Ok(())
    }

    /// Handles an OOM: the prompts in the batch and those `entering` return to the queue, and the
    /// budget is halved. A prompt that was alone is given up.
    fn begin_again(
        &mut self,
        error: &ModelError,
        entering: Vec<PendingPrompt>,
        outcomes: &mut Vec<Outcome>,
    ) {
        let growing = self.batch.abandon();
        // Some of those that were entering may be in the batch already.
        let is_in = |one: &PendingPrompt| growing.iter().any(|other| other.index == one.index);
        let entering: Vec<PendingPrompt> = entering.into_iter().filter(|one| !is_in(one)).collect();
        self.prefixes = PrefixCache::default();
        for waiting in &growing {
            self.images.again(&waiting.shown);
        }
        let involved = growing.len() + entering.len();
        for waiting in growing.into_iter().chain(entering).rev() {
            self.waiting.push_front(waiting);
        }
        if involved == 1 {
            if let Some(alone) = self.waiting.pop_front() {
                self.images.done(&alone.shown);
                outcomes.push((alone.index, Err(too_large(error))));
            }
        } else {
            self.budget.halve();
        }
        self.batch.pool = self.network.decoder().pool(self.budget.tokens as i64);
    }

    /// The answers to a prompt, all of whose tokens are sampled.
    fn answers(&mut self, prompt: &Growing) -> Vec<Generation> {
        let made = prompt.drafts.iter();
        self.telemetry.answer_tokens += made.map(|draft| draft.token_ids.len() as u64).sum::<u64>();
        let seeds = prompt.waiting.seeds.iter().enumerate();
        seeds
            .map(|(answer, &seed)| {
                let draft = &prompt.drafts[answer.min(prompt.drafts.len() - 1)];
                self.generation(draft, seed)
            })
            .collect()
    }

    fn generation(&self, draft: &PartialAnswer, seed: i64) -> Generation {
        let stop = draft.stop.expect("a finished draft");
        let spoken = draft.token_ids.len() - usize::from(stop == Stop::Token);
        let mut text = self.prep.chat().decode(&draft.token_ids[..spoken]);
        if stop == Stop::String {
            let strings = self.how.stop_strings.iter();
            let end = strings.filter_map(|string| text.find(string)).min();
            text.truncate(end.unwrap_or(text.len()));
        }
        Generation {
            text,
            token_ids: draft.token_ids.iter().map(|&id| id as i32).collect(),
            token_logps: draft.token_logps.clone(),
            stop,
            seed,
        }
    }

    /// The resource usage of the call.
    fn telemetry(self) -> ModelTelemetry {
        let images = self.images.tally;
        ModelTelemetry {
            images: images.images,
            tower_passes: images.passes,
            rows_max: self.budget.rows as u64,
            tokens_max: self.budget.tokens as u64,
            oom_retries: self.budget.oom_retries,
            seconds_images: images.seconds_decoding,
            seconds_waiting: images.seconds_waiting,
            ..self.telemetry
        }
    }
}

impl Policy for NetworkPolicy {
    /// The length of an answer is limited by the context that the prompt leaves; it then ends with
    /// [`Stop::Length`], as an answer that reaches `max_new_tokens` does.
    fn sample(
        &mut self,
        prompts: &[ChatPrompt],
        how: &Sampling,
        emit: Emit<'_, Vec<Generation>>,
    ) -> Result<ModelTelemetry, ModelError> {
        assert!(how.count > 0 && how.max_new_tokens > 0, "nothing to sample");
        let stops = self.stops(how)?;
        let (waiting, faults) = self.queue(prompts, how);
        for (index, fault) in faults {
            if emit(index, Err(fault)).is_break() {
                return Ok(ModelTelemetry::default());
            }
        }
        let prep = &self.prep;
        let decode = |image: &Visual, alone: bool| prep.tiles(image, if alone { 1 } else { 2 });
        let vocab = prep.text_config().vocab_size as i64;
        let answers: usize = waiting.iter().map(|one| one.drafts).sum();
        let telemetry = std::thread::scope(|scope| {
            let shown = waiting.iter().map(|one| &prompts[one.index]);
            let mut session = Session {
                images: PromptImages::begin(scope, shown, &decode),
                network: &*self.network,
                prep,
                how,
                stops,
                budget: self.budget,
                batch: Batch::new(
                    Chooser::new(how, vocab, &self.banned, self.network.device()),
                    self.network.decoder().pool(self.budget.tokens as i64),
                ),
                telemetry: ModelTelemetry {
                    prompts: waiting.len() as u64,
                    ..ModelTelemetry::default()
                },
                waiting,
                prefixes: PrefixCache::default(),
            };
            while let Some(outcomes) = session.go_on()? {
                for (index, outcome) in outcomes {
                    if emit(index, outcome).is_break() {
                        return Ok(session.telemetry());
                    }
                }
            }
            Ok::<_, ModelError>(session.telemetry())
        })?;
        for _ in 0..telemetry.oom_retries {
            self.budget.halve();
        }
        self.budget = self.budget.for_next();
        Ok(ModelTelemetry {
            rows_max: telemetry.rows_max.min(answers as u64),
            ..telemetry
        })
    }

    fn plan(&self) -> Option<String> {
        Some(self.budget.of_sampling())
    }
}

/// The order in which prompts are answered: as given, but with prompts about the same image
/// together, so that its features need not be kept for long.
fn by_first_image(prompts: &[ChatPrompt]) -> Vec<usize> {
    let mut first_seen = HashMap::new();
    let mut order: Vec<(usize, usize)> = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| match prompt.images.first() {
            Some(image) => (*first_seen.entry(&image.id).or_insert(index), index),
            None => (index, index),
        })
        .collect();
    order.sort_unstable();
    order.into_iter().map(|(_, index)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::super::error::tests::{run_out_after, run_out_late_after};
    use super::super::recorded::onevision::{
        assert_same, clear, how, many, measured, prompts, sample, spec,
    };
    use super::*;
    use ovchat_models::Dtype;

    fn policy() -> NetworkPolicy {
        NetworkPolicy::open(&spec(Dtype::Float32)).unwrap()
    }

    /// Memory runs out anywhere in a part, once or repeatedly.
    #[test]
    fn memory_that_runs_out_costs_time_and_no_answer() {
        let prompts = many(3);
        let how = clear(5);
        let mut policy = policy();
        let budget = policy.budget;
        let (expected, _) = measured(&mut policy, &prompts, &how);
        for calls in 0..14 {
            policy.budget = budget;
            for run_out in [run_out_after, run_out_late_after] {
                policy.budget = budget;
                run_out(calls);
                let (found, telemetry) = measured(&mut policy, &prompts, &how);
                assert_eq!(telemetry.oom_retries, 1, "{calls}");
                assert_same(&found, &expected);
                assert_eq!((policy.budget.rows, policy.budget.oom_retries), (32, 0));
            }
        }
    }

    #[test]
    fn a_prompt_that_is_too_much_alone_costs_its_row_only() {
        let mut policy = policy();
        policy.budget.rows = 1;
        // The tower, then the prefill, of the first prompt; a decode step of the next one.
        for (calls, lost) in [(1, 0), (14 + 2, 2)] {
            run_out_after(calls);
            let rows = sample(&mut policy, &prompts(), &how(2, 3.0));
            for (index, row) in rows.iter().enumerate() {
                match row {
                    Ok(_) => assert_ne!(index, lost),
                    Err(fault) => {
                        assert_eq!(index, lost);
                        assert!(fault.0.contains("out of memory"), "{fault}");
                    }
                }
            }
        }
    }

    #[test]
    fn prompts_about_one_image_are_answered_together() {
        let prompt = |image: Option<&str>| {
            let images = image
                .into_iter()
                .map(|id| Visual::new(id.to_owned(), [].into()));
            ChatPrompt {
                images: images.collect(),
                ..prompts().remove(3)
            }
        };
        let all = ["a", "b", "a"].map(|id| prompt(Some(id)));
        assert_eq!(by_first_image(&all), [0, 2, 1]);
        let wordy = [prompt(Some("a")), prompt(None), prompt(Some("a"))];
        assert_eq!(by_first_image(&wordy), [0, 2, 1]);
    }
}
