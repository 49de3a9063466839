//! Options of a trace.dat: ids and payloads.
//!
//! In:    [`TraceOption`], or the payload of an option
//! Out:   the payload; a [`TraceOption`] where it says exactly the same
//! Trust: payloads come from files of anyone

use vtrace_common::{ids::Cpu, limits::CPUS_MAX};

use super::{
    layout::{INTERPOLATE, OPTION_HEADER_BYTES, id},
    section::bytes_of,
    segments::Segments,
};
use crate::{
    clock::shift::{ShiftSample, TimeShift},
    trace::read::input::{Input, ReadFault},
};

/// One option.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TraceOption {
    /// What stock readers add to every time, µs since 1970 at time 0, as `0x` and hexadecimal digits (id 1).
    Date(String),
    /// per_cpu stats as text, one per CPU (id 2).
    CpuStat(String),
    /// trace_clock, the chosen one in brackets (id 4).
    TraceClock(String),
    /// "Linux node release machine" (id 5).
    Uname(String),
    /// CPUs of the machine (id 8); KernelShark needs it.
    CpuCount(u32),
    /// The writing program (id 9).
    Version(String),
    /// Session id of this file's machine (id 11).
    TraceId(u64),
    /// Guest ⇒ host (id 12).
    TimeShift(TimeShift),
    /// In the host's file: a guest and the threads of its vCPUs (id 13).
    Guest {
        /// Its name.
        name: String,
        /// The trace id of its file.
        trace_id: u64,
        /// vCPU and host thread.
        vcpus: Vec<(Cpu, u32)>,
    },
    /// TSC ⇒ ns (id 14).
    Tsc2Nsec {
        /// ns = tsc × mult >> shift
        mult: u32,
        /// See mult.
        shift: u32,
    },
    /// The guest's clock. Not an option but a section of its own: stock readers complain of options they do not know, and
    /// pass over sections ([`super::segments`]).
    Segments(Segments),
}

/// Why an option cannot be written.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OptionFault {
    /// Stock readers take a NUL for the end of a text.
    #[error("the text of option {0} has a NUL in it")]
    Nul(u16),
    /// Stock readers compute garbage for a CPU without a sample.
    #[error("CPU {0} has no time shift")]
    NoSample(usize),
    /// More CPUs than a machine has, or the same twice.
    #[error("option {0} names too many CPUs, or one twice")]
    Cpus(u16),
    /// Longer than an option can say.
    #[error("option {0} is too long")]
    TooLong(u16),
}

impl TraceOption {
    /// Its id in the file.
    pub fn id(&self) -> u16 {
        match self {
            Self::Date(_) => id::DATE,
            Self::CpuStat(_) => id::CPUSTAT,
            Self::TraceClock(_) => id::TRACECLOCK,
            Self::Uname(_) => id::UNAME,
            Self::CpuCount(_) => id::CPUCOUNT,
            Self::Version(_) => id::VERSION,
            Self::TraceId(_) => id::TRACEID,
            Self::TimeShift(_) => id::TIME_SHIFT,
            Self::Guest { .. } => id::GUEST,
            Self::Tsc2Nsec { .. } => id::TSC2NSEC,
            Self::Segments(_) => id::SEGMENTS,
        }
    }

    /// The payload.
    pub fn encode(&self) -> Result<Vec<u8>, OptionFault> {
        let mut out = Vec::new();
        match self {
            Self::Date(text)
            | Self::CpuStat(text)
            | Self::TraceClock(text)
            | Self::Uname(text)
            | Self::Version(text) => {
                push_text(&mut out, text, self.id())?;
            }
            Self::CpuCount(count) => out.extend(count.to_le_bytes()),
            Self::TraceId(trace_id) => out.extend(trace_id.to_le_bytes()),
            Self::TimeShift(shift) => shift.encode(&mut out)?,
            Self::Guest { name, trace_id, vcpus } => {
                push_text(&mut out, name, id::GUEST)?;
                out.extend(trace_id.to_le_bytes());
                push_vcpus(&mut out, vcpus)?;
            }
            Self::Tsc2Nsec { mult, shift } => {
                out.extend(mult.to_le_bytes());
                out.extend(shift.to_le_bytes());
                out.extend(0u64.to_le_bytes()); // offset: stock writes 0 and does not read it
            }
            Self::Segments(segments) => out = segments.encode(),
        }
        Ok(out)
    }

