//! A connection whose other end is a test.

use std::{fs::File, io::Write, os::fd::BorrowedFd};

use proptest::prelude::*;
use vtrace_common::ids::GuestId;

use super::*;
use crate::{
    device::{
        AgentEvent, ControlPort, Owner, Turn,
        device_rings::DeviceRings,
        lane_range::LaneRange,
        testing::vmm::{Vmm, code},
    },
    drain::ring::RingDrain,
    sys::{
        log_limit::PeerLog,
        socket::{Peer, send_all},
        wait::Waker,
    },
    virtq::memory::budget::MemoryShare,
};

/// An owner that does nothing.
struct Idle(Waker);

impl Owner for Idle {
    fn wake(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
    fn turn(&mut self, _port: &mut ControlPort) -> Turn {
        Turn::Continue
    }
    fn deadline(&self) -> Option<Instant> {
        None
    }
    fn has_room(&mut self) -> bool {
        true
    }
    fn vmm(&mut self, _peer: Option<Peer>) {}
    fn driver(&mut self, _state: vtrace_common::wire::client::DriverState, _ports: usize) {}
    fn agent(&mut self, _event: AgentEvent, _port: &mut ControlPort) {}
}

fn connected() -> (Vmm, Connection, Arc<Mutex<Backend>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let log = Arc::new(PeerLog::new("test"));
    let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let owner = Box::new(Idle(Waker::new().unwrap()));
    let rings = DeviceRings::new(Arc::clone(&log), LaneRange::ONLY, owner, Arc::new(epoll), 0);
    let drain = Arc::new(RingDrain::spawn(GuestId(0), "test").unwrap());
    let backend = Arc::new(Mutex::new(Backend::new(log, LaneRange::ONLY, drain, rings, MemoryShare::default())));
    let connection = Connection::new(ours, Arc::clone(&backend)).unwrap();
    (Vmm { socket: theirs }, connection, backend)
}

fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    [&[code, flags, size].map(u32::to_le_bytes).concat()[..], body].concat()
}

/// Serves until there is nothing to do; what was wrong.
fn serve(connection: &mut Connection, backend: &Mutex<Backend>) -> Result<Vec<RequestFault>, ConnectionError> {
    let mut faults = Vec::new();
    loop {
        match connection.step(backend)? {
            Progress::Waits => return Ok(faults),
            Progress::DeviceRings => {}
            Progress::Faulty(fault) => faults.push(fault),
        }
    }
}

#[test]
fn half_a_request_waits_for_the_rest_and_is_then_served() {
    let (mut vmm, mut connection, backend) = connected();
    for byte in message(code::GET_FEATURES, VERSION, &[]) {
        assert_eq!(connection.step(&backend).unwrap(), Progress::Waits);
        vmm.socket.write_all(&[byte]).unwrap();
    }
    assert_eq!(connection.step(&backend).unwrap(), Progress::DeviceRings);
    assert_eq!(vmm.answer(code::GET_FEATURES).len(), 8);
    assert_eq!(connection.deadline(), None);
}

#[test]
fn vmm_that_dies_after_any_byte_of_a_request_is_gone() {
    let request = message(code::SET_FEATURES, VERSION, &[0; 8]);
    for sent in 0..=request.len() {
        let (mut vmm, mut connection, backend) = connected();
        vmm.socket.write_all(&request[..sent]).unwrap();
        drop(vmm);
        assert!(matches!(serve(&mut connection, &backend), Err(ConnectionError::Closed)), "after {sent} bytes");
    }
}

#[test]
fn request_that_does_not_become_whole_in_its_time_ends_the_connection() {
    let (mut vmm, mut connection, backend) = connected();
    vmm.socket.write_all(&[1, 0, 0]).unwrap();
    assert_eq!(connection.step(&backend).unwrap(), Progress::Waits);
    let deadline = connection.deadline().unwrap();
    assert!(deadline <= Instant::now() + REQUEST_TIME_MAX);
    connection.since = connection.since.map(|since| since - REQUEST_TIME_MAX);
    assert!(matches!(connection.step(&backend), Err(ConnectionError::Stalled)));
}

