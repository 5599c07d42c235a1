//! A batch of answers that are decoded together, one token at a time.

use std::rc::Rc;

use tch::Tensor;

use super::super::decoder::{Branches, KvPool, Places};
use super::super::device;
use super::super::sampling::{Chooser, uniform};
use super::super::vlm::VisionLanguageModel;
use super::pending_prompt::PendingPrompt;
use ovchat_models::preprocess::Chat;
use ovchat_models::{RowFault, Stop};

/// An answer in progress.
#[derive(Debug, Clone, Default)]
pub struct PartialAnswer {
    pub token_ids: Vec<i64>,
    pub token_logps: Vec<f32>,
    /// The reason why it ended, if it has.
    pub stop: Option<Stop>,
}

/// The conditions that end an answer.
pub struct Ends<'a> {
    pub token_ids: &'a [i64],
    pub strings: &'a [String],
    pub chat: &'a Chat,
}

impl Ends<'_> {
    /// The reason why a draft ends with its last token, if it does.
    fn stop(&self, draft: &PartialAnswer, tokens_max: usize) -> Option<Stop> {
        let last = draft.token_ids.last()?;
        if self.token_ids.contains(last) {
            return Some(Stop::Token);
        }
        if !self.strings.is_empty() {
            let text = self.chat.decode(&draft.token_ids);
            if self.strings.iter().any(|string| text.contains(string)) {
                return Some(Stop::String);
            }
        }
        (draft.token_ids.len() >= tokens_max).then_some(Stop::Length)
    }
}

/// A prompt whose answers are in progress.
pub struct Growing {
    pub waiting: PendingPrompt,
    pub drafts: Vec<PartialAnswer>,
    /// The indices of the drafts that have not ended, in order.
    live: Vec<usize>,
    /// The places of the prompt in the pool: what it shares with others, and the rest.
    prompt: Vec<Rc<Places>>,
    /// The places of each draft.
    own: Vec<Places>,
}

impl Growing {
    /// A prompt after its prefill, whose answers get places in the pool.
    pub fn new(waiting: PendingPrompt, prompt: Vec<Rc<Places>>, pool: &mut KvPool) -> Self {
        let tokens = waiting.tokens_max as i64;
        Self {
            drafts: vec![PartialAnswer::default(); waiting.drafts],
            live: (0..waiting.drafts).collect(),
            own: (0..waiting.drafts).map(|_| pool.reserve(tokens)).collect(),
            waiting,
            prompt,
        }
    }

    /// The rows of the next step: the last token of each live draft, which the pool does not have yet.
    fn branches(&self) -> Branches<'_> {
        let row = |&draft: &usize| {
            let tokens = self.drafts[draft].token_ids.len() as i64;
            (&self.own[draft], tokens - 1)
        };
        Branches {
            prompt: self.prompt.iter().map(|places| &**places).collect(),
            rows: self.live.iter().map(row).collect(),
        }
    }

    /// The random number for the next token of a draft.
    fn number(&self, draft: usize) -> f64 {
        uniform(
            self.waiting.seeds[draft],
            self.drafts[draft].token_ids.len(),
        )
    }

    /// Appends a token to each live draft. Returns the positions, among the live drafts, of those
    /// that continue.
    fn grow(&mut self, tokens: &[i64], logps: &[f32], ends: &Ends<'_>) -> Vec<i64> {
        let mut going_on = Vec::with_capacity(self.live.len());
        for (place, &row) in self.live.iter().enumerate() {
            let draft = &mut self.drafts[row];
            draft.token_ids.push(tokens[place]);
            draft.token_logps.push(logps[place]);
            draft.stop = ends.stop(draft, self.waiting.tokens_max);
            if draft.stop.is_none() {
                going_on.push(place as i64);
            }
        }
        going_on
    }

    /// Keeps only the live drafts at these positions.
    fn keep(&mut self, places: &[i64]) {
        let kept = places.iter().map(|&place| self.live[place as usize]);
        self.live = kept.collect();
    }
}

