//! A validated request to record: who, what, where to.
//!
//! In:    [`RecordArgs`] and the order in which its options were typed
//! Out:   [`Plan`], or the first thing that is wrong with it
//! Trust: nothing typed; guest names become file names

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::ArgMatches;
use vtrace_common::{
    limits::NAME_BYTES_MAX,
    wire::agent::{Arm, EventRequest},
};

use super::args::RecordArgs;
use crate::server::check_name;

/// The trace clock of every machine: the only one whose host and guest readings can be converted exactly.
pub const CLOCK: &str = "x86-tsc";

/// What to record.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// The host.
    pub host: MachinePlan,
    /// The guests, in the order typed.
    pub guests: Vec<GuestPlan>,
    /// Runs while we record; empty: until Ctrl-C.
    pub command: Vec<OsString>,
    /// Stop after this long.
    pub timeout: Option<Duration>,
    /// Exit with 3 on any loss.
    pub strict: bool,
    /// The closing table as JSON.
    pub json: bool,
    /// No status line and no table.
    pub quiet: bool,
    /// Where the server is.
    pub dir: PathBuf,
}

/// One machine's part.
#[derive(Clone, PartialEq, Debug)]
pub struct MachinePlan {
    /// What its ring buffers record.
    pub arm: Arm,
    /// Its file.
    pub output: PathBuf,
}

/// One guest's part.
#[derive(Clone, PartialEq, Debug)]
pub struct GuestPlan {
    /// Its name at the server.
    pub name: String,
    /// What and where to.
    pub machine: MachinePlan,
}

/// Why a request cannot be a plan.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanFault {
    /// Neither an event nor a guest.
    #[error("nothing to record: no event (-e) and no guest (--dom)")]
    Nothing,
    /// A guest without an event.
    #[error("no event (-e) after --dom {0}")]
    GuestWithoutEvents(String),
    /// The same guest twice.
    #[error("--dom {0} is given twice")]
    GuestTwice(String),
    /// A name that cannot be a guest's.
    #[error("{0:?} cannot be a guest's name: letters, digits, '.', '_' and '-' only, {max} at most, no leading '.'", max = NAME_BYTES_MAX)]
    GuestName(String),
    /// Two sizes for one machine.
    #[error("-b is given twice for {0}")]
    BufferTwice(String),
    /// Not a duration.
    #[error("--timeout {0}: not a number of seconds")]
    Timeout(String),
}

impl Plan {
    /// Validates what was typed. `matches` are those of the verb `record`: they know the order.
    pub fn new(args: &RecordArgs, matches: &ArgMatches, session: u64) -> Result<Self, PlanFault> {
        let doms: Vec<usize> = matches.indices_of("dom").into_iter().flatten().collect();
        let owner = |index: usize| doms.iter().filter(|dom| **dom < index).count();
        let mut arms = vec![Arm::default(); args.dom.len() + 1];
        for arm in &mut arms {
            arm.session = session;
            arm.clock = CLOCK.into();
            arm.kallsyms = !args.no_kallsyms;
        }
        for (pattern, index) in args.event.iter().zip(matches.indices_of("event").into_iter().flatten()) {
            arms[owner(index)].events.push(EventRequest { pattern: pattern.clone() });
        }
        for (buffer_kb, index) in args.buffer_kb.iter().zip(matches.indices_of("buffer_kb").into_iter().flatten()) {
            let place = owner(index);
            if std::mem::replace(&mut arms[place].buffer_kb, *buffer_kb) != 0 {
                let name = place.checked_sub(1).map_or("the host", |guest| &args.dom[guest]);
                return Err(PlanFault::BufferTwice(name.into()));
            }
        }
        let host_arm = arms.remove(0);
        if host_arm.events.is_empty() && arms.is_empty() {
            return Err(PlanFault::Nothing);
        }
        let guests = args.dom.iter().zip(arms).map(|(name, arm)| guest(args, name, arm)).collect::<Result<_, _>>()?;
        Ok(Self {
            host: MachinePlan { arm: host_arm, output: args.output.clone() },
            guests,
            command: args.command.clone(),
            timeout: args.timeout.map(timeout).transpose()?,
            strict: args.strict,
            json: args.json,
            quiet: args.quiet,
            dir: args.dir.clone(),
        })
    }
}

