//! QMP, QEMU's control channel: JSON lines over a socket (docs/interop/qmp-spec.rst).
//!
//! In:    commands; bytes of whoever listens on the socket
//! Out:   what commands return, events, or a [`QmpError`]
//! Runs:  on the caller's thread; no call takes longer than the time it was given
//! Full:  a line longer than [`LINE_BYTES_MAX`] is a fault; of events only the newest [`EVENTS_MAX`] are kept, and of one
//!        in a line longer than [`EVENT_BYTES_MAX`] only its name
//! Trust: nothing: lines are bounded before they are parsed, texts are cleaned before they are shown
//!
//! Of QMP's thousands of types eight commands are used here, so what they return is read where it is used.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::sys::socket::dial;

/// Longest line taken. QEMU's longest answers (query-pci of a full machine) have some hundred KiB.
pub const LINE_BYTES_MAX: usize = 4 << 20;
/// Events kept while nobody asks for them.
pub const EVENTS_MAX: usize = 256;
/// Of an event in a longer line only the name is kept. QEMU's have some hundred bytes.
pub const EVENT_BYTES_MAX: usize = 16 << 10;
/// How long an answer may take.
pub const ANSWER_MAX: Duration = Duration::from_secs(10);
/// What is shown of a text of QEMU's.
const SHOWN_BYTES_MAX: usize = 300;
/// Bytes read at a time.
const PIECE_BYTES: usize = 16 << 10;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens there.
    #[error("no QMP at {}: {source}", path.display())]
    NoSocket {
        /// The socket.
        path: PathBuf,
        /// Why it cannot be connected.
        source: std::io::Error,
    },
    /// It did not answer in time. A QMP that serves another client does not even greet.
    #[error("QMP does not answer {what} within {} s", waited.as_secs())]
    Silent {
        /// What it should have answered.
        what: String,
        /// How long that was waited for.
        waited: Duration,
    },
    /// It closed the socket.
    #[error("QEMU has closed its QMP")]
    Closed,
    /// What came is no QMP.
    #[error("this is no QMP: {0}")]
    Foreign(String),
    /// QEMU refused a command.
    #[error("QEMU refuses {command}: {why}")]
    Refused {
        /// Which.
        command: String,
        /// Its words.
        why: String,
    },
    /// The answer has not the form that this command's has.
    #[error("QEMU's answer to {0} is not understood")]
    Answer(String),
    /// The socket failed.
    #[error("QMP's socket: {0}")]
    Socket(std::io::Error),
}

/// QEMU's version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Deserialize)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// One line of QEMU.
#[derive(Clone, PartialEq, Debug)]
pub enum Message {
    /// The first.
    Greeting(Version),
    /// A command's answer and its number.
    Return(Option<u64>, Value),
    /// A command was refused.
    Error(Option<u64>, String),
    /// Something happened.
    Event(Event),
}

/// Something that happened.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    /// Which kind.
    pub name: String,
    /// What belongs to it.
    pub data: Value,
}

/// A line as it stands; only one of the first four is there.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<Failure>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct Greeting {
    version: Versions,
}

#[derive(Deserialize)]
struct Versions {
    qemu: Version,
}

#[derive(Deserialize)]
struct Failure {
    desc: String,
}

impl Message {
    /// Reads one line.
    ///
    /// # Errors
    /// [`QmpError::Foreign`]
    pub fn parse(line: &[u8]) -> Result<Self, QmpError> {
        let foreign = || QmpError::Foreign(shown(&String::from_utf8_lossy(&line[..line.len().min(SHOWN_BYTES_MAX)])));
        let bytes = line.len();
        let line: Line = serde_json::from_slice(line).map_err(|_| foreign())?;
        Ok(match line {
            Line { greeting: Some(greeting), .. } => Self::Greeting(greeting.version.qemu),
            Line { returned: Some(value), id, .. } => Self::Return(id, value),
            Line { error: Some(failure), id, .. } => Self::Error(id, shown(&failure.desc)),
            // The room of those that are kept: nothing that long is waited for.
            Line { event: Some(name), .. } if bytes > EVENT_BYTES_MAX => {
                Self::Event(Event { name: shown(&name), data: Value::Null })
            }
            Line { event: Some(name), data, .. } => Self::Event(Event { name: shown(&name), data }),
            _ => return Err(foreign()),
        })
    }
}

