//! The clock of a guest in its file: a section of our own ([`id::SEGMENTS`]) that no option points to.
//!
//! In:    [`Segments`]: the histories of all vCPUs, and what was made of them for readers that do not know this section
//! Out:   its payload, and back
//! Runs:  anywhere
//! Full:  more segments than [`SEGMENTS_MAX`] are refused; of more than [`RUNS_MAX`] runs a vCPU's are left out: times
//!        near a step back are less sure then
//! Trust: files come from anyone: counts are bounded, histories must be in order
//!
//! With it nothing is lost where pages were rewritten: forward arithmetic gives each event its guest time again, to the
//! cycle, but for events whose time had stood still.
//!
//! ```text
//! u32 version 2 · u32 shown · u64 since · u32 vCPUs · u32 0
//! each vCPU: u32 CPU · u32 segments · each: u64 from low · u64 from high · u64 offset · u64 ratio (0: 1) · u64 fraction bits
//! u64 uncertainties · each: u32 CPU · u32 0 · u64 events · u64 first · u64 last · u64 error
//! pending only, each vCPU again: u64 runs · u64 stretches in which all are known · each: u64 low · u64 high
//! ```

use std::num::NonZeroU64;

use vtrace_common::{ids::Cpu, limits::CPUS_MAX, time::HostTsc};

use super::{
    layout::{SEGMENTS_BYTES_MAX, id},
    uncertainty::{UNCERTAINTIES_MAX, Uncertainty},
};
use crate::{
    clock::{
        math::{HostRange, Pair},
        ratio::Ratio,
        segment::{History, Runs, SEGMENTS_MAX, Segment},
        table::Table,
    },
    trace::read::input::{Input, ReadFault, Source},
};

const VERSION: u32 = 2;
const HEAD_BYTES: usize = 4 * 4 + 8;
const VCPU_BYTES: usize = 8;
const SEGMENT_BYTES: usize = 5 * 8;
/// Runs of all vCPUs, and stretches in which they are known: enough for thousands of steps back.
const RUNS_MAX: usize = 1 << 16;
const RUN_BYTES: usize = 2 * 8;

/// What the times in the pages are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shown {
    /// The guest's; a TIME_SHIFT turns them into the host's.
    Shifted,
    /// The host's.
    Rewritten,
    /// The guest's, and left so.
    Raw,
    /// Some lanes' are the host's, some the guest's: they could not all be rewritten.
    Mixed,
    /// The guest's, to become the host's: of a file that was not finished ([`crate::trace::write::host_lanes`]).
    Pending,
}

/// What a file knows of its guest's clock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segments {
    /// What the times in the pages are.
    pub shown: Shown,
    /// The clock.
    pub table: Table,
    /// Of rewritten pages: which times are not exact.
    pub uncertainties: Vec<Uncertainty>,
}