fn guest(args: &RecordArgs, name: &str, arm: Arm) -> Result<GuestPlan, PlanFault> {
    if check_name(name).is_err() {
        return Err(PlanFault::GuestName(name.into()));
    }
    if args.dom.iter().filter(|other| *other == name).count() > 1 {
        return Err(PlanFault::GuestTwice(name.into()));
    }
    if arm.events.is_empty() {
        return Err(PlanFault::GuestWithoutEvents(name.into()));
    }
    Ok(GuestPlan { name: name.into(), machine: MachinePlan { arm, output: guest_output(args, name) } })
}

/// `trace.dat` and `guest1` make `trace-guest1.dat`, as trace-cmd names it. KernelShark wants the suffix.
fn guest_output(args: &RecordArgs, name: &str) -> PathBuf {
    let stem = args.output.file_stem().unwrap_or_default().to_string_lossy();
    args.output.with_file_name(format!("{stem}-{name}.dat"))
}

fn timeout(seconds: f64) -> Result<Duration, PlanFault> {
    Duration::try_from_secs_f64(seconds).map_err(|_| PlanFault::Timeout(seconds.to_string()))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches};

    use super::*;
    use crate::cli::args::{Args, Verb};

    fn plan(line: &str) -> Result<Plan, PlanFault> {
        let matches = Args::command().try_get_matches_from(line.split_whitespace()).expect("clap takes it");
        let Verb::Record(args) = Args::from_arg_matches(&matches).unwrap().verb else { unreachable!() };
        Plan::new(&args, matches.subcommand_matches("record").unwrap(), 7)
    }

    fn patterns(machine: &MachinePlan) -> Vec<&str> {
        machine.arm.events.iter().map(|event| event.pattern.as_str()).collect()
    }

    #[test]
    fn events_belong_to_the_machine_before_them() {
        let line = "vtrace record -o out/t.dat -e sched -e irq --dom guest1 -e sched -e irq:* -A g2 -e all -- sleep 3";
        let plan = plan(line).unwrap();
        assert_eq!(patterns(&plan.host), ["sched", "irq"]);
        assert_eq!(patterns(&plan.guests[0].machine), ["sched", "irq:*"]);
        assert_eq!(plan.guests[0].machine.output, PathBuf::from("out/t-guest1.dat"));
        assert_eq!(patterns(&plan.guests[1].machine), ["all"]);
        assert_eq!(plan.command, ["sleep", "3"]);
    }

    #[test]
    fn command_needs_no_dashes_and_keeps_its_own_options() {
        let plan = plan("vtrace record -e sched ls -e x --dom y").unwrap();
        assert_eq!(plan.command, ["ls", "-e", "x", "--dom", "y"]);
        assert!(plan.guests.is_empty());
    }

    #[test]
    fn buffer_size_belongs_to_the_machine_before_it() {
        let plan = plan("vtrace record -b 64 --dom g -e all -b 128").unwrap();
        assert_eq!((plan.host.arm.buffer_kb, plan.guests[0].machine.arm.buffer_kb), (64, 128));
        assert_eq!(self::plan("vtrace record -e x -b 1 -b 2"), Err(PlanFault::BufferTwice("the host".into())));
    }

    #[test]
    fn requests_that_make_no_sense_are_refused() {
        assert_eq!(plan("vtrace record"), Err(PlanFault::Nothing));
        assert_eq!(plan("vtrace record --dom g"), Err(PlanFault::GuestWithoutEvents("g".into())));
        assert_eq!(plan("vtrace record --dom g -e a --dom g -e b"), Err(PlanFault::GuestTwice("g".into())));
        assert_eq!(plan("vtrace record --dom ../g -e a"), Err(PlanFault::GuestName("../g".into())));
        assert!(matches!(plan("vtrace record -e a --timeout=-1"), Err(PlanFault::Timeout(_))));
    }
}
