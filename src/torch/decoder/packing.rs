//! Packed sequences: prompts with their continuations in one forward pass.

use tch::Tensor;

use super::super::attention::{KeyValue, attend_causally, attend_masked, branch_mask, tree_mask};
use super::super::layers::RotaryCosSin;

/// A prompt with whole continuations, which do not see each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedSequence {
    /// The number of tokens of the prompt.
    pub prompt: i64,
    /// The number of tokens of each continuation.
    pub branches: Vec<i64>,
    /// The first token of the prompt whose hidden state is wanted; those of all later tokens are
    /// wanted, too.
    pub wanted_from: i64,
}

impl PackedSequence {
    /// The number of tokens of the prompt and its continuations.
    pub fn tokens(&self) -> i64 {
        self.prompt + self.branches.iter().sum::<i64>()
    }

    /// The first position and the length of the prompt and of each continuation.
    pub fn places(&self) -> impl Iterator<Item = (i64, i64)> {
        let branches = self.branches.iter().map(|&length| (self.prompt, length));
        std::iter::once((0, self.prompt)).chain(branches)
    }

    /// The number of hidden states that are wanted.
    pub fn wanted(&self) -> i64 {
        self.tokens() - self.wanted_from
    }
}

/// Concatenated packed sequences, with the masks and angles that attention needs.
pub struct PackedBatch {
    trees: Vec<PackedSequence>,
    /// The start of each sequence among the tokens of all, and its length.
    runs: Vec<(i64, i64)>,
    pub angles: RotaryCosSin,
    /// The attention mask of each sequence's continuations; `None` if it has none.
    branches: Vec<Option<Tensor>>,
    /// The attention mask of each sequence's wanted tokens; `None` if all are wanted.
    wanted: Vec<Option<Tensor>>,
}

impl PackedBatch {
    /// Builds the masks. `angles` and `embeds` are those of the tokens of all sequences.
    pub fn new(trees: Vec<PackedSequence>, angles: RotaryCosSin, embeds: &Tensor) -> Self {
        let lengths: Vec<i64> = trees.iter().map(PackedSequence::tokens).collect();
        assert_eq!(embeds.size()[0], lengths.iter().sum::<i64>());
        let on = (embeds.kind(), embeds.device());
        let of_branches = |tree: &PackedSequence| {
            let mask = || branch_mask(&tree.branches, tree.prompt, on);
            (tree.tokens() > tree.prompt).then(mask)
        };
        let of_wanted = |tree: &PackedSequence| {
            let mask = || tree_mask(&tree.branches, tree.prompt, tree.wanted_from, on);
            (tree.wanted_from > 0).then(mask)
        };
        Self {
            runs: runs(&lengths),
            angles,
            branches: trees.iter().map(of_branches).collect(),
            wanted: trees.iter().map(of_wanted).collect(),
            trees,
        }
    }

    /// Attention of all tokens of one sequence; `q` and `own` are those of this sequence only.
    fn attend_whole(&self, tree: usize, q: &Tensor, own: &KeyValue) -> Tensor {
        let PackedSequence { prompt, .. } = self.trees[tree];
        let on_prompt = attend_causally(&q.narrow(1, 0, prompt), &own.of_tokens(0, prompt));
        match &self.branches[tree] {
            None => on_prompt,
            Some(mask) => {
                let q = q.narrow(1, prompt, q.size()[1] - prompt);
                Tensor::cat(&[on_prompt, attend_masked(&q, own, mask)], 1)
            }
        }
    }

    /// Attention of all tokens of all sequences.
    pub fn attend_all(&self, q: &Tensor, own: &KeyValue) -> Tensor {
        let of_tree = |(tree, &(start, length)): (usize, &(i64, i64))| {
            let q = q.narrow(1, start, length);
            self.attend_whole(tree, &q, &own.of_tokens(start, length))
        };
        let mixed = self.runs.iter().enumerate().map(of_tree).collect();
        joined(mixed).expect("a tree")
    }

    /// Selects the wanted rows of `xs`, which has one row per token of all sequences.
    pub fn pick(&self, xs: &Tensor) -> Tensor {
        let wanted = |(tree, &(start, _)): (&PackedSequence, &(i64, i64))| {
            xs.narrow(0, start + tree.wanted_from, tree.wanted())
        };
        let picked: Vec<Tensor> = self.trees.iter().zip(&self.runs).map(wanted).collect();
        Tensor::cat(&picked, 0)
    }

    /// Attention of the wanted tokens only.
    pub fn attend_wanted(&self, q: &Tensor, own: &KeyValue) -> Tensor {
        let mut first = 0;
        let mut mixed = Vec::with_capacity(self.trees.len());
        for (index, tree) in self.trees.iter().enumerate() {
            let (start, length) = self.runs[index];
            let (q, own) = (
                q.narrow(1, first, tree.wanted()),
                own.of_tokens(start, length),
            );
            mixed.push(match &self.wanted[index] {
                Some(mask) => attend_masked(&q, &own, mask),
                None => self.attend_whole(index, &q, &own),
            });
            first += tree.wanted();
        }
        joined(mixed).expect("a tree")
    }
}

/// The start of each sequence in the concatenation, and its length.
pub fn runs(lengths: &[i64]) -> Vec<(i64, i64)> {
    let mut start = 0;
    let run = |&length: &i64| {
        start += length;
        (start - length, length)
    };
    lengths.iter().map(run).collect()
}

/// Concatenates the attention outputs of prompts; `None` if there are none.
pub fn joined(mut mixed: Vec<Tensor>) -> Option<Tensor> {
    match mixed.len() {
        0 | 1 => mixed.pop(),
        _ => Some(Tensor::cat(&mixed, 1)),
    }
}
