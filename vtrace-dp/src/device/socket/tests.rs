//! A device between a pretended VMM with its guest and an owner that writes down what it is told.

use std::{
    os::fd::BorrowedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use proptest::prelude::*;
use vtrace_common::{
    ids::{Cpu, GuestId},
    time::GuestTsc,
    wire::{
        Capabilities, Fault, Hello,
        agent::{Echo, FromAgent, ToAgent},
        client::DriverState,
        encode,
    },
};

use super::*;
use crate::{
    device::{
        AgentEvent, ControlPort,
        testing::vmm::{DEVICE_READY, Machine, PATIENCE, PORT_OPEN, PORT_READY, Vmm, code, control},
    },
    server::outbox::Notifier,
    sys::tsc,
};

/// What the device told its owner.
#[derive(Clone, PartialEq, Debug)]
enum Reported {
    Vmm(bool),
    Driver(DriverState, usize),
    Agent(AgentEvent),
}

/// An owner that writes down what it is told.
struct Witness {
    told: mpsc::Sender<Reported>,
    requests: Arc<Mutex<Vec<ToAgent>>>,
    room: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    notifier: Arc<Notifier>,
}

impl Owner for Witness {
    fn wake(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }
    fn turn(&mut self, port: &mut ControlPort) -> Turn {
        self.requests.lock().unwrap().drain(..).for_each(|request| port.send(&request).unwrap());
        if self.ended.load(Ordering::SeqCst) { Turn::Stop } else { Turn::Continue }
    }
    fn deadline(&self) -> Option<Instant> {
        None
    }
    fn has_room(&mut self) -> bool {
        self.room.load(Ordering::SeqCst)
    }
    fn vmm(&mut self, peer: Option<Peer>) {
        let _ = self.told.send(Reported::Vmm(peer.is_some()));
    }
    fn driver(&mut self, state: DriverState, ports: usize) {
        let _ = self.told.send(Reported::Driver(state, ports));
    }
    fn agent(&mut self, event: AgentEvent, _port: &mut ControlPort) {
        assert!(event != AgentEvent::Says(FromAgent::Pong { id: POISON }), "the owner's bug");
        let _ = self.told.send(Reported::Agent(event));
    }
}

/// A pong that makes the owner panic.
const POISON: u32 = 0xdead;

/// A device under test.
struct TestDevice {
    told: mpsc::Receiver<Reported>,
    requests: Arc<Mutex<Vec<ToAgent>>>,
    room: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    notifier: Arc<Notifier>,
    device: Option<Device>,
}

impl TestDevice {
    fn new(endpoint: Endpoint) -> Self {
        Self::named("test", endpoint)
    }

    fn named(name: &str, endpoint: Endpoint) -> Self {
        let (told, hears) = mpsc::channel();
        let (requests, notifier) = (Arc::default(), Arc::new(Notifier::new().unwrap()));
        let (room, ended) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        let witness = Witness {
            told,
            requests: Arc::clone(&requests),
            room: Arc::clone(&room),
            ended: Arc::clone(&ended),
            notifier: Arc::clone(&notifier),
        };
        let drain = Arc::new(RingDrain::spawn(GuestId(0), "test").unwrap());
        let device =
            Device::spawn(name, LaneRange::ONLY, endpoint, MemoryShare::default(), drain, Box::new(witness)).unwrap();
        Self { told: hears, requests, room, ended, notifier, device: Some(device) }
    }

    fn next(&self) -> Reported {
        self.told.recv_timeout(PATIENCE).expect("the device tells its owner")
    }

    /// The next thing an agent did.
    fn agent(&self) -> AgentEvent {
        loop {
            if let Reported::Agent(event) = self.next() {
                return event;
            }
        }
    }

    /// Whether nothing was told that has not been looked at.
    fn is_quiet(&self) -> bool {
        self.told.try_recv().is_err()
    }

    fn send(&self, request: ToAgent) {
        self.requests.lock().unwrap().push(request);
        self.notifier.notify();
    }
}

impl Drop for TestDevice {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        self.notifier.notify();
        self.device.take().unwrap().join();
    }
}

/// A device and a guest whose driver is loaded.
fn booted(ports: usize) -> (TestDevice, Machine) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let bench = TestDevice::new(Endpoint::Connected(ours));
    let mut machine = Machine::realize(theirs, ports);
    machine.start();
    assert_eq!(bench.next(), Reported::Vmm(true));
    assert_eq!(bench.next(), Reported::Driver(DriverState::Running, ports));
    (bench, machine)
}

