//! QEMU: its version, and the options that give a guest its ports.
//!
//! In:    a program to ask; a guest's folder and setup
//! Out:   a [`QemuVersion`]; options for the command line, name and value in turn
//! Runs:  [`QemuVersion::of`] starts the program and waits for it; the rest has no effect
//! Trust: the program: it is the one that will run the guest
//!
//! Port 0 of a virtio-serial device is reserved for a console, so a device of 31 ports carries 30 of ours; more CPUs need
//! more devices. 31 is the default of every QEMU and the maximum in libvirt's documentation.

use std::{ffi::OsStr, fmt, io, path::Path, process::Command};

use serde::Deserialize;
use vtrace_common::limits::DEVICE_LANES_MAX;

use super::setup::{Folder, Setup, Transport};

/// Ports of one virtio-serial device, the console's included.
pub(crate) const CONTROLLER_PORTS: usize = 31;
/// Descriptors of each queue of our device (4 KiB of guest memory each): enough for a batch of pages.
pub(crate) const QUEUE_ENTRIES: usize = 128;
/// The generic vhost-user device (QEMU hw/virtio/vhost-user-test-device-pci.c).
pub const DRIVER: &str = "vhost-user-test-device-pci";
/// Chassis and slot of our first root port: numbers that no other tool uses by default.
const ROOT_PORT_FIRST: usize = 220;
/// Where distributions install QEMU.
pub const PROGRAMS: [&str; 3] = ["qemu-system-x86_64", "/usr/libexec/qemu-kvm", "qemu-kvm"];

/// A version of QEMU.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Deserialize)]
pub struct QemuVersion {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
}

/// The oldest QEMU in which users may create the generic vhost-user device.
pub const VHOST_USER_SINCE: QemuVersion = QemuVersion { major: 10, minor: 2, micro: 0 };
/// The oldest QEMU with `reconnect-ms`; later versions no longer have `reconnect`.
const RECONNECT_MS_SINCE: QemuVersion = QemuVersion { major: 9, minor: 2, micro: 0 };

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { major, minor, micro } = self;
        if *micro == 0 { write!(f, "{major}.{minor}") } else { write!(f, "{major}.{minor}.{micro}") }
    }
}

/// A text that is not a version.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a version; examples: 11, 7.2, 10.0.13")]
pub struct QemuVersionFault;

impl std::str::FromStr for QemuVersion {
    type Err = QemuVersionFault;

    fn from_str(text: &str) -> Result<Self, QemuVersionFault> {
        let mut parts = text.splitn(3, '.');
        let major = parts.next().unwrap_or_default().parse().map_err(|_| QemuVersionFault)?;
        let minor = parts.next().unwrap_or("0").parse().map_err(|_| QemuVersionFault)?;
        // Distributions append texts of their own: 8.2.0-rc1, 6.2.0.dfsg.
        let digits = parts.next().unwrap_or("0").split(|letter: char| !letter.is_ascii_digit()).next();
        let micro = digits.unwrap_or_default().parse().map_err(|_| QemuVersionFault)?;
        Ok(Self { major, minor, micro })
    }
}

impl QemuVersion {
    /// The version that a program prints for `--version`.
    ///
    /// # Errors
    /// When it cannot be run, or prints something else.
    pub fn of(program: impl AsRef<OsStr>) -> io::Result<Self> {
        let output = Command::new(program.as_ref()).arg("--version").output()?;
        let printed = String::from_utf8_lossy(&output.stdout);
        Self::in_text(&printed)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("it prints {:?}", printed.trim())))
    }

    /// The version in what `--version` prints.
    pub fn in_text(text: &str) -> Option<Self> {
        text.split_once("version ")?.1.split_whitespace().next()?.parse().ok()
    }

    /// The version of the first of [`PROGRAMS`] that exists.
    pub fn installed() -> Option<Self> {
        PROGRAMS.iter().find_map(|program| Self::of(program).ok())
    }

    /// The default transport: the cheapest one that this version supports.
    pub fn transport(self) -> Transport {
        if self >= VHOST_USER_SINCE { Transport::VhostUser } else { Transport::Socket }
    }

    /// The chardev option that makes QEMU connect again after its socket was closed.
    fn reconnect(self) -> &'static str {
        if self >= RECONNECT_MS_SINCE { "reconnect-ms=500" } else { "reconnect=1" }
    }
}

