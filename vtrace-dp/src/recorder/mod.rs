//! `vtrace record`: host and guests armed, started together, stopped, each into its own file.
//!
//! From the top down; each module uses only what stands below it:
//!
//! | module | what |
//! |---|---|
//! | [`background`] | recordings as other processes see them |
//! | [`run`] | the order of things: carries out what the state machines decide |
//! | `files` | all files: opened first, finished last |
//! | [`clocks`] | whose word is taken for a guest's times |
//! | `recording` | what is known of a recording while it runs |
//! | [`runs`] | when vCPUs ran, from the host's pages |
//! | `instances` | the host's other buffers |
//! | [`error`] | why there is no recording |
//! | [`guests`] | all guests over one link to the server |
//! | [`session`] | one guest's part as a state machine without I/O |
//! | [`host`] | the host's part: instance, pump, ledger |
//! | `form` | finished files once more: version 6, compressed, with the host's instances |
//! | `file` | one machine's file while it is recorded |
//! | [`naming`] | a file's name: what was there before stays until the recording has begun |
//! | [`behind`] | written while we record, so that the end is near |
//! | `date` | what makes times of day of the host's clock |
//! | [`plan`] | what is to be recorded: who, what, where to |
//! | [`sink`] | which way a guest's pages go to its file |
//! | [`summary`] | the closing table |
//! | [`outputs`] | what guests' commands write |
//! | [`command`] | what runs while we record |
//! | [`limit`] | when files end a recording |
//! | [`progress`] | how far all machines are |
//! | [`silence`] | agents that say nothing for a while |
//! | [`kvm`] | what KVM says of the guests' TSCs meanwhile |
//! | [`guest`] | which host threads are a guest's vCPUs |
//! | [`tsc`] | how the files turn TSC into nanoseconds |
//!
//! In:    a [`plan::Plan`]; messages of the server
//! Out:   one trace.dat per machine, a [`summary::Summary`]
//! Runs:  on the caller's thread; the host's pages move on a thread of their own
//! Trust: the server; nothing a guest says (texts and counts are bounded by `wire`, sums are checked)

pub mod background;
pub mod clocks;
pub mod command;
pub mod error;
pub mod files;
pub mod guests;
pub mod host;
mod instances;
pub mod plan;
pub mod progress;
pub mod run;
pub mod session;
pub(crate) mod state;
pub mod summary;
