//! A server and a QEMU that is played here: its ends of sockets and FIFOs.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::{
        fs::{FileExt, OpenOptionsExt},
        net::UnixStream,
    },
    sync::mpsc,
    thread::sleep,
    time::Duration,
};

use vtrace_common::{
    ids::Cpu,
    wire::{
        Decoder, Family, Frame, Hello,
        agent::{Armed, FromAgent, Machine, ToAgent},
        client::{Area, FromServer, Gone, GuestState, LaneLedger, LaneSent, ToServer},
        encode,
    },
};

use super::*;
use crate::{
    drain::Portless,
    server::{GuestSocket, Server, ServerConfig, link::Link},
};

const PAGE: usize = 4096;

struct Trial {
    server: Server,
    folder: Folder,
    root: tempfile::TempDir,
}

impl Trial {
    fn new(transport: Transport) -> Self {
        let root = tempfile::tempdir().unwrap();
        let (folder, setup) = (Folder::of(root.path(), "guest1"), Setup { transport, cpus: 2 });
        folder.make(setup, None).unwrap();
        let streams = Streams { folder: folder.clone(), setup };
        let guests = vec![GuestConfig::new("guest1", GuestSocket::Streams(streams))];
        let server =
            Server::start(&ServerConfig { directory: root.path().join("run"), guests, ..ServerConfig::default() })
                .unwrap();
        Self { server, folder, root }
    }

    fn slot(&self) -> &GuestSlot {
        &self.server.guests()[0]
    }

