//! The keys and values of prompts and of the answers that grow behind them: one pool of places for
//! all, so that a decode step attends to everything in a constant number of operators.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::super::attention::KeyValue;
use super::PrefixKv;
use super::sizes::DecoderSizes;

/// The number of places is a multiple of this.
const STEP: i64 = 256;

/// A pool of places, each of which holds the keys and values of one token in every layer. It grows
/// when it is full; places are reused when their [`Places`] are dropped.
#[derive(Debug)]
pub struct KvPool {
    /// Keys and values, `[kv_heads, capacity, head_dim]` a layer.
    layers: Vec<KeyValue>,
    capacity: i64,
    /// The capacity beyond which it only grows by what is needed.
    tokens_max: i64,
    free: Rc<RefCell<FreePlaces>>,
}

impl KvPool {
    /// An empty pool for a decoder of these sizes.
    pub fn new(sizes: &DecoderSizes, on: (Kind, Device), tokens_max: i64) -> Self {
        let empty = || Tensor::empty([sizes.num_key_value_heads, 0, sizes.head_dim], on);
        let layer = || KeyValue {
            k: empty(),
            v: empty(),
        };
        Self {
            layers: (0..sizes.num_hidden_layers).map(|_| layer()).collect(),
            capacity: 0,
            tokens_max,
            free: Rc::default(),
        }
    }

    /// The keys and values of a layer, `[kv_heads, capacity, head_dim]`.
    pub fn layer(&self, index: usize) -> &KeyValue {
        &self.layers[index]
    }

    /// The number of places.
    pub fn capacity(&self) -> i64 {
        self.capacity
    }

    /// Grows to at least `tokens` places in all. A pool that is as large as its batch needs is not copied
    /// while the batch grows.
    pub fn ensure(&mut self, tokens: i64) {
        if self.capacity < tokens {
            let ahead = (self.capacity + self.capacity / 4).min(self.tokens_max);
            self.grow(tokens.max(ahead));
        }
    }

    /// Takes `tokens` places, whose keys and values are undefined.
    pub fn reserve(&mut self, tokens: i64) -> Places {
        let left = self.free.borrow().count();
        self.ensure(self.capacity + (tokens - left).max(0));
        Places {
            ranges: self.free.borrow_mut().take(tokens),
            free: Rc::clone(&self.free),
        }
    }

    /// Stores the keys and values of a prompt.
    pub fn store(&mut self, prefix: &PrefixKv) -> Places {
        let places = self.reserve(prefix.tokens());
        for (layer, new) in self.layers.iter().zip(&prefix.layers) {
            for (own, new) in [(&layer.k, &new.k), (&layer.v, &new.v)] {
                let mut start = 0;
                for range in &places.ranges {
                    let length = range.end - range.start;
                    let mut there = own.narrow(1, range.start, length);
                    there.copy_(&new.narrow(1, start, length));
                    start += length;
                }
            }
        }
        places
    }

    /// Returns the keys and values of a stored prompt: a view, unless they lie apart.
    pub fn prefix(&self, places: &Places) -> PrefixKv {
        let whole = |own: &Tensor| {
            let parts = places.ranges.iter();
            let parts = parts.map(|range| own.narrow(1, range.start, range.end - range.start));
            let mut parts: Vec<Tensor> = parts.collect();
            match parts.len() {
                1 => parts.remove(0),
                _ => Tensor::cat(&parts, 1),
            }
        };
        let layers = self.layers.iter().map(|own| KeyValue {
            k: whole(&own.k),
            v: whole(&own.v),
        });
        PrefixKv {
            layers: layers.collect(),
            tokens: places.tokens(),
        }
    }

    /// Enlarges the pool, one layer after the other.
    fn grow(&mut self, capacity: i64) {
        let capacity = (capacity + STEP - 1) / STEP * STEP;
        assert!(
            capacity <= i64::from(i32::MAX),
            "places are numbered in 32 bits"
        );
        let old = self.capacity;
        for layer in &mut self.layers {
            for own in [&mut layer.k, &mut layer.v] {
                let [heads, _, size] = own.size()[..] else {
                    panic!("keys are [kv_heads, capacity, head_dim]")
                };
                let larger = Tensor::empty([heads, capacity, size], (own.kind(), own.device()));
                larger.narrow(1, 0, old).copy_(own);
                *own = larger;
            }
        }
        self.free.borrow_mut().give(old..capacity);
        self.capacity = capacity;
    }
}

/// Places of a [`KvPool`], for some tokens in order. They are free again when this is dropped.
#[derive(Debug)]
pub struct Places {
    ranges: Vec<Range<i64>>,
    free: Rc<RefCell<FreePlaces>>,
}

