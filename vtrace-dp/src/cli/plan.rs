//! From arguments to a plan.
//!
//! In:    [`RecordArgs`] and the order of its options
//! Out:   a [`Plan`], or the first error
//! Trust: nothing; guest names become file names

use std::{path::PathBuf, time::Duration};

use clap::ArgMatches;
use vtrace_common::wire::agent::Arm;

use super::{
    machine_options::{self, Arms},
    plan_fault::PlanFault,
    record_args::RecordArgs,
};
use crate::{
    recorder::plan::{CLOCK, GuestPlan, InstancePlan, MachinePlan, Plan, records, wall_clock},
    server::check_name,
    trace::{
        format::compressed::Compression,
        write::pack::{Form, FormatVersion},
    },
};

/// Validates the arguments. `matches` are those of the verb `record`: they contain the order.
pub(super) fn plan(args: &RecordArgs, matches: &ArgMatches, session: u64) -> Result<Plan, PlanFault> {
    let common = Arm { session, clock: CLOCK.into(), kallsyms: !args.no_kallsyms, ..Arm::default() };
    let arms = machine_options::read(matches, &args.instance, &args.dom, &common)?;
    let Arms { host: host_arm, instances, guests, newest_kb } = arms;
    if !records(&host_arm) && instances.is_empty() && guests.is_empty() {
        return Err(PlanFault::Nothing);
    }
    check_host(&host_arm, args)?;
    let form = form(args)?;
    if let Some(name) = twice(instances.iter().map(|(name, _)| name)) {
        return Err(PlanFault::InstanceTwice(name.clone()));
    }
    let mut newest_bytes = newest_kb.into_iter().map(|kb| kb.map(|kb| u64::from(kb) << 10));
    let mut newest_bytes = || newest_bytes.next().expect("one for each machine");
    let host = MachinePlan { arm: host_arm, output: args.output.clone(), newest_bytes: newest_bytes() };
    let mut instance_plans = Vec::new();
    for ((name, arm), number) in instances.into_iter().zip(1..) {
        let arm = Arm { session: session.wrapping_add(number), ..arm };
        instance_plans.push(instance(args, (name, arm), newest_bytes(), &host.arm)?);
    }
    let mut guest_plans = Vec::new();
    for (name, (arm, instance)) in args.dom.iter().zip(guests) {
        guest_plans.push(guest(args, name, (arm, instance), newest_bytes())?);
    }
    Ok(Plan {
        host,
        instances: instance_plans,
        guests: guest_plans,
        command: args.command.clone(),
        rt: args.rt,
        timeout: args.timeout.map(timeout).transpose()?,
        sink: args.sink,
        file_bytes_max: args.max_file,
        guest_bytes_max: args.max_guest_bytes,
        raw_clock: args.raw_clock,
        form,
        no_clobber: args.no_clobber,
        date: args.date,
        keep_going: args.keep_going,
        strict: args.strict,
        json: args.json,
        quiet: args.quiet,
        dir: args.dir.clone(),
    })
}

fn check_host(arm: &Arm, args: &RecordArgs) -> Result<(), PlanFault> {
    if !arm.commands.is_empty() {
        return Err(PlanFault::ExecOnHost);
    }
    if arm.clock != CLOCK && !args.dom.is_empty() {
        return Err(PlanFault::Clock(arm.clock.clone()));
    }
    if args.date && wall_clock(&arm.clock).is_none() {
        return Err(PlanFault::DateClock(arm.clock.clone()));
    }
    check_processes("the host", arm, !args.command.is_empty())
}

fn form(args: &RecordArgs) -> Result<Form, PlanFault> {
    let form = Form { version: args.file_version, compression: args.compression };
    let is_impossible = form.version == FormatVersion::V6 && form.compression != Compression::None;
    if is_impossible { Err(PlanFault::CompressedVersion6) } else { Ok(form) }
}

/// The first item that occurs twice.
fn twice<T: PartialEq>(mut all: impl Iterator<Item = T> + Clone) -> Option<T> {
    while let Some(one) = all.next() {
        if all.clone().any(|other| other == one) {
            return Some(one);
        }
    }
    None
}

