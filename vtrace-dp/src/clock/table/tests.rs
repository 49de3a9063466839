//! Clocks of every kind, converted page by page, beside what is true.

use super::{
    super::{
        math::Pair,
        ratio::Ratio,
        segment::Since,
        testing::{Change, Life, Story},
    },
    *,
};
use crate::ftrace::events::{Event, Events};
use proptest::prelude::*;

const CPU: Cpu = Cpu(0);

fn table(life: &Life, story: &Story, with_runs: bool) -> Table {
    let mut table = Table::build(HostTsc(life.since), Isa::Vmx, story.seen.clone(), &[CPU]).unwrap();
    if with_runs {
        table.learn(CPU, story.runs.clone());
    }
    table
}

/// Converts all pages; gives each event's conversion beside what is true.
fn convert(life: &Life, story: &Story, with_runs: bool) -> Vec<(Conversion, HostTsc)> {
    convert_ahead(life, story, with_runs, true)
}

fn convert_ahead(life: &Life, story: &Story, with_runs: bool, ahead: bool) -> Vec<(Conversion, HostTsc)> {
    let table = table(life, story, with_runs);
    let mut lane = table.lane(CPU).unwrap();
    let pages: Vec<&[u8]> = story.pages.chunks(life.page_bytes).collect();
    if ahead {
        let begin = |page: &&[u8]| GuestTsc(Events::new(page).unwrap().header().time);
        lane.look_ahead((0..).zip(pages.iter().map(begin)).collect::<Vec<_>>().into_iter().rev());
    }
    let (mut all, mut out) = (Vec::new(), Vec::new());
    for (number, page) in pages.iter().enumerate() {
        let events = Events::new(page).unwrap().map(|event| event.unwrap());
        let stamped: Vec<_> = events.map(|Event { time, stamp, .. }| (GuestTsc(time), stamp)).collect();
        let next = pages.get(number + 1).map(|next| GuestTsc(Events::new(next).unwrap().header().time));
        lane.page(&stamped, next, &mut out);
        all.append(&mut out);
    }
    assert_eq!(all.len(), story.truth.len());
    all.into_iter().zip(story.truth.iter().copied()).collect()
}

fn payload(at: HostTsc) -> Vec<u8> {
    [at.0.to_le_bytes(); 6].concat()
}

fn offset(offset: i64) -> Pair {
    Pair { offset: offset.cast_unsigned(), ratio: None }
}

/// So many thousandths of the host's rate.
fn scaled(offset: i64, thousandths: u64) -> Pair {
    let raw = u64::try_from((1u128 << 48) * u128::from(thousandths) / 1000).unwrap();
    Pair { offset: offset.cast_unsigned(), ratio: Some(Ratio { raw: raw.try_into().unwrap(), fraction_bits: 48 }) }
}

fn change(after: u64, pair: Pair) -> Change {
    Change { after, pair }
}

/// Everything that holds of any clock: what is true is possible, what is shown is in order, nothing is foreign.
fn check(converted: &[(Conversion, HostTsc)]) {
    for (conversion, truth) in converted {
        let HostRange { low, high } = conversion.possible;
        assert!(low <= *truth && *truth <= high, "{conversion:?} is not {truth:?}");
        assert_ne!(conversion.certainty, Certainty::Foreign);
    }
    assert!(converted.is_sorted_by_key(|(conversion, _)| conversion.at));
}

fn count(converted: &[(Conversion, HostTsc)], certainty: Certainty) -> usize {
    converted.iter().filter(|(conversion, _)| conversion.certainty == certainty).count()
}

#[test]
fn one_offset_is_exact_for_every_event() {
    for start in [0, -5_000_000_000_000, 77, i64::MAX, i64::MIN] {
        let life = Life::new(3, vec![change(0, offset(start))]);
        let converted = convert(&life, &life.live(payload), false);
        check(&converted);
        assert!(converted.len() > 100 && converted.iter().all(|(conversion, truth)| conversion.at == *truth));
    }
}

#[test]
fn step_forward_is_exact_even_without_runs() {
    let life = Life::new(
        4,
        vec![change(0, offset(0)), change(30_000_000, offset(7_000_000)), change(9_000_000, offset(7_000_001))],
    );
    let converted = convert(&life, &life.live(payload), false);
    check(&converted);
    assert!(converted.iter().all(|(conversion, truth)| conversion.at == *truth), "nothing comes twice");
}