/// A guest whose options are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// Name.
    pub name: &'a str,
    /// Folder on the host.
    pub folder: &'a Folder,
    /// Transport and CPUs.
    pub setup: Setup,
    /// Directory of the server's sockets.
    pub run: &'a Path,
    /// Size of its memory, as in QEMU's `-m`.
    pub memory: &'a str,
    /// Type of its machine.
    pub machine: MachineType,
}

/// QEMU's machine types for x86-64.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum MachineType {
    /// PCI Express: devices are hot-plugged into root ports
    Q35,
    /// Conventional PCI: devices are hot-plugged into the root bus
    Pc,
}

impl Guest<'_> {
    /// The options to add to the command line of a QEMU of this version.
    pub fn options(&self, version: QemuVersion) -> Vec<String> {
        match self.setup.transport {
            Transport::VhostUser => {
                let memory = format!("memory-backend-memfd,id=vtrace-memory,size={},share=on", self.memory);
                let machine = match self.machine {
                    MachineType::Q35 => "q35",
                    MachineType::Pc => "pc",
                };
                let mut options = option("-object", memory);
                options.extend(option("-machine", format!("{machine},memory-backend=vtrace-memory")));
                options.extend(option("-m", self.memory));
                options.extend(option("-qmp", format!("unix:{},server=on,wait=off", escaped(&self.folder.qmp()))));
                options.extend(self.vhost_user());
                options
            }
            Transport::Socket => self.serial(|name| {
                let path = escaped(&self.folder.socket(name));
                format!("socket,path={path},server=off,{}", version.reconnect())
            }),
            Transport::Pipe => self.serial(|name| format!("pipe,path={}", escaped(&self.folder.port(name)))),
        }
    }

    /// The vhost-user devices, without the shared memory that they need.
    pub(crate) fn vhost_user(&self) -> Vec<String> {
        let cpus = self.setup.cpus;
        let one = |(device, first): (usize, usize)| {
            let name = if device == 0 { self.name.to_owned() } else { format!("{}@{}", self.name, device + 1) };
            let path = escaped(&self.run.join(format!("{name}.sock")));
            let queues = 2 * (DEVICE_LANES_MAX.min(cpus - first) + 2);
            let mut options = option("-chardev", format!("socket,id=vtrace{device},path={path}"));
            let mut bus = String::new();
            if self.machine == MachineType::Q35 {
                let port = ROOT_PORT_FIRST + device;
                options.extend(option(
                    "-device",
                    format!("pcie-root-port,id=vtrace-rp{device},chassis={port},slot={port}"),
                ));
                bus = format!("bus=vtrace-rp{device},");
            }
            options.extend(option(
                "-device",
                format!(
                    "{DRIVER},{bus}chardev=vtrace{device},virtio-id=3,num_vqs={queues},\
                     vq_size={QUEUE_ENTRIES},config_size=12"
                ),
            ));
            options
        };
        (0..cpus).step_by(DEVICE_LANES_MAX).enumerate().flat_map(one).collect()
    }

    /// QEMU's own devices: a virtio-serial port and its chardev for each port name.
    fn serial(&self, chardev: impl Fn(&str) -> String) -> Vec<String> {
        let mut options = Vec::new();
        for (name, address) in port_addresses(self.setup) {
            let controller = address.controller;
            if address.port == 1 {
                let device = format!("virtio-serial-pci,id=vtrace{controller},max_ports={CONTROLLER_PORTS}");
                options.extend(option("-device", device));
            }
            let what = chardev(&name);
            let (kind, rest) = what.split_once(',').expect("a kind and a path");
            options.extend(option("-chardev", format!("{kind},id=vtrace-{name},{rest}")));
            let port = format!(
                "virtserialport,bus=vtrace{controller}.0,nr={},chardev=vtrace-{name},name={name}",
                address.port
            );
            options.extend(option("-device", port));
        }
        options
    }
}

/// A port's address in the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PortAddress {
    /// Number of the virtio-serial device, from 0 on.
    pub(crate) controller: usize,
    /// 1 to [`CONTROLLER_PORTS`] - 1.
    pub(crate) port: usize,
}

/// The name and address of each port of a guest.
pub(crate) fn port_addresses(setup: Setup) -> impl Iterator<Item = (String, PortAddress)> {
    let usable = CONTROLLER_PORTS - 1;
    setup
        .ports()
        .enumerate()
        .map(move |(index, name)| (name, PortAddress { controller: index / usable, port: index % usable + 1 }))
}

fn option(name: &str, value: impl Into<String>) -> Vec<String> {
    vec![name.into(), value.into()]
}

