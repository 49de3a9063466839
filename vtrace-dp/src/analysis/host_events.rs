//! The host's events that matter to vCPUs, decoded.
//!
//! In:    the formats of the host's events; the bytes of an event
//! Out:   the thread and a [`HostAction`]
//! Runs:  pure
//! Trust: nothing: an event that does not fit its format is no action

use std::collections::HashMap;

use super::pairs::{Key, Reading, Rule};
use crate::ftrace::fields::{EventFormat, Field, Formats, id};

/// What a thread did, by an event of the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostAction {
    /// It entered its guest (kvm_entry); the vCPU's id, if the event has it.
    Enter(Option<u32>),
    /// It left its guest (kvm_exit).
    Leave,
    /// A CPU switched from the first thread to the second (sched_switch).
    Switch(Option<u32>, Option<u32>),
    /// It caused or saw something that the guest records too.
    Cause(Rule, Key),
    /// The eBPF program at kvm_entry found a new TSC offset or ratio.
    Announce {
        /// `l1_tsc_offset`
        offset: u64,
        /// `l1_tsc_scaling_ratio`
        ratio: u64,
    },
}

/// How one kind of event is decoded.
#[derive(Debug)]
enum Kind {
    Entry { vcpu: Option<Field> },
    Exit,
    Switch { from: Field, to: Field },
    Cause(Reading),
    Announce { text: Field },
}

impl Kind {
    fn parse(format: &EventFormat) -> Option<Self> {
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

    fn read(&self, event: &[u8]) -> Option<HostAction> {
        Some(match self {
            Self::Entry { vcpu } => HostAction::Enter(vcpu.as_ref().and_then(|field| field.small(event))),
            Self::Exit => HostAction::Leave,
            Self::Switch { from, to } => HostAction::Switch(from.small(event), to.small(event)),
            Self::Cause(reading) => reading.read(event).map(|(rule, key)| HostAction::Cause(rule, key))?,
            Self::Announce { text } => announced(text.contents(event)?)?,
        })
    }
}

/// Parses `vtrace tsc: vcpu 0 offset -77 ratio 100000000`, the line that the eBPF program writes.
fn announced(text: &[u8]) -> Option<HostAction> {
    let text = std::str::from_utf8(text).ok()?.trim_end_matches(['\0', '\n']);
    let mut words = text.strip_prefix("vtrace tsc: vcpu ")?.split(' ');
    let (_, offset, ratio) = (words.next()?, words.nth(1)?, words.nth(1)?);
    let offset: i64 = offset.parse().ok()?;
    Some(HostAction::Announce { offset: offset.cast_unsigned(), ratio: u64::from_str_radix(ratio, 16).ok()? })
}

/// Decodes a host's events by their number.
#[derive(Debug)]
pub struct Decoders {
    kinds: HashMap<u16, (Kind, Field)>,
}

impl Decoders {
    /// For the formats in a host's file. Events that were never recorded have no format there.
    pub fn new(formats: &Formats) -> Self {
        let mut kinds = HashMap::new();
        for format in formats.each() {
            if let (Some(kind), Some(pid)) = (Kind::parse(format), format.field("common_pid")) {
                kinds.insert(format.id, (kind, pid.clone()));
            }
        }
        Self { kinds }
    }

    /// Whether the host's formats include both kvm_entry and kvm_exit.
    pub fn know_runs(&self) -> bool {
        let has = |wanted: fn(&Kind) -> bool| self.kinds.values().any(|(kind, _)| wanted(kind));
        has(|kind| matches!(kind, Kind::Entry { .. })) && has(|kind| matches!(kind, Kind::Exit))
    }

    /// The thread and its action; `None` for every other event. Hot.
    pub fn read(&self, event: &[u8]) -> Option<(u32, HostAction)> {
        let (kind, pid) = self.kinds.get(&id(event)?)?;
        Some((pid.small(event)?, kind.read(event)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announced_change_is_parsed_as_the_program_writes_it() {
        let expected = HostAction::Announce { offset: 77u64.wrapping_neg(), ratio: 1 << 32 };
        assert_eq!(announced(b"vtrace tsc: vcpu 3 offset -77 ratio 100000000\0"), Some(expected));
        let own = HostAction::Announce { offset: 5, ratio: 0 };
        assert_eq!(announced(b"vtrace tsc: vcpu 0 offset 5 ratio 0\n"), Some(own));
        for other in [&b"vtrace tsc: vcpu 0 offset x ratio 0"[..], b"vtrace tsc: vcpu 0 offset 5", b"other", b"\xff"] {
            assert_eq!(announced(other), None);
        }
    }
}
