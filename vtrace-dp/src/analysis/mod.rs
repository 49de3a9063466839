//! What the recorded events say about vCPUs: when they ran, what they caused, whether a guest's times agree.
//!
//! | module | what |
//! |---|---|
//! | [`windows`] | when a vCPU could run: boundaries, gaps |
//! | [`host_events`] | the host's events that matter to vCPUs, decoded |
//! | [`host_windows`] | the windows of every vCPU thread, from a finished file of the host |
//! | [`vcpu_runs`] | the runs of chosen threads in chosen periods, from the host's pages while the file is finished |
//! | [`pairs`] | what the host saw of something the guest did |
//! | [`check`] | `vtrace check`: whether a guest's times agree with the host's |
//!
//! In:    events of host and guests, through [`crate::trace::read`]
//! Out:   windows, gaps, reports
//! Runs:  on the caller's thread
//! Trust: nothing: files come from anyone

pub mod check;
pub mod host_events;
pub mod host_windows;
pub mod pairs;
pub mod vcpu_runs;
pub mod windows;

use serde::Serialize;

use crate::trace::read::{WalkFault, input::ReadFault};

/// Why files cannot be analysed.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Options that make no sense.
    #[error(transparent)]
    Read(#[from] ReadFault),
    /// A lane that cannot be walked to its end.
    #[error(transparent)]
    Walk(#[from] WalkFault),
}

/// What a guest's events are held against.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Against {
    /// \[kvm_entry, kvm_exit\]
    Runs,
    /// Its vCPUs' threads on a CPU, by sched_switch: a weaker check.
    OnCpu,
    /// The host's file has neither for this guest.
    Nothing,
}
