//! The failure of a command.

use ovchat_data::store::StoreError;
use ovchat_pipeline::config::LoadError;
use ovchat_pipeline::run::RunError;
use ovchat_query::QueryError;

/// The failure of a command: decides the message and the exit code.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// The user's pipeline is invalid.
    #[error(transparent)]
    Refused(#[from] LoadError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Query(#[from] QueryError),
    #[error("{0}")]
    Words(String),
    /// The command line refers to something that does not exist.
    #[error("{0}")]
    Usage(String),
    /// The message has already been printed.
    #[error("exit code {0}")]
    Code(u8),
}

impl Failed {
    /// The exit code of the program.
    pub fn code(&self) -> u8 {
        match self {
            Self::Refused(_) | Self::Usage(_) => 2,
            Self::Code(code) => *code,
            Self::Run(_) | Self::Store(_) | Self::Query(_) | Self::Words(_) => 1,
        }
    }
}
