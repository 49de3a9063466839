//! The owner of a guest's second or later device: it has lanes and no agent.
//!
//! In:    what the device's thread has to tell
//! Out:   the same to the guest's [`Devices`](super::devices::Devices), and its guest woken when a VMM has gone
//! Runs:  on the device's thread
//! Trust: as [`super::devices`]

use std::{
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use vtrace_common::wire::client::DriverState;

use super::guest::GuestSlot;
use crate::{
    device::{AgentEvent, ControlPort, Foreign, Owner, Turn},
    sys::socket::Peer,
};

/// The owner of a guest's second or later device, on that device's thread.
#[derive(Debug)]
pub(super) struct ExtraDevice {
    slot: Arc<GuestSlot>,
    device: usize,
}

impl ExtraDevice {
    pub(super) fn new(slot: Arc<GuestSlot>, device: usize) -> Self {
        Self { slot, device }
    }
}

impl Owner for ExtraDevice {
    fn wake(&self) -> BorrowedFd<'_> {
        self.slot.devices.end.as_fd()
    }

    fn turn(&mut self, _port: &mut ControlPort) -> Turn {
        if self.slot.devices.ended.load(Ordering::Acquire) { Turn::Stop } else { Turn::Continue }
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn has_room(&mut self) -> bool {
        true
    }

    fn admit(&mut self, peer: Peer, socket: &UnixStream) -> Result<(), Foreign> {
        self.slot.devices.admit(self.device, peer, socket)
    }

    fn vmm(&mut self, peer: Option<Peer>) {
        if peer.is_none() {
            self.slot.devices.left(self.device);
            self.slot.devices.gone.store(true, Ordering::Release);
            self.slot.notifier.notify();
        }
    }

    fn driver(&mut self, state: DriverState, ports: usize) {
        self.slot.log.info(format_args!("device {}: driver {state:?}, {ports} ports", self.device + 1));
        self.slot.devices.driver(self.device, state, ports);
    }

    fn agent(&mut self, _event: AgentEvent, _port: &mut ControlPort) {
        // Its port 0 is never open.
    }
}
