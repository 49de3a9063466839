//! What the host's file says of every vCPU thread: when it could run, what it caused, and where that is not known.
//!
//! In:    the host's trace.dat
//! Out:   windows by thread, gaps, causes
//! Runs:  on the caller's thread, once through the file by time
//! Full:  [`BOUNDARIES_MAX`] boundaries are held; what is behind them is not covered, and that is said
//! Trust: nothing

use std::collections::{BTreeMap, HashMap};

use super::{
    Against, CheckError,
    pairs::{Causes, Key, Reading, Rule},
    windows::{Gaps, Windows},
};
use crate::{
    ftrace::fields::{EventFormat, Field, Formats, id},
    trace::read::{
        Reader,
        input::Source,
        merge::{Merge, Merged},
        times::Stamps,
    },
};

/// Boundaries of all windows that are held: 1 GiB of them.
pub const BOUNDARIES_MAX: usize = 1 << 26;

/// One pass over a host's file.
#[derive(Debug, Default)]
pub struct Host {
    /// \[kvm_entry, kvm_exit\] of each thread.
    pub runs: HashMap<u32, Windows>,
    /// On a CPU, by sched_switch; of the threads that were asked for.
    pub on_cpu: HashMap<u32, Windows>,
    /// vCPU id of each thread that ever entered a guest.
    pub vcpu_ids: BTreeMap<u32, u32>,
    /// Where events were lost.
    pub gaps: Gaps,
    /// The host's half of pairs.
    pub causes: Causes,
    /// More boundaries than can be held.
    pub is_cut: bool,
    boundaries: usize,
}

/// What an event of the host says of the thread that did it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Did {
    /// kvm_entry; the vCPU's id, if it says it.
    Enter(Option<u32>),
    /// kvm_exit
    Leave,
    /// sched_switch: from one thread to another.
    Switch(Option<u32>, Option<u32>),
    /// The host's half of a pair.
    Cause(Rule, Key),
    /// Our eBPF program found a TSC changed, right before a kvm_entry.
    Announce {
        /// `l1_tsc_offset`
        offset: u64,
        /// `l1_tsc_scaling_ratio`
        ratio: u64,
    },
}

/// Which of these events the host has formats of; what it never recorded it has none of, or none of that kind.
#[derive(Debug)]
enum Kind {
    Entry { vcpu: Option<Field> },
    Exit,
    Switch { from: Field, to: Field },
    Cause(Reading),
    Announce { text: Field },
}

impl Kind {
    fn of(format: &EventFormat) -> Option<Self> {
        match (format.system.as_str(), format.name.as_str()) {
            ("kvm", "kvm_entry") => Some(Self::Entry { vcpu: format.field("vcpu_id").cloned() }),
            ("kvm", "kvm_exit") => Some(Self::Exit),
            ("sched", "sched_switch") => {
                Some(Self::Switch { from: format.field("prev_pid")?.clone(), to: format.field("next_pid")?.clone() })
            }
            ("bpf_trace", "bpf_trace_printk") => Some(Self::Announce { text: format.field("bpf_string")?.clone() }),
            _ => Reading::of_host(format).map(Self::Cause),
        }
    }

    fn read(&self, event: &[u8]) -> Option<Did> {
        Some(match self {
            Self::Entry { vcpu } => Did::Enter(vcpu.as_ref().and_then(|field| field.small(event))),
            Self::Exit => Did::Leave,
            Self::Switch { from, to } => Did::Switch(from.small(event), to.small(event)),
            Self::Cause(reading) => reading.read(event).map(|(rule, key)| Did::Cause(rule, key))?,
            Self::Announce { text } => announced(text.contents(event)?)?,
        })
    }
}

/// `vtrace tsc: vcpu 0 offset -77 ratio 100000000`, as our eBPF program writes it.
fn announced(text: &[u8]) -> Option<Did> {
    let text = std::str::from_utf8(text).ok()?.trim_end_matches(['\0', '\n']);
    let mut words = text.strip_prefix("vtrace tsc: vcpu ")?.split(' ');
    let (_, offset, ratio) = (words.next()?, words.nth(1)?, words.nth(1)?);
    let offset: i64 = offset.parse().ok()?;
    Some(Did::Announce { offset: offset.cast_unsigned(), ratio: u64::from_str_radix(ratio, 16).ok()? })
}

/// How a host's events are read.
#[derive(Debug)]
pub struct Decoders {
    kinds: HashMap<u16, (Kind, Field)>,
}

impl Decoders {
    /// By the formats of the host.
    pub fn of(formats: &Formats) -> Self {
        let decoder =
            |format: &EventFormat| Some((format.id, (Kind::of(format)?, format.field("common_pid")?.clone())));
        Self { kinds: formats.each().filter_map(decoder).collect() }
    }

