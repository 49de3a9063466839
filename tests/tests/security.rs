//! What a host may not ask of a guest, a guest may not do to a host, and a user not see of another: refused, said,
//! harmless.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;
use vtrace_tests::{
    guest::is_clear,
    judge::{lines, trace_cmd},
    recording::{Recorder, Recording},
    server::Server,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
};

const GUEST: &str = "guest1";
/// What the guest's owner allows.
const POLICY: &str = r#"exec = ["sh", "yes"]
buffer_mib_max = 16
events_denied = ["irq:*"]
tracers_allowed = ["nop"]
"#;

/// `vtrace record` with words that may hold blanks.
fn record(recorder: &Recorder, words: &[&str]) -> Result<Recording> {
    let mut command = recorder.command("--json")?;
    recorder.finish(command.args(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// It failed before anything was recorded, says `why`, and left no file.
fn refuses(recorder: &Recorder, words: &[&str], why: &str) -> Result<()> {
    let recording = record(recorder, words)?;
    ensure!(recording.status == 1 || recording.status == 2, "{words:?}: {}", recording.said);
    ensure!(recording.said.contains(why), "{words:?}: {why:?} is not in {}", recording.said);
    let controls = recording.said.chars().any(|letter| letter.is_control() && letter != '\n');
    ensure!(!controls, "{words:?}: a terminal would obey {:?}", recording.said);
    ensure!(fs::read_dir(recorder.folder)?.next().is_none(), "{words:?}: a file is left");
    Ok(())
}

#[test]
fn what_the_guests_owner_forbids_is_refused_with_the_rule() -> Result<()> {
    let (turn, folder) = (turn()?, tempfile::tempdir()?);
    let server = Server::start(&[GUEST])?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let machine = Machine::builder(&turn, Kernel::V6_12).vhost_user(&server.socket(GUEST)).boot()?;
    server.await_agent(GUEST)?;
    // Without a policy nothing is run.
    let exec = ["--dom", GUEST, "-e", "sched", "--exec", "touch", "/tmp/ran", ";", "--", "true"];
    refuses(&recorder, &exec, "touch: this agent runs no commands")?;

    machine.put(POLICY.as_bytes(), "/tmp/agent.toml")?;
    machine.shell("kill $(pidof vtrace); sleep 0.5; start-agent --policy /tmp/agent.toml")?.ok()?;
    server.await_agent(GUEST)?;
    let guest = |words: &[&'static str]| [&["--dom", GUEST][..], words, &["--", "true"]].concat();
    refuses(&recorder, &exec, "touch: programs allowed are: sh, yes")?;
    refuses(&recorder, &guest(&["-e", "irq"]), "irq: ")?;
    refuses(&recorder, &guest(&["-e", "sched", "-b", "16384"]), "16384 KiB a CPU for 2 CPUs: 16384 KiB are allowed")?;
    refuses(&recorder, &guest(&["-e", "sched", "-p", "function"]), "function: tracers allowed are: nop")?;
    let trigger = guest(&["-e", "sched:sched_switch", "-R", "enable_event:irq:irq_handler_entry"]);
    refuses(&recorder, &trigger, "a trigger may not switch events while some are denied")?;
    ensure!(machine.shell("ls /tmp/ran")?.status != 0, "it ran");

    names_that_lead_elsewhere_are_names(&recorder, &machine)?;
    guest_that_floods_is_bounded(&recorder)?;
    other_users_see_that_it_is_held(&server, &recorder)?;
    server_has_no_rights(&server)?;
    is_clear(&machine)
}

/// Quotes, slashes and control characters in every name that crosses a border.
fn names_that_lead_elsewhere_are_names(recorder: &Recorder, machine: &Machine) -> Result<()> {
    let none = "no event matches";
    for event in ["a\"b'c", "../../../etc/passwd", "sched:../../enable", "\x1b[2J\x07", "sched/sched_switch"] {
        refuses(recorder, &["--dom", GUEST, "-e", event, "--", "true"], none)?;
    }
    for guest in ["../guest1", "guest1/x", "a\"b", "\x1b[2J", ".."] {
        refuses(recorder, &["--dom", guest, "-e", "sched", "--", "true"], "is not valid as a guest's name")?;
    }
    for program in ["/tmp/../bin/touch", "sh/../touch", "\x1b[2Jsh", "sh\"; touch /tmp/ran; \""] {
        refuses(recorder, &["--dom", GUEST, "-e", "sched", "--exec", program, ";", "--", "true"], "programs allowed")?;
    }
    let filter = "prev_comm == \"a\"; echo 1 > /tmp/ran\x1b[2J";
    let switch = ["--dom", GUEST, "-e", "sched:sched_switch", "-f", filter, "--", "true"];
    refuses(recorder, &switch, "cannot record guest1")?;
    ensure!(machine.shell("ls /tmp/ran")?.status != 0, "it ran");
    Ok(())
}

/// A command that writes for ever, and escapes: its output is bounded and counted, no terminal obeys it, the rest goes on.
fn guest_that_floods_is_bounded(recorder: &Recorder) -> Result<()> {
    let escape = "printf '\\033[2Jgone\\n'; exec yes";
    let words = ["--dom", GUEST, "-e", "sched", "--exec", "sh", "-c", escape, ";", "--", "sleep", "3"];
    let recording = record(recorder, &words)?.ok()?;
    let command = &recording.machine(GUEST)?["commands"][0];
    ensure!(command["output_dropped_bytes"].as_u64().context("bytes")? > 0, "{command}");
    // A megabyte of lines of one letter, with the guest's name in front of each.
    ensure!(recording.said.len() < 8 << 20, "{} bytes came through", recording.said.len());
    ensure!(recording.said.contains("?[2Jgone") && !recording.said.contains('\x1b'), "the escape is shown");
    assert_eq!(recording.sum(GUEST, "pages_lost")?, 0);
    ensure!(lines(&trace_cmd(&["report"], &[&recording.file(GUEST)])?).len() > 10);
    Ok(())
}

/// A copy of the program where everybody may run it.
fn for_everybody() -> Result<(TempDir, PathBuf)> {
    let folder = tempfile::tempdir()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let program = folder.path().join("vtrace");
    fs::copy(xtask::build::vtrace()?, &program)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok((folder, program))
}

/// What `vtrace list` says to an unprivileged user with this group.
fn list_as(program: &Path, server: &Server, group: &str) -> Result<String> {
    let group = format!("--regid={group}");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", &group, "--clear-groups"]).arg(program).args(["list", "--dir"]).arg(server.dir());
    let output = command.output()?;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

fn other_users_see_that_it_is_held(server: &Server, recorder: &Recorder) -> Result<()> {
    let (_folder, program) = for_everybody()?;
    fs::set_permissions(server.dir(), fs::Permissions::from_mode(0o755))?;
    let child = recorder.start(&format!("--dom {GUEST} -e sched -- sleep 4"))?;
    server.await_state("is held", |state| !state["holder_pid"].is_null())?;
    // The socket belongs to root's group here: that is who may come in.
    let outside = list_as(&program, server, "65534")?;
    ensure!(outside.contains("is not for this user") && outside.contains("join group vtrace"), "{outside}");
    let inside = list_as(&program, server, "0")?;
    ensure!(inside.contains("user 0 is recording it") && !inside.contains(&child.id().to_string()), "{inside}");
    ensure!(server.log().contains("uid 65534"), "the client's user is logged");
    recorder.finish(child)?.ok()?;
    Ok(())
}

/// None of the server's threads can do more than serve.
fn server_has_no_rights(server: &Server) -> Result<()> {
    for task in fs::read_dir(format!("/proc/{}/task", server.pid()))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let is = |line: &str| status.lines().any(|found| found == line);
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(is(&format!("{set}:\t0000000000000000")), "{status}");
        }
        ensure!(is("NoNewPrivs:\t1") && is("Seccomp:\t2"), "{status}");
    }
    ensure!(server.log().contains("given up: "), "it says so");
    Ok(())
}

#[test]
fn guest_that_has_had_its_share_is_stopped_and_the_others_go_on() -> Result<()> {
    const SHARE: u64 = 4 << 20;
    let (turn, folder) = (turn()?, tempfile::tempdir()?);
    let server = Server::start(&[GUEST, "guest2"])?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let boot = |guest: &str| -> Result<Machine> {
        let machine = Machine::builder(&turn, Kernel::V6_12).cpus(1).vhost_user(&server.socket(guest)).boot()?;
        server.await_agent(guest)?;
        Ok(machine)
    };
    let (loud, _quiet) = (boot(GUEST)?, boot("guest2")?);
    loud.shell("(while :; do :; done) </dev/null >/dev/null 2>&1 & (while :; do /bin/true; done) >/dev/null 2>&1 &")?
        .ok()?;
    let words = format!(
        "--no-kallsyms --max-guest-bytes {SHARE} -e irq --dom {GUEST} -e all --dom guest2 -e sched -e timer -- sleep 9"
    );
    let recording = recorder.run(&words)?.ok()?;
    let remarks = recording.machine(GUEST)?["remarks"].to_string();
    ensure!(remarks.contains("stopped before the others") && remarks.contains("--max-guest-bytes"), "{remarks}");
    ensure!(recording.sum(GUEST, "pages_out")? * 4096 <= SHARE, "{:#}", recording.summary);
    assert_eq!(recording.summary["ended"], json!(null), "the recording itself goes on");
    let last = |machine: &str| -> Result<(usize, u64)> {
        let report = lines(&trace_cmd(&["report", "-t"], &[&recording.file(machine)])?);
        let times: Vec<u64> = report.iter().map(|line| line.time).collect();
        let (first, last) = (times.iter().min().context("events")?, times.iter().max().context("events")?);
        Ok((report.len(), last - first))
    };
    let ((loud_events, loud_span), (_, quiet_span)) = (last(GUEST)?, last("guest2")?);
    ensure!(loud_events > 100 && loud_span < quiet_span, "{loud_events} events, {loud_span} against {quiet_span}");
    ensure!(recording.said.contains("stopped at its size limit"), "{}", recording.said);
    is_clear(&loud)
}
