//! Guest time to host time, pages rewritten by it, and what it costs to hear of a guest's clock.
//!
//! In:    times of a guest at two thirds of the host's rate; a lane of 64 MiB of its pages in a memory file; a vCPU
//! Out:   ns a hit of the program at kvm_entry beside one that does nothing, by the kernel's statistics, and what that makes
//!        of a CPU at 100 000 exits/s. Where KVM does not call kvm_entry no exits can be counted: the kernel runs the
//!        program itself (BPF_PROG_TEST_RUN), with a real vCPU and from the cache; the dispatch of the tracepoint, which any
//!        listener costs, is not in it. ns a conversion beside one at the host's rate; GB/s of rewriting beside copying the same pages, through the same calls
//!        For the same at a tracepoint that is called, under load: [`load`]
//! Runs:  on this thread; as root, with /dev/kvm

pub(super) mod load;

use std::{fs::File, hint::black_box, os::unix::fs::FileExt, time::Instant};

use anyhow::{Context, Result, ensure};
use kvm_ioctls::Kvm;
use vtrace_common::{
    ids::Cpu,
    kvm::VcpuState,
    time::{GuestTsc, HostTsc},
};
use vtrace_dp::{
    clock::{
        btf::find_here,
        feed::{Feed, Watched},
        math::Pair,
        ratio::{Isa, Ratio},
        table::Table,
        testing::{Change, Life, Story},
    },
    trace::{format::areas::Extent, write::host_times::rewrite},
    virtq::testing::memory_file,
};

use super::alternately;
use crate::row::Row;
use load::Amount;

/// Runs of the program at kvm_entry.
const HITS: u32 = 200_000;
const EXITS_PER_S: f64 = 100_000.0;
/// Of the guest under load: ten seconds a round.
const LOAD: Amount = Amount { slices: 10, exits: 200_000, ticks: 30 };
const CONVERSIONS: u32 = 20_000_000;
const PAGE: u32 = 4096;
const BYTES: u64 = 64 << 20;

/// Measures `rounds` pairs.
pub(super) fn run(rounds: u32) -> Result<Vec<Row>> {
    let hits = (0..rounds).map(|round| hits(round, HITS)).collect::<Result<Vec<_>>>()?;
    let loads = (0..rounds).map(|round| load::measure(round, LOAD)).collect::<Result<Vec<_>>>()?;
    Ok([hits.concat(), loads.concat(), measure(rounds, CONVERSIONS, BYTES)?].concat())
}

/// The same with so many conversions, and pages of so many bytes.
pub(super) fn measure(rounds: u32, conversions: u32, bytes: u64) -> Result<Vec<Row>> {
    let ratio = Ratio { raw: ((1u64 << 48) / 3 * 2).try_into()?, fraction_bits: 48 };
    let slower = Pair { offset: 77, ratio: Some(ratio) };
    let life = Life { gap_max: 4000, rest: 40_000_000, ..Life::new(1, vec![Change { after: 0, pair: slower }]) };
    let story = life.live(|_| vec![7; 60]);
    let mut rows = Vec::new();
    for round in 0..rounds {
        let scaled = || Ok(conversion_ns(slower, conversions));
        let same = || Ok(conversion_ns(Pair { ratio: None, ..slower }, conversions));
        let row = Row::new("clock", "conversion", round, "ns", alternately(round, scaled, same)?);
        rows.push(row.beside("at the host's rate"));
        let row = Row::new("clock", "rewrite", round, "GB/s", speeds(round, &life, &story, bytes)?);
        rows.push(row.beside("reading and writing"));
    }
    Ok(rows)
}

/// The program at kvm_entry, for a vCPU whose clock rests.
pub(super) fn hits(round: u32, count: u32) -> Result<Vec<Row>> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm()?;
    let _vcpu = vm.create_vcpu(0)?;
    let mut feed = Feed::load(&find_here()?, false)?;
    feed.watch(Watched::Process(std::process::id()))?;
    let mine = |state: &VcpuState| state.tsc.vmm_pid == std::process::id();
    let vcpu = feed.snapshot()?.into_iter().find(mine).context("the vCPU that was made is not listed")?;
    let costs = feed.measure_entry(vcpu.tsc.vcpu, count)?;
    let told = std::iter::from_fn(|| feed.next_change().transpose()).collect::<Result<Vec<_>, _>>()?;
    let (hits, full) = (feed.hits()?, told.len());
    ensure!((hits.unread, full) == (0, 1), "{hits:?}, {full} changes: it did not do what it does in a recording");
    let each_ns = costs.map(|cost| Ok(f64::from(u32::try_from(cost.busy_ns)?) / f64::from(u32::try_from(cost.runs)?)));
    let [ours, empty]: [Result<f64>; 2] = each_ns;
    let (ours, empty) = (ours?, empty?);
    let entry = Row::new("clock", "kvm_entry, by test run", round, "ns", [ours, empty]).beside("an empty program");
    let share = (ours - empty) * EXITS_PER_S / 1e9 * 100.0;
    let share =
        Row::new("clock", "share of a CPU at 100 000 exits/s", round, "%", [share, 0.0]).beside("an empty program");
    Ok(vec![entry, share])
}

fn conversion_ns(pair: Pair, count: u32) -> f64 {
    let (base, near) = (pair.to_guest(HostTsc(10_000_000_000_000)), HostTsc(10_000_000_000_000));
    let (mut sum, begun) = (0, Instant::now());
    for step in 0..count {
        let guest = GuestTsc(base.0.wrapping_add(u64::from(step) * 37));
        sum ^= pair.to_host(black_box(guest), near).map_or(0, |range| range.middle().0);
    }
    black_box(sum);
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(count)
}

/// GB/s of rewriting, and of reading and writing the same. Each lane is made anew for each.
fn speeds(round: u32, life: &Life, story: &Story, bytes: u64) -> Result<[f64; 2]> {
    let table = Table::build(HostTsc(life.since), Isa::Vmx, story.seen.clone(), &[Cpu(0)])?;
    let length = u64::try_from(story.pages.len())?;
    let lanes = bytes / length + 1;
    let place = |lane: u64| Extent { offset: lane << 32, bytes: length };
    let timed = |one: &dyn Fn(&File, Extent) -> Result<()>| -> Result<f64> {
        let file = memory_file(0)?;
        (0..lanes).try_for_each(|lane| file.write_all_at(&story.pages, place(lane).offset))?;
        let begun = Instant::now();
        (0..lanes).try_for_each(|lane| one(&file, place(lane)))?;
        Ok(f64::from(u32::try_from(length * lanes)?) / 1e9 / begun.elapsed().as_secs_f64())
    };
    let to = |from: Extent| from.offset + (1 << 31);
    let rewritten = |file: &File, from: Extent| {
        let lane = table.lane(Cpu(0)).context("a lane that is known")?;
        rewrite(file, [Extent { bytes: 0, ..from }, from], to(from), PAGE, lane)?;
        Ok(())
    };
    let copied = |file: &File, from: Extent| copy(file, from.offset, to(from), story.pages.len());
    alternately(round, || timed(&rewritten), || timed(&copied))
}

/// Reads and writes a mebibyte at a time.
fn copy(file: &File, from: u64, to: u64, bytes: usize) -> Result<()> {
    let mut chunk = vec![0; 1 << 20];
    for begin in (0..bytes).step_by(chunk.len()) {
        let count = chunk.len().min(bytes - begin);
        let begin = u64::try_from(begin)?;
        file.read_exact_at(&mut chunk[..count], from + begin)?;
        file.write_all_at(&chunk[..count], to + begin)?;
    }
    Ok(())
}
