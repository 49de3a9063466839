//! Options of each machine, in order, and the [`Arm`] requests that they make.
//!
//! In:    clap's matches of the verb
//! Out:   an [`Arm`] for the host, for each `-B` before the first `--dom` and for each `--dom`, or the first error. A `-B`
//!        after a `--dom` names that guest's only buffer
//! Trust: nothing
//!
//! As in trace-cmd, `-f` and `-R` apply to the preceding `-e`, `-v` to the following ones, and everything to the preceding
//! machine.

use std::ffi::OsString;

use clap::ArgMatches;
use vtrace_common::wire::agent::{Arm, CommandRequest, EventRequest};

use super::plan_fault::PlanFault;
use crate::recorder::plan::CLOCK;

/// Options of one machine, by clap's id.
const OPTIONS: [&str; 21] = [
    "event",
    "filter",
    "trigger",
    "exclude",
    "tracer",
    "function",
    "notrace",
    "graph_function",
    "max_graph_depth",
    "option",
    "stacks",
    "function_stacks",
    "pid",
    "command_only",
    "children",
    "cpu_mask",
    "clock",
    "buffer_kb",
    "subbuf_kb",
    "newest_kb",
    "exec",
];

/// An option on the command line.
struct OptionGiven {
    /// Position among all arguments.
    index: usize,
    option: &'static str,
    values: Vec<OsString>,
}

/// A machine whose options are being read.
struct MachineOptions<'a> {
    name: &'a str,
    arm: Arm,
    newest_kb: Option<u32>,
    excludes: bool,
}

/// The requests.
#[derive(Debug)]
pub(super) struct Arms {
    /// The host's top buffer.
    pub(super) host: Arm,
    /// The host's instances, by name.
    pub(super) instances: Vec<(String, Arm)>,
    /// The guests, each with the name of its instance.
    pub(super) guests: Vec<(Arm, Option<String>)>,
    /// `-m` of the host, its instances, and the guests; the host's where a machine has none.
    pub(super) newest_kb: Vec<Option<u32>>,
}

/// A `-B` after a `--dom`.
struct GuestInstance<'a> {
    instance: &'a str,
    index: usize,
}

/// The requests of the host, its `instances` and the `guests`. Each starts as a copy of `common`.
pub(super) fn read(
    matches: &ArgMatches,
    instances: &[String],
    guests: &[String],
    common: &Arm,
) -> Result<Arms, PlanFault> {
    let doms = positions(matches, "dom");
    let mut of_host = Vec::new();
    let mut of_guests: Vec<Option<GuestInstance<'_>>> = Vec::new();
    of_guests.resize_with(guests.len(), || None);
    for (index, instance) in positions(matches, "instance").into_iter().zip(instances) {
        let Some(guest) = doms.iter().rposition(|dom| *dom < index) else {
            of_host.push((index, instance));
            continue;
        };
        if of_guests[guest].replace(GuestInstance { instance, index }).is_some() {
            return Err(PlanFault::InstanceSecond { instance: instance.clone(), guest: guests[guest].clone() });
        }
    }
    let mut names = vec!["the host".to_owned()];
    names.extend(of_host.iter().map(|(_, name)| format!("-B {name}")));
    names.extend(guests.iter().cloned());
    let mut machines: Vec<MachineOptions<'_>> = names
        .iter()
        .map(|name| MachineOptions { name, arm: common.clone(), newest_kb: None, excludes: false })
        .collect();
    let starts: Vec<usize> = of_host.iter().map(|(index, _)| *index).chain(doms).collect();
    for given in options_given(matches) {
        // The host's instances are before all guests.
        let owner = starts.iter().filter(|start| **start < given.index).count();
        let guest = owner.checked_sub(1 + of_host.len());
        let later = guest.and_then(|guest| of_guests[guest].as_ref()).filter(|later| given.index < later.index);
        if let Some(later) = later.filter(|_| given.option != "exec") {
            let guest = machines[owner].name.into();
            return Err(PlanFault::InstanceBeside { instance: later.instance.into(), guest });
        }
        machines[owner].add(given.option, given.values)?;
    }
    let newest_kb = machines.iter().map(|machine| machine.newest_kb.or(machines[0].newest_kb)).collect();
    let mut arms = machines.into_iter().map(|machine| machine.arm);
    let host = arms.next().expect("the host is the first");
    let host_instances = of_host.iter().map(|(_, name)| (*name).clone()).zip(arms.by_ref()).collect();
    let guest_instances = of_guests.iter().map(|of_guest| of_guest.as_ref().map(|one| one.instance.to_owned()));
    Ok(Arms { host, instances: host_instances, guests: arms.zip(guest_instances).collect(), newest_kb })
}

