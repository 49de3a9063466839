//! The virtio-serial ports of this guest: finds them by name, opens them, waits for them.
//!
//! In:    sysfs (`/sys/class/virtio-ports/vportNpM/{name,dev}`, `device/features`), kernel uevents
//! Out:   open ports, or a [`Failure`] that names the port
//! Runs:  on the control thread; [`Uevents`] can be polled
//! Full:  lost uevents (ENOBUFS) count as a change
//! Trust: the kernel; names come from the host and are only compared
//!
//! Data ports are closed only right after a message of the host (see [`SerialPorts::release`]). A small guest has no udev:
//! names are read from sysfs, device nodes come from devtmpfs or are made here.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket},
        stat::{Mode, SFlag, makedev, mknod},
    },
};
use vtrace_common::{
    ids::Cpu,
    wire::agent::{Failure, FailureKind},
};

use crate::sys::SysError;

/// VIRTIO_RING_F_INDIRECT_DESC (virtio 1.3, 6): its place in the `features` file, a string of one digit per bit.
const INDIRECT_DESC: usize = 28;

/// Where ports are searched, and their names.
#[derive(Clone, Debug)]
pub(super) struct SerialPorts {
    /// `/sys/class/virtio-ports`.
    pub(super) class: PathBuf,
    /// `/dev`.
    pub(super) nodes: PathBuf,
    /// Name of the control port.
    pub(super) control: String,
    /// Prefix of the names of data ports; the CPU's number follows.
    pub(super) lane_prefix: String,
    /// The data ports that are not to be closed yet.
    pub(super) held: HeldPorts,
}

/// Second descriptors of data ports, so that none is closed before [`SerialPorts::release`]. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct HeldPorts(Arc<Mutex<Vec<OwnedFd>>>);

/// The data ports at one time, by CPU: finding them reads a file for each.
#[derive(Debug)]
pub(super) struct DataPorts<'a> {
    ports: &'a SerialPorts,
    found: BTreeMap<Cpu, FoundPort>,
}

/// A port that exists.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct FoundPort {
    /// The host's name for it.
    pub(super) name: String,
    /// `vportNpM`.
    node: String,
}

impl SerialPorts {
    /// The control port, if it exists.
    pub(super) fn control(&self) -> Option<FoundPort> {
        self.all().into_iter().find(|port| port.name == self.control)
    }

    /// The data ports, on whichever devices they are.
    pub(super) fn lanes(&self) -> DataPorts<'_> {
        let found = self.all().into_iter().filter_map(|port| Some((self.cpu(&port)?, port))).collect();
        DataPorts { ports: self, found }
    }

    /// Opens the control port, non-blocking.
    pub(super) fn open_control(&self, found: &FoundPort) -> io::Result<OwnedFd> {
        self.open(found, libc::O_NONBLOCK)
    }

    /// Closes the data ports that no session uses. Only right after a message of the host: closing sends a control message,
    /// and the CPU spins until the host has taken it (drivers/char/virtio_console.c, `__send_control_msg()`), for ever if the
    /// host has died.
    pub(super) fn release(&self) {
        self.held().clear();
    }

    fn held(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.held.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process that has the port open, if this user may see it.
    pub(super) fn holder(&self, found: &FoundPort) -> Option<u32> {
        let node = self.nodes.join(&found.node);
        let processes = fs::read_dir("/proc").ok()?.flatten();
        let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        numbers.find(|pid| {
            let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            descriptors.into_iter().any(|entry| fs::read_link(entry.path()).is_ok_and(|path| path == node))
        })
    }

    fn open(&self, found: &FoundPort, flags: i32) -> io::Result<OwnedFd> {
        let node = self.nodes.join(&found.node);
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).custom_flags(flags | libc::O_CLOEXEC);
        match options.open(&node) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make_node(found, &node)?;
                options.open(&node)
            }
            opened => opened,
        }
        .map(OwnedFd::from)
    }

    /// Makes the device node that devtmpfs would have made.
    fn make_node(&self, found: &FoundPort, node: &Path) -> io::Result<()> {
        let numbers = fs::read_to_string(self.class.join(&found.node).join("dev"))?;
        let parsed = numbers.trim().split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        let (major, minor) = parsed.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        mknod(node, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, makedev(major, minor))?;
        Ok(())
    }

    fn all(&self) -> Vec<FoundPort> {
        let Ok(entries) = fs::read_dir(&self.class) else { return Vec::new() };
        let nodes = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        // A port has no name until its host has sent one.
        nodes.filter_map(|node| Some(FoundPort { name: self.attribute(&node, "name")?, node })).collect()
    }

    fn attribute(&self, node: &str, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.class.join(node).join(name)).ok()?;
        Some(text.trim_end_matches('\n').into())
    }

    fn has_indirect(&self, found: &FoundPort) -> bool {
        let features = self.attribute(&found.node, "device/features");
        features.is_some_and(|bits| bits.as_bytes().get(INDIRECT_DESC) == Some(&b'1'))
    }

    fn cpu(&self, port: &FoundPort) -> Option<Cpu> {
        let number = port.name.strip_prefix(&self.lane_prefix)?;
        // "+1" and "007" are not CPUs.
        number.parse().ok().map(Cpu).filter(|cpu| cpu.0.to_string() == number)
    }
}