/// The same with an agent.
fn talking(ports: usize) -> (TestDevice, Machine) {
    let (bench, mut machine) = booted(ports);
    machine.probe();
    machine.start_agent();
    assert_eq!(bench.agent(), AgentEvent::Opened);
    assert_eq!(bench.agent(), AgentEvent::Hello(Hello::ours("agent of a test")));
    assert!(matches!(bench.agent(), AgentEvent::Says(FromAgent::Machine(_))));
    (bench, machine)
}

fn pong(id: u32) -> FromAgent {
    FromAgent::Pong { id }
}

#[test]
fn driver_finds_as_many_named_and_open_ports_as_the_vmm_made_rings_for() {
    let (_bench, mut machine) = booted(3);
    assert_eq!(machine.ports_configured(), 3);
    assert_eq!(machine.probe(), ["agent-ctl-path", "trace-path-cpu0", "trace-path-cpu1"]);
    assert!(machine.told_nothing());
}

#[test]
fn largest_device_has_127_ports() {
    let (_bench, mut machine) = booted(127);
    assert_eq!(machine.probe().last().unwrap(), "trace-path-cpu125");
}

#[test]
fn agent_is_greeted_and_heard() {
    let (bench, mut machine) = talking(2);
    machine.answer(&pong(7));
    assert_eq!(bench.agent(), AgentEvent::Says(pong(7)));
    bench.send(ToAgent::Stop);
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Stop);
}

#[test]
fn probe_and_echo_are_stamped_inside_what_the_test_sees() {
    let (bench, mut machine) = talking(2);
    let before = tsc::read();
    bench.send(ToAgent::Probe { id: 5, cpu: Cpu(1) });
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Probe { id: 5, cpu: Cpu(1) });
    let echo = Echo { id: 5, cpu: Cpu(1), received: GuestTsc(tsc::read()), sent: GuestTsc(tsc::read()) };
    machine.answer(&FromAgent::Echo(echo));
    let AgentEvent::Echo { host_sent, echo: heard, host_received } = bench.agent() else { panic!("no echo") };
    assert_eq!(heard, echo);
    assert!(before <= host_sent.0 && host_sent.0 <= echo.received.0, "stamped before the guest could see it");
    assert!(echo.sent.0 <= host_received.0 && host_received.0 <= tsc::read());
}

#[test]
fn echo_of_a_probe_that_was_never_sent_is_ignored() {
    let (bench, mut machine) = talking(1);
    let echo = Echo { id: 9, cpu: Cpu(0), received: GuestTsc(0), sent: GuestTsc(0) };
    for _ in 0..1000 {
        machine.answer(&FromAgent::Echo(echo));
    }
    machine.answer(&pong(1));
    assert_eq!(bench.agent(), AgentEvent::Says(pong(1)));
}

#[test]
fn what_a_closing_agent_wrote_is_heard_before_it_is_gone() {
    let (bench, mut machine) = talking(1);
    for id in 0..40 {
        machine.answer(&pong(id));
    }
    machine.say(0, PORT_OPEN, 0);
    (0..40).for_each(|id| assert_eq!(bench.agent(), AgentEvent::Says(pong(id))));
    assert_eq!(bench.agent(), AgentEvent::Gone);
}

#[test]
fn half_a_frame_of_a_dead_agent_does_not_reach_its_successor() {
    let (bench, mut machine) = talking(1);
    let frame = encode(&pong(3)).unwrap();
    machine.write(&frame[..frame.len() - 1]);
    machine.say(0, PORT_OPEN, 0);
    assert_eq!(bench.agent(), AgentEvent::Gone);
    machine.start_agent();
    assert_eq!(bench.agent(), AgentEvent::Opened);
    assert!(matches!(bench.agent(), AgentEvent::Hello(_)));
}

#[test]
fn garbled_agent_is_ignored_until_it_opens_again_and_does_not_block_the_device() {
    let (bench, mut machine) = talking(1);
    machine.write(&[0xff; 100]);
    assert!(matches!(bench.agent(), AgentEvent::Garbled(Fault::Magic(_))));
    for id in 0..200 {
        machine.answer(&pong(id));
    }
    machine.say(0, PORT_OPEN, 0);
    assert_eq!(bench.agent(), AgentEvent::Gone);
    machine.start_agent();
    assert_eq!(bench.agent(), AgentEvent::Opened);
}

