//! A guest that has two devices, of two lanes each.

use std::process::Command;

use vtrace_common::wire::{
    agent::{Failure, FailureKind},
    client::{DeviceState, LaneSent},
};

use super::*;
use crate::device::{negotiate, testing::vmm::DEVICE_READY};

/// Where the other process of a test connects to.
const ELSEWHERE: &str = "VTRACE_TEST_CONNECTS_TO";

fn house() -> House {
    House::of(|config| {
        config.guests[0].devices = 2;
        config.guests[0].lanes = 2;
    })
}

fn connect(house: &House) -> UnixStream {
    UnixStream::connect(house.path().join("guest1@2.sock")).unwrap()
}

/// The second device of the guest, with all its ports open.
fn second(house: &House) -> Machine {
    let mut machine = Machine::realize(connect(house), 3);
    machine.start();
    assert_eq!(machine.probe_ports(1..3), ["trace-path-cpu2", "trace-path-cpu3"]);
    machine.vmm.settle();
    machine
}

fn further(house: &House) -> DeviceState {
    house.state("guest1").further[0].clone()
}

fn await_further(house: &House, is_so: impl Fn(&DeviceState) -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_so(&further(house)) {
        assert!(Instant::now() < until, "{:?}", further(house));
        std::thread::yield_now();
    }
}

fn lanes_of(cpus: &[u32]) -> ToServer {
    let area =
        |cpu: &u32| Area { cpu: Cpu(*cpu), offset: u64::from(*cpu) * 8192, bytes_max: 8192, begins_again: false };
    ToServer::Lanes(Lanes { guest: guest1(), page_bytes: 4096, areas: cpus.iter().map(area).collect() })
}

/// A page: time stamp, then the bytes committed, then what tells it from others.
fn page(cpu: u8) -> Vec<u8> {
    let mut page = vec![0x10 + cpu; 4096];
    page[8..16].copy_from_slice(&4080u64.to_le_bytes());
    page
}

#[test]
fn guest_of_two_devices_is_one_guest_with_all_their_lanes() {
    let house = house();
    let (mut first, mut second, mut link) = (house.guest("guest1"), second(&house), house.link());
    assert!(is_claimed(&claim(&mut link)));
    let file = tempfile::tempfile().unwrap();
    link.send_with_files(&lanes_of(&[0, 1, 2, 3]), &[&file]).unwrap();
    assert_eq!(next(&mut link), FromServer::LanesReady { guest: guest1() });
    for (machine, cpus) in [(&mut first, [0, 1]), (&mut second, [2, 3])] {
        for (port, cpu) in (1..).zip(cpus) {
            machine.out[port].send_blocking(&page(cpu), 4096);
        }
    }
    let ends = (0..4).map(|cpu| LaneSent { cpu: Cpu(cpu), bytes_out: 4096 }).collect();
    let answer = ask(&mut link, &ToServer::Finish { guest: guest1(), sent: ends, wait_ms_max: 5000 });
    let FromServer::Finished { lanes, .. } = answer else { panic!("not finished: {answer:?}") };
    let counts: Vec<_> = lanes.iter().map(|lane| (lane.cpu.0, lane.ledger.pages_in, lane.ledger.pages_out)).collect();
    assert_eq!(counts, [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1)]);
    assert_eq!(ask(&mut link, &ToServer::Ledger { guest: guest1() }), refused_without_lanes());
    for cpu in 0..4u8 {
        let mut written = vec![0; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut written, u64::from(cpu) * 8192).unwrap();
        assert_eq!(written, page(cpu), "cpu{cpu}");
    }
    release(&mut link);
}

/// The answer to a request for a ledger after the session has ended.
fn refused_without_lanes() -> FromServer {
    let detail = "the guest has no lanes yet".into();
    FromServer::Refused(Refusal::State { guest: guest1(), detail })
}

#[test]
fn devices_have_the_same_ports_in_whatever_order_they_come() {
    let house = house();
    let _second = second(&house);
    await_further(&house, |device| device.driver == DriverState::Running);
    assert_eq!(further(&house).vmm_pid, Some(std::process::id()));
    assert!(matches!(refusal(claim(&mut house.link())), Refusal::NotConnected { .. }), "the first one is the guest");
    let socket = UnixStream::connect(house.path().join("guest1.sock")).unwrap();
    let mut first = Machine::realize(socket, 3);
    first.start();
    assert_eq!(first.probe(), ["agent-ctl-path", "trace-path-cpu0", "trace-path-cpu1"]);
}

#[test]
fn lane_whose_device_is_absent_is_refused_and_the_device_is_named() {
    let house = house();
    let (mut machine, mut link) = (house.guest("guest1"), house.link());
    assert!(is_claimed(&claim(&mut link)));
    link.send_with_files(&lanes_of(&[1, 2]), &[&tempfile::tempfile().unwrap()]).unwrap();
    let Refusal::Request { detail } = refusal(next(&mut link)) else { panic!("another refusal") };
    assert!(detail.contains("cpu2 has no port") && detail.contains("guest1@2.sock"), "{detail}");
    let failure = |detail: &str| Failure {
        kind: FailureKind::NoPort,
        object: "trace-path-cpu2".into(),
        detail: detail.into(),
        near: vec![],
    };
    machine.answer(&FromAgent::Failed(failure("no virtio port has this name")));
    let FromServer::Agent { answer: FromAgent::Failed(said), .. } = next(&mut link) else { panic!("not a failure") };
    assert!(said.detail.contains("guest1@2.sock"), "{said:?}");
    link.send_with_files(&lanes_of(&[0, 1]), &[&tempfile::tempfile().unwrap()]).unwrap();
    assert_eq!(next(&mut link), FromServer::LanesReady { guest: guest1() }, "the others can be had");
}

