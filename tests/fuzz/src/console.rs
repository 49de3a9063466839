//! Control messages of a guest's driver: no panic, no queue that grows, no port that is not there.
//!
//! Input: u8 ports, u8 the device's place, u8 its lanes; then messages of 9 bytes: how many answers the guest takes, and a
//! `struct virtio_console_control`; the last one may be shorter.

use vtrace_dp::device::{
    console::{CONTROL_BYTES, Console, PortEvent},
    lane_range::LaneRange,
};

/// Kinds of messages that can wait for a port.
const KINDS: usize = 3;

/// Says all messages, takes some answers after each, all in the end.
pub fn run(bytes: &[u8]) {
    let Some((&[ports, device, lanes], messages)) = bytes.split_first_chunk() else { return };
    let (place, ports) = (LaneRange::new(device.into(), lanes.into()), usize::from(ports));
    let mut console = Console::new(place, ports);
    for message in messages.chunks(1 + CONTROL_BYTES) {
        let event = console.receive(&message[1..]);
        if let Some(PortEvent::Opened(port) | PortEvent::Closed(port)) = event {
            assert!(port < ports && place.has(port), "port {port} of {ports}");
            assert_eq!(console.is_open(port), event == Some(PortEvent::Opened(port)));
        }
        take(&mut console, place, message[0].into());
    }
    let taken = take(&mut console, place, usize::MAX);
    assert!(taken <= KINDS * ports, "{taken} messages wait for {ports} ports");
}

/// Takes up to so many answers.
fn take(console: &mut Console, place: LaneRange, count_max: usize) -> usize {
    let mut count = 0;
    while count < count_max {
        let Some(answer) = console.next() else { break };
        let (id, rest) = answer.split_first_chunk::<4>().expect("an answer is a control message at least");
        let port = usize::try_from(u32::from_le_bytes(*id)).expect("usize has 64 bits");
        let name = place.name(port).expect("the guest is told of ports with a name only");
        assert!(rest.len() == 4 || rest[4..] == *name.as_bytes(), "{rest:?} is not {name}");
        console.sent();
        count += 1;
    }
    count
}

/// A driver as Linux is, one that asks for the same over and over, and messages that are none.
pub fn seeds() -> Vec<Vec<u8>> {
    let message = |taken: u8, id: u32, event: u16, value: u16| {
        [&[taken][..], &id.to_le_bytes(), &event.to_le_bytes(), &value.to_le_bytes()].concat()
    };
    let ready = |port| message(9, port, 3, 1);
    let driver = [vec![4, 0, 126], message(9, 0, 0, 1), ready(0), ready(1), message(9, 0, 6, 1), message(9, 0, 6, 0)];
    let greedy = [vec![3, 1, 2], message(0, 0, 0, 1), ready(1), ready(1), message(0, 1, 6, 1), message(1, 0, 0, 1)];
    let junk = [vec![200, 255, 255], message(1, u32::MAX, 6, 1), message(0, 7, 99, 7), vec![1, 2, 3]];
    vec![driver.concat(), greedy.concat(), junk.concat()]
}
