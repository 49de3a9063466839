//! What a running QEMU can take: its version, its memory, its CPUs, its free slots, its devices of ours.
//!
//! In:    answers over QMP
//! Out:   plain facts, and what stands in the way ([`Obstacle`])
//! Runs:  on the caller's thread
//! Full:  at most [`PORTS_MAX`] PCI ports are looked at
//! Trust: nothing: an answer of another form is an error
//!
//! Slots are found in QEMU's own object tree (qom-list), not by query-pci: that one says what the guest has set up, and
//! a guest that is booting has set up nothing.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError, Version, shown};

/// The device (QEMU hw/virtio/vhost-user-test-device-pci.c).
pub const DRIVER: &str = "vhost-user-test-device-pci";
/// The oldest QEMU that lets a user create it.
pub const VERSION_MIN: Version = Version { major: 10, minor: 2, micro: 0 };
/// PCI ports looked at.
const PORTS_MAX: usize = 512;
/// Slots of a PCI bus that is no PCI Express port.
const BUS_SLOTS: usize = 32;
/// Devices that are a hot-plug slot for one other.
const PORTS: [&str; 3] = ["pcie-root-port", "ioh3420", "xio3130-downstream"];
/// Where devices with and without a name are.
pub(crate) const DEVICES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// What keeps a device from being plugged in.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Obstacle {
    /// Too old.
    #[error("QEMU {0} does not let {DRIVER} be created: it needs {min}", min = VERSION_MIN)]
    Version(Version),
    /// Built without.
    #[error("this QEMU has no {DRIVER}: it was built without it")]
    NoDevice,
    /// Its memory cannot be seen by another process.
    #[error("the guest's memory ({0}) is not shared, and QEMU cannot change that while it runs")]
    MemoryNotShared(String),
    /// Nowhere to plug it in.
    #[error("{needed} free PCI slots for hot-plug are needed, {free} are there")]
    NoSlot {
        /// Devices to be plugged in.
        needed: usize,
        /// Slots.
        free: usize,
    },
    /// It has devices for this guest already.
    #[error("QEMU has a device for this guest already: {0}")]
    Attached(String),
    /// The server serves fewer CPUs of this guest.
    #[error("{cpus} CPUs need {needed} devices, and the server has {devices} for this guest")]
    FewDevices {
        /// CPUs of the guest.
        cpus: usize,
        /// Devices for them.
        needed: usize,
        /// Devices the server has.
        devices: usize,
    },
    /// QEMU is about to end, or waits for another to send it the guest.
    #[error("the virtual machine is in state {0:?}")]
    State(String),
}

/// An object in QEMU's tree.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub(crate) struct Entry {
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) kind: String,
}

impl Entry {
    /// The type of the object that it is the parent of.
    pub(crate) fn child(&self) -> Option<&str> {
        self.kind.strip_prefix("child<")?.strip_suffix('>')
    }
}

/// What connects a device to the host.
#[derive(Deserialize)]
pub(crate) struct Chardev {
    pub(crate) label: String,
    pub(crate) filename: String,
}

#[derive(Deserialize)]
struct Status {
    status: String,
    running: bool,
}

#[derive(Deserialize)]
struct Memory {
    id: Option<String>,
    share: bool,
}

#[derive(Deserialize)]
struct Processor {
    #[serde(rename = "cpu-index")]
    index: usize,
}

/// One of our devices in a QEMU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plugged {
    /// Where it is in QEMU's tree; device_del takes this as it takes a name.
    pub path: String,
    /// Its name, if it has one: events call it so.
    pub name: Option<String>,
    /// What connects it to the server.
    pub chardev: String,
}

pub(crate) fn ask<T: for<'a> Deserialize<'a>>(qmp: &mut Qmp, command: &str, arguments: Value) -> Result<T, QmpError> {
    let answer = qmp.execute(command, arguments)?;
    serde_json::from_value(answer).map_err(|_| QmpError::Answer(command.into()))
}

pub(crate) fn list(qmp: &mut Qmp, path: &str) -> Result<Vec<Entry>, QmpError> {
    ask(qmp, "qom-list", json!({ "path": path }))
}

pub(crate) fn property<T: for<'a> Deserialize<'a>>(qmp: &mut Qmp, path: &str, property: &str) -> Result<T, QmpError> {
    ask(qmp, "qom-get", json!({ "path": path, "property": property }))
}

