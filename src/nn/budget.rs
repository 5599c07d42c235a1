//! How much is computed at once.

use std::ops::Range;

/// Tokens that are read at once in training, unless one row alone has more: small products keep no
/// processor busy, and the activations of these few are no more than those of one large picture.
pub const PACK_TOKENS_MAX: usize = 2048;

/// Cuts consecutive texts of these lengths into packs of at most `tokens_max` tokens, or of one text
/// that is longer.
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
    use super::*;

    #[test]
    fn packs_hold_whole_texts_in_order() {
        assert!(packs(&[], 10).is_empty());
        assert_eq!(packs(&[4, 6, 1, 30, 2], 10), [0..2, 2..3, 3..4, 4..5]);
    }
}