#[test]
fn scaled_clocks_are_within_half_their_resolution() {
    for thousandths in [350, 666, 999, 1001, 1870, 5000] {
        let pairs = [scaled(0, thousandths), scaled(1 << 50, thousandths)];
        let life = Life::new(5, vec![change(0, pairs[0]), change(20_000_000, pairs[1])]);
        let converted = convert(&life, &life.live(payload), true);
        check(&converted);
        let half = pairs[0].resolution() / 2;
        assert!(converted.iter().all(|(conversion, truth)| conversion.at.0.abs_diff(truth.0) <= half));
    }
}

#[test]
fn step_back_leaves_only_trapped_events_unsure_where_runs_are_known() {
    let (mut traps, mut unsure) = (0, 0);
    for seed in 1..60 {
        let changes = [0, 7_000_000, 7_000_000, 4_000_000, -20_000_000, 0, -1_000_000];
        let life = Life::new(seed * 7919, changes.map(|start| change(12_000_000, offset(start))).to_vec());
        let story = life.live(payload);
        let converted = convert(&life, &story, true);
        check(&converted);
        traps += story.traps;
        unsure += count(&converted, Certainty::Unsure);
        let error = converted.iter().map(|(conversion, _)| conversion.error()).max().unwrap();
        assert!(error <= 28_000_000, "no more than the clock went back in all: {error}");
        let exact = converted.iter().filter(|(conversion, _)| conversion.certainty == Certainty::Exact);
        exact.for_each(|(conversion, truth)| assert_eq!(conversion.at, *truth));
    }
    assert!(traps > 50, "there was something to see: {traps}");
    println!("{traps} traps, {unsure} events unsure");
}

#[test]
fn pages_to_come_tell_apart_what_one_page_cannot() {
    let unsure = |ahead: bool| -> usize {
        let unsure = (1..20).map(|seed| {
            // For a while the clock is back where it was long before, and the guest never rests.
            let changes =
                vec![change(0, offset(0)), change(90_000_000, offset(-60_000_000)), change(9_000_000, offset(0))];
            let life = Life { run_max: 50_000_000, pause_max: 9, gap_max: 30_000, ..Life::new(seed * 7919, changes) };
            let converted = convert_ahead(&life, &life.live(payload), true, ahead);
            check(&converted);
            count(&converted, Certainty::Unsure)
        });
        unsure.sum()
    };
    let (with, without) = (unsure(true), unsure(false));
    assert!(without > 1000 && with * 20 < without, "{with} unsure with all pages, {without} with the next one");
}

#[test]
fn runs_narrow_what_a_trap_hides() {
    let width = |with_runs| -> u64 {
        let widths = (1..40).flat_map(|seed| {
            let life = Life::new(seed * 104_729, vec![change(0, offset(0)), change(15_000_000, offset(-9_000_000))]);
            convert(&life, &life.live(payload), with_runs)
        });
        widths
            .filter(|(conversion, _)| conversion.certainty == Certainty::Trapped)
            .map(|(one, _)| one.possible.width())
            .sum()
    };
    let (with, without) = (width(true), width(false));
    assert!(with * 3 < without * 2, "{with} with runs, {without} without");
}

#[test]
fn boundary_that_is_only_bounded_is_said_to_be_unsure() {
    let life = Life::new(9, vec![change(0, offset(0)), change(20_000_000, offset(500))]);
    let mut story = life.live(payload);
    let at = story.seen[1].at.low.0;
    story.seen[1].at = HostRange { low: HostTsc(at - 400_000), high: HostTsc(at + 400_000) };
    let converted = convert(&life, &story, false);
    check(&converted);
    let unsure: Vec<_> = converted.iter().filter(|(one, _)| one.certainty == Certainty::Unsure).collect();
    assert!(!unsure.is_empty());
    assert!(unsure.iter().all(|(one, truth)| truth.0.abs_diff(at) < 401_000 && one.error() == 500));
    assert_eq!(table(&life, &story, false).bound(), 800_000);
}

#[test]
fn state_that_was_missed_makes_events_foreign_and_keeps_their_order() {
    let life = Life::new(11, vec![change(0, offset(0)), change(20_000_000, offset(-9_000_000))]);
    let mut story = life.live(payload);
    story.seen.truncate(1);
    let converted = convert(&life, &story, false);
    assert!(count(&converted, Certainty::Foreign) > 0);
    assert!(converted.is_sorted_by_key(|(conversion, _)| conversion.at));
}

