//! What a running QEMU has of what recording needs.
//!
//! In:    answers over QMP; the sockets that a server has for the guest
//! Out:   [`RunningVm`]
//! Runs:  on the caller's thread, for at most [`INSPECT_MAX`]; changes nothing
//! Full:  at most [`PORTS_MAX`] ports are examined
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
    capacity::{self, Chardev, DEVICES, Obstacle, Plugged, ask, leads_to, list, property},
    qemu::QemuVersion,
    qmp::{Qmp, QmpError, shown},
};
use crate::device::lane_range::{CONTROL_PORT_NAME, LANE_PORT_PREFIX};

/// Timeout of all answers together.
pub const INSPECT_MAX: Duration = Duration::from_secs(30);
/// Virtio-serial ports examined at most: all that a guest can have of ours, and others.
const PORTS_MAX: usize = 2 * LANES_MAX;
/// A port of QEMU's own device (hw/char/virtio-console.c).
const SERIAL_PORT: &str = "virtserialport";

/// A running virtual machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunningVm {
    /// QEMU's version.
    pub version: QemuVersion,
    /// Run state, as QEMU names it.
    pub state: String,
    /// Whether KVM runs its CPUs; `None` if QEMU does not support the query.
    pub kvm: Option<bool>,
    /// Number of CPUs, counting gaps in their numbers.
    pub cpus: usize,
    /// Our devices.
    pub devices: Vec<RunningDevice>,
    /// Our ports on QEMU's own device.
    pub ports: SerialPorts,
    /// Why it cannot have our device.
    pub device_obstacle: Option<Obstacle>,
    /// Why the server cannot map its memory.
    pub memory_obstacle: Option<Obstacle>,
    /// Free hot-plug slots.
    pub slots: usize,
}

/// One of our devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunningDevice {
    /// Number of lanes.
    pub lanes: usize,
    /// Whether it is connected to a server.
    pub is_connected: bool,
    /// Whether it can be unplugged.
    pub is_hotpluggable: bool,
}

/// Our ports on QEMU's own device.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SerialPorts {
    /// `filename` of the control port's chardev, if the port exists.
    pub control: Option<String>,
    /// Whether the control port leads to one of the server's sockets; `None` where QEMU does not tell (FIFOs).
    pub control_is_ours: Option<bool>,
    /// CPUs that have a port.
    pub lanes: Vec<Cpu>,
}

#[derive(Deserialize)]
struct Kvm {
    enabled: bool,
}

/// Inspects a running QEMU. `sockets` are the server's for this guest.
///
/// # Errors
/// [`QmpError`]
pub fn inspect(qmp: &mut Qmp, sockets: &[PathBuf]) -> Result<RunningVm, QmpError> {
    qmp.limit(INSPECT_MAX);
    let kvm = match ask::<Kvm>(qmp, "query-kvm", Value::Null) {
        Ok(Kvm { enabled }) => Some(enabled),
        Err(QmpError::Refused { .. } | QmpError::Answer(_)) => None,
        Err(error) => return Err(error),
    };
    Ok(RunningVm {
        version: qmp.version,
        state: shown(&capacity::run_state(qmp)?.status),
        kvm,
        cpus: capacity::cpus(qmp)?,
        devices: devices(qmp, sockets)?,
        ports: ports(qmp, sockets)?,
        device_obstacle: capacity::check_version(qmp)?,
        memory_obstacle: capacity::check_memory(qmp)?,
        slots: capacity::free_slots(qmp)?.len(),
    })
}

fn devices(qmp: &mut Qmp, sockets: &[PathBuf]) -> Result<Vec<RunningDevice>, QmpError> {
    let mut devices = Vec::new();
    for Plugged { path, is_connected, is_hotpluggable, .. } in
        capacity::plugged(qmp, sockets)?.into_iter().take(DEVICES_MAX)
    {
        let rings: usize = property(qmp, &path, "num_vqs")?;
        // Two for each port, port 0 included, and two for control messages.
        let lanes = (rings / 2).saturating_sub(2);
        devices.push(RunningDevice { lanes, is_connected, is_hotpluggable });
    }
    Ok(devices)
}

fn ports(qmp: &mut Qmp, sockets: &[PathBuf]) -> Result<SerialPorts, QmpError> {
    let mut found = SerialPorts::default();
    let mut left = PORTS_MAX;
    for folder in DEVICES {
        let entries = list(qmp, folder)?;
        for entry in entries.iter().filter(|entry| entry.child() == Some(SERIAL_PORT)) {
            let Some(rest) = left.checked_sub(1) else { return Ok(found) };
            left = rest;
            let path = format!("{folder}/{}", entry.name);
            let name: String = property(qmp, &path, "name")?;
            if name == CONTROL_PORT_NAME {
                let chardev: String = property(qmp, &path, "chardev")?;
                let filename = filename(qmp, &chardev)?;
                found.control_is_ours = is_one_of(&filename, sockets);
                found.control = Some(shown(&filename));
            }
            found.lanes.extend(name.strip_prefix(LANE_PORT_PREFIX).and_then(|cpu| cpu.parse().ok()).map(Cpu));
        }
    }
    found.lanes.sort_unstable();
    Ok(found)
}

/// `filename` of a chardev.
fn filename(qmp: &mut Qmp, chardev: &str) -> Result<String, QmpError> {
    let chardevs: Vec<Chardev> = ask(qmp, "query-chardev", Value::Null)?;
    let chardev = chardevs.into_iter().find(|one| one.label == chardev);
    Ok(chardev.map(|chardev| chardev.filename).unwrap_or_default())
}

fn is_one_of(filename: &str, sockets: &[PathBuf]) -> Option<bool> {
    let is_socket = filename.contains("unix:");
    let ours_are_sockets = sockets.iter().any(|socket| socket.extension().is_some_and(|end| end == "sock"));
    // The chardev of a FIFO does not tell its path.
    (is_socket || ours_are_sockets)
        .then(|| sockets.iter().any(|socket: &PathBuf| leads_to(filename, Path::new(socket))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_port_leads_to_the_server_or_elsewhere_and_a_fifo_does_not_tell() {
        let socket = [PathBuf::from("/v/guest1/agent-ctl-path.sock")];
        assert_eq!(is_one_of("disconnected:unix:/v/guest1/agent-ctl-path.sock", &socket), Some(true));
        assert_eq!(is_one_of("unix:/elsewhere/agent-ctl-path.sock,server=on", &socket), Some(false));
        assert_eq!(is_one_of("pipe", &socket), Some(false));
        let fifo = [PathBuf::from("/v/guest1/agent-ctl-path.out")];
        assert_eq!((is_one_of("pipe", &fifo), is_one_of("unix:/x", &fifo)), (None, Some(false)));
    }
}