    /// Entries and exits are both told.
    pub fn know_runs(&self) -> bool {
        let has = |wanted: fn(&Kind) -> bool| self.kinds.values().any(|(kind, _)| wanted(kind));
        has(|kind| matches!(kind, Kind::Entry { .. })) && has(|kind| matches!(kind, Kind::Exit))
    }

    /// Who did what. Hot.
    pub fn read(&self, event: &[u8]) -> Option<(u32, Did)> {
        let (kind, pid) = self.kinds.get(&id(event)?)?;
        Some((pid.small(event)?, kind.read(event)?))
    }
}

impl Host {
    /// Reads a host's file. `threads`: those of vCPUs, as far as they are known before.
    ///
    /// # Errors
    /// A page cannot be read or is broken; options that make no sense.
    pub fn read<S: Source>(reader: &Reader<S>, threads: &[u32]) -> Result<Self, CheckError> {
        let stamps = Stamps::of(reader.options(), reader.other_options())?;
        let decoders = Decoders::of(&Formats::of(reader.metadata()));
        let mut host = Self::default();
        threads.iter().for_each(|thread| drop(host.on_cpu.insert(*thread, Windows::default())));
        let clock = reader.top().map(|top| top.clock.clone()).unwrap_or_default();
        // kvm's events may be in an instance of their own.
        let buffers: Vec<_> = reader.buffers().iter().filter(|buffer| buffer.clock == clock).collect();
        let buffers: Vec<_> = buffers
            .into_iter()
            .map(|buffer| {
                let is_top = buffer.name.is_empty();
                (buffer, if is_top { stamps.clone() } else { stamps.unshifted() })
            })
            .collect();
        let mut merge = Merge::new(reader, &buffers)?;
        while let Some(event) = merge.next_event()? {
            host.take(&event, &decoders);
        }
        host.gaps.settle();
        Ok(host)
    }

    fn take(&mut self, event: &Merged<'_>, decoders: &Decoders) {
        if let Some(since) = event.lost_since {
            self.gaps.push(since, event.time);
        }
        let Some((thread, did)) = decoders.read(event.data) else { return };
        match did {
            Did::Enter(vcpu) => {
                if let Some(vcpu) = vcpu {
                    self.vcpu_ids.insert(thread, vcpu);
                }
                if self.has_room() {
                    self.runs.entry(thread).or_default().push(event.time, true);
                }
            }
            Did::Leave if self.has_room() => self.runs.entry(thread).or_default().push(event.time, false),
            Did::Leave | Did::Announce { .. } => {}
            Did::Switch(from, to) => {
                self.switch(from, event.time, false);
                self.switch(to, event.time, true);
            }
            Did::Cause(rule, key) => self.causes.push(thread, (rule, key), event.time),
        }
    }

    fn switch(&mut self, thread: Option<u32>, time: u64, opens: bool) {
        if thread.is_some_and(|thread| self.on_cpu.contains_key(&thread)) && self.has_room() {
            let windows = thread.and_then(|thread| self.on_cpu.get_mut(&thread));
            windows.expect("looked for above").push(time, opens);
        }
    }

    fn has_room(&mut self) -> bool {
        self.boundaries += 1;
        self.is_cut |= self.boundaries > BOUNDARIES_MAX;
        !self.is_cut
    }

    /// What the vCPUs of these threads can be checked against: the best there is.
    pub fn against(&self, threads: &[u32]) -> Against {
        let known = |all: &HashMap<u32, Windows>| {
            threads.iter().any(|thread| all.get(thread).is_some_and(|windows| windows.count() > 0))
        };
        if known(&self.runs) {
            Against::Runs
        } else if known(&self.on_cpu) {
            Against::OnCpu
        } else {
            Against::Nothing
        }
    }

    /// The windows of a thread.
    pub fn windows(&self, against: Against, thread: u32) -> Option<&Windows> {
        match against {
            Against::Runs => self.runs.get(&thread),
            Against::OnCpu => self.on_cpu.get(&thread),
            Against::Nothing => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announced_change_is_read_as_our_program_writes_it() {
        let expected = Did::Announce { offset: 77u64.wrapping_neg(), ratio: 1 << 32 };
        assert_eq!(announced(b"vtrace tsc: vcpu 3 offset -77 ratio 100000000\0"), Some(expected));
        let own = Did::Announce { offset: 5, ratio: 0 };
        assert_eq!(announced(b"vtrace tsc: vcpu 0 offset 5 ratio 0\n"), Some(own));
        for other in [&b"vtrace tsc: vcpu 0 offset x ratio 0"[..], b"vtrace tsc: vcpu 0 offset 5", b"other", b"\xff"] {
            assert_eq!(announced(other), None);
        }
    }
}
