//! QEMU: its version, and the words that give a guest its ports.
//!
//! In:    a program to ask; a guest's folder and setup
//! Out:   a [`Version`]; words for the command line, options and values in turn
//! Runs:  [`Version::of`] starts the program and waits for it; the rest has no effect
//! Trust: the program: it is the one that will run the guest
//!
//! Port 0 of a virtio-serial device is kept for a console, so one of 31 ports carries 30 of ours; more CPUs take more
//! devices. 31 is the default of every QEMU and the most that libvirt's documents speak of.

use std::{ffi::OsStr, fmt, io, path::Path, process::Command};

use vtrace_common::limits::DEVICE_LANES_MAX;

use super::setup::{Folder, Setup, Transport};

/// Ports of one virtio-serial device, the console's included.
pub(crate) const CONTROLLER_PORTS: usize = 31;
/// Descriptors of a queue of our device: enough for a run of pages, little enough guest memory (4 KiB each and port).
const QUEUE_ENTRIES: usize = 128;
/// Where distributions put the program.
pub const PROGRAMS: [&str; 3] = ["qemu-system-x86_64", "/usr/libexec/qemu-kvm", "qemu-kvm"];

/// A version of QEMU.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
}

/// The oldest that lets a user create the generic vhost-user device.
pub const VHOST_USER_SINCE: Version = Version { major: 10, minor: 2 };
/// The oldest that counts the time between two attempts to connect in milliseconds; later the seconds went away.
const RECONNECT_MS_SINCE: Version = Version { major: 9, minor: 2 };

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl std::str::FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('.').map(|part| part.parse().ok());
        match (parts.next().flatten(), parts.next().flatten()) {
            (Some(major), Some(minor)) => Ok(Self { major, minor }),
            _ => Err("not a version: 7.2, 10.0.13".into()),
        }
    }
}

impl Version {
    /// What a program says of itself.
    ///
    /// # Errors
    /// When it cannot be run, or says something else.
    pub fn of(program: impl AsRef<OsStr>) -> io::Result<Self> {
        let output = Command::new(program.as_ref()).arg("--version").output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        Self::said(&said)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("it says {:?}", said.trim())))
    }

    /// The version in what a QEMU says of itself.
    pub fn said(text: &str) -> Option<Self> {
        text.split_once("version ")?.1.split_whitespace().next()?.parse().ok()
    }

    /// Of the first of [`PROGRAMS`] that is there.
    pub fn found() -> Option<Self> {
        PROGRAMS.iter().find_map(|program| Self::of(program).ok())
    }

    /// What a guest's ports come over unless somebody wants another way: the cheapest that this QEMU has.
    pub fn transport(self) -> Transport {
        if self >= VHOST_USER_SINCE { Transport::VhostUser } else { Transport::Socket }
    }

    /// Words for a socket that QEMU connects to, again whenever it is closed.
    fn reconnect(self) -> &'static str {
        if self >= RECONNECT_MS_SINCE { "reconnect-ms=500" } else { "reconnect=1" }
    }
}

/// A guest for which words are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its folder.
    pub folder: &'a Folder,
    /// How it was set up.
    pub setup: Setup,
    /// Where the server listens for devices of its own.
    pub run: &'a Path,
    /// Its memory, as in QEMU's `-m`.
    pub memory: &'a str,
}