/// Whether this QEMU can have the device at all.
pub(crate) fn check_version(qmp: &mut Qmp) -> Result<Option<Obstacle>, QmpError> {
    if qmp.version < VERSION_MIN {
        return Ok(Some(Obstacle::Version(qmp.version)));
    }
    match qmp.execute("device-list-properties", json!({ "typename": DRIVER })) {
        Ok(_) => Ok(None),
        Err(QmpError::Refused { .. }) => Ok(Some(Obstacle::NoDevice)),
        Err(error) => Err(error),
    }
}

/// Whether the machine is in a state in which something can be plugged in, and whether its CPUs run.
pub(crate) fn check_state(qmp: &mut Qmp) -> Result<Result<bool, Obstacle>, QmpError> {
    let Status { status, running } = ask(qmp, "query-status", Value::Null)?;
    let fits = matches!(status.as_str(), "running" | "paused" | "prelaunch" | "debug" | "suspended");
    Ok(if fits { Ok(running) } else { Err(Obstacle::State(shown(&status))) })
}

/// Whether the server can see the guest's memory. Where QEMU says which backend is the machine's, that one counts, else
/// (NUMA) all do.
pub(crate) fn check_memory(qmp: &mut Qmp) -> Result<Option<Obstacle>, QmpError> {
    let backends: Vec<Memory> = ask(qmp, "query-memdev", Value::Null)?;
    let main = match property::<String>(qmp, "/machine", "memory-backend") {
        Ok(path) => path.rsplit('/').next().unwrap_or_default().to_owned(),
        Err(QmpError::Refused { .. } | QmpError::Answer(_)) => String::new(),
        Err(error) => return Err(error),
    };
    Ok(not_shared(&backends, &main).map(Obstacle::MemoryNotShared))
}

fn not_shared(backends: &[Memory], main: &str) -> Option<String> {
    let name = |memory: &Memory| shown(memory.id.as_deref().unwrap_or("without a name"));
    let is_main = |memory: &&Memory| !main.is_empty() && memory.id.as_deref() == Some(main);
    match backends.iter().find(is_main) {
        Some(memory) => (!memory.share).then(|| name(memory)),
        None if backends.is_empty() => Some("no backend of its own".into()),
        None => backends.iter().find(|memory| !memory.share).map(name),
    }
}

/// CPUs of the guest, those in between that are not there included: ports go by number.
pub(crate) fn cpus(qmp: &mut Qmp) -> Result<usize, QmpError> {
    let cpus: Vec<Processor> = ask(qmp, "query-cpus-fast", Value::Null)?;
    Ok(cpus.iter().map(|cpu| cpu.index.saturating_add(1)).max().unwrap_or(0))
}

/// Names of buses that take one more device each, the same name once for each.
pub(crate) fn free_slots(qmp: &mut Qmp) -> Result<Vec<String>, QmpError> {
    let mut free = Vec::new();
    for folder in DEVICES {
        let ports = list(qmp, folder)?;
        let is_port = |entry: &&Entry| entry.child().is_some_and(|kind| PORTS.contains(&kind));
        for port in ports.iter().filter(is_port).take(PORTS_MAX) {
            let path = format!("{folder}/{}", port.name);
            if !matches!(property(qmp, &path, "hotplug"), Ok(false)) {
                free.extend(bus_of(qmp, &path)?.filter(|(_, used)| *used == 0).map(|(bus, _)| bus));
            }
        }
    }
    // The older machine takes devices on its root bus.
    if let Some((bus, used)) = root_bus(qmp)? {
        free.extend(std::iter::repeat_n(bus, BUS_SLOTS.saturating_sub(used)));
    }
    Ok(free)
}

/// The root bus of a machine of type `pc`, and how many devices are on it.
fn root_bus(qmp: &mut Qmp) -> Result<Option<(String, usize)>, QmpError> {
    match bus_of(qmp, "/machine/i440fx") {
        Err(QmpError::Refused { .. }) => Ok(None),
        found => found,
    }
}

/// The bus below a port, and how many devices are on it.
fn bus_of(qmp: &mut Qmp, path: &str) -> Result<Option<(String, usize)>, QmpError> {
    let Some(bus) = bus_in(&list(qmp, path)?) else { return Ok(None) };
    let used = devices_on(qmp, path, &bus)?;
    Ok(Some((bus, used)))
}

fn bus_in(entries: &[Entry]) -> Option<String> {
    let bus = entries.iter().find(|entry| matches!(entry.child(), Some("PCIE" | "PCI")));
    bus.map(|entry| entry.name.clone())
}

