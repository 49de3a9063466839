//! The options that `vtrace setup` prints, used exactly as printed, with each QEMU release; the server restarts in between.

use std::{
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use vtrace_tests::{recording::Recorder, server::Server, transport};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
    qemu::{Qemu, Release},
};

const GUEST: &str = "guest1";

/// Runs a line that setup printed, as a shell does.
fn shell(line: &str) -> Result<Output> {
    let vtrace = xtask::build::vtrace()?;
    let folder = vtrace.parent().context("a program is in a folder")?;
    let path = format!("{}:{}", folder.display(), std::env::var("PATH")?);
    Ok(Command::new("sh").args(["-c", line]).env("PATH", path).output()?)
}

/// What setup prints on stderr.
fn next_steps(root: &Path, words: &str, dir: &Path) -> Result<String> {
    let line = format!("vtrace setup --dom {GUEST} --root {} {words} --dir {}", root.display(), dir.display());
    let output = shell(&line)?;
    ensure!(output.status.success(), "{line}: {output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

/// The command after a label in what setup prints.
fn command<'a>(printed: &'a str, label: &str) -> Result<&'a str> {
    printed.lines().find_map(|line| line.trim().strip_prefix(label)).with_context(|| format!("{label}: {printed}"))
}

fn records(server: &Server, folder: &Path) -> Result<()> {
    server.await_agent(GUEST)?;
    let recorder = Recorder { server: server.dir(), folder };
    let recording = recorder.run(&format!("--dom {GUEST} -e sched -- sleep 1"))?.ok()?;
    assert_eq!(recording.sum(GUEST, "pages_lost")? + recording.sum(GUEST, "events_lost")?, 0);
    ensure!(recording.sum(GUEST, "events")? > 0, "{:#}", recording.summary);
    Ok(())
}

#[test]
fn printed_options_work_as_printed_before_and_after_a_restart_of_the_server() -> Result<()> {
    let turn = turn()?;
    for release in [Release::Oldest, Release::Middle, Release::Newest] {
        let root = tempfile::tempdir()?;
        let folder = tempfile::tempdir()?;
        let root_text = root.path().to_str().context("a path of text")?;
        let (major, minor) = Qemu::unpack(release)?.version()?;
        let mut server = Server::start_with(&["--root", root_text, "--dom", GUEST])?;
        let words = format!("--cpus 2 --qemu-version {major}.{minor}");
        let printed = next_steps(root.path(), &words, server.dir())?;
        // The server reads the setup when it starts.
        server.restart()?;
        let dir = server.dir().display().to_string();
        let options = transport::set_up(root.path(), GUEST, &format!("{words} --dir {dir}"))?;
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let machine = Machine::builder(&turn, Kernel::V6_12).qemu(release).cpus(2).arguments(&options).boot()?;
        records(&server, folder.path())?;

        server.restart()?;
        if release == Release::Newest {
            let attached = shell(command(&printed, "after a restart of the server: ")?)?;
            ensure!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
        }
        records(&server, folder.path())?;
        if release == Release::Newest {
            let detached = shell(command(&printed, "before migration, save or snapshot: ")?)?;
            ensure!(detached.status.success(), "{}", String::from_utf8_lossy(&detached.stderr));
            let saved = machine.qmp("query-migrate", &serde_json::json!(null))?;
            ensure!(saved["blocked-reasons"].is_null(), "{saved}");
        }
    }
    Ok(())
}
