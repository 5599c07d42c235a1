//! The engine: the same command line as `pipeline`, with the networks. The only place that names
//! them, so that nothing else links libtorch.

use std::process::ExitCode;

use ovchat::{models, prep};

#[path = "../nn/mod.rs"]
mod nn;

fn main() -> ExitCode {
    ovchat::cli::main(Some(&nn::NetLoader))
}
