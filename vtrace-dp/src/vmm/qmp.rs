//! QMP, QEMU's control channel: JSON lines over a socket (docs/interop/qmp-spec.rst).
//!
//! In:    commands; bytes from the process that listens on the socket
//! Out:   return values, events, or a [`QmpError`]
//! Runs:  on the caller's thread; no call takes longer than its timeout
//! Full:  a line longer than [`LINE_BYTES_MAX`] is an error; the newest [`EVENTS_MAX`] events are kept, and only the name
//!        of an event whose line is longer than [`EVENT_BYTES_MAX`]
//! Trust: nothing: lines are bounded before they are parsed, texts are cleaned before they are shown
//!
//! Only a dozen of QMP's commands are used, so their return values are parsed where they are used.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::qemu::QemuVersion;
use crate::sys::socket::dial;

/// Longest line accepted. QEMU's longest answers (query-pci of a full machine) have some hundred KiB.
pub const LINE_BYTES_MAX: usize = 4 << 20;
/// Events kept until they are asked for.
pub const EVENTS_MAX: usize = 256;
/// Longest line of an event whose data is kept. QEMU's events have some hundred bytes.
pub const EVENT_BYTES_MAX: usize = 16 << 10;
/// Timeout of one answer.
pub const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Longest text of QEMU's that is shown.
const SHOWN_BYTES_MAX: usize = 300;
/// Bytes read at a time.
const PIECE_BYTES: usize = 16 << 10;

/// A QMP command that failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket cannot be connected.
    #[error("no QMP at {}: {source}", path.display())]
    NoSocket {
        /// Path of the socket.
        path: PathBuf,
        /// The error of connect(2).
        source: std::io::Error,
    },
    /// No answer in time. A QMP socket that serves another client sends no greeting either.
    #[error("QMP does not answer {what} within {} s", waited.as_secs())]
    Silent {
        /// The command, or the connection.
        what: String,
        /// The timeout.
        waited: Duration,
    },
    /// QEMU closed the socket.
    #[error("QEMU closed its QMP socket")]
    Closed,
    /// Not a QMP message.
    #[error("this is not a QMP socket: {0}")]
    Foreign(String),
    /// QEMU refused a command.
    #[error("QEMU refuses {command}: {why}")]
    Refused {
        /// Name of the command.
        command: String,
        /// QEMU's error message.
        why: String,
    },
    /// The return value does not have the form that the command's has.
    #[error("unexpected answer of QEMU to {0}")]
    Answer(String),
    /// A system call on the socket failed.
    #[error("QMP socket: {0}")]
    Socket(std::io::Error),
}

/// One line from QEMU.
#[derive(Clone, PartialEq, Debug)]
pub enum QmpMessage {
    /// The greeting.
    Greeting(QemuVersion),
    /// A command's number and return value.
    Return(Option<u64>, Value),
    /// A command's number and error message.
    Error(Option<u64>, String),
    /// An event.
    Event(QmpEvent),
}

/// An event.
#[derive(Clone, PartialEq, Debug)]
pub struct QmpEvent {
    /// Name, such as `DEVICE_DELETED`.
    pub name: String,
    /// Its `data` member.
    pub data: Value,
}

/// A line as JSON; exactly one of the first four members is present.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<GreetingMember>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<ErrorMember>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct GreetingMember {
    version: VersionMember,
}

#[derive(Deserialize)]
struct VersionMember {
    qemu: QemuVersion,
}

#[derive(Deserialize)]
struct ErrorMember {
    desc: String,
}

impl QmpMessage {
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
            // No event that is waited for is that long.
            Line { event: Some(name), .. } if bytes > EVENT_BYTES_MAX => {
                Self::Event(QmpEvent { name: shown(&name), data: Value::Null })
            }
            Line { event: Some(name), data, .. } => Self::Event(QmpEvent { name: shown(&name), data }),
            _ => return Err(foreign()),
        })
    }
}

/// A text of QEMU's for a terminal: bounded, without control characters.
pub fn shown(text: &str) -> String {
    let text = &text[..text.floor_char_boundary(SHOWN_BYTES_MAX)];
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect::<String>().trim().into()
}

/// Splits a stream of bytes into messages.
#[derive(Default, Debug)]
pub struct QmpDecoder {
    bytes: Vec<u8>,
    /// Bytes already searched for the end of a line.
    searched: usize,
}

impl QmpDecoder {
    /// Appends bytes.
    pub fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
    }

    /// The next complete message; empty lines are skipped.
    ///
    /// # Errors
    /// [`QmpError::Foreign`] for a line that is not a message, or is too long.
    pub fn next_message(&mut self) -> Result<Option<QmpMessage>, QmpError> {
        loop {
            let Some(end) = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n') else {
                self.searched = self.bytes.len();
                let too_long = self.bytes.len() > LINE_BYTES_MAX;
                return if too_long { Err(QmpError::Foreign("a line is too long".into())) } else { Ok(None) };
            };
            let line: Vec<u8> = self.bytes.drain(..=self.searched + end).collect();
            self.searched = 0;
            let line = line.trim_ascii();
            if !line.is_empty() {
                return QmpMessage::parse(line).map(Some);
            }
        }
    }
}

