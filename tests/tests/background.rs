//! Recordings in the background: started, seen, stopped; and what is said where that cannot be.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;
use vtrace_tests::judge::{lines, trace_cmd};

/// A run directory and a folder for files.
struct RunFolders {
    run: TempDir,
    files: TempDir,
}

impl RunFolders {
    fn new() -> Result<Self> {
        Ok(Self { run: tempfile::tempdir()?, files: tempfile::tempdir()? })
    }

    fn vtrace(&self, verb: &str, words: &str) -> Result<Output> {
        let mut command = Command::new(xtask::build::vtrace()?);
        command.arg(verb).arg("--dir").arg(self.run.path()).args(words.split_whitespace());
        Ok(command.current_dir(self.files.path()).stdin(Stdio::null()).output()?)
    }

    fn works(&self, verb: &str, words: &str) -> Result<String> {
        let output = self.vtrace(verb, words)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{verb} {words}: {} {said}", output.status);
        Ok(String::from_utf8(output.stdout)? + &said)
    }

    fn complains(&self, verb: &str, words: &str, why: &str, remedy: &str) -> Result<()> {
        let output = self.vtrace(verb, words)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{verb} {words}: {} {said}", output.status);
        ensure!(said.contains(why) && said.contains(remedy), "{why:?} and {remedy:?} are not in: {said}");
        Ok(())
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.works("status", "--json")?)?)
    }

    fn pid(&self, name: &str) -> Result<Pid> {
        let text = fs::read_to_string(self.run.path().join(format!("record-{name}.pid")))?;
        Ok(Pid::from_raw(text.trim().parse()?))
    }
}

impl Drop for RunFolders {
    fn drop(&mut self) {
        // A test that failed leaves none running.
        for entry in fs::read_dir(self.run.path()).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(name) = name.strip_prefix("record-").and_then(|name| name.strip_suffix(".pid")) {
                let _ = self.pid(name).map(|pid| kill(pid, Signal::SIGKILL));
            }
        }
    }
}