    fn connect(&self, port: &str) -> UnixStream {
        let socket = UnixStream::connect(self.folder.socket(port)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket
    }

    fn await_state(&self, what: &str, is_so: impl Fn(&GuestState) -> bool) {
        for _ in 0..1000 {
            if is_so(&self.slot().state()) {
                return;
            }
            sleep(Duration::from_millis(10));
        }
        panic!("not {what}: {:?}", self.slot().state());
    }

    fn await_port(&self, cpu: Cpu) {
        let there = (0..1000).any(|_| {
            sleep(Duration::from_millis(10));
            self.slot().devices.has_port(cpu).is_ok()
        });
        assert!(there, "{:?}", self.slot().devices.has_port(cpu));
    }

    fn attach(&self, file: &File) {
        let area =
            |cpu: u32| Area { cpu: Cpu(cpu), offset: u64::from(cpu) << 20, bytes_max: 1 << 20, begins_again: false };
        self.slot().devices.drains.attach(file, None, 4096, vec![area(0), area(1)]).unwrap();
    }

    fn finish(&self, sent: u64) -> Vec<LaneLedger> {
        let (told, hears) = mpsc::channel();
        let ends = vec![LaneSent { cpu: Cpu(0), bytes_out: sent }];
        self.slot().devices.drains.finish(ends, 5000, Box::new(move |lanes| told.send(lanes).unwrap()));
        hears.recv_timeout(Duration::from_secs(20)).unwrap()
    }
}

fn is_ready(state: &GuestState) -> bool {
    state.agent.as_ref().is_some_and(|agent| agent.machine.is_some())
}

fn hello() -> Vec<u8> {
    encode(&Hello::ours("agent of a test")).unwrap()
}

fn machine() -> Vec<u8> {
    encode(&FromAgent::Machine(Machine::default())).unwrap()
}

fn page(time: u8) -> Vec<u8> {
    let mut page = vec![time; PAGE];
    page[..8].copy_from_slice(&u64::from(time).to_le_bytes());
    page[8..16].copy_from_slice(&100u64.to_le_bytes());
    page
}

/// Reads until a hello of the server has come.
fn await_hello(stream: &mut impl Read) {
    await_frame(stream, |frame| frame.family == Family::Hello);
}

/// Reads until one of the server's frames is the one that is waited for.
fn await_frame(stream: &mut impl Read, is_it: fn(&Frame) -> bool) {
    let (mut decoder, mut piece) = (Decoder::default(), [0; 4096]);
    loop {
        let count = stream.read(&mut piece).unwrap();
        decoder.push(&piece[..count]);
        while let Some(frame) = decoder.next_frame().unwrap() {
            let is_known = frame.open::<Hello>().is_ok() || frame.open::<ToAgent>().is_ok();
            assert!(is_known, "{frame:?}");
            if is_it(&frame) {
                return;
            }
        }
    }
}

#[test]
fn agent_is_there_when_it_has_met_us_and_a_second_hello_is_another_agents() {
    let trial = Trial::new(Transport::Socket);
    let mut agent = trial.connect("agent-ctl-path");
    await_hello(&mut agent);
    agent.write_all(&[hello(), machine()].concat()).unwrap();
    trial.await_state("ready", is_ready);
    assert_eq!(trial.slot().state().vmm_pid, Some(std::process::id()));
    // It dies in the middle of a frame; its successor has not heard of us.
    agent.write_all(&[&machine()[..13], &hello()].concat()).unwrap();
    trial.await_state("another", |state| state.agent.is_some() && !is_ready(state));
    await_hello(&mut agent);
    agent.write_all(&machine()).unwrap();
    trial.await_state("ready", is_ready);
    drop(agent);
    trial.await_state("gone", |state| state.vmm_pid.is_none() && state.agent.is_none());
    await_hello(&mut trial.connect("agent-ctl-path"));
    trial.server.stop();
}

#[test]
fn agent_that_took_our_hello_for_something_else_is_greeted_again() {
    let trial = Trial::new(Transport::Socket);
    let mut agent = trial.connect("agent-ctl-path");
    await_hello(&mut agent);
    agent.write_all(&hello()).unwrap();
    await_hello(&mut agent);
    agent.write_all(&machine()).unwrap();
    trial.await_state("ready", is_ready);
    trial.server.stop();
}

#[test]
fn pages_of_a_session_are_in_the_file_and_those_before_and_after_it_are_not() {
    let trial = Trial::new(Transport::Socket);
    let _agent = trial.connect("agent-ctl-path");
    let socket = trial.folder.socket("trace-path-cpu1").display().to_string();
    let mut lane = trial.connect("trace-path-cpu0");
    trial.await_port(Cpu(0));
    assert_eq!(trial.slot().devices.has_port(Cpu(1)), Err(Portless::NoStream(socket)));
    assert_eq!(trial.slot().devices.has_port(Cpu(2)), Err(Portless::NotSetUp(2)));
    for session in [1, 2] {
        let file = tempfile::tempfile().unwrap();
        lane.write_all(&page(99)[..1000]).unwrap();
        trial.attach(&file);
        lane.write_all(&[page(session), page(session + 10), page(50)[..70].to_vec()].concat()).unwrap();
        let counts = trial.finish(2 * 4096 + 70)[0];
        assert_eq!(
            (counts.ledger.pages_in, counts.ledger.pages_out, counts.bytes_torn, counts.bytes_missing),
            (2, 2, 70, Some(0))
        );
        trial.slot().devices.drains.detach();
        lane.write_all(&page(98)).unwrap();
        let mut back = vec![0; 2 * PAGE];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back, [page(session), page(session + 10)].concat());
    }
    trial.server.stop();
}

#[test]
fn stream_that_is_cut_ends_its_lane_and_the_next_session_has_the_new_one() {
    let trial = Trial::new(Transport::Socket);
    let _agent = trial.connect("agent-ctl-path");
    let mut lane = trial.connect("trace-path-cpu0");
    trial.await_port(Cpu(0));
    let file = tempfile::tempfile().unwrap();
    trial.attach(&file);
    lane.write_all(&[page(1), page(2)[..100].to_vec()].concat()).unwrap();
    drop(lane);
    let mut lane = trial.connect("trace-path-cpu0");
    lane.write_all(&page(3)).unwrap();
    let counts = trial.finish(3 * 4096)[0];
    assert_eq!((counts.ledger.pages_in, counts.ledger.pages_out, counts.bytes_torn), (1, 1, 100));
    assert_eq!(counts.bytes_missing, Some(3 * 4096 - 4196));
    trial.slot().devices.drains.detach();
    trial.await_port(Cpu(0));
    trial.attach(&file);
    lane.write_all(&page(4)).unwrap();
    assert_eq!(trial.finish(4096)[0].ledger.pages_out, 1);
    trial.server.stop();
}

