//! `vtrace list`

use std::time::Duration;

use vtrace_common::wire::client::{DriverState, FromServer, GuestState, ToServer};

use super::{args::ListArgs, complaint::Complaint, put};
use crate::server::link::Link;

/// An answer of the server's own takes no longer than this.
const ANSWER_MAX: Duration = Duration::from_secs(5);

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
        put(&guests.iter().map(line).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(0)
}

fn line(guest: &GuestState) -> String {
    let vmm = guest.vmm_pid.map_or("no virtual machine".into(), |pid| format!("pid {pid}"));
    let driver = match &guest.driver {
        DriverState::Absent => "no driver".into(),
        DriverState::Running => "driver running".into(),
        DriverState::Unfit(feature) => format!("driver without {feature}"),
        DriverState::MemoryNotShared => "memory not shared (share=on)".into(),
    };
    let agent = match &guest.agent {
        None => "no agent".into(),
        Some(agent) => match &agent.machine {
            None => format!("agent of another version ({})", agent.hello.software),
            Some(machine) => format!("agent ready, {} CPUs, {}", machine.cpus.len(), machine.uname),
        },
    };
    let held = guest.holder_pid.map_or(String::new(), |pid| format!(", recorded by pid {pid}"));
    format!("{}: {vmm}, {driver}, {agent}{held} ({})", guest.name, guest.socket)
}
