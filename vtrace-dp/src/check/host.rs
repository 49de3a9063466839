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
    pairs::{Causes, Reading},
    windows::{Gaps, Windows},
};
use crate::trace::{
    fields::{EventFormat, Field, Formats, id},
    input::Source,
    merge::{Merge, Merged},
    reader::Reader,
    stamp::Stamps,
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

/// Which of these events the host's file has formats of; what it never recorded it has none of, or none of that kind.
#[derive(Debug)]
enum Kind {
    Entry { vcpu: Option<Field> },
    Exit,
    Switch { from: Field, to: Field },
    Cause(Reading),
}

impl Kind {
    fn of(format: &EventFormat) -> Option<Self> {
        match (format.system.as_str(), format.name.as_str()) {
            ("kvm", "kvm_entry") => Some(Self::Entry { vcpu: format.field("vcpu_id").cloned() }),
            ("kvm", "kvm_exit") => Some(Self::Exit),
            ("sched", "sched_switch") => {
                Some(Self::Switch { from: format.field("prev_pid")?.clone(), to: format.field("next_pid")?.clone() })
            }
            _ => Reading::of_host(format).map(Self::Cause),
        }
    }
}

/// An event's kind and who did it.
#[derive(Debug)]
struct Decoder {
    kind: Kind,
    pid: Field,
}

impl Host {
    /// Reads a host's file. `threads`: those of vCPUs, as far as they are known before.
    ///
    /// # Errors
    /// A page cannot be read or is broken; options that make no sense.
    pub fn read<S: Source>(reader: &Reader<S>, threads: &[u32]) -> Result<Self, CheckError> {
        let stamps = Stamps::of(reader.options(), reader.other_options())?;
        let formats = Formats::of(reader.metadata());
        let decoder = |format: &EventFormat| {
            Some((format.id, Decoder { kind: Kind::of(format)?, pid: format.field("common_pid")?.clone() }))
        };
        let decoders: HashMap<u16, Decoder> = formats.each().filter_map(decoder).collect();
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

    fn take(&mut self, event: &Merged<'_>, decoders: &HashMap<u16, Decoder>) {
        if let Some(since) = event.lost_since {
            self.gaps.push(since, event.time);
        }
        let Some(decoder) = id(event.data).and_then(|id| decoders.get(&id)) else { return };
        let Some(thread) = decoder.pid.small(event.data) else { return };
        match &decoder.kind {
            Kind::Entry { vcpu } => {
                if let Some(vcpu) = vcpu.as_ref().and_then(|field| field.small(event.data)) {
                    self.vcpu_ids.insert(thread, vcpu);
                }
                if self.has_room() {
                    self.runs.entry(thread).or_default().push(event.time, true);
                }
            }
            Kind::Exit if self.has_room() => self.runs.entry(thread).or_default().push(event.time, false),
            Kind::Exit => {}
            Kind::Switch { from, to } => {
                self.switch(from.small(event.data), event.time, false);
                self.switch(to.small(event.data), event.time, true);
            }
            Kind::Cause(reading) => {
                if let Some(cause) = reading.read(event.data) {
                    self.causes.push(thread, cause, event.time);
                }
            }
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
