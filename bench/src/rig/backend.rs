//! Device and drain of a guest as `vtrace server` runs them, and the `vhost` crate's frontend that speaks to them.
//!
//! In:    guests of [`super::lanes`]; a sink
//! Out:   pages in the sink; ledgers
//! Runs:  threads `vt-dev/NAME` and `vt-drain/NAME`, whose CPU is what the backend costs
//! Trust: a page that is missing in the ledger fails the run

use std::{
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{Frontend, VhostUserFrontend, message::VhostUserVirtioFeatures},
};
use vtrace_common::{
    ids::GuestId,
    limits::RINGS_MAX,
    wire::client::{DriverState, LaneSent},
};
use vtrace_dp::{
    device::{
        AgentEvent, ControlPort, Owner, Turn,
        lane_range::LaneRange,
        negotiate::RINGS_MIN,
        socket::{Device, Endpoint},
    },
    drain::ring::RingDrain,
    sys::socket::Peer,
    virtq::{memory::budget::MemoryShare, testing::VMM_BASE},
};

use super::lanes::{ENTRIES, Guest, PAGE};

const PATIENCE: Duration = Duration::from_secs(60);

/// A device and its drain.
pub(crate) struct Backend {
    pub(crate) drain: Arc<RingDrain>,
    device: Option<Device>,
    wake: Arc<EventFd>,
    stop: Arc<AtomicBool>,
}

impl Backend {
    /// Serves the VMM that is connected to `socket`.
    pub(crate) fn connected(name: &str, socket: UnixStream) -> Result<Self> {
        Self::start(name, Endpoint::Connected(socket))
    }

    /// Serves the VMMs that connect to a new socket at `path`.
    pub(crate) fn listening(name: &str, path: &Path) -> Result<Self> {
        Self::start(name, Endpoint::Listening(UnixListener::bind(path)?))
    }

    fn start(name: &str, endpoint: Endpoint) -> Result<Self> {
        let drain = Arc::new(RingDrain::spawn(GuestId(0), name)?);
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let stop = Arc::<AtomicBool>::default();
        let owner = IdleOwner { wake: Arc::clone(&wake), stop: Arc::clone(&stop) };
        let device = Device::spawn(
            name,
            LaneRange::ONLY,
            endpoint,
            MemoryShare::default(),
            Arc::clone(&drain),
            Box::new(owner),
        )?;
        Ok(Self { drain, device: Some(device), wake, stop })
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let rung = self.wake.write(1).is_ok();
        if let Some(device) = self.device.take().filter(|_| rung) {
            device.join();
        }
    }
}

/// Waits until the lanes have got all that was sent. Every page must be there.
pub(crate) fn finish(drain: &RingDrain, ends: Vec<LaneSent>) -> Result<()> {
    let pages: u64 = ends.iter().map(|end| end.bytes_out / u64::from(PAGE)).sum();
    let (done, ledgers) = mpsc::channel();
    drain.finish(ends, 60_000, Box::new(move |lanes| drop(done.send(lanes))));
    let ledgers = ledgers.recv_timeout(PATIENCE)?;
    let written: u64 = ledgers.iter().map(|lane| lane.ledger.pages_out).sum();
    ensure!(written == pages, "{written} of {pages} pages are in the file: {ledgers:?}");
    Ok(())
}

/// An owner that never asks its device for anything.
struct IdleOwner {
    wake: Arc<EventFd>,
    stop: Arc<AtomicBool>,
}

impl Owner for IdleOwner {
    fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn turn(&mut self, _port: &mut ControlPort) -> Turn {
        if self.stop.load(Ordering::Acquire) { Turn::Stop } else { Turn::Continue }
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn has_room(&mut self) -> bool {
        true
    }

    fn vmm(&mut self, _peer: Option<Peer>) {}

    fn driver(&mut self, _state: DriverState, _ports: usize) {}

    fn agent(&mut self, _event: AgentEvent, _port: &mut ControlPort) {}
}

/// Says all that a VMM says until the rings of `guest` run. The connection is open as long as what is returned lives.
pub(crate) fn attach(socket: UnixStream, guest: &Guest) -> Result<Frontend> {
    let mut frontend = Frontend::from_stream(socket, u64::try_from(RINGS_MAX)?);
    let features = frontend.get_features()?;
    let protocol = frontend.get_protocol_features()?;
    frontend.set_protocol_features(protocol)?;
    frontend.set_owner()?;
    ensure!(features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0, "no protocol features");
    frontend.set_features(features)?;
    frontend.set_mem_table(&[VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: guest.bytes(),
        userspace_addr: VMM_BASE,
        mmap_offset: 0,
        mmap_handle: guest.file.as_raw_fd(),
    }])?;
    for (lane, index) in guest.lanes.iter().zip((RINGS_MIN + 1..).step_by(2)) {
        let setup = lane.driver.setup(0);
        let config = VringConfigData {
            queue_max_size: ENTRIES,
            queue_size: ENTRIES,
            flags: 0,
            desc_table_addr: setup.descriptors,
            used_ring_addr: setup.used,
            avail_ring_addr: setup.available,
            log_addr: None,
        };
        frontend.set_vring_num(index, ENTRIES)?;
        frontend.set_vring_base(index, 0)?;
        frontend.set_vring_addr(index, &config)?;
        frontend.set_vring_kick(index, &lane.kick)?;
        frontend.set_vring_call(index, &lane.call)?;
        frontend.set_vring_enable(index, true).with_context(|| format!("ring {index}"))?;
    }
    // The answer comes when everything before it was served.
    frontend.get_features()?;
    Ok(frontend)
}
