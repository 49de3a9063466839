//! Claims about one guest's session, whatever its agent says.

use proptest::prelude::*;
use vtrace_common::{
    ids::Cpu,
    ledger::Ledger,
    wire::agent::{FailureKind, Machine},
};

use super::*;
use crate::{
    recorder::{guests::lanes::guest_lanes, summary::LaneSummary},
    tracefs::stats::events_lost,
};

const GUEST: &str = "guest1";

fn passed(pages: u64) -> Ledger {
    Ledger { pages_in: pages, pages_out: pages, bytes_out: pages << 12, ..Ledger::default() }
}

fn agent(answer: FromAgent) -> FromServer {
    FromServer::Agent { guest: GUEST.into(), answer }
}

fn claimed() -> FromServer {
    FromServer::Claimed(Claimed { guest: GUEST.into(), vmm_pid: 7, machine: Machine::default() })
}

fn armed() -> FromServer {
    let clock = "[x86-tsc]".into();
    agent(FromAgent::Armed(Armed { lanes: vec![Cpu(0)], spare: vec![], page_bytes: 4096, clock, events: 3 }))
}

fn running() -> GuestSession {
    let (mut session, _) = GuestSession::new(GUEST, Arm::default());
    session.on(claimed());
    session.on(armed());
    session.on(FromServer::LanesReady { guest: GUEST.into() });
    session.on(agent(FromAgent::Started { before: GuestTsc(1), after: GuestTsc(2) }));
    session
}

#[test]
fn whole_session_goes_from_claim_to_release() {
    let (mut session, first) = GuestSession::new(GUEST, Arm::default());
    assert_eq!(first, ToServer::Claim { guest: GUEST.into() });
    assert!(matches!(&session.on(claimed())[..], [ToServer::Agent { request: ToAgent::Arm(_), .. }]));
    session.on(armed());
    assert_eq!(session.phase(), Phase::Armed);
    session.on(FromServer::LanesReady { guest: GUEST.into() });
    session.on(agent(FromAgent::Started { before: GuestTsc(1), after: GuestTsc(2) }));
    assert_eq!(session.stop(), [session.ask(ToAgent::Stop)]);
    let sent = Ledger { bytes_out: 8192, ..Ledger::default() };
    session.on(agent(FromAgent::Lane(LaneReport { ledger: sent, ..LaneReport::default() })));
    let sent = vec![LaneSent { cpu: Cpu(0), bytes_out: 8192 }];
    let finish = ToServer::Finish { guest: GUEST.into(), sent, wait_ms_max: WAIT_MS_MAX };
    assert_eq!(session.on(agent(FromAgent::Stopped)), [finish]);
    session.on(FromServer::Finished { guest: GUEST.into(), lanes: vec![] });
    assert_eq!(session.phase(), Phase::Drained);
    assert_eq!(session.close(), [session.ask(ToAgent::Close), ToServer::Release { guest: GUEST.into() }]);
    session.on(FromServer::Released { guest: GUEST.into() });
    assert_eq!((session.phase(), session.trouble), (Phase::Closed, None));
}

#[test]
fn slow_guest_says_that_it_is_still_arming_and_is_not_disturbed() {
    let (mut session, _) = GuestSession::new(GUEST, Arm::default());
    session.on(claimed());
    for events in [40, 900] {
        assert_eq!(session.on(agent(FromAgent::Arming { events })), []);
        assert_eq!((session.phase(), &session.trouble), (Phase::Arming, &None));
    }
    session.on(armed());
    assert_eq!(session.phase(), Phase::Armed);
    session.on(agent(FromAgent::Arming { events: 1 }));
    assert!(matches!(session.trouble, Some(Trouble::OutOfOrder { .. })), "it had said that it was ready");
}

#[test]
fn guest_that_cannot_be_claimed_is_let_go_without_a_release() {
    let (mut session, _) = GuestSession::new(GUEST, Arm::default());
    assert!(session.on(FromServer::Refused(Refusal::NoAgent { guest: GUEST.into() })).is_empty());
    assert_eq!(session.phase(), Phase::Closed);
    assert!(matches!(session.trouble, Some(Trouble::Refused(_))));
}

#[test]
fn failed_arm_closes_and_releases() {
    let (mut session, _) = GuestSession::new(GUEST, Arm::default());
    session.on(claimed());
    let failure =
        Failure { kind: FailureKind::NoSuchEvent, object: "shced".into(), detail: "none".into(), near: vec![] };
    let effects = session.on(agent(FromAgent::Failed(failure)));
    assert!(matches!(&effects[..], [ToServer::Agent { request: ToAgent::Close, .. }, ToServer::Release { .. }]));
}

