//! `vtrace list`

use std::time::Duration;

use serde::Serialize;
use vtrace_common::wire::client::{DeviceState, DriverState, FromServer, GuestState, ToServer};

use super::{
    complaint::Complaint,
    control_args::ListArgs,
    list_machine::{self, Offers},
    output::{put, put_json},
};
use crate::{
    recorder::guests::{refusal::holder, silence::SilenceSuffix},
    server::link::Link,
    vmm::vcpu_threads::{VcpuThread, running_vcpus},
};

/// Timeout of an answer of the server's.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Prints a line for each guest, or the events of machines.
pub(super) fn run(args: &ListArgs) -> Result<u8, Complaint> {
    // Without --dom, -e lists the host's events.
    let host = args.host || (args.events.is_some() && args.dom.is_empty());
    if host || !args.dom.is_empty() {
        return list_offers(args, host);
    }
    let guests: Vec<ListedGuest> = guests(&mut Link::connect(&args.dir)?)?.into_iter().map(ListedGuest::of).collect();
    if args.json {
        put_json(&guests)?;
    } else {
        put(&guests.iter().flat_map(ListedGuest::lines).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(0)
}

/// All guests of the server.
pub(super) fn guests(link: &mut Link) -> Result<Vec<GuestState>, Complaint> {
    link.send(&ToServer::List)?;
    match link.receive(Some(ANSWER_MAX))? {
        Some(FromServer::Guests(guests)) => Ok(guests),
        _ => Err(Complaint::new("cannot list guests", "the server did not answer", "see the server's log")),
    }
}

/// A guest, and the host threads of its vCPUs where /proc shows them.
#[derive(Serialize)]
struct ListedGuest {
    #[serde(flatten)]
    state: GuestState,
    vcpus: Vec<VcpuThread>,
}

impl ListedGuest {
    fn of(state: GuestState) -> Self {
        let vcpus = state.vmm_pid.filter(|pid| *pid != 0).map(running_vcpus).unwrap_or_default();
        Self { state, vcpus }
    }

    fn lines(&self) -> Vec<String> {
        let threads = self.vcpus.iter().map(|vcpu| format!("{} {vcpu}", self.state.name));
        lines(&self.state).into_iter().chain(threads).collect()
    }
}

/// A machine with its clocks, tracers and events.
#[derive(Serialize)]
struct MachineOffers {
    name: String,
    state: Option<GuestState>,
    offers: Offers,
}

fn list_offers(args: &ListArgs, host: bool) -> Result<u8, Complaint> {
    let mut machines = Vec::new();
    if host {
        machines.push(MachineOffers { name: "host".into(), state: None, offers: list_machine::of_host()? });
    }
    for name in &args.dom {
        let mut link = Link::connect(&args.dir)?;
        let state = guests(&mut link)?.into_iter().find(|guest| guest.name == *name);
        machines.push(MachineOffers { name: name.clone(), state, offers: list_machine::of_guest(&mut link, name)? });
    }
    if args.json {
        put_json(&machines)?;
    } else {
        let lines: Vec<String> = machines.iter().flat_map(|machine| text(machine, args)).collect();
        if let (true, Some(pattern)) = (lines.is_empty(), &args.events) {
            let why = format!("no event matches {pattern:?}");
            return Err(Complaint::new("cannot list events", why, "omit the pattern to list all systems"));
        }
        put(&lines.join("\n"))?;
    }
    Ok(0)
}

fn text(machine: &MachineOffers, args: &ListArgs) -> Vec<String> {
    if let Some(pattern) = &args.events {
        let events = machine.offers.events_with(pattern);
        let several = args.dom.len() + usize::from(args.host) > 1;
        return if several {
            events.into_iter().map(|event| format!("{}: {event}", machine.name)).collect()
        } else {
            events
        };
    }
    let head = machine.state.as_ref().map_or_else(|| vec![format!("{}:", machine.name)], lines);
    [head, machine.offers.overview()].concat()
}

/// The guest's line, and one for each further device.
fn lines(guest: &GuestState) -> Vec<String> {
    let mut lines = vec![line(guest)];
    for (number, DeviceState { vmm_pid, driver }) in (2..).zip(&guest.further) {
        lines.push(format!("{}@{number}: {}", guest.name, device(*vmm_pid, driver)));
    }
    lines
}

fn device(vmm_pid: Option<u32>, driver: &DriverState) -> String {
    let vmm = match vmm_pid {
        None => "no virtual machine".into(),
        Some(0) => "virtual machine of an unknown process".into(),
        Some(pid) => format!("pid {pid}"),
    };
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
    let held = holder(guest).map(|who| format!(", {who}")).unwrap_or_default();
    let silent = SilenceSuffix(guest.silent_s.into());
    format!("{}: {device}, {agent}{silent}{held} ({})", guest.name, guest.socket)
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
            holder_uid: None,
            further: vec![DeviceState { vmm_pid: None, driver: DriverState::Absent }],
            lanes_per_device: 126,
            silent_s: 4,
        };
        let expected = [
            "guest1: pid 77, driver running, no agent (/run/vtrace/guest1.sock)",
            "guest1@2: no virtual machine, no driver",
        ];
        assert_eq!(lines(&guest), expected);
        let held = GuestState { vmm_pid: Some(0), holder_pid: Some(0), holder_uid: Some(7), ..guest };
        let expected = "guest1: virtual machine of an unknown process, driver running, no agent, user 7 is \
                        recording it (/run/vtrace/guest1.sock)";
        assert_eq!(line(&held), expected);
        let silent = GuestState { silent_s: 35, ..held };
        assert!(line(&silent).contains("no agent, silent for 35 s, user 7"), "{}", line(&silent));
    }
}
