//! The control loop over a socket, this machine's tracefs and FIFOs as data ports. Without privilege: said, and nothing
//! tested.

use std::{
    io::{Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use nix::sys::eventfd::EventFd;
use proptest::prelude::*;
use vtrace_common::wire::{
    Capabilities, Decoder, Message,
    agent::{CommandRequest, EventRequest, OfferPiece, Offered, Output, Piece},
    encode,
};

use super::{
    super::{policy::Exec, port::tests as made},
    *,
};
use crate::tracefs::{INSTANCE_PREFIX, Tracefs, online_cpus};

/// The host's end, and the loop in a thread of its own.
struct Rig {
    socket: UnixStream,
    decoder: Decoder,
    quit: Arc<EventFd>,
    thread: Option<JoinHandle<ControlEnd>>,
    session: u64,
    drains: Vec<JoinHandle<()>>,
    /// Bytes that have come out of the ports.
    received: Arc<AtomicU64>,
    root: tempfile::TempDir,
}

impl Rig {
    fn new(indirect: bool, once: bool) -> Option<Self> {
        static SESSION: AtomicU64 = AtomicU64::new(0xc0de_0000);
        if Tracefs::find_or_mount().is_err() || !nix::unistd::geteuid().is_root() {
            println!("skipped: tracefs is not writable here");
            return None;
        }
        let root = tempfile::tempdir().unwrap();
        let names: Vec<String> = online_cpus().unwrap().iter().map(|cpu| format!("trace-path-cpu{}", cpu.0)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let ports = made::fifo_ports(root.path(), &names, &made::features(indirect));
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let quit = Arc::new(EventFd::new().unwrap());
        let inside = quit.clone();
        let thread = std::thread::spawn(move || {
            let policy = Policy::load(None, Some(Exec::Only(vec!["sh".into()]))).unwrap();
            let options =
                ControlOptions { tee: None, once, without_indirect: false, policy, place: CpuPlacement::default() };
            Control::new(theirs.into(), &ports, &options, inside.as_fd()).unwrap().serve().unwrap()
        });
        let session = SESSION.fetch_add(1, Ordering::Relaxed);
        Some(Self {
            socket: ours,
            decoder: Decoder::default(),
            quit,
            thread: Some(thread),
            session,
            drains: vec![],
            received: Arc::default(),
            root,
        })
    }

    fn met(indirect: bool, once: bool) -> Option<Self> {
        let mut rig = Self::new(indirect, once)?;
        assert!(rig.next::<Hello>().speaks_ours());
        rig.say(&Hello::ours("test"));
        assert!(matches!(rig.next(), FromAgent::Machine(machine) if machine.lanes == machine.cpus));
        Some(rig)
    }

    fn say<M: Message>(&mut self, message: &M) {
        self.socket.write_all(&encode(message).unwrap()).unwrap();
    }

    fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let mut buffer = [0; 65536];
            match self.socket.read(&mut buffer).unwrap() {
                0 => return None,
                count => self.decoder.push(&buffer[..count]),
            }
        }
    }

    fn next<M: Message>(&mut self) -> M {
        self.frame().expect("the agent goes on speaking").open().unwrap()
    }

    fn ask(&mut self, request: &ToAgent) -> FromAgent {
        self.say(request);
        self.next()
    }

    /// The first answer that is no description, and how many bytes were described.
    fn answer(&mut self) -> (FromAgent, usize) {
        let mut described = 0;
        loop {
            match self.next() {
                FromAgent::Describe(Piece { bytes, .. }) => described += bytes.len(),
                FromAgent::Arming { .. } => {} // on a busy machine
                answer => return (answer, described),
            }
        }
    }

    fn arm(&self) -> ToAgent {
        let events = vec!["sched:sched_switch".into()];
        let arm = Arm { session: self.session, clock: "x86-tsc".into(), events, ..Arm::default() };
        ToAgent::Arm(Box::new(arm))
    }

    /// The same for markers only: no page is full while a test lasts, and none can be in a FIFO when its instance goes.
    fn arm_for_markers(&self) -> ToAgent {
        ToAgent::Arm(Box::new(Arm { session: self.session, clock: "x86-tsc".into(), ..Arm::default() }))
    }

    /// Counts the bytes that come out of every FIFO; the loop's open keeps each of them open.
    fn read_ports(&mut self) {
        for entry in std::fs::read_dir(self.root.path().join("dev")).unwrap() {
            let mut fifo = std::fs::File::open(entry.unwrap().path()).unwrap();
            let received = Arc::clone(&self.received);
            let drain = move || {
                let mut buffer = [0; 4096];
                while let Some(count) = Some(fifo.read(&mut buffer).unwrap()).filter(|count| *count > 0) {
                    received.fetch_add(u64::try_from(count).unwrap(), Ordering::Relaxed);
                }
            };
            self.drains.push(std::thread::spawn(drain));
        }
    }

    /// Waits until so many bytes have come out of the ports. Until then no instance may go: see [`Tap`](crate::tracefs::Tap).
    fn await_received(&self, bytes: u64) {
        let begun = Instant::now();
        while self.received.load(Ordering::Relaxed) < bytes {
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?} of {bytes} bytes", self.received);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn instance_exists(&self) -> bool {
        let name = format!("{INSTANCE_PREFIX}{}-{:x}", std::process::id(), self.session);
        Tracefs::find_or_mount().unwrap().root().join("instances").join(name).exists()
    }

    fn finish(mut self) -> ControlEnd {
        self.quit.write(1).unwrap();
        let end = self.thread.take().unwrap().join().expect("the loop does not panic");
        assert!(!self.instance_exists());
        end
    }
}

#[test]
fn whole_session_is_answered_in_order_and_its_bytes_are_in_the_ports() {
    let Some(mut rig) = Rig::met(true, true) else { return };
    rig.say(&rig.arm());
    let (FromAgent::Armed(armed), described) = rig.answer() else { panic!("not armed") };
    assert!(described > 1000 && armed.events == 1 && armed.clock.contains("[x86-tsc]"));
    rig.read_ports();
    let FromAgent::Started { before, after } = rig.ask(&ToAgent::Start { marker: "go".into() }) else { panic!() };
    assert!(before < after);
    let FromAgent::Echo(echo) = rig.ask(&ToAgent::Probe { id: 9, cpu: armed.lanes[0] }) else { panic!() };
    assert!(echo.id == 9 && echo.cpu == armed.lanes[0] && after < echo.received && echo.received < echo.sent);
    assert!(
        matches!(rig.ask(&ToAgent::Mark { text: "here".into() }), FromAgent::Marked { before, after } if before < after)
    );
    assert_eq!(rig.ask(&ToAgent::Ping { id: 3 }), FromAgent::Pong { id: 3 });
    std::thread::sleep(Duration::from_millis(50));
    rig.say(&ToAgent::Stop);
    let mut bytes_sent = 0;
    for cpu in &armed.lanes {
        let (FromAgent::Lane(lane), _) = rig.answer() else { panic!("no report of {cpu}") };
        assert_eq!((lane.cpu, lane.ledger.pages_in, lane.ledger.pages_lost), (*cpu, lane.ledger.pages_out, 0));
        assert!(lane.stats_before.contains("entries: 0") && lane.stats_after.contains("entries: 0"), "{lane:?}");
        bytes_sent += lane.ledger.bytes_out;
    }
    assert!(matches!(rig.answer(), (FromAgent::Stopped, _)));
    assert!(rig.instance_exists() && bytes_sent > 0);
    rig.await_received(bytes_sent);
    assert_eq!(rig.ask(&ToAgent::Close), FromAgent::Closed);
    assert!(!rig.instance_exists());
    rig.drains.drain(..).for_each(|drain| drain.join().unwrap());
    assert_eq!(rig.received.load(Ordering::Relaxed), bytes_sent);
    assert_eq!(rig.thread.take().unwrap().join().unwrap(), ControlEnd::Served);
}

#[test]
fn what_could_be_traced_is_told_without_a_session_and_in_the_middle_of_one() {
    let Some(mut rig) = Rig::met(true, true) else { return };
    for armed in [false, true] {
        if armed {
            rig.say(&rig.arm());
            assert!(matches!(rig.answer(), (FromAgent::Armed(_), _)));
        }
        rig.say(&ToAgent::Offer);
        let mut texts = [const { String::new() }; 3];
        loop {
            let FromAgent::Offer(OfferPiece { offered, bytes, last }) = rig.next() else { panic!("no offer") };
            texts[offered as usize].push_str(std::str::from_utf8(&bytes).unwrap());
            if last && offered == Offered::Events {
                break;
            }
        }
        let [clocks, tracers, events] = &texts;
        assert!(clocks.contains("x86-tsc") && tracers.contains("nop") && events.contains("sched:sched_switch\n"));
    }
    assert_eq!(rig.ask(&ToAgent::Close), FromAgent::Closed);
}

#[test]
fn driver_without_indirect_descriptors_is_refused_and_the_agent_is_idle_again() {
    let Some(mut rig) = Rig::met(false, false) else { return };
    for _ in 0..2 {
        let FromAgent::Failed(failure) = rig.ask(&rig.arm()) else { panic!() };
        assert_eq!((failure.kind, failure.object.as_str()), (FailureKind::NoIndirect, "trace-path-cpu0"));
    }
    assert!(!rig.instance_exists());
    assert_eq!(rig.finish(), ControlEnd::Asked);
}

#[test]
fn missing_port_is_named_and_nothing_stays() {
    let Some(mut rig) = Rig::met(true, false) else { return };
    let cpu = online_cpus().unwrap().len() - 1;
    std::fs::remove_dir_all(rig.root.path().join(format!("class/vport0p{cpu}"))).unwrap();
    let FromAgent::Failed(failure) = rig.ask(&rig.arm()) else { panic!() };
    assert_eq!((failure.kind, failure.object), (FailureKind::NoPort, format!("trace-path-cpu{cpu}")));
    assert!(!rig.instance_exists());
}

#[test]
fn host_that_hangs_up_takes_its_session_along() {
    let Some(mut rig) = Rig::met(true, true) else { return };
    rig.say(&rig.arm_for_markers());
    assert!(matches!(rig.answer(), (FromAgent::Armed(_), _)));
    assert!(matches!(rig.ask(&ToAgent::Start { marker: "go".into() }), FromAgent::Started { .. }));
    assert!(rig.instance_exists());
    rig.socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(rig.thread.take().unwrap().join().unwrap(), ControlEnd::Served);
    assert!(!rig.instance_exists());
}

#[test]
fn hello_of_another_host_ends_the_session_of_the_one_before() {
    let Some(mut rig) = Rig::met(true, false) else { return };
    rig.say(&rig.arm());
    assert!(matches!(rig.answer(), (FromAgent::Armed(_), _)));
    rig.say(&Hello::ours("another"));
    assert!(rig.next::<Hello>().speaks_ours());
    assert!(matches!(rig.next(), FromAgent::Machine(_)));
    assert!(!rig.instance_exists());
    assert_eq!(rig.finish(), ControlEnd::Asked);
}

#[test]
fn silent_host_loses_its_session_after_ten_seconds_and_is_told() {
    let Some(mut rig) = Rig::met(true, true) else { return };
    rig.say(&rig.arm());
    assert!(matches!(rig.answer(), (FromAgent::Armed(_), _)));
    let begun = Instant::now();
    assert_eq!(rig.thread.take().unwrap().join().unwrap(), ControlEnd::Served);
    assert!((9.0..90.0).contains(&begun.elapsed().as_secs_f64()), "{:?}", begun.elapsed());
    assert!(!rig.instance_exists());
    let FromAgent::Failed(failure) = rig.next() else { panic!("a host that was only slow is told") };
    assert_eq!((failure.kind, failure.object.as_str()), (FailureKind::State, "session"));
}

#[test]
fn host_that_reads_nothing_for_ten_seconds_finds_whole_frames_and_an_idle_agent_when_it_reads_again() {
    let Some(mut rig) = Rig::met(true, false) else { return };
    let ToAgent::Arm(arm) = rig.arm() else { unreachable!() };
    rig.say(&ToAgent::Arm(Box::new(Arm { kallsyms: true, ..*arm }))); // megabytes, more than a socket holds
    rig.read_ports();
    let begun = Instant::now();
    while begun.elapsed() < HOST_SILENCE || rig.instance_exists() {
        std::thread::sleep(Duration::from_millis(100));
        assert!(begun.elapsed() < 9 * HOST_SILENCE, "the session stays");
    }
    assert!(rig.drains.iter().all(|drain| !drain.is_finished()), "ports stay open until the host can be told");
    rig.say(&ToAgent::Ping { id: 1 });
    let mut pieces = 0;
    while rig.next::<FromAgent>() != (FromAgent::Pong { id: 1 }) {
        pieces += 1;
    }
    assert!(pieces > 1);
    // And are closed once it is heard.
    rig.drains.drain(..).for_each(|drain| drain.join().unwrap());
    assert_eq!(rig.received.load(Ordering::Relaxed), 0);
    assert_eq!(rig.finish(), ControlEnd::Asked);
}

#[test]
fn agent_that_is_asked_to_quit_removes_its_session() {
    let Some(mut rig) = Rig::met(true, false) else { return };
    rig.say(&rig.arm_for_markers());
    assert!(matches!(rig.answer(), (FromAgent::Armed(_), _)));
    assert!(matches!(rig.ask(&ToAgent::Start { marker: "go".into() }), FromAgent::Started { .. }));
    assert_eq!(rig.finish(), ControlEnd::Asked);
}

#[test]
fn host_of_another_version_hears_hello_and_refusals_only() {
    let Some(mut rig) = Rig::new(true, false) else { return };
    let foreign = Hello {
        version_min: VERSION + 1,
        version_max: VERSION + 1,
        software: "newer".into(),
        capabilities: Capabilities::default(),
    };
    rig.next::<Hello>();
    rig.say(&foreign);
    assert!(
        matches!(rig.ask(&ToAgent::Ping { id: 1 }), FromAgent::Failed(failure) if failure.kind == FailureKind::State)
    );
    rig.say(&foreign);
    assert!(rig.next::<Hello>().speaks_ours());
    rig.say(&Hello::ours("older after all"));
    assert!(rig.next::<Hello>().speaks_ours());
    assert!(matches!(rig.next(), FromAgent::Machine(_)));
    assert_eq!(rig.finish(), ControlEnd::Asked);
}

#[test]
fn request_before_the_hello_is_refused() {
    let Some(mut rig) = Rig::new(true, false) else { return };
    rig.next::<Hello>();
    assert!(matches!(rig.ask(&rig.arm()), FromAgent::Failed(failure) if failure.kind == FailureKind::State));
    assert!(!rig.instance_exists());
}

#[test]
fn probe_of_a_cpu_that_is_not_there_is_refused() {
    let Some(mut rig) = Rig::met(true, false) else { return };
    for cpu in [Cpu(1023), Cpu(u32::MAX)] {
        let FromAgent::Failed(failure) = rig.ask(&ToAgent::Probe { id: 1, cpu }) else { panic!() };
        assert_eq!((failure.kind, failure.object), (FailureKind::Kernel, cpu.to_string()));
    }
}

fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let message = |message: ToAgent| encode(&message).unwrap();
    let session = 0xbad0_0000u64 + u64::from(std::process::id());
    prop_oneof![
        3 => Just(message(ToAgent::Arm(Box::new(Arm { session, ..Arm::default() })))),
        1 => "[a-z:*]{0,9}".prop_map(move |pattern| message(ToAgent::Arm(Box::new(Arm {
            session,
            events: vec![EventRequest { pattern, ..EventRequest::default() }],
            ..Arm::default()
        })))),
        3 => Just(message(ToAgent::Start { marker: "m".into() })),
        2 => any::<(u32, u32)>().prop_map(move |(id, cpu)| message(ToAgent::Probe { id, cpu: Cpu(cpu % 4) })),
        2 => Just(message(ToAgent::Mark { text: "t".repeat(4096) })),
        2 => Just(message(ToAgent::Stop)),
        2 => Just(message(ToAgent::Close)),
        1 => Just(encode(&Hello::ours("again")).unwrap()),
        1 => Just(encode(&Hello { version_min: 9, version_max: 9, software: "new".into(), capabilities: Capabilities::default() }).unwrap()),
        1 => Just(encode(&FromAgent::Stopped).unwrap()),
        1 => proptest::collection::vec(any::<u8>(), 0..64),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 32, ..ProptestConfig::default() })]

    #[test]
    fn any_frames_in_any_order_leave_nothing_after_close(frames in proptest::collection::vec(hostile(), 0..12)) {
        let Some(mut rig) = Rig::met(true, false) else { return Ok(()) };
        rig.session = 0xbad0_0000u64 + u64::from(std::process::id());
        let mut socket = rig.socket.try_clone().unwrap();
        let (answered, answer) = std::sync::mpsc::channel::<()>();
        let writer = std::thread::spawn(move || {
            for frame in frames {
                socket.write_all(&frame).unwrap();
            }
            // Whatever half a frame stands there: enough to end it. What comes in one read with it is forgotten too.
            socket.write_all(&[0xff; 70_000]).unwrap();
            let hello = encode(&Hello::ours("last")).unwrap();
            let end = [hello, encode(&ToAgent::Close).unwrap(), encode(&ToAgent::Ping { id: 77 }).unwrap()].concat();
            while answer.recv_timeout(Duration::from_millis(100)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                socket.write_all(&end).unwrap();
            }
        });
        let mut last = None;
        loop {
            let frame = rig.frame().expect("the agent goes on speaking");
            let message = frame.open::<FromAgent>().ok();
            if message == Some(FromAgent::Pong { id: 77 }) && last == Some(FromAgent::Closed) {
                break;
            }
            last = message;
        }
        drop(answered);
        writer.join().unwrap();
        prop_assert!(!rig.instance_exists());
        prop_assert_eq!(rig.finish(), ControlEnd::Asked);
    }
}

