//! The tiny models of `tests/parity`, and calls of them through the traits of models. The unit tests
//! of the crate include this module, too.

pub mod onevision;
pub mod reward;
