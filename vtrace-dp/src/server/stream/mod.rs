//! Guests whose ports come over QEMU's own virtio-serial device, as sockets or FIFOs: every QEMU has it.
//!
//! In:    one stream a port, opened by QEMU; a folder that `vtrace setup` made
//! Out:   what a guest with a device of ours gives: its agent's messages to the holder, its pages to the file, a ledger
//! Runs:  one thread a guest for its agent, one for the pages of 126 lanes
//! Full:  bytes stay where they are, up to the guest's ring buffer, which overwrites and counts
//! Trust: guests with nothing: all that comes is bytes of a guest, in whatever order QEMU dies in between
//!
//! | file | what |
//! |---|---|
//! | `control` | the agent's stream: connections, hellos, frames |
//! | `cutter` | bytes ─► frames |
//!
//! The pages' streams are in [`crate::drain::stream`].

mod control;
mod cutter;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{Arc, atomic::AtomicBool},
    thread::{self, JoinHandle},
};

use vtrace_common::{ids::Cpu, limits::DEVICE_LANES_MAX};

use self::control::Control;
use super::{
    GuestConfig, Sockets, device_name,
    devices::DeviceParts,
    guest::GuestSlot,
    sockets::{Access, SocketFault},
};
use crate::{
    drain::stream::{
        StreamDrain,
        port::{LanePort, Peers, Port},
    },
    vmm::setup::{Folder, Setup, Transport},
};

/// Where a guest's streams are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Streams {
    /// Its folder.
    pub folder: Folder,
    /// How it was set up; not with [`Transport::VhostUser`].
    pub setup: Setup,
}

/// The ports of a guest, the control port first, each with its path.
pub(super) struct Ports(Vec<(Port, String)>);

/// The thread that serves the agent of a guest.
#[derive(Debug)]
pub(super) struct StreamThread {
    thread: JoinHandle<()>,
}

impl Streams {
    /// Makes the sockets, or finds the FIFOs.
    pub(super) fn ports(&self, sockets: &mut Sockets) -> Result<Ports, SocketFault> {
        let port = |name: String| {
            if self.setup.transport == Transport::Pipe {
                let (to_guest, from_guest) = (self.folder.fifo_in(&name), self.folder.fifo_out(&name));
                let called = from_guest.display().to_string();
                return Ok((Port::Fifos { to_guest, from_guest }, called));
            }
            let path = self.folder.socket(&name);
            let listener = sockets.bind(&path, Access::Vmm)?;
            Ok((Port::Socket(listener), path.display().to_string()))
        };
        self.setup.ports().map(port).collect::<Result<_, _>>().map(Ports)
    }
}

/// Starts the threads of a guest. Its lanes are spread over as many drains as devices of ours would have them.
pub(super) fn start(guest: &GuestConfig, Ports(ports): Ports) -> io::Result<(Arc<GuestSlot>, StreamThread)> {
    let (peers, count) = (Peers::new(&guest.name), ports.len());
    let mut ports = ports.into_iter();
    let (control, socket) = ports.next().expect("a guest has a control port");
    let lane = |(cpu, (port, path))| LanePort { cpu: Cpu(cpu), port, path, is_there: Arc::new(AtomicBool::new(false)) };
    let mut lanes: Vec<LanePort> = (0..).zip(ports).map(lane).collect();
    let mut parts = Vec::new();
    while !lanes.is_empty() {
        let rest = lanes.split_off(lanes.len().min(DEVICE_LANES_MAX));
        let name = device_name(&guest.name, parts.len());
        let drain = StreamDrain::spawn(&name, std::mem::replace(&mut lanes, rest), peers.clone())?;
        parts.push(DeviceParts { socket: socket.clone(), drain: Arc::new(drain) });
    }
    let slot = GuestSlot::new(&guest.name, parts, DEVICE_LANES_MAX)?;
    let control = Control::new(Arc::clone(&slot), control, count, peers)?;
    let thread = thread::Builder::new().name(format!("vt-dev/{}", guest.name)).spawn(move || control.run())?;
    Ok((slot, StreamThread { thread }))
}

impl StreamThread {
    /// Waits for the thread to end.
    pub(super) fn join(self) {
        // Its panics are caught and logged where they happen.
        let _ = self.thread.join();
    }
}