#[test]
fn allowed_command_runs_while_tracing_and_is_told_with_its_end() {
    let Some(mut rig) = Rig::met(true, false) else { return };
    let ToAgent::Arm(arm) = rig.arm_for_markers() else { unreachable!() };
    let words = ["sh", "-c", "echo here; exit 3"].map(Into::into).to_vec();
    rig.say(&ToAgent::Arm(Box::new(Arm { commands: vec![CommandRequest { words }], own_only: false, ..*arm })));
    assert!(matches!(rig.answer().0, FromAgent::Armed(_)));
    rig.say(&ToAgent::Start { marker: "start".into() });
    assert!(matches!(rig.next(), FromAgent::Started { .. }));
    assert_eq!(
        rig.next::<FromAgent>(),
        FromAgent::Output(Output { command: 0, is_error: false, bytes: b"here\n".to_vec() })
    );
    assert_eq!(rig.next::<FromAgent>(), FromAgent::Exited { command: 0, status: 3, output_dropped_bytes: 0 });
    assert_eq!(rig.ask(&ToAgent::Close), FromAgent::Closed);
    assert_eq!(rig.finish(), ControlEnd::Asked);
}

#[test]
fn command_that_is_not_allowed_refuses_the_session() {
    let Some(mut rig) = Rig::met(true, false) else { return };
    let ToAgent::Arm(arm) = rig.arm() else { unreachable!() };
    let words = vec!["sleep".into(), "1000".into()];
    let FromAgent::Failed(failure) =
        rig.ask(&ToAgent::Arm(Box::new(Arm { commands: vec![CommandRequest { words }], ..*arm })))
    else {
        panic!("it was not refused")
    };
    assert_eq!((failure.kind, failure.object.as_str()), (FailureKind::NotAllowed, "sleep"));
    assert!(!rig.instance_exists());
    assert_eq!(rig.finish(), ControlEnd::Asked);
}