/// Positions of an option among all arguments.
fn positions(matches: &ArgMatches, option: &str) -> Vec<usize> {
    matches.indices_of(option).into_iter().flatten().collect()
}

/// All options of machines, in order.
fn options_given(matches: &ArgMatches) -> Vec<OptionGiven> {
    let mut all = Vec::new();
    for option in OPTIONS {
        let groups = matches.get_raw_occurrences(option).into_iter().flatten();
        let mut indices = matches.indices_of(option).into_iter().flatten();
        for group in groups {
            let values: Vec<OsString> = group.map(Into::into).collect();
            let index = indices.next().expect("clap counts every value");
            indices.by_ref().take(values.len().saturating_sub(1)).for_each(drop);
            all.push(OptionGiven { index, option, values });
        }
    }
    all.sort_by_key(|given| given.index);
    all
}

impl MachineOptions<'_> {
    fn add(&mut self, option: &'static str, values: Vec<OsString>) -> Result<(), PlanFault> {
        let words: Vec<String> = values
            .into_iter()
            .map(OsString::into_string)
            .collect::<Result<_, _>>()
            .map_err(|word| PlanFault::NotText(word.to_string_lossy().into()))?;
        if option == "exec" {
            return self.command(words);
        }
        let word = words.into_iter().next().unwrap_or_default();
        let Self { arm, .. } = self;
        match option {
            "event" => {
                let excluded = self.excludes;
                arm.events.push(EventRequest { excluded, ..word.as_str().into() });
            }
            "filter" => {
                let filter = &mut self.event("-f")?.filter;
                *filter = if filter.is_empty() { word } else { format!("({filter})&&({word})") };
            }
            "trigger" => self.event("-R")?.triggers.push(word),
            "exclude" => self.excludes = true,
            "tracer" => return self.once("-p", |arm| &mut arm.tracer.name, word),
            "function" => arm.tracer.functions.push(word),
            "notrace" => arm.tracer.functions_excluded.push(word),
            "graph_function" => arm.tracer.graph_functions.push(word),
            "max_graph_depth" => arm.tracer.graph_depth_max = number(&word),
            "option" => arm.options.push(word),
            "stacks" => arm.options.push("stacktrace".into()),
            "function_stacks" => arm.options.push("func_stack_trace".into()),
            "pid" => return self.processes(&word),
            "command_only" => arm.own_only = true,
            "children" => arm.children = true,
            "cpu_mask" if word == "all" || word == "-1" => arm.cpu_mask.clear(),
            "cpu_mask" => arm.cpu_mask = word.trim_start_matches("0x").into(),
            "clock" => arm.clock = if word == "tsc2nsec" { CLOCK.into() } else { word },
            "buffer_kb" => return self.size("-b", |arm| &mut arm.buffer_kb, &word),
            "subbuf_kb" => return self.size("--subbuf-size", |arm| &mut arm.subbuf_kb, &word),
            "newest_kb" => {
                if self.newest_kb.replace(number(&word)).is_some() {
                    return Err(PlanFault::Twice { option: "-m", machine: self.name.into() });
                }
            }
            option => unreachable!("{option} is not one of OPTIONS"),
        }
        Ok(())
    }

    /// The machine's last `-e`.
    fn event(&mut self, option: &'static str) -> Result<&mut EventRequest, PlanFault> {
        let name = self.name;
        self.arm.events.last_mut().ok_or_else(|| PlanFault::NoEventBefore { option, machine: name.into() })
    }

    fn once(
        &mut self,
        option: &'static str,
        field: fn(&mut Arm) -> &mut String,
        word: String,
    ) -> Result<(), PlanFault> {
        let before = std::mem::replace(field(&mut self.arm), word);
        if before.is_empty() { Ok(()) } else { Err(PlanFault::Twice { option, machine: self.name.into() }) }
    }

    fn size(&mut self, option: &'static str, field: fn(&mut Arm) -> &mut u32, word: &str) -> Result<(), PlanFault> {
        let before = std::mem::replace(field(&mut self.arm), number(word));
        if before == 0 { Ok(()) } else { Err(PlanFault::Twice { option, machine: self.name.into() }) }
    }

    fn processes(&mut self, list: &str) -> Result<(), PlanFault> {
        for word in list.split(',') {
            let pid = word.trim().parse().ok().filter(|pid| *pid > 0);
            self.arm.pids.push(pid.ok_or_else(|| PlanFault::Process(word.into()))?);
        }
        Ok(())
    }

    fn command(&mut self, words: Vec<String>) -> Result<(), PlanFault> {
        self.arm.commands.push(CommandRequest { words });
        Ok(())
    }
}

/// A number that clap has already parsed.
fn number(word: &str) -> u32 {
    word.parse().expect("clap has parsed it")
}
