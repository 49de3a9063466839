//! `vtrace record`

use clap::ArgMatches;

use super::{
    args::RecordArgs,
    background,
    complaint::Complaint,
    plan::plan,
    put,
    recording::{print, record},
    say,
    status::Status,
};
use crate::{recorder::run::News, sys::random};

/// What `-s` is answered with.
const INTERVAL: &str = "-s has no effect: there is no interval, pages move as soon as a buffer is 10 % full (-b KB for a \
                        smaller one)";

/// Records and prints the closing table, here or in the background.
pub(super) fn run(args: &RecordArgs, matches: &ArgMatches, in_background: bool) -> Result<u8, Complaint> {
    let plan = plan(args, matches, random())?;
    if !nix::unistd::geteuid().is_root() {
        return Err(Complaint::not_root());
    }
    if !args.interval.is_empty() && !plan.quiet {
        say(INTERVAL);
    }
    if in_background {
        return background::start(&plan, args.background.session.as_deref());
    }
    let mut status = Status::new(plan.quiet);
    let mut foreground = background::Foreground::new(&plan, args.background.session.as_deref())?;
    let recorded = record(&plan, &mut |news| {
        foreground.hear(news);
        tell(&mut status, plan.json, news);
    });
    status.clear();
    let (summary, exit_status) = recorded?;
    print(&plan, &summary)?;
    Ok(exit_status)
}

/// Standard output is the table's alone where it is JSON.
fn tell(status: &mut Status, json: bool, news: &News) {
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
                // A reader that has gone is no reason to stop recording.
                let _ = put(&text);
            }
        }
    }
}
