//! Guests made of memory files: lanes whose buffers hold sound pages, and the drivers that send them again and again.
//!
//! In:    how many lanes, how many bytes
//! Out:   chains of 64 KiB of 4 KiB pages, no two of them neighbours, as a real guest's are
//! Runs:  one thread a guest, named `driver`
//! Full:  a driver waits for any of its lanes
//! Trust: a drain that gives nothing back for [`PATIENCE`] fails the run

use std::{fs::File, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vtrace_common::{
    ids::Cpu,
    wire::client::{Area, LaneSent},
};
use vtrace_dp::virtq::{
    memory::{Memory, Span},
    testing::{Driver, memory_file, region},
};

/// Bytes of a page.
pub(crate) const PAGE: u32 = 4096;
/// Bytes of a chain: what one splice through an ordinary pipe sends.
pub(crate) const CHAIN: u32 = 64 << 10;
/// Entries of a ring: what QEMU is told to make.
pub(crate) const ENTRIES: u16 = 128;
const PATIENCE: Duration = Duration::from_secs(30);

/// A guest.
pub(crate) struct Guest {
    pub(crate) file: File,
    pub(crate) memory: Arc<Memory>,
    pub(crate) lanes: Vec<RigLane>,
}

/// One lane's ring and its events, as the frontend hands them on.
pub(crate) struct RigLane {
    pub(crate) driver: Driver,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    /// Where its buffers begin.
    pub(crate) buffers: u64,
}

impl Guest {
    /// A guest with this many lanes.
    pub(crate) fn new(lanes: u32) -> Result<Self> {
        let step = Driver::footprint(ENTRIES, CHAIN);
        let bytes = step * u64::from(lanes);
        let file = memory_file(bytes)?;
        let memory = Memory::map(&[region(0, bytes)], vec![file.try_clone()?])?;
        let lanes = (0..u64::from(lanes)).map(|lane| RigLane::new(&memory, lane * step)).collect::<Result<_>>()?;
        Ok(Self { file, memory, lanes })
    }

    /// Guest memory there is.
    pub(crate) fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    /// An area for each lane, `bytes` each.
    pub(crate) fn areas(&self, bytes: u64) -> Vec<Area> {
        let area =
            |cpu: u32| Area { cpu: Cpu(cpu), offset: u64::from(cpu) * bytes, bytes_max: bytes, begins_again: false };
        self.cpus().map(area).collect()
    }

    /// What each lane has sent after `bytes` each.
    pub(crate) fn ends(&self, bytes: u64) -> Vec<LaneSent> {
        self.cpus().map(|cpu| LaneSent { cpu: Cpu(cpu), bytes_out: bytes }).collect()
    }

    fn cpus(&self) -> std::ops::Range<u32> {
        0..u32::try_from(self.lanes.len()).expect("few lanes")
    }

    /// Sends `bytes` over each lane, as fast as they are taken.
    pub(crate) fn send(&mut self, bytes: u64) -> Result<()> {
        let mut left = vec![bytes / u64::from(CHAIN); self.lanes.len()];
        loop {
            let mut sent = false;
            for (lane, left) in self.lanes.iter_mut().zip(&mut left) {
                if *left > 0 && lane.driver.has_used() {
                    lane.driver.reclaim();
                }
                while *left > 0 && lane.driver.send_again(CHAIN, PAGE) {
                    (*left, sent) = (*left - 1, true);
                }
            }
            if left.iter().all(|left| *left == 0) {
                return Ok(());
            }
            if !sent {
                self.wait(&left)?;
            }
        }
    }

    /// Sleeps until a lane that has something left gives entries back.
    fn wait(&mut self, left: &[u64]) -> Result<()> {
        let waiting = || self.lanes.iter().zip(left).filter(|(_, left)| **left > 0).map(|(lane, _)| &lane.driver);
        if waiting().any(Driver::has_used) {
            return Ok(());
        }
        let mut polled: Vec<_> = waiting().map(|driver| PollFd::new(driver.call(), PollFlags::POLLIN)).collect();
        let ready = poll(&mut polled, PollTimeout::try_from(PATIENCE).context("a short time")?)?;
        ensure!(ready > 0, "the drain gives nothing back");
        for driver in self.lanes.iter_mut().map(|lane| &mut lane.driver) {
            driver.reclaim();
        }
        Ok(())
    }
}

impl RigLane {
    fn new(memory: &Arc<Memory>, base: u64) -> Result<Self> {
        let buffers = base + Driver::footprint(ENTRIES, CHAIN) - u64::from(ENTRIES) * u64::from(CHAIN);
        let end = buffers + u64::from(ENTRIES) * u64::from(CHAIN);
        for gpa in (buffers..end).step_by(usize::try_from(PAGE)?) {
            // The second word of a page says how many bytes of it are data.
            memory.copy_in(Span { gpa: gpa + 8, bytes: 8 }, &4000u64.to_le_bytes())?;
        }
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let (kick, call) = (event()?, event()?);
        let events = [owned(&kick)?, owned(&call)?];
        let driver = Driver::with_events(Arc::clone(memory), base, ENTRIES, CHAIN, true, events);
        Ok(Self { driver, kick, call, buffers })
    }
}

/// The same eventfd once more: `vhost` wants its own type, which does not give its descriptor away, so it is sent over a
/// socket as it would be to another process.
fn owned(event: &EventFd) -> Result<std::os::fd::OwnedFd> {
    use std::{
        io::IoSlice,
        os::{
            fd::{AsFd, AsRawFd},
            unix::net::UnixStream,
        },
    };

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let (there, here) = UnixStream::pair()?;
    let descriptors = [event.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(there.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)?;
    match vtrace_dp::sys::socket::receive(here.as_fd(), &mut [0])?.1.pop() {
        Some(descriptor) => Ok(descriptor),
        None => bail!("a descriptor got lost in a socket"),
    }
}