    /// What a payload says. `None`: an option of an unknown kind, or one that says more than [`TraceOption`] can (a
    /// scaled time shift).
    pub fn parse(id: u16, payload: &[u8]) -> Result<Option<Self>, ReadFault> {
        let mut input = Input::new(&payload, 0, bytes_of(payload));
        Ok(Some(match id {
            id::DATE => Self::Date(read_text(payload)),
            id::CPUSTAT => Self::CpuStat(read_text(payload)),
            id::TRACECLOCK => Self::TraceClock(read_text(payload)),
            id::UNAME => Self::Uname(read_text(payload)),
            id::VERSION => Self::Version(read_text(payload)),
            id::CPUCOUNT => Self::CpuCount(input.u32("CPU count")?),
            id::TRACEID => Self::TraceId(input.u64("trace id")?),
            id::TIME_SHIFT => return Ok(TimeShift::parse(&mut input)?.map(Self::TimeShift)),
            id::GUEST => {
                let name = input.text(payload.len(), "name of a guest")?;
                let trace_id = input.u64("trace id of a guest")?;
                Self::Guest { name: read_text(&name), trace_id, vcpus: read_vcpus(&mut input)? }
            }
            id::TSC2NSEC => Self::Tsc2Nsec { mult: input.u32("multiplier")?, shift: input.u32("shift")? },
            _ => return Ok(None),
        }))
    }
}

/// Appends an option: id, length, payload.
pub(crate) fn push(out: &mut Vec<u8>, id: u16, payload: &[u8]) -> Result<(), OptionFault> {
    let bytes = u32::try_from(payload.len()).map_err(|_| OptionFault::TooLong(id))?;
    let mut header = [0; OPTION_HEADER_BYTES];
    header[..2].copy_from_slice(&id.to_le_bytes());
    header[2..].copy_from_slice(&bytes.to_le_bytes());
    out.extend(header);
    out.extend(payload);
    Ok(())
}

fn push_text(out: &mut Vec<u8>, text: &str, id: u16) -> Result<(), OptionFault> {
    if text.contains('\0') {
        return Err(OptionFault::Nul(id));
    }
    out.extend(text.as_bytes());
    out.push(0);
    Ok(())
}

fn read_text(payload: &[u8]) -> String {
    let end = payload.iter().position(|byte| *byte == 0).unwrap_or(payload.len());
    String::from_utf8_lossy(&payload[..end]).into_owned()
}

/// A stock reader refuses a vCPU whose number is not below their count: missing ones get thread 0.
fn push_vcpus(out: &mut Vec<u8>, vcpus: &[(Cpu, u32)]) -> Result<(), OptionFault> {
    let count = vcpus.iter().map(|(cpu, _)| u64::from(cpu.0) + 1).max().unwrap_or(0);
    let count = usize::try_from(count).ok().filter(|count| *count <= CPUS_MAX).ok_or(OptionFault::Cpus(id::GUEST))?;
    let mut threads = vec![None; count];
    for (cpu, thread) in vcpus {
        let slot = usize::try_from(cpu.0).ok().and_then(|cpu| threads.get_mut(cpu));
        if slot.expect("counted above").replace(*thread).is_some() {
            return Err(OptionFault::Cpus(id::GUEST));
        }
    }
    out.extend(u32::try_from(count).map_err(|_| OptionFault::Cpus(id::GUEST))?.to_le_bytes());
    for (cpu, thread) in (0u32..).zip(threads) {
        out.extend(cpu.to_le_bytes());
        out.extend(thread.unwrap_or(0).to_le_bytes());
    }
    Ok(())
}

fn read_vcpus(input: &mut Input<'_, &[u8]>) -> Result<Vec<(Cpu, u32)>, ReadFault> {
    let count = read_cpu_count(input)?;
    let mut vcpus = Vec::new();
    for _ in 0..count {
        vcpus.push((Cpu(input.u32("vCPU")?), input.u32("thread of a vCPU")?));
    }
    Ok(vcpus)
}