#[test]
fn agent_of_another_version_is_shown_and_not_spoken_to() {
    let (bench, mut machine) = booted(1);
    machine.probe();
    machine.say(0, PORT_OPEN, 1);
    let hello = Hello {
        version_min: 9,
        version_max: 12,
        software: "of the future".into(),
        capabilities: Capabilities::default(),
    };
    machine.write(&encode(&hello).unwrap());
    machine.answer(&pong(1));
    assert_eq!(bench.agent(), AgentEvent::Opened);
    assert_eq!(bench.agent(), AgentEvent::Hello(hello));
    machine.say(0, PORT_OPEN, 0);
    assert_eq!(bench.agent(), AgentEvent::Gone, "the pong was not heard");
}

#[test]
fn agents_ring_is_left_alone_while_the_owner_has_no_room_and_nothing_is_lost() {
    let (bench, mut machine) = talking(1);
    bench.room.store(false, Ordering::SeqCst);
    machine.out[0].reclaim();
    let free = machine.out[0].free();
    for id in 0..10 {
        machine.answer(&pong(id));
    }
    machine.vmm.settle();
    // The control queue is served all the same.
    machine.say(1, PORT_READY, 0);
    machine.out[0].reclaim();
    assert_eq!(machine.out[0].free(), free - 10, "no chain was taken");
    assert!(bench.is_quiet());
    bench.room.store(true, Ordering::SeqCst);
    bench.notifier.notify();
    (0..10).for_each(|id| assert_eq!(bench.agent(), AgentEvent::Says(pong(id))));
}

#[test]
fn many_frames_in_one_chain_are_taken_as_room_allows() {
    let (bench, mut machine) = talking(1);
    let frames: Vec<u8> = (0..1500).flat_map(|id| encode(&pong(id)).unwrap()).collect();
    machine.write(&frames);
    (0..1500).for_each(|id| assert_eq!(bench.agent(), AgentEvent::Says(pong(id))));
}

#[test]
fn long_request_is_cut_into_the_guests_buffers() {
    let (bench, mut machine) = talking(1);
    let text = "m".repeat(4000);
    bench.send(ToAgent::Start { marker: text.clone() });
    bench.send(ToAgent::Mark { text: text.clone() });
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Start { marker: text.clone() });
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Mark { text });
}

#[test]
fn stopped_and_continued_guest_goes_on_in_mid_sentence() {
    let (bench, mut machine) = talking(2);
    let frame = encode(&pong(77)).unwrap();
    machine.write(&frame[..5]);
    machine.vmm.settle();
    let bases = machine.stop_rings();
    assert!(bases[1] >= 2 && bases[3] >= 4, "agent's and control ring have moved: {bases:?}");
    assert_eq!(bench.next(), Reported::Driver(DriverState::Absent, 2));
    machine.start_rings(&bases);
    assert_eq!(bench.next(), Reported::Driver(DriverState::Running, 2));
    machine.write(&frame[5..]);
    assert_eq!(bench.agent(), AgentEvent::Says(pong(77)));
    bench.send(ToAgent::Stop);
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Stop);
    assert!(machine.told_nothing());
}

#[test]
fn rebooted_guest_has_no_agent_and_finds_its_ports_again() {
    let (bench, machine) = talking(2);
    let mut machine = machine.reboot();
    assert_eq!(machine.probe().len(), 2);
    assert_eq!(bench.agent(), AgentEvent::Gone);
    machine.start_agent();
    assert_eq!(bench.agent(), AgentEvent::Opened);
}

#[test]
fn agent_of_a_guest_that_slept_goes_on_and_is_spoken_to_when_its_port_is_open_again() {
    let (bench, machine) = talking(2);
    bench.send(ToAgent::Mark { text: "before".into() });
    let mut machine = machine;
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Mark { text: "before".into() });
    // Linux resets the device, sets it up again, and never says that it is ready.
    let mut machine = machine.reboot();
    for id in 1..=3 {
        bench.send(ToAgent::Ping { id });
    }
    bench.send(ToAgent::Mark { text: "after".into() });
    for port in [0, 1] {
        assert!(machine.wakes(port).starts_with(if port == 0 { "agent" } else { "trace" }));
    }
    assert_eq!(machine.read_nothing(), None, "its port is not open");
    machine.say(0, PORT_OPEN, 1);
    machine.answer(&pong(1));
    assert_eq!(bench.agent(), AgentEvent::Says(pong(1)), "neither gone nor opened");
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Ping { id: 1 }, "one of many");
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Mark { text: "after".into() });
}