#[test]
fn unknown_request_is_skipped_and_refused_if_an_answer_is_awaited() {
    let (mut vmm, mut connection, backend) = connected();
    vmm.socket.write_all(&message(999, VERSION | NEED_REPLY, &[7; 20])).unwrap();
    vmm.socket.write_all(&message(code::GET_FEATURES, VERSION, &[])).unwrap();
    let faults = serve(&mut connection, &backend).unwrap();
    assert!(matches!(faults[..], [RequestFault::Unknown { code: 999, .. }]), "{faults:?}");
    assert_eq!(vmm.answer(999), 1u64.to_le_bytes());
    assert_eq!(vmm.answer(code::GET_FEATURES).len(), 8);
}

#[test]
fn request_longer_than_any_is_taken_out_of_the_stream() {
    let (mut vmm, mut connection, backend) = connected();
    vmm.socket.write_all(&message(code::SET_MEM_TABLE, VERSION, &[7; 3 * MAX_MSG_SIZE])).unwrap();
    vmm.socket.write_all(&message(code::GET_FEATURES, VERSION, &[])).unwrap();
    assert_eq!(serve(&mut connection, &backend).unwrap().len(), 1);
    assert_eq!(vmm.answer(code::GET_FEATURES).len(), 8);
}

#[test]
fn descriptors_that_a_request_may_not_have_are_closed_and_the_next_is_understood() {
    let (vmm, mut connection, backend) = connected();
    let file = File::open("/dev/null").unwrap();
    for (request, body, count) in [
        (code::SET_FEATURES, 8, 1),
        (code::GET_FEATURES, 0, 3),
        (code::SET_VRING_NUM, 8, 33),
        (code::SET_VRING_KICK, 8, 2),
        (999, 4, 200),
    ] {
        send_all(vmm.socket.as_fd(), &message(request, VERSION, &vec![0; body]), &vec![file.as_fd(); count]).unwrap();
        assert_eq!(serve(&mut connection, &backend).unwrap().len(), 1, "request {request}");
        if request == code::GET_FEATURES {
            vmm.answer(code::GET_FEATURES);
        }
        send_all(vmm.socket.as_fd(), &message(code::GET_FEATURES, VERSION, &[]), &[]).unwrap();
        serve(&mut connection, &backend).unwrap();
        assert_eq!(vmm.answer(code::GET_FEATURES).len(), 8, "after request {request}");
        assert!(connection.descriptors.is_empty());
    }
}

#[test]
fn vmm_that_never_reads_its_answers_is_read_from_no_more_and_costs_no_memory() {
    let (vmm, mut connection, backend) = connected();
    vmm.socket.set_nonblocking(true).unwrap();
    let requests = message(code::GET_FEATURES, VERSION, &[]).repeat(300);
    let mut stuck = 0;
    while stuck < 3 {
        let sent = (&vmm.socket).write(&requests).is_ok_and(|count| count.is_multiple_of(HEADER_BYTES));
        stuck = if sent { 0 } else { stuck + 1 };
        serve(&mut connection, &backend).unwrap();
        assert!(connection.answers.len() <= HEADER_BYTES + 8);
        if stuck == 0 && !connection.answers.is_empty() {
            stuck = 3;
        }
    }
    assert!(!connection.answers.is_empty(), "its socket is full");
    vmm.answer(code::GET_FEATURES);
    drop(vmm);
    assert!(serve(&mut connection, &backend).is_err());
}

#[test]
fn memory_table_without_regions_is_recognized() {
    let bytes = message(code::SET_MEM_TABLE, VERSION, &[0; 8]);
    assert!(is_private_memory(FrontendReq::SET_MEM_TABLE, &bytes));
    let bytes = message(code::SET_MEM_TABLE, VERSION, &[1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(!is_private_memory(FrontendReq::SET_MEM_TABLE, &bytes));
}

proptest! {
    #[test]
    fn any_bytes_leave_a_connection_that_ends_with_its_vmm(
        pieces in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 1..100), 0usize..6), 1..8),
    ) {
        let (vmm, mut connection, backend) = connected();
        let file = File::open("/dev/null").unwrap();
        for (bytes, count) in pieces {
            send_all(vmm.socket.as_fd(), &bytes, &vec![file.as_fd(); count]).unwrap();
            serve(&mut connection, &backend).unwrap();
            prop_assert!(connection.descriptors.len() <= MAX_ATTACHED_FD_ENTRIES);
        }
        drop(vmm);
        prop_assert!(serve(&mut connection, &backend).is_err());
    }
}
