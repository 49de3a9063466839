//! `vtrace agent`

use super::{args::AgentArgs, complaint::Complaint};
use crate::agent::{self, AgentConfig};

/// Serves hosts until it is told to end.
pub(super) fn run(args: AgentArgs) -> Result<u8, Complaint> {
    agent::run(AgentConfig { tee: args.tee, ..AgentConfig::default() })?;
    Ok(0)
}
