//! The programs at work in the running kernel. Needs root and /dev/kvm, so that only `--include-ignored` runs it:
//! `cargo xtask test` does, here and (by `cargo xtask lab svm`) on kernels whose KVM calls kvm_entry.

use super::{
    super::{
        btf::find_here,
        math::HostRange,
        ratio::{Isa, Ratio},
        segment::Seen,
        table::{Certainty, Table},
    },
    *,
};
use crate::{bpf::cost::count_times, clock::testing::micro_guest::Micro};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, gettid};
use std::fs;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard};
use vtrace_common::ids::Cpu;
use vtrace_common::kvm::source;
use vtrace_common::time::{GuestTsc, HostTsc};

/// The programs count every vCPU of the system, so that one of these tests runs at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn feed(hooks: &[Hook]) -> (Feed, MutexGuard<'static, ()>) {
    let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut feed = Feed::load(&find_here().unwrap(), false).unwrap();
    for &hook in hooks {
        feed.attach(hook).unwrap();
    }
    (feed, alone)
}

fn me() -> u32 {
    std::process::id()
}

fn changes(feed: &mut Feed) -> Vec<TscChange> {
    std::iter::from_fn(|| feed.next_change().unwrap()).collect()
}

fn state_of(feed: &mut Feed, micro: &Micro) -> VcpuState {
    let all = feed.snapshot().unwrap();
    let mine: Vec<_> = all.into_iter().filter(|vcpu| vcpu.tsc.vmm_pid == me() && vcpu.fd == micro.fd()).collect();
    assert_eq!(mine.len(), 1, "{mine:?}");
    mine[0]
}

