//! What waits for a client: answers of its own thread, and frames from the devices of the guests it holds.
//!
//! In:    messages, from any thread
//! Out:   the frames to be sent, to the client's thread, in the order in which the messages came
//! Runs:  on the caller's thread; nothing blocks for longer than a push
//! Full:  the client's thread asks [`Outbox::has_room`] before it serves the next request: [`ANSWER_BYTES_MAX`] wait at
//!        most, and one more answer. A device asks [`Session::has_room`] before it takes the next frame of its agent;
//!        after a no it is woken when the client has read half of what waited. That an agent is gone is sent in any case
//! Trust: the server's own threads. The client with nothing: what it does not read stays within these bounds

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vtrace_common::{
    limits::{CLIENTS_MAX, FRAME_BYTES_MAX, FRAMES_WAITING_MAX, USER_CLIENTS_MAX},
    wire::{
        Message,
        client::{FromServer, Refusal},
        encode,
    },
};

/// Bytes of answers that may wait for a client before its next request is served.
pub const ANSWER_BYTES_MAX: usize = 256 << 10;
/// Bytes of an agent's frames that may wait for the client that holds its guest.
pub const SESSION_BYTES_MAX: usize = 1 << 20;

const _: () = assert!(USER_CLIENTS_MAX * (ANSWER_BYTES_MAX + 2 * FRAME_BYTES_MAX) <= 8 << 20, "one user's answers");
const _: () = assert!(CLIENTS_MAX * (ANSWER_BYTES_MAX + 2 * FRAME_BYTES_MAX) <= 32 << 20, "all clients' answers");

/// Wakes a thread that polls it.
#[derive(Debug)]
pub struct Notifier(EventFd);

impl Notifier {
    /// A silent one.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_value_and_flags(0, flags)?))
    }

    /// Makes it readable.
    pub fn notify(&self) {
        // The only failure is a counter that is full: then it is readable already.
        let _ = self.0.write(1);
    }

    /// Makes it silent again.
    pub fn clear(&self) {
        // The only failure is that it was silent.
        let _ = self.0.read();
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A frame that waits, and the claim it belongs to.
#[derive(Debug)]
pub struct Waiting {
    /// The claim, if it belongs to one.
    pub session: Option<Arc<Session>>,
    /// What it means for the claim.
    pub meaning: Meaning,
    /// What is sent.
    pub frame: Vec<u8>,
}

/// What a message means for the claim it belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Meaning {
    /// The guest is the claimant's.
    Claimed,
    /// The guest is released.
    Released,
    /// The last request is refused.
    Refused,
    /// Nothing.
    Other,
}

impl Meaning {
    fn of(message: &FromServer) -> Self {
        match message {
            FromServer::Claimed(_) => Self::Claimed,
            FromServer::Released { .. } => Self::Released,
            FromServer::Refused(_) => Self::Refused,
            _ => Self::Other,
        }
    }
}

/// The frames for one client.
#[derive(Debug)]
pub struct Outbox {
    queue: Mutex<Queue>,
    notifier: Notifier,
}

#[derive(Default, Debug)]
struct Queue {
    waiting: VecDeque<Waiting>,
    /// Bytes of those that belong to no claim.
    answer_bytes: usize,
    /// The client is gone: each frame may hold a session, and each session holds the outbox.
    is_closed: bool,
}

/// One client's claim on one guest.
#[derive(Debug)]
pub struct Session {
    outbox: Arc<Outbox>,
    device: Arc<Notifier>,
    waiting: AtomicUsize,
    waiting_bytes: AtomicUsize,
    /// The device has left its agent's ring alone.
    starved: AtomicBool,
    /// The client has released the guest: what comes late is dropped.
    ended: AtomicBool,
}

