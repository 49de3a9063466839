//! The devices of one guest: their VMM, the state of their drivers, the lanes they carry.
//!
//! In:    what each device's thread has to tell
//! Out:   which lanes have a port, why others have none; the further devices' part of what `List` shows
//! Runs:  [`Devices`] is shared by the guest's device threads and all client threads
//! Full:  nothing waits here
//! Trust: VMMs with their own guest only: the devices of a guest belong to one process, and while one is connected to any
//!        of them, another is turned away from the rest. Processes of another pid namespace cannot be distinguished.

use std::{
    io,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use vtrace_common::{
    ids::Cpu,
    wire::{
        agent::{Failure, FailureKind},
        client::{DeviceState, DriverState},
    },
};

use super::{guest_drain::Drains, outbox::Notifier};
use crate::{
    device::{
        Foreign,
        lane_range::{LANE_PORT_PREFIX, LaneRange},
    },
    drain::{Drain, Portless},
    sys::socket::{Peer, has_hung_up},
};

/// What one device is made of.
#[derive(Debug)]
pub(super) struct DeviceParts {
    /// Its socket.
    pub(super) socket: String,
    /// Its pages' worker.
    pub(super) drain: Arc<dyn Drain>,
}

/// All devices of a guest.
#[derive(Debug)]
pub(super) struct Devices {
    sockets: Vec<String>,
    lanes: usize,
    pub(super) drains: Drains,
    states: Mutex<Vec<DeviceEntry>>,
    /// An extra device has lost its VMM, and the guest's holder does not know yet.
    pub(super) gone: AtomicBool,
    pub(super) ended: AtomicBool,
    /// Wakes the threads of the further devices.
    pub(super) end: Notifier,
}

#[derive(Debug)]
struct DeviceEntry {
    /// The VMM, and its connection: it says at once when its other end is closed. Streams have one a port, and none of
    /// them stands for the device.
    vmm: Option<(Peer, Option<UnixStream>)>,
    driver: DriverState,
    ports: usize,
}

impl Devices {
    /// Devices that no VMM has connected to; each carries `lanes` lanes.
    pub(super) fn new(parts: Vec<DeviceParts>, lanes: usize) -> io::Result<Self> {
        let (sockets, drains): (Vec<_>, Vec<_>) = parts.into_iter().map(|parts| (parts.socket, parts.drain)).unzip();
        let state = |_| DeviceEntry { vmm: None, driver: DriverState::Absent, ports: 0 };
        Ok(Self {
            states: Mutex::new(sockets.iter().map(state).collect()),
            sockets,
            lanes,
            drains: Drains::new(drains, lanes),
            gone: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            end: Notifier::new()?,
        })
    }

    /// Which lanes a device carries.
    pub(super) fn place(&self, device: usize) -> LaneRange {
        LaneRange::new(device, self.lanes)
    }

    /// A VMM wants a device. Whoever has closed the other end of its connection is gone, even if the thread of its device
    /// has not come to see it yet.
    pub(super) fn admit(&self, device: usize, peer: Peer, socket: &UnixStream) -> Result<(), Foreign> {
        let mut states = self.lock();
        let others = states.iter().enumerate().filter(|(other, _)| *other != device);
        let mut vmms = others.filter_map(|(_, state)| state.vmm.as_ref());
        if let Some((other, _)) =
            vmms.find(|(other, socket)| *other != peer && !socket.as_ref().is_some_and(has_hung_up))
        {
            return Err(Foreign(other.pid));
        }
        drop(vmms);
        // Without a second descriptor its end is seen when its thread sees it: that is late, not wrong.
        states[device].vmm = socket.try_clone().ok().map(|socket| (peer, Some(socket)));
        Ok(())
    }

    /// Whether a VMM is there whose ports are streams: it goes on when they are not served.
    pub(super) fn are_streams(&self) -> bool {
        self.lock().iter().any(|state| state.vmm.as_ref().is_some_and(|(_, socket)| socket.is_none()))
    }

    /// The VMM whose ports are streams is there with all devices, or is gone.
    pub(super) fn streams(&self, vmm: Option<Peer>) {
        let driver = if vmm.is_some() { DriverState::Running } else { DriverState::Absent };
        for state in self.lock().iter_mut() {
            (state.vmm, state.driver, state.ports) = (vmm.map(|vmm| (vmm, None)), driver.clone(), self.lanes + 1);
        }
    }

    /// The VMM of a device is gone.
    pub(super) fn left(&self, device: usize) {
        self.lock()[device].vmm = None;
    }

    /// A device's driver is this far.
    pub(super) fn driver(&self, device: usize, driver: DriverState, ports: usize) {
        let mut states = self.lock();
        (states[device].driver, states[device].ports) = (driver, ports);
    }

    /// The devices after the first.
    pub(super) fn further(&self) -> Vec<DeviceState> {
        let state = |state: &DeviceEntry| {
            let vmm_pid = state.vmm.as_ref().map(|(peer, _)| peer.pid);
            DeviceState { vmm_pid, driver: state.driver.clone() }
        };
        self.lock().iter().skip(1).map(state).collect()
    }

    /// The state of a device that loses pages, or whose memory cannot be seen.
    pub(super) fn unfit(&self) -> Option<DriverState> {
        let is_unfit =
            |state: &&DeviceEntry| matches!(state.driver, DriverState::Unfit(_) | DriverState::MemoryNotShared);
        self.lock().iter().find(is_unfit).map(|state| state.driver.clone())
    }

    /// Whether pages of a CPU can come.
    pub(super) fn has_port(&self, cpu: Cpu) -> Result<(), Portless> {
        let no_device = || Portless::NoDevice { devices: self.sockets.len(), lanes: self.lanes };
        let device = self.drains.device(cpu).ok_or_else(no_device)?;
        let (states, socket) = (self.lock(), self.sockets[device].clone());
        let DeviceEntry { vmm, driver, ports } = &states[device];
        if vmm.is_none() {
            return Err(Portless::NotConnected(socket));
        }
        if *driver != DriverState::Running {
            return Err(Portless::NotReady { socket, state: driver.clone() });
        }
        let place = self.place(device);
        let found = (0..*ports).any(|port| place.lane(port) == Some(cpu));
        if !found {
            return Err(Portless::Few { socket, ports: *ports });
        }
        self.drains.portless(cpu).map_or(Ok(()), Err)
    }

    /// Says which device is missing where an agent misses a port: it cannot know.
    pub(super) fn explain(&self, failure: &mut Failure) {
        let cpu = failure.object.strip_prefix(LANE_PORT_PREFIX).and_then(|number| number.parse().ok()).map(Cpu);
        if failure.kind == FailureKind::NoPort
            && let Some(Err(why)) = cpu.map(|cpu| self.has_port(cpu))
        {
            failure.detail = why.to_string();
        }
    }

    /// Whether a further device has lost its VMM since this was last asked.
    pub(super) fn take_gone(&self) -> bool {
        self.gone.swap(false, Ordering::AcqRel)
    }

    /// Ends the threads of the further devices.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.end.notify();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<DeviceEntry>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use vtrace_common::ids::GuestId;

    use super::*;
    use crate::drain::ring::RingDrain;

    fn devices(count: usize, lanes: usize) -> Devices {
        let drain = || Arc::new(RingDrain::spawn(GuestId(0), "test").unwrap());
        let parts = |device| DeviceParts { socket: format!("socket{device}"), drain: drain() };
        Devices::new((0..count).map(parts).collect(), lanes).unwrap()
    }

    /// A VMM with a device; both ends of its connection.
    fn connect(devices: &Devices, device: usize, pid: u32) -> Result<(UnixStream, UnixStream), Foreign> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        devices.admit(device, Peer { pid, uid: 0 }, &ours)?;
        Ok((ours, theirs))
    }

    #[test]
    fn devices_of_a_guest_belong_to_one_process_in_whatever_order_they_come() {
        let devices = devices(3, 2);
        let _second = connect(&devices, 1, 77).unwrap();
        assert_eq!(connect(&devices, 0, 78).unwrap_err(), Foreign(77));
        let _first = connect(&devices, 0, 77).unwrap();
        assert_eq!(connect(&devices, 2, 78).unwrap_err(), Foreign(77));
        assert_eq!(devices.further().iter().map(|device| device.vmm_pid).collect::<Vec<_>>(), [Some(77), None]);
    }

    #[test]
    fn vmm_that_has_hung_up_keeps_no_other_from_the_guest() {
        let devices = devices(2, 2);
        let (ours, theirs) = connect(&devices, 1, 77).unwrap();
        drop(theirs);
        let _first = connect(&devices, 0, 78).unwrap();
        drop(ours);
        devices.left(1);
        assert_eq!(connect(&devices, 1, 77).unwrap_err(), Foreign(78));
    }

    #[test]
    fn cpu_without_a_port_has_a_reason_that_names_its_device() {
        let devices = devices(2, 2);
        assert_eq!(devices.has_port(Cpu(4)), Err(Portless::NoDevice { devices: 2, lanes: 2 }));
        assert_eq!(devices.has_port(Cpu(2)), Err(Portless::NotConnected("socket1".into())));
        let _vmm = connect(&devices, 1, 77).unwrap();
        let not_ready = Portless::NotReady { socket: "socket1".into(), state: DriverState::Absent };
        assert_eq!(devices.has_port(Cpu(2)), Err(not_ready));
        devices.driver(1, DriverState::Running, 2);
        assert_eq!(devices.has_port(Cpu(2)), Ok(()));
        assert_eq!(devices.has_port(Cpu(3)), Err(Portless::Few { socket: "socket1".into(), ports: 2 }));
        devices.driver(1, DriverState::Running, 127);
        assert_eq!(devices.has_port(Cpu(3)), Ok(()));
        assert!(devices.has_port(Cpu(4)).is_err(), "ports beyond its lanes are not there");
    }

    #[test]
    fn port_that_an_agent_misses_is_explained_by_the_device_that_is_not_there() {
        let devices = devices(2, 2);
        let mut failure = Failure {
            kind: FailureKind::NoPort,
            object: "trace-path-cpu3".into(),
            detail: "as the agent says".into(),
            near: vec![],
        };
        devices.explain(&mut failure);
        assert_eq!(failure.detail, "no virtual machine is connected to socket1, the socket of its device");
        for (kind, object) in [(FailureKind::NoPort, "trace-path-cpux"), (FailureKind::Kernel, "trace-path-cpu3")] {
            let mut other = Failure { kind, object: object.into(), detail: "as it is".into(), near: vec![] };
            devices.explain(&mut other);
            assert_eq!(other.detail, "as it is");
        }
    }

    #[test]
    fn device_that_cannot_be_used_makes_its_guest_unfit() {
        let devices = devices(2, 2);
        assert_eq!(devices.unfit(), None);
        devices.driver(1, DriverState::MemoryNotShared, 3);
        assert_eq!(devices.unfit(), Some(DriverState::MemoryNotShared));
    }
}
