//! What waits for a client: answers of its own thread, and frames from the devices of the guests it holds.
//!
//! In:    messages, from any thread
//! Out:   messages, to the client's thread, in the order in which they came
//! Runs:  on whichever thread calls; nothing blocks for longer than a push
//! Full:  a device asks [`Session::has_room`] before it takes the next frame of its agent; after a no it is woken when the
//!        client has read half of what waited. What must be said at once (an agent is gone) is said in any case.
//! Trust: our own threads

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
use vtrace_common::{limits::FRAMES_WAITING_MAX, wire::client::FromServer};

/// Wakes a thread that polls it.
#[derive(Debug)]
pub struct Bell(EventFd);

impl Bell {
    /// A silent one.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_value_and_flags(0, flags)?))
    }

    /// Makes it readable.
    pub fn ring(&self) {
        // The only failure is a counter that is full: then it is readable already.
        let _ = self.0.write(1);
    }

    /// Makes it silent again.
    pub fn silence(&self) {
        // The only failure is that it was silent.
        let _ = self.0.read();
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A message, and the claim it belongs to.
type Waiting = (Option<Arc<Session>>, FromServer);

/// The messages for one client.
#[derive(Debug)]
pub struct Outbox {
    /// `None` when the client is gone: each message may hold a session, and each session holds this.
    queue: Mutex<Option<VecDeque<Waiting>>>,
    bell: Bell,
}

/// One client's claim on one guest.
#[derive(Debug)]
pub struct Session {
    outbox: Arc<Outbox>,
    device: Arc<Bell>,
    waiting: AtomicUsize,
    /// The device has left its agent's ring alone.
    starved: AtomicBool,
    /// The client has released the guest: what comes late is nobody's.
    ended: AtomicBool,
}

impl Outbox {
    /// An empty one.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { queue: Mutex::new(Some(VecDeque::new())), bell: Bell::new()? }))
    }

    /// Rings when there is something to take.
    pub fn bell(&self) -> &Bell {
        &self.bell
    }

    /// Adds an answer that belongs to no claim.
    pub fn post(&self, message: FromServer) {
        self.push(None, message);
    }

    /// Messages that wait.
    pub fn len(&self) -> usize {
        self.queue().as_ref().map_or(0, VecDeque::len)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the oldest message.
    pub fn take(&self) -> Option<(Option<Arc<Session>>, FromServer)> {
        let (session, message) = self.queue().as_mut()?.pop_front()?;
        if let Some(session) = &session {
            session.taken();
        }
        Some((session, message))
    }

    fn push(&self, session: Option<Arc<Session>>, message: FromServer) {
        if let Some(queue) = self.queue().as_mut() {
            queue.push_back((session, message));
        }
        self.bell.ring();
    }

    /// Nobody takes anything any more: what waits goes, and what comes later goes at once.
    pub fn close(&self) {
        let unread = self.queue().take();
        drop(unread);
    }

    fn queue(&self) -> MutexGuard<'_, Option<VecDeque<Waiting>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session {
    /// A claim whose messages go to `outbox` and whose device is woken by `device`.
    pub fn new(outbox: Arc<Outbox>, device: Arc<Bell>) -> Arc<Self> {
        let (waiting, starved, ended) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { outbox, device, waiting, starved, ended })
    }

    /// Adds a message, room or not.
    pub fn post(self: &Arc<Self>, message: FromServer) {
        if self.ended.load(Ordering::SeqCst) {
            return;
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.outbox.push(Some(Arc::clone(self)), message);
    }

    /// Whether one more frame may be taken from the agent. After a no the device is woken when there is.
    pub fn has_room(&self) -> bool {
        if self.waiting.load(Ordering::SeqCst) < FRAMES_WAITING_MAX {
            return true;
        }
        // Either the client's thread sees that we starve, or we see what it has read by now.
        self.starved.store(true, Ordering::SeqCst);
        self.waiting.load(Ordering::SeqCst) <= FRAMES_WAITING_MAX / 2
    }

    /// From now on nothing is added.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    fn taken(&self) {
        let waiting = self.waiting.fetch_sub(1, Ordering::SeqCst) - 1;
        if waiting <= FRAMES_WAITING_MAX / 2 && self.starved.swap(false, Ordering::SeqCst) {
            self.device.ring();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> FromServer {
        FromServer::Released { guest: "guest1".into() }
    }

    fn rings(bell: &Bell) -> bool {
        bell.0.read().is_ok()
    }

    #[test]
    fn device_of_a_slow_client_is_woken_when_half_is_read() {
        let (outbox, device) = (Outbox::new().unwrap(), Arc::new(Bell::new().unwrap()));
        let session = Session::new(Arc::clone(&outbox), Arc::clone(&device));
        for _ in 0..FRAMES_WAITING_MAX {
            assert!(session.has_room());
            session.post(message());
        }
        assert!(!session.has_room());
        for _ in 0..FRAMES_WAITING_MAX / 2 {
            assert!(!rings(&device));
            outbox.take().unwrap();
        }
        assert!(rings(&device) && session.has_room());
    }

    #[test]
    fn device_that_does_not_starve_is_not_woken() {
        let (outbox, device) = (Outbox::new().unwrap(), Arc::new(Bell::new().unwrap()));
        let session = Session::new(Arc::clone(&outbox), Arc::clone(&device));
        session.post(message());
        assert!(outbox.take().is_some() && !rings(&device));
    }

    #[test]
    fn client_that_leaves_without_reading_takes_everything_along() {
        let (outbox, device) = (Outbox::new().unwrap(), Arc::new(Bell::new().unwrap()));
        let session = Session::new(Arc::clone(&outbox), device);
        session.post(message());
        outbox.close();
        session.post(message());
        assert!(outbox.is_empty() && outbox.take().is_none());
        let seen = Arc::downgrade(&outbox);
        drop((outbox, session));
        assert!(seen.upgrade().is_none(), "a message held its claim, and the claim its outbox");
    }

    #[test]
    fn nothing_is_added_to_a_claim_that_has_ended() {
        let (outbox, device) = (Outbox::new().unwrap(), Arc::new(Bell::new().unwrap()));
        let session = Session::new(Arc::clone(&outbox), device);
        session.end();
        session.post(message());
        assert!(outbox.is_empty());
        outbox.post(message());
        assert_eq!(outbox.len(), 1);
    }
}