/// The guest's TSC at the host's, under one state: what KVM's `kvm_read_l1_tsc` computes.
fn guest_tsc(tsc: TscChange, host: u64) -> u64 {
    let scaled = match Ratio::read(tsc.ratio, Isa::of_this_machine().unwrap()).unwrap() {
        None => host,
        Some(ratio) => {
            let whole = (u128::from(host) * u128::from(ratio.raw.get())) >> ratio.fraction_bits;
            u64::try_from(whole & u128::from(u64::MAX)).unwrap()
        }
    };
    scaled.wrapping_add(tsc.offset)
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn snapshot_lists_each_live_vcpu_once() {
    let (mut feed, _alone) = feed(&[]);
    let (first, second) = (Micro::new(), Micro::with_vcpu(3));
    let twice = first.second_fd();
    let all = feed.snapshot().unwrap();
    let mine: Vec<_> = all.iter().filter(|vcpu| vcpu.tsc.vmm_pid == me()).collect();
    assert_eq!(mine.len(), 2, "{mine:?}");
    assert_eq!(mine.iter().map(|vcpu| vcpu.tsc.vcpu_id).collect::<Vec<_>>(), [0, 3]);
    assert!(mine[0].fd == first.fd() || mine[0].fd == twice.as_raw_fd().cast_unsigned());
    assert_eq!(mine[1].fd, second.fd());
    assert_ne!(mine[0].tsc.kvm, mine[1].tsc.kvm, "two VMs of one process");
    assert!(mine.iter().all(|vcpu| vcpu.tsc.source == source::SNAPSHOT && vcpu.tsc.seen_ns > 0));
    drop((twice, first, second));
    assert!(!feed.snapshot().unwrap().iter().any(|vcpu| vcpu.tsc.vmm_pid == me()));
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn snapshot_knows_exits_and_thread_and_the_guests_own_time() {
    let (mut feed, _alone) = feed(&[]);
    let mut micro = Micro::new();
    assert_eq!(state_of(&mut feed, &micro).tsc.vcpu_tid, 0, "it never ran");
    micro.turn();
    let before = state_of(&mut feed, &micro);
    assert_eq!(before.tsc.vcpu_tid, gettid().as_raw().cast_unsigned());
    micro.read_tsc(100, |host| guest_tsc(before.tsc, host));
    let after = state_of(&mut feed, &micro);
    assert!(after.exits >= before.exits + 100, "{before:?} {after:?}");
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn watched_vcpu_is_told_once_with_its_true_offset() {
    let (mut feed, _alone) = feed(&[Hook::Entry, Hook::Emulate]);
    let mut micro = Micro::new();
    micro.turn();
    assert_eq!(changes(&mut feed), [], "no process is watched yet");
    feed.watch(Watched::Process(me())).unwrap();
    let hits = feed.hits().unwrap();
    let state = state_of(&mut feed, &micro).tsc;
    micro.read_tsc(2000, |host| guest_tsc(state, host));
    let told = changes(&mut feed);
    assert_eq!(told.len(), 1, "{told:?}");
    let told = told[0];
    assert_eq!((told.vcpu, told.kvm, told.vcpu_id), (state.vcpu, state.kvm, 0));
    assert_eq!((told.offset, told.ratio), (state.offset, state.ratio));
    assert_eq!((told.active_offset, told.active_ratio), (state.active_offset, state.active_ratio));
    assert_eq!((told.vmm_pid, told.vcpu_tid), (me(), gettid().as_raw().cast_unsigned()));
    assert!(matches!(told.source, source::ENTRY | source::EMULATE) && told.tsc_protected == 0);
    let now = feed.hits().unwrap();
    assert!(now.entry + now.emulate >= hits.entry + hits.emulate + 2000, "{now:?}");
    assert_eq!((now.full, now.unread), (0, 0));
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn vcpu_that_moves_to_another_cpu_is_not_told_again() {
    let (mut feed, _alone) = feed(&[Hook::Entry, Hook::Emulate]);
    let mut micro = Micro::new();
    feed.watch(Watched::Everyone).unwrap();
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap()).collect();
    for cpu in cpus.iter().cycle().take(3 * cpus.len()) {
        let mut only = CpuSet::new();
        only.set(*cpu).unwrap();
        sched_setaffinity(Pid::from_raw(0), &only).unwrap();
        micro.turn();
    }
    sched_setaffinity(Pid::from_raw(0), &allowed).unwrap();
    assert_eq!(changes(&mut feed).iter().filter(|told| told.vmm_pid == me()).count(), 1);
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn every_change_is_told_by_host_or_guest_where_the_hardware_obeys() {
    let (mut feed, _alone) = feed(&[Hook::Entry, Hook::Emulate]);
    let mut micro = Micro::new();
    feed.watch(Watched::Process(me())).unwrap();
    micro.turn();
    let first = changes(&mut feed).pop().unwrap();
    micro.set_tsc(1 << 50);
    let set = state_of(&mut feed, &micro).tsc;
    micro.read_tsc(10, |host| guest_tsc(set, host));
    let told = changes(&mut feed);
    if set.offset == first.offset {
        // KVM without hardware virtualization: the guest reads the bare host TSC, whatever was asked for.
        assert_eq!((told, set.offset), (vec![], 0));
        return;
    }
    assert_eq!(told.iter().map(|told| told.offset).collect::<Vec<_>>(), [set.offset]);
    micro.adjust(1_000_000);
    let adjusted = changes(&mut feed);
    assert_eq!(adjusted.iter().map(|told| told.offset).collect::<Vec<_>>(), [set.offset.wrapping_add(1_000_000)]);
    assert!(adjusted[0].seen_ns > told[0].seen_ns);
    micro.read_tsc(10, |host| guest_tsc(adjusted[0], host));
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn every_conversion_lies_in_its_run_across_ratios_and_offsets() {
    const READINGS: usize = 1000;
    let (mut feed, _alone) = feed(&[Hook::Entry, Hook::Emulate]);
    let mut micro = Micro::new();
    micro.turn();
    feed.watch(Watched::Process(me())).unwrap();
    let isa = Isa::of_this_machine().unwrap();
    let since = micro.reading()[2];
    let (mut seen, mut stretches) = (Vec::new(), Vec::new());
    let mut read = |feed: &mut Feed, micro: &mut Micro, since| {
        micro.start_reading();
        let readings: Vec<[u64; 3]> = (0..READINGS).map(|_| micro.reading()).collect();
        let at = HostRange { low: HostTsc(since), high: HostTsc(readings[0][0]) };
        seen.extend(changes(feed).iter().map(|told| Seen::new(told, Cpu(0), at)));
        stretches.push(readings);
    };
    read(&mut feed, &mut micro, since);
    let mut ratios = 0;
    for (thousandths, ticks) in [(353, 1 << 40), (571, 1 << 41), (1870, 1 << 43)] {
        let now = micro.reading()[2];
        if micro.set_rate(thousandths) {
            ratios += 1;
            read(&mut feed, &mut micro, now);
        }
        let now = micro.reading()[2];
        micro.set_tsc(ticks);
        read(&mut feed, &mut micro, now);
        let now = micro.reading()[2];
        micro.adjust(1_000_000 + thousandths);
        read(&mut feed, &mut micro, now);
    }
    let table = Table::build(HostTsc(since), isa, seen, &[Cpu(0)]).unwrap();
    let (mut outside, mut twice) = (0, 0);
    for stretch in &stretches {
        for [before, guest, after] in stretch {
            // Values come again when the clock is set back: of those the one nearest to the run's begin is meant.
            let found = table.to_host(Cpu(0), GuestTsc(*guest), HostTsc(*before));
            outside += usize::from(found.is_none_or(|found| !(*before..=*after).contains(&found.at.0)));
            twice += usize::from(found.is_some_and(|found| found.certainty != Certainty::Exact));
        }
    }
    let (all, segments) =
        (stretches.len() * READINGS, table.histories().map(|history| history.segments().len()).sum::<usize>());
    eprintln!(
        "{all} conversions, {segments} segments, {ratios} ratios: {outside} outside their run, {twice} of values that came twice"
    );
    assert_eq!(outside, 0);
    assert!(segments == 1 || segments >= stretches.len(), "{segments} segments of {} stretches", stretches.len());
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn process_that_is_not_watched_is_not_reported() {
    let (mut feed, _alone) = feed(&[Hook::Entry, Hook::Emulate]);
    feed.watch(Watched::Process(1)).unwrap();
    Micro::new().turn();
    assert_eq!(changes(&mut feed), []);
    feed.watch(Watched::Process(me())).unwrap();
    Micro::new().turn();
    assert_eq!(changes(&mut feed).len(), 1);
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn silence_of_kvm_entry_is_noticed_and_its_voice_too() {
    let (mut feed, _alone) = feed(&[Hook::Entry]);
    let mut micro = Micro::new();
    micro.turn();
    let before = feed.pulse().unwrap();
    assert!(!feed.pulse().unwrap().is_silent_since(&before), "nothing ran");
    let hits = feed.hits().unwrap().entry;
    (0..100).for_each(|_| micro.turn());
    let heard = feed.hits().unwrap().entry - hits;
    assert!(heard == 0 || heard >= 100, "{heard}");
    assert_eq!(feed.pulse().unwrap().is_silent_since(&before), heard == 0);
    eprintln!("kvm_entry: {heard} hits in 100 runs");
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn exit_hook_sees_the_vcpu_where_its_arguments_are_known() {
    let (mut feed, _alone) = feed(&[]);
    match feed.attach(Hook::Exit) {
        Err(FeedError::ExitUnknown) => return assert_eq!(find_here().unwrap().exit_argument, None),
        other => other.unwrap(),
    }
    feed.watch(Watched::Process(me())).unwrap();
    let mut micro = Micro::new();
    (0..10).for_each(|_| micro.turn());
    let (hits, told) = (feed.hits().unwrap(), changes(&mut feed));
    assert_eq!(told.len(), usize::from(hits.exit > 0), "{hits:?} {told:?}");
    assert!(told.iter().all(|told| told.vcpu_id == 0 && told.source == source::EXIT));
    assert_eq!(hits.unread, 0);
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn announced_change_stands_in_the_hosts_trace() {
    let instance = format!("/sys/kernel/tracing/instances/vtrace-feed-{}", me());
    let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut feed = Feed::load(&find_here().unwrap(), true).unwrap();
    feed.attach(Hook::Entry).unwrap();
    feed.attach(Hook::Emulate).unwrap();
    feed.watch(Watched::Process(me())).unwrap();
    fs::create_dir(&instance).unwrap();
    fs::write(format!("{instance}/events/bpf_trace/bpf_trace_printk/enable"), "1").unwrap();
    Micro::with_vcpu(5).turn();
    let trace = fs::read_to_string(format!("{instance}/trace")).unwrap();
    fs::write(format!("{instance}/events/bpf_trace/bpf_trace_printk/enable"), "0").unwrap();
    fs::remove_dir(&instance).unwrap();
    let told = changes(&mut feed);
    drop((feed, alone));
    let line = format!("vtrace tsc: vcpu 5 offset {} ratio {:x}", told[0].offset.cast_signed(), told[0].ratio);
    assert_eq!(told.len(), 1);
    assert_eq!(trace.matches(&line).count(), 1, "{trace}");
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn hit_costs_less_than_200_ns_above_a_program_that_does_nothing() {
    let cost = |hook: Option<Hook>| {
        let (mut feed, _alone) = feed(&[]);
        feed.watch(Watched::Process(me())).unwrap();
        match hook {
            Some(hook) => feed.attach(hook).unwrap(),
            None => {
                feed.attach_empty("kvm_emulate_insn").unwrap();
                feed.attach_empty("kvm_entry").unwrap();
            }
        }
        let mut micro = Micro::new();
        let statistics = count_times().unwrap();
        (0..20_000).for_each(|_| micro.turn());
        drop(statistics);
        hook.map_or_else(|| feed.cost_of_empty(), |hook| feed.cost(hook)).unwrap()
    };
    let each_ns = |cost: Cost| cost.busy_ns / u128::from(cost.runs).max(1);
    for hook in [Hook::Entry, Hook::Emulate] {
        let (empty, ours) = (each_ns(cost(None)), cost(Some(hook)));
        eprintln!("{hook:?}: {} ns a hit, empty program {empty} ns, {} hits", each_ns(ours), ours.runs);
        assert!(each_ns(ours) <= empty + 200);
    }
}

#[test]
fn silence_needs_two_exits_of_one_vcpu_and_no_entry() {
    let pulse = |exits: &[(u64, u64)], entries_before, entries_after| Pulse {
        entries_before,
        exits: exits.to_vec(),
        entries_after,
    };
    let before = pulse(&[(1, 10), (2, 20)], 5, 5);
    assert!(pulse(&[(1, 10), (2, 22)], 5, 5).is_silent_since(&before));
    assert!(!pulse(&[(1, 11), (2, 21)], 5, 5).is_silent_since(&before), "both were inside already");
    assert!(!pulse(&[(1, 99), (2, 99)], 6, 6).is_silent_since(&before));
    assert!(!pulse(&[(3, 99)], 5, 5).is_silent_since(&before), "a vCPU that is new");
    assert!(!pulse(&[(1, u64::MAX)], 5, 5).is_silent_since(&before), "exits are not known");
}
