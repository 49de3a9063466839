//! `vtrace record`: arms the host and the guests, starts them together, stops them, and finishes one file for each.
//!
//! | module | what it holds |
//! |---|---|
//! | [`run`] | the order of a recording: carries out what the state machines decide |
//! | [`session`] | the state of a running recording, and what all its files share |
//! | [`plan`] | a validated request: what to record, where to |
//! | [`clocks`] | how each guest's times become host times: from KVM, or measured |
//! | [`summary`] | the closing table |
//! | [`progress`] | how far every machine has come, once a second |
//! | [`background`] | recordings as other processes see them: the files in the run directory |
//! | [`command`] | the host's command, which runs while the recording does |
//! | [`error`] | why there is no recording |
//! | [`host`] | the host's part: instance, pump, ledger; `host::instances`: its other buffers |
//! | [`guests`] | all guests over one link to the server; `session`: one guest as a state machine without I/O; `lanes`: its closing ledger; `refusal`: the server's refusals as text; `silence`: agents that do not answer; `command_output`: what `--exec` wrote |
//! | [`files`] | all files: `output` names and locks one, `machine_file` is written to while recording, `finish`, `finish_guest` and `finish_file` close them, `options` ties them together, `finish_form` repacks, `limit` ends a recording by size, `unreported_pages` counts what a lost server wrote, `date` gives times of day |
//!
//! In:    a [`plan::Plan`]; messages of the server
//! Out:   one trace.dat per machine, a [`summary::Summary`]
//! Runs:  on the caller's thread; the host's pages are moved by a thread of their own
//! Trust: the server. Everything from a guest is bounded by `wire` and checked

pub mod background;
pub mod clocks;
pub mod command;
pub mod error;
pub mod files;
pub mod guests;
pub mod host;
pub mod plan;
pub mod progress;
pub mod run;
pub(crate) mod session;
pub mod summary;
