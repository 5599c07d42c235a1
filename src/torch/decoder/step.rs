//! The rows of a decode step: where their keys lie in the pool, as the tensors that attention needs.

use tch::{Device, Tensor};

use super::super::attention::KeyValue;
use super::super::shim::{self, Sequences};
use super::pool::{KvPool, Places};

/// The largest number of keys of a piece. Pieces bound the work of one thread or block, so that a few
/// long prompts occupy a whole device.
const PIECE: i64 = 512;

/// The continuations of one prompt that grow.
#[derive(Debug)]
pub struct Branches<'a> {
    /// The places of the prompt: what it shares with others, and the rest.
    pub prompt: Vec<&'a Places>,
    /// The places of each continuation, and the number of its tokens so far.
    pub rows: Vec<(&'a Places, i64)>,
}

impl Branches<'_> {
    /// The number of tokens of the prompt.
    fn tokens(&self) -> i64 {
        self.prompt.iter().map(|places| places.tokens()).sum()
    }
}

/// The rows of a step: one new token of each continuation of each prompt.
#[derive(Debug)]
pub struct StepRows {
    /// The position of each row's token, and its place in the pool, `[rows]`, int64.
    pub positions: Tensor,
    places: Tensor,
    /// See [`shim::attend_pieces`].
    entries: Tensor,
    pieces: Tensor,
    mask: Option<Tensor>,
    sequences: Sequences,
}

impl StepRows {
    /// The rows of these prompts, in order, for a network whose key-value heads serve `group` query
    /// heads each. Two tensors are copied to the device, or three if rows have different numbers of pieces.
    pub fn new(prompts: &[Branches<'_>], group: i64, device: Device) -> Self {
        let (mut positions, mut places) = (Vec::new(), Vec::new());
        let (mut entries, mut of_rows): (Vec<i64>, Vec<Vec<i64>>) = (Vec::new(), Vec::new());
        let (mut q_starts, mut k_starts, mut k_lengths) = (vec![0], Vec::new(), Vec::new());
        let (mut q_max, mut k_max) = (0, 0);
        let mut sequence = |rows: std::ops::Range<i64>, (start, length): (i64, i64)| {
            let first = entries.len() as i64;
            entries.extend(rows.clone());
            q_starts.push((entries.len() as i64 * group) as i32);
            k_starts.push(start as i32);
            k_lengths.push(length as i32);
            q_max = q_max.max((rows.end - rows.start) * group);
            k_max = k_max.max(length);
            first
        };
        for prompt in prompts {
            let rows = of_rows.len() as i64..(of_rows.len() + prompt.rows.len()) as i64;
            of_rows.resize(rows.end as usize, Vec::new());
            let shared = prompt.prompt.iter();
            for piece in shared.flat_map(|places| places.pieces(places.tokens(), PIECE)) {
                let first = sequence(rows.clone(), piece);
                for row in rows.clone() {
                    of_rows[row as usize].push(first + row - rows.start);
                }
            }
            for (row, (own, tokens)) in rows.zip(&prompt.rows) {
                positions.push(prompt.tokens() + tokens);
                places.push(own.place(*tokens));
                for piece in own.pieces(tokens + 1, PIECE) {
                    let entry = sequence(row..row + 1, piece);
                    of_rows[row as usize].push(entry);
                }
            }
        }
        // The last start of keys is not used.
        k_starts.push(0);
        let most = of_rows.iter().map(Vec::len).max().unwrap_or(0);
        let is_ragged = of_rows.iter().any(|pieces| pieces.len() < most);
        let masked: Vec<f32> = of_rows
            .iter()
            .flat_map(|pieces| {
                (0..most).map(|at| {
                    if at < pieces.len() {
                        0.0
                    } else {
                        f32::NEG_INFINITY
                    }
                })
            })
            .collect();
        let rows = of_rows.len() as i64;
        let pieces: Vec<i64> = of_rows
            .into_iter()
            .flat_map(|mut pieces| {
                // Another row's piece could be NaN, which no mask removes.
                pieces.resize(most, pieces[0]);
                pieces
            })
            .collect();
        let wide = sent(&[&positions, &places, &entries, &pieces], device);
        let narrow = sent(&[&q_starts, &k_starts, &k_lengths], device);
        let [positions, places, entries, pieces] = wide.try_into().expect("four tensors");
        let [q_starts, k_starts, k_lengths] = narrow.try_into().expect("three tensors");
        let shape = [rows, most as i64];
        let mask = is_ragged.then(|| {
            let mask = Tensor::from_slice(&masked).view([rows, most as i64, 1]);
            mask.to_device(device)
        });
        Self {
            positions,
            places,
            entries,
            pieces: pieces.view(shape),
            mask,
            sequences: Sequences {
                q_starts,
                k_starts,
                k_lengths,
                q_max,
                k_max,
            },
        }
    }

    /// The number of rows.
    pub fn count(&self) -> i64 {
        self.places.size()[0]
    }

    /// Stores the keys and values of the rows' tokens (`[kv_heads, rows, head_dim]`) in a layer of the
    /// pool, and returns the attention of the queries (`[heads, rows, head_dim]`) to their prompts and
    /// to their own continuations.
    pub fn attend(&self, pool: &KvPool, layer: usize, q: &Tensor, new: &KeyValue) -> Tensor {
        let KeyValue { k, v } = pool.layer(layer);
        for (all, new) in [(k, &new.k), (v, &new.v)] {
            let _ = all.shallow_clone().index_copy_(1, &self.places, new);
        }
        shim::attend_pieces(
            q,
            [k, v],
            &self.entries,
            &self.pieces,
            self.mask.as_ref(),
            &self.sequences,
        )
    }
}

/// Copies numbers to a device at once, and returns them apart.
fn sent<T: tch::kind::Element + Copy>(parts: &[&Vec<T>], device: Device) -> Vec<Tensor> {
    let all: Vec<T> = parts.iter().flat_map(|part| part.iter().copied()).collect();
    let all = Tensor::from_slice(&all).to_device(device);
    let mut start = 0;
    let part = |part: &&Vec<T>| {
        let length = part.len() as i64;
        start += length;
        all.narrow(0, start - length, length)
    };
    parts.iter().map(part).collect()
}
