//! `vtrace agent`

use super::{args::AgentArgs, complaint::Complaint};
use crate::agent::{self, AgentConfig, policy::Exec};

/// Serves hosts until SIGTERM or SIGINT.
pub(super) fn run(args: AgentArgs) -> Result<u8, Complaint> {
    let exec = match (args.no_exec, args.allow_exec) {
        (true, _) => Some(Exec::Never),
        (_, true) => Some(Exec::Any),
        _ => None,
    };
    let AgentArgs { tee, policy, agent_cpus: cpus, .. } = args;
    agent::run(AgentConfig { tee, policy, exec, cpus, ..AgentConfig::default() })?;
    Ok(0)
}
