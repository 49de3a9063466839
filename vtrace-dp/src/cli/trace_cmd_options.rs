//! Options of `trace-cmd record` that vtrace does not have, and their replacements.
//!
//! In:    an option that clap does not know
//! Out:   a line of advice

/// The option and its replacement.
const FOREIGN: [(&str, &str); 24] = [
    ("--poll", "not needed: recorders sleep until a buffer is 10 % full"),
    ("-r", "--rt=PRIO"),
    ("-a", "-o FILE: each recording has its own file"),
    ("-N", "vtrace server and vtrace agent: the host requests the recording"),
    ("-V", "vtrace server and vtrace agent: the host requests the recording"),
    ("-t", "vtrace server and vtrace agent: the host requests the recording"),
    ("--name", "--dom NAME: the server knows guests by name"),
    ("--proxy", "vtrace record on the host"),
    ("--tsync-interval", "not needed: every change of a guest's TSC is recorded (clock line of the summary)"),
    ("--nofifos", "not needed: pages come over the guest's own device"),
    ("--temp", "not needed: pages are written to FILE at once"),
    ("--ts-offset", "trace-cmd report --ts-offset"),
    ("--tsc2nsec", "not needed: files always contain the conversion to nanoseconds"),
    ("-k", "not needed: vtrace records into its own instances and does not change your settings"),
    ("-K", "not needed: vtrace records into its own instances and does not change your settings"),
    ("-d", "-O nofunction-trace"),
    ("-D", "not needed: vtrace does not change global settings"),
    ("-i", "-e with a pattern: 'sched:sched_*'"),
    ("-H", "trace-cmd profile"),
    ("-S", "trace-cmd profile"),
    ("-G", "trace-cmd profile"),
    ("--profile", "trace-cmd profile"),
    ("--user", "vtrace record … -- runuser -u USER -- COMMAND"),
    ("--no-filter", "not needed: events of vtrace itself are recorded like all others"),
];

/// The replacement of an option that vtrace does not have.
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
    fn only_options_that_vtrace_does_not_have_are_answered() {
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
            assert!(!known, "{foreign} exists");
        }
    }
}
