//! The eBPF programs at work: every vCPU's TSC offset and ratio, now and at each change.
//!
//! In:    [`Fields`] of the running kernel; the processes to watch.
//! Out:   [`VcpuState`] of every vCPU of the system at any moment ([`Feed::snapshot`]), [`TscChange`] when a watched
//!        vCPU's state is new ([`Feed::next_change`]; the descriptor polls readable), and counters.
//! Runs:  the thread that owns it. The programs run in the vCPUs' own threads.
//! Full:  a change that finds the ring buffer full is counted and told at that vCPU's next entry, later ones with it;
//!        a state between the two is lost. 3000 changes fit.
//! Trust: the kernel. The object is part of this binary; the kernel verifies it.
//!
//! Order that loses nothing: attach, watch, then take a snapshot; what changes after it comes as a change.

use std::collections::HashSet;
use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use aya::programs::links::LinkError;
use aya::programs::{Iter, Program, ProgramError, RawTracePoint};
use aya::{Btf, Ebpf, EbpfError, EbpfLoader};
use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use thiserror::Error;
use vtrace_common::kvm::{Hits, PER_CPU_WORDS, TscChange, VcpuState};

use super::btf::Fields;

/// What `cargo xtask ebpf` makes of vtrace-ebpf.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../vtrace-ebpf/vtrace.bpf.o");
/// The key that stands for every process.
const EVERYONE: u32 = 0;

/// The eBPF programs could not be set to work.
#[derive(Debug, Error)]
pub enum FeedError {
    /// The kernel's types could not be read for the programs that need them.
    #[error("cannot read the kernel's BTF")]
    Types(#[source] aya::BtfError),
    /// The object or its maps were refused.
    #[error("the kernel refused the eBPF object")]
    Object(#[source] Box<EbpfError>),
    /// A program was refused by the verifier, or could not be attached.
    #[error("the kernel refused the eBPF program {program}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Why.
        source: Box<ProgramError>,
    },
    /// The kernel has no such tracepoint: KVM is not loaded.
    #[error("this kernel has no tracepoint {tracepoint}")]
    NoTracepoint {
        /// Its name.
        tracepoint: String,
    },
    /// `kvm_exit`'s arguments are not in the kernel's BTF.
    #[error("this kernel's BTF does not tell the arguments of kvm_exit")]
    ExitUnknown,
    /// A map could not be read or written.
    #[error("eBPF map {map}")]
    Map {
        /// Its name.
        map: &'static str,
        /// Why.
        source: Box<MapError>,
    },
    /// The list of vCPUs could not be opened.
    #[error("cannot open the list of vCPUs")]
    Iterator(#[source] Box<LinkError>),
    /// The list of vCPUs could not be read.
    #[error("cannot read the list of vCPUs")]
    Snapshot(#[source] io::Error),
    /// Object and loader do not belong together.
    #[error("the eBPF object has no {what}")]
    Mismatch {
        /// What is missing or has another shape.
        what: &'static str,
    },
}

/// Where a program can listen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Hook {
    /// `kvm_entry`: what the clock is made of.
    Entry,
    /// `kvm_exit`: sees nothing more while `kvm_entry` works, at twice the cost.
    Exit,
    /// `kvm_emulate_insn`: stands in for `kvm_entry` in load tests where that one keeps silent.
    Emulate,
}

impl Hook {
    const fn program(self) -> &'static str {
        match self {
            Self::Entry => "kvm_entry",
            Self::Exit => "kvm_exit",
            Self::Emulate => "kvm_emulate_insn",
        }
    }
}

/// Which processes' vCPUs are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Watched {
    /// This one (tgid).
    Process(u32),
    /// All of them.
    Everyone,
}

/// What a program cost, as the kernel counted it while statistics were on ([`aya::sys::enable_stats`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cost {
    /// Runs.
    pub runs: u64,
    /// All of them together.
    pub busy_ns: u128,
}

/// The loaded programs.
pub struct Feed {
    programs: Ebpf,
    types: Btf,
    changes: RingBuf<MapData>,
    wanted: HashMap<MapData, u32, u8>,
    per_cpu: PerCpuArray<MapData, [u64; PER_CPU_WORDS]>,
    exit_is_known: bool,
}

impl fmt::Debug for Feed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Feed").field("hits", &self.hits()).finish_non_exhaustive()
    }
}