impl Segments {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let short = |count: usize| u32::try_from(count).expect("bounded by SEGMENTS_MAX");
        let histories: Vec<&History> = self.table.histories().collect();
        let mut out = Vec::new();
        out.extend(VERSION.to_le_bytes());
        out.extend(self.shown.code().to_le_bytes());
        out.extend(self.table.since().0.to_le_bytes());
        out.extend(short(histories.len()).to_le_bytes());
        out.extend(0u32.to_le_bytes());
        for history in histories {
            out.extend(history.cpu().0.to_le_bytes());
            out.extend(short(history.segments().len()).to_le_bytes());
            for Segment { from, pair } in history.segments() {
                let (raw, fraction_bits) = pair.ratio.map_or((0, 0), |ratio| (ratio.raw.get(), ratio.fraction_bits));
                for word in [from.low.0, from.high.0, pair.offset, raw, u64::from(fraction_bits)] {
                    out.extend(word.to_le_bytes());
                }
            }
        }
        let uncertainties = &self.uncertainties[..self.uncertainties.len().min(UNCERTAINTIES_MAX)];
        out.extend(u64::from(short(uncertainties.len())).to_le_bytes());
        for Uncertainty { cpu, events, first, last, error } in uncertainties {
            out.extend([u64::from(cpu.0), *events, first.0, last.0, *error].map(u64::to_le_bytes).concat());
        }
        if self.shown == Shown::Pending {
            self.push_runs(&mut out);
        }
        out
    }

    fn push_runs(&self, out: &mut Vec<u8>) {
        let mut left = RUNS_MAX;
        for history in self.table.histories() {
            let parts = self.table.runs(history.cpu()).map(Runs::parts).unwrap_or_default();
            let rest = left.checked_sub(parts[0].len() + parts[1].len());
            let parts = if rest.is_some() { parts } else { Default::default() };
            left = rest.unwrap_or(left);
            parts.iter().for_each(|part| out.extend(u64::try_from(part.len()).expect("bounded").to_le_bytes()));
            for range in parts.concat() {
                out.extend([range.low.0.to_le_bytes(), range.high.0.to_le_bytes()].concat());
            }
        }
    }

    /// Reads the payload.
    ///
    /// # Errors
    /// See [`ReadFault`].
    pub fn read<S: Source + ?Sized>(input: &mut Input<'_, S>) -> Result<Self, ReadFault> {
        let offset = input.at();
        let nonsense = || ReadFault::Nonsense { what: "list of segments", offset };
        if input.u32("version of segments")? != VERSION {
            return Err(nonsense());
        }
        let shown = Shown::from_code(input.u32("kind of times")?).ok_or_else(nonsense)?;
        let since = HostTsc(input.u64("begin of segments")?);
        let count = input.u32("number of vCPUs")?;
        input.u32("segments")?;
        if usize::try_from(count).map_or(true, |count| count > CPUS_MAX) {
            return Err(nonsense());
        }
        let (mut histories, mut left): (Vec<History>, usize) = (Vec::new(), SEGMENTS_MAX);
        for _ in 0..count {
            let history = read_history(input, &mut left)?.ok_or_else(nonsense)?;
            if histories.iter().any(|other| other.cpu() == history.cpu()) {
                return Err(nonsense());
            }
            histories.push(history);
        }
        let uncertainties = read_uncertainties(input)?.ok_or_else(nonsense)?;
        let cpus: Vec<Cpu> = histories.iter().map(History::cpu).collect();
        let mut table = Table::from_histories(since, histories).ok_or_else(nonsense)?;
        if shown == Shown::Pending {
            let mut left = RUNS_MAX;
            for cpu in cpus {
                let parts = read_runs(input, &mut left)?.ok_or_else(nonsense)?;
                if !parts[1].is_empty() {
                    let [runs, known] = parts;
                    table.learn(cpu, Runs::new(runs, known));
                }
            }
        }
        Ok(Self { shown, table, uncertainties })
    }
}

fn read_history<S: Source + ?Sized>(input: &mut Input<'_, S>, left: &mut usize) -> Result<Option<History>, ReadFault> {
    let cpu = Cpu(input.u32("vCPU of segments")?);
    let count = input.u32("number of segments")?;
    let Some(rest) = usize::try_from(count).ok().and_then(|count| left.checked_sub(count)) else { return Ok(None) };
    *left = rest;
    let mut segments = Vec::new();
    for _ in 0..count {
        let from = HostRange { low: HostTsc(input.u64("segment")?), high: HostTsc(input.u64("segment")?) };
        let (offset, raw, fraction_bits) = (input.u64("segment")?, input.u64("segment")?, input.u64("segment")?);
        let Some(ratio) = read_ratio(raw, fraction_bits) else { return Ok(None) };
        segments.push(Segment { from, pair: Pair { offset, ratio } });
    }
    Ok(History::from_segments(cpu, segments))
}

fn read_uncertainties<S: Source + ?Sized>(input: &mut Input<'_, S>) -> Result<Option<Vec<Uncertainty>>, ReadFault> {
    let count = input.u64("number of uncertainties")?;
    if usize::try_from(count).map_or(true, |count| count > UNCERTAINTIES_MAX) {
        return Ok(None);
    }
    let mut uncertainties = Vec::new();
    for _ in 0..count {
        let cpu = Cpu(input.u32("CPU of a uncertainty")?);
        input.u32("uncertainty")?;
        let [events, first, last, error] = [
            input.u64("uncertainty")?,
            input.u64("uncertainty")?,
            input.u64("uncertainty")?,
            input.u64("uncertainty")?,
        ];
        uncertainties.push(Uncertainty { cpu, events, first: HostTsc(first), last: HostTsc(last), error });
    }
    Ok(Some(uncertainties))
}

fn read_runs<S: Source + ?Sized>(
    input: &mut Input<'_, S>,
    left: &mut usize,
) -> Result<Option<[Vec<HostRange>; 2]>, ReadFault> {
    let counts = [input.u64("number of runs")?, input.u64("number of runs")?];
    let mut parts = [Vec::new(), Vec::new()];
    for (part, count) in parts.iter_mut().zip(counts) {
        let Some(rest) = usize::try_from(count).ok().and_then(|count| left.checked_sub(count)) else { return Ok(None) };
        *left = rest;
        for _ in 0..count {
            part.push(HostRange { low: HostTsc(input.u64("run")?), high: HostTsc(input.u64("run")?) });
        }
    }
    Ok(Some(parts))
}