#[test]
fn agent_that_took_a_sleep_for_our_end_is_greeted_again() {
    let (bench, machine) = talking(2);
    let mut machine = machine.reboot();
    machine.wakes(0);
    machine.say(0, PORT_OPEN, 1);
    bench.send(ToAgent::Stop);
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Stop);
    let hello = Hello::ours("agent of a test");
    machine.write(&encode(&hello).unwrap());
    assert_eq!(bench.agent(), AgentEvent::Hello(hello));
    assert_eq!(machine.read::<Hello>(), Hello::ours(vtrace_common::SOFTWARE));
    machine.answer(&pong(2));
    assert_eq!(bench.agent(), AgentEvent::Says(pong(2)));
}

#[test]
fn driver_that_says_ready_again_has_nothing_open() {
    let (bench, mut machine) = talking(2);
    machine.probe();
    assert_eq!(bench.agent(), AgentEvent::Gone);
    machine.start_agent();
    assert_eq!(bench.agent(), AgentEvent::Opened);
}

#[test]
fn driver_without_indirect_descriptors_is_served_and_unfit() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let bench = TestDevice::new(Endpoint::Connected(ours));
    let mut machine = Machine::realize(theirs, 2);
    machine.accept_all_but(1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC);
    machine.start();
    assert_eq!(bench.next(), Reported::Vmm(true));
    assert_eq!(bench.next(), Reported::Driver(DriverState::Unfit("VIRTIO_RING_F_INDIRECT_DESC".into()), 2));
    assert_eq!(machine.probe().len(), 2);
}

#[test]
fn private_memory_is_reported_and_the_socket_stays_open() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let bench = TestDevice::new(Endpoint::Connected(ours));
    let machine = Machine::realize(theirs, 2);
    machine.vmm.send(code::SET_FEATURES, 0, &machine.accepted.to_le_bytes(), None);
    assert!(machine.vmm.ask_ack(code::SET_MEM_TABLE, &[0; 8], None), "QEMU must not hear no");
    machine.start_rings(&[0; 6]);
    assert_eq!(bench.next(), Reported::Vmm(true));
    assert_eq!(bench.next(), Reported::Driver(DriverState::MemoryNotShared, 2));
    machine.set_memory();
    assert_eq!(bench.next(), Reported::Driver(DriverState::Running, 2), "memory that comes late is used");
}

#[test]
fn memory_can_be_replaced_while_rings_run() {
    let (bench, mut machine) = talking(2);
    machine.set_memory();
    machine.answer(&pong(1));
    assert_eq!(bench.agent(), AgentEvent::Says(pong(1)));
}

#[test]
fn bad_requests_are_skipped_and_the_guest_is_served() {
    let (bench, mut machine) = talking(2);
    let vmm = &machine.vmm;
    vmm.send(999, 0, &[1; 30], None);
    assert!(!vmm.ask_ack(77, &[], None));
    vmm.send(code::SET_VRING_NUM, 0, &[1; 3], None);
    vmm.send(code::SET_VRING_BASE, 0, &[500u32, 1].map(u32::to_le_bytes).concat(), None);
    assert_eq!(vmm.ask(code::GET_VRING_BASE, &[500u32, 0].map(u32::to_le_bytes).concat()).len(), 8);
    vmm.send(code::SET_MEM_TABLE, 0, &[9; 40], None);
    vmm.send(code::ADD_MEM_REG, 0, &[0; 40], None);
    assert!(vmm.ask_ack(code::SET_VRING_ENABLE, &[1u32, 1].map(u32::to_le_bytes).concat(), None));
    machine.answer(&pong(1));
    assert_eq!(bench.agent(), AgentEvent::Says(pong(1)));
    assert!(bench.is_quiet());
}

#[test]
fn half_a_request_does_not_stop_the_control_queue() {
    let (bench, mut machine) = talking(2);
    send_piece(&machine, &[code::GET_FEATURES, 1].map(u32::to_le_bytes).concat());
    machine.say(0, PORT_OPEN, 0);
    assert_eq!(bench.agent(), AgentEvent::Gone);
    send_piece(&machine, &0u32.to_le_bytes());
    assert_eq!(machine.vmm.answer(code::GET_FEATURES).len(), 8);
}

fn send_piece(machine: &Machine, bytes: &[u8]) {
    crate::sys::socket::send_all(machine.vmm.socket.as_fd(), bytes, &[]).unwrap();
}

#[test]
fn panic_in_the_owner_ends_the_agent_and_nothing_else() {
    let (bench, mut machine) = talking(1);
    for _ in 0..50 {
        // Taken before the port is closed, or while it is: the control queue is served in either case.
        machine.answer(&pong(POISON));
        machine.answer(&pong(1));
        machine.say(0, PORT_OPEN, 0);
        assert_eq!(bench.agent(), AgentEvent::Gone, "the pong after it was not heard");
        machine.start_agent();
        assert_eq!(bench.agent(), AgentEvent::Opened);
        assert!(matches!(bench.agent(), AgentEvent::Hello(_)));
        assert!(matches!(bench.agent(), AgentEvent::Says(FromAgent::Machine(_))));
    }
}

