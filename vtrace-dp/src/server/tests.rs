//! A server between links of clients and pretended guests, all in this process.

use std::{
    fs::File,
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use vtrace_common::{
    ids::Cpu,
    limits::{CLIENTS_MAX, FRAMES_WAITING_MAX},
    wire::{
        Capabilities, Decoder, VERSION,
        agent::{FromAgent, ToAgent},
        client::{Area, DriverState, Gone, Lanes, ToServer},
        encode,
    },
};

use super::{
    link::{Link, LinkError},
    *,
};

use crate::{
    device::testing::vmm::{Machine, PATIENCE, PORT_OPEN},
    sys::socket::{receive, send_all},
};

mod devices;
mod limits;
mod users;

/// A server of guests `guest1` and `guest2` in its own directory.
struct House {
    server: Option<Server>,
    folder: tempfile::TempDir,
}

impl House {
    fn new() -> Self {
        Self::of(|_| {})
    }

    /// The same with other guests.
    fn of(change: impl FnOnce(&mut ServerConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        change(&mut config);
        Self { server: Some(Server::start(&config).unwrap()), folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn link(&self) -> Link {
        Link::connect(self.path()).unwrap()
    }

    /// A guest whose driver runs and whose ports are open.
    fn boot(&self, guest: &str) -> Machine {
        let socket = UnixStream::connect(self.path().join(format!("{guest}.sock"))).unwrap();
        let mut machine = Machine::realize(socket, 3);
        machine.start();
        machine.probe();
        machine
    }

    /// The same with an agent that the server knows.
    fn guest(&self, guest: &str) -> Machine {
        let mut machine = self.boot(guest);
        machine.start_agent();
        machine.vmm.settle();
        let until = Instant::now() + PATIENCE;
        while self.state(guest).agent.is_none_or(|agent| agent.machine.is_none()) {
            assert!(Instant::now() < until, "the server hears the agent");
            std::thread::yield_now();
        }
        machine
    }

    fn state(&self, guest: &str) -> vtrace_common::wire::client::GuestState {
        let slots = self.server.as_ref().unwrap().guests();
        slots.iter().find(|slot| slot.name == guest).unwrap().state()
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.server.take().unwrap().stop();
        assert_eq!(std::fs::read_dir(self.path()).unwrap().count(), 0, "all sockets are gone");
    }
}

fn config(directory: &Path) -> ServerConfig {
    let guest = |name: &str| GuestConfig::new(name, GuestSocket::InDirectory);
    let guests = vec![guest("guest1"), guest("guest2")];
    ServerConfig { directory: directory.into(), guests, ..ServerConfig::default() }
}

fn next(link: &mut Link) -> FromServer {
    link.receive(Some(PATIENCE)).unwrap().expect("the server answers")
}

fn ask(link: &mut Link, request: &ToServer) -> FromServer {
    link.send(request).unwrap();
    next(link)
}

fn guest1() -> String {
    "guest1".into()
}

fn claim(link: &mut Link) -> FromServer {
    ask(link, &ToServer::Claim { guest: guest1() })
}

fn release(link: &mut Link) {
    assert_eq!(ask(link, &ToServer::Release { guest: guest1() }), FromServer::Released { guest: guest1() });
}

fn to_agent(request: ToAgent) -> ToServer {
    ToServer::Agent { guest: guest1(), request }
}

fn from_agent(answer: FromAgent) -> FromServer {
    FromServer::Agent { guest: guest1(), answer }
}

fn is_claimed(answer: &FromServer) -> bool {
    matches!(answer, FromServer::Claimed(claimed) if claimed.vmm_pid == std::process::id())
}

/// Claims again and again until the guest is free.
fn claim_patiently(link: &mut Link) {
    let until = Instant::now() + PATIENCE;
    while !is_claimed(&claim(link)) {
        assert!(Instant::now() < until, "the guest becomes free");
    }
}

fn refusal(answer: FromServer) -> Refusal {
    let FromServer::Refused(refusal) = answer else { panic!("not refused: {answer:?}") };
    refusal
}

fn arm(link: &mut Link, machine: &mut Machine) {
    link.send(&to_agent(ToAgent::Arm(Box::default()))).unwrap();
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Arm(Box::default()));
}

fn lanes(offset: u64) -> ToServer {
    ToServer::Lanes(Lanes {
        guest: guest1(),
        page_bytes: 4096,
        areas: vec![Area { cpu: Cpu(1), offset, bytes_max: 1 << 20, begins_again: false }],
    })
}

#[test]
fn guests_are_listed_as_far_as_they_have_come() {
    let house = House::new();
    let mut link = house.link();
    let list = |link: &mut Link| {
        let FromServer::Guests(guests) = ask(link, &ToServer::List) else { panic!("no list") };
        guests
    };
    let guests = list(&mut link);
    assert_eq!((guests.len(), guests[0].vmm_pid, &guests[0].driver), (2, None, &DriverState::Absent));
    assert_eq!(guests[1].socket, house.path().join("guest2.sock").display().to_string());
    let _machine = house.guest("guest1");
    let guests = list(&mut link);
    assert_eq!((guests[0].vmm_pid, &guests[0].driver), (Some(std::process::id()), &DriverState::Running));
    let agent = guests[0].agent.as_ref().unwrap();
    assert_eq!(agent.machine.as_ref().unwrap().uname, "Linux test");
    assert_eq!(link.server().software, vtrace_common::SOFTWARE);
}

/// Neighbouring releases: one that can do less, and one that also speaks the next version and can do more.
#[test]
fn agents_of_neighbouring_versions_are_recorded_and_not_asked_for_what_they_cannot_do() {
    let older = Hello { capabilities: Capabilities::default(), ..Hello::ours("vtrace agent 0.1.0") };
    let newer = Hello { version_max: VERSION + 1, capabilities: Capabilities(u16::MAX), ..Hello::ours("newer") };
    for (hello, is_asked) in [(older, false), (newer, true)] {
        let house = House::new();
        let mut machine = house.boot("guest1");
        machine.start_agent_as(&hello);
        while house.state("guest1").agent.is_none_or(|agent| agent.machine.is_none()) {
            std::thread::yield_now();
        }
        let mut link = house.link();
        assert!(matches!(claim(&mut link), FromServer::Claimed(_)), "{hello:?}");
        link.send(&ToServer::Agent { guest: guest1(), request: ToAgent::Offer }).unwrap();
        if is_asked {
            assert_eq!(machine.read::<ToAgent>(), ToAgent::Offer);
        } else {
            let Refusal::State { detail, .. } = refusal(next(&mut link)) else { panic!("refused") };
            assert!(detail.contains("vtrace agent 0.1.0") && detail.contains("copy this vtrace"), "{detail}");
        }
        let arm = ToAgent::Arm(Box::default());
        link.send(&ToServer::Agent { guest: guest1(), request: arm.clone() }).unwrap();
        assert_eq!(machine.read::<ToAgent>(), arm);
    }
}

#[test]
fn guest_that_cannot_be_traced_is_refused_with_the_reason() {
    let house = House::new();
    let mut link = house.link();
    let known = vec![guest1(), "guest2".into()];
    let answer = ask(&mut link, &ToServer::Claim { guest: "guest3".into() });
    assert_eq!(refusal(answer), Refusal::NoSuchGuest { guest: "guest3".into(), known });
    assert!(matches!(refusal(claim(&mut link)), Refusal::NotConnected { .. }));
    let mut machine = house.boot("guest1");
    assert!(matches!(refusal(claim(&mut link)), Refusal::NoAgent { .. }));
    machine.say(0, PORT_OPEN, 1);
    let hello = Hello {
        version_min: 7,
        version_max: 8,
        software: "of the future".into(),
        capabilities: Capabilities::default(),
    };
    machine.write(&encode(&hello).unwrap());
    while house.state("guest1").agent.is_none() {
        std::thread::yield_now();
    }
    assert_eq!(refusal(claim(&mut link)), Refusal::AgentVersion { guest: guest1(), hello });
}

#[test]
fn holder_and_agent_talk_and_probes_are_stamped() {
    let house = House::new();
    let (mut machine, mut link) = (house.guest("guest1"), house.link());
    assert!(is_claimed(&claim(&mut link)));
    arm(&mut link, &mut machine);
    machine.answer(&FromAgent::Stopped);
    assert_eq!(next(&mut link), from_agent(FromAgent::Stopped));
    link.send(&to_agent(ToAgent::Probe { id: 3, cpu: Cpu(0) })).unwrap();
    assert!(matches!(machine.read(), ToAgent::Probe { id: 3, .. }));
    let tsc = vtrace_common::time::GuestTsc(1);
    machine.answer(&FromAgent::Echo(vtrace_common::wire::agent::Echo { id: 3, cpu: Cpu(0), received: tsc, sent: tsc }));
    let FromServer::Echo { host_sent, host_received, .. } = next(&mut link) else { panic!("no echo") };
    assert!(host_sent < host_received);
}

#[test]
fn requests_for_a_guest_that_was_not_claimed_are_refused() {
    let house = House::new();
    let (_machine, mut link) = (house.guest("guest1"), house.link());
    let guest = guest1();
    for request in [
        to_agent(ToAgent::Stop),
        lanes(0),
        ToServer::Ledger { guest: guest.clone() },
        ToServer::Finish { guest: guest.clone(), sent: vec![], wait_ms_max: 0 },
        ToServer::Release { guest },
    ] {
        assert!(matches!(refusal(ask(&mut link, &request)), Refusal::State { .. }), "{request:?}");
    }
}

#[test]
fn guest_belongs_to_one_client_until_it_is_released() {
    let house = House::new();
    let (_machine, mut first, mut second) = (house.guest("guest1"), house.link(), house.link());
    assert!(is_claimed(&claim(&mut first)));
    let pid = std::process::id();
    assert!(matches!(refusal(claim(&mut second)), Refusal::Held { holder_pid, .. } if holder_pid == pid));
    assert!(matches!(refusal(claim(&mut first)), Refusal::State { .. }));
    assert!(matches!(refusal(ask(&mut second, &to_agent(ToAgent::Stop))), Refusal::State { .. }));
    assert_eq!(house.state("guest1").holder_pid, Some(pid));
    release(&mut first);
    assert!(is_claimed(&claim(&mut second)));
}

#[test]
fn client_that_dies_has_released_its_guest_and_its_session_is_closed() {
    let house = House::new();
    let (mut machine, mut first, mut second) = (house.guest("guest1"), house.link(), house.link());
    assert!(is_claimed(&claim(&mut first)));
    arm(&mut first, &mut machine);
    drop(first);
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Close);
    second.send(&ToServer::Claim { guest: guest1() }).unwrap();
    machine.answer(&FromAgent::Stopped);
    assert_eq!(second.receive(Some(Duration::from_millis(100))).unwrap(), None, "not before the agent has closed");
    machine.answer(&FromAgent::Closed);
    assert!(is_claimed(&next(&mut second)));
    machine.answer(&FromAgent::Pong { id: 1 });
    assert_eq!(next(&mut second), from_agent(FromAgent::Pong { id: 1 }), "only what is the second one's");
}

#[test]
fn agent_that_goes_away_is_reported_and_frees_a_guest_that_was_left() {
    let house = House::new();
    let (mut machine, mut link) = (house.guest("guest1"), house.link());
    assert!(is_claimed(&claim(&mut link)));
    arm(&mut link, &mut machine);
    machine.say(0, PORT_OPEN, 0);
    assert_eq!(next(&mut link), FromServer::Gone { guest: guest1(), what: Gone::Agent });
    assert!(matches!(refusal(ask(&mut link, &to_agent(ToAgent::Stop))), Refusal::NoAgent { .. }));
    release(&mut link);
    assert_eq!(house.state("guest1").holder_pid, None, "the server does not wait for the agent to close");
}

#[test]
fn vmm_that_goes_away_is_reported_and_the_next_boot_is_claimed() {
    let house = House::new();
    let (machine, mut link) = (house.guest("guest1"), house.link());
    assert!(is_claimed(&claim(&mut link)));
    drop(machine);
    assert_eq!(next(&mut link), FromServer::Gone { guest: guest1(), what: Gone::Device });
    release(&mut link);
    let _machine = house.guest("guest1");
    assert!(is_claimed(&claim(&mut link)));
}

#[test]
fn pages_go_to_the_file_that_was_passed() {
    let house = House::new();
    let (mut machine, mut link) = (house.guest("guest1"), house.link());
    assert!(is_claimed(&claim(&mut link)));
    let path = house.path().parent().unwrap().join(format!("trace-{}.dat", std::process::id()));
    let file = File::create(&path).unwrap();
    link.send_with_files(&lanes(8192), &[&file]).unwrap();
    assert_eq!(next(&mut link), FromServer::LanesReady { guest: guest1() });
    assert!(matches!(refusal(ask(&mut link, &lanes(8192))), Refusal::State { .. }), "once");
    // A page: time stamp, then the bytes committed.
    let mut page = vec![0x11; 4096];
    page[8..16].copy_from_slice(&4080u64.to_le_bytes());
    machine.out[2].send_blocking(&page, 4096);
    let ends = vec![vtrace_common::wire::client::LaneSent { cpu: Cpu(1), bytes_out: 4096 }];
    let answer = ask(&mut link, &ToServer::Finish { guest: guest1(), sent: ends, wait_ms_max: 5000 });
    let FromServer::Finished { lanes: ledgers, .. } = answer else { panic!("not finished: {answer:?}") };
    assert_eq!(
        (ledgers.len(), ledgers[0].cpu, ledgers[0].ledger.pages_in, ledgers[0].ledger.pages_out),
        (1, Cpu(1), 1, 1)
    );
    let written = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(written[8192..8192 + 4096], page);
    release(&mut link);
}

#[test]
fn lanes_without_a_proper_file_are_refused() {
    let house = House::new();
    let (_machine, mut link) = (house.guest("guest1"), house.link());
    assert!(is_claimed(&claim(&mut link)));
    assert!(matches!(refusal(ask(&mut link, &lanes(0))), Refusal::Request { .. }));
    for path in ["/dev/null", "/proc/self/status"] {
        link.send_with_files(&lanes(0), &[&File::open(path).unwrap()]).unwrap();
        assert!(matches!(refusal(next(&mut link)), Refusal::Request { .. }));
    }
    let file = tempfile::tempfile().unwrap();
    link.send_with_files(&lanes(100), &[&file]).unwrap();
    assert!(matches!(refusal(next(&mut link)), Refusal::Request { .. }), "not at a page");
}

#[test]
fn second_descriptor_is_taken_only_if_it_is_the_same_file_past_the_page_cache() {
    let house = House::new();
    let (mut machine, mut link) = (house.guest("guest1"), house.link());
    assert!(is_claimed(&claim(&mut link)));
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let other = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let Ok(direct) = crate::sys::direct::reopen(&file) else { return println!("skipped: no O_DIRECT here") };
    for files in [[&file, &file], [&other, &direct], [&direct, &file]] {
        link.send_with_files(&lanes(8192), &files).unwrap();
        assert!(matches!(refusal(next(&mut link)), Refusal::Request { .. }));
    }
    link.send_with_files(&lanes(8192), &[&file, &direct, &other]).unwrap();
    assert!(matches!(refusal(next(&mut link)), Refusal::Request { .. }), "three are too many");
    link.send_with_files(&lanes(8192), &[&file, &direct]).unwrap();
    assert_eq!(next(&mut link), FromServer::LanesReady { guest: guest1() });
    let mut page = vec![0x22; 4096];
    page[8..16].copy_from_slice(&4080u64.to_le_bytes());
    machine.out[2].send_blocking(&page, 4096);
    let ends = vec![vtrace_common::wire::client::LaneSent { cpu: Cpu(1), bytes_out: 4096 }];
    let answer = ask(&mut link, &ToServer::Finish { guest: guest1(), sent: ends, wait_ms_max: 5000 });
    assert!(matches!(answer, FromServer::Finished { .. }));
    let mut written = vec![0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut written, 8192).unwrap();
    assert_eq!(written, page);
}

#[test]
fn descriptors_that_come_unasked_are_closed() {
    let house = House::new();
    let (_machine, mut link) = (house.guest("guest1"), house.link());
    assert!(is_claimed(&claim(&mut link)));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let file = File::from(OwnedFd::from(theirs));
    link.send_with_files(&ToServer::List, &[&file]).unwrap();
    assert!(matches!(next(&mut link), FromServer::Guests(_)));
    assert!(matches!(refusal(ask(&mut link, &lanes(0))), Refusal::Request { .. }), "it is not used later");
    drop(file);
    let mut ours = ours;
    assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0, "the server has closed the other end");
}

#[test]
fn client_of_another_version_is_answered_and_let_go() {
    let house = House::new();
    let mut socket = UnixStream::connect(house.path().join(CONTROL_SOCKET)).unwrap();
    let hello = Hello {
        version_min: 50,
        version_max: 60,
        software: "of the future".into(),
        capabilities: Capabilities::default(),
    };
    socket.write_all(&encode(&hello).unwrap()).unwrap();
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).unwrap();
    let mut decoder = Decoder::default();
    decoder.push(&bytes);
    assert!(decoder.next_frame().unwrap().unwrap().open::<Hello>().unwrap().speaks_ours());
}