impl Outbox {
    /// An empty one.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { queue: Mutex::default(), notifier: Notifier::new()? }))
    }

    /// Rings when there is something to take.
    pub fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    /// Adds an answer that belongs to no claim.
    pub fn post(&self, message: &FromServer) {
        self.push(None, Meaning::of(message), frame(message));
    }

    /// Whether the next request may be served.
    pub fn has_room(&self) -> bool {
        self.queue().answer_bytes < ANSWER_BYTES_MAX
    }

    /// Takes the oldest frame.
    pub fn take(&self) -> Option<Waiting> {
        let mut queue = self.queue();
        let waiting = queue.waiting.pop_front()?;
        match &waiting.session {
            Some(session) => session.taken(waiting.frame.len()),
            None => queue.answer_bytes -= waiting.frame.len(),
        }
        Some(waiting)
    }

    fn push(&self, session: Option<Arc<Session>>, meaning: Meaning, frame: Vec<u8>) {
        let mut queue = self.queue();
        if !queue.is_closed {
            queue.answer_bytes += if session.is_none() { frame.len() } else { 0 };
            queue.waiting.push_back(Waiting { session, meaning, frame });
        }
        drop(queue);
        self.notifier.notify();
    }

    /// The client is gone: what waits is dropped, and so is what comes later.
    pub fn close(&self) {
        let mut queue = self.queue();
        queue.is_closed = true;
        let unread = std::mem::take(&mut queue.waiting);
        drop(queue);
        drop(unread);
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The frame of a message. A message beyond its bounds (a list of too many guests, say) becomes a refusal.
pub(super) fn frame(message: &impl Message) -> Vec<u8> {
    encode(message).unwrap_or_else(|fault| {
        let refusal = Refusal::Request { detail: format!("the answer is not sent: {fault}") };
        encode(&FromServer::Refused(refusal)).expect("a short refusal is within its bounds")
    })
}

impl Session {
    /// A claim whose messages go to `outbox` and whose device is woken by `device`.
    pub fn new(outbox: Arc<Outbox>, device: Arc<Notifier>) -> Arc<Self> {
        Arc::new(Self {
            outbox,
            device,
            waiting: AtomicUsize::new(0),
            waiting_bytes: AtomicUsize::new(0),
            starved: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        })
    }

    /// Adds a message, room or not.
    pub fn post(self: &Arc<Self>, message: &FromServer) {
        if self.ended.load(Ordering::SeqCst) {
            return;
        }
        let frame = frame(message);
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.waiting_bytes.fetch_add(frame.len(), Ordering::SeqCst);
        self.outbox.push(Some(Arc::clone(self)), Meaning::of(message), frame);
    }

    /// Whether one more frame may be taken from the agent. After a no the device is woken when there is.
    pub fn has_room(&self) -> bool {
        if self.is_within(1) {
            return true;
        }
        // Either the client's thread sees that the device waits, or the device sees what the client has read by now.
        self.starved.store(true, Ordering::SeqCst);
        self.is_within(2)
    }

    /// Whether what waits is less than this part of what may.
    fn is_within(&self, part: usize) -> bool {
        self.waiting.load(Ordering::SeqCst) < FRAMES_WAITING_MAX / part
            && self.waiting_bytes.load(Ordering::SeqCst) < SESSION_BYTES_MAX / part
    }

    /// From now on nothing is added.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    fn taken(&self, bytes: usize) {
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.waiting_bytes.fetch_sub(bytes, Ordering::SeqCst);
        if self.is_within(2) && self.starved.swap(false, Ordering::SeqCst) {
            self.device.notify();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> FromServer {
        FromServer::Released { guest: "guest1".into() }
    }

    fn rings(notifier: &Notifier) -> bool {
        notifier.0.read().is_ok()
    }

    #[test]
    fn device_of_a_slow_client_is_woken_when_half_is_read() {
        let (outbox, device) = (Outbox::new().unwrap(), Arc::new(Notifier::new().unwrap()));
        let session = Session::new(Arc::clone(&outbox), Arc::clone(&device));
        for _ in 0..FRAMES_WAITING_MAX {
            assert!(session.has_room());
            session.post(&message());
        }
        assert!(!session.has_room());
        for _ in 0..=FRAMES_WAITING_MAX / 2 {
            assert!(!rings(&device));
            outbox.take().unwrap();
        }
        assert!(rings(&device) && session.has_room());
    }

    #[test]
    fn long_frames_of_an_agent_fill_the_room_by_their_bytes() {
        let (outbox, device) = (Outbox::new().unwrap(), Arc::new(Notifier::new().unwrap()));
        let session = Session::new(Arc::clone(&outbox), device);
        let detail = "x".repeat(4000);
        let long = FromServer::Refused(Refusal::Request { detail });
        let mut count = 0;
        while session.has_room() && count < FRAMES_WAITING_MAX {
            (0..16).for_each(|_| session.post(&long));
            count += 1;
        }
        assert!(count <= 1 + SESSION_BYTES_MAX / (16 * 4000), "{count} times 16 frames");
    }

    #[test]
    fn answers_that_are_not_read_leave_no_room_for_the_next_request() {
        let outbox = Outbox::new().unwrap();
        let mut count = 0;
        while outbox.has_room() {
            outbox.post(&message());
            count += 1;
        }
        assert!(count * frame(&message()).len() < ANSWER_BYTES_MAX + FRAME_BYTES_MAX);
        outbox.take().unwrap();
        assert!(outbox.has_room());
    }

    #[test]
    fn device_that_does_not_starve_is_not_woken() {
        let (outbox, device) = (Outbox::new().unwrap(), Arc::new(Notifier::new().unwrap()));
        let session = Session::new(Arc::clone(&outbox), Arc::clone(&device));
        session.post(&message());
        assert!(outbox.take().is_some() && !rings(&device));
    }

    #[test]
    fn client_that_leaves_without_reading_takes_everything_along() {
        let (outbox, device) = (Outbox::new().unwrap(), Arc::new(Notifier::new().unwrap()));
        let session = Session::new(Arc::clone(&outbox), device);
        session.post(&message());
        outbox.close();
        session.post(&message());
        assert!(outbox.take().is_none());
        let seen = Arc::downgrade(&outbox);
        drop((outbox, session));
        assert!(seen.upgrade().is_none(), "a message held its claim, and the claim its outbox");
    }

    #[test]
    fn nothing_is_added_to_a_claim_that_has_ended() {
        let (outbox, device) = (Outbox::new().unwrap(), Arc::new(Notifier::new().unwrap()));
        let session = Session::new(Arc::clone(&outbox), device);
        session.end();
        session.post(&message());
        assert!(outbox.queue().waiting.is_empty());
        outbox.post(&message());
        assert!(!outbox.queue().waiting.is_empty());
    }
}
