//! Why there is no recording: what every part of it can fail with, in one type.

use super::{command::CommandError, files::output::FileError, guests::GuestsError, host::HostError, session::Trouble};

/// Why there is no recording.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The host's part.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A guest could not be prepared.
    #[error("{guest}: {trouble}")]
    Guest {
        /// Its name.
        guest: String,
        /// Why.
        trouble: Trouble,
    },
    /// No common ground with the server.
    #[error(transparent)]
    Guests(#[from] GuestsError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The command.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A system call of our own.
    #[error("{call}: {source}")]
    System {
        /// Which.
        call: &'static str,
        /// Why.
        source: std::io::Error,
    },
}
