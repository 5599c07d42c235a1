//! Forward and backward passes over preference pairs.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::super::checkpoint::Parts;
use super::super::decoder::PackedSequence;
use super::super::dpo::token_logps;
use super::super::layer_stack::{LayerStack, SavedActivations};
use super::super::training::row_error;
use super::super::vlm::VisionLanguageModel;
use ovchat_models::preprocess::{Prepared, Processor, PromptIds, Tiles};
use ovchat_models::{Example, Mask, ModelError, Newlines, TrainingAnswer};

/// The settings that decide which tokens of a pair exist and count.
#[derive(Debug, Clone, Copy)]
pub struct Counting {
    pub mask: Mask,
    pub newlines: Newlines,
}

/// A tokenized and preprocessed pair.
pub struct PairTokens {
    prompt: Prepared,
    /// Indices in the prompt of tokens that count in both answers; never the first token.
    counted: Vec<i64>,
    /// The ids of the chosen and the rejected answer, at least one each.
    answers: [Vec<i64>; 2],
}

impl PairTokens {
    /// The number of tokens that go through the decoder.
    pub fn count(&self) -> usize {
        self.prompt.text.ids.len() + self.answers[0].len() + self.answers[1].len()
    }

    pub fn tiles(&self) -> usize {
        let tiles = self.prompt.images.iter().map(|tiles| tiles.packing.tiles());
        tiles.sum()
    }

    /// The packed sequence of the pair, without the last token of each answer, which predicts
    /// nothing. A counted token of the prompt is predicted at the token before it.
    fn tree(&self) -> PackedSequence {
        let last = self.prompt.text.ids.len() as i64 - 1;
        let branches = self.answers.each_ref().map(|ids| ids.len() as i64 - 1);
        PackedSequence {
            prompt: last + 1,
            branches: branches.into_iter().filter(|&length| length > 0).collect(),
            wanted_from: self.counted.first().map_or(last, |&place| place - 1),
        }
    }

    /// The input tokens, images included.
    fn read(&self) -> PromptIds {
        let mut text = self.prompt.text.clone();
        for ids in &self.answers {
            text.ids.extend_from_slice(&ids[..ids.len() - 1]);
        }
        text
    }

    /// For each answer, the indices among the wanted hidden states at which its counted tokens are
    /// predicted, and the ids of these tokens.
    fn predicted(&self) -> [(Vec<i64>, Vec<i64>); 2] {
        let tree = self.tree();
        let last = tree.prompt - 1 - tree.wanted_from;
        let mut behind = last + 1;
        self.answers.each_ref().map(|answer| {
            let counted = self.counted.iter();
            let mut rows: Vec<i64> = counted.map(|place| place - 1 - tree.wanted_from).collect();
            let counted = self.counted.iter();
            let mut ids: Vec<i64> = counted
                .map(|&place| self.prompt.text.ids[place as usize])
                .collect();
            let read = answer.len() as i64 - 1;
            rows.push(last);
            rows.extend(behind..behind + read);
            ids.extend_from_slice(answer);
            behind += read;
            (rows, ids)
        })
    }
}

/// A forward pass over a packed batch of pairs, ready for the backward pass.
pub struct Pass<'a> {
    network: &'a dyn VisionLanguageModel,
    chain: LayerStack<'a>,
    images: Vec<LayerStack<'a>>,
    /// For all counted tokens, chosen then rejected of each pair, the row that predicts them.
    rows: Vec<i64>,
    ids: Vec<i64>,
    /// The number of counted tokens of each answer.
    pub counts: Vec<[usize; 2]>,
    logits_max: i64,
}

