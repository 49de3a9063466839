//! `vtrace agent`

use super::{args::AgentArgs, complaint::Complaint};
use crate::agent::{self, AgentConfig, policy::Exec};

/// Serves hosts until it is told to end.
pub(super) fn run(args: AgentArgs) -> Result<u8, Complaint> {
    let exec = match (args.no_exec, args.allow_exec) {
        (true, _) => Some(Exec::Never),
        (_, true) => Some(Exec::Any),
        _ => None,
    };
    agent::run(AgentConfig { tee: args.tee, policy: args.policy, exec, ..AgentConfig::default() })?;
    Ok(0)
}