impl DataPorts<'_> {
    /// The CPUs that have a data port, in order.
    pub(super) fn cpus(&self) -> Vec<Cpu> {
        self.found.keys().copied().collect()
    }

    /// Whether the data port of `cpu` exists and can be used; `without_indirect` as for [`DataPorts::open`].
    pub(super) fn is_usable(&self, cpu: Cpu, without_indirect: bool) -> bool {
        self.found.get(&cpu).is_some_and(|found| without_indirect || self.ports.has_indirect(found))
    }

    /// Opens the data port of `cpu` for splices that block. It stays open until [`SerialPorts::release`].
    ///
    /// # Errors
    /// `NoPort` when there is none; `NoIndirect` when its ring may lose pages unnoticed and `without_indirect` does not
    /// allow that; `Kernel` when it cannot be opened.
    pub(super) fn open(&self, cpu: Cpu, without_indirect: bool) -> Result<OwnedFd, Failure> {
        let name = format!("{}{}", self.ports.lane_prefix, cpu.0);
        let found = self.found.get(&cpu);
        let found = found.ok_or_else(|| Failure::new(FailureKind::NoPort, &name, "no virtio port has this name"))?;
        // Each device negotiates its own features.
        if !without_indirect && !self.ports.has_indirect(found) {
            let detail = "VIRTIO_RING_F_INDIRECT_DESC is not negotiated";
            return Err(Failure::new(FailureKind::NoIndirect, &name, detail));
        }
        let opened = self.ports.open(found, 0).and_then(|port| Ok((port.try_clone()?, port)));
        let (again, port) = opened.map_err(|error| Failure::new(FailureKind::Kernel, &name, &error.to_string()))?;
        self.ports.held().push(again);
        Ok(port)
    }
}

/// The kernel's uevents (netlink, lib/kobject_uevent.c): ports that are added, named or removed.
#[derive(Debug)]
pub(super) struct Uevents {
    socket: OwnedFd,
}

impl Uevents {
    /// Subscribes to them.
    pub(super) fn listen() -> Result<Self, SysError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkKObjectUEvent;
        let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)
            .map_err(SysError::of("socket(NETLINK_KOBJECT_UEVENT)"))?;
        let kernel_group = NetlinkAddr::new(0, 1);
        bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &kernel_group)
            .map_err(SysError::of("bind(NETLINK_KOBJECT_UEVENT)"))?;
        Ok(Self { socket })
    }

    /// Reads all events that have arrived; true when one was about a virtio port.
    pub(super) fn take(&self) -> bool {
        let mut ours = false;
        let mut message = [0; 8192];
        loop {
            match recv(std::os::fd::AsRawFd::as_raw_fd(&self.socket), &mut message, MsgFlags::empty()) {
                Ok(count) => ours |= message[..count].windows(12).any(|window| window == b"virtio-ports"),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => ours = true,
                Err(_) => return ours,
            }
        }
    }
}