impl Places {
    /// The number of tokens.
    pub fn tokens(&self) -> i64 {
        self.ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    /// The place of a token.
    pub fn place(&self, token: i64) -> i64 {
        let mut left = token;
        for range in &self.ranges {
            let length = range.end - range.start;
            if left < length {
                return range.start + left;
            }
            left -= length;
        }
        panic!("token {token} of {}", self.tokens())
    }

    /// Splits the first `tokens` tokens into pieces of at most `length`, each with its first place and
    /// its length.
    pub fn pieces(&self, tokens: i64, length: i64) -> Vec<(i64, i64)> {
        let mut pieces = Vec::new();
        let mut left = tokens;
        for range in &self.ranges {
            let end = range.end.min(range.start + left);
            left -= end - range.start;
            let mut start = range.start;
            while start < end {
                let next = end.min(start + length);
                pieces.push((start, next - start));
                start = next;
            }
        }
        pieces
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        let mut free = self.free.borrow_mut();
        for range in self.ranges.drain(..) {
            free.give(range);
        }
    }
}

/// The places of a pool that are free: ranges in order, which do not touch.
#[derive(Debug, Default)]
struct FreePlaces {
    ranges: Vec<Range<i64>>,
}

impl FreePlaces {
    fn count(&self) -> i64 {
        self.ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    /// Takes `count` places, from the first range that has them all, or else from several.
    fn take(&mut self, count: i64) -> Vec<Range<i64>> {
        let fits = |range: &Range<i64>| range.end - range.start >= count;
        let first = self.ranges.iter().position(fits).unwrap_or(0);
        let mut taken = Vec::new();
        let mut left = count;
        while left > 0 {
            let range = &mut self.ranges[first];
            let end = range.end.min(range.start + left);
            taken.push(range.start..end);
            left -= end - range.start;
            range.start = end;
            if range.start == range.end {
                self.ranges.remove(first);
            }
        }
        taken
    }

    /// Gives places back.
    fn give(&mut self, range: Range<i64>) {
        if range.is_empty() {
            return;
        }
        let at = self
            .ranges
            .partition_point(|other| other.start < range.start);
        self.ranges.insert(at, range);
        if at + 1 < self.ranges.len() && self.ranges[at].end == self.ranges[at + 1].start {
            self.ranges[at].end = self.ranges.remove(at + 1).end;
        }
        if at > 0 && self.ranges[at - 1].end == self.ranges[at].start {
            self.ranges[at - 1].end = self.ranges.remove(at).end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::layers::tests::noise;
    use super::super::super::layers::{Activation, Bias};
    use super::*;

    fn prefix(tokens: i64, seed: i64) -> PrefixKv {
        let layer = |number: i64| KeyValue {
            k: noise(&[2, tokens, 4], seed + number),
            v: noise(&[2, tokens, 4], seed + number + 50),
        };
        PrefixKv {
            layers: (0..3).map(layer).collect(),
            tokens,
        }
    }

    fn pool() -> KvPool {
        let sizes = DecoderSizes {
            num_hidden_layers: 3,
            num_key_value_heads: 2,
            head_dim: 4,
            vocab_size: 1,
            hidden_size: 16,
            intermediate_size: 1,
            num_attention_heads: 4,
            hidden_act: Activation::Silu,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            qkv_bias: Bias::No,
        };
        KvPool::new(&sizes, (Kind::Float, Device::Cpu), 10_000)
    }

    #[track_caller]
    fn assert_stored(pool: &KvPool, places: &Places, expected: &PrefixKv) {
        let found = pool.prefix(places);
        assert_eq!(found.tokens, expected.tokens);
        for (found, expected) in found.layers.iter().zip(&expected.layers) {
            assert_eq!(found.k, expected.k);
            assert_eq!(found.v, expected.v);
        }
    }

    /// Prompts come and go; what is stored stays, also when the pool grows and where free places lie
    /// apart.
    #[test]
    fn stored_prompts_stay_while_others_come_and_go() {
        let mut pool = pool();
        let prompts: Vec<PrefixKv> = (0..6).map(|n| prefix(60 + 37 * n, 100 * n)).collect();
        let mut stored: Vec<Option<Places>> = prompts
            .iter()
            .map(|prompt| Some(pool.store(prompt)))
            .collect();
        assert!(pool.capacity() >= prompts.iter().map(PrefixKv::tokens).sum());
        for gone in [1, 3] {
            stored[gone] = None;
        }
        let capacity = pool.capacity();
        let long = prefix(97 + 171, 900);
        let apart = pool.store(&long);
        assert!(apart.ranges.len() > 1 || pool.capacity() == capacity);
        let grown = pool.store(&prefix(2000, 1000));
        assert!(pool.capacity() > capacity);
        assert_stored(&pool, &apart, &long);
        for (places, prompt) in stored.iter().zip(&prompts) {
            if let Some(places) = places {
                assert_stored(&pool, places, prompt);
            }
        }
        drop((stored, apart, grown));
        assert_eq!(pool.free.borrow().count(), pool.capacity());
        assert_eq!(pool.free.borrow().ranges.len(), 1);
    }

    #[test]
    fn tokens_have_places_and_pieces_across_ranges() {
        let places = Places {
            ranges: vec![10..13, 40..47],
            free: Rc::default(),
        };
        let found: Vec<i64> = (0..10).map(|token| places.place(token)).collect();
        assert_eq!(found, [10, 11, 12, 40, 41, 42, 43, 44, 45, 46]);
        assert_eq!(places.pieces(10, 4), [(10, 3), (40, 4), (44, 3)]);
        assert_eq!(places.pieces(4, 4), [(10, 3), (40, 1)]);
        assert_eq!(places.pieces(2, 4), [(10, 2)]);
        assert!(places.pieces(0, 4).is_empty());
    }
}
