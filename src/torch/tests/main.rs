//! The tests of the networks through the interface of the crate, in one binary.

#![cfg(feature = "torch")]

/// The forward passes of the decoder.
mod decoder;
/// Training on preference pairs.
mod dpo_trainer;
/// Sampling.
mod generate;
/// Parity with the reference programs.
mod parity;
/// Scoring.
mod reward;
/// Training of reward models.
mod reward_trainer;
/// Training on conversations.
mod sft_trainer;
/// The operators of our own.
mod shim;

/// Outputs of transformers, and comparisons.
mod common;
/// Tiny models and calls of them, also for the unit tests.
mod recorded;
