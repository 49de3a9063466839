//! `vtrace attach` and `vtrace detach`: a guest's device into a running QEMU, and out of it.

use std::{
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use vtrace_common::{
    limits::DEVICES_MAX,
    wire::client::{DriverState, GuestState},
};

use super::{
    complaint::Complaint,
    control_args::{AttachArgs, DetachArgs},
    list::guests,
    put, say,
};
use crate::{
    doctor::vmm::remedy_of,
    recorder::guests::refusal::holder,
    server::{
        check_name,
        link::{Link, LinkError},
    },
    vmm::{
        attach::{self, HotplugError, Wanted},
        capacity::Obstacle,
        qmp::Qmp,
    },
};

/// A guest that runs has its driver up within this time, or something is wrong with it.
const DRIVER_MAX: Duration = Duration::from_secs(10);
/// An agent that waits for its ports takes no longer.
const AGENT_MAX: Duration = Duration::from_secs(3);
/// A recording that has ended is let go of within this time.
const LET_GO_MAX: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Plugs the device in and waits until guest and server see each other.
pub(super) fn attach(args: &AttachArgs) -> Result<u8, Complaint> {
    let cannot = format!("cannot attach {}", args.guest);
    check_name(&args.guest).map_err(|fault| Complaint::usage(&cannot, fault, "vtrace list"))?;
    let mut link = Link::connect(&args.dir)?;
    let state = state(&mut link, &args.guest, &cannot)?;
    if let Some(pid) = state.vmm_pid {
        let why = format!("the virtual machine of pid {pid} is connected to {}", state.socket);
        return Err(Complaint::new(cannot, why, format!("vtrace detach {} first", args.guest)));
    }
    let wanted = Wanted {
        sockets: sockets(&absolute(Path::new(&state.socket)), state.further.len() + 1),
        lanes: usize::try_from(state.lanes_per_device).unwrap_or(1),
        cpus: args.cpus,
        buses: args.bus.clone(),
    };
    let attached = Qmp::connect(&args.qmp)
        .map_err(HotplugError::from)
        .and_then(|mut qmp| attach::attach(&mut qmp, &wanted))
        .map_err(|error| complaint(&cannot, &args.guest, &error))?;
    let places: Vec<String> = attached.devices.iter().map(|(name, bus)| format!("{name} at {bus}")).collect();
    put(&format!(
        "{}: attached to QEMU {}: {} CPUs, {}",
        args.guest,
        attached.version,
        attached.cpus,
        places.join(", ")
    ))?;
    if attached.running { see(&mut link, &args.guest) } else { later(&args.guest, "the guest is paused") }
}

/// Waits until the driver runs and, less long, for the agent.
fn see(link: &mut Link, guest: &str) -> Result<u8, Complaint> {
    let begun = Instant::now();
    loop {
        let state = state(link, guest, "cannot see the guest")?;
        let waited = begun.elapsed();
        match &state.driver {
            DriverState::Running if state.agent.as_ref().is_some_and(|agent| agent.machine.is_some()) => {
                put(&format!("{guest}: driver running, agent ready"))?;
                return Ok(0);
            }
            DriverState::Running if waited > AGENT_MAX => {
                say(&format!("{guest}: driver running, no agent yet: run vtrace agent in the guest"));
                return Ok(0);
            }
            DriverState::Unfit(_) | DriverState::MemoryNotShared => {
                return Err(super::complaint::driver(guest, &state.driver));
            }
            DriverState::Absent if waited > DRIVER_MAX => {
                return later(guest, "it boots, or its kernel has no virtio_console");
            }
            DriverState::Running | DriverState::Absent => sleep(LOOK_EVERY),
        }
    }
}

fn later(guest: &str, why: &str) -> Result<u8, Complaint> {
    say(&format!("{guest}: no driver runs in the guest yet: {why}"));
    Ok(0)
}

/// Takes the device out, whether or not its server still runs.
pub(super) fn detach(args: &DetachArgs) -> Result<u8, Complaint> {
    let cannot = format!("cannot detach {}", args.guest);
    check_name(&args.guest).map_err(|fault| Complaint::usage(&cannot, fault, "vtrace list"))?;
    let socket = match Link::connect(&args.dir) {
        Ok(mut link) => {
            let state = at_rest(&mut link, &args.guest, &cannot)?;
            if let Some(who) = holder(&state).filter(|_| !args.force) {
                return Err(Complaint::new(cannot, who, "wait for it, stop it, or --force"));
            }
            PathBuf::from(state.socket)
        }
        Err(LinkError::NoServer { .. } | LinkError::Silent { .. }) => args.dir.join(format!("{}.sock", args.guest)),
        Err(error) => return Err(error.into()),
    };
    let sockets = sockets(&absolute(&socket), DEVICES_MAX);
    let detached = Qmp::connect(&args.qmp).map_err(HotplugError::from);
    let detached = detached.and_then(|mut qmp| attach::detach(&mut qmp, &sockets));
    let count = detached.map_err(|error| complaint(&cannot, &args.guest, &error))?;
    put(&format!("{}: detached ({count} device{})", args.guest, if count == 1 { "" } else { "s" }))?;
    Ok(0)
}

/// The guest's state, once nobody records it or that has to be said: a recording that has just ended is let go soon.
fn at_rest(link: &mut Link, guest: &str, cannot: &str) -> Result<GuestState, Complaint> {
    let begun = Instant::now();
    loop {
        let state = state(link, guest, cannot)?;
        if state.holder_pid.is_none() || begun.elapsed() > LET_GO_MAX {
            return Ok(state);
        }
        sleep(LOOK_EVERY);
    }
}

fn state(link: &mut Link, guest: &str, cannot: &str) -> Result<GuestState, Complaint> {
    let guests = guests(link)?;
    let known: Vec<String> = guests.iter().map(|guest| guest.name.clone()).collect();
    guests.into_iter().find(|state| state.name == guest).ok_or_else(|| super::complaint::unknown(cannot, &known))
}

/// A guest's sockets, of the first device and of those behind it: as the server names them.
pub(super) fn sockets(first: &Path, count: usize) -> Vec<PathBuf> {
    let stem = first.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let further = (2..=count).map(|number| first.with_file_name(format!("{stem}@{number}.sock")));
    std::iter::once(first.to_path_buf()).chain(further).collect()
}

/// As QEMU has to see it, whose folder is another. A folder that is gone has no better name than its own.
pub(super) fn absolute(socket: &Path) -> PathBuf {
    let parent = socket.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match (parent.canonicalize(), socket.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        _ => socket.to_path_buf(),
    }
}

fn complaint(cannot: &str, guest: &str, error: &HotplugError) -> Complaint {
    let remedy = match error {
        // QEMU's words (hw/core/qdev-hotplug.c).
        HotplugError::Qmp(error) if error.to_string().contains("does not support hotplugging") => {
            "it sits on pcie.0 and goes with its QEMU only: shut the guest down; behind a pcie-root-port it can be taken out".into()
        }
        HotplugError::Qmp(error) => remedy_of(error).to_owned(),
        HotplugError::Obstacle(obstacle) => of_obstacle(obstacle, guest),
        HotplugError::NotAttached(_) => "vtrace list; --dir DIR, if the server's sockets are elsewhere".into(),
        HotplugError::Held { .. } => "once more; a guest whose CPU spins in virtio_console needs a reset".into(),
        HotplugError::Paused => "let it go on (QMP: cont), then once more".into(),
    };
    Complaint::new(cannot, error, remedy)
}

fn of_obstacle(obstacle: &Obstacle, guest: &str) -> String {
    match obstacle {
        Obstacle::Version(_) | Obstacle::NoDevice => {
            "QEMU 10.2 or newer, or give the guest stock virtio-serial ports".into()
        }
        Obstacle::MemoryNotShared(_) => {
            "start it with -object memory-backend-memfd,id=mem0,size=SIZE,share=on -machine …,memory-backend=mem0"
                .into()
        }
        Obstacle::NoSlot { .. } => {
            "start it with -device pcie-root-port,id=rp0,chassis=1,slot=1 (one for each device), or unplug something"
                .into()
        }
        Obstacle::Attached(_) => format!("vtrace detach {guest} first: its server may be gone"),
        Obstacle::FewDevices { needed, .. } => format!("vtrace server --dom {guest} --devices {needed}"),
        Obstacle::State(_) => "wait until it runs or is paused".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_named_as_the_server_names_them() {
        let named = sockets(Path::new("/run/vtrace/guest.1.sock"), 3);
        let expected = ["/run/vtrace/guest.1.sock", "/run/vtrace/guest.1@2.sock", "/run/vtrace/guest.1@3.sock"];
        assert_eq!(named, expected.map(PathBuf::from));
    }

    #[test]
    fn every_obstacle_says_what_to_do() {
        let complaint = |error| complaint("cannot attach guest1", "guest1", &error).to_string();
        let text = complaint(Obstacle::NoSlot { needed: 1, free: 0 }.into());
        assert_eq!(
            text,
            "vtrace: cannot attach guest1: 1 free PCI slots for hot-plug are needed, 0 are there\n  try: start it with \
             -device pcie-root-port,id=rp0,chassis=1,slot=1 (one for each device), or unplug something"
        );
        let version = crate::vmm::qmp::Version { major: 7, minor: 2, micro: 22 };
        assert!(complaint(Obstacle::Version(version).into()).contains("QEMU 7.2.22 does not let"));
        assert!(complaint(Obstacle::MemoryNotShared("pc.ram".into()).into()).contains("share=on"));
        assert!(complaint(Obstacle::Attached("vtrace0".into()).into()).contains("try: vtrace detach guest1"));
        assert!(complaint(HotplugError::Paused).contains("cont"));
    }
}
