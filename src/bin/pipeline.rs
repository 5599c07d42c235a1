//! The program that people call. It has no networks and links no libtorch, so that it starts at
//! once; when a network must open it becomes `pipeline-engine`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ovchat_cli::main(None)
}