/// A trial whose agent has been told to arm a session, and the client that did so.
fn arming() -> (Trial, UnixStream, Link) {
    let trial = Trial::new(Transport::Socket);
    let mut agent = trial.connect("agent-ctl-path");
    await_hello(&mut agent);
    agent.write_all(&[hello(), machine()].concat()).unwrap();
    trial.await_state("ready", is_ready);
    let mut link = Link::connect(&trial.root.path().join("run")).unwrap();
    let guest = || "guest1".to_owned();
    link.send(&ToServer::Claim { guest: guest() }).unwrap();
    assert!(matches!(link.receive(Some(Duration::from_secs(20))), Ok(Some(FromServer::Claimed(_)))));
    link.send(&ToServer::Agent { guest: guest(), request: ToAgent::Arm(Box::default()) }).unwrap();
    await_frame(&mut agent, |frame| matches!(frame.open(), Ok(ToAgent::Arm(_))));
    (trial, agent, link)
}

#[test]
fn silent_agent_is_waited_for_while_it_has_a_session_and_not_while_it_is_idle_or_arms_one() {
    let (standing, mut agent, mut link) = arming();
    agent.write_all(&encode(&FromAgent::Armed(Armed::default())).unwrap()).unwrap();
    let answer = link.receive(Some(Duration::from_secs(20)));
    assert!(matches!(answer, Ok(Some(FromServer::Agent { answer: FromAgent::Armed(_), .. }))), "{answer:?}");
    let (unarmed, _agent, _link) = arming();
    let idle = Trial::new(Transport::Socket);
    let mut other = idle.connect("agent-ctl-path");
    other.write_all(&[hello(), machine()].concat()).unwrap();
    idle.await_state("ready", is_ready);

    sleep(super::control::SILENCE_MAX);
    unarmed.await_state("gone", |state| state.agent.is_none() && state.vmm_pid.is_some());
    idle.await_state("gone", |state| state.agent.is_none());
    sleep(Duration::from_secs(1));
    let state = standing.slot().state();
    assert!(is_ready(&state) && state.silent_s >= 10, "{state:?}");

    // It wakes up, and is silent no more.
    agent.write_all(&encode(&FromAgent::Pong { id: 7 }).unwrap()).unwrap();
    standing.await_state("heard", |state| is_ready(state) && state.silent_s == 0);
    let answer = link.receive(Some(Duration::from_secs(20)));
    assert!(matches!(answer, Ok(Some(FromServer::Agent { answer: FromAgent::Pong { id: 7 }, .. }))), "{answer:?}");
    // Another agent's hello ends the session as ever.
    agent.write_all(&hello()).unwrap();
    let gone = FromServer::Gone { guest: "guest1".into(), what: Gone::Agent };
    assert_eq!(link.receive(Some(Duration::from_secs(20))).unwrap(), Some(gone));
    [standing, unarmed, idle].into_iter().for_each(|trial| trial.server.stop());
}

/// QEMU's end of a FIFO: it opens both for reading and writing.
fn held(path: std::path::PathBuf) -> File {
    File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
}

#[test]
fn fifos_are_served_in_whatever_order_their_ends_come() {
    let trial = Trial::new(Transport::Pipe);
    for boot in [1, 2] {
        let to_agent = held(trial.folder.fifo_in("agent-ctl-path"));
        let mut agent = held(trial.folder.fifo_out("agent-ctl-path"));
        let mut lane = held(trial.folder.fifo_out("trace-path-cpu0"));
        agent.write_all(&hello()).unwrap();
        trial.await_state("connected", |state| state.vmm_pid == Some(0));
        await_hello(&mut Patient(to_agent.try_clone().unwrap()));
        agent.write_all(&machine()).unwrap();
        trial.await_state("ready", is_ready);
        let file = tempfile::tempfile().unwrap();
        trial.attach(&file);
        lane.write_all(&[page(boot), page(7)].concat()).unwrap();
        assert_eq!(trial.finish(8192)[0].ledger.pages_out, 2);
        trial.slot().devices.drains.detach();
        drop((to_agent, agent, lane));
        trial.await_state("gone", |state| state.vmm_pid.is_none() && state.agent.is_none());
    }
    trial.server.stop();
}

/// A file that does not block, read as if it did.
struct Patient(File);

impl Read for Patient {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        for _ in 0..1000 {
            match self.0.read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(Duration::from_millis(10)),
                read => return read,
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}
