//! A guest with its VMM, for tests of the device and of the server: it speaks vhost-user as QEMU 11 does, and drives the
//! control queue and port 0 as Linux's virtio_console does.
//!
//! In:    what a test wants done
//! Out:   what the device did
//! Runs:  on the test's thread
//! Full:  waits are bounded; a device that does not answer fails the test
//! Trust: its caller: mistakes panic

use std::{
    fs::File,
    ops::Range,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vtrace_common::wire::{Decoder, Frame, Hello, Message, agent::FromAgent, agent::Machine as AgentMachine, encode};

use crate::{
    device::negotiate,
    sys::socket::{receive, send_all},
    virtq::{
        memory::{Memory, Span, Window, full_fence},
        testing::{Driver, VMM_BASE, descriptor, event, memory_file, region},
    },
};

/// How long anything may take before a test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Entries of each ring.
pub(crate) const ENTRIES: u16 = 64;
/// Bytes of a buffer of an out ring: what Linux's write(2) sends at most.
pub(crate) const BUFFER_BYTES: u32 = 32 << 10;
/// Bytes of a buffer of an in ring: Linux gives a page.
const IN_BUFFER_BYTES: u32 = 4096;

/// Requests (QEMU docs/interop/vhost-user.rst, "Backend-end message types").
pub(crate) mod code {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
}
/// Control messages (virtio 1.3, 5.3.6.2).
pub(crate) const DEVICE_READY: u16 = 0;
pub(crate) const PORT_ADD: u16 = 1;
pub(crate) const PORT_READY: u16 = 3;
pub(crate) const PORT_OPEN: u16 = 6;
pub(crate) const PORT_NAME: u16 = 7;

/// The VMM's end of the vhost-user socket.
pub(crate) struct Vmm {
    pub(crate) socket: UnixStream,
}

impl Vmm {
    /// Sends a request; `flags` beside the version.
    pub(crate) fn send(&self, request: u32, flags: u32, body: &[u8], descriptor: Option<&OwnedFd>) {
        let size = u32::try_from(body.len()).unwrap();
        let bytes = [&[request, 1 | flags, size].map(u32::to_le_bytes).concat()[..], body].concat();
        send_all(self.socket.as_fd(), &bytes, descriptor.map(AsFd::as_fd).as_slice()).unwrap();
    }

    /// The answer to `request`.
    pub(crate) fn answer(&self, request: u32) -> Vec<u8> {
        let header = self.read(12);
        let word = |at: usize| u32::from_le_bytes(*header[at..].first_chunk().unwrap());
        assert_eq!((word(0), word(4) & 7), (request, 5), "a reply to what was asked");
        self.read(usize::try_from(word(8)).unwrap())
    }

    fn read(&self, bytes: usize) -> Vec<u8> {
        let (mut buffer, mut done) = (vec![0; bytes], 0);
        while done < bytes {
            let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut polled, PollTimeout::try_from(PATIENCE).unwrap()), Ok(1), "the device answers");
            let (count, _) = receive(self.socket.as_fd(), &mut buffer[done..]).unwrap();
            assert!(count > 0, "the device keeps its socket open");
            done += count;
        }
        buffer
    }

    pub(crate) fn ask(&self, request: u32, body: &[u8]) -> Vec<u8> {
        self.send(request, 0, body, None);
        self.answer(request)
    }

    pub(crate) fn ask_u64(&self, request: u32) -> u64 {
        u64::from_le_bytes(self.ask(request, &[]).try_into().unwrap())
    }

    /// Sends a request and waits for its acknowledgement (NEED_REPLY); whether it was taken.
    pub(crate) fn ask_ack(&self, request: u32, body: &[u8], descriptor: Option<&OwnedFd>) -> bool {
        self.send(request, 8, body, descriptor);
        self.answer(request) == 0u64.to_le_bytes()
    }

    /// Waits until everything sent so far was served.
    pub(crate) fn settle(&self) {
        self.ask_u64(code::GET_FEATURES);
    }
}

