//! Hot-plug of a guest's devices into a running QEMU, and hot-unplug: `vtrace attach` and `detach`.
//!
//! In:    a QMP connection, the server's sockets for the guest
//! Out:   a vhost-user device for each socket that is needed, or none and the reason
//! Runs:  on the caller's thread
//! Full:  if one device cannot be plugged in, the others are unplugged again
//!
//! QEMU cannot reconnect such a device (hw/virtio/vhost-user-base.c): when its server ends, the device must be unplugged
//! and plugged in again. In between, the guest's agent sees its ports vanish and waits for new ones.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    capacity::{self, Obstacle, Plugged},
    qemu::{DRIVER, QUEUE_ENTRIES, QemuVersion},
    qmp::{Qmp, QmpError, QmpEvent, shown},
};

/// Timeout of the guest's part of an unplug.
pub const UNPLUG_MAX: Duration = Duration::from_secs(30);
/// Timeout for QEMU to release the chardev of an unplugged device.
const CHARDEV_MAX: Duration = Duration::from_secs(5);
/// Size of struct virtio_console_config.
const CONFIG_BYTES: u32 = 12;
/// Prefix of the ids of our devices and chardevs.
const NAME: &str = "vtrace";

/// A hot-plug or hot-unplug that failed.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// QMP failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// A requirement is not met.
    #[error(transparent)]
    Obstacle(#[from] Obstacle),
    /// QEMU has no device for this socket.
    #[error("this QEMU has no device that connects to {}", .0.display())]
    NotAttached(PathBuf),
    /// The guest did not release the device.
    #[error("the guest did not release {device} within {} s", UNPLUG_MAX.as_secs())]
    Held {
        /// Id or path of the device.
        device: String,
    },
    /// A paused guest cannot release a device.
    #[error("the guest is paused and cannot release a device")]
    Paused,
}

/// The devices to plug in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AttachRequest {
    /// The server's sockets for this guest, in the order of its devices.
    pub sockets: Vec<PathBuf>,
    /// Lanes of each device.
    pub lanes: usize,
    /// Number of CPUs; `None`: those that the guest has now.
    pub cpus: Option<usize>,
    /// Buses to plug them into; empty: free hot-plug slots.
    pub buses: Vec<String>,
}

/// The devices that were plugged in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attached {
    /// QEMU's version.
    pub version: QemuVersion,
    /// Number of CPUs with a port.
    pub cpus: usize,
    /// Device id and bus.
    pub devices: Vec<(String, String)>,
    /// Whether the guest runs: a paused guest's driver starts later.
    pub running: bool,
    /// Devices without a server that were unplugged first.
    pub replaced: usize,
}

/// Number of ports of each device: its lanes and port 0. At least one device.
pub fn ports(cpus: usize, lanes: usize) -> Vec<usize> {
    let lanes = lanes.max(1);
    let devices = cpus.div_ceil(lanes).max(1);
    (0..devices).map(|device| cpus.saturating_sub(device * lanes).min(lanes) + 1).collect()
}

/// Plugs in all devices that a guest needs, or none.
///
/// # Errors
/// [`HotplugError`]; QEMU is then as it was, except for devices without a server, which may be unplugged.
pub fn attach(qmp: &mut Qmp, wanted: &AttachRequest) -> Result<Attached, HotplugError> {
    refuse(capacity::check_version(qmp)?)?;
    let running = capacity::check_state(qmp)??;
    let replaced = capacity::plugged(qmp, &wanted.sockets)?;
    for device in &replaced {
        // QEMU cannot reconnect a device: one whose server has ended is replaced.
        match device {
            Plugged { is_connected: true, path, .. } => return Err(Obstacle::Attached(shown(path)).into()),
            Plugged { is_hotpluggable: false, path, .. } => return Err(Obstacle::NotHotpluggable(shown(path)).into()),
            _ => {}
        }
    }
    refuse(capacity::check_memory(qmp)?)?;
    let cpus = match wanted.cpus {
        Some(cpus) => cpus,
        None => capacity::cpus(qmp)?,
    };
    let port_counts = ports(cpus, wanted.lanes);
    if port_counts.len() > wanted.sockets.len() {
        return Err(Obstacle::FewDevices { cpus, needed: port_counts.len(), devices: wanted.sockets.len() }.into());
    }
    if !replaced.is_empty() {
        detach(qmp, &wanted.sockets)?;
    }
    let buses = if wanted.buses.is_empty() { capacity::free_slots(qmp)? } else { wanted.buses.clone() };
    if buses.len() < port_counts.len() {
        return Err(Obstacle::NoSlot { needed: port_counts.len(), free: buses.len() }.into());
    }
    let mut devices = Vec::new();
    for ((socket, ports), bus) in wanted.sockets.iter().zip(port_counts).zip(buses) {
        match plug(qmp, socket, ports, &bus) {
            Ok(name) => devices.push((name, bus)),
            Err(error) => {
                // The first error is the one to report.
                let _ = detach(qmp, &wanted.sockets);
                return Err(error.into());
            }
        }
    }
    Ok(Attached { version: qmp.version, cpus, devices, running, replaced: replaced.len() })
}

