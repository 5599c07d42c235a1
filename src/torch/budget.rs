//! Memory budgets: batch sizes of sampling, scoring and training.
//!
//! Sampling and scoring batch as many prompts as fit into memory and still make a step cheaper. The
//! budget follows from the sizes of the network and the memory that it may use on the device. Both
//! are the same in every run on a machine, whatever memory happens to be free, so a part that is
//! recomputed is batched the same way and gives bitwise the same result.

use std::ops::Range;

use tch::Device;

use super::device;
use super::layer_stack::SavedActivations;
use ovchat_models::checkpoint::{AtOnce, Sizes, TrainingSizes, pack_tokens_max, size_in_words};
use ovchat_models::{Checkpointing, Gigabytes, RowFault};

/// The batch limits of sampling or scoring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Answers that are decoded at once; beyond this a step hardly gets cheaper per answer.
    pub rows: usize,
    /// Tokens of prompts and answers in the KV cache.
    pub tokens: usize,
    /// Tokens per prefill, unless a single prompt has more.
    pub read_tokens: usize,
    /// The memory that the network may use on the device, in bytes.
    memory: u64,
    sizes: Sizes,
    /// The number of OOM retries, each of which halved the budget.
    pub oom_retries: u64,
}

impl Budget {
    /// The budget that fits into `asked`, or by default into [`device::memory`].
    pub fn plan(asked: Option<Gigabytes>, device: Device, sizes: Sizes) -> Self {
        let room = device::room(asked, device);
        let AtOnce {
            rows,
            tokens,
            read_tokens,
        } = AtOnce::in_room(room, sizes);
        Self {
            rows,
            tokens,
            read_tokens,
            memory: room.bytes,
            sizes,
            oom_retries: 0,
        }
    }

    /// Halves the budget after running out of memory.
    pub fn halve(&mut self) {
        self.rows = (self.rows / 2).max(1);
        self.tokens /= 2;
        self.read_tokens = (self.read_tokens / 2).max(1);
        self.oom_retries += 1;
    }

    /// The budget for the next call; it stays halved, since the same load would run out of memory
    /// again.
    #[must_use]
    pub fn for_next(self) -> Self {
        Self {
            oom_retries: 0,
            ..self
        }
    }

    /// Rejects a prompt and its answers, `tokens` in all, that do not fit even alone.
    pub fn admit(&self, tokens: usize) -> Result<(), RowFault> {
        let needed = self.sizes.weights + tokens as u64 * self.sizes.token;
        if needed <= self.memory {
            return Ok(());
        }
        if self.sizes.weights > self.memory {
            return Err(RowFault(format!(
                "the model's weights take {} of memory, more than the limit of {}; increase the \
                 model's `memory_gb`, or use a device with more memory",
                size_in_words(self.sizes.weights),
                size_in_words(self.memory),
            )));
        }
        Err(RowFault(format!(
            "its {tokens} tokens of prompt and answers take {} of memory, in addition to {} of \
             weights, more than the limit of {}; use a smaller image, fewer or shorter answers, or \
             a larger `memory_gb`",
            size_in_words(tokens as u64 * self.sizes.token),
            size_in_words(self.sizes.weights),
            size_in_words(self.memory),
        )))
    }

    /// Describes the batches of a policy.
    pub fn of_sampling(&self) -> String {
        let (rows, tokens) = (self.rows, self.tokens);
        let memory = self.of_memory();
        format!("batches of up to {rows} answers and {tokens} tokens, prompts included ({memory})")
    }

    /// Describes the batches of a judge.
    pub fn of_scoring(&self) -> String {
        let tokens = self.read_tokens.min(self.tokens);
        format!("batches of up to {tokens} tokens ({})", self.of_memory())
    }

    fn of_memory(&self) -> String {
        let [memory, weights] = [self.memory, self.sizes.weights].map(size_in_words);
        format!("{memory} of memory, {weights} for weights")
    }
}

/// The memory that a training stage needs and may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainingBudget {
    memory: u64,
    sizes: TrainingSizes,
    checkpointing: Checkpointing,
    on_gpu: bool,
    relief: Relief,
}

/// The ways of a training to need less memory, after it ran out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Relief {
    None,
    /// It saves the inputs of layers only, and computes the rest again.
    Recompute,
    /// In addition, it processes rows one by one.
    OneByOne,
}

