//! The reasons why a video has no frames.

/// The reason why frames could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VideoFault {
    /// The file cannot be used; its record is rejected.
    File(String),
    /// The program cannot be used, or was killed; the stage fails.
    Program(String),
    /// The run was interrupted.
    Stopped,
}
