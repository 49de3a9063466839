//! A guest's devices plugged into a QEMU that runs already, and out of it: `vtrace attach` and `detach`.
//!
//! | file | what |
//! |---|---|
//! | [`qmp`] | QEMU's control channel |
//! | [`vmm`] | what a QEMU has and can take |
//! | [`look`] | the same for `vtrace doctor`, all of it |
//!
//! In:    a QEMU behind its QMP socket, the sockets of a server
//! Out:   a vhost-user device for each socket that is needed, or none and the reason; none left after a detach
//! Runs:  on the caller's thread
//! Full:  what cannot be plugged in whole is taken out again
//! Trust: QEMU with nothing but what it is asked to do
//!
//! QEMU cannot connect such a device again (hw/virtio/vhost-user-base.c): whose server is gone has to go too, and come
//! again with the next one. In between the guest's agent sees its ports vanish and waits for new ones.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    capacity::{DRIVER, Obstacle, Plugged},
    qmp::{Event, Qmp, QmpError, shown},
};

/// How long a guest may take to let go of a device.
pub const UNPLUG_MAX: Duration = Duration::from_secs(30);
/// How long QEMU may take to forget a chardev whose device is gone.
const CHARDEV_MAX: Duration = Duration::from_secs(5);
/// Descriptors of each ring, as README has it.
const QUEUE_SIZE: u32 = 128;
/// All of virtio's console configuration.
const CONFIG_BYTES: u32 = 12;
/// What our devices and chardevs are called; a number follows.
const NAME: &str = "vtrace";

/// Why a device is not plugged in or out.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// No talking to QEMU, or it refused.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// Something is missing.
    #[error(transparent)]
    Obstacle(#[from] Obstacle),
    /// QEMU has none of these devices.
    #[error("this QEMU has no device that leads to {}", .0.display())]
    NotAttached(PathBuf),
    /// The guest has not answered the request.
    #[error("the guest has not let go of {device} within {} s", UNPLUG_MAX.as_secs())]
    Held {
        /// Which.
        device: String,
    },
    /// The guest cannot answer.
    #[error("the guest is paused: it cannot let go of a device")]
    Paused,
}

/// What is to be plugged in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The server's sockets for this guest, in the order of its devices.
    pub sockets: Vec<PathBuf>,
    /// Lanes that each carries.
    pub lanes: usize,
    /// CPUs to have ports for; those the guest has now if it is not said.
    pub cpus: Option<usize>,
    /// Where to plug them in, instead of the free slots that are found.
    pub buses: Vec<String>,
}

/// What was plugged in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attached {
    /// QEMU's version.
    pub version: super::qmp::Version,
    /// CPUs with a port.
    pub cpus: usize,
    /// Device and bus.
    pub devices: Vec<(String, String)>,
    /// Whether the guest runs; otherwise its driver comes later.
    pub running: bool,
}

/// Ports of each device: its lanes and port 0. One device at least.
pub fn ports(cpus: usize, lanes: usize) -> Vec<usize> {
    let lanes = lanes.max(1);
    let devices = cpus.div_ceil(lanes).max(1);
    (0..devices).map(|device| cpus.saturating_sub(device * lanes).min(lanes) + 1).collect()
}

/// Plugs in what a guest needs, or nothing.
///
/// # Errors
/// [`HotplugError`]; QEMU is then as it was.
pub fn attach(qmp: &mut Qmp, wanted: &Wanted) -> Result<Attached, HotplugError> {
    refuse(super::capacity::check_version(qmp)?)?;
    let running = super::capacity::check_state(qmp)??;
    if let Some(device) = super::capacity::plugged(qmp, &wanted.sockets)?.first() {
        return Err(Obstacle::Attached(shown(&device.path)).into());
    }
    refuse(super::capacity::check_memory(qmp)?)?;
    let cpus = match wanted.cpus {
        Some(cpus) => cpus,
        None => super::capacity::cpus(qmp)?,
    };
    let ports = ports(cpus, wanted.lanes);
    if ports.len() > wanted.sockets.len() {
        return Err(Obstacle::FewDevices { cpus, needed: ports.len(), devices: wanted.sockets.len() }.into());
    }
    let buses = if wanted.buses.is_empty() { super::capacity::free_slots(qmp)? } else { wanted.buses.clone() };
    if buses.len() < ports.len() {
        return Err(Obstacle::NoSlot { needed: ports.len(), free: buses.len() }.into());
    }
    let mut devices = Vec::new();
    for ((socket, ports), bus) in wanted.sockets.iter().zip(ports).zip(buses) {
        match plug(qmp, socket, ports, &bus) {
            Ok(name) => devices.push((name, bus)),
            Err(error) => {
                // The first error is the one to report.
                let _ = detach(qmp, &wanted.sockets);
                return Err(error.into());
            }
        }
    }
    Ok(Attached { version: qmp.version, cpus, devices, running })
}

fn refuse(obstacle: Option<Obstacle>) -> Result<(), Obstacle> {
    obstacle.map_or(Ok(()), Err)
}

/// One chardev and its device; both or none.
fn plug(qmp: &mut Qmp, socket: &std::path::Path, ports: usize, bus: &str) -> Result<String, QmpError> {
    let names = super::capacity::names(qmp)?;
    let name = (0..).map(|number| format!("{NAME}{number}")).find(|name| !names.contains(name));
    let name = name.expect("numbers do not end");
    let address = json!({ "type": "unix", "data": { "path": socket } });
    let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
    qmp.execute("chardev-add", json!({ "id": name, "backend": backend }))?;
    let device = json!({
        "driver": DRIVER, "id": name, "bus": bus, "chardev": name, "virtio-id": 3,
        "num_vqs": 2 * (ports + 1), "vq_size": QUEUE_SIZE, "config_size": CONFIG_BYTES,
    });
    if let Err(error) = qmp.execute("device_add", device) {
        // The first error is the one to report.
        let _ = qmp.execute("chardev-remove", json!({ "id": name }));
        return Err(error);
    }
    Ok(name)
}

/// Takes every device out that leads to one of these sockets, and its chardev. Gives how many there were.
///
/// # Errors
/// [`HotplugError`]; devices that are out stay out.
pub fn detach(qmp: &mut Qmp, sockets: &[PathBuf]) -> Result<usize, HotplugError> {
    let plugged = super::capacity::plugged(qmp, sockets)?;
    if plugged.is_empty() {
        return Err(HotplugError::NotAttached(sockets.first().cloned().unwrap_or_default()));
    }
    if !super::capacity::check_state(qmp)?? {
        return Err(HotplugError::Paused);
    }
    // All are asked first: the guest lets go of them at the same time.
    for device in &plugged {
        match qmp.execute("device_del", json!({ "id": device.path })) {
            // It was asked before and has not answered yet.
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
    let is_it = |event: &Event| event.name == "DEVICE_DELETED" && event.data["path"] == device.path.as_str();
    let left = UNPLUG_MAX.saturating_sub(begun.elapsed());
    match qmp.event(is_it, left)? {
        Some(_) => Ok(()),
        None => Err(HotplugError::Held { device: shown(device.name.as_deref().unwrap_or(&device.path)) }),
    }
}

/// QEMU keeps a chardev busy until the device's last reference is gone, a moment after the event.
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
