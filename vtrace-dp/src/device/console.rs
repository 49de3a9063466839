//! The control protocol of a multiport console: which ports there are, what they are called, who has them open.
//!
//! In:    control messages of the guest
//! Out:   control messages for the guest, one for each of its buffers; [`PortEvent`]s
//! Runs:  on the device's thread; a state machine without effects
//! Full:  at most one message of each kind waits for each port, so a guest that asks again and again gains nothing
//! Trust: nothing: lengths are checked, unknown ports and events are ignored and counted
//!
//! Source: virtio 1.3, 5.3.6.2; Linux drivers/char/virtio_console.c, handle_control_message. The guest says DEVICE_READY
//! and gets a PORT_ADD for each port; its PORT_READY is answered by the name and PORT_OPEN: Linux lets no process write to
//! a port that the host has not opened.

use std::collections::VecDeque;

use vtrace_common::limits::PORTS_MAX;

use super::lane_range::LaneRange;

/// Bytes of `struct virtio_console_control`: u32 id, u16 event, u16 value, little endian.
pub const CONTROL_BYTES: usize = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What a control message of the guest means for others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortEvent {
    /// A driver starts from nothing: whatever was open is not any more.
    DriverReady,
    /// A process in the guest opened this port.
    Opened(usize),
    /// A process in the guest closed this port.
    Closed(usize),
}

/// One port, as the guest has reported it.
#[derive(Clone, Copy, Default, Debug)]
struct Port {
    /// The guest's driver has it (PORT_READY).
    ready: bool,
    /// A process in the guest has it open (PORT_OPEN).
    open: bool,
    /// Kinds of messages that wait for a buffer, one bit each.
    waiting: u8,
}

/// A message for the guest, in the order in which they are sent to a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Add,
    Name,
    Open,
}

/// The ports of one device.
#[derive(Debug)]
pub struct Console {
    lanes: LaneRange,
    ports: Vec<Port>,
    outgoing: VecDeque<(usize, Kind)>,
    ignored: u64,
}

impl Console {
    /// A console that no driver has touched, of those among `ports` ports that have a name in this lanes.
    pub fn new(lanes: LaneRange, ports: usize) -> Self {
        let ports = vec![Port::default(); ports.min(PORTS_MAX)];
        Self { lanes, ports, outgoing: VecDeque::new(), ignored: 0 }
    }

    /// Ports there are.
    fn known(&self) -> impl Iterator<Item = usize> + use<> {
        let lanes = self.lanes;
        (0..self.ports.len()).filter(move |port| lanes.has(*port))
    }

    fn port(&mut self, id: usize) -> Option<&mut Port> {
        self.ports.get_mut(id).filter(|_| self.lanes.has(id))
    }

    /// Whether a process in the guest has `port` open.
    pub fn is_open(&self, port: usize) -> bool {
        self.ports.get(port).is_some_and(|port| port.open)
    }

    /// Messages of the guest that meant nothing.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// Takes a message of the guest. A shorter one than a control message is ignored.
    pub fn receive(&mut self, bytes: &[u8]) -> Option<PortEvent> {
        let event = self.understand(bytes);
        if event.is_none() {
            self.ignored += 1;
        }
        event.flatten()
    }

    /// `None`: not a message of the protocol; `Some(None)`: one without a [`PortEvent`].
    fn understand(&mut self, bytes: &[u8]) -> Option<Option<PortEvent>> {
        let ([a, b, c, d, e, f, g, h], _) = bytes.split_first_chunk::<CONTROL_BYTES>()?;
        let id = usize::try_from(u32::from_le_bytes([*a, *b, *c, *d])).ok()?;
        let (event, value) = (u16::from_le_bytes([*e, *f]), u16::from_le_bytes([*g, *h]));
        match (event, value) {
            (DEVICE_READY, 1) => {
                self.start_over();
                Some(Some(PortEvent::DriverReady))
            }
            // The driver could not set up the device or the port.
            (DEVICE_READY | PORT_READY, 0) => Some(None),
            (PORT_READY, 1) => {
                self.port(id)?.ready = true;
                self.post(id, Kind::Name);
                self.post(id, Kind::Open);
                Some(None)
            }
            (PORT_OPEN, 0 | 1) => self.set_open(id, value == 1),
            _ => None,
        }
    }