#[test]
fn client_that_sends_nonsense_is_let_go_and_others_are_served() {
    let house = House::new();
    let mut socket = UnixStream::connect(house.path().join(CONTROL_SOCKET)).unwrap();
    socket.write_all(&[0x55; 200]).unwrap();
    let mut bytes = Vec::new();
    // Its own nonsense may still be unread when it is let go.
    let _ = socket.read_to_end(&mut bytes);
    assert!(matches!(ask(&mut house.link(), &ToServer::List), FromServer::Guests(_)));
}

#[test]
fn clients_beyond_the_limit_are_told_so() {
    let house = House::new();
    let links: Vec<_> = (0..CLIENTS_MAX).map(|_| house.link()).collect();
    let mut one_too_many = house.link();
    assert_eq!(next(&mut one_too_many), FromServer::Refused(Refusal::Full));
    assert!(matches!(one_too_many.receive(Some(PATIENCE)), Err(LinkError::Closed)));
    drop(links);
}

#[test]
fn slow_client_loses_nothing_and_does_not_block_the_control_queue() {
    let house = House::new();
    let (mut machine, mut link) = (house.guest("guest1"), house.link());
    assert!(is_claimed(&claim(&mut link)));
    let count = 4 * u32::try_from(FRAMES_WAITING_MAX).unwrap();
    // Big ones, so that they do not fit into the socket's buffer.
    let text = "x".repeat(2000);
    let answer = |id: u32| {
        FromAgent::Lane(vtrace_common::wire::agent::LaneReport {
            cpu: Cpu(id),
            stats_after: text.clone(),
            ..Default::default()
        })
    };
    let mut sent = 0;
    while sent < count && machine.out[0].free() > 0 {
        machine.answer(&answer(sent));
        sent += 1;
        if machine.out[0].free() == 0 {
            std::thread::sleep(Duration::from_millis(20));
            machine.out[0].reclaim();
        }
    }
    assert!(sent < count, "the agent's ring is left alone while the client does not read ({sent} sent)");
    machine.say(1, PORT_OPEN, 1);
    machine.say(1, PORT_OPEN, 0);
    for id in 0..sent {
        assert_eq!(next(&mut link), from_agent(answer(id)));
    }
}

