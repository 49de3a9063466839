//! What a running QEMU can accept: version, memory, CPUs, free hot-plug slots, devices that are present.
//!
//! In:    answers over QMP
//! Out:   facts, and what prevents a hot-plug ([`Obstacle`])
//! Runs:  on the caller's thread
//! Full:  at most [`PORTS_MAX`] PCI ports are examined
//! Trust: nothing: an answer of another form is an error
//!
//! Slots are found in QEMU's object tree (qom-list), not by query-pci, which shows what the guest has configured: nothing
//! while it boots.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    qemu::{DRIVER, QemuVersion, VHOST_USER_SINCE},
    qmp::{Qmp, QmpError, shown},
};

/// Prefix of the `filename` of a chardev without a connection (chardev/char-socket.c).
const DISCONNECTED: &str = "disconnected:";
/// PCI ports examined at most.
const PORTS_MAX: usize = 512;
/// Slots of a conventional PCI bus.
const BUS_SLOTS: usize = 32;
/// Types of PCI Express ports, each a hot-plug slot for one device.
const PORTS: [&str; 3] = ["pcie-root-port", "ioh3420", "xio3130-downstream"];
/// The folders of QEMU's tree with named and unnamed devices.
pub(crate) const DEVICES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// What prevents a device from being plugged in.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Obstacle {
    /// QEMU is too old.
    #[error("QEMU {0} does not support {DRIVER}: {min} or newer is needed", min = VHOST_USER_SINCE)]
    Version(QemuVersion),
    /// QEMU was built without the device.
    #[error("this QEMU was built without {DRIVER}")]
    NoDevice,
    /// The guest's memory (the backend's name) is private to QEMU.
    #[error("the guest's memory ({0}) is not shared, and QEMU cannot change that while it runs")]
    MemoryNotShared(String),
    /// Too few free hot-plug slots.
    #[error("{needed} free PCI hot-plug slots are needed, the guest has {free}")]
    NoSlot {
        /// Devices to plug in.
        needed: usize,
        /// Free slots.
        free: usize,
    },
    /// QEMU has a device for this guest (its name).
    #[error("QEMU has a device for this guest already: {0}")]
    Attached(String),
    /// A device without its server that cannot be unplugged (its path).
    #[error("its device {0} has lost its server, and is on pcie.0, where it cannot be unplugged")]
    NotHotpluggable(String),
    /// The server has too few devices for the guest's CPUs.
    #[error("{cpus} CPUs need {needed} devices, and the server has {devices} for this guest")]
    FewDevices {
        /// CPUs of the guest.
        cpus: usize,
        /// Devices needed for them.
        needed: usize,
        /// Devices of the server.
        devices: usize,
    },
    /// A state without hot-plug: QEMU is ending, or waits for an incoming migration.
    #[error("the virtual machine is in state {0:?}")]
    State(String),
}

/// A member of an object in QEMU's tree.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub(crate) struct Entry {
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) kind: String,
}

impl Entry {
    /// Type of the child object, if the member is one.
    pub(crate) fn child(&self) -> Option<&str> {
        self.kind.strip_prefix("child<")?.strip_suffix('>')
    }
}

/// A character device: the host's side of a device.
#[derive(Deserialize)]
pub(crate) struct Chardev {
    pub(crate) label: String,
    pub(crate) filename: String,
}

/// Whether the guest runs (query-status).
#[derive(Deserialize)]
pub(crate) struct RunState {
    pub(crate) status: String,
    pub(crate) running: bool,
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

/// One of our devices in QEMU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plugged {
    /// Path in QEMU's tree; device_del accepts it like an id.
    pub path: String,
    /// Its id, if it has one.
    pub name: Option<String>,
    /// Label of its chardev.
    pub chardev: String,
    /// Whether its chardev is connected to a server.
    pub is_connected: bool,
    /// Whether it can be unplugged: not on pcie.0.
    pub is_hotpluggable: bool,
}

pub(crate) fn ask<T: for<'a> Deserialize<'a>>(qmp: &mut Qmp, command: &str, arguments: Value) -> Result<T, QmpError> {
    let answer = qmp.execute(command, arguments)?;
    serde_json::from_value(answer).map_err(|_| QmpError::Answer(command.into()))
}

/// QEMU's run state.
pub(crate) fn run_state(qmp: &mut Qmp) -> Result<RunState, QmpError> {
    ask(qmp, "query-status", Value::Null)
}

pub(crate) fn list(qmp: &mut Qmp, path: &str) -> Result<Vec<Entry>, QmpError> {
    ask(qmp, "qom-list", json!({ "path": path }))
}

