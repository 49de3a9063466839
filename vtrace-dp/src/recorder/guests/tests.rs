//! Claims about all guests of a session, against a server that is played here.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread::{JoinHandle, sleep, spawn},
};

use vtrace_common::{
    ledger::Ledger,
    time::GuestTsc,
    wire::{
        Decoder, Family, Hello,
        agent::{Armed, Machine},
        client::{Claimed, LaneLedger},
        encode,
    },
};

use super::*;
use crate::{
    recorder::{guests::session::Trouble, plan::MachinePlan},
    server::CONTROL_SOCKET,
};

#[test]
fn server_that_takes_requests_and_answers_none_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join(CONTROL_SOCKET)).unwrap();
    let greet = spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        socket.write_all(&encode(&Hello::ours(vtrace_common::SOFTWARE)).unwrap()).unwrap();
        socket
    });
    let mut guests = Guests::claim(folder.path(), &[]).unwrap();
    let _stopped = greet.join().unwrap();
    guests.answer_max = Duration::from_millis(20);
    guests.take(Duration::from_millis(40)).expect("nothing is owed");
    guests.owed = Some(Instant::now());
    let error = guests.take(Duration::from_millis(40)).unwrap_err();
    let text = format!("the server (pid {}) has neither read nor answered for 0 s", std::process::id());
    assert_eq!(error.to_string(), text);
}

/// What a server says of a guest whose agent arms, starts, and then says nothing; `sleeper` is one that sleeps from then
/// on, any other stops when it is told to.
fn answer(request: &ToServer, sleeper: &str) -> Vec<FromServer> {
    let agent = |guest: &str, answer| vec![FromServer::Agent { guest: guest.into(), answer }];
    let machine = Machine::default();
    let tsc = |at| GuestTsc(at);
    match request {
        ToServer::Claim { guest } => {
            vec![FromServer::Claimed(Claimed { guest: guest.clone(), vmm_pid: 7, machine })]
        }
        ToServer::Agent { guest, request } => match request {
            ToAgent::Arm(_) => {
                let armed = Armed { lanes: vec![Cpu(0)], page_bytes: 4096, ..Armed::default() };
                agent(guest, FromAgent::Armed(armed))
            }
            ToAgent::Start { .. } => agent(guest, FromAgent::Started { before: tsc(1), after: tsc(2) }),
            _ if guest == sleeper => vec![],
            ToAgent::Ping { id } => agent(guest, FromAgent::Pong { id: *id }),
            ToAgent::Stop => agent(guest, FromAgent::Stopped),
            _ => vec![],
        },
        ToServer::Lanes(lanes) => vec![FromServer::LanesReady { guest: lanes.guest.clone() }],
        ToServer::Finish { guest, .. } => {
            let ledger = Ledger { pages_in: 9, pages_out: 9, ..Ledger::default() };
            let lane = LaneLedger { ledger, ..LaneLedger::default() };
            vec![FromServer::Finished { guest: guest.clone(), lanes: vec![lane] }]
        }
        ToServer::Release { guest } => vec![FromServer::Released { guest: guest.clone() }],
        ToServer::List | ToServer::Ledger { .. } => vec![],
    }
}

fn serve(dir: &Path, sleeper: &'static str) -> JoinHandle<()> {
    let listener = UnixListener::bind(dir.join(CONTROL_SOCKET)).unwrap();
    spawn(move || {
        let (mut socket, _): (UnixStream, _) = listener.accept().unwrap();
        socket.write_all(&encode(&Hello::ours(vtrace_common::SOFTWARE)).unwrap()).unwrap();
        let (mut decoder, mut piece) = (Decoder::default(), [0; 4096]);
        while let Ok(count @ 1..) = socket.read(&mut piece) {
            decoder.push(&piece[..count]);
            while let Some(frame) = decoder.next_frame().unwrap() {
                if frame.family == Family::Hello {
                    continue;
                }
                let answers = answer(&frame.open().unwrap(), sleeper);
                answers.iter().for_each(|answer| socket.write_all(&encode(answer).unwrap()).unwrap());
            }
        }
    })
}

/// All guests of a session record, and the one that sleeps has begun to do so.
fn recorded(dir: &Path, names: &[&str]) -> Guests {
    let plans: Vec<GuestPlan> = names.iter().map(|name| plan_of(name)).collect();
    let mut guests = Guests::claim(dir, &plans).unwrap();
    guests.wait(Phase::Armed, None).unwrap();
    let file = tempfile::tempfile().unwrap();
    let area = Area { cpu: Cpu(0), offset: 0, bytes_max: 1 << 20, begins_again: false };
    (0..names.len()).for_each(|index| guests.send_lanes(index, &[area], &[&file]).unwrap());
    guests.wait(Phase::Ready, None).unwrap();
    guests.ask_all(Phase::Ready, &ToAgent::Start { marker: "go".into() }).unwrap();
    guests.wait(Phase::Running, None).unwrap();
    guests
}

fn plan_of(name: &str) -> GuestPlan {
    let machine =
        MachinePlan { arm: vtrace_common::wire::agent::Arm::default(), output: "none".into(), newest_bytes: None };
    GuestPlan { name: name.into(), machine, instance: None }
}

#[test]
fn guest_that_sleeps_while_it_records_is_waited_for_and_given_up_in_bounded_time_when_it_is_to_stop() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(folder.path(), "guest2");
    let mut guests = recorded(folder.path(), &["guest1", "guest2"]);
    let bound = Duration::from_secs(3);
    guests.stop_silence_max = bound;

    // While it records nothing is given up, however long it is silent.
    let begun = Instant::now();
    while begun.elapsed() < bound + Duration::from_secs(2) {
        guests.take(Duration::from_millis(50)).unwrap();
    }
    let now = Instant::now();
    let [awake, asleep] = &guests.sessions[..] else { panic!("two guests") };
    assert_eq!((awake.phase(), asleep.phase()), (Phase::Running, Phase::Running));
    assert!(awake.silence.longest(now) < Duration::from_secs(1), "{:?}", awake.silence);
    assert!(asleep.silence.lasts(now) >= bound, "{:?}", asleep.silence);

    // Its silence before does not count, what follows is bounded, and the other's part goes to its end.
    let stopped = Instant::now();
    guests.step_all(GuestSession::stop).unwrap();
    guests.wait(Phase::Draining, None).unwrap();
    assert!(stopped.elapsed() >= bound && stopped.elapsed() < 4 * bound, "{:?}", stopped.elapsed());
    guests.wait(Phase::Drained, None).unwrap();
    let [awake, asleep] = &guests.sessions[..] else { panic!("two guests") };
    assert_eq!(awake.trouble, None);
    assert_eq!(asleep.trouble, Some(Trouble::Silent { phase: Phase::Stopping, seconds: bound.as_secs() }));
    assert!(asleep.is_finished() && asleep.ledgers[0].ledger.pages_out == 9, "what came is kept");
    let longest = asleep.silence.longest(Instant::now());
    sleep(Duration::from_millis(20));
    assert!(
        longest >= bound && asleep.silence.longest(Instant::now()) == longest,
        "the recorder no longer waits for it"
    );
    guests.step_all(GuestSession::close).unwrap();
    guests.wait(Phase::Closed, None).unwrap();
    drop(guests);
    server.join().unwrap();
}