impl TrainingBudget {
    /// Plans for the memory `asked`, or by default [`device::memory`]. Fails if weights, gradients
    /// and moments alone exceed it.
    pub fn plan(
        asked: Option<Gigabytes>,
        device: Device,
        sizes: TrainingSizes,
        checkpointing: Checkpointing,
    ) -> Result<Self, String> {
        let room = device::room(asked, device);
        let memory = room.bytes;
        if sizes.state() > memory {
            return Err(format!(
                "training takes {} for weights, {} for gradients and {} for the optimizer's moments, \
                 more than the limit of {}; train an adapter (`lora`) or fewer parts (`train`), use \
                 `optimizer: adamw_8bit`, or increase the model's `memory_gb`",
                size_in_words(sizes.weights),
                size_in_words(sizes.gradients),
                size_in_words(sizes.moments),
                size_in_words(memory),
            ));
        }
        Ok(Self {
            memory,
            sizes,
            checkpointing,
            on_gpu: room.on_gpu,
            relief: Relief::None,
        })
    }

    /// The maximum number of tokens of a pack; 0 for one row each.
    pub fn pack_tokens(&self) -> usize {
        match self.relief {
            Relief::OneByOne => 0,
            Relief::None | Relief::Recompute => pack_tokens_max(self.on_gpu),
        }
    }

    /// Makes the following passes need less memory. False if they cannot.
    pub fn relieve(&mut self) -> bool {
        self.relief = match (self.relief, self.checkpointing) {
            (Relief::None, Checkpointing::Auto) => Relief::Recompute,
            (Relief::None | Relief::Recompute, _) => Relief::OneByOne,
            (Relief::OneByOne, _) => return false,
        };
        true
    }

    /// The activations to save in a pass over this many tokens and tiles.
    pub fn keep(&self, tokens: usize, tiles: usize) -> SavedActivations {
        let fits = self.sizes.has_room(self.memory, tokens, tiles);
        match self.checkpointing {
            Checkpointing::Never => SavedActivations::Everything,
            Checkpointing::Auto if fits && self.relief == Relief::None => {
                SavedActivations::Everything
            }
            Checkpointing::Auto | Checkpointing::Always => SavedActivations::Inputs,
        }
    }

    /// True if a step over packs of up to this many tokens and tiles has room for the conversions of all
    /// trained weights to the compute dtype.
    pub fn keeps_casts(&self, tokens: usize, tiles: usize) -> bool {
        self.relief == Relief::None && self.sizes.has_room_for_copies(self.memory, tokens, tiles)
    }

    /// Describes the training memory, given the tokens and tiles of the largest row.
    pub fn in_words(&self, [tokens, tiles]: [usize; 2]) -> String {
        let [memory, state] = [self.memory, self.sizes.state()].map(size_in_words);
        // Short rows are packed into one batch.
        let at_once = tokens.max(pack_tokens_max(self.on_gpu).min(tokens * 8));
        let remembered = size_in_words(self.sizes.remembered(at_once, tiles));
        let again = size_in_words(self.sizes.computed_again(at_once, tiles));
        let how = match (self.checkpointing, self.keep(at_once, tiles)) {
            (Checkpointing::Auto, SavedActivations::Inputs) => {
                format!("{remembered} do not fit; {again} with recompute layer by layer")
            }
            (_, SavedActivations::Inputs) => format!("{again} with recompute layer by layer"),
            _ => format!("{remembered}, all saved"),
        };
        format!(
            "{memory} of memory, {state} for weights, gradients and moments; activations of up to \
             {at_once} tokens: {how}"
        )
    }
}

/// The fault of a row that ran out of memory in a batch of its own.
pub fn too_large(error: &ovchat_models::ModelError) -> RowFault {
    RowFault(format!(
        "{error}, even in a batch of its own; use a smaller image, fewer or shorter answers, or a \
         device with more memory"
    ))
}

/// Groups consecutive sequences of these lengths into packs of at most `tokens_max` tokens; a
/// longer sequence is a pack of its own.
pub fn packs(lengths: &[usize], tokens_max: usize) -> Vec<Range<usize>> {
    let mut packs: Vec<Range<usize>> = Vec::new();
    let mut tokens = 0;
    for (index, &length) in lengths.iter().enumerate() {
        match packs.last_mut() {
            Some(pack) if tokens + length <= tokens_max => {
                pack.end = index + 1;
                tokens += length;
            }
            _ => {
                packs.push(index..index + 1);
                tokens = length;
            }
        }
    }
    packs
}

#[cfg(test)]
mod tests {
    use super::super::recorded::onevision;
    use super::*;
    use ovchat_models::checkpoint::DecoderConfig;
    use ovchat_models::preprocess::Processor;
    use ovchat_models::{ModelError, Optimizer, Trained};