#[test]
fn further_device_that_goes_is_reported_to_the_holder_who_keeps_the_agent() {
    let house = house();
    let (mut machine, gone, mut link) = (house.guest("guest1"), second(&house), house.link());
    assert!(is_claimed(&claim(&mut link)));
    drop(gone);
    assert_eq!(next(&mut link), FromServer::Gone { guest: guest1(), what: Gone::Device });
    machine.answer(&FromAgent::Pong { id: 1 });
    assert_eq!(next(&mut link), from_agent(FromAgent::Pong { id: 1 }));
    assert_eq!(further(&house), DeviceState { vmm_pid: None, driver: DriverState::Absent });
    release(&mut link);
    let _second = second(&house);
    assert!(is_claimed(&claim(&mut link)), "and it can come back");
    assert_eq!(link.receive(Some(Duration::from_millis(50))).unwrap(), None, "nothing is gone any more");
}

#[test]
fn further_device_has_no_control_port_and_no_more_ports_than_lanes() {
    let house = house();
    let (mut first, mut link) = (house.guest("guest1"), house.link());
    let mut machine = Machine::realize(connect(&house), 6);
    machine.start();
    assert_eq!(machine.probe_ports(1..3).len(), 2);
    assert!(is_claimed(&claim(&mut link)));
    // A process that opens a control port there and speaks like an agent is ignored.
    machine.say(0, PORT_OPEN, 1);
    machine.write(&encode(&Hello::ours("impostor")).unwrap());
    machine.answer(&FromAgent::Stopped);
    machine.say(3, PORT_OPEN, 1);
    assert!(machine.told_nothing());
    assert_eq!(house.state("guest1").agent.unwrap().hello.software, "agent of a test");
    assert!(machine.out[3].send(&page(9), 4096), "a ring that is not served has room");
    link.send_with_files(&lanes_of(&[2, 3]), &[&tempfile::tempfile().unwrap()]).unwrap();
    assert_eq!(next(&mut link), FromServer::LanesReady { guest: guest1() });
    let answer = ask(&mut link, &ToServer::Finish { guest: guest1(), sent: vec![], wait_ms_max: 0 });
    let FromServer::Finished { lanes, .. } = answer else { panic!("not finished: {answer:?}") };
    assert_eq!(lanes.iter().map(|lane| lane.ledger.pages_in).collect::<Vec<_>>(), [0, 0]);
    first.answer(&FromAgent::Pong { id: 1 });
    assert_eq!(next(&mut link), from_agent(FromAgent::Pong { id: 1 }), "the agent is heard, the impostor was not");
}

#[test]
fn device_whose_driver_would_lose_pages_makes_its_guest_unfit() {
    let house = house();
    let _first = house.guest("guest1");
    let mut machine = Machine::realize(connect(&house), 3);
    machine.accept_all_but(1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC);
    assert_ne!(machine.accepted, negotiate::offered());
    machine.start();
    machine.say(u32::MAX, DEVICE_READY, 1);
    await_further(&house, |device| matches!(device.driver, DriverState::Unfit(_)));
    let state = DriverState::Unfit("VIRTIO_RING_F_INDIRECT_DESC".into());
    assert_eq!(refusal(claim(&mut house.link())), Refusal::Driver { guest: guest1(), state });
}

#[test]
fn another_process_gets_no_device_of_a_guest_that_has_a_vmm() {
    let house = house();
    let _first = house.guest("guest1");
    let mut other = Command::new(std::env::current_exe().unwrap());
    other.args(["--exact", "server::tests::devices::process_that_is_told_to_connect_is_turned_away"]);
    let output = other.env(ELSEWHERE, house.path().join("guest1@2.sock")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    assert_eq!(further(&house).vmm_pid, None);
    let _second = second(&house);
}

/// The other process of the test above; without its word there is nothing to do.
#[test]
fn process_that_is_told_to_connect_is_turned_away() {
    let Some(socket) = std::env::var_os(ELSEWHERE) else { return };
    let mut socket = UnixStream::connect(socket).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0, "closed without a word");
}

#[test]
fn further_devices_are_served_until_the_agent_has_closed_its_session() {
    let house = house();
    let (mut first, mut second, mut link) = (house.guest("guest1"), second(&house), house.link());
    assert!(is_claimed(&claim(&mut link)));
    arm(&mut link, &mut first);
    let guest = std::thread::spawn(move || {
        assert_eq!(first.read::<ToAgent>(), ToAgent::Close);
        second.say(1, PORT_OPEN, 0);
        first.answer(&FromAgent::Closed);
        (first, second)
    });
    drop(house);
    guest.join().unwrap();
}