/// A path as an option's value: QEMU reads two commas as one.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(transport: Transport, cpus: usize, version: &str) -> Vec<String> {
        let folder = Folder::of(Path::new("/var/lib/vtrace/virt"), "guest1");
        let setup = Setup { transport, cpus };
        let guest = Guest {
            name: "guest1",
            folder: &folder,
            setup,
            run: Path::new("/run/vtrace"),
            memory: "4G",
            machine: MachineType::Q35,
        };
        guest.options(version.parse().unwrap())
    }

    #[test]
    fn oldest_version_with_a_thing_is_the_one_that_gets_it() {
        let version = |text: &str| text.parse::<QemuVersion>().unwrap();
        assert_eq!(version("7.2.22").transport(), Transport::Socket);
        assert_eq!(version("10.0.13").transport(), Transport::Socket);
        assert_eq!(version("10.2.0").transport(), Transport::VhostUser);
        assert!(version("9.10") > version("9.2"), "numbers, not texts");
        assert_eq!(version("11"), QemuVersion { major: 11, minor: 0, micro: 0 });
        assert_eq!(version("8.2.1-rc4"), QemuVersion { major: 8, minor: 2, micro: 1 });
        for wrong in ["", "x.y", "7.", "v7"] {
            assert!(wrong.parse::<QemuVersion>().is_err(), "{wrong:?}");
        }
        assert!(options(Transport::Socket, 1, "7.2").iter().any(|word| word.ends_with("server=off,reconnect=1")));
        assert!(options(Transport::Socket, 1, "11.1").iter().any(|word| word.ends_with("server=off,reconnect-ms=500")));
    }

    #[test]
    fn thirty_ports_fill_a_device_and_the_next_is_on_another() {
        let devices = |cpus| options(Transport::Pipe, cpus, "7.2").iter().filter(|w| w.contains("max_ports")).count();
        assert_eq!((devices(29), devices(30), devices(288)), (1, 2, 10));
        let options = options(Transport::Pipe, 30, "7.2");
        let last = &options[options.len() - 6..];
        let expected = [
            "-device",
            "virtio-serial-pci,id=vtrace1,max_ports=31",
            "-chardev",
            "pipe,id=vtrace-trace-path-cpu29,path=/var/lib/vtrace/virt/guest1/trace-path-cpu29",
            "-device",
            "virtserialport,bus=vtrace1.0,nr=1,chardev=vtrace-trace-path-cpu29,name=trace-path-cpu29",
        ];
        assert_eq!(last, expected);
    }

    #[test]
    fn own_device_has_two_queues_a_port_and_two_for_control() {
        let options = options(Transport::VhostUser, 130, "11.1");
        let devices: Vec<_> = options.iter().filter(|word| word.contains("num_vqs")).collect();
        assert_eq!(devices.len(), 2);
        assert!(devices[0].contains("num_vqs=256,") && devices[1].contains("num_vqs=12,"), "{devices:?}");
        assert!(options.iter().any(|word| word.ends_with("path=/run/vtrace/guest1@2.sock")), "{options:?}");
    }

    #[test]
    fn every_vhost_user_device_has_a_root_port_and_qemu_has_a_qmp_socket() {
        let q35 = options(Transport::VhostUser, 130, "11.1");
        for port in ["vtrace-rp0,chassis=220,slot=220", "vtrace-rp1,chassis=221,slot=221"] {
            assert!(q35.contains(&format!("pcie-root-port,id={port}")), "{q35:?}");
        }
        assert_eq!(q35.iter().filter(|option| option.contains(",bus=vtrace-rp")).count(), 2, "{q35:?}");
        let expected = [
            "-machine",
            "q35,memory-backend=vtrace-memory",
            "-m",
            "4G",
            "-qmp",
            "unix:/var/lib/vtrace/virt/guest1/qemu/qmp.sock,server=on,wait=off",
        ];
        assert_eq!(q35[2..8], expected);
        let folder = Folder::of(Path::new("/v"), "guest1");
        let setup = Setup { transport: Transport::VhostUser, cpus: 1 };
        let guest =
            Guest { name: "g", folder: &folder, setup, run: Path::new("/r"), memory: "1G", machine: MachineType::Pc };
        let pc = guest.options(VHOST_USER_SINCE).join(" ");
        assert!(pc.contains("-machine pc,") && !pc.contains("pcie-root-port") && !pc.contains("bus="), "{pc}");
    }

    #[test]
    fn comma_in_a_path_is_doubled() {
        assert_eq!(escaped(Path::new("/a,b")), "/a,,b");
    }
}
