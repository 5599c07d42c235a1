//! The `pipeline` program: the command line without networks. It does not link libtorch, so that it
//! starts quickly; when a network has to be opened, it replaces itself with `pipeline-engine`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ovchat_cli::main(None)
}
