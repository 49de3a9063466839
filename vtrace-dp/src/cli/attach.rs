//! `vtrace attach`: plugs a guest's device into a running QEMU.

use std::{
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use vtrace_common::wire::client::{DriverState, GuestState};

use super::{
    complaint::Complaint,
    control_args::AttachArgs,
    list::guests,
    output::{put, say},
};
use crate::{
    doctor::remedy,
    server::{check_name, link::Link},
    vmm::{
        attach::{self, AttachRequest, HotplugError},
        qmp::Qmp,
    },
};

/// Timeout for the guest's driver.
const DRIVER_MAX: Duration = Duration::from_secs(10);
/// Timeout for an agent that waits for its ports.
const AGENT_MAX: Duration = Duration::from_secs(3);
/// Interval of queries to the server.
pub(super) const QUERY_EVERY: Duration = Duration::from_millis(50);

/// Plugs the device in and waits for the guest's driver and agent.
pub(super) fn run(args: &AttachArgs) -> Result<u8, Complaint> {
    let cannot = format!("cannot attach {}", args.guest);
    check_name(&args.guest).map_err(|fault| Complaint::usage(&cannot, fault, "vtrace list"))?;
    let mut link = Link::connect(&args.dir)?;
    let state = state(&mut link, &args.guest, &cannot)?;
    if let Some(pid) = state.vmm_pid {
        let why = format!("the virtual machine of pid {pid} is connected to {}", state.socket);
        return Err(Complaint::new(cannot, why, format!("vtrace detach {} first", args.guest)));
    }
    let request = AttachRequest {
        sockets: sockets(&absolute(Path::new(&state.socket)), state.further.len() + 1),
        lanes: usize::try_from(state.lanes_per_device).unwrap_or(1),
        cpus: args.cpus,
        buses: args.bus.clone(),
    };
    let attached = Qmp::connect(&args.qmp)
        .map_err(HotplugError::from)
        .and_then(|mut qmp| attach::attach(&mut qmp, &request))
        .map_err(|error| complaint(&cannot, &args.guest, &error))?;
    let devices: Vec<String> = attached.devices.iter().map(|(name, bus)| format!("{name} at {bus}")).collect();
    put(&format!(
        "{}: attached to QEMU {}: {} CPUs, {}",
        args.guest,
        attached.version,
        attached.cpus,
        devices.join(", ")
    ))?;
    if attached.replaced > 0 {
        say(&format!("{}: replaced the device of a server that had ended", args.guest));
    }
    if attached.running {
        await_agent(&mut link, &args.guest)
    } else {
        without_driver(&args.guest, "the guest is paused")
    }
}

/// Waits for the driver, then for the agent.
fn await_agent(link: &mut Link, guest: &str) -> Result<u8, Complaint> {
    let begun = Instant::now();
    loop {
        let state = state(link, guest, "cannot find the guest")?;
        let waited = begun.elapsed();
        match &state.driver {
            DriverState::Running if state.agent.as_ref().is_some_and(|agent| agent.machine.is_some()) => {
                put(&format!("{guest}: driver running, agent ready"))?;
                return Ok(0);
            }
            DriverState::Running if waited > AGENT_MAX => {
                say(&format!("{guest}: driver running, no agent: {}", remedy::NO_AGENT));
                return Ok(0);
            }
            DriverState::Unfit(_) | DriverState::MemoryNotShared => {
                return Err(super::complaint::driver(guest, &state.driver));
            }
            DriverState::Absent if waited > DRIVER_MAX => {
                return without_driver(guest, remedy::of_driver(&DriverState::Absent));
            }
            DriverState::Running | DriverState::Absent => sleep(QUERY_EVERY),
        }
    }
}

fn without_driver(guest: &str, why: &str) -> Result<u8, Complaint> {
    say(&format!("{guest}: no driver in the guest yet: {why}"));
    Ok(0)
}

/// The guest's state at the server.
pub(super) fn state(link: &mut Link, guest: &str, cannot: &str) -> Result<GuestState, Complaint> {
    let guests = guests(link)?;
    let known: Vec<String> = guests.iter().map(|guest| guest.name.clone()).collect();
    guests.into_iter().find(|state| state.name == guest).ok_or_else(|| super::complaint::unknown(cannot, &known))
}

/// The sockets of a guest's devices, as the server names them.
pub(super) fn sockets(first: &Path, count: usize) -> Vec<PathBuf> {
    let stem = first.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let further = (2..=count).map(|number| first.with_file_name(format!("{stem}@{number}.sock")));
    std::iter::once(first.to_path_buf()).chain(further).collect()
}

/// The absolute path, for QEMU, whose working directory may differ. A directory that does not exist keeps its name.
pub(super) fn absolute(socket: &Path) -> PathBuf {
    let parent = socket.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match (parent.canonicalize(), socket.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        _ => socket.to_path_buf(),
    }
}

/// A hot-plug or hot-unplug that failed.
pub(super) fn complaint(cannot: &str, guest: &str, error: &HotplugError) -> Complaint {
    let remedy = match error {
        // QEMU's message (hw/core/qdev-hotplug.c).
        HotplugError::Qmp(error) if error.to_string().contains("does not support hotplugging") => {
            "the device is on pcie.0: shut the guest down, and use a pcie-root-port (vtrace setup prints one)".into()
        }
        HotplugError::Qmp(error) => remedy::of_qmp(error).to_owned(),
        HotplugError::Obstacle(obstacle) => remedy::of_obstacle(obstacle, guest),
        HotplugError::NotAttached(_) => "vtrace list; --dir DIR if the server uses another directory".into(),
        HotplugError::Held { .. } => "try again; reset a guest whose CPU spins in virtio_console".into(),
        HotplugError::Paused => "resume it (QMP: cont), then try again".into(),
    };
    Complaint::new(cannot, error, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::capacity::Obstacle;

    #[test]
    fn sockets_are_named_as_the_server_names_them() {
        let named = sockets(Path::new("/run/vtrace/guest.1.sock"), 3);
        let expected = ["/run/vtrace/guest.1.sock", "/run/vtrace/guest.1@2.sock", "/run/vtrace/guest.1@3.sock"];
        assert_eq!(named, expected.map(PathBuf::from));
    }

    #[test]
    fn every_obstacle_has_advice() {
        let complaint = |error| complaint("cannot attach guest1", "guest1", &error).to_string();
        let text = complaint(Obstacle::NoSlot { needed: 1, free: 0 }.into());
        assert_eq!(
            text,
            "vtrace: cannot attach guest1: 1 free PCI hot-plug slots are needed, the guest has 0\n  try: start QEMU with \
             -device pcie-root-port,id=rp0,chassis=1,slot=1 for each device, or unplug something"
        );
        let version = crate::vmm::qemu::QemuVersion { major: 7, minor: 2, micro: 22 };
        assert!(complaint(Obstacle::Version(version).into()).contains("QEMU 7.2.22 does not support"));
        assert!(complaint(Obstacle::MemoryNotShared("pc.ram".into()).into()).contains("share=on"));
        assert!(complaint(Obstacle::Attached("vtrace0".into()).into()).contains("try: vtrace detach guest1"));
        assert!(complaint(HotplugError::Paused).contains("cont"));
    }
}