/// The guest's side of a ring that receives: buffers the device may write.
struct Receiver {
    memory: Arc<Memory>,
    base: u64,
    descriptors: Window,
    available: Window,
    used: Window,
    next_available: u16,
    last_used: u16,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Receiver {
    const AVAILABLE: u64 = 16 * ENTRIES as u64;
    const USED: u64 = Self::AVAILABLE + 6 + 2 * ENTRIES as u64 + 2;
    const BUFFERS: u64 = 4096;
    const FOOTPRINT: u64 = Self::BUFFERS + ENTRIES as u64 * IN_BUFFER_BYTES as u64;

    fn new(memory: Arc<Memory>, base: u64) -> Self {
        let window = |at: u64, bytes: usize| memory.window(base + at, bytes).unwrap();
        let entries = usize::from(ENTRIES);
        let (descriptors, available) = (window(0, 16 * entries), window(Self::AVAILABLE, 6 + 2 * entries));
        let used = window(Self::USED, 6 + 8 * entries);
        let (kick, call) = (event(), event());
        Self { memory, base, descriptors, available, used, next_available: 0, last_used: 0, kick, call }
    }

    fn buffer(&self, head: u16) -> u64 {
        self.base + Self::BUFFERS + u64::from(head) * u64::from(IN_BUFFER_BYTES)
    }

    /// Makes every buffer available, as Linux does when a port is added.
    fn fill(&mut self) {
        for head in 0..ENTRIES {
            descriptor(&self.descriptors, head, self.buffer(head), IN_BUFFER_BYTES, 2, 0);
            self.offer(head);
        }
    }

    fn offer(&mut self, head: u16) {
        let slot = usize::from(self.next_available & (ENTRIES - 1));
        self.available.store_u16(4 + 2 * slot, head, Ordering::Relaxed);
        let before = self.next_available;
        self.next_available = before.wrapping_add(1);
        self.available.store_u16(2, self.next_available, Ordering::Release);
        full_fence();
        if self.used.load_u16(4 + 8 * usize::from(ENTRIES), Ordering::Relaxed) == before {
            nix::unistd::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        }
    }

    /// The next message, if there is one; its buffer is offered again.
    fn next(&mut self) -> Option<Vec<u8>> {
        self.available.store_u16(4 + 2 * usize::from(ENTRIES), self.last_used, Ordering::Relaxed);
        full_fence();
        if self.used.load_u16(2, Ordering::Acquire) == self.last_used {
            return None;
        }
        let slot = usize::from(self.last_used & (ENTRIES - 1));
        let head = u16::try_from(self.used.load_u32(4 + 8 * slot, Ordering::Relaxed)).unwrap();
        let bytes = self.used.load_u32(8 + 8 * slot, Ordering::Relaxed);
        let mut message = vec![0; usize::try_from(bytes).unwrap()];
        self.memory.copy_out(Span { gpa: self.buffer(head), bytes }, &mut message).unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        self.offer(head);
        Some(message)
    }

    /// The next message within `limit`; sleeps on the interrupt.
    fn wait(&mut self, limit: Duration) -> Option<Vec<u8>> {
        let until = Instant::now() + limit;
        loop {
            if let Some(message) = self.next() {
                return Some(message);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let mut polled = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
            poll(&mut polled, PollTimeout::try_from(left).unwrap()).unwrap();
            crate::virtq::testing::events(&self.call);
        }
    }
}

/// A guest and its VMM.
pub(crate) struct Machine {
    pub(crate) vmm: Vmm,
    file: File,
    bytes: u64,
    ports: usize,
    /// Features the driver accepts.
    pub(crate) accepted: u64,
    /// Out rings by port; the control queue's is last.
    pub(crate) out: Vec<Driver>,
    port_in: Receiver,
    control_in: Receiver,
    heard: Decoder,
}

/// A control message.
pub(crate) fn control(id: u32, event: u16, value: u16) -> Vec<u8> {
    [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

impl Machine {
    /// Realizes a device of `ports` ports on `socket`, as QEMU does before its guest runs.
    pub(crate) fn realize(socket: UnixStream, ports: usize) -> Self {
        let step = Driver::footprint(ENTRIES, BUFFER_BYTES).next_multiple_of(4096);
        let outs = u64::try_from(ports + 1).unwrap();
        let receivers = outs * step;
        let bytes = receivers + 2 * Receiver::FOOTPRINT;
        let file = memory_file(bytes).unwrap();
        let memory = Memory::map(&[region(0, bytes)], vec![file.try_clone().unwrap()]).unwrap();
        let out =
            (0..outs).map(|at| Driver::new(Arc::clone(&memory), at * step, ENTRIES, BUFFER_BYTES, true)).collect();
        let port_in = Receiver::new(Arc::clone(&memory), receivers);
        let control_in = Receiver::new(Arc::clone(&memory), receivers + Receiver::FOOTPRINT);
        let vmm = Vmm { socket };
        let accepted = vmm.ask_u64(code::GET_FEATURES);
        let protocol = vmm.ask_u64(code::GET_PROTOCOL_FEATURES);
        vmm.send(code::SET_PROTOCOL_FEATURES, 0, &protocol.to_le_bytes(), None);
        assert_eq!(vmm.ask_u64(code::GET_QUEUE_NUM), 256);
        assert_eq!(vmm.ask_u64(code::GET_MAX_MEM_SLOTS), 64);
        vmm.send(code::SET_OWNER, 0, &[], None);
        for ring in 0..u64::try_from(2 * (ports + 1)).unwrap() {
            vmm.send(code::SET_VRING_CALL, 0, &ring.to_le_bytes(), Some(&event()));
        }
        let heard = Decoder::default();
        Self { vmm, file, bytes, ports, accepted, out, port_in, control_in, heard }
    }

    /// max_nr_ports, as the guest reads it.
    pub(crate) fn ports_configured(&self) -> u32 {
        let request = [&[0u32, 12, 0].map(u32::to_le_bytes).concat()[..], &[0; 12]].concat();
        let answer = self.vmm.ask(code::GET_CONFIG, &request);
        u32::from_le_bytes(*answer[12 + 4..].first_chunk().unwrap())
    }

    fn region_body(&self) -> Vec<u8> {
        [0, self.bytes, VMM_BASE, 0].map(u64::to_le_bytes).concat()
    }

    /// ADD_MEM_REG, whose payload begins with padding.
    pub(crate) fn add_memory(&self) {
        let body = [&[0; 8][..], &self.region_body()].concat();
        let descriptor = OwnedFd::from(self.file.try_clone().unwrap());
        assert!(self.vmm.ask_ack(code::ADD_MEM_REG, &body, Some(&descriptor)));
    }

    /// REM_MEM_REG.
    pub(crate) fn remove_memory(&self) {
        assert!(self.vmm.ask_ack(code::REM_MEM_REG, &[&[0; 8][..], &self.region_body()].concat(), None));
    }

    /// The whole table at once.
    pub(crate) fn set_memory(&self) {
        let body = [&[1u32, 0].map(u32::to_le_bytes).concat()[..], &self.region_body()].concat();
        let descriptor = OwnedFd::from(self.file.try_clone().unwrap());
        assert!(self.vmm.ask_ack(code::SET_MEM_TABLE, &body, Some(&descriptor)));
    }

    /// The driver is loaded: all rings run, from the beginning.
    pub(crate) fn start(&mut self) {
        self.vmm.send(code::SET_FEATURES, 0, &self.accepted.to_le_bytes(), None);
        self.add_memory();
        let bases = vec![0; 2 * (self.ports + 1)];
        self.start_rings(&bases);
        self.port_in.fill();
        self.control_in.fill();
    }

    /// Starts all rings where they were.
    pub(crate) fn start_rings(&self, bases: &[u16]) {
        for (ring, base) in (0u32..).zip(bases) {
            let [descriptors, available, used] = self.addresses(ring);
            let state = |value: u32| [ring, value].map(u32::to_le_bytes).concat();
            self.vmm.send(code::SET_VRING_NUM, 0, &state(u32::from(ENTRIES)), None);
            self.vmm.send(code::SET_VRING_BASE, 0, &state(u32::from(*base)), None);
            let addresses = [descriptors, used, available, 0].map(u64::to_le_bytes).concat();
            let body = [&[ring, 0].map(u32::to_le_bytes).concat()[..], &addresses].concat();
            self.vmm.send(code::SET_VRING_ADDR, 0, &body, None);
            let (kick, call) = self.events(ring);
            self.vmm.send(code::SET_VRING_KICK, 0, &u64::from(ring).to_le_bytes(), Some(&kick));
            self.vmm.send(code::SET_VRING_CALL, 0, &u64::from(ring).to_le_bytes(), Some(&call));
        }
        for ring in 0..u32::try_from(bases.len()).unwrap() {
            assert!(self.vmm.ask_ack(code::SET_VRING_ENABLE, &[ring, 1].map(u32::to_le_bytes).concat(), None));
        }
    }

    /// Stops all rings; where they were.
    pub(crate) fn stop_rings(&self) -> Vec<u16> {
        let rings = u32::try_from(2 * (self.ports + 1)).unwrap();
        for ring in 0..rings {
            assert!(self.vmm.ask_ack(code::SET_VRING_ENABLE, &[ring, 0].map(u32::to_le_bytes).concat(), None));
        }
        let base = |ring: u32| {
            let answer = self.vmm.ask(code::GET_VRING_BASE, &[ring, 0].map(u32::to_le_bytes).concat());
            u16::try_from(u32::from_le_bytes(*answer[4..].first_chunk().unwrap())).unwrap()
        };
        (0..rings).map(base).collect()
    }

    /// The guest boots again: its memory is as new, its driver starts from nothing.
    pub(crate) fn reboot(self) -> Self {
        self.stop_rings();
        let mut machine = Self::realize_again(self);
        machine.start();
        machine
    }

    fn realize_again(old: Self) -> Self {
        let ports = old.ports;
        let step = Driver::footprint(ENTRIES, BUFFER_BYTES).next_multiple_of(4096);
        let outs = u64::try_from(ports + 1).unwrap();
        old.file.set_len(0).unwrap();
        old.file.set_len(old.bytes).unwrap();
        old.remove_memory();
        let memory = Memory::map(&[region(0, old.bytes)], vec![old.file.try_clone().unwrap()]).unwrap();
        let out =
            (0..outs).map(|at| Driver::new(Arc::clone(&memory), at * step, ENTRIES, BUFFER_BYTES, true)).collect();
        let port_in = Receiver::new(Arc::clone(&memory), outs * step);
        let control_in = Receiver::new(Arc::clone(&memory), outs * step + Receiver::FOOTPRINT);
        Self { out, port_in, control_in, heard: Decoder::default(), ..old }
    }

    /// Which side of which port a ring is (virtio 1.3, 5.3.2): `Ok` an out ring's place in `out`, `Err` an in ring's port.
    fn place(&self, ring: u32) -> Result<usize, usize> {
        let ring = usize::try_from(ring).unwrap();
        let port = match ring / 2 {
            0 => 0,
            1 => self.ports,
            pair => pair - 1,
        };
        if ring % 2 == 1 { Ok(port) } else { Err(port) }
    }

    fn addresses(&self, ring: u32) -> [u64; 3] {
        let receiver = |receiver: &Receiver| {
            let at = VMM_BASE + receiver.base;
            [at, at + Receiver::AVAILABLE, at + Receiver::USED]
        };
        match self.place(ring) {
            Ok(port) => {
                let setup = self.out[port].setup(0);
                [setup.descriptors, setup.available, setup.used]
            }
            Err(0) => receiver(&self.port_in),
            Err(port) if port == self.ports => receiver(&self.control_in),
            // The guest reads nothing from a lane's port: its in ring is never used, so any address will do.
            Err(_) => receiver(&self.port_in),
        }
    }

    fn events(&self, ring: u32) -> (OwnedFd, OwnedFd) {
        let of = |receiver: &Receiver| (receiver.kick.try_clone().unwrap(), receiver.call.try_clone().unwrap());
        match self.place(ring) {
            Ok(port) => {
                let setup = self.out[port].setup(0);
                (setup.kick, setup.call.unwrap())
            }
            Err(0) => of(&self.port_in),
            Err(port) if port == self.ports => of(&self.control_in),
            Err(_) => (event(), event()),
        }
    }

    /// Puts bytes on a ring and spins until they are used, as Linux does with control messages.
    pub(crate) fn spin(&mut self, port: usize, bytes: &[u8]) {
        assert!(self.out[port].send(bytes, BUFFER_BYTES), "room in the ring");
        assert!(self.out[port].wait(PATIENCE), "the device serves its ring");
        self.out[port].reclaim();
    }

    /// Sends a control message and waits until it is used.
    pub(crate) fn say(&mut self, id: u32, event: u16, value: u16) {
        self.spin(self.ports, &control(id, event, value));
    }

    /// The next control message of the device.
    pub(crate) fn told(&mut self) -> Option<Vec<u8>> {
        self.control_in.wait(PATIENCE)
    }

    /// Whether the device has said nothing more.
    pub(crate) fn told_nothing(&mut self) -> bool {
        self.vmm.settle();
        self.control_in.next().is_none()
    }

    /// What Linux does from probe to open ports; the names of the ports.
    pub(crate) fn probe(&mut self) -> Vec<String> {
        self.probe_ports(0..u32::try_from(self.ports).unwrap())
    }

    /// The same, where the device tells of these ports only.
    pub(crate) fn probe_ports(&mut self, ports: Range<u32>) -> Vec<String> {
        self.say(u32::MAX, DEVICE_READY, 1);
        for port in ports.clone() {
            assert_eq!(self.told().unwrap(), control(port, PORT_ADD, 1));
        }
        ports.map(|port| self.add_port(port)).collect()
    }

    /// A driver that was asleep has the port again; its name.
    pub(crate) fn wakes(&mut self, port: u32) -> String {
        self.add_port(port)
    }

    /// What has come over port 0, if anything has.
    pub(crate) fn read_nothing(&mut self) -> Option<Vec<u8>> {
        self.vmm.settle();
        self.port_in.next()
    }

    fn add_port(&mut self, port: u32) -> String {
        self.say(port, PORT_READY, 1);
        let name = self.told().unwrap();
        assert_eq!(name[..8], control(port, PORT_NAME, 1));
        assert_eq!(self.told().unwrap(), control(port, PORT_OPEN, 1));
        String::from_utf8(name[8..].to_vec()).unwrap()
    }

    /// A process in the guest writes to port 0.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(usize::try_from(BUFFER_BYTES).unwrap()) {
            self.out[0].send_blocking(piece, 4096);
        }
    }

    /// The next frame that comes over port 0.
    pub(crate) fn read_frame(&mut self) -> Frame {
        loop {
            if let Some(frame) = self.heard.next_frame().unwrap() {
                return frame;
            }
            let bytes = self.port_in.wait(PATIENCE).expect("the device sends a frame");
            self.heard.push(&bytes);
        }
    }

    /// The next message that comes over port 0.
    pub(crate) fn read<M: Message>(&mut self) -> M {
        self.read_frame().open().unwrap()
    }

    /// An agent of ours opens port 0, greets and is greeted.
    pub(crate) fn start_agent(&mut self) {
        self.start_agent_as(&Hello::ours("agent of a test"));
    }

    /// Likewise, with this hello.
    pub(crate) fn start_agent_as(&mut self, hello: &Hello) {
        self.heard.reset();
        self.say(0, PORT_OPEN, 1);
        assert!(self.read::<Hello>().speaks_ours());
        self.write(&encode(hello).unwrap());
        let machine = AgentMachine { uname: "Linux test".into(), ..AgentMachine::default() };
        self.answer(&FromAgent::Machine(machine));
    }

    /// The agent says something.
    pub(crate) fn answer(&mut self, answer: &FromAgent) {
        self.write(&encode(answer).unwrap());
    }

    /// Bits the driver accepts beside `without`.
    pub(crate) fn accept_all_but(&mut self, without: u64) {
        self.accepted = negotiate::offered() & !without;
    }
}