/// A text of QEMU's as people may see it: bounded, and nothing that moves a terminal's cursor.
pub fn shown(text: &str) -> String {
    let text = &text[..text.floor_char_boundary(SHOWN_BYTES_MAX)];
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect::<String>().trim().into()
}

/// Makes lines out of whatever pieces come.
#[derive(Default, Debug)]
pub struct Lines {
    bytes: Vec<u8>,
    /// So much of it has no line's end.
    searched: usize,
}

impl Lines {
    /// Takes a piece.
    pub fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
    }

    /// The next whole message; empty lines are skipped.
    ///
    /// # Errors
    /// [`QmpError::Foreign`] for what is no message or has no end.
    pub fn next_message(&mut self) -> Result<Option<Message>, QmpError> {
        loop {
            let Some(end) = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n') else {
                self.searched = self.bytes.len();
                let too_long = self.bytes.len() > LINE_BYTES_MAX;
                return if too_long { Err(QmpError::Foreign("a line without end".into())) } else { Ok(None) };
            };
            let line: Vec<u8> = self.bytes.drain(..=self.searched + end).collect();
            self.searched = 0;
            let line = line.trim_ascii();
            if !line.is_empty() {
                return Message::parse(line).map(Some);
            }
        }
    }
}

/// Connects. A QMP that serves another client lets one more wait, and lets those behind not even connect.
fn reach(path: &Path, wait_max: Duration) -> Result<UnixStream, QmpError> {
    dial(path, wait_max).map_err(|source| match source.kind() {
        ErrorKind::WouldBlock => QmpError::Silent { what: "the connection".into(), waited: wait_max },
        _ => QmpError::NoSocket { path: path.into(), source },
    })
}

/// A connection that has greeted.
#[derive(Debug)]
pub struct Qmp {
    socket: UnixStream,
    lines: Lines,
    events: VecDeque<Event>,
    number: u64,
    /// No answer is waited for after this.
    until: Option<Instant>,
    /// What the greeting said.
    pub version: Version,
}