fn instance(
    args: &RecordArgs,
    (name, arm): (String, Arm),
    newest_bytes: Option<u64>,
    host: &Arm,
) -> Result<InstancePlan, PlanFault> {
    if check_name(&name).is_err() {
        return Err(PlanFault::InstanceName(name));
    }
    if !records(&arm) {
        return Err(PlanFault::InstanceWithoutEvents(name));
    }
    if !arm.commands.is_empty() {
        return Err(PlanFault::ExecOnHost);
    }
    // The default is the host's clock: a file has one clock.
    let clock = if arm.clock == CLOCK { host.clock.clone() } else { arm.clock.clone() };
    if clock != host.clock {
        return Err(PlanFault::InstanceClock { instance: name, clock, host: host.clock.clone() });
    }
    if args.file_version == FormatVersion::V6 && arm.subbuf_kb.max(4) != host.subbuf_kb.max(4) {
        return Err(PlanFault::InstancePages(name));
    }
    check_processes(&format!("-B {name}"), &arm, !args.command.is_empty())?;
    Ok(InstancePlan { name, arm: Arm { clock, ..arm }, newest_bytes })
}

/// Whether a mask is hexadecimal (commas between groups, as tracing_cpumask takes them) and not zero.
fn selects_a_cpu(mask: &str) -> bool {
    mask.chars().all(|letter| letter.is_ascii_hexdigit() || letter == ',')
        && mask.chars().any(|letter| letter.is_ascii_hexdigit() && letter != '0')
}

fn check_processes(machine: &str, arm: &Arm, has_command: bool) -> Result<(), PlanFault> {
    if !arm.cpu_mask.is_empty() && !selects_a_cpu(&arm.cpu_mask) {
        return Err(PlanFault::CpuMask { mask: arm.cpu_mask.clone(), machine: machine.into() });
    }
    if arm.own_only && !has_command {
        return Err(PlanFault::CommandMissing(machine.into()));
    }
    if arm.children && !arm.own_only && arm.pids.is_empty() {
        return Err(PlanFault::ParentMissing(machine.into()));
    }
    Ok(())
}

fn guest(
    args: &RecordArgs,
    name: &str,
    (arm, instance): (Arm, Option<String>),
    newest_bytes: Option<u64>,
) -> Result<GuestPlan, PlanFault> {
    if check_name(name).is_err() {
        return Err(PlanFault::GuestName(name.into()));
    }
    if args.dom.iter().filter(|other| *other == name).count() > 1 {
        return Err(PlanFault::GuestTwice(name.into()));
    }
    if let Some(instance) = &instance {
        check_name(instance).map_err(|_| PlanFault::InstanceName(instance.clone()))?;
    }
    if !records(&arm) {
        return Err(PlanFault::GuestWithoutEvents(name.into()));
    }
    if arm.clock != CLOCK {
        return Err(PlanFault::Clock(arm.clock));
    }
    check_processes(name, &arm, !arm.commands.is_empty())?;
    let machine = MachinePlan { arm, output: guest_output(args, name), newest_bytes };
    Ok(GuestPlan { name: name.into(), machine, instance })
}

