//! The errors of all parts of a recording, in one type.

use super::{
    command::CommandError,
    files::output::FileError,
    guests::{GuestsError, session::Trouble},
    host::HostError,
};

/// Why there is no recording.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The host's part failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A guest could not be prepared.
    #[error("{guest}: {trouble}")]
    Guest {
        /// The guest's name.
        guest: String,
        /// The reason.
        trouble: Trouble,
    },
    /// The link to the server failed.
    #[error(transparent)]
    Guests(#[from] GuestsError),
    /// A file cannot be opened or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The command cannot run.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A system call failed.
    #[error("{call}: {source}")]
    System {
        /// The call.
        call: &'static str,
        /// The error.
        source: std::io::Error,
    },
}