impl<'a> Pass<'a> {
    /// Runs the forward pass. `parts` are the parts that are trained, `logits_max` the number of
    /// logits in memory at once.
    pub fn new(
        network: &'a dyn VisionLanguageModel,
        parts: Parts,
        pairs: &[PairTokens],
        keep: SavedActivations,
        logits_max: i64,
    ) -> Self {
        let images: Vec<&Tiles> = pairs.iter().flat_map(|pair| &pair.prompt.images).collect();
        let seen = network.encode(&images, keep, parts);
        let mut features = seen.features.into_iter();
        let embeds: Vec<Tensor> = pairs
            .iter()
            .map(|pair| {
                let count = pair.prompt.images.len();
                let features: Vec<Tensor> = features.by_ref().take(count).collect();
                network.embed_prompt(&pair.read(), &features)
            })
            .collect();
        let trees: Vec<PackedSequence> = pairs.iter().map(PairTokens::tree).collect();
        let (mut rows, mut ids) = (Vec::new(), Vec::new());
        let mut counts = Vec::with_capacity(pairs.len());
        let mut first = 0;
        for (pair, tree) in pairs.iter().zip(&trees) {
            let answers = pair.predicted();
            counts.push(answers.each_ref().map(|(rows, _)| rows.len()));
            for (own_rows, own_ids) in answers {
                rows.extend(own_rows.iter().map(|row| first + row));
                ids.extend(own_ids);
            }
            first += tree.wanted();
        }
        let embeds = Tensor::cat(&embeds, 0);
        Self {
            network,
            chain: network.decoder().read(&embeds, trees, keep),
            images: seen.chains,
            rows,
            ids,
            counts,
            logits_max,
        }
    }

    /// The log-probabilities of some of the counted tokens, `[tokens]`, float32.
    fn token_logps(&self, tokens: &Range<usize>) -> Tensor {
        let on_device = |ids: &[i64]| Tensor::from_slice(ids).to_device(self.network.device());
        let rows = on_device(&self.rows[tokens.clone()]);
        let hidden = self.chain.output().index_select(0, &rows);
        let logits = self.network.lm_head().forward(&hidden); // [tokens, vocab]
        token_logps(&logits, &on_device(&self.ids[tokens.clone()]))
    }

    /// Splits the counted tokens into pieces that keep the logits within the limit.
    fn pieces(&self) -> Vec<Range<usize>> {
        let at_once = (self.logits_max / self.network.lm_head().vocab()).max(1) as usize;
        let count = self.rows.len();
        (0..count)
            .step_by(at_once)
            .map(|start| start..count.min(start + at_once))
            .collect()
    }

    /// Sums the values in `logps` over the tokens of each answer, in float64.
    fn sums(&self, logps: &[f32]) -> Vec<[f64; 2]> {
        let mut tokens = logps.iter();
        let mut sum = |count: usize| {
            tokens
                .by_ref()
                .take(count)
                .map(|&logp| f64::from(logp))
                .sum()
        };
        self.counts
            .iter()
            .map(|&[chosen, rejected]| [sum(chosen), sum(rejected)])
            .collect()
    }

    /// The log-probabilities of the answers.
    pub fn logps(&self) -> Vec<[f64; 2]> {
        let _no_grad = tch::no_grad_guard();
        let mut logps = Vec::with_capacity(self.rows.len());
        for piece in self.pieces() {
            logps.extend(numbers(&self.token_logps(&piece)));
        }
        self.sums(&logps)
    }

    /// Backpropagates the loss gradients that `of` computes from the answers' log-probabilities. If
    /// all logits fit at once, they are computed once; otherwise they are recomputed for the
    /// backward pass, piece by piece.
    pub fn learn<E>(
        self,
        of: impl FnOnce(&[[f64; 2]]) -> Result<Vec<[f64; 2]>, E>,
    ) -> Result<(), E> {
        let pieces = self.pieces();
        let whole = (pieces.len() == 1).then(|| self.token_logps(&pieces[0]));
        let logps = match &whole {
            Some(whole) => self.sums(&numbers(&whole.detach())),
            None => self.logps(),
        };
        let slopes = of(&logps)?;
        let weights: Vec<f32> = slopes
            .iter()
            .zip(&self.counts)
            .flat_map(|(slopes, counts)| {
                let of_answer =
                    |side: usize| std::iter::repeat_n(slopes[side] as f32, counts[side]);
                of_answer(0).chain(of_answer(1))
            })
            .collect();
        let mut whole = whole;
        for piece in pieces {
            let logps = whole.take().unwrap_or_else(|| self.token_logps(&piece));
            let weights = Tensor::from_slice(&weights[piece]).to_device(logps.device());
            (logps * weights).sum(Kind::Float).backward();
        }
        self.chain.backward();
        for chain in self.images {
            chain.backward();
        }
        Ok(())
    }
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor).expect("a vector of float32")
}