/// The file of a guest: `trace-guest1.dat` for `trace.dat`, as trace-cmd names it, and `x-guest1.y.dat` for `x.y`.
/// KernelShark needs the suffix.
fn guest_output(args: &RecordArgs, name: &str) -> PathBuf {
    let stem = args.output.file_stem().unwrap_or_default();
    let mut file_name = stem.to_os_string();
    file_name.push(format!("-{name}"));
    if let Some(extension) = args.output.extension().filter(|extension| *extension != "dat") {
        file_name.push(".");
        file_name.push(extension);
    }
    file_name.push(".dat");
    args.output.with_file_name(file_name)
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
        super::plan(&args, matches.subcommand_matches("record").unwrap(), 7)
    }

    fn patterns(machine: &MachinePlan) -> Vec<&str> {
        machine.arm.events.iter().map(|event| event.pattern.as_str()).collect()
    }

    #[test]
    fn events_apply_to_the_machine_before_them() {
        let line = "vtrace record -o out/t.dat -e sched -e irq --dom guest1 -e sched -e irq:* -A g2 -e all -- sleep 3";
        let plan = plan(line).unwrap();
        assert_eq!(patterns(&plan.host), ["sched", "irq"]);
        assert_eq!(patterns(&plan.guests[0].machine), ["sched", "irq:*"]);
        assert_eq!(plan.guests[0].machine.output, PathBuf::from("out/t-guest1.dat"));
        assert_eq!(patterns(&plan.guests[1].machine), ["all"]);
        assert_eq!(plan.command, ["sleep", "3"]);
    }

    #[test]
    fn guests_file_keeps_the_suffix_and_ends_in_dat() {
        for (output, expected) in [
            ("o/x.y", "o/x-guest1.y.dat"),
            ("x", "x-guest1.dat"),
            ("x.dat", "x-guest1.dat"),
            ("x.1.dat", "x.1-guest1.dat"),
        ] {
            let plan = plan(&format!("vtrace record -o {output} --dom guest1 -e sched")).unwrap();
            assert_eq!(plan.guests[0].machine.output, PathBuf::from(expected));
        }
    }

    #[test]
    fn command_needs_no_dashes_and_keeps_its_own_options() {
        let plan = plan("vtrace record -e sched ls -e x --dom y").unwrap();
        assert_eq!(plan.command, ["ls", "-e", "x", "--dom", "y"]);
        assert!(plan.guests.is_empty());
    }

    #[test]
    fn newest_data_is_kept_of_each_machine_as_it_says_or_as_the_host_does() {
        let kept = |line: &str| {
            let plan = plan(line).unwrap();
            let instances = plan.instances.iter().map(|instance| instance.newest_bytes);
            let guests = plan.guests.iter().map(|guest| guest.machine.newest_bytes);
            [plan.host.newest_bytes].into_iter().chain(instances).chain(guests).collect::<Vec<_>>()
        };
        let line = "vtrace record -e sched -m 64 -B i -e irq --dom g1 -e sched -m 8 --dom g2 -e sched";
        assert_eq!(kept(line), [Some(65536), Some(65536), Some(8192), Some(65536)]);
        let line = "vtrace record -e sched --dom g1 -e sched -m 8 --dom g2 -e sched";
        assert_eq!(kept(line), [None, Some(8192), None]);
        assert!(plan(line).unwrap().keeps_newest());
        let twice = plan("vtrace record -e sched --dom g1 -e sched -m 8 -m 9").unwrap_err();
        assert_eq!(twice, PlanFault::Twice { option: "-m", machine: "g1".into() });
    }

    #[test]
    fn buffer_size_applies_to_the_machine_before_it() {
        let plan = plan("vtrace record -b 64 --dom g -e all -b 128").unwrap();
        assert_eq!((plan.host.arm.buffer_kb, plan.guests[0].machine.arm.buffer_kb), (64, 128));
        let twice = |option| Err(PlanFault::Twice { option, machine: "the host".into() });
        assert_eq!(self::plan("vtrace record -e x -b 1 -b 2"), twice("-b"));
        assert_eq!(self::plan("vtrace record -e x --subbuf-size 8 --subbuf-size 8"), twice("--subbuf-size"));
    }

    #[test]
    fn page_size_applies_to_the_machine_before_it_and_priority_to_the_host() {
        let plan = plan("vtrace record -e x --subbuf-size 64 --rt --dom g -e all --subbuf-size 16 true").unwrap();
        assert_eq!((plan.host.arm.subbuf_kb, plan.guests[0].machine.arm.subbuf_kb, plan.rt), (64, 16, Some(1)));
        assert_eq!((self::plan("vtrace record -e x --rt=7").unwrap().rt, plan.command.len()), (Some(7), 1));
    }

    #[test]
    fn tracers_events_and_commands_of_host_and_guests_are_told_apart() {
        let line = "vtrace record -e kvm --dom guest1 -e all --exec guest-app1 foo ; \
                    --dom guest2 -p function -l vfs_* --exec guest2-app ; hostapp arg";
        let plan = plan(line).unwrap();
        assert_eq!(patterns(&plan.host), ["kvm"]);
        let [first, second] = &plan.guests[..] else { panic!("two guests") };
        assert_eq!(patterns(&first.machine), ["all"]);
        assert_eq!(first.machine.arm.commands[0].words, ["guest-app1", "foo"]);
        assert_eq!(second.machine.arm.tracer.name, "function");
        assert_eq!(second.machine.arm.tracer.functions, ["vfs_*"]);
        assert_eq!(second.machine.arm.commands[0].words, ["guest2-app"]);
        assert_eq!(plan.command, ["hostapp", "arg"]);
    }

    #[test]
    fn filter_and_trigger_apply_to_the_event_before_and_exclusion_to_those_after() {
        let line = "vtrace record -e sched -f prev_pid!=0 -e irq:* -R stacktrace -R traceoff:1 -v -e sched_wak* \
                    --dom g -e all -v -e kvm";
        let plan = plan(line).unwrap();
        let events = &plan.host.arm.events;
        assert_eq!((events[0].filter.as_str(), events[1].triggers.len()), ("prev_pid!=0", 2));
        assert_eq!(events.iter().map(|event| event.excluded).collect::<Vec<_>>(), [false, false, true]);
        let events = &plan.guests[0].machine.arm.events;
        assert_eq!(events.iter().map(|event| event.excluded).collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn all_filters_of_an_event_hold_together() {
        let plan = plan("vtrace record -e sched_switch -f prev_pid==0 -f prev_prio<100||prev_prio>130 -e irq").unwrap();
        let filters: Vec<&str> = plan.host.arm.events.iter().map(|event| event.filter.as_str()).collect();
        assert_eq!(filters, ["(prev_pid==0)&&(prev_prio<100||prev_prio>130)", ""]);
    }

    #[test]
    fn commands_keep_their_own_options_up_to_the_semicolon() {
        let plan = plan("vtrace record --dom g -e a --exec app -e x --dom y ; --exec b ; -F -c -T -P 1,2").unwrap();
        let arm = &plan.guests[0].machine.arm;
        assert_eq!(arm.commands[0].words, ["app", "-e", "x", "--dom", "y"]);
        assert_eq!(arm.commands[1].words, ["b"]);
        assert!(arm.own_only && arm.children && arm.options == ["stacktrace"] && arm.pids == [1, 2]);
    }

    #[test]
    fn options_that_do_not_fit_the_machine_are_refused() {
        let faults = [
            ("vtrace record -f a -e sched", "-f applies to the preceding -e, but the host has none"),
            ("vtrace record -e a --dom g -R x -e b", "-R applies to the preceding -e, but g has none"),
            ("vtrace record -p nop -p function", "-p is given twice for the host"),
            ("vtrace record -e a -C mono --dom g -e b", "-C mono: with guests the clock must be x86-tsc"),
            ("vtrace record -e a --exec b ;", "--exec is for guests; the host's command is the last argument"),
            ("vtrace record -e a -F", "-F for the host without a command"),
            ("vtrace record -e a -c b", "-c for the host needs -P or -F"),
            ("vtrace record -e a -B i", "no event (-e) and no tracer (-p) after -B i"),
            ("vtrace record -B i -e a -B i -e b", "-B i is given twice"),
            (
                "vtrace record -B a/b -e a",
                "-B \"a/b\": letters, digits, '.', '_' and '-' only, 64 at most, no leading '.'",
            ),
            (
                "vtrace record --dom g -e a -B i -e b",
                "options between --dom g and -B i: a guest has either -B or its top buffer",
            ),
            (
                "vtrace record --dom g -B i -e a -B j -e b",
                "-B j is the second for g: a guest has one instance, since a port carries one buffer per CPU",
            ),
            ("vtrace record --dom g -B i", "no event (-e) and no tracer (-p) after --dom g"),
            (
                "vtrace record --dom g -B .i -e a",
                "-B \".i\": letters, digits, '.', '_' and '-' only, 64 at most, no leading '.'",
            ),
            ("vtrace record -e a -B i -e b -C mono", "-C mono for -B i: the host's file has one clock, x86-tsc"),
            (
                "vtrace record -e a -B i -e b --subbuf-size 8 --file-version 6",
                "--file-version 6 has one page size, but --subbuf-size differs for -B i",
            ),
            ("vtrace record -e a --file-version 6 --compression any", "--file-version 6 cannot be compressed"),
            ("vtrace record -e a --date -C local", "--date with -C local: user space cannot read this clock"),
            ("vtrace record -e a -M 0", "-M 0 for the host: not a hexadecimal mask of at least one CPU"),
            ("vtrace record -e a --dom g -e a -M 0x0", "-M 0 for g: not a hexadecimal mask of at least one CPU"),
            ("vtrace record -e a -M 3z", "-M 3z for the host: not a hexadecimal mask of at least one CPU"),
            ("vtrace record -e a -P 1,x", "-P x: not a process ID"),
        ];
        for (line, text) in faults {
            assert_eq!(plan(line).unwrap_err().to_string(), text, "{line}");
        }
        assert_eq!(plan("vtrace record -e a -C mono").unwrap().host.arm.clock, "mono");
    }

    #[test]
    fn options_after_an_instance_belong_to_it_up_to_the_next_instance_or_guest() {
        let line = "vtrace record -C mono -e sched -b 64 -B one -e irq -O nooverwrite -B two -p function -l vfs_* true";
        let plan = plan(line).unwrap();
        assert_eq!((patterns(&plan.host), plan.host.arm.buffer_kb), (vec!["sched"], 64));
        let [one, two] = &plan.instances[..] else { panic!("two instances") };
        assert_eq!((one.name.as_str(), &one.arm.options[..]), ("one", &["nooverwrite".to_owned()][..]));
        assert_eq!((one.arm.events[0].pattern.as_str(), one.arm.clock.as_str()), ("irq", "mono"));
        assert_eq!(
            (two.arm.tracer.name.as_str(), &two.arm.tracer.functions[..]),
            ("function", &["vfs_*".to_owned()][..])
        );
        assert!(two.arm.session != one.arm.session && one.arm.session != plan.host.arm.session);
        let plan = self::plan("vtrace record -B one -e irq --dom g -e sched").unwrap();
        assert_eq!((patterns(&plan.host).len(), patterns(&plan.guests[0].machine)), (0, vec!["sched"]));
    }

    #[test]
    fn instance_after_a_guest_is_that_guests_and_may_have_the_name_of_one_of_the_hosts() {
        let line = "vtrace record -B i -e irq --dom g --exec a ; -B i -e sched -b 64 --dom h -e all";
        let plan = plan(line).unwrap();
        assert_eq!((plan.instances.len(), plan.guests.len()), (1, 2));
        let [g, h] = &plan.guests[..] else { panic!("two guests") };
        assert_eq!((g.instance.as_deref(), patterns(&g.machine)), (Some("i"), vec!["sched"]));
        assert_eq!((g.machine.arm.buffer_kb, g.machine.arm.commands[0].words.len()), (64, 1));
        assert_eq!((h.instance.as_deref(), patterns(&h.machine)), (None, vec!["all"]));
    }

    #[test]
    fn invalid_requests_are_refused() {
        assert_eq!(plan("vtrace record"), Err(PlanFault::Nothing));
        assert_eq!(plan("vtrace record --dom g"), Err(PlanFault::GuestWithoutEvents("g".into())));
        assert_eq!(plan("vtrace record --dom g -e a --dom g -e b"), Err(PlanFault::GuestTwice("g".into())));
        assert_eq!(plan("vtrace record --dom ../g -e a"), Err(PlanFault::GuestName("../g".into())));
        assert!(matches!(plan("vtrace record -e a --timeout=-1"), Err(PlanFault::Timeout(_))));
    }
}
