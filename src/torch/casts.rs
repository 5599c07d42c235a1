//! Conversions to the compute dtype.
//!
//! Trained weights are in float32. A step may convert each of them many times: once in every pass, and
//! again where a layer is recomputed. While a [`KeptCasts`] exists on the thread, the first conversion is
//! kept with its autograd node and used again, as by PyTorch's autocast. Each backward pass still adds its
//! gradients to those of the weight in float32. Every weight is used once in a backward pass, so the
//! gradients are the same to the bit.

use std::cell::RefCell;
use std::collections::HashMap;

use tch::{Kind, Tensor};

thread_local! {
    /// The kept conversions, by the address of the weight's data and the dtype.
    static KEPT: RefCell<Option<HashMap<(usize, Kind), Tensor>>> = const { RefCell::new(None) };
}

/// Converts a tensor, without calling an operator if it has the dtype already.
pub fn cast(xs: &Tensor, kind: Kind) -> Tensor {
    if xs.kind() == kind {
        xs.shallow_clone()
    } else {
        xs.to_kind(kind)
    }
}

/// Converts a weight, like [`cast`]. If it is trained and conversions are kept, converts it once.
pub fn cast_weight(weight: &Tensor, kind: Kind) -> Tensor {
    let is_trained = weight.kind() != kind && weight.requires_grad();
    KEPT.with_borrow_mut(|kept| match kept {
        Some(kept) if is_trained => {
            // The autograd node of a conversion holds the weight, so its address is not used again.
            let key = (weight.data_ptr() as usize, kind);
            let found = kept.get(&key).filter(|found| found.size() == weight.size());
            if let Some(found) = found {
                return found.shallow_clone();
            }
            // Also in a pass without gradients, as a recomputed layer needs the autograd node.
            let made = tch::with_grad(|| weight.to_kind(kind));
            kept.insert(key, made.shallow_clone());
            made
        }
        _ => cast(weight, kind),
    })
}

/// Keeps the conversions of trained weights on this thread until it is dropped. The weights must not
/// change meanwhile.
#[derive(Debug)]
pub struct KeptCasts(());

impl KeptCasts {
    /// Starts to keep conversions, if `there_is_room` for those of all trained weights.
    pub fn new(there_is_room: bool) -> Self {
        KEPT.set(there_is_room.then(HashMap::new));
        Self(())
    }
}

impl Drop for KeptCasts {
    fn drop(&mut self) {
        KEPT.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::super::layer_stack::{Layer, LayerStack, SavedActivations};
    use super::super::layers::tests::noise;
    use super::*;

    /// The gradients of two float32 weights after two passes in bfloat16.
    fn gradients(keep: SavedActivations) -> [Tensor; 2] {
        let weights = [1, 2].map(|seed| noise(&[4, 4], seed).set_requires_grad(true));
        for pass in 3..5 {
            let layers = weights.iter().map(|weight| -> Layer<'_> {
                Box::new(move |xs| {
                    let weight = cast_weight(weight, xs.kind());
                    xs.linear(&weight, None::<&Tensor>).silu()
                })
            });
            let xs = noise(&[3, 4], pass).to_kind(Kind::BFloat16);
            let chain = LayerStack::run(layers.collect(), &xs, keep);
            (chain.output() * noise(&[3, 4], 9))
                .sum(Kind::Float)
                .backward();
            chain.backward();
        }
        weights.map(|weight| weight.grad())
    }

    #[test]
    fn kept_conversions_are_made_once_and_change_no_gradient() {
        for keep in [SavedActivations::Everything, SavedActivations::Inputs] {
            let expected = gradients(keep);
            let kept = KeptCasts::new(true);
            assert_eq!(gradients(keep), expected, "{keep:?}");
            let made = KEPT.with_borrow(|kept| kept.as_ref().map(HashMap::len));
            assert_eq!(made, Some(2));
            drop(kept);
            assert!(KEPT.with_borrow(Option::is_none));
        }
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let _kept = KeptCasts::new(false);
        let weight = noise(&[2], 1).set_requires_grad(true);
        let made = [0; 2].map(|_| cast_weight(&weight, Kind::BFloat16).data_ptr());
        assert_ne!(made[0], made[1]);
    }
}