#[test]
fn second_server_in_the_same_directory_is_refused_with_the_firsts_pid() {
    let house = House::new();
    let Err(ServerError::Socket(SocketFault::Taken { pid, .. })) = Server::start(&config(house.path())) else {
        panic!("not refused")
    };
    assert_eq!(pid, std::process::id());
    house.link();
}

#[test]
fn guests_that_cannot_be_served_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut twice = config(folder.path());
    twice.guests[1].name = guest1();
    assert!(matches!(Server::start(&twice), Err(ServerError::Twice(_))));
    twice.guests[1].name = "../etc".into();
    assert!(matches!(Server::start(&twice), Err(ServerError::Name(_))));
    twice.guests[1] = GuestConfig { devices: DEVICES_MAX + 1, ..GuestConfig::new("guest2", GuestSocket::InDirectory) };
    assert!(matches!(Server::start(&twice), Err(ServerError::Devices { .. })));
    let elsewhere = GuestSocket::Path(folder.path().join("own.sock"));
    twice.guests[1] = GuestConfig { devices: 2, ..GuestConfig::new("guest2", elsewhere) };
    assert!(matches!(Server::start(&twice), Err(ServerError::Devices { .. })));
    twice.guests.clear();
    assert!(matches!(Server::start(&twice), Err(ServerError::Count(0))));
}

