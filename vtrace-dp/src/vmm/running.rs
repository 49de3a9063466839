//! What a running QEMU has of what a recording needs, as its QMP tells it.
//!
//! In:    answers over QMP; the sockets that a server has for the guest
//! Out:   [`Running`]: plain facts
//! Runs:  on the caller's thread; all questions together take [`LOOK_MAX`] at most; nothing is changed
//! Full:  at most [`PORTS_MAX`] ports are looked at
//! Trust: nothing: an answer of another form is an error, texts are cleaned before they are kept

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use serde_json::Value;
use vtrace_common::{
    ids::Cpu,
    limits::{DEVICES_MAX, LANES_MAX},
};

use super::{
    capacity::{self, Chardev, DEVICES, Obstacle, ask, leads_to, list, property},
    qmp::{Qmp, QmpError, Version, shown},
};
use crate::device::lane_range::{CONTROL_PORT_NAME, LANE_PORT_PREFIX};

/// How long all answers together may take.
pub const LOOK_MAX: Duration = Duration::from_secs(30);
/// Ports of QEMU's own device looked at: all that a guest can have of ours, and some that are not.
const PORTS_MAX: usize = 2 * LANES_MAX;
/// QEMU's own device's port (hw/char/virtio-console.c).
const SERIAL_PORT: &str = "virtserialport";

/// A QEMU that runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Running {
    /// Its version.
    pub version: Version,
    /// Its state in its own word, `running` or another.
    pub state: String,
    /// Whether KVM runs its CPUs; missing if it does not say.
    pub kvm: Option<bool>,
    /// CPUs of the guest, those in between that are not there included.
    pub cpus: usize,
    /// CPUs that its devices of ours have lanes for; one entry each.
    pub devices: Vec<usize>,
    /// Its ports of our names, by QEMU's own device.
    pub ports: Ports,
    /// Why it cannot have a device of ours.
    pub device_obstacle: Option<Obstacle>,
    /// Why a server cannot see its memory.
    pub memory_obstacle: Option<Obstacle>,
    /// Devices that can be plugged in.
    pub slots: usize,
}

/// Ports of our names, by QEMU's own device.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ports {
    /// What the control port's chardev leads to, in QEMU's words, if there is one.
    pub control: Option<String>,
    /// The control port leads to one of the server's sockets; missing where that cannot be told (FIFOs).
    pub control_is_ours: Option<bool>,
    /// CPUs that have a port.
    pub lanes: Vec<Cpu>,
}

#[derive(Deserialize)]
struct Kvm {
    enabled: bool,
}

#[derive(Deserialize)]
struct Status {
    status: String,
}

/// Asks for all of it. `sockets` are those of the server for this guest.
///
/// # Errors
/// [`QmpError`]
pub fn look(qmp: &mut Qmp, sockets: &[PathBuf]) -> Result<Running, QmpError> {
    qmp.hurry(LOOK_MAX);
    let Status { status } = ask(qmp, "query-status", Value::Null)?;
    let kvm = match ask::<Kvm>(qmp, "query-kvm", Value::Null) {
        Ok(Kvm { enabled }) => Some(enabled),
        Err(QmpError::Refused { .. } | QmpError::Answer(_)) => None,
        Err(error) => return Err(error),
    };
    Ok(Running {
        version: qmp.version,
        state: shown(&status),
        kvm,
        cpus: capacity::cpus(qmp)?,
        devices: devices(qmp, sockets)?,
        ports: ports(qmp, sockets)?,
        device_obstacle: capacity::check_version(qmp)?,
        memory_obstacle: capacity::check_memory(qmp)?,
        slots: capacity::free_slots(qmp)?.len(),
    })
}

/// Lanes of each of our devices.
fn devices(qmp: &mut Qmp, sockets: &[PathBuf]) -> Result<Vec<usize>, QmpError> {
    let plugged = capacity::plugged(qmp, sockets)?;
    let lanes = plugged.iter().take(DEVICES_MAX).map(|device| {
        let rings: usize = property(qmp, &device.path, "num_vqs")?;
        // Two for each port, port 0 among them, and two to speak about ports.
        Ok((rings / 2).saturating_sub(2))
    });
    lanes.collect()
}

fn ports(qmp: &mut Qmp, sockets: &[PathBuf]) -> Result<Ports, QmpError> {
    let (mut found, mut left) = (Ports::default(), PORTS_MAX);
    for folder in DEVICES {
        let entries = list(qmp, folder)?;
        for entry in entries.iter().filter(|entry| entry.child() == Some(SERIAL_PORT)) {
            let Some(rest) = left.checked_sub(1) else { return Ok(found) };
            left = rest;
            let path = format!("{folder}/{}", entry.name);
            let name: String = property(qmp, &path, "name")?;
            if name == CONTROL_PORT_NAME {
                let chardev: String = property(qmp, &path, "chardev")?;
                let leads = target(qmp, &chardev)?;
                found.control_is_ours = is_one_of(&leads, sockets);
                found.control = Some(shown(&leads));
            }
            found.lanes.extend(name.strip_prefix(LANE_PORT_PREFIX).and_then(|cpu| cpu.parse().ok()).map(Cpu));
        }
    }
    found.lanes.sort_unstable();
    Ok(found)
}

/// What a chardev leads to, in QEMU's words.
fn target(qmp: &mut Qmp, chardev: &str) -> Result<String, QmpError> {
    let chardevs: Vec<Chardev> = ask(qmp, "query-chardev", Value::Null)?;
    let chardev = chardevs.into_iter().find(|one| one.label == chardev);
    Ok(chardev.map(|chardev| chardev.filename).unwrap_or_default())
}

fn is_one_of(leads: &str, sockets: &[PathBuf]) -> Option<bool> {
    let is_socket = leads.contains("unix:");
    let sockets_end = |end: &str| sockets.iter().any(|socket| socket.extension().is_some_and(|ends| ends == end));
    // A FIFO's chardev does not say where it is.
    (is_socket || sockets_end("sock"))
        .then(|| sockets.iter().any(|socket: &PathBuf| leads_to(leads, Path::new(socket))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chardev_leads_to_us_or_elsewhere_and_a_fifos_cannot_be_told() {
        let socket = [PathBuf::from("/v/guest1/agent-ctl-path.sock")];
        assert_eq!(is_one_of("disconnected:unix:/v/guest1/agent-ctl-path.sock", &socket), Some(true));
        assert_eq!(is_one_of("unix:/elsewhere/agent-ctl-path.sock,server=on", &socket), Some(false));
        assert_eq!(is_one_of("pipe", &socket), Some(false));
        let fifo = [PathBuf::from("/v/guest1/agent-ctl-path.out")];
        assert_eq!((is_one_of("pipe", &fifo), is_one_of("unix:/x", &fifo)), (None, Some(false)));
    }
}