impl AsFd for Uevents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use nix::unistd::mkfifo;

    use super::*;

    /// A sysfs and /dev of our own: the ports are FIFOs.
    pub(in crate::agent) fn fifo_ports(root: &Path, names: &[&str], features: &str) -> SerialPorts {
        let ports = SerialPorts {
            class: root.join("class"),
            nodes: root.join("dev"),
            control: "agent-ctl-path".into(),
            lane_prefix: "trace-path-cpu".into(),
            held: HeldPorts::default(),
        };
        fs::create_dir_all(&ports.nodes).unwrap();
        for (index, name) in names.iter().enumerate() {
            let node = format!("vport0p{index}");
            let device = ports.class.join(&node).join("device");
            fs::create_dir_all(&device).unwrap();
            fs::write(device.join("features"), features).unwrap();
            fs::write(ports.class.join(&node).join("name"), format!("{name}\n")).unwrap();
            mkfifo(&ports.nodes.join(&node), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        }
        ports
    }

    pub(in crate::agent) fn features(indirect: bool) -> String {
        (0..64).map(|bit| if bit == INDIRECT_DESC && indirect { '1' } else { '0' }).collect()
    }

    #[test]
    fn lanes_are_the_ports_whose_names_end_in_a_cpu() {
        let root = tempfile::tempdir().unwrap();
        let names =
            ["agent-ctl-path", "trace-path-cpu10", "trace-path-cpu2", "trace-path-cpu", "trace-path-cpu02", "x"];
        let ports = fifo_ports(root.path(), &names, &features(true));
        assert_eq!(ports.lanes().cpus(), [Cpu(2), Cpu(10)]);
        assert_eq!(ports.control().map(|found| found.node), Some("vport0p0".into()));
    }

    #[test]
    fn missing_port_is_named() {
        let root = tempfile::tempdir().unwrap();
        let ports = fifo_ports(root.path(), &["trace-path-cpu0"], &features(true));
        let failure = ports.lanes().open(Cpu(3), false).unwrap_err();
        assert_eq!((failure.kind, failure.object.as_str()), (FailureKind::NoPort, "trace-path-cpu3"));
    }

    #[test]
    fn port_without_indirect_descriptors_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let ports = fifo_ports(root.path(), &["trace-path-cpu0"], &features(false));
        assert_eq!(ports.lanes().open(Cpu(0), false).unwrap_err().kind, FailureKind::NoIndirect);
        assert!(ports.lanes().open(Cpu(0), true).is_ok());
        let good = fifo_ports(&root.path().join("b"), &["trace-path-cpu0"], &features(true));
        assert!(good.lanes().open(Cpu(0), false).is_ok());
    }

    #[test]
    fn each_port_is_judged_by_its_own_device() {
        let root = tempfile::tempdir().unwrap();
        let ports = fifo_ports(root.path(), &["trace-path-cpu0", "trace-path-cpu126"], &features(true));
        fs::write(ports.class.join("vport0p1/device/features"), features(false)).unwrap();
        let lanes = ports.lanes();
        assert!(lanes.open(Cpu(0), false).is_ok());
        assert_eq!(lanes.open(Cpu(126), false).unwrap_err().kind, FailureKind::NoIndirect);
    }

    #[test]
    fn missing_node_is_made_from_its_numbers() {
        let root = tempfile::tempdir().unwrap();
        let ports = fifo_ports(root.path(), &["trace-path-cpu0"], &features(true));
        fs::remove_file(ports.nodes.join("vport0p0")).unwrap();
        fs::write(ports.class.join("vport0p0/dev"), "1:3\n").unwrap(); // /dev/null
        ports.lanes().open(Cpu(0), false).unwrap();
        assert!(ports.nodes.join("vport0p0").exists());
    }

    #[test]
    fn uevent_of_another_device_is_not_reported() {
        let news = Uevents::listen().unwrap();
        // Makes the kernel send a uevent about this device.
        fs::write("/sys/devices/virtual/mem/null/uevent", "change").unwrap();
        assert!(!news.take());
    }
}