pub(crate) fn property<T: for<'a> Deserialize<'a>>(qmp: &mut Qmp, path: &str, property: &str) -> Result<T, QmpError> {
    ask(qmp, "qom-get", json!({ "path": path, "property": property }))
}

/// Whether this QEMU supports the device.
pub(crate) fn check_version(qmp: &mut Qmp) -> Result<Option<Obstacle>, QmpError> {
    if qmp.version < VHOST_USER_SINCE {
        return Ok(Some(Obstacle::Version(qmp.version)));
    }
    match qmp.execute("device-list-properties", json!({ "typename": DRIVER })) {
        Ok(_) => Ok(None),
        Err(QmpError::Refused { .. }) => Ok(Some(Obstacle::NoDevice)),
        Err(error) => Err(error),
    }
}

/// Whether the guest's CPUs run, or the state that does not allow hot-plug.
pub(crate) fn check_state(qmp: &mut Qmp) -> Result<Result<bool, Obstacle>, QmpError> {
    let RunState { status, running } = run_state(qmp)?;
    let fits = matches!(status.as_str(), "running" | "paused" | "prelaunch" | "debug" | "suspended");
    Ok(if fits { Ok(running) } else { Err(Obstacle::State(shown(&status))) })
}

/// Whether the guest's memory is shared. If QEMU names the machine's backend, only that one counts, else (NUMA) all do.
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

/// Number of CPUs, counting gaps in their numbers: ports are numbered by CPU.
pub(crate) fn cpus(qmp: &mut Qmp) -> Result<usize, QmpError> {
    let cpus: Vec<Processor> = ask(qmp, "query-cpus-fast", Value::Null)?;
    Ok(cpus.iter().map(|cpu| cpu.index.saturating_add(1)).max().unwrap_or(0))
}

/// Free hot-plug slots: the name of a bus for each device that it can still accept.
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
    // The older machine type accepts devices on its root bus.
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
    let mut found = Vec::new();
    for folder in DEVICES {
        for entry in list(qmp, folder)?.into_iter().filter(|entry| entry.child() == Some(DRIVER)) {
            let path = format!("{folder}/{}", entry.name);
            let label: String = property(qmp, &path, "chardev")?;
            let chardev = chardevs.iter().find(|chardev| chardev.label == label);
            let Some(filename) = chardev.map(|chardev| &chardev.filename) else { continue };
            if sockets.iter().any(|socket| leads_to(filename, socket)) {
                let name = (folder == DEVICES[0]).then_some(entry.name);
                let is_connected = !filename.starts_with(DISCONNECTED);
                let is_hotpluggable = !matches!(property(qmp, &path, "hotpluggable"), Ok(false));
                found.push(Plugged { path, name, chardev: label, is_connected, is_hotpluggable });
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

/// Whether a chardev's `filename` (`unix:PATH`, `disconnected:unix:PATH`, options after a comma; chardev/char-socket.c)
/// is this socket.
pub(crate) fn leads_to(filename: &str, socket: &Path) -> bool {
    let path = filename.strip_prefix(DISCONNECTED).unwrap_or(filename).strip_prefix("unix:");
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
    fn machines_own_backend_counts_and_without_its_name_all_do() {
        assert_eq!(not_shared(&[memory("nv", false), memory("mem0", true)], "mem0"), None);
        assert_eq!(not_shared(&[memory("nv", true), memory("pc.ram", false)], "pc.ram"), Some("pc.ram".into()));
        assert_eq!(not_shared(&[memory("a", true), memory("b", false)], ""), Some("b".into()));
        assert_eq!(not_shared(&[memory("a", true), memory("b", true)], ""), None);
        assert!(not_shared(&[], "").is_some());
    }

    #[test]
    fn chardev_is_recognised_by_its_socket_connected_or_not() {
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
        let version = |major, minor| QemuVersion { major, minor, micro: 9 };
        assert!(
            version(10, 0) < VHOST_USER_SINCE && version(9, 20) < VHOST_USER_SINCE && version(11, 0) > VHOST_USER_SINCE
        );
        assert!(version(10, 2) >= VHOST_USER_SINCE);
    }

    #[test]
    fn only_a_child_has_a_childs_type() {
        let entry = |kind: &str| Entry { name: "rp0".into(), kind: kind.into() };
        assert_eq!(entry("child<pcie-root-port>").child(), Some("pcie-root-port"));
        assert_eq!(entry("link<pcie-root-port>").child(), None);
        assert_eq!(bus_in(&[entry("string"), entry("child<PCIE>")]), Some("rp0".into()));
    }
}
