//! What the guest's owner allows a host to do.
//!
//! In:    `/etc/vtrace/agent.toml` and the agent's own flags; an [`Arm`]
//! Out:   the [`Arm`] that may be done, or a [`Failure`] (`NotAllowed`, `Memory`) that names the rule
//! Runs:  when the agent starts (the file), at each `Arm`
//! Trust: the file; nothing of the request. What a request may make the agent write to tracefs is in [`writes`]
//!
//! ```toml
//! exec = ["perf", "/usr/local/bin/load"]  # programs a host may run, or "any"; without it: none
//! user = "nobody"                         # whom they run as; without it: the agent's own
//! kallsyms = false                        # addresses stay numbers; without it: true
//! buffer_mib_max = 256                    # ring buffers of all CPUs, snapshot and hist triggers together; without it:
//!                                         # a quarter of the memory
//! events_denied = ["syscalls", "kvm:*"]   # never switched on; `all` means all others
//! tracers_allowed = ["nop", "function"]   # without it: all that the kernel has
//! ```

mod writes;

use std::{fs, io, path::PathBuf};

use serde::Deserialize;
use vtrace_common::wire::agent::{Arm, CommandRequest, Failure, FailureKind};

use crate::{
    sys::{
        account::{self, Account},
        program,
    },
    tracefs::Tracefs,
};
use writes::{Demand, Restrictions};

/// The file that is read when no other is named.
const FILE: &str = "/etc/vtrace/agent.toml";
/// A CPU's ring buffer where the request leaves its size to the kernel (`TRACE_BUF_SIZE_DEFAULT`), and the smallest.
const BUFFER_KB_DEFAULT: u64 = 1408;
const BUFFER_KB_MIN: u64 = 8;

/// Why a policy cannot be used; then the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum PolicyFault {
    /// The file cannot be read, or was named and does not exist.
    #[error("{path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is not TOML, or has a key or value that is not known.
    #[error("{path}: {detail}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line and reason.
        detail: String,
    },
    /// `user` does not exist on this machine.
    #[error("{path}: no user {user:?}")]
    User {
        /// The file.
        path: PathBuf,
        /// The name in it.
        user: String,
    },
}

/// Which programs a host may run.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Exec {
    /// None.
    #[default]
    Never,
    /// Any.
    Any,
    /// These: by name (found in PATH) or by path.
    Only(Vec<String>),
}

/// The rules.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Policy {
    pub(super) exec: Exec,
    pub(super) user: Option<Account>,
    kallsyms: bool,
    buffer_kb_max: u64,
    events_denied: Vec<String>,
    tracers_allowed: Option<Vec<String>>,
}

/// The file as it is written.
#[derive(Deserialize, Default, Debug)]
#[serde(deny_unknown_fields, default)]
struct PolicyFile {
    exec: Option<ExecEntry>,
    user: Option<String>,
    kallsyms: Option<bool>,
    buffer_mib_max: Option<u64>,
    events_denied: Vec<String>,
    tracers_allowed: Option<Vec<String>>,
}

#[derive(Deserialize, Debug)]
#[serde(untagged)]
enum ExecEntry {
    Word(String),
    Only(Vec<String>),
}