#[test]
fn next_vmm_finds_the_device_as_new() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest.sock");
    let bench = TestDevice::new(Endpoint::Listening(UnixListener::bind(&path).unwrap()));
    for ports in [2, 3] {
        let mut machine = Machine::realize(UnixStream::connect(&path).unwrap(), ports);
        assert_eq!(bench.next(), Reported::Vmm(true));
        assert_eq!(machine.ports_configured(), u32::try_from(ports).unwrap());
        machine.start();
        assert_eq!(machine.probe().len(), ports);
        machine.start_agent();
        assert_eq!(bench.agent(), AgentEvent::Opened);
        drop(machine);
        while bench.next() != Reported::Vmm(false) {}
        assert!(bench.is_quiet());
    }
}

#[test]
fn second_vmm_is_turned_away() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest.sock");
    let _bench = TestDevice::new(Endpoint::Listening(UnixListener::bind(&path).unwrap()));
    let machine = Machine::realize(UnixStream::connect(&path).unwrap(), 2);
    let mut second = UnixStream::connect(&path).unwrap();
    assert_eq!(std::io::Read::read(&mut second, &mut [0; 1]).unwrap(), 0);
    assert_eq!(machine.ports_configured(), 2);
}

#[test]
fn idle_device_sleeps() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let bench = TestDevice::named("idle", Endpoint::Connected(ours));
    let mut machine = Machine::realize(theirs, 2);
    machine.start();
    machine.probe();
    machine.start_agent();
    while !matches!(bench.agent(), AgentEvent::Says(_)) {}
    std::thread::sleep(Duration::from_millis(100));
    let before = switches("vt-dev/idle");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(switches("vt-dev/idle"), before, "it was woken for nothing");
}

/// How often the thread of this name has gone to sleep.
fn switches(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let statuses = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).ok());
    let status = statuses.into_iter().find(|status| status.starts_with(&format!("Name:\t{name}\n"))).unwrap();
    let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap();
    line.split_whitespace().last().unwrap().parse().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_bytes_on_control_and_agent_ring_leave_a_device_that_answers(
        messages in proptest::collection::vec((any::<bool>(), hostile()), 1..40),
    ) {
        let (_bench, mut machine) = booted(2);
        let control_ring = 2;
        for (to_control, bytes) in messages {
            machine.spin(if to_control { control_ring } else { 0 }, &bytes);
            // As a driver would: buffers are given back.
            while !machine.told_nothing() {}
        }
        prop_assert_eq!(machine.probe().len(), 2);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_requests_leave_a_device_that_serves_the_next_vmm(
        requests in proptest::collection::vec((0u32..50, 0u32..16, body()), 1..40),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guest.sock");
        let bench = TestDevice::new(Endpoint::Listening(UnixListener::bind(&path).unwrap()));
        let vmm = Vmm { socket: UnixStream::connect(&path).unwrap() };
        for (request, flags, body) in requests {
            vmm.send(request, flags, &body, None);
        }
        prop_assert_eq!(bench.next(), Reported::Vmm(true));
        drop(vmm);
        while bench.next() != Reported::Vmm(false) {}
        let mut machine = Machine::realize(UnixStream::connect(&path).unwrap(), 2);
        machine.start();
        prop_assert_eq!(machine.probe().len(), 2);
    }
}

/// Bodies of requests: small numbers, as ring indices are, or anything.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let words = proptest::collection::vec(0u32..300, 0..12)
        .prop_map(|words| words.into_iter().flat_map(u32::to_le_bytes).collect());
    prop_oneof![words, proptest::collection::vec(any::<u8>(), 0..64)]
}

/// Messages as an attacker would choose them: mostly almost right.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let almost = (prop_oneof![0u32..4, any::<u32>()], prop_oneof![0u16..9, any::<u16>()], 0u16..3)
        .prop_map(|(id, event, value)| control(id, event, value));
    let frames = prop_oneof![
        Just(encode(&Hello::ours("hostile")).unwrap()),
        Just(encode(&FromAgent::Stopped).unwrap()),
        Just(control(u32::MAX, DEVICE_READY, 1)),
    ];
    prop_oneof![almost, frames, proptest::collection::vec(any::<u8>(), 0..64)]
}
