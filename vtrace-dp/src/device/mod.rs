//! A vhost-user virtio-console device of a guest: most guests have one, large ones have several.
//!
//! From the top down; each module uses only what stands below it:
//!
//! | module | what |
//! |---|---|
//! | `socket` | the thread that serves a device: VMMs that connect, requests, kicks, the owner |
//! | `connection` | the connection of one VMM: whole requests to the `vhost` crate, its answers to the VMM |
//! | `requests` | requests as that crate hands them over |
//! | `backend` | what the VMM has set: memory, features, rings |
//! | `device_rings` | the four rings of the device's own thread: port 0's and the control queue's |
//! | `console` | which ports there are, what they are called, who has them open |
//! | `control_port` | frames between the server and the agent |
//! | `negotiate` | what the device offers, and what follows from what the driver accepts |
//! | `lane_range` | which lanes a device carries |
//!
//! In:    vhost-user requests of a VMM; rings in guest memory; commands of the server through its [`Owner`]
//! Out:   the control protocol's answers; [`AgentEvent`]s to the owner; running data rings to the [`RingDrain`]
//! Runs:  one thread a device, which never waits for a disk, except when the VMM asks to stop a ring (GET_VRING_BASE):
//!        then the guest does not run and the VMM waits for the writes to be done
//! Full:  the agent's ring is left alone while the owner has no room; the control queue is served whatever happens
//! Trust: the VMM with what any device is trusted with; the guest with nothing
//!
//! A control queue that is not served makes a guest's CPU spin for ever, and a socket that closes while the guest runs
//! can end the VMM. So nothing that goes wrong here ends the thread or closes the socket.
//!
//! [`RingDrain`]: crate::drain::ring::RingDrain

mod backend;
mod connection;
pub mod console;
pub mod control_port;
mod device_rings;
pub mod lane_range;
pub mod negotiate;
mod requests;
pub mod socket;
#[cfg(test)]
pub(crate) mod testing;

use std::{
    os::{fd::BorrowedFd, unix::net::UnixStream},
    time::Instant,
};

use vtrace_common::wire::client::DriverState;

pub use control_port::{AgentEvent, ControlPort};

use crate::sys::socket::Peer;

/// Who a device belongs to. Everything is called on the device's thread and must not block.
pub trait Owner: Send {
    /// Becomes readable (again) whenever [`Owner::turn`] has something to do. Watched edge-triggered, never read.
    fn wake(&self) -> BorrowedFd<'_>;
    /// Does what was asked for since the last turn, and what is due.
    fn turn(&mut self, port: &mut ControlPort) -> Turn;
    /// When the next turn is due without being woken.
    fn deadline(&self) -> Option<Instant>;
    /// Whether the next thing an agent says can be taken. After a no, `wake` says when to ask again.
    fn has_room(&mut self) -> bool;
    /// Whether a VMM that has connected may be this device's. If it may, [`Owner::vmm`] follows.
    fn admit(&mut self, _peer: Peer, _socket: &UnixStream) -> Result<(), Foreign> {
        Ok(())
    }
    /// A VMM connected, or went away and took the driver and the agent along.
    fn vmm(&mut self, peer: Option<Peer>);
    /// The driver's state changed; `ports` is how many the device has.
    fn driver(&mut self, state: DriverState, ports: usize);
    /// Something happened on the control port.
    fn agent(&mut self, event: AgentEvent, port: &mut ControlPort);
}

/// Why a VMM may not have a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("another device of this guest belongs to pid {0}")]
pub struct Foreign(pub u32);

/// Whether the device goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// It does.
    Continue,
    /// It ends: the socket closes.
    Stop,
}