    #[test]
    fn a_training_that_runs_out_computes_again_and_then_takes_rows_one_by_one() {
        let prep = Processor::open(&onevision::folder()).unwrap();
        let trained = Trained::all();
        let sizes = TrainingSizes::new(prep.architecture(), &trained, Optimizer::Adamw, 4);
        let budget = |checkpointing| {
            let memory = Gigabytes::try_from(4.0).ok();
            TrainingBudget::plan(memory, Device::Cpu, sizes, checkpointing).unwrap()
        };
        let mut auto = budget(Checkpointing::Auto);
        assert_eq!(
            (auto.keep(1, 0), auto.pack_tokens()),
            (SavedActivations::Everything, 2048)
        );
        assert!(auto.relieve());
        assert_eq!(
            (auto.keep(1, 0), auto.pack_tokens()),
            (SavedActivations::Inputs, 2048)
        );
        assert!(auto.relieve());
        assert_eq!(
            (auto.keep(1, 0), auto.pack_tokens()),
            (SavedActivations::Inputs, 0)
        );
        assert!(!auto.relieve());
        let mut never = budget(Checkpointing::Never);
        assert!(never.relieve() && !never.relieve());
        assert_eq!(
            (never.keep(1, 0), never.pack_tokens()),
            (SavedActivations::Everything, 0)
        );
    }

    #[test]
    fn packs_hold_whole_texts_in_order() {
        assert!(packs(&[], 10).is_empty());
        assert_eq!(packs(&[4, 6, 1, 30, 2], 10), [0..2, 2..3, 3..4, 4..5]);
    }

    /// Qwen2 7B in bfloat16, its sizes computed by hand: 28 layers, 4 key-value heads of 128.
    fn sizes() -> Sizes {
        let config = DecoderConfig {
            vocab_size: 152_128,
            hidden_size: 3584,
            intermediate_size: 18_944,
            num_hidden_layers: 28,
            num_attention_heads: 28,
            num_key_value_heads: 4,
            head_dim: 128,
            ..DecoderConfig::QWEN2
        };
        Sizes::new(8_000_000_000, &config, 2)
    }

    #[test]
    fn the_budget_fits_into_the_memory_beside_the_weights() {
        let sizes = sizes();
        assert_eq!((sizes.weights, sizes.token), (16_000_000_000, 57_344));
        let memory = Gigabytes::try_from(40.0).unwrap();
        let budget = Budget::plan(Some(memory), Device::Cuda(0), sizes);
        let taken = sizes.weights
            + budget.tokens as u64 * sizes.token
            + budget.rows as u64 * sizes.row
            + budget.read_tokens as u64 * sizes.read;
        assert!(taken <= memory.bytes() && taken > memory.bytes() - sizes.token);
        assert_eq!(budget.rows, 256);
        let mut half = budget;
        half.halve();
        assert_eq!((half.rows, half.oom_retries), (128, 1));
        assert_eq!(half.tokens, budget.tokens / 2);
        assert_eq!(
            budget.of_scoring(),
            "batches of up to 8192 tokens (40.0 GB of memory, 16.0 GB for weights)"
        );
        let words = budget.of_sampling();
        assert!(
            words.starts_with("batches of up to 256 answers and "),
            "{words}"
        );
    }

    #[test]
    fn what_can_never_fit_is_refused_with_the_way_out_and_little_memory_still_takes_one() {
        let memory = Gigabytes::try_from(16.1).unwrap();
        let budget = Budget::plan(Some(memory), Device::Cpu, sizes());
        assert_eq!(budget.rows, 6);
        assert!(budget.admit(1000).is_ok());
        let fault = budget.admit(2000).unwrap_err().0;
        assert!(
            fault.contains("2000 tokens") && fault.contains("memory_gb"),
            "{fault}"
        );
        let none = Budget::plan(Gigabytes::try_from(1.0).ok(), Device::Cpu, sizes());
        assert_eq!((none.rows, none.tokens), (1, 0));
        let fault = none.admit(1).unwrap_err().0;
        assert!(
            fault.starts_with(
                "the model's weights take 16.0 GB of memory, more than the limit of 1.0 GB"
            ),
            "{fault}"
        );
        let error = ModelError::OutOfMemory {
            what: "sampling".to_owned(),
            batch: 1,
            length: 2,
        };
        assert!(too_large(&error).0.contains("in a batch of its own"));
    }
}
