//! `vtrace record`: host and guests armed, started together, stopped, each into its own file.
//!
//! | module | what |
//! |---|---|
//! | [`run`] | the order of things: carries out what the state machines decide |
//! | [`session`] | one guest's part as a state machine without I/O |
//! | [`guests`] | all guests over one link to the server |
//! | [`outputs`] | what guests' commands write |
//! | [`host`] | the host's part: instance, pump, ledger |
//! | [`tsc`] | how the files turn TSC into nanoseconds |
//! | [`guest`] | which host threads are a guest's vCPUs |
//! | [`kvm`] | what KVM says of the guests' TSCs meanwhile |
//! | [`clocks`] | whose word is taken for a guest's times |
//! | [`command`] | what runs while we record |
//! | [`files`] | opened first, finished last |
//! | `form` | finished files once more: version 6, compressed, with the host's instances |
//! | `instances` | the host's other buffers |
//! | `date` | what makes times of day of its clock |
//! | `progress` | how far all machines are |
//! | `naming` | their names: what was there before stays until the recording has begun |
//! | [`background`] | recordings as other processes see them |
//! | [`behind`] | written while we record, so that the end is near |
//! | [`limit`] | when files end a recording |
//! | [`summary`] | the closing table |
//!
//! In:    a `Plan`; messages of the server
//! Out:   one trace.dat per machine, a [`summary::Summary`]
//! Runs:  on the caller's thread; the host's pages move on a thread of their own
//! Trust: the server; nothing a guest says (texts and counts are bounded by `wire`, sums are checked)

pub mod background;
pub mod behind;
pub mod clocks;
pub mod command;
mod date;
pub mod files;
mod form;
pub mod guest;
pub mod guests;
pub mod host;
mod instances;
pub mod kvm;
pub mod limit;
mod naming;
pub mod outputs;
pub mod progress;
pub mod run;
pub mod runs;
pub mod session;
pub mod sink;
pub mod summary;
pub mod tsc;
