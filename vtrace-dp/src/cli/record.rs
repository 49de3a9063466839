//! `vtrace record`

use clap::ArgMatches;

use super::{
    background,
    complaint::Complaint,
    output::{put, say},
    plan::plan,
    record_args::RecordArgs,
    recording::{print, record},
    start,
    status_line::StatusLine,
};
use crate::{recorder::run::News, sys::random};

/// The answer to `-s`.
const INTERVAL: &str =
    "-s has no effect: recording wakes up when a buffer is 10 % full, not at an interval (-b KB sets the size)";

/// Records and prints the summary, in the foreground or in the background.
pub(super) fn run(args: &RecordArgs, matches: &ArgMatches, in_background: bool) -> Result<u8, Complaint> {
    let plan = plan(args, matches, random())?;
    if !nix::unistd::geteuid().is_root() {
        return Err(Complaint::not_root());
    }
    if !args.interval.is_empty() && !plan.quiet {
        say(INTERVAL);
    }
    if in_background {
        return start::run(&plan, args.background.session.as_deref());
    }
    let mut status = StatusLine::new(plan.quiet);
    let mut foreground = background::Foreground::new(&plan, args.background.session.as_deref())?;
    let recorded = record(&plan, &mut |news| {
        foreground.update(news);
        show(&mut status, plan.json, news);
    });
    status.clear();
    let (summary, exit_status) = recorded?;
    print(&plan, &summary)?;
    Ok(exit_status)
}

/// Shows news. With JSON, stdout contains the summary alone.
fn show(status: &mut StatusLine, json: bool, news: &News) {
    match news {
        News::Begun => {}
        News::Progress(progress) => status.show(progress),
        News::LeftOut { guest, trouble } => {
            status.clear();
            say(&Complaint::left_out(guest, trouble).to_string());
        }
        News::Output { guest, line } => {
            status.clear();
            let text = format!("{guest}: {}", line.text);
            if line.is_error || json {
                say(&text);
            } else {
                // A closed stdout does not stop the recording.
                let _ = put(&text);
            }
        }
    }
}