fn await_that(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !is_so()? {
        ensure!(begun.elapsed() < Duration::from_secs(20), "{what}");
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn is_read(file: &Path) -> Result<()> {
    let report = lines(&trace_cmd(&["report"], &[file])?);
    ensure!(report.len() > 10, "{} lines", report.len());
    Ok(())
}

#[test]
fn recording_is_started_seen_and_stopped_by_three_commands() -> Result<()> {
    let folders = RunFolders::new()?;
    folders.complains("stop", "", "nothing is recorded in the background", "vtrace start")?;
    ensure!(folders.works("status", "")?.contains("nothing is being recorded"), "status");
    let said = folders.works("start", "-o one.dat -e sched")?;
    let pid = folders.pid("host")?;
    let how = format!("vtrace stop host --dir {} ends it", folders.run.path().display());
    ensure!(said.contains(&format!("host: recording in the background, pid {pid}; {how}")), "{said}");

    folders.complains("start", "-o two.dat -e irq", &format!("runs already: pid {pid}"), "vtrace stop host")?;
    folders.works("start", "-o two.dat -e irq --session irqs")?;
    folders.complains("stop", "", "2 recordings are in the background", "vtrace stop NAME: host, irqs")?;
    folders.complains("stop", "third", "no recording of this name", "host, irqs")?;
    await_that(
        "counters are shown",
        || Ok(folders.status()?[0]["state"]["progress"]["machines"][0]["name"] == "host"),
    )?;
    let status = folders.works("status", "")?;
    ensure!(status.contains("host: recording ") && status.contains("irqs: recording "), "{status}");

    let summary: Value = serde_json::from_str(&folders.works("stop", "irqs --json")?)?;
    assert_eq!(summary["machines"][0]["name"], "host");
    let table = folders.works("stop", "")?;
    ensure!(table.contains("pages in") && table.contains("one.dat"), "{table}");
    is_read(&folders.files.path().join("one.dat"))?;
    assert_eq!(fs::read_dir(folders.run.path())?.count(), 0, "nothing is left in the run directory");
    ensure!(
        !Path::new(&format!("/proc/{pid}")).exists()
            || fs::read_to_string(format!("/proc/{pid}/stat"))?.contains(" Z ")
    );
    Ok(())
}

#[test]
fn recording_of_a_terminal_is_seen_by_its_user_alone_and_is_not_stopped_from_elsewhere() -> Result<()> {
    let folders = RunFolders::new()?;
    let mut command = Command::new(xtask::build::vtrace()?);
    command.args(["record", "-q", "-e", "sched", "--dir"]).arg(folders.run.path()).args(["--", "sleep", "4"]);
    let mut child = command.current_dir(folders.files.path()).spawn()?;
    await_that(
        "counters are shown",
        || Ok(folders.status()?[0]["state"]["progress"]["machines"][0]["name"] == "host"),
    )?;
    let pid = child.id();
    let seen = &folders.status()?[0];
    let state = &seen["state"];
    ensure!(seen["is_running"] == true && state["pid"] == pid && state["uid"] == 0, "{seen}");
    ensure!(state["is_foreground"] == true && state["progress"]["machines"][0]["name"] == "host", "{seen}");
    let said = folders.works("status", "")?;
    ensure!(
        said.contains("host: recording ") && said.contains(&format!("(pid {pid} of user 0, in the foreg")),
        "{said}"
    );
    let why = format!("host is recorded in the foreground, by process {pid} of user 0");
    folders.complains("stop", "", &why, &format!("kill -INT {pid}"))?;
    folders.complains("stop", "host", &why, "Ctrl-C where it runs")?;

    // Its name is free in the background; another user sees whose both are.
    folders.works("start", "-o other.dat -e irq")?;
    let said = as_other_user(&folders)?;
    ensure!(said.contains("host: belongs to user 0, who alone may see it"), "{said}");
    ensure!(said.contains("another recording: belongs to user 0") && said.lines().count() == 2, "{said}");
    ensure!(!said.contains("pages") && !said.contains(&pid.to_string()), "{said}");
    folders.works("stop", "")?;
    ensure!(child.wait()?.success());
    assert_eq!(fs::read_dir(folders.run.path())?.count(), 0, "nothing is left in the run directory");
    is_read(&folders.files.path().join("trace.dat"))
}

/// What `vtrace status` tells a user who is not root.
fn as_other_user(folders: &RunFolders) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("vtrace");
    fs::copy(xtask::build::vtrace()?, &program)?;
    for path in [folder.path(), &program, folders.run.path()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program).args(["status", "--dir"]);
    let output = command.arg(folders.run.path()).output()?;
    Ok(String::from_utf8(output.stdout)? + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn what_goes_wrong_before_the_recording_begins_is_said_where_it_was_typed() -> Result<()> {
    let folders = RunFolders::new()?;
    folders.complains("start", "-e no_such_event", "no event matches", "")?;
    folders.complains("start", "--dom guest1 -e sched", "no server at", "vtrace server")?;
    folders.complains(
        "record",
        "--daemonize -o missing/t.dat -e sched",
        "No such file or directory",
        "create the directory",
    )?;
    assert_eq!(fs::read_dir(folders.run.path())?.count(), 0, "nothing is left in the run directory");
    Ok(())
}

#[test]
fn recording_that_ended_by_itself_or_was_killed_has_left_word() -> Result<()> {
    let folders = RunFolders::new()?;
    folders.works("record", "--daemonize -e sched --timeout 1 -- sleep 100")?;
    let pid = folders.pid("host")?;
    let session = nix::unistd::getsid(Some(pid))?;
    assert_eq!(session, pid, "it has left our terminal");
    await_that("it ends by itself", || Ok(folders.status()?[0]["is_running"] == false))?;
    ensure!(folders.works("status", "")?.contains("host: ended with status 0"), "said");
    let said = folders.works("stop", "")?;
    ensure!(said.contains("host had already ended") && said.contains("pages in"), "{said}");

    folders.works("start", "-e sched")?;
    let pid = folders.pid("host")?;
    kill(pid, Signal::SIGKILL)?;
    await_that("it is dead", || Ok(folders.status()?[0]["is_running"] == false))?;
    let status = folders.works("status", "")?;
    let file = folders.files.path().join("trace.dat");
    ensure!(status.contains(&format!("host: killed (pid {pid}): vtrace restore {}", file.display())), "{status}");
    folders.complains("stop", "", &format!("pid {pid} was killed"), "vtrace restore")?;
    let restored = Command::new(xtask::build::vtrace()?).arg("restore").arg(&file).output()?;
    ensure!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    folders.works("start", "-e sched -o next.dat").context("its name is free again")?;
    folders.works("stop", "host")?;
    Ok(())
}