impl Feed {
    /// Loads the object for this kernel; nothing listens yet. `announce`: each change is also written to the event
    /// `bpf_trace:bpf_trace_printk`, so that an instance that records it has the change between its own events.
    ///
    /// # Errors
    /// When the kernel has no BTF or refuses the object (not root, or lockdown=confidentiality).
    pub fn load(fields: &Fields, announce: bool) -> Result<Self, FeedError> {
        // Before 5.11 maps count as locked memory. Where it may not be raised, it does not matter any more.
        if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
            log::debug!("locked memory stays limited: {error}");
        }
        let types = Btf::from_sys_fs().map_err(FeedError::Types)?;
        let mut layout = fields.layout;
        layout.announce = u32::from(announce);
        let words = layout.words();
        let mut programs = EbpfLoader::new()
            .btf(Some(&types))
            .override_global("LAYOUT", &words, true)
            .load(OBJECT)
            .map_err(|source| FeedError::Object(Box::new(source)))?;
        Ok(Self {
            changes: map(&mut programs, "CHANGES")?,
            wanted: map(&mut programs, "WANTED")?,
            per_cpu: map(&mut programs, "PER_CPU")?,
            programs,
            types,
            exit_is_known: fields.exit_argument.is_some(),
        })
    }

    /// Listens at a hook until this feed is dropped.
    ///
    /// # Errors
    /// [`FeedError::NoTracepoint`] where KVM is not loaded; [`FeedError::ExitUnknown`] for `kvm_exit` on 5.10;
    /// [`FeedError::Program`] when the verifier refuses the program.
    pub fn attach(&mut self, hook: Hook) -> Result<(), FeedError> {
        if hook == Hook::Exit && !self.exit_is_known {
            return Err(FeedError::ExitUnknown);
        }
        self.listen(hook.program(), hook.program())
    }

    /// Lets the program that does nothing listen at `tracepoint`: the cost of the others is measured against it.
    ///
    /// # Errors
    /// As [`Feed::attach`].
    pub fn attach_empty(&mut self, tracepoint: &str) -> Result<(), FeedError> {
        self.listen("empty", tracepoint)
    }

    /// Starts telling the changes of these vCPUs.
    ///
    /// # Errors
    /// [`FeedError::Map`] when 1024 processes are watched already.
    pub fn watch(&mut self, watched: Watched) -> Result<(), FeedError> {
        self.wanted.insert(key(watched), 1, 0).map_err(|source| failed("WANTED", source))
    }

    /// Stops telling them. Watching again later goes on where it stopped: take a new snapshot then.
    ///
    /// # Errors
    /// [`FeedError::Map`]; it is none that they were not watched.
    pub fn forget(&mut self, watched: Watched) -> Result<(), FeedError> {
        match self.wanted.remove(&key(watched)) {
            Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(|source| failed("WANTED", source)),
        }
    }

    /// The next change, if one waits.
    ///
    /// # Errors
    /// [`FeedError::Mismatch`] when the record is not one of ours.
    pub fn next_change(&mut self) -> Result<Option<TscChange>, FeedError> {
        let Some(record) = self.changes.next() else { return Ok(None) };
        TscChange::from_bytes(&record).map(Some).ok_or(FeedError::Mismatch { what: "record of this length" })
    }

    /// Every vCPU of the system now, watched or not, in or out of its guest, each once.
    ///
    /// # Errors
    /// When the iterator is refused or cannot be read.
    pub fn snapshot(&mut self) -> Result<Vec<VcpuState>, FeedError> {
        const NAME: &str = "every_vcpu";
        let types = &self.types;
        let program: &mut Iter = program(&mut self.programs, NAME)?;
        let refused = |source| refused(NAME, source);
        if program.fd().is_err() {
            program.load("task_file", types).map_err(refused)?;
        }
        let link = program.attach().map_err(refused)?;
        let link = program.take_link(link).map_err(refused)?;
        let mut list = link.into_file().map_err(|source| FeedError::Iterator(Box::new(source)))?;
        let mut bytes = Vec::new();
        list.read_to_end(&mut bytes).map_err(FeedError::Snapshot)?;
        let records = bytes.chunks(size_of::<VcpuState>()).map(VcpuState::from_bytes);
        let states: Option<Vec<VcpuState>> = records.collect();
        let mut states = states.ok_or(FeedError::Mismatch { what: "vCPU record of this length" })?;
        let mut known = HashSet::new();
        states.retain(|state| known.insert(state.tsc.vcpu)); // a descriptor may be held twice
        Ok(states)
    }

    /// The programs' counters, all CPUs together.
    ///
    /// # Errors
    /// [`FeedError::Map`].
    pub fn hits(&self) -> Result<Hits, FeedError> {
        let of_each_cpu = self.per_cpu.get(&0, 0).map_err(|source| failed("PER_CPU", source))?;
        Ok(of_each_cpu.iter().fold(Hits::default(), |sum, words| sum.plus(words)))
    }

    /// Whether vCPUs run and `kvm_entry` hears of it: two of these, some time apart, answer [`Pulse::is_silent_since`].
    ///
    /// # Errors
    /// As [`Feed::snapshot`] and [`Feed::hits`].
    pub fn pulse(&mut self) -> Result<Pulse, FeedError> {
        let entries_before = self.hits()?.entry;
        let vcpus = self.snapshot()?;
        let exits = vcpus.iter().map(|vcpu| (vcpu.tsc.vcpu, vcpu.exits)).collect();
        Ok(Pulse { entries_before, exits, entries_after: self.hits()?.entry })
    }

    /// What the program at a hook has cost so far; zero unless statistics were on.
    ///
    /// # Errors
    /// [`FeedError::Program`] when nothing listens there.
    pub fn cost(&self, hook: Hook) -> Result<Cost, FeedError> {
        self.cost_of(hook.program())
    }

    /// What the program that does nothing has cost so far.
    ///
    /// # Errors
    /// [`FeedError::Program`] when it does not listen.
    pub fn cost_of_empty(&self) -> Result<Cost, FeedError> {
        self.cost_of("empty")
    }

    fn cost_of(&self, name: &'static str) -> Result<Cost, FeedError> {
        let found = self.programs.program(name).ok_or(FeedError::Mismatch { what: name })?;
        let info = found.info().map_err(|source| refused(name, source))?;
        Ok(Cost { runs: info.run_count(), busy_ns: info.run_time().as_nanos() })
    }

    fn listen(&mut self, name: &'static str, tracepoint: &str) -> Result<(), FeedError> {
        let program: &mut RawTracePoint = program(&mut self.programs, name)?;
        if program.fd().is_err() {
            program.load().map_err(|source| refused(name, source))?;
        }
        match program.attach(tracepoint) {
            Ok(_) => Ok(()),
            Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(Errno::ENOENT as i32) => {
                Err(FeedError::NoTracepoint { tracepoint: tracepoint.to_owned() })
            }
            Err(source) => Err(refused(name, source)),
        }
    }
}

