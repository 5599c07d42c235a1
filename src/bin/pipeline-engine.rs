//! The engine: the same command line as `pipeline`, with the networks. The only place that names
//! them, so that nothing else links libtorch.

use std::process::ExitCode;

fn main() -> ExitCode {
    ovchat_cli::main(Some(&ovchat_torch::NetLoader))
}