/// Connects. A QMP socket that serves a client queues one more; further ones cannot even connect.
fn connect_socket(path: &Path, wait_max: Duration) -> Result<UnixStream, QmpError> {
    dial(path, wait_max).map_err(|source| match source.kind() {
        ErrorKind::WouldBlock => QmpError::Silent { what: "the connection".into(), waited: wait_max },
        _ => QmpError::NoSocket { path: path.into(), source },
    })
}

/// A connection to QEMU.
#[derive(Debug)]
pub struct Qmp {
    socket: UnixStream,
    decoder: QmpDecoder,
    events: VecDeque<QmpEvent>,
    number: u64,
    /// Deadline of all answers.
    until: Option<Instant>,
    /// QEMU's version.
    pub version: QemuVersion,
}

impl Qmp {
    /// Connects, waits for the greeting, leaves the negotiation mode.
    ///
    /// # Errors
    /// [`QmpError`]
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        Self::over(connect_socket(path, ANSWER_MAX)?, ANSWER_MAX)
    }

    /// The same over a connected socket.
    ///
    /// # Errors
    /// [`QmpError`]
    pub fn over(socket: UnixStream, wait_max: Duration) -> Result<Self, QmpError> {
        let version = QemuVersion { major: 0, minor: 0, micro: 0 };
        let mut qmp =
            Self { socket, decoder: QmpDecoder::default(), events: VecDeque::new(), number: 0, until: None, version };
        match qmp.message("the connection", Instant::now(), wait_max)? {
            QmpMessage::Greeting(version) => qmp.version = version,
            _ => return Err(QmpError::Foreign("no greeting".into())),
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Sets a common deadline for all answers from now on.
    pub fn limit(&mut self, all_max: Duration) {
        self.until = Some(Instant::now() + all_max);
    }

    /// Timeout of the next answer.
    fn answer_max(&self) -> Duration {
        self.until.map_or(ANSWER_MAX, |until| ANSWER_MAX.min(until.saturating_duration_since(Instant::now())))
    }

    /// Executes a command and returns its value.
    ///
    /// # Errors
    /// [`QmpError`]; after any but `Refused` and `Answer` the connection is unusable.
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
                QmpMessage::Return(id, value) if id == Some(self.number) => return Ok(value),
                QmpMessage::Error(id, why) if id == Some(self.number) => {
                    return Err(QmpError::Refused { command: command.into(), why });
                }
                QmpMessage::Event(event) => self.keep(event),
                // An answer that came after its timeout.
                QmpMessage::Return(..) | QmpMessage::Error(..) | QmpMessage::Greeting(_) => {}
            }
        }
    }

    /// Waits for an event that `is_it` accepts, among those received before too. `None`: timeout.
    ///
    /// # Errors
    /// [`QmpError`]
    pub fn event(
        &mut self,
        is_it: impl Fn(&QmpEvent) -> bool,
        wait_max: Duration,
    ) -> Result<Option<QmpEvent>, QmpError> {
        let begun = Instant::now();
        loop {
            if let Some(at) = self.events.iter().position(&is_it) {
                return Ok(self.events.remove(at));
            }
            match self.message("", begun, wait_max) {
                Ok(QmpMessage::Event(event)) => self.keep(event),
                Ok(_) => {}
                Err(QmpError::Silent { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn keep(&mut self, event: QmpEvent) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn message(&mut self, what: &str, begun: Instant, wait_max: Duration) -> Result<QmpMessage, QmpError> {
        let mut piece = [0; PIECE_BYTES];
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(message);
            }
            let silent = || QmpError::Silent { what: what.into(), waited: wait_max };
            let left = wait_max.checked_sub(begun.elapsed()).filter(|left| !left.is_zero()).ok_or_else(silent)?;
            self.socket.set_read_timeout(Some(left)).map_err(QmpError::Socket)?;
            match self.socket.read(&mut piece) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(count) => self.decoder.push(&piece[..count]),
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

    /// A QEMU that sends these lines: the first at once, each of the others after a request.
    fn qemu(lines: Vec<String>) -> (UnixStream, JoinHandle<Vec<String>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let answer = move || {
            let mut requests = BufReader::new(theirs.try_clone().unwrap()).lines();
            let mut received = Vec::new();
            for line in lines {
                theirs.write_all(line.as_bytes()).unwrap();
                received.extend(requests.next().and_then(Result::ok));
            }
            received
        };
        (ours, spawn(answer))
    }

    #[test]
    fn answers_belong_to_their_commands_and_events_are_kept() {
        let event = r#"{"timestamp": {}, "event": "DEVICE_DELETED", "data": {"device": "vtrace0"}}"#;
        let (socket, thread) = qemu(vec![
            format!("{GREETING}\r\n"),
            "{\"return\": {}, \"id\": 1}\n".into(),
            format!("{{\"return\": \"late\", \"id\": 1}}\n{event}\n{{\"return\": [7], \"id\": 2}}\n"),
            "{\"id\": 3, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\\u001b[2Jway\"}}\n".into(),
        ]);
        let mut qmp = Qmp::over(socket, ANSWER_MAX).unwrap();
        assert_eq!(qmp.version, QemuVersion { major: 11, minor: 1, micro: 3 });
        assert_eq!(qmp.execute("query-x", json!({ "a": 1 })).unwrap(), json!([7]));
        let refused = qmp.execute("device_add", Value::Null).unwrap_err();
        assert_eq!(refused.to_string(), "QEMU refuses device_add: no [2Jway");
        let found = qmp.event(|event| event.name == "DEVICE_DELETED", Duration::ZERO).unwrap().unwrap();
        assert_eq!(found.data["device"], "vtrace0");
        drop(qmp);
        assert_eq!(thread.join().unwrap()[1], r#"{"arguments":{"a":1},"execute":"query-x","id":2}"#);
    }

    #[test]
    fn socket_that_serves_another_client_is_an_error_after_the_timeout() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = Qmp::over(ours, Duration::from_millis(20)).unwrap_err();
        assert!(matches!(&error, QmpError::Silent { what, .. } if what == "the connection"), "{error}");
    }

    #[test]
    fn socket_whose_queue_is_full_is_an_error_after_the_timeout() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        let begun = Instant::now();
        let error = connect_socket(&path, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, QmpError::Silent { .. }) && begun.elapsed() < Duration::from_secs(5), "{error}");
        drop(listener);
        assert!(matches!(connect_socket(&path, ANSWER_MAX), Err(QmpError::NoSocket { .. })));
    }

    #[test]
    fn long_event_is_kept_by_its_name_only() {
        let data = "x".repeat(EVENT_BYTES_MAX);
        let line = format!("{{\"event\": \"BIG\", \"data\": {{\"path\": {data:?}}}}}");
        assert_eq!(
            QmpMessage::parse(line.as_bytes()).unwrap(),
            QmpMessage::Event(QmpEvent { name: "BIG".into(), data: Value::Null })
        );
    }

    #[test]
    fn end_of_qemu_and_foreign_bytes_are_told_apart() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(matches!(Qmp::over(ours, ANSWER_MAX), Err(QmpError::Closed)));
        let (ours, thread) = qemu(vec!["SSH-2.0-OpenSSH\x07\n".into()]);
        let error = Qmp::over(ours, ANSWER_MAX).unwrap_err();
        assert_eq!(error.to_string(), "this is not a QMP socket: SSH-2.0-OpenSSH");
        thread.join().unwrap();
    }

    #[test]
    fn all_answers_together_meet_their_deadline() {
        let slow = |number: u64| format!("{{\"return\": {{}}, \"id\": {number}}}\n");
        let (socket, thread) = qemu(vec![format!("{GREETING}\n"), slow(1), slow(2)]);
        let mut qmp = Qmp::over(socket, ANSWER_MAX).unwrap();
        qmp.limit(Duration::from_millis(200));
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
    fn event_that_does_not_come_is_none_and_the_oldest_events_are_dropped() {
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
        let mut decoder = QmpDecoder::default();
        decoder.push(&vec![b' '; LINE_BYTES_MAX]);
        assert_eq!(decoder.next_message().unwrap(), None);
        decoder.push(b"  ");
        assert!(decoder.next_message().is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = QmpDecoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_message() {}
        }

        #[test]
        fn messages_do_not_depend_on_how_the_stream_is_split(cuts in proptest::collection::vec(1_usize..40, 0..12)) {
            let text = format!("{GREETING}\n\n{{\"event\": \"A\", \"data\": {{\"é\": [1, null]}}}}\r\n{{\"return\": 5}}\n");
            let mut decoder = QmpDecoder::default();
            let (mut rest, mut found) = (text.as_bytes(), Vec::new());
            for cut in cuts.into_iter().chain([text.len()]) {
                let (piece, remainder) = rest.split_at(cut.min(rest.len()));
                decoder.push(piece);
                rest = remainder;
                while let Some(message) = decoder.next_message().unwrap() {
                    found.push(message);
                }
            }
            prop_assert_eq!(found.len(), 3);
            let event = QmpEvent { name: "A".into(), data: json!({ "é": [1, null] }) };
            prop_assert_eq!(&found[1..], &[QmpMessage::Event(event), QmpMessage::Return(None, json!(5))]);
        }

        #[test]
        fn shown_text_is_short_and_moves_no_cursor(text in any::<String>()) {
            let shown = shown(&text);
            prop_assert!(shown.len() <= SHOWN_BYTES_MAX * 2 && !shown.chars().any(char::is_control));
        }
    }
}