#[test]
fn agent_that_goes_away_leaves_what_came() {
    let mut session = running();
    let effects = session.on(FromServer::Gone { guest: GUEST.into(), what: Gone::Agent });
    assert!(matches!(&effects[..], [ToServer::Finish { wait_ms_max: 0, .. }]));
    session.on(FromServer::Finished { guest: GUEST.into(), lanes: vec![LaneLedger::default()] });
    assert_eq!((session.phase(), session.ledgers.len(), session.is_finished()), (Phase::Drained, 1, true));
    assert_eq!(session.trouble, Some(Trouble::Gone(Gone::Agent)));
}

#[test]
fn unsolicited_answer_is_trouble() {
    let mut session = running();
    session.on(agent(FromAgent::Stopped));
    let trouble = Trouble::OutOfOrder { phase: Phase::Running, answer: "Stopped".into() };
    assert_eq!(session.trouble, Some(trouble));
}

#[test]
fn more_lane_reports_than_lanes_are_trouble() {
    let mut session = running();
    session.stop();
    session.on(agent(FromAgent::Lane(LaneReport::default())));
    session.on(agent(FromAgent::Lane(LaneReport::default())));
    assert_eq!(session.reports.len(), 1);
    assert!(matches!(session.trouble, Some(Trouble::OutOfOrder { .. })));
}

fn any_message(code: u8) -> FromServer {
    let guest = || GUEST.to_owned();
    match code % 14 {
        0 => claimed(),
        1 => armed(),
        2 => FromServer::LanesReady { guest: guest() },
        3 => agent(FromAgent::Started { before: GuestTsc(1), after: GuestTsc(2) }),
        4 => agent(FromAgent::Lane(LaneReport::default())),
        5 => agent(FromAgent::Stopped),
        6 => FromServer::Finished { guest: guest(), lanes: vec![] },
        7 => FromServer::Released { guest: guest() },
        8 => FromServer::Gone { guest: guest(), what: Gone::Device },
        9 => FromServer::Refused(Refusal::Full),
        10 => agent(FromAgent::Closed),
        11 => agent(FromAgent::Pong { id: 1 }),
        12 => agent(FromAgent::Marked { before: GuestTsc(1), after: GuestTsc(1) }),
        _ => agent(FromAgent::Machine(Machine::default())),
    }
}

proptest! {
    #[test]
    fn any_order_of_messages_ends_closed_once_it_is_closed(codes in proptest::collection::vec(any::<u8>(), 0..40)) {
        let (mut session, _) = GuestSession::new(GUEST, Arm::default());
        let mut phase = session.phase();
        for code in codes {
            let effects = session.on(any_message(code));
            prop_assert!(effects.len() <= 2);
            prop_assert!(session.phase() >= phase, "{:?} after {:?}", session.phase(), phase);
            phase = session.phase();
        }
        session.stop();
        session.abandon();
        session.on(FromServer::Finished { guest: GUEST.into(), lanes: vec![] });
        session.close();
        session.on(FromServer::Released { guest: GUEST.into() });
        prop_assert_eq!(session.phase(), Phase::Closed);
    }
}

#[test]
fn second_trouble_does_not_forget_what_the_server_has_written() {
    let mut session = running();
    session.on(FromServer::Gone { guest: GUEST.into(), what: Gone::Agent });
    assert!(session.on(FromServer::Gone { guest: GUEST.into(), what: Gone::Device }).is_empty());
    assert_eq!(session.phase(), Phase::Draining);
    let lane = LaneLedger { ledger: passed(7), ..LaneLedger::default() };
    session.on(FromServer::Finished { guest: GUEST.into(), lanes: vec![lane] });
    assert_eq!((session.phase(), session.ledgers[0].ledger.pages_out), (Phase::Drained, 7));
}

#[test]
fn page_no_kernel_has_is_refused_before_a_file_is_touched() {
    for page_bytes in [0, 5000, 1 << 30] {
        let (mut session, _) = GuestSession::new(GUEST, Arm::default());
        session.on(claimed());
        let armed = Armed { lanes: vec![Cpu(0)], page_bytes, ..Armed::default() };
        session.on(agent(FromAgent::Armed(armed)));
        assert!(session.trouble.is_some() && session.armed.is_none());
    }
}

#[test]
fn text_of_an_agent_cannot_move_the_cursor() {
    let mut session = running();
    let detail = "no\x1b]0;title\x07\nnote guest2: fine".into();
    session.on(agent(FromAgent::Failed(Failure {
        kind: FailureKind::Kernel,
        object: "x".into(),
        detail,
        near: vec![],
    })));
    let Some(Trouble::Failed(failure)) = session.trouble else { panic!("not failed") };
    assert!(!failure.detail.contains(char::is_control), "{:?}", failure.detail);
}