fn refuse(obstacle: Option<Obstacle>) -> Result<(), Obstacle> {
    obstacle.map_or(Ok(()), Err)
}

/// Adds a chardev and its device, or neither.
fn plug(qmp: &mut Qmp, socket: &std::path::Path, ports: usize, bus: &str) -> Result<String, QmpError> {
    let names = capacity::names(qmp)?;
    let name = (0..).map(|number| format!("{NAME}{number}")).find(|name| !names.contains(name));
    let name = name.expect("numbers do not end");
    let address = json!({ "type": "unix", "data": { "path": socket } });
    let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
    qmp.execute("chardev-add", json!({ "id": name, "backend": backend }))?;
    let device = json!({
        "driver": DRIVER, "id": name, "bus": bus, "chardev": name, "virtio-id": 3,
        "num_vqs": 2 * (ports + 1), "vq_size": QUEUE_ENTRIES, "config_size": CONFIG_BYTES,
    });
    if let Err(error) = qmp.execute("device_add", device) {
        // The first error is the one to report.
        let _ = qmp.execute("chardev-remove", json!({ "id": name }));
        return Err(error);
    }
    Ok(name)
}

/// Unplugs every device that connects to one of these sockets, and removes its chardev. Returns their number.
///
/// # Errors
/// [`HotplugError`]; devices already unplugged stay so.
pub fn detach(qmp: &mut Qmp, sockets: &[PathBuf]) -> Result<usize, HotplugError> {
    let plugged = capacity::plugged(qmp, sockets)?;
    if plugged.is_empty() {
        return Err(HotplugError::NotAttached(sockets.first().cloned().unwrap_or_default()));
    }
    if !capacity::check_state(qmp)?? {
        return Err(HotplugError::Paused);
    }
    // Request all first: the guest releases them at the same time.
    for device in &plugged {
        match qmp.execute("device_del", json!({ "id": device.path })) {
            // Requested before and still pending.
            Err(QmpError::Refused { why, .. }) if why.contains("already in the process of unplug") => {}
            result => drop(result?),
        }
    }
    let begun = Instant::now();
    for device in &plugged {
        await_unplugged(qmp, device, begun)?;
        remove_chardev(qmp, &device.chardev)?;
    }
    Ok(plugged.len())
}

fn await_unplugged(qmp: &mut Qmp, device: &Plugged, begun: Instant) -> Result<(), HotplugError> {
    let is_it = |event: &QmpEvent| event.name == "DEVICE_DELETED" && event.data["path"] == device.path.as_str();
    let left = UNPLUG_MAX.saturating_sub(begun.elapsed());
    match qmp.event(is_it, left)? {
        Some(_) => Ok(()),
        None => Err(HotplugError::Held { device: shown(device.name.as_deref().unwrap_or(&device.path)) }),
    }
}

/// QEMU keeps a chardev busy until the device's last reference is dropped, shortly after the event.
fn remove_chardev(qmp: &mut Qmp, name: &str) -> Result<(), QmpError> {
    let begun = Instant::now();
    loop {
        match qmp.execute("chardev-remove", json!({ "id": name })) {
            Err(QmpError::Refused { why, .. }) if why.contains("busy") && begun.elapsed() < CHARDEV_MAX => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result.map(drop),
        }
    }
}

#[cfg(test)]
mod tests;
