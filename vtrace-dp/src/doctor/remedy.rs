//! Advice about what is missing, shared by `vtrace doctor` and the errors of the other verbs.
//!
//! In:    an error or a state
//! Out:   a short text: a command, an option, or an action

use vtrace_common::wire::client::DriverState;

use crate::{
    server::link::LinkError,
    vmm::{capacity::Obstacle, qmp::QmpError},
};

/// QEMU's options for memory that the server can map.
pub const SHARED_MEMORY: &str =
    "start QEMU with -object memory-backend-memfd,id=mem0,size=SIZE,share=on -machine …,memory-backend=mem0";
/// QEMU's option for a hot-plug slot.
pub const ROOT_PORT: &str =
    "start QEMU with -device pcie-root-port,id=rp0,chassis=1,slot=1 for each device, or unplug something";
/// An agent that cannot be used.
pub const AGENT_VERSION: &str = "copy this vtrace into the guest and restart its agent";
/// A guest without an agent.
pub const NO_AGENT: &str = "run vtrace agent in the guest";
/// A guest that does not answer.
pub const SILENT_GUEST: &str = "check that the guest runs and is not paused (QEMU: cont) or suspended (system_wakeup)";
/// A CPU without a port of our device.
pub const NO_PORT: &str = "give the device num_vqs = 2 × (CPUs + 2); more than 126 CPUs need several devices";
/// A QEMU that does not support our device.
pub const OLD_QEMU: &str = "use QEMU 10.2 or newer, or vtrace setup --transport socket";

/// No usable link to the server.
pub fn of_link(error: &LinkError) -> &'static str {
    match error {
        LinkError::NoServer { .. } => {
            "vtrace server --dom GUEST, or systemctl start vtrace-server; --dir DIR if it uses another directory"
        }
        LinkError::Denied { .. } => "run as root, or join group vtrace",
        LinkError::Stalled { .. } => "check whether its process is stopped (kill -CONT), or restart it",
        LinkError::Version { .. } => "use the same version of vtrace for server and clients",
        LinkError::Full { .. } => "try again when another client has ended",
        _ => "see the server's log",
    }
}

/// No usable QMP socket.
pub fn of_qmp(error: &QmpError) -> &'static str {
    match error {
        QmpError::NoSocket { .. } => "start QEMU with -qmp unix:SOCKET,server=on,wait=off",
        QmpError::Silent { .. } => {
            "a QMP socket serves one client: give QEMU another -qmp socket (libvirt uses its own)"
        }
        QmpError::Foreign(_) => "name a socket of -qmp, not of -monitor",
        _ => "see QEMU's log",
    }
}

/// A driver that is not running.
pub fn of_driver(state: &DriverState) -> &'static str {
    match state {
        DriverState::Absent => "wait until the guest has booted; its kernel needs virtio_console",
        DriverState::Running => "try again",
        DriverState::Unfit(_) => "do not disable indirect_desc on the device",
        DriverState::MemoryNotShared => SHARED_MEMORY,
    }
}

/// A requirement of hot-plug that `guest` does not meet.
pub fn of_obstacle(obstacle: &Obstacle, guest: &str) -> String {
    match obstacle {
        Obstacle::Version(_) | Obstacle::NoDevice => OLD_QEMU.into(),
        Obstacle::MemoryNotShared(_) => SHARED_MEMORY.into(),
        Obstacle::NoSlot { .. } => ROOT_PORT.into(),
        Obstacle::Attached(_) => format!("vtrace detach {guest} first"),
        Obstacle::NotHotpluggable(_) => {
            format!("shut the guest down, and restart QEMU with the options that vtrace setup --dom {guest} prints")
        }
        Obstacle::FewDevices { needed, .. } => format!("vtrace server --dom {guest} --devices {needed}"),
        Obstacle::State(_) => "wait until the guest runs or is paused".into(),
    }
}