/// Prompts whose answers are decoded together. Their live drafts are the rows of the batch, in
/// order.
pub struct Batch<'a> {
    pub prompts: Vec<Growing>,
    pub pool: KvPool,
    /// The prompts that are done, each with a fault if its logits are NaN, until they are taken.
    pub done: Vec<(Growing, Result<(), RowFault>)>,
    chooser: Chooser<'a>,
    /// The logits of the next token of each row, `[rows, vocab]`, float32; in pieces.
    logits: Vec<Tensor>,
}

impl<'a> Batch<'a> {
    /// An empty batch with an empty pool.
    pub fn new(chooser: Chooser<'a>, pool: KvPool) -> Self {
        Self {
            prompts: Vec::new(),
            pool,
            done: Vec::new(),
            chooser,
            logits: Vec::new(),
        }
    }

    /// The number of answers in progress.
    pub fn rows(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.live.len()).sum()
    }

    /// The maximum number of tokens of the prompts and their answers.
    pub fn tokens(&self) -> usize {
        self.prompts
            .iter()
            .map(|prompt| prompt.waiting.tokens())
            .sum()
    }

    /// Adds a prompt, with the logits that follow it, `[1, vocab]`.
    pub fn enter(&mut self, prompt: Growing, logits: &Tensor) {
        let rows = prompt.drafts.len();
        self.chooser.enter(rows, &prompt.waiting.text.ids);
        self.logits.push(logits.expand([rows as i64, -1], false));
        self.prompts.push(prompt);
    }

    /// Empties the batch, discards its partial answers, and returns the prompts.
    pub fn abandon(&mut self) -> Vec<PendingPrompt> {
        self.logits.clear();
        self.chooser.clear();
        self.prompts
            .drain(..)
            .map(|prompt| prompt.waiting)
            .collect()
    }

    /// Appends a token to every row and runs a decode step for the rows that continue. Prompts that are
    /// done go to `done` before, so that none is lost if memory runs out.
    pub fn step(&mut self, network: &dyn VisionLanguageModel, ends: &Ends<'_>) {
        let _no_grad = tch::no_grad_guard();
        let device = network.device();
        let logits = Tensor::cat(&std::mem::take(&mut self.logits), 0); // [rows, vocab]
        let numbers: Vec<f64> = self
            .prompts
            .iter()
            .flat_map(|prompt| prompt.live.iter().map(|&row| prompt.number(row)))
            .collect();
        let chosen = self.chooser.choose(&logits, &numbers);
        let tokens: Vec<i64> = chosen
            .tokens
            .iter()
            .map(|token| token.unwrap_or(0))
            .collect();
        drop(logits);

        let mut gone = Vec::new();
        let mut kept = Vec::with_capacity(tokens.len());
        let mut first = 0;
        for (index, prompt) in self.prompts.iter_mut().enumerate() {
            let rows = first..first + prompt.live.len();
            first = rows.end;
            if chosen.tokens[rows.clone()].contains(&None) {
                gone.push((index, Err(not_numbers())));
                continue;
            }
            let going_on = prompt.grow(&tokens[rows.clone()], &chosen.logps[rows.clone()], ends);
            kept.extend(going_on.iter().map(|&place| rows.start as i64 + place));
            prompt.keep(&going_on);
            if going_on.is_empty() {
                gone.push((index, Ok(())));
            }
        }
        // From the end, so that the earlier indices stay valid.
        let first = self.done.len();
        for (index, outcome) in gone.into_iter().rev() {
            self.done.push((self.prompts.remove(index), outcome));
        }
        self.done[first..].reverse();

        let mut next = chosen.ids;
        if kept.len() < tokens.len() {
            let kept = Tensor::from_slice(&kept).to_device(device);
            next = next.index_select(0, &kept);
            self.chooser.keep(&kept);
        }
        if !self.prompts.is_empty() {
            let branches: Vec<Branches<'_>> = self.prompts.iter().map(Growing::branches).collect();
            let decoder = network.decoder();
            let rows = decoder.rows(&branches);
            let hidden = decoder.step(&decoder.embed(&next), &self.pool, &rows);
            self.logits.push(network.lm_head().forward(&hidden));
        }
        device::wait(device);
    }
}

fn not_numbers() -> RowFault {
    let problem = "the model's logits are NaN: its weights contain infinities or NaN, or the \
                   precision is too low";
    RowFault(problem.to_owned())
}