fn devices_on(qmp: &mut Qmp, path: &str, bus: &str) -> Result<usize, QmpError> {
    let entries = list(qmp, &format!("{path}/{bus}"))?;
    Ok(entries.iter().filter(|entry| entry.name.starts_with("child[")).count())
}

/// Our devices that connect to one of these sockets.
pub(crate) fn plugged(qmp: &mut Qmp, sockets: &[PathBuf]) -> Result<Vec<Plugged>, QmpError> {
    let chardevs: Vec<Chardev> = ask(qmp, "query-chardev", Value::Null)?;
    let leads_to_one = |chardev: &&Chardev| sockets.iter().any(|socket| leads_to(&chardev.filename, socket));
    let labels: Vec<&str> = chardevs.iter().filter(leads_to_one).map(|chardev| chardev.label.as_str()).collect();
    let mut found = Vec::new();
    for folder in DEVICES {
        for entry in list(qmp, folder)?.into_iter().filter(|entry| entry.child() == Some(DRIVER)) {
            let path = format!("{folder}/{}", entry.name);
            let chardev: String = property(qmp, &path, "chardev")?;
            if labels.contains(&chardev.as_str()) {
                let name = (folder == DEVICES[0]).then_some(entry.name);
                found.push(Plugged { path, name, chardev });
            }
        }
    }
    Ok(found)
}

/// Names in use for devices and for chardevs.
pub(crate) fn names(qmp: &mut Qmp) -> Result<BTreeSet<String>, QmpError> {
    let devices = list(qmp, DEVICES[0])?.into_iter().map(|entry| entry.name);
    let chardevs: Vec<Chardev> = ask(qmp, "query-chardev", Value::Null)?;
    Ok(devices.chain(chardevs.into_iter().map(|chardev| chardev.label)).collect())
}

/// `unix:PATH`, `disconnected:unix:PATH`, with options behind a comma: QEMU's words for a socket (chardev/char-socket.c).
pub(crate) fn leads_to(filename: &str, socket: &Path) -> bool {
    let path = filename.strip_prefix("disconnected:").unwrap_or(filename).strip_prefix("unix:");
    let (Some(path), Some(socket)) = (path, socket.to_str()) else { return false };
    path.strip_prefix(socket).is_some_and(|rest| rest.is_empty() || rest.starts_with(','))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(id: &str, share: bool) -> Memory {
        Memory { id: Some(id.into()), share }
    }

    #[test]
    fn machines_own_memory_counts_and_without_its_name_all_of_it() {
        assert_eq!(not_shared(&[memory("nv", false), memory("mem0", true)], "mem0"), None);
        assert_eq!(not_shared(&[memory("nv", true), memory("pc.ram", false)], "pc.ram"), Some("pc.ram".into()));
        assert_eq!(not_shared(&[memory("a", true), memory("b", false)], ""), Some("b".into()));
        assert_eq!(not_shared(&[memory("a", true), memory("b", true)], ""), None);
        assert!(not_shared(&[], "").is_some());
    }

    #[test]
    fn chardev_is_known_by_its_socket_connected_or_not() {
        let socket = Path::new("/run/vtrace/guest1.sock");
        for name in ["unix:/run/vtrace/guest1.sock", "disconnected:unix:/run/vtrace/guest1.sock,server=on"] {
            assert!(leads_to(name, socket), "{name}");
        }
        for name in
            ["unix:/run/vtrace/guest1.sock2", "pty:/run/vtrace/guest1.sock", "unix:/run/vtrace/guest1@2.sock", ""]
        {
            assert!(!leads_to(name, socket), "{name}");
        }
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        let version = |major, minor| Version { major, minor, micro: 9 };
        assert!(version(10, 0) < VERSION_MIN && version(9, 20) < VERSION_MIN && version(11, 0) > VERSION_MIN);
        assert!(version(10, 2) >= VERSION_MIN);
    }

    #[test]
    fn only_a_child_has_a_childs_type() {
        let entry = |kind: &str| Entry { name: "rp0".into(), kind: kind.into() };
        assert_eq!(entry("child<pcie-root-port>").child(), Some("pcie-root-port"));
        assert_eq!(entry("link<pcie-root-port>").child(), None);
        assert_eq!(bus_in(&[entry("string"), entry("child<PCIE>")]), Some("rp0".into()));
    }
}