impl Guest<'_> {
    /// What to add to the command line of a QEMU of this version.
    pub fn words(&self, version: Version) -> Vec<String> {
        match self.setup.transport {
            Transport::VhostUser => {
                let memory = format!("memory-backend-memfd,id=vtrace-memory,size={},share=on", self.memory);
                let mut words = option("-object", memory);
                words.extend(option("-machine", "memory-backend=vtrace-memory"));
                words.extend(self.vhost_user());
                words
            }
            Transport::Socket => self.serial(|name| {
                let path = escaped(&self.folder.socket(name));
                format!("socket,path={path},server=off,{}", version.reconnect())
            }),
            Transport::Pipe => self.serial(|name| format!("pipe,path={}", escaped(&self.folder.port(name)))),
        }
    }

    /// Our own devices, without the memory they need.
    pub(crate) fn vhost_user(&self) -> Vec<String> {
        let cpus = self.setup.cpus;
        let one = |(device, first): (usize, usize)| {
            let name = if device == 0 { self.name.to_owned() } else { format!("{}@{}", self.name, device + 1) };
            let path = escaped(&self.run.join(format!("{name}.sock")));
            let queues = 2 * (DEVICE_LANES_MAX.min(cpus - first) + 2);
            let mut words = option("-chardev", format!("socket,id=vtrace{device},path={path}"));
            words.extend(option(
                "-device",
                format!(
                    "vhost-user-test-device-pci,chardev=vtrace{device},virtio-id=3,num_vqs={queues},\
                     vq_size={QUEUE_ENTRIES},config_size=12"
                ),
            ));
            words
        };
        (0..cpus).step_by(DEVICE_LANES_MAX).enumerate().flat_map(one).collect()
    }

    /// QEMU's own devices: a port and the character device behind it, for each name.
    fn serial(&self, chardev: impl Fn(&str) -> String) -> Vec<String> {
        let mut words = Vec::new();
        for (name, place) in places(self.setup) {
            let controller = place.controller;
            if place.port == 1 {
                let device = format!("virtio-serial-pci,id=vtrace{controller},max_ports={CONTROLLER_PORTS}");
                words.extend(option("-device", device));
            }
            let what = chardev(&name);
            let (kind, rest) = what.split_once(',').expect("a kind and a path");
            words.extend(option("-chardev", format!("{kind},id=vtrace-{name},{rest}")));
            let port =
                format!("virtserialport,bus=vtrace{controller}.0,nr={},chardev=vtrace-{name},name={name}", place.port);
            words.extend(option("-device", port));
        }
        words
    }
}

/// Where a port is in the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    pub(crate) controller: usize,
    /// 1 to [`CONTROLLER_PORTS`] - 1.
    pub(crate) port: usize,
}

/// All ports of a guest.
pub(crate) fn places(setup: Setup) -> impl Iterator<Item = (String, Place)> {
    let usable = CONTROLLER_PORTS - 1;
    let place = move |at: usize| Place { controller: at / usable, port: at % usable + 1 };
    setup.ports().enumerate().map(move |(at, name)| (name, place(at)))
}

fn option(name: &str, value: impl Into<String>) -> Vec<String> {
    vec![name.into(), value.into()]
}

/// A comma in a value is written twice.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(transport: Transport, cpus: usize, version: &str) -> Vec<String> {
        let folder = Folder::of(Path::new("/var/lib/vtrace/virt"), "guest1");
        let setup = Setup { transport, cpus };
        let guest = Guest { name: "guest1", folder: &folder, setup, run: Path::new("/run/vtrace"), memory: "4G" };
        guest.words(version.parse().unwrap())
    }

    #[test]
    fn oldest_version_with_a_thing_is_the_one_that_gets_it() {
        let version = |text: &str| text.parse::<Version>().unwrap();
        assert_eq!(version("7.2.22").transport(), Transport::Socket);
        assert_eq!(version("10.0.13").transport(), Transport::Socket);
        assert_eq!(version("10.2.0").transport(), Transport::VhostUser);
        assert!(version("9.10") > version("9.2"), "numbers, not texts");
        for wrong in ["", "7", "x.y", "7."] {
            assert!(wrong.parse::<Version>().is_err(), "{wrong:?}");
        }
        assert!(words(Transport::Socket, 1, "7.2").iter().any(|word| word.ends_with("server=off,reconnect=1")));
        assert!(words(Transport::Socket, 1, "11.1").iter().any(|word| word.ends_with("server=off,reconnect-ms=500")));
    }

    #[test]
    fn thirty_ports_fill_a_device_and_the_next_is_on_another() {
        let devices = |cpus| words(Transport::Pipe, cpus, "7.2").iter().filter(|w| w.contains("max_ports")).count();
        assert_eq!((devices(29), devices(30), devices(288)), (1, 2, 10));
        let words = words(Transport::Pipe, 30, "7.2");
        let last = &words[words.len() - 6..];
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
        let words = words(Transport::VhostUser, 130, "11.1");
        let devices: Vec<_> = words.iter().filter(|word| word.contains("num_vqs")).collect();
        assert_eq!(devices.len(), 2);
        assert!(devices[0].contains("num_vqs=256,") && devices[1].contains("num_vqs=12,"), "{devices:?}");
        assert!(words.iter().any(|word| word.ends_with("path=/run/vtrace/guest1@2.sock")), "{words:?}");
    }

    #[test]
    fn comma_in_a_path_is_doubled() {
        assert_eq!(escaped(Path::new("/a,b")), "/a,,b");
    }
}