/// `Some(None)`: the host's rate.
fn read_ratio(raw: u64, fraction_bits: u64) -> Option<Option<Ratio>> {
    let Some(raw) = NonZeroU64::new(raw) else { return (fraction_bits == 0).then_some(None) };
    let fraction_bits = u32::try_from(fraction_bits).ok().filter(|bits| matches!(bits, 32 | 48))?;
    Some(Some(Ratio { raw, fraction_bits }))
}

impl Shown {
    fn code(self) -> u32 {
        match self {
            Self::Shifted => 0,
            Self::Rewritten => 1,
            Self::Raw => 2,
            Self::Mixed => 3,
            Self::Pending => 4,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        let all = [Self::Shifted, Self::Rewritten, Self::Raw, Self::Mixed, Self::Pending];
        all.into_iter().find(|shown| shown.code() == code)
    }
}

const _: () = {
    let runs = CPUS_MAX * 2 * 8 + RUNS_MAX * RUN_BYTES + 8 + UNCERTAINTIES_MAX * 5 * 8;
    assert!(HEAD_BYTES + CPUS_MAX * VCPU_BYTES + SEGMENTS_MAX * SEGMENT_BYTES + runs <= SEGMENTS_BYTES_MAX);
    assert!(id::SEGMENTS & 1 << 14 != 0, "above all ids of stock options");
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_history(cpu: u32) -> impl Strategy<Value = History> {
        let ratio = (any::<u64>(), any::<bool>()).prop_map(|(raw, vmx)| {
            NonZeroU64::new(raw / 2).map(|raw| Ratio { raw, fraction_bits: if vmx { 48 } else { 32 } })
        });
        let segment = (0..1u64 << 40, 0..1u64 << 20, any::<u64>(), ratio);
        prop::collection::vec(segment, 1..6).prop_map(move |list| {
            let mut at = 0;
            let segments = list.into_iter().map(|(gap, width, offset, ratio)| {
                let from = HostRange { low: HostTsc(at + gap), high: HostTsc(at + gap + width) };
                at = from.high.0;
                Segment { from, pair: Pair { offset, ratio } }
            });
            History::from_segments(Cpu(cpu), segments.collect()).unwrap()
        })
    }

    fn any_runs() -> impl Strategy<Value = Runs> {
        let range = (0..1u64 << 40, 0..1u64 << 20);
        let range = range.prop_map(|(low, width)| HostRange { low: HostTsc(low), high: HostTsc(low + width) });
        let ranges = |least| prop::collection::vec(range.clone(), least..6);
        (ranges(0), ranges(1)).prop_map(|(runs, known)| Runs::new(runs, known))
    }

    fn any_segments() -> impl Strategy<Value = Segments> {
        let shown = prop::sample::select(vec![Shown::Shifted, Shown::Rewritten, Shown::Raw, Shown::Pending]);
        let histories = (any_history(0), any_history(3), any_history(4095));
        (shown, 0..1u64 << 60, histories, any_runs()).prop_map(|(shown, since, (a, b, c), runs)| {
            let mut table = Table::from_histories(HostTsc(since), vec![a, b, c]).unwrap();
            if shown == Shown::Pending {
                table.learn(Cpu(3), runs);
            }
            let uncertainty = Uncertainty { cpu: Cpu(3), events: 2, first: HostTsc(5), last: HostTsc(9), error: 77 };
            Segments { shown, table, uncertainties: vec![uncertainty; usize::from(shown == Shown::Rewritten)] }
        })
    }

    fn read(bytes: &[u8]) -> Result<Segments, ReadFault> {
        Segments::read(&mut Input::new(&bytes, 0, u64::MAX))
    }

    #[test]
    fn history_that_runs_backwards_is_refused() {
        let segment = |from| Segment { from: HostRange::at(HostTsc(from)), pair: Pair { offset: 0, ratio: None } };
        assert!(History::from_segments(Cpu(0), vec![segment(5), segment(4)]).is_none());
        assert!(History::from_segments(Cpu(0), vec![]).is_none());
    }

    proptest! {
        #[test]
        fn payload_says_what_was_put_in(segments in any_segments()) {
            prop_assert_eq!(read(&segments.encode()).unwrap(), segments);
        }

        #[test]
        fn any_payload_gives_an_answer(bytes: Vec<u8>) {
            let _ = read(&bytes);
        }

        #[test]
        fn payload_with_changed_bytes_gives_an_answer_that_can_be_asked(
            segments in any_segments(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), guest: u64,
        ) {
            let mut bytes = segments.encode();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(segments) = read(&bytes) {
                let near = segments.table.since();
                let _ = segments.table.to_host(Cpu(0), vtrace_common::time::GuestTsc(guest), near);
                let _ = segments.table.runs_wanted(Cpu(3));
            }
        }
    }
}