    fn set_open(&mut self, id: usize, open: bool) -> Option<Option<PortEvent>> {
        let port = self.port(id)?;
        if std::mem::replace(&mut port.open, open) == open {
            // Sent twice: a second close means nothing, a second open is another process.
            return Some(open.then_some(PortEvent::Opened(id)));
        }
        Some(Some(if open { PortEvent::Opened(id) } else { PortEvent::Closed(id) }))
    }

    /// A driver starts: it knows no port yet.
    fn start_over(&mut self) {
        *self = Self { ignored: self.ignored, ..Self::new(self.lanes, self.ports.len()) };
        self.known().for_each(|id| self.post(id, Kind::Add));
    }

    fn post(&mut self, id: usize, kind: Kind) {
        let bit = 1 << kind as u8;
        let waiting = &mut self.ports[id].waiting;
        if *waiting & bit == 0 {
            *waiting |= bit;
            self.outgoing.push_back((id, kind));
        }
    }

    /// The next message for the guest; it stays until [`Console::sent`].
    pub fn next(&self) -> Option<Vec<u8>> {
        let (id, kind) = *self.outgoing.front()?;
        let (event, value) = match kind {
            Kind::Add => (PORT_ADD, 1u16),
            Kind::Name => (PORT_NAME, 1),
            Kind::Open => (PORT_OPEN, 1),
        };
        let mut bytes = u32::try_from(id).expect("PORTS_MAX is far below 2^32").to_le_bytes().to_vec();
        bytes.extend_from_slice(&event.to_le_bytes());
        bytes.extend_from_slice(&value.to_le_bytes());
        if kind == Kind::Name {
            let name = self.lanes.name(id).expect("only ports with a name are announced");
            bytes.extend_from_slice(name.as_bytes());
        }
        Some(bytes)
    }