/// A guest with CPU 0, CPUs 1 to 3 that may come, and CPU 4 that has no port.
fn with_spares() -> GuestSession {
    let (mut session, _) = GuestSession::new(GUEST, Arm::default());
    session.on(claimed());
    let spare = vec![Cpu(1), Cpu(2), Cpu(3)];
    let lanes = (0..4).map(Cpu).collect();
    session.on(agent(FromAgent::Armed(Armed { lanes, spare, page_bytes: 4096, ..Armed::default() })));
    session.on(FromServer::LanesReady { guest: GUEST.into() });
    session.on(agent(FromAgent::Started { before: GuestTsc(1), after: GuestTsc(2) }));
    session
}

#[test]
fn cpu_that_came_is_one_of_the_lanes_and_one_that_did_not_is_not_mentioned() {
    let mut session = with_spares();
    assert_eq!(session.lanes_in_use(), [Cpu(0)], "nothing has come yet");
    session.stop();
    let stats = |entries, read| {
        format!("entries: {entries}\noverrun: 0\ncommit overrun: 0\nbytes: 0\ndropped events: 0\nread events: {read}\n")
    };
    let report = |cpu, pages, stats_after: &str| {
        let ledger = Ledger { events_lost: events_lost("", stats_after), ..passed(pages) };
        let stats_after = stats_after.to_owned();
        agent(FromAgent::Lane(LaneReport { cpu: Cpu(cpu), ledger, stats_after, ..LaneReport::default() }))
    };
    // CPU 2 came and could not be opened, CPU 3 did not come, CPU 4 came unannounced.
    let said = [(0, 7, stats(0, 70)), (1, 5, stats(0, 50)), (2, 0, stats(20, 0)), (3, 0, String::new())];
    for (cpu, pages, stats) in &said {
        session.on(report(*cpu, *pages, stats));
    }
    session.on(report(4, 0, &stats(30, 0)));
    assert_eq!((&session.trouble, session.reports.len(), session.late.len()), (&None, 4, 1));
    let ledger = |cpu, pages| LaneLedger { cpu: Cpu(cpu), ledger: passed(pages), ..LaneLedger::default() };
    session.on(agent(FromAgent::Stopped));
    let lanes = vec![ledger(0, 7), ledger(1, 5), ledger(2, 0), ledger(3, 0)];
    session.on(FromServer::Finished { guest: GUEST.into(), lanes });

    assert_eq!(session.lanes_in_use(), [Cpu(0), Cpu(1)]);
    let in_use = session.ledgers_in_use();
    let pages: Vec<(Cpu, u64)> = in_use.iter().map(|lane| (lane.cpu, lane.ledger.pages_out)).collect();
    assert_eq!(pages, [(Cpu(0), 7), (Cpu(1), 5)]);
    let (lanes, remarks) = guest_lanes(&session, &session.ledgers);
    let counts = |lane: &LaneSummary| {
        let known = lane.events.zip(lane.ledger.events_lost).expect("the kernel's counts came");
        (lane.cpu, lane.ledger.pages_out, known)
    };
    let counts: Vec<_> = lanes.iter().map(counts).collect();
    assert_eq!(counts, [(0, 7, (70, 0)), (1, 5, (50, 0)), (2, 0, (0, 20)), (4, 0, (0, 30))]);
    let missing = |cpu, events| format!("cpu{cpu} came online after the start: its {events} events are in no file");
    assert_eq!(remarks, [missing(2, 20), missing(4, 30)]);
}

#[test]
fn machine_whose_cpus_are_all_to_come_or_come_without_a_lane_is_refused() {
    for spare in [vec![Cpu(0), Cpu(1)], vec![Cpu(2)], vec![Cpu(1), Cpu(7)]] {
        let (mut session, _) = GuestSession::new(GUEST, Arm::default());
        session.on(claimed());
        let armed = Armed { lanes: vec![Cpu(0), Cpu(1)], spare, page_bytes: 4096, ..Armed::default() };
        session.on(agent(FromAgent::Armed(armed)));
        assert!(session.trouble.is_some() && session.armed.is_none());
    }
}

#[test]
fn changes_that_an_agent_reports_are_bounded_and_printable() {
    let mut session = running();
    session.stop();
    let change = SettingChange { setting: "trace_clock".into(), armed: "x86-tsc".into(), found: "\u{1b}[2Jx".into() };
    for _ in 0..CHANGES_MAX + 5 {
        session.on(agent(FromAgent::Changed(change.clone())));
    }
    assert_eq!((session.changes.len(), &*session.changes[0].found), (CHANGES_MAX, "?[2Jx"));
}

#[test]
fn events_that_an_agent_reports_as_lost_are_in_the_running_ledgers() {
    let mut session = running();
    session.on(FromServer::Ledger { guest: GUEST.into(), lanes: vec![LaneLedger::default()] });
    assert_eq!(session.ledgers_in_use()[0].ledger.events_lost, Some(0));
    session.on(agent(FromAgent::EventsLost { lanes: vec![(Cpu(0), 42), (Cpu(9), 7)] }));
    assert_eq!(session.ledgers_in_use()[0].ledger.events_lost, Some(42));
    assert!(session.trouble.is_none());
}
