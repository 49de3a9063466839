//! The wire: any stream, cut anywhere, opened as every family.
//!
//! Input: u8 number of cuts (modulo 16), one byte for the length of each piece (255: the link is reopened there), then
//! the stream. What is left of the stream after the last cut comes in one piece.

use std::fmt::Debug;

use vtrace_common::{
    ids::Cpu,
    ledger::Ledger,
    time::{GuestTsc, HostTsc},
    wire::{
        Capabilities, Decoder, Fault, Frame, Hello, Message,
        agent::{
            Arm, Armed, Echo, EventRequest, Failure, FailureKind, FromAgent, LaneReport, Machine, OfferPiece, Offered,
            Part, Piece, ToAgent,
        },
        client::{
            AgentState, Area, Claimed, DeviceState, DriverState, FromServer, Gone, GuestState, LaneLedger, LaneSent,
            Lanes, Refusal, ToServer,
        },
        encode,
    },
};

/// A piece length that stands for a reopened link.
const REOPENED: u8 = 255;

/// Decodes one stream in pieces and at once, opens what comes out.
pub fn run(bytes: &[u8]) {
    let Some((&count, rest)) = bytes.split_first() else { return };
    let (cuts, mut stream) = rest.split_at(rest.len().min(usize::from(count % 16)));
    let mut decoder = Decoder::default();
    let mut links = cuts.split(|&cut| cut == REOPENED).peekable();
    while let Some(link) = links.next() {
        let mut pieces = take_pieces(&mut stream, link);
        if links.peek().is_none() {
            pieces.push(stream);
        }
        expect_same(&mut decoder, &pieces);
        decoder.reset();
    }
}

/// Cuts pieces of these lengths off the stream.
fn take_pieces<'a>(stream: &mut &'a [u8], lengths: &[u8]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::with_capacity(lengths.len());
    for &length in lengths {
        let (piece, rest) = stream.split_at(stream.len().min(usize::from(length)));
        pieces.push(piece);
        *stream = rest;
    }
    pieces
}

/// A link of its own: however it is cut, the frames and the fault at its end are the same.
fn expect_same(decoder: &mut Decoder, pieces: &[&[u8]]) {
    let cut = frames(decoder, pieces);
    let whole = frames(&mut Decoder::default(), &[&pieces.concat()]);
    assert_eq!(cut, whole, "a stream cut in {} pieces", pieces.len());
    for frame in &whole.0 {
        open(frame);
    }
}

fn frames(decoder: &mut Decoder, pieces: &[&[u8]]) -> (Vec<Frame>, Option<Fault>) {
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(fault) => {
                    assert_eq!(decoder.next_frame(), Err(fault), "a lost stream came back");
                    return (frames, Some(fault));
                }
            }
        }
    }
    (frames, None)
}

/// A frame is a message of its own family at most.
fn open(frame: &Frame) {
    let opened = [
        reopens::<Hello>(frame),
        reopens::<ToAgent>(frame),
        reopens::<FromAgent>(frame),
        reopens::<ToServer>(frame),
        reopens::<FromServer>(frame),
    ];
    assert!(opened.into_iter().filter(|&opened| opened).count() <= 1, "{frame:?} is a message of two families");
}

/// Whether the frame opens as `M`. What opens keeps to its bounds, can be sent, and arrives as it is.
fn reopens<M: Message + PartialEq + Debug>(frame: &Frame) -> bool {
    let Ok(message) = frame.open::<M>() else { return false };
    assert_eq!(frame.family, M::FAMILY);
    let bytes = encode(&message).expect("a message that was taken can be sent");
    let (again, fault) = frames(&mut Decoder::default(), &[&bytes]);
    assert_eq!((again.len(), fault), (1, None), "{message:?} does not come out as one frame");
    assert_eq!(again[0].open::<M>().as_ref(), Ok(&message));
    true
}

/// Each kind of message on its own, and all of them in one stream cut in three ways.
pub fn seeds() -> Vec<Vec<u8>> {
    let messages = [hellos(), to_agent(), from_agent(), to_server(), from_server(), refusals()].concat();
    let stream = messages.concat();
    let alone = messages.iter().map(|message| [&[0], &message[..]].concat());
    let cut = [&[3, 1, 11, 40][..], &[4, 12, REOPENED, 0, 200], &[15; 16]].map(|cuts| [cuts, &stream].concat());
    alone.chain(cut).collect()
}

fn sent<M: Message>(messages: &[M]) -> Vec<Vec<u8>> {
    messages.iter().map(|message| encode(message).expect("seeds keep to the bounds")).collect()
}

fn hellos() -> Vec<Vec<u8>> {
    sent(&[
        Hello::ours("vtrace seed"),
        Hello { version_min: 2, version_max: 9, software: String::new(), capabilities: Capabilities::default() },
    ])
}

fn to_agent() -> Vec<Vec<u8>> {
    let events = ["sched", "irq:*", "all"].map(EventRequest::from).to_vec();
    sent(&[
        ToAgent::Arm(Box::new(Arm {
            session: 7,
            clock: "x86-tsc".into(),
            events,
            buffer_kb: 1408,
            subbuf_kb: 64,
            kallsyms: true,
            ..Arm::default()
        })),
        ToAgent::Start { marker: "start".into() },
        ToAgent::Probe { id: 1, cpu: Cpu(3) },
        ToAgent::Mark { text: "here".into() },
        ToAgent::Ping { id: 2 },
        ToAgent::Stop,
        ToAgent::Close,
        ToAgent::Offer,
    ])
}

