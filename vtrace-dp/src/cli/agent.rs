//! `vtrace agent`

use std::fs::OpenOptions;

use super::{args::AgentArgs, complaint::Complaint, input};
use crate::agent::{self, AgentConfig, policy::Exec};

/// Serves hosts until SIGTERM or SIGINT.
pub(super) fn run(args: AgentArgs) -> Result<u8, Complaint> {
    let exec = match (args.no_exec, args.allow_exec) {
        (true, _) => Some(Exec::Never),
        (_, true) => Some(Exec::Any),
        _ => None,
    };
    let AgentArgs { tee, policy, agent_cpus: cpus, .. } = args;
    if let Some(path) = &policy {
        input::open(path, OpenOptions::new().read(true))
            .map_err(|error| Complaint::new(format!("cannot read {}", path.display()), error, ""))?;
    }
    agent::run(AgentConfig { tee, policy, exec, cpus, ..AgentConfig::default() })?;
    Ok(0)
}
