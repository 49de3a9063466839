//! The eBPF object in the running kernel.
//!
//! In:    the struct offsets of the running kernel ([`Layout`]); names of programs, tracepoints and maps
//! Out:   attached programs, typed maps ([`super::maps`]), the output of an iterator
//! Trust: the kernel, which verifies every program when it is loaded
//!
//! A program stays attached until its [`Object`] is dropped.

use std::io::Read;

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Map, MapError},
    programs::{Iter, Program, ProgramError, RawTracePoint},
};
use nix::{
    errno::Errno,
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
};
use vtrace_common::kvm::Layout;

use super::{BpfError, map_failed, refused};

/// vtrace-ebpf as `cargo xtask ebpf` builds it.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../vtrace-ebpf/vtrace.bpf.o");

/// The loaded object: its programs, and those of its maps that have not been taken.
#[derive(Debug)]
pub struct Object {
    programs: Ebpf,
    types: Btf,
}

impl Object {
    /// Loads the object with the struct offsets of the running kernel. No program is attached yet.
    ///
    /// # Errors
    /// The kernel has no BTF, or refuses the object (not root, or lockdown=confidentiality).
    pub fn load(layout: &Layout) -> Result<Self, BpfError> {
        // Before 5.11 maps count as locked memory. A kernel that refuses to raise the limit does not need it raised.
        if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
            log::debug!("cannot raise the limit of locked memory: {error}");
        }
        let types = Btf::from_sys_fs().map_err(BpfError::Types)?;
        let words = layout.words();
        let programs = EbpfLoader::new()
            .btf(Some(&types))
            .override_global("LAYOUT", &words, true)
            .load(OBJECT)
            .map_err(|source| BpfError::Object(Box::new(source)))?;
        Ok(Self { programs, types })
    }

    /// Attaches `program` to `tracepoint`.
    ///
    /// # Errors
    /// [`BpfError::NoTracepoint`] where the kernel has none of this name; [`BpfError::Program`] when the verifier refuses.
    pub fn attach(&mut self, program: &'static str, tracepoint: &str) -> Result<(), BpfError> {
        match self.loaded(program)?.attach(tracepoint) {
            Ok(_) => Ok(()),
            Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(Errno::ENOENT as i32) => {
                Err(BpfError::NoTracepoint { tracepoint: tracepoint.to_owned() })
            }
            Err(source) => Err(refused(program, source)),
        }
    }

    /// Runs the iterator `program` over every open file of every process, and returns all bytes that it wrote.
    ///
    /// # Errors
    /// The kernel refuses the iterator, or it cannot be read.
    pub fn over_open_files(&mut self, program: &'static str) -> Result<Vec<u8>, BpfError> {
        let types = &self.types;
        let iterator: &mut Iter = find(&mut self.programs, program)?;
        if iterator.fd().is_err() {
            iterator.load("task_file", types).map_err(|source| refused(program, source))?;
        }
        let attached = iterator.attach().map_err(|source| refused(program, source))?;
        let link = iterator.take_link(attached).map_err(|source| refused(program, source))?;
        let mut output = link.into_file().map_err(|source| BpfError::Iterator { program, source: Box::new(source) })?;
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).map_err(|source| BpfError::Read { program, source })?;
        Ok(bytes)
    }

    /// Takes a map out of the object; a map can be taken once.
    pub(super) fn take_map<T: TryFrom<Map, Error = MapError>>(&mut self, name: &'static str) -> Result<T, BpfError> {
        let map = self.programs.take_map(name).ok_or(BpfError::Mismatch { what: name })?;
        map.try_into().map_err(|source| map_failed(name, source))
    }

    /// The tracepoint program of this name, in the kernel.
    pub(super) fn loaded(&mut self, name: &'static str) -> Result<&mut RawTracePoint, BpfError> {
        let program: &mut RawTracePoint = find(&mut self.programs, name)?;
        if program.fd().is_err() {
            program.load().map_err(|source| refused(name, source))?;
        }
        Ok(program)
    }

    /// The program of this name, of any kind.
    pub(super) fn program(&self, name: &'static str) -> Result<&Program, BpfError> {
        self.programs.program(name).ok_or(BpfError::Mismatch { what: name })
    }
}

fn find<'a, T>(programs: &'a mut Ebpf, name: &'static str) -> Result<&'a mut T, BpfError>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = programs.program_mut(name).ok_or(BpfError::Mismatch { what: name })?;
    program.try_into().map_err(|source| refused(name, source))
}
