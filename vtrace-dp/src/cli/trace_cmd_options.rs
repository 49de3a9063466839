//! Options of `trace-cmd record` that vtrace leaves out, and what there is instead.
//!
//! In:    an option that clap does not know
//! Out:   a line for whoever typed it out of habit
//! Runs:  on the way out

/// The option, and what to do instead.
const FOREIGN: [(&str, &str); 24] = [
    ("--poll", "nothing: recorders sleep until a buffer is 10 % full"),
    ("-r", "--rt=PRIO"),
    ("-a", "-o FILE: a recording is a file of its own"),
    ("-N", "vtrace server and vtrace agent: the host asks its guests"),
    ("-V", "vtrace server and vtrace agent: the host asks its guests"),
    ("-t", "vtrace server and vtrace agent: the host asks its guests"),
    ("--name", "--dom NAME: the server knows guests by name"),
    ("--proxy", "vtrace record on the host"),
    ("--tsync-interval", "nothing: every change of a guest's TSC is recorded (clock line of the closing table)"),
    ("--nofifos", "nothing: pages come over the guest's own device"),
    ("--temp", "nothing: pages go to their place in FILE at once"),
    ("--ts-offset", "trace-cmd report --ts-offset"),
    ("--tsc2nsec", "nothing: files always say how cycles become nanoseconds"),
    ("-k", "nothing: vtrace records into instances of its own and leaves your settings alone"),
    ("-K", "nothing: vtrace records into instances of its own and leaves your settings alone"),
    ("-d", "-O nofunction-trace"),
    ("-D", "nothing: vtrace changes no setting of the whole machine"),
    ("-i", "-e of events that are there: 'sched:sched_*'"),
    ("-H", "trace-cmd profile"),
    ("-S", "trace-cmd profile"),
    ("-G", "trace-cmd profile"),
    ("--profile", "trace-cmd profile"),
    ("--user", "vtrace record … -- runuser -u USER -- COMMAND"),
    ("--no-filter", "nothing: vtrace's own events are recorded like any other"),
];

/// What stands for an option that vtrace has not, as it was typed.
pub(super) fn instead(option: &str) -> Option<&'static str> {
    let option = option.split(['=', ' ']).next().unwrap_or_default();
    FOREIGN.iter().find(|(foreign, _)| *foreign == option).map(|(_, instead)| *instead)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::args::Args;

    #[test]
    fn options_that_are_left_out_are_answered_and_those_there_are_are_not() {
        assert_eq!(instead("-r"), Some("--rt=PRIO"));
        assert_eq!(instead("--ts-offset=7"), Some("trace-cmd report --ts-offset"));
        assert_eq!(instead("--no-such"), None);
        let command = Args::command();
        let record = command.find_subcommand("record").unwrap();
        for (foreign, _) in FOREIGN {
            let known = record.get_arguments().any(|arg| match foreign.strip_prefix("--") {
                Some(long) => arg.get_long() == Some(long),
                None => arg.get_short().is_some_and(|short| format!("-{short}") == foreign),
            });
            assert!(!known, "{foreign} is not left out");
        }
    }
}