fn read_cpu_count(input: &mut Input<'_, &[u8]>) -> Result<u32, ReadFault> {
    let offset = input.at();
    let count = input.u32("number of CPUs")?;
    let max = u64::try_from(CPUS_MAX).unwrap_or(u64::MAX);
    if u64::from(count) > max {
        let count = u64::from(count);
        return Err(ReadFault::TooLarge { what: "list of CPUs", offset, count, count_max: max });
    }
    Ok(count)
}

impl TimeShift {
    /// u64 peer, u32 flags, u32 CPUs; each CPU: u32 count, times, offsets, scalings; then each CPU's fraction bits.
    /// The scaling is 1 and the fraction 0: stock readers get others wrong.
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), OptionFault> {
        if self.cpus.len() > CPUS_MAX {
            return Err(OptionFault::Cpus(id::TIME_SHIFT));
        }
        if let Some(cpu) = self.cpus.iter().position(Vec::is_empty) {
            return Err(OptionFault::NoSample(cpu));
        }
        let flags = if self.interpolate { INTERPOLATE } else { 0 };
        out.extend(self.peer.to_le_bytes());
        out.extend(flags.to_le_bytes());
        out.extend(short(self.cpus.len())?.to_le_bytes());
        for samples in &self.cpus {
            out.extend(short(samples.len())?.to_le_bytes());
            samples.iter().for_each(|sample| out.extend(sample.time.to_le_bytes()));
            samples.iter().for_each(|sample| out.extend(sample.offset.to_le_bytes()));
            samples.iter().for_each(|_| out.extend(1u64.to_le_bytes()));
        }
        self.cpus.iter().flatten().for_each(|_| out.extend(0u64.to_le_bytes()));
        Ok(())
    }

    fn parse(input: &mut Input<'_, &[u8]>) -> Result<Option<Self>, ReadFault> {
        let peer = input.u64("peer of a time shift")?;
        let flags = input.u32("flags of a time shift")?;
        let count = read_cpu_count(input)?;
        let mut cpus = Vec::new();
        let mut plain = flags & !INTERPOLATE == 0;
        for _ in 0..count {
            let samples = input.u32("number of samples")?;
            let times = longs(input, samples)?;
            let offsets = longs(input, samples)?;
            plain &= longs(input, samples)?.iter().all(|scaling| i64::from_le_bytes(*scaling) == 1);
            let sample =
                |(time, offset)| ShiftSample { time: u64::from_le_bytes(time), offset: i64::from_le_bytes(offset) };
            cpus.push(times.into_iter().zip(offsets).map(sample).collect::<Vec<_>>());
        }
        if input.left() > 0 {
            for samples in &cpus {
                let fractions = longs(input, u32::try_from(samples.len()).unwrap_or(u32::MAX))?;
                plain &= fractions.iter().all(|fraction| u64::from_le_bytes(*fraction) == 0);
            }
        }
        Ok(plain.then_some(Self { peer, interpolate: flags & INTERPOLATE != 0, cpus }))
    }
}

fn short(count: usize) -> Result<u32, OptionFault> {
    u32::try_from(count).map_err(|_| OptionFault::TooLong(id::TIME_SHIFT))
}

