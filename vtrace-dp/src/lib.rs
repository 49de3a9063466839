//! vtrace: host and guests in one trace.
//!
//! Read the modules in the order a page travels:
//!
//! | where | module | what happens |
//! |---|---|---|
//! | guest | [`agent`] | tap ─► pump ─► port: pages leave the ring buffer by splice |
//! | both | [`tracefs`] | instances, events, descriptions of a machine |
//! | host | [`device`] | the vhost-user virtio-console device; a page lies in guest memory |
//! | host | [`drain`] | ring ─► lane ─► sink: the page is checked, counted, written to its final place |
//! | host | [`trace`] | the layout of trace.dat |
//! | host | [`clock`] | guest time becomes host time |
//! | host | [`server`] | `vtrace server`: sockets, guests, clients |
//! | host | [`recorder`] | `vtrace record`: plan, session, summary |
//! | host | [`setup`] | `vtrace setup`: a guest's folder, FIFOs and words for QEMU |
//! | host | [`check`] | `vtrace check`: are a guest's times where the host says it ran |
//! | host | [`hotplug`] | `vtrace attach`, `detach`: devices into and out of a running QEMU |
//! | host | [`doctor`] | `vtrace doctor`: what a machine has of what a recording needs |
//! | host | [`cli`] | what a person types and reads |
//! | host | [`printable`] | foreign text, and errors, as they may be shown |
//! | both | [`sys`] | the only system calls, and with `self::virtq::memory` the only unsafe code |

pub mod agent;
pub mod analysis;
pub mod bpf;
pub mod cli;
pub mod clock;
pub mod device;
pub mod doctor;
pub mod drain;
pub mod ftrace;
pub mod printable;
pub mod recorder;
pub mod server;
pub mod sys;
pub mod trace;
pub mod tracefs;
pub mod virtq;
pub mod vmm;