impl Policy {
    /// The rules of the file under the agent's flags: `exec` of a flag replaces the file's. A file that was named has to
    /// be there; [`FILE`], which is read otherwise, need not.
    pub(super) fn load(named: Option<PathBuf>, exec: Option<Exec>) -> Result<Self, PolicyFault> {
        let may_be_absent = named.is_none();
        let path = named.unwrap_or_else(|| FILE.into());
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if may_be_absent && error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(PolicyFault::Read { path, source }),
        };
        let mut policy = Self::parse(&text, path)?;
        policy.exec = exec.unwrap_or(policy.exec);
        Ok(policy)
    }

    pub(super) fn parse(text: &str, path: PathBuf) -> Result<Self, PolicyFault> {
        let written: PolicyFile = match toml::from_str(text) {
            Ok(written) => written,
            Err(error) => return Err(PolicyFault::Parse { path, detail: error.to_string() }),
        };
        let exec = match written.exec {
            None => Exec::Never,
            Some(ExecEntry::Only(programs)) => Exec::Only(programs),
            Some(ExecEntry::Word(word)) if word == "any" => Exec::Any,
            Some(ExecEntry::Word(word)) => {
                let detail = format!("exec = {word:?}: \"any\" or a list of programs");
                return Err(PolicyFault::Parse { path, detail });
            }
        };
        let user = match written.user {
            None => None,
            Some(user) => Some(account::user(&user).ok_or(PolicyFault::User { path, user })?),
        };
        Ok(Self {
            exec,
            user,
            kallsyms: written.kallsyms.unwrap_or(true),
            buffer_kb_max: written.buffer_mib_max.map_or_else(memory_quarter_kb, |mib| mib.saturating_mul(1024)),
            events_denied: written.events_denied,
            tracers_allowed: written.tracers_allowed,
        })
    }

    /// What may be done of a request, on a machine with `cpus` CPUs.
    pub(super) fn check(&self, mut arm: Arm, tracefs: &Tracefs, cpus: usize) -> Result<Arm, Failure> {
        arm.kallsyms &= self.kallsyms;
        for command in &arm.commands {
            self.check_command(command)?;
        }
        let tracer = arm.tracer.name.as_str();
        if let Some(allowed) = &self.tracers_allowed
            && !tracer.is_empty()
            && !allowed.iter().any(|name| name == tracer)
        {
            return Err(not_allowed(tracer, &format!("tracers allowed are: {}", allowed.join(", "))));
        }
        let restrictions =
            Restrictions { denies_events: !self.events_denied.is_empty(), tracers: self.tracers_allowed.as_deref() };
        let demand = writes::check(&arm, restrictions, &mut |event| tracefs.count_events(event))?;
        arm.buffer_kb = self.buffer_kb(arm.buffer_kb, cpus, demand)?;
        if self.events_denied.is_empty() { Ok(arm) } else { tracefs.without_denied(arm, &self.events_denied) }
    }

    /// The size of each CPU's ring buffer, in KiB: `asked_kb`, or for 0 the kernel's own or what fits.
    fn buffer_kb(&self, asked_kb: u32, cpus: usize, demand: Demand) -> Result<u32, Failure> {
        let cpus = u64::try_from(cpus).unwrap_or(u64::MAX).max(1);
        let buffers = if demand.has_snapshot { cpus.saturating_mul(2) } else { cpus };
        let left_kb = self.buffer_kb_max.saturating_sub(demand.hist_kb);
        if asked_kb == 0 && left_kb >= buffers.saturating_mul(BUFFER_KB_MIN) {
            let fitting_kb = left_kb / buffers;
            let is_small = fitting_kb < BUFFER_KB_DEFAULT;
            return Ok(if is_small { u32::try_from(fitting_kb).unwrap_or(u32::MAX) } else { 0 });
        }
        if asked_kb > 0 && u64::from(asked_kb).saturating_mul(buffers) <= left_kb {
            return Ok(asked_kb);
        }
        let twice = if demand.has_snapshot { ", twice for the snapshot" } else { "" };
        let tables = match demand.hist_kb {
            0 => String::new(),
            kb => format!(" and {kb} KiB for hist triggers"),
        };
        let allowed_kb = self.buffer_kb_max;
        let detail = format!("{asked_kb} KiB a CPU for {cpus} CPUs{twice}{tables}: {allowed_kb} KiB are allowed");
        Err(Failure::new(FailureKind::Memory, "buffer", &detail))
    }

    fn check_command(&self, command: &CommandRequest) -> Result<(), Failure> {
        let word = command.words.first().map(String::as_str).unwrap_or_default();
        match &self.exec {
            Exec::Never => return Err(not_allowed(word, "this agent runs no commands")),
            Exec::Any => {}
            Exec::Only(programs) => {
                let wanted = place(word);
                let is_it = |allowed: &String| wanted.is_some() && wanted == place(allowed);
                if !programs.iter().any(is_it) {
                    return Err(not_allowed(word, &format!("programs allowed are: {}", programs.join(", "))));
                }
            }
        }
        match program::find(word.as_ref()) {
            Some(_) => Ok(()),
            None => Err(Failure::new(FailureKind::NoSuchProgram, word, "no such program")),
        }
    }
}

/// The path of a program, with the links of its directory resolved (/bin may be /usr/bin) and its own not (every program of
/// busybox is a link to one file).
fn place(program: &str) -> Option<PathBuf> {
    let path = program::find(program.as_ref())?;
    Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?))
}

/// A quarter of this machine's memory.
fn memory_quarter_kb() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kb = total.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kb.map_or(u64::MAX, |kb| kb / 4)
}

