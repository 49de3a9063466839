//! vtrace: host and guests in one trace.
//!
//! The rooms in layers, from top to bottom. A file uses its own room and rooms of lower layers; rooms of one layer do not
//! use each other. `cargo xtask tidy` checks this.
//!
//! | layer | room | what it contains |
//! |---|---|---|
//! | 8 | [`cli`] | the command line: arguments, one file for each verb, messages |
//! | 7 | [`doctor`] | `vtrace doctor`: checks of machine, server, guests |
//! | 6 | [`recorder`] | `vtrace record`: plan, session, summary |
//! | 5 | [`server`] | `vtrace server`: sockets, clients, guests, confinement |
//! | 4 | [`analysis`] | vCPU runs and states; `vtrace check` |
//! | 4 | [`vmm`] | QEMU and libvirt: setup, QMP, hot-plug, vCPU threads |
//! | 3 | [`trace`] | trace.dat: format, read, write, restore |
//! | 3 | [`device`] | the vhost-user virtio-console device |
//! | 2 | [`drain`] | from a source of pages to a file: virtqueue, stream, host ring buffer |
//! | 2 | [`clock`] | guest time to host time |
//! | 2 | [`agent`] | `vtrace agent`: control, pump, ports, policy (in the guest) |
//! | 1 | [`ftrace`] | pages, events, formats, without I/O |
//! | 1 | [`tracefs`] | instances, events, options |
//! | 1 | [`virtq`] | guest memory, split virtqueues |
//! | 0 | [`sys`], [`printable`] | system calls; text for people |
//!
//! A page of a guest travels from [`agent`] (tap, pump, port) through [`virtq`] to [`drain`], which checks and counts it and
//! writes it to its place in the file ([`trace`]).

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