fn longs(input: &mut Input<'_, &[u8]>, count: u32) -> Result<Vec<[u8; 8]>, ReadFault> {
    let bytes = input.bytes(u64::from(count) * 8, usize::MAX, "samples of a time shift")?;
    Ok(bytes.as_chunks::<8>().0.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_option() -> impl Strategy<Value = TraceOption> {
        let text = "[a-z \\[\\]\n]{0,30}";
        let sample = (any::<u64>(), any::<i64>()).prop_map(|(time, offset)| ShiftSample { time, offset });
        let cpus = prop::collection::vec(prop::collection::vec(sample, 1..5), 0..5);
        prop_oneof![
            text.prop_map(TraceOption::Date),
            text.prop_map(TraceOption::CpuStat),
            text.prop_map(TraceOption::TraceClock),
            text.prop_map(TraceOption::Uname),
            text.prop_map(TraceOption::Version),
            any::<u32>().prop_map(TraceOption::CpuCount),
            any::<u64>().prop_map(TraceOption::TraceId),
            (any::<u64>(), any::<bool>(), cpus)
                .prop_map(|(peer, interpolate, cpus)| TraceOption::TimeShift(TimeShift { peer, interpolate, cpus })),
            (text, any::<u64>(), prop::collection::vec(any::<u32>(), 0..6)).prop_map(|(name, trace_id, threads)| {
                TraceOption::Guest { name, trace_id, vcpus: (0u32..).map(Cpu).zip(threads).collect() }
            }),
            (any::<u32>(), any::<u32>()).prop_map(|(mult, shift)| TraceOption::Tsc2Nsec { mult, shift }),
        ]
    }

    #[test]
    fn time_shift_lies_as_the_format_says() {
        let cpus = vec![vec![ShiftSample { time: 7, offset: -1 }, ShiftSample { time: 9, offset: 3 }]];
        let payload = TraceOption::TimeShift(TimeShift { peer: 0x1111, interpolate: true, cpus }).encode().unwrap();
        let words: Vec<u64> = vec![7, 9, u64::MAX, 3, 1, 1, 0, 0];
        let mut expected = [0x1111u64.to_le_bytes().as_slice(), &1u32.to_le_bytes(), &1u32.to_le_bytes()].concat();
        expected.extend(2u32.to_le_bytes());
        words.iter().for_each(|word| expected.extend(word.to_le_bytes()));
        assert_eq!(payload, expected);
    }

    #[test]
    fn guest_with_a_hole_counts_up_to_its_last_cpu() {
        let vcpus = vec![(Cpu(2), 30), (Cpu(0), 10)];
        let guest = TraceOption::Guest { name: "g".to_owned(), trace_id: 1, vcpus };
        let back = TraceOption::parse(id::GUEST, &guest.encode().unwrap()).unwrap().unwrap();
        let full = vec![(Cpu(0), 10), (Cpu(1), 0), (Cpu(2), 30)];
        assert_eq!(back, TraceOption::Guest { name: "g".to_owned(), trace_id: 1, vcpus: full });
    }

    #[test]
    fn cpu_without_a_sample_is_refused() {
        let shift =
            TimeShift { peer: 0, interpolate: false, cpus: vec![vec![ShiftSample { time: 0, offset: 0 }], vec![]] };
        assert_eq!(TraceOption::TimeShift(shift).encode(), Err(OptionFault::NoSample(1)));
    }

    #[test]
    fn scaled_time_shift_is_not_taken_for_a_plain_one() {
        let cpus = vec![vec![ShiftSample { time: 7, offset: 1 }]];
        let mut payload = TraceOption::TimeShift(TimeShift { peer: 0, interpolate: false, cpus }).encode().unwrap();
        let scaling = 16 + 4 + 16;
        payload[scaling] = 2;
        assert_eq!(TraceOption::parse(id::TIME_SHIFT, &payload).unwrap(), None);
    }

    #[test]
    fn text_with_a_nul_is_refused() {
        assert_eq!(TraceOption::Uname("a\0b".to_owned()).encode(), Err(OptionFault::Nul(id::UNAME)));
    }

    proptest! {
        #[test]
        fn option_says_what_was_put_in(option in any_option()) {
            let payload = option.encode().unwrap();
            prop_assert_eq!(TraceOption::parse(option.id(), &payload).unwrap(), Some(option));
        }

        #[test]
        fn any_payload_gives_an_answer(id in 0u16..30, payload: Vec<u8>) {
            let _ = TraceOption::parse(id, &payload);
        }

        #[test]
        fn payload_with_a_changed_byte_gives_an_answer(option in any_option(), at: prop::sample::Index, byte: u8) {
            let mut payload = option.encode().unwrap();
            if !payload.is_empty() {
                let at = at.index(payload.len());
                payload[at] = byte;
            }
            let _ = TraceOption::parse(option.id(), &payload);
        }
    }
}
