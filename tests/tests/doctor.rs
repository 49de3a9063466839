//! `vtrace doctor` on this machine: what it says must be what is there.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vtrace_tests::server::Server;

/// The exit status and the findings of `vtrace doctor --json WORDS --dir DIR`.
fn findings(words: &[&str], dir: &Path) -> Result<(Option<i32>, Vec<Value>)> {
    let mut command = Command::new(xtask::build::vtrace()?);
    let output = command.args(["doctor", "--json", "-o", "/tmp"]).args(words).arg("--dir").arg(dir).output()?;
    Ok((output.status.code(), serde_json::from_slice(&output.stdout)?))
}

fn finding<'a>(findings: &'a [Value], check: &str) -> Result<&'a Value> {
    findings.iter().find(|finding| finding["check"] == check).with_context(|| format!("no {check} in {findings:?}"))
}

#[test]
fn host_without_a_server_is_told_how_to_start_one() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (status, found) = findings(&[], dir.path())?;
    assert_eq!(status, Some(1));
    for (check, verdict) in
        [("kernel", "ok"), ("tracefs", "ok"), ("io_uring", "ok"), ("control", "fail"), ("server", "fail")]
    {
        assert_eq!(finding(&found, check)?["verdict"], verdict, "{found:?}");
    }
    ensure!(finding(&found, "server")?["remedy"].to_string().contains("vtrace server --dom"), "{found:?}");
    let output =
        Command::new(xtask::build::vtrace()?).args(["doctor", "-o", "/tmp", "--dir"]).arg(dir.path()).output()?;
    let said = String::from_utf8(output.stdout)?;
    ensure!(said.lines().filter(|line| !line.starts_with(' ')).count() == found.len(), "a line for each check: {said}");
    ensure!(said.lines().count() < 40 && said.contains("FAIL server"), "one screen: {said}");
    Ok(())
}

#[test]
fn server_with_a_guest_that_is_not_there_passes_and_open_sockets_and_a_slow_disk_are_told() -> Result<()> {
    let server = Server::start(&["guest1"])?;
    fs::set_permissions(server.dir(), Permissions::from_mode(0o755))?;
    let (status, found) = findings(&[], server.dir())?;
    assert_eq!((status, finding(&found, "server")?["verdict"].as_str()), (Some(0), Some("ok")), "{found:?}");
    let guest: Vec<_> = found.iter().filter(|finding| finding["check"] == "guest1").collect();
    ensure!(guest.len() == 2 && guest[1]["found"] == "no virtual machine is connected", "{guest:?}");

    fs::set_permissions(server.socket("guest1"), Permissions::from_mode(0o666))?;
    let (status, found) = findings(&["--dom", "guest1", "--rate", "4000000000"], server.dir())?;
    assert_eq!((status, finding(&found, "guest1")?["verdict"].as_str()), (Some(1), Some("fail")), "{found:?}");
    assert_eq!(finding(&found, "disk")?["verdict"], "warn", "{found:?}");
    let (status, found) = findings(&["--dom", "guest2"], server.dir())?;
    assert_eq!((status, finding(&found, "guest2")?["verdict"].as_str()), (Some(1), Some("fail")), "{found:?}");
    Ok(())
}

#[test]
fn machine_without_tracefs_is_told_how_to_mount_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let script = format!(
        "mount -t tmpfs none /sys/kernel/tracing && exec {} doctor --json -o /tmp --dir {}",
        xtask::build::vtrace()?.display(),
        dir.path().display()
    );
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output()?;
    let found: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let tracefs = finding(&found, "tracefs")?;
    ensure!(tracefs["verdict"] == "fail" && tracefs["remedy"].to_string().contains("mount -t tracefs"), "{tracefs}");
    Ok(())
}