impl Qmp {
    /// Connects, waits for the greeting, leaves the negotiation mode.
    ///
    /// # Errors
    /// [`QmpError`]
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        Self::over(reach(path, ANSWER_MAX)?, ANSWER_MAX)
    }

    /// The same over a socket that is connected.
    ///
    /// # Errors
    /// [`QmpError`]
    pub fn over(socket: UnixStream, wait_max: Duration) -> Result<Self, QmpError> {
        let version = Version { major: 0, minor: 0, micro: 0 };
        let mut qmp =
            Self { socket, lines: Lines::default(), events: VecDeque::new(), number: 0, until: None, version };
        match qmp.message("the connection", Instant::now(), wait_max)? {
            Message::Greeting(version) => qmp.version = version,
            _ => return Err(QmpError::Foreign("it does not greet".into())),
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// From now on all answers together may take this long.
    pub fn hurry(&mut self, all_max: Duration) {
        self.until = Some(Instant::now() + all_max);
    }

    /// How long the next answer may take.
    fn answer_max(&self) -> Duration {
        self.until.map_or(ANSWER_MAX, |until| ANSWER_MAX.min(until.saturating_duration_since(Instant::now())))
    }

    /// Has QEMU do something.
    ///
    /// # Errors
    /// [`QmpError`]; after anything but `Refused` and `Answer` the connection is of no use any more.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.number += 1;
        let wait_max = self.answer_max();
        let silent = || QmpError::Silent { what: command.into(), waited: wait_max };
        if wait_max.is_zero() {
            return Err(silent());
        }
        let mut request = json!({ "execute": command, "id": self.number });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.socket.set_write_timeout(Some(wait_max)).map_err(QmpError::Socket)?;
        let begun = Instant::now();
        self.socket.write_all(format!("{request}\n").as_bytes()).map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => QmpError::Closed,
            ErrorKind::WouldBlock => silent(),
            _ => QmpError::Socket(error),
        })?;
        loop {
            match self.message(command, begun, wait_max)? {
                Message::Return(id, value) if id == Some(self.number) => return Ok(value),
                Message::Error(id, why) if id == Some(self.number) => {
                    return Err(QmpError::Refused { command: command.into(), why });
                }
                Message::Event(event) => self.keep(event),
                // Nobody waits for it any more.
                Message::Return(..) | Message::Error(..) | Message::Greeting(_) => {}
            }
        }
    }

    /// Waits for an event for which `is_it` holds, one that came before included. `None`: none came in time.
    ///
    /// # Errors
    /// [`QmpError`]
    pub fn event(&mut self, is_it: impl Fn(&Event) -> bool, wait_max: Duration) -> Result<Option<Event>, QmpError> {
        let begun = Instant::now();
        loop {
            if let Some(at) = self.events.iter().position(&is_it) {
                return Ok(self.events.remove(at));
            }
            match self.message("", begun, wait_max) {
                Ok(Message::Event(event)) => self.keep(event),
                Ok(_) => {}
                Err(QmpError::Silent { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn message(&mut self, what: &str, begun: Instant, wait_max: Duration) -> Result<Message, QmpError> {
        let mut piece = [0; PIECE_BYTES];
        loop {
            if let Some(message) = self.lines.next_message()? {
                return Ok(message);
            }
            let silent = || QmpError::Silent { what: what.into(), waited: wait_max };
            let left = wait_max.checked_sub(begun.elapsed()).filter(|left| !left.is_zero()).ok_or_else(silent)?;
            self.socket.set_read_timeout(Some(left)).map_err(QmpError::Socket)?;
            match self.socket.read(&mut piece) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(count) => self.lines.push(&piece[..count]),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                    ErrorKind::ConnectionReset => return Err(QmpError::Closed),
                    _ => return Err(QmpError::Socket(error)),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        os::unix::net::UnixListener,
        thread::{JoinHandle, spawn},
    };

    use proptest::prelude::*;

    use super::*;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": ""}, "capabilities": []}}"#;

    /// A QEMU that says these lines, each after a request has come; the first at once.
    fn qemu(lines: Vec<String>) -> (UnixStream, JoinHandle<Vec<String>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let answer = move || {
            let mut requests = BufReader::new(theirs.try_clone().unwrap()).lines();
            let mut heard = Vec::new();
            for line in lines {
                theirs.write_all(line.as_bytes()).unwrap();
                heard.extend(requests.next().and_then(Result::ok));
            }
            heard
        };
        (ours, spawn(answer))
    }

    #[test]
    fn answers_belong_to_their_commands_and_events_are_kept_for_whoever_asks() {
        let event = r#"{"timestamp": {}, "event": "DEVICE_DELETED", "data": {"device": "vtrace0"}}"#;
        let (socket, thread) = qemu(vec![
            format!("{GREETING}\r\n"),
            "{\"return\": {}, \"id\": 1}\n".into(),
            format!("{{\"return\": \"late\", \"id\": 1}}\n{event}\n{{\"return\": [7], \"id\": 2}}\n"),
            "{\"id\": 3, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\\u001b[2Jway\"}}\n".into(),
        ]);
        let mut qmp = Qmp::over(socket, ANSWER_MAX).unwrap();
        assert_eq!(qmp.version, Version { major: 11, minor: 1, micro: 3 });
        assert_eq!(qmp.execute("query-x", json!({ "a": 1 })).unwrap(), json!([7]));
        let refused = qmp.execute("device_add", Value::Null).unwrap_err();
        assert_eq!(refused.to_string(), "QEMU refuses device_add: no [2Jway");
        let found = qmp.event(|event| event.name == "DEVICE_DELETED", Duration::ZERO).unwrap().unwrap();
        assert_eq!(found.data["device"], "vtrace0");
        drop(qmp);
        assert_eq!(thread.join().unwrap()[1], r#"{"arguments":{"a":1},"execute":"query-x","id":2}"#);
    }

    #[test]
    fn socket_that_another_client_holds_is_silent_and_not_waited_for_for_ever() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = Qmp::over(ours, Duration::from_millis(20)).unwrap_err();
        assert!(matches!(&error, QmpError::Silent { what, .. } if what == "the connection"), "{error}");
    }

    #[test]
    fn socket_with_no_room_for_one_more_is_silent_and_not_waited_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        let begun = Instant::now();
        let error = reach(&path, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, QmpError::Silent { .. }) && begun.elapsed() < Duration::from_secs(5), "{error}");
        drop(listener);
        assert!(matches!(reach(&path, ANSWER_MAX), Err(QmpError::NoSocket { .. })));
    }

    #[test]
    fn long_event_is_kept_by_its_name_only() {
        let data = "x".repeat(EVENT_BYTES_MAX);
        let line = format!("{{\"event\": \"BIG\", \"data\": {{\"path\": {data:?}}}}}");
        assert_eq!(
            Message::parse(line.as_bytes()).unwrap(),
            Message::Event(Event { name: "BIG".into(), data: Value::Null })
        );
    }

    #[test]
    fn qemu_that_ends_has_closed_and_what_is_no_qmp_is_named() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(matches!(Qmp::over(ours, ANSWER_MAX), Err(QmpError::Closed)));
        let (ours, thread) = qemu(vec!["SSH-2.0-OpenSSH\x07\n".into()]);
        let error = Qmp::over(ours, ANSWER_MAX).unwrap_err();
        assert_eq!(error.to_string(), "this is no QMP: SSH-2.0-OpenSSH");
        thread.join().unwrap();
    }

    #[test]
    fn answers_that_are_slow_together_are_not_waited_for_longer_than_all_of_them_may_take() {
        let slow = |number: u64| format!("{{\"return\": {{}}, \"id\": {number}}}\n");
        let (socket, thread) = qemu(vec![format!("{GREETING}\n"), slow(1), slow(2)]);
        let mut qmp = Qmp::over(socket, ANSWER_MAX).unwrap();
        qmp.hurry(Duration::from_millis(200));
        qmp.execute("query-a", Value::Null).unwrap();
        let begun = Instant::now();
        for _ in 0..2 {
            assert!(matches!(qmp.execute("query-b", Value::Null), Err(QmpError::Silent { .. } | QmpError::Closed)));
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        drop(qmp);
        thread.join().unwrap();
    }

    #[test]
    fn event_that_does_not_come_is_none_and_old_ones_make_room() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(format!("{GREETING}\n{{\"return\": {{}}, \"id\": 1}}\n").as_bytes()).unwrap();
        let mut qmp = Qmp::over(ours, ANSWER_MAX).unwrap();
        for number in 0..=EVENTS_MAX {
            theirs.write_all(format!("{{\"event\": \"E{number}\"}}\n").as_bytes()).unwrap();
        }
        assert_eq!(qmp.event(|_| false, Duration::from_millis(50)).unwrap(), None);
        assert_eq!((qmp.events.len(), qmp.events[0].name.as_str()), (EVENTS_MAX, "E1"));
    }

    #[test]
    fn line_without_end_is_a_fault_and_not_a_growing_buffer() {
        let mut lines = Lines::default();
        lines.push(&vec![b' '; LINE_BYTES_MAX]);
        assert_eq!(lines.next_message().unwrap(), None);
        lines.push(b"  ");
        assert!(lines.next_message().is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut lines = Lines::default();
            lines.push(&bytes);
            while let Ok(Some(_)) = lines.next_message() {}
        }

        #[test]
        fn any_cut_into_pieces_gives_the_same_messages(cuts in proptest::collection::vec(1_usize..40, 0..12)) {
            let text = format!("{GREETING}\n\n{{\"event\": \"A\", \"data\": {{\"é\": [1, null]}}}}\r\n{{\"return\": 5}}\n");
            let mut lines = Lines::default();
            let (mut rest, mut found) = (text.as_bytes(), Vec::new());
            for cut in cuts.into_iter().chain([text.len()]) {
                let (piece, behind) = rest.split_at(cut.min(rest.len()));
                lines.push(piece);
                rest = behind;
                while let Some(message) = lines.next_message().unwrap() {
                    found.push(message);
                }
            }
            prop_assert_eq!(found.len(), 3);
            let event = Event { name: "A".into(), data: json!({ "é": [1, null] }) };
            prop_assert_eq!(&found[1..], &[Message::Event(event), Message::Return(None, json!(5))]);
        }

        #[test]
        fn what_is_shown_is_short_and_moves_no_cursor(text in any::<String>()) {
            let shown = shown(&text);
            prop_assert!(shown.len() <= SHOWN_BYTES_MAX * 2 && !shown.chars().any(char::is_control));
        }
    }
}
