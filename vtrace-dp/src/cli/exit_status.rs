//! Exit statuses of `vtrace`, besides 0 and those of commands.

/// The request failed.
pub(super) const FAILED: u8 = 1;
/// The command line is not valid; clap uses the same status.
pub(super) const USAGE: u8 = 2;
/// Data was lost, and `--strict` was given.
pub(super) const LOST: u8 = 3;
