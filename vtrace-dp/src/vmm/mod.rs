//! Virtual machine monitors: their command lines, their control channel, their threads.
//!
//! | module | what |
//! |---|---|
//! | [`setup`] | a guest's folder and FIFOs |
//! | [`qemu`], [`libvirt`] | the options that connect a guest, for QEMU and for libvirt |
//! | [`qmp`] | QMP, QEMU's control channel |
//! | [`capacity`] | what a running QEMU can accept |
//! | [`attach`] | hot-plug and hot-unplug of devices |
//! | [`running`] | what a running QEMU has of what recording needs |
//! | [`vcpu_threads`] | the host threads that run a guest's vCPUs |
//!
//! In:    a guest's name and size; answers of a QMP socket; /proc
//! Out:   options as text; commands over QMP; threads
//! Runs:  on the caller's thread; a QMP answer is waited for with a deadline
//! Trust: a VMM's answers are bounded and checked

pub mod attach;
pub mod capacity;
pub mod libvirt;
pub mod qemu;
pub mod qmp;
pub mod running;
pub mod setup;
pub mod vcpu_threads;