#[test]
fn lane_without_a_vcpu_is_refused_and_a_late_vcpu_is_not() {
    let life = Life::new(1, vec![change(0, offset(0))]);
    let story = life.live(payload);
    let refused = Table::build(HostTsc(0), Isa::Svm, story.seen.clone(), &[CPU, Cpu(1)]);
    assert_eq!(refused, Err(Refusal::NeverSeen(Cpu(1))));
    let late =
        Seen { cpu: Cpu(1), at: HostRange::at(HostTsc(life.since + 50)), since: Since::Reading, ..story.seen[0] };
    let table = Table::build(HostTsc(0), Isa::Svm, [story.seen[0], late], &[CPU, Cpu(1)]).unwrap();
    assert_eq!((table.histories().map(|history| history.segments().len()).sum(), table.bound()), (2, 0));
}

#[test]
fn single_time_is_looked_up_near_its_hint() {
    let life = Life::new(13, vec![change(0, offset(0)), change(20_000_000, offset(-9_000_000))]);
    let table = table(&life, &life.live(payload), false);
    let begun = life.since - 1000 + 20_000_000;
    let twice = GuestTsc(begun - 4_000_000);
    for near in [begun - 4_000_000, begun + 5_000_000] {
        let found = table.to_host(CPU, twice, HostTsc(near)).unwrap();
        assert_eq!((found.at.0, found.certainty), (near, Certainty::Unsure));
    }
    let once = table.to_host(CPU, GuestTsc(begun - 10_000_000), HostTsc(0)).unwrap();
    assert_eq!((once.at.0, once.certainty), (begun - 10_000_000, Certainty::Exact));
    assert_eq!(
        table.runs_wanted(CPU),
        [HostRange { low: HostTsc(begun - 9_000_000), high: HostTsc(begun + 9_000_000) }]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn truth_is_possible_for_any_clock(
        seed: u64, changes in prop::collection::vec((2_000_000u64..30_000_000, -20_000_000i64..20_000_000, prop::sample::select(vec![0u64, 350, 1000, 1870])), 1..8),
        with_runs: bool, step: bool,
    ) {
        // The clock goes on from where it is, give or take a step, as KVM makes it when a ratio changes.
        let mut at = (1u64 << 42) - 1000;
        let mut pair = offset(0);
        let list: Vec<Change> = changes.iter().enumerate().map(|(number, (after, jump, thousandths))| {
            at += if number == 0 { 0 } else { *after };
            let guest = pair.to_guest(HostTsc(at)).0.wrapping_add_signed(if step { *jump } else { 0 });
            let fresh = if *thousandths == 0 { offset(0) } else { scaled(0, *thousandths) };
            pair = Pair { offset: guest.wrapping_sub(fresh.to_guest(HostTsc(at)).0), ..fresh };
            change(*after, pair)
        }).collect();
        let life = Life::new(seed, list);
        check(&convert(&life, &life.live(payload), with_runs));
    }

    #[test]
    fn any_times_have_an_answer(
        events in prop::collection::vec((any::<u64>(), 0..3usize), 0..30), next: Option<u64>, small: bool, seed: u64,
    ) {
        use crate::ftrace::events::TimeEncoding;
        let life = Life::new(seed, vec![change(0, scaled(0, 500)), change(1 << 20, offset(-5)), change(1 << 20, scaled(99, 1500))]);
        let story = life.live(payload);
        for with_runs in [false, true] {
            let table = table(&life, &story, with_runs);
            let mut lane = table.lane(CPU).unwrap();
            let near = |time: u64| GuestTsc(if small { (1 << 42) + time % (1 << 24) } else { time });
            let stamp = |kind: usize| [TimeEncoding::Delta, TimeEncoding::Absolute, TimeEncoding::Stopped][kind];
            let events: Vec<_> = events.iter().map(|(time, kind)| (near(*time), stamp(*kind))).collect();
            let mut out = Vec::new();
            for _ in 0..3 {
                let before = out.last().map(|conversion: &Conversion| conversion.at);
                lane.page(&events, next.map(near), &mut out);
                prop_assert_eq!(out.len(), events.len());
                prop_assert!(out.is_sorted_by_key(|conversion| conversion.at));
                prop_assert!(before <= out.first().map(|conversion| conversion.at));
            }
        }
    }
}
