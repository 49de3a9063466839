//! What two programs must agree on.
//!
//! | item | written by | read by |
//! |---|---|---|
//! | [`limits`] | this crate | everyone: every bound of the system |
//! | [`ids`] | this crate | everyone |
//! | [`ledger`] | agent, drain | recorder |
//! | [`time`] | agent, server (`rdtsc`) | `clock`, the only place that converts |
//! | [`page`] | the kernel's ring buffer | drain, trace reader |
//! | [`kvm`] | the eBPF programs | `bpf`, `clock::feed` |
//! | [`wire`] | agent, server, record | each other |

#![no_std]
#![forbid(unsafe_code)]

pub mod ids;
pub mod kvm;
pub mod ledger;
pub mod limits;
pub mod page;
pub mod time;
#[cfg(feature = "wire")]
pub mod wire;

/// The program and its version, as every hello of it says.
pub const SOFTWARE: &str = concat!("vtrace ", env!("CARGO_PKG_VERSION"));