#[test]
fn absent_server_is_an_error_that_names_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let Err(LinkError::NoServer { path, .. }) = Link::connect(folder.path()) else { panic!("connected") };
    assert_eq!(path, folder.path().join(CONTROL_SOCKET));
}

#[test]
fn server_that_ends_has_the_agent_close_its_session_first() {
    let house = House::new();
    let (mut machine, mut link) = (house.guest("guest1"), house.link());
    assert!(is_claimed(&claim(&mut link)));
    arm(&mut link, &mut machine);
    let guest = std::thread::spawn(move || {
        assert_eq!(machine.read::<ToAgent>(), ToAgent::Close);
        // The agent closes its lanes' ports: the control queue must still be served.
        machine.say(1, PORT_OPEN, 0);
        machine.answer(&FromAgent::Closed);
        machine
    });
    let start = Instant::now();
    drop(house);
    assert!(start.elapsed() < Duration::from_millis(900), "not the whole time");
    guest.join().unwrap();
}

#[test]
fn hundred_sessions_leave_no_descriptor_and_no_thread() {
    let house = House::new();
    let mut machine = house.guest("guest1");
    let session = |machine: &mut Machine| {
        let mut link = house.link();
        claim_patiently(&mut link);
        arm(&mut link, machine);
        link.send_with_files(&lanes(0), &[&tempfile::tempfile().unwrap()]).unwrap();
        assert_eq!(next(&mut link), FromServer::LanesReady { guest: guest1() });
        drop(link);
        assert_eq!(machine.read::<ToAgent>(), ToAgent::Close);
        machine.answer(&FromAgent::Closed);
    };
    (0..100).for_each(|_| session(&mut machine));
    let slot = &house.server.as_ref().unwrap().guests()[0];
    let until = Instant::now() + PATIENCE;
    while slot.state().holder_pid.is_some() {
        assert!(Instant::now() < until, "the last one is gone, too");
    }
    assert!(
        std::sync::Arc::strong_count(slot) <= 4,
        "no client's thread knows the guest: {}",
        std::sync::Arc::strong_count(slot)
    );
}

#[test]
fn frames_and_descriptors_cut_anywhere_are_understood() {
    let house = House::new();
    let (_machine, link) = (house.guest("guest1"), house.link());
    let mut link = link;
    assert!(is_claimed(&claim(&mut link)));
    let frame = encode(&lanes(0)).unwrap();
    let (first, rest) = frame.split_at(7);
    send_all(link.as_fd(), &encode(&ToServer::List).unwrap(), &[]).unwrap();
    send_all(link.as_fd(), first, &[tempfile::tempfile().unwrap().as_fd()]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    send_all(link.as_fd(), rest, &[]).unwrap();
    assert!(matches!(next(&mut link), FromServer::Guests(_)));
    assert_eq!(next(&mut link), FromServer::LanesReady { guest: guest1() });
    let _ = receive(link.as_fd(), &mut [0; 1]);
}