fn machine() -> Machine {
    let cpus = vec![Cpu(0), Cpu(1)];
    Machine {
        uname: "Linux seed 6.12 x86_64".into(),
        boot_id: "0b".repeat(18),
        lanes: cpus.clone(),
        apics: vec![(Cpu(0), 0), (Cpu(1), 2)],
        cpus,
    }
}

fn echo() -> Echo {
    Echo { id: 1, cpu: Cpu(1), received: GuestTsc(1 << 40), sent: GuestTsc((1 << 40) + 99) }
}

fn failure() -> Failure {
    let near = vec!["sched_switch".into()];
    Failure { kind: FailureKind::NoSuchEvent, object: "sched_swich".into(), detail: String::new(), near }
}

fn ledger(pages_in: u64, pages_out: u64) -> Ledger {
    let pages_lost = pages_in - pages_out;
    Ledger { pages_in, pages_out, pages_lost, bytes_out: pages_out << 12, events_lost: Some(7) }
}

fn answers() -> Vec<FromAgent> {
    let piece =
        Piece { part: Part::EventFormat, name: "sched".into(), bytes: b"name: x\nID: 1\n".to_vec(), last: true };
    let armed =
        Armed { lanes: vec![Cpu(0)], spare: vec![], page_bytes: 4096, clock: "local [x86-tsc]".into(), events: 30 };
    let (before, after) = (GuestTsc(5), GuestTsc(6));
    let lane = LaneReport { cpu: Cpu(0), ledger: ledger(9, 9), ..LaneReport::default() };
    vec![
        FromAgent::Machine(machine()),
        FromAgent::Describe(piece),
        FromAgent::Armed(armed),
        FromAgent::Started { before, after },
        FromAgent::Echo(echo()),
        FromAgent::Marked { before, after },
        FromAgent::Pong { id: 2 },
        FromAgent::Lane(lane),
        FromAgent::Stopped,
        FromAgent::Closed,
        FromAgent::Offer(OfferPiece { offered: Offered::Events, bytes: b"sched:sched_switch\n".to_vec(), last: true }),
        FromAgent::Failed(failure()),
        FromAgent::Arming { events: 700 },
    ]
}

fn from_agent() -> Vec<Vec<u8>> {
    sent(&answers())
}

fn guest() -> String {
    "guest1".into()
}

fn to_server() -> Vec<Vec<u8>> {
    let areas = vec![Area { cpu: Cpu(0), offset: 1 << 20, bytes_max: 1 << 40, begins_again: false }];
    let sent_bytes = vec![LaneSent { cpu: Cpu(0), bytes_out: 9 << 12 }];
    sent(&[
        ToServer::List,
        ToServer::Claim { guest: guest() },
        ToServer::Agent { guest: guest(), request: ToAgent::Ping { id: 3 } },
        ToServer::Lanes(Lanes { guest: guest(), page_bytes: 4096, areas }),
        ToServer::Ledger { guest: guest() },
        ToServer::Finish { guest: guest(), sent: sent_bytes, wait_ms_max: 500 },
        ToServer::Release { guest: guest() },
    ])
}

fn from_server() -> Vec<Vec<u8>> {
    let state = GuestState {
        name: guest(),
        socket: "guest1.sock".into(),
        vmm_pid: Some(77),
        driver: DriverState::Unfit("INDIRECT_DESC".into()),
        agent: Some(AgentState { hello: Hello::ours("vtrace seed"), machine: Some(machine()) }),
        holder_pid: None,
        holder_uid: Some(1000),
        further: vec![DeviceState { vmm_pid: None, driver: DriverState::Absent }],
        lanes_per_device: 126,
        silent_s: 35,
    };
    let lanes = vec![LaneLedger { ledger: ledger(3, 2), ..LaneLedger::default() }];
    let answer = FromAgent::Failed(failure());
    sent(&[
        FromServer::Guests(vec![state]),
        FromServer::Claimed(Claimed { guest: guest(), vmm_pid: 77, machine: machine() }),
        FromServer::Agent { guest: guest(), answer },
        FromServer::Echo { guest: guest(), host_sent: HostTsc(1), echo: echo(), host_received: HostTsc(2) },
        FromServer::LanesReady { guest: guest() },
        FromServer::Ledger { guest: guest(), lanes: lanes.clone() },
        FromServer::Finished { guest: guest(), lanes },
        FromServer::Released { guest: guest() },
        FromServer::Gone { guest: guest(), what: Gone::Device },
    ])
}

fn refusals() -> Vec<Vec<u8>> {
    let guest = guest();
    sent(
        &[
            Refusal::NoSuchGuest { guest: "gest1".into(), known: vec![guest.clone()] },
            Refusal::NotConnected { guest: guest.clone(), socket: "guest1.sock".into() },
            Refusal::Driver { guest: guest.clone(), state: DriverState::MemoryNotShared },
            Refusal::NoAgent { guest: guest.clone() },
            Refusal::AgentVersion { guest: guest.clone(), hello: Hello::ours("vtrace seed") },
            Refusal::Held { guest: guest.clone(), holder_pid: 1, holder_uid: 0 },
            Refusal::State { guest, detail: "no claim".into() },
            Refusal::Request { detail: "page of 0 bytes".into() },
            Refusal::Full,
        ]
        .map(FromServer::Refused),
    )
}
