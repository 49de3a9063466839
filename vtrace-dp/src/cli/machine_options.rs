//! Options of each machine, in the order they were typed, and the [`Arm`]s they make.
//!
//! In:    clap's matches of the verb
//! Out:   one [`Arm`] for the host, one for each `-B` before the first `--dom` and one for each `--dom`, or the first
//!        thing that is wrong. A `-B` behind a `--dom` names that guest's one buffer
//! Trust: nothing typed
//!
//! What trace-cmd's parser does with them holds here too: `-f` and `-R` belong to the `-e` before, `-v` to the `-e`
//! behind it, everything to the machine before it.

use std::ffi::OsString;

use clap::ArgMatches;
use vtrace_common::wire::agent::{Arm, CommandRequest, EventRequest};

use super::plan_fault::PlanFault;
use crate::recorder::plan::CLOCK;

/// Options that are for one machine, by clap's id.
const OPTIONS: [&str; 20] = [
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
    "exec",
];

/// An option as it was typed.
struct Typed {
    index: usize,
    option: &'static str,
    values: Vec<OsString>,
}

/// A machine whose options are being read.
struct Machine<'a> {
    name: &'a str,
    arm: Arm,
    excludes: bool,
}

/// Requests, each in the order typed.
#[derive(Debug)]
pub(super) struct Arms {
    /// The host's top buffer.
    pub(super) host: Arm,
    /// The host's instances, by name.
    pub(super) instances: Vec<(String, Arm)>,
    /// The guests, and what each calls its one buffer.
    pub(super) guests: Vec<(Arm, Option<String>)>,
}

/// A `-B` behind a `--dom`.
struct Named<'a> {
    instance: &'a str,
    index: usize,
}

/// The requests of the host, of its `instances` and of the `guests`. `common` is what all of them begin with.
pub(super) fn read(
    matches: &ArgMatches,
    instances: &[String],
    guests: &[String],
    common: &Arm,
) -> Result<Arms, PlanFault> {
    let begins = |option| matches.indices_of(option).into_iter().flatten().collect::<Vec<usize>>();
    let doms = begins("dom");
    let (mut of_host, mut of_guests) = (Vec::new(), Vec::new());
    of_guests.resize_with(guests.len(), || None);
    for (index, instance) in begins("instance").into_iter().zip(instances) {
        let Some(guest) = doms.iter().rposition(|dom| *dom < index) else {
            of_host.push((index, instance));
            continue;
        };
        if of_guests[guest].replace(Named { instance, index }).is_some() {
            return Err(PlanFault::InstanceSecond { instance: instance.clone(), guest: guests[guest].clone() });
        }
    }
    let names: Vec<String> =
        of_host.iter().map(|(_, name)| format!("-B {name}")).chain(guests.iter().cloned()).collect();
    let machine = |name| Machine { name, arm: common.clone(), excludes: false };
    let mut machines: Vec<_> =
        std::iter::once("the host").chain(names.iter().map(String::as_str)).map(machine).collect();
    let begins: Vec<usize> = of_host.iter().map(|(index, _)| *index).chain(doms).collect();
    for typed in typed(matches) {
        // The host's instances are before all guests.
        let owner = begins.iter().filter(|begin| **begin < typed.index).count();
        let guest = owner.checked_sub(1 + of_host.len());
        let named = guest.and_then(|guest| of_guests[guest].as_ref()).filter(|named| typed.index < named.index);
        if let Some(named) = named.filter(|_| typed.option != "exec") {
            let (instance, guest) = (named.instance.into(), machines[owner].name.into());
            return Err(PlanFault::InstanceBeside { instance, guest });
        }
        machines[owner].take(typed.option, typed.values)?;
    }
    let mut arms = machines.into_iter().map(|machine| machine.arm);
    let host = arms.next().expect("the host is the first");
    let instances = of_host.iter().map(|(_, name)| (*name).clone()).zip(arms.by_ref()).collect();
    let of_guests = of_guests.iter().map(|named| named.as_ref().map(|named| named.instance.to_owned()));
    Ok(Arms { host, instances, guests: arms.zip(of_guests).collect() })
}

fn typed(matches: &ArgMatches) -> Vec<Typed> {
    let mut all = Vec::new();
    for option in OPTIONS {
        let groups = matches.get_raw_occurrences(option).into_iter().flatten();
        let mut indices = matches.indices_of(option).into_iter().flatten();
        for group in groups {
            let values: Vec<OsString> = group.map(Into::into).collect();
            let index = indices.next().expect("clap counts every value");
            indices.by_ref().take(values.len().saturating_sub(1)).for_each(drop);
            all.push(Typed { index, option, values });
        }
    }
    all.sort_by_key(|typed| typed.index);
    all
}

impl Machine<'_> {
    fn take(&mut self, option: &'static str, values: Vec<OsString>) -> Result<(), PlanFault> {
        let words = values.into_iter().map(OsString::into_string).collect::<Result<Vec<String>, _>>();
        let words = words.map_err(|word| PlanFault::NotText(word.to_string_lossy().into()))?;
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
            option => unreachable!("{option} is not one of OPTIONS"),
        }
        Ok(())
    }

    /// The event that the last `-e` of this machine named.
    fn event(&mut self, option: &'static str) -> Result<&mut EventRequest, PlanFault> {
        let name = self.name;
        self.arm.events.last_mut().ok_or_else(|| PlanFault::NoEventBefore { option, machine: name.into() })
    }

    fn once(
        &mut self,
        option: &'static str,
        place: fn(&mut Arm) -> &mut String,
        word: String,
    ) -> Result<(), PlanFault> {
        let before = std::mem::replace(place(&mut self.arm), word);
        if before.is_empty() { Ok(()) } else { Err(PlanFault::Twice { option, machine: self.name.into() }) }
    }

    fn size(&mut self, option: &'static str, place: fn(&mut Arm) -> &mut u32, word: &str) -> Result<(), PlanFault> {
        let before = std::mem::replace(place(&mut self.arm), number(word));
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

/// A number that clap has parsed already.
fn number(word: &str) -> u32 {
    word.parse().expect("clap has parsed it")
}
