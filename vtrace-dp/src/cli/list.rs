//! `vtrace list`

use std::time::Duration;

use vtrace_common::wire::client::{DeviceState, DriverState, FromServer, GuestState, ToServer};

use super::{args::ListArgs, complaint::Complaint, put};
use crate::server::link::Link;

/// An answer of the server's own takes no longer than this.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Prints a line for each guest.
pub(super) fn run(args: &ListArgs) -> Result<u8, Complaint> {
    let mut link = Link::connect(&args.dir)?;
    link.send(&ToServer::List)?;
    let Some(FromServer::Guests(guests)) = link.receive(Some(ANSWER_MAX))? else {
        return Err(Complaint::new("cannot list guests", "the server did not answer", "look at the server's log"));
    };
    if args.json {
        put(&serde_json::to_string_pretty(&guests).expect("a state is plain data"))?;
    } else {
        put(&guests.iter().flat_map(lines).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(0)
}

/// The guest's line, and one for each of its devices behind the first.
fn lines(guest: &GuestState) -> Vec<String> {
    let device = |(number, DeviceState { vmm_pid, driver }): (usize, &DeviceState)| {
        format!("{}@{number}: {}", guest.name, device(*vmm_pid, driver))
    };
    std::iter::once(line(guest)).chain((2..).zip(&guest.further).map(device)).collect()
}

fn device(vmm_pid: Option<u32>, driver: &DriverState) -> String {
    let vmm = vmm_pid.map_or("no virtual machine".into(), |pid| format!("pid {pid}"));
    let driver = match driver {
        DriverState::Absent => "no driver".into(),
        DriverState::Running => "driver running".into(),
        DriverState::Unfit(feature) => format!("driver without {feature}"),
        DriverState::MemoryNotShared => "memory not shared (share=on)".into(),
    };
    format!("{vmm}, {driver}")
}

fn line(guest: &GuestState) -> String {
    let device = device(guest.vmm_pid, &guest.driver);
    let agent = match &guest.agent {
        None => "no agent".into(),
        Some(agent) => match &agent.machine {
            None => format!("agent of another version ({})", agent.hello.software),
            Some(machine) => format!("agent ready, {} CPUs, {}", machine.cpus.len(), machine.uname),
        },
    };
    let held = guest.holder_pid.map_or(String::new(), |pid| format!(", recorded by pid {pid}"));
    format!("{}: {device}, {agent}{held} ({})", guest.name, guest.socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_of_a_guest_has_a_line() {
        let guest = GuestState {
            name: "guest1".into(),
            socket: "/run/vtrace/guest1.sock".into(),
            vmm_pid: Some(77),
            driver: DriverState::Running,
            agent: None,
            holder_pid: None,
            further: vec![DeviceState { vmm_pid: None, driver: DriverState::Absent }],
            lanes_per_device: 126,
        };
        let expected = [
            "guest1: pid 77, driver running, no agent (/run/vtrace/guest1.sock)",
            "guest1@2: no virtual machine, no driver",
        ];
        assert_eq!(lines(&guest), expected);
    }
}
