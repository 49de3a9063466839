//! `vtrace detach`: unplugs a guest's device from its QEMU.

use std::{
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use vtrace_common::{limits::DEVICES_MAX, wire::client::GuestState};

use super::{
    attach::{QUERY_EVERY, absolute, complaint, sockets, state},
    complaint::Complaint,
    control_args::DetachArgs,
    output::put,
};
use crate::{
    recorder::guests::refusal::holder,
    server::{
        check_name,
        link::{Link, LinkError},
    },
    vmm::{
        attach::{self as hotplug, HotplugError},
        qmp::Qmp,
    },
};

/// Timeout for the release of a guest whose recording has ended.
const RELEASE_MAX: Duration = Duration::from_secs(1);

/// Unplugs the device, whether or not its server runs.
pub(super) fn run(args: &DetachArgs) -> Result<u8, Complaint> {
    let cannot = format!("cannot detach {}", args.guest);
    check_name(&args.guest).map_err(|fault| Complaint::usage(&cannot, fault, "vtrace list"))?;
    let socket = match Link::connect(&args.dir) {
        Ok(mut link) => {
            let state = released(&mut link, &args.guest, &cannot)?;
            if let Some(who) = holder(&state).filter(|_| !args.force) {
                return Err(Complaint::new(cannot, who, "wait for it, stop it, or --force"));
            }
            PathBuf::from(state.socket)
        }
        Err(LinkError::NoServer { .. } | LinkError::Silent { .. }) => args.dir.join(format!("{}.sock", args.guest)),
        Err(error) => return Err(error.into()),
    };
    let sockets = sockets(&absolute(&socket), DEVICES_MAX);
    let count = Qmp::connect(&args.qmp)
        .map_err(HotplugError::from)
        .and_then(|mut qmp| hotplug::detach(&mut qmp, &sockets))
        .map_err(|error| complaint(&cannot, &args.guest, &error))?;
    put(&format!("{}: detached ({count} device{})", args.guest, if count == 1 { "" } else { "s" }))?;
    Ok(0)
}

/// The guest's state; waits shortly for the release of a recording that has just ended.
fn released(link: &mut Link, guest: &str, cannot: &str) -> Result<GuestState, Complaint> {
    let begun = Instant::now();
    loop {
        let state = state(link, guest, cannot)?;
        if state.holder_pid.is_none() || begun.elapsed() > RELEASE_MAX {
            return Ok(state);
        }
        sleep(QUERY_EVERY);
    }
}