/// Readable when a change waits.
impl AsFd for Feed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.changes.as_fd()
    }
}

/// How far the vCPUs and `kvm_entry` were at one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pulse {
    entries_before: u64,
    /// `vcpu` and its exits so far.
    exits: Vec<(u64, u64)>,
    entries_after: u64,
}

impl Pulse {
    /// True when a vCPU left its guest twice since `earlier` and `kvm_entry` did not hear of the entry between: this
    /// KVM does not call it (it is called by the vendor's code since 6.1). False when it does, or when nothing ran.
    pub fn is_silent_since(&self, earlier: &Self) -> bool {
        let exits_before = |vcpu| earlier.exits.iter().find(|(address, _)| *address == vcpu).map(|(_, exits)| *exits);
        let has_run = |&(vcpu, exits): &(u64, u64)| {
            exits != u64::MAX && exits_before(vcpu).is_some_and(|before| exits.saturating_sub(before) >= 2)
        };
        self.entries_after == earlier.entries_before && self.exits.iter().any(has_run)
    }
}

fn key(watched: Watched) -> u32 {
    match watched {
        Watched::Process(process) => process,
        Watched::Everyone => EVERYONE,
    }
}

fn map<T: TryFrom<Map, Error = MapError>>(programs: &mut Ebpf, name: &'static str) -> Result<T, FeedError> {
    let map = programs.take_map(name).ok_or(FeedError::Mismatch { what: name })?;
    map.try_into().map_err(|source| failed(name, source))
}

fn program<'a, T>(programs: &'a mut Ebpf, name: &'static str) -> Result<&'a mut T, FeedError>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = programs.program_mut(name).ok_or(FeedError::Mismatch { what: name })?;
    program.try_into().map_err(|source| refused(name, source))
}

fn refused(program: &'static str, source: ProgramError) -> FeedError {
    FeedError::Program { program, source: Box::new(source) }
}

fn failed(map: &'static str, source: MapError) -> FeedError {
    FeedError::Map { map, source: Box::new(source) }
}

#[cfg(any(test, feature = "testing"))]
pub mod rehearsal;
#[cfg(test)]
mod tests;