fn not_allowed(object: &str, detail: &str) -> Failure {
    Failure::new(FailureKind::NotAllowed, object, detail)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vtrace_common::wire::agent::Tracer;

    use super::*;

    fn policy(text: &str) -> Result<Policy, String> {
        Policy::parse(text, "agent.toml".into()).map_err(|fault| fault.to_string())
    }

    fn command(line: &str) -> CommandRequest {
        CommandRequest { words: line.split(' ').map(Into::into).collect() }
    }

    #[test]
    fn without_a_file_nothing_is_run() {
        let policy = policy("").unwrap();
        let failure = policy.check_command(&command("true")).unwrap_err();
        assert_eq!((failure.kind, failure.object.as_str()), (FailureKind::NotAllowed, "true"));
    }

    #[test]
    fn only_programs_of_the_list_are_run_whatever_their_arguments() {
        let policy = policy("exec = [\"true\", \"/bin/sh\"]").unwrap();
        assert_eq!(policy.check_command(&command("true -x")), Ok(()));
        assert_eq!(policy.check_command(&command("sh -c true")), Ok(()));
        assert_eq!(policy.check_command(&command("/tmp/true")).unwrap_err().kind, FailureKind::NotAllowed);
        assert_eq!(policy.check_command(&command("false")).unwrap_err().kind, FailureKind::NotAllowed);
    }

    #[test]
    fn flag_beats_the_file() {
        let any = Policy { exec: Exec::Any, ..policy("").unwrap() };
        assert_eq!(any.check_command(&command("true")), Ok(()));
        assert_eq!(any.check_command(&command("no-such-program-here")).unwrap_err().kind, FailureKind::NoSuchProgram);
    }

    #[test]
    fn file_with_a_mistake_is_refused_with_its_line() {
        assert!(policy("exec = 7").is_err());
        assert!(policy("exec = \"all\"").unwrap_err().contains("\"any\" or a list"));
        assert!(policy("\nevents_denid = []").unwrap_err().contains("line 2"));
        assert!(policy("user = \"no-such-user\"").unwrap_err().contains("no user"));
    }

    #[test]
    fn file_that_is_named_and_does_not_exist_is_refused() {
        let fault = Policy::load(Some("/nonexistent/agent.toml".into()), None).unwrap_err();
        assert!(matches!(fault, PolicyFault::Read { .. }) && fault.to_string() == "/nonexistent/agent.toml");
    }

    #[test]
    fn memory_of_triggers_keeps_to_the_bound_of_the_ring_buffers() {
        let policy = policy("buffer_mib_max = 16").unwrap();
        let table = |hist_kb| Demand { hist_kb, has_snapshot: false };
        let snapshot = Demand { hist_kb: 0, has_snapshot: true };
        assert_eq!(policy.buffer_kb(8192, 2, Demand::default()), Ok(8192));
        assert_eq!(policy.buffer_kb(4096, 2, snapshot), Ok(4096));
        assert_eq!(policy.buffer_kb(0, 2, table(2048)), Ok(0));
        for (asked_kb, demand) in [(8192, table(1)), (8192, snapshot), (0, table(131_072)), (0, table(u64::MAX))] {
            assert_eq!(policy.buffer_kb(asked_kb, 2, demand).unwrap_err().kind, FailureKind::Memory, "{demand:?}");
        }
        assert_eq!(policy.buffer_kb(0, 2, table(15 << 10)), Ok(512), "the kernel's own size would not fit");
    }

    #[test]
    fn memory_tracer_and_triggers_keep_to_the_rules() {
        let Ok(tracefs) = Tracefs::find_or_mount() else { return println!("skipped: no tracefs here") };
        let policy = policy("buffer_mib_max = 1\ntracers_allowed = [\"nop\"]\nevents_denied = [\"kvm\"]").unwrap();
        let kind = |arm: Arm| policy.check(arm, &tracefs, 4).unwrap_err().kind;
        assert_eq!(kind(Arm { buffer_kb: 257, ..Arm::default() }), FailureKind::Memory);
        assert_eq!(kind(Arm { buffer_kb: u32::MAX, ..Arm::default() }), FailureKind::Memory);
        let tracer = Tracer { name: "function".into(), ..Tracer::default() };
        assert_eq!(kind(Arm { tracer, ..Arm::default() }), FailureKind::NotAllowed);
        let mut event = vtrace_common::wire::agent::EventRequest::from("sched");
        event.triggers.push("enable_event:kvm:kvm_exit".into());
        assert_eq!(kind(Arm { events: vec![event], ..Arm::default() }), FailureKind::NotAllowed);
        assert!(policy.check(Arm { buffer_kb: 256, ..Arm::default() }, &tracefs, 4).is_ok());
    }

    proptest! {
        #[test]
        fn any_file_gives_rules_or_a_fault(text: String) {
            let _ = policy(&text);
        }
    }
}
