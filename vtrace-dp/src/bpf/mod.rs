//! The eBPF programs of vtrace: one object, loaded into the running kernel.
//!
//! | module | what |
//! |---|---|
//! | `object` | the object itself: load it, attach its programs, run its iterators |
//! | `maps` | what the programs share with this process: the ring buffer of records, sets, per-CPU values |
//! | `cost` | what a program costs, by the kernel's own statistics |
//!
//! In:    the object that `cargo xtask ebpf` builds from vtrace-ebpf, part of this binary; the kernel's struct offsets
//! Out:   attached programs, and what they write; a [`BpfError`] where the kernel refuses
//! Runs:  on the thread that owns the [`object::Object`]; the programs run wherever the kernel reaches their hook
//! Trust: the kernel, which verifies the object
//!
//! This room knows nothing of what the programs read: [`crate::clock`] does.

pub mod cost;
pub mod maps;
pub mod object;

use std::io;

use aya::{EbpfError, maps::MapError, programs::ProgramError, programs::links::LinkError};
use thiserror::Error;

/// The eBPF object cannot be loaded, attached or read.
#[derive(Debug, Error)]
pub enum BpfError {
    /// The kernel's BTF cannot be read.
    #[error("cannot read the kernel's BTF")]
    Types(#[source] aya::BtfError),
    /// The kernel refuses the object or its maps.
    #[error("the kernel refused the eBPF object")]
    Object(#[source] Box<EbpfError>),
    /// The verifier refuses a program, or it cannot be attached.
    #[error("the kernel refused the eBPF program {program}")]
    Program {
        /// The program's name in the object.
        program: &'static str,
        /// The kernel's answer.
        source: Box<ProgramError>,
    },
    /// The kernel has no such tracepoint. Those of KVM come with its module.
    #[error("this kernel has no tracepoint {tracepoint}")]
    NoTracepoint {
        /// The tracepoint's name.
        tracepoint: String,
    },
    /// A map cannot be read or written.
    #[error("cannot access the eBPF map {map}")]
    Map {
        /// The map's name in the object.
        map: &'static str,
        /// The kernel's answer.
        source: Box<MapError>,
    },
    /// An iterator cannot be opened.
    #[error("cannot open the eBPF iterator {program}")]
    Iterator {
        /// The program's name in the object.
        program: &'static str,
        /// The kernel's answer.
        source: Box<LinkError>,
    },
    /// An iterator cannot be read.
    #[error("cannot read the eBPF iterator {program}")]
    Read {
        /// The program's name in the object.
        program: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The object lacks a program or a map, or a record has an unexpected length.
    #[error("the eBPF object has no {what}")]
    Mismatch {
        /// The missing part.
        what: &'static str,
    },
    /// The kernel keeps no run-time statistics of eBPF programs.
    #[error("the kernel keeps no statistics of eBPF programs")]
    Statistics(#[source] aya::sys::SyscallError),
}

/// A failure of the program `program`.
fn refused(program: &'static str, source: ProgramError) -> BpfError {
    BpfError::Program { program, source: Box::new(source) }
}

/// A failure of the map `map`.
fn map_failed(map: &'static str, source: MapError) -> BpfError {
    BpfError::Map { map, source: Box::new(source) }
}