    /// The guest has got the message.
    pub fn sent(&mut self) {
        if let Some((id, kind)) = self.outgoing.pop_front() {
            self.ports[id].waiting &= !(1 << kind as u8);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn control(id: u32, event: u16, value: u16) -> Vec<u8> {
        [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
    }

    fn everything(console: &mut Console) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| console.next().inspect(|_| console.sent())).collect()
    }

    /// A console whose driver has all its ports.
    fn ready(ports: u32) -> Console {
        let mut console = Console::new(LaneRange::ONLY, usize::try_from(ports).unwrap());
        console.receive(&control(u32::MAX, DEVICE_READY, 1));
        for id in 0..ports {
            console.receive(&control(id, PORT_READY, 1));
        }
        everything(&mut console);
        console
    }

    #[test]
    fn ready_driver_is_told_of_every_port() {
        let mut console = Console::new(LaneRange::ONLY, 3);
        assert_eq!(everything(&mut console), Vec::<Vec<u8>>::new());
        assert_eq!(console.receive(&control(u32::MAX, DEVICE_READY, 1)), Some(PortEvent::DriverReady));
        assert_eq!(everything(&mut console), (0..3).map(|id| control(id, PORT_ADD, 1)).collect::<Vec<_>>());
    }

    #[test]
    fn ready_port_is_named_and_then_opened() {
        let mut console = Console::new(LaneRange::ONLY, 3);
        assert_eq!(console.receive(&control(2, PORT_READY, 1)), None);
        let name = [control(2, PORT_NAME, 1), b"trace-path-cpu1".to_vec()].concat();
        assert_eq!(everything(&mut console), [name, control(2, PORT_OPEN, 1)]);
        console.receive(&control(0, PORT_READY, 1));
        assert!(console.next().unwrap().ends_with(b"agent-ctl-path"));
    }

    #[test]
    fn message_stays_until_it_was_sent() {
        let mut console = Console::new(LaneRange::ONLY, 1);
        console.receive(&control(0, DEVICE_READY, 1));
        assert_eq!(console.next(), console.next());
        console.sent();
        assert_eq!(console.next(), None);
    }

    #[test]
    fn open_and_close_are_reported_by_port() {
        let mut console = ready(2);
        assert_eq!(console.receive(&control(1, PORT_OPEN, 1)), Some(PortEvent::Opened(1)));
        assert!(console.is_open(1) && !console.is_open(0));
        assert_eq!(console.receive(&control(1, PORT_OPEN, 0)), Some(PortEvent::Closed(1)));
        assert_eq!(console.receive(&control(1, PORT_OPEN, 0)), None);
    }

    #[test]
    fn driver_that_starts_over_has_nothing_open() {
        let mut console = ready(2);
        console.receive(&control(0, PORT_OPEN, 1));
        assert_eq!(console.receive(&control(0, DEVICE_READY, 1)), Some(PortEvent::DriverReady));
        assert!(!console.is_open(0));
    }

    #[test]
    fn unknown_ports_events_and_short_messages_are_ignored_and_counted() {
        let mut console = ready(2);
        for bytes in [control(2, PORT_READY, 1), control(0, 99, 1), control(0, PORT_OPEN, 7), vec![], vec![0; 7]] {
            assert_eq!(console.receive(&bytes), None);
        }
        assert_eq!((console.ignored(), console.next()), (5, None));
    }

    #[test]
    fn driver_that_could_not_add_a_port_gets_no_answer() {
        let mut console = Console::new(LaneRange::ONLY, 2);
        assert_eq!(console.receive(&control(1, PORT_READY, 0)), None);
        assert_eq!((console.next(), console.ignored()), (None, 0));
    }

    #[test]
    fn further_device_tells_of_its_lanes_only_and_knows_no_control_port() {
        let mut console = Console::new(LaneRange::new(1, 2), 3);
        console.receive(&control(u32::MAX, DEVICE_READY, 1));
        assert_eq!(everything(&mut console), [control(1, PORT_ADD, 1), control(2, PORT_ADD, 1)]);
        for event in [PORT_READY, PORT_OPEN] {
            assert_eq!(console.receive(&control(0, event, 1)), None);
        }
        assert_eq!((console.ignored(), console.next(), console.is_open(0)), (2, None, false));
        console.receive(&control(1, PORT_READY, 1));
        assert!(console.next().unwrap().ends_with(b"trace-path-cpu2"));
    }

    #[test]
    fn ports_that_belong_to_the_next_device_are_not_there() {
        let mut console = Console::new(LaneRange::new(0, 1), 4);
        console.receive(&control(u32::MAX, DEVICE_READY, 1));
        assert_eq!(everything(&mut console), [control(0, PORT_ADD, 1), control(1, PORT_ADD, 1)]);
        assert_eq!(console.receive(&control(2, PORT_READY, 1)), None);
        assert_eq!(console.receive(&control(2, PORT_OPEN, 1)), None);
        assert_eq!((console.ignored(), console.next()), (2, None));
    }

    proptest! {
        #[test]
        fn any_messages_leave_a_bounded_number_of_answers(
            messages in proptest::collection::vec((0u32..6, 0u16..9, 0u16..3), 0..400),
        ) {
            let mut console = Console::new(LaneRange::ONLY, 4);
            for (id, event, value) in messages {
                console.receive(&control(id, event, value));
                prop_assert!(console.outgoing.len() <= 3 * 4);
            }
            prop_assert!(everything(&mut console).len() <= 3 * 4);
            console.receive(&control(0, DEVICE_READY, 1));
            prop_assert_eq!(everything(&mut console).len(), 4);
        }

        #[test]
        fn any_bytes_are_a_message_or_ignored(bytes: Vec<u8>) {
            let mut console = Console::new(LaneRange::ONLY, 4);
            console.receive(&bytes);
            prop_assert!(console.outgoing.len() <= 3 * 4);
        }
    }
}
