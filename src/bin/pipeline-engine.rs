//! The `pipeline-engine` program: the command line with networks. Only this program depends on the
//! networks, so that nothing else links libtorch.

use std::process::ExitCode;

fn main() -> ExitCode {
    ovchat_cli::main(Some(&ovchat_torch::NetLoader))
}