/// Preprocesses and tokenizes a pair, and validates that it can be trained on.
pub fn prepare(
    prep: &Processor,
    counting: Counting,
    example: &Example<'_>,
) -> Result<PairTokens, ModelError> {
    let prepared = prep.prepare_as_llava_next(example.prompt, counting.newlines);
    let (prompt, counted) = prepared.map_err(|fault| row_error(example.id, fault.to_string()))?;
    // No token predicts the first one.
    let counted = counted.into_iter().filter(|&place| place > 0);
    let counted = match counting.mask {
        Mask::Answer | Mask::Trl => Vec::new(),
        Mask::LlavaNext => counted.map(|place| place as i64).collect(),
    };
    let answers = answers(prep, counting, example, prompt.text.ids.len())?;
    Ok(PairTokens {
        prompt,
        counted,
        answers,
    })
}

/// The number of tokens and tiles of a pair, from the headers of its images; validates that it can
/// be trained on.
pub fn measure(
    prep: &Processor,
    counting: Counting,
    example: &Example<'_>,
) -> Result<[usize; 2], ModelError> {
    let written = prep.written_as_llava_next(example.prompt, counting.newlines);
    let written = written.map_err(|fault| row_error(example.id, fault.to_string()))?;
    let prompt = written.text.ids.len();
    let answers = answers(prep, counting, example, prompt)?;
    let tokens = prompt + answers.iter().map(Vec::len).sum::<usize>();
    Ok([tokens, written.tiles])
}

/// The ids of the chosen and the rejected answer to a prompt of `prompt` tokens.
fn answers(
    prep: &Processor,
    counting: Counting,
    example: &Example<'_>,
    prompt: usize,
) -> Result<[Vec<i64>; 2], ModelError> {
    let refuse = |problem: String| row_error(example.id, problem);
    let ids = |answer: &TrainingAnswer, side: &str| {
        let mut ids: Vec<i64> = match &answer.token_ids {
            Some(ids) => ids.iter().map(|&id| i64::from(id)).collect(),
            None => prep
                .chat()
                .answer(&answer.text)
                .map_err(|fault| refuse(format!("the {side} answer: {fault}")))?,
        };
        let chat = prep.chat();
        if counting.mask != Mask::Answer && ids.last() == Some(&chat.end()) {
            let newline = chat.newline();
            ids.extend(newline.map_err(|fault| refuse(fault.to_string()))?);
        }
        let vocab = prep.text_config().vocab_size as i64;
        if let Some(id) = ids.iter().find(|id| !(0..vocab).contains(id)) {
            let problem = format!(
                "the {side} answer contains token {id}, but the vocabulary has {vocab} tokens"
            );
            return Err(refuse(problem));
        }
        let (length, context) = (prompt + ids.len(), prep.context());
        if ids.is_empty() {
            Err(refuse(format!("the {side} answer has no tokens")))
        } else if length > context {
            let problem = format!(
                "prompt and {side} answer take {length} tokens, and the model's context is {context}"
            );
            Err(refuse(problem))
        } else {
            Ok(ids)
        }
    };
    Ok([
        ids(&example.chosen, "chosen")?,
        ids(&example.rejected, "rejected")?,
    ])
}
