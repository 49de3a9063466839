//! What a distribution installs, read by systemd's own tools; and a server that is started by its first client.

use std::{
    fs,
    os::unix::{fs::MetadataExt, net::UnixListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

fn dist() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../vtrace-dp/dist")
}

/// Ends what it holds.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn vtrace(words: &[&str]) -> Result<(bool, String)> {
    let output = Command::new(xtask::build::vtrace()?).args(words).output()?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

/// Units as they would be installed, but for the program's place.
#[test]
fn systemd_has_nothing_to_say_about_the_units() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let program = xtask::build::vtrace()?.display().to_string();
    let mut units = Vec::new();
    for entry in fs::read_dir(dist())? {
        let path = entry?.path();
        if matches!(path.extension().and_then(|extension| extension.to_str()), Some("service" | "socket")) {
            let unit = folder.path().join(path.file_name().context("a unit has a name")?);
            fs::write(
                &unit,
                fs::read_to_string(&path)?
                    .replace("/usr/bin/vtrace-agent", &program)
                    .replace("/usr/bin/vtrace", &program),
            )?;
            units.push(unit);
        }
    }
    ensure!(units.len() == 4, "{units:?}");
    let verify = |units: &[PathBuf]| -> Result<(bool, String)> {
        let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(units).output()?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let (is_right, said) = verify(&units)?;
    // Units of this machine that ours lead to are not ours to judge.
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("vtrace")).collect();
    ensure!(is_right && ours.is_empty(), "{said}");
    // The judge is awake: a wrong line is found.
    let wrong = folder.path().join("vtrace-wrong.service");
    fs::write(&wrong, "[Service]\nExecStart=/nowhere/vtrace\nLimitNOFILE=many\n")?;
    let (is_right, said) = verify(&[wrong])?;
    ensure!(!is_right || said.contains("vtrace-wrong"), "systemd-analyze finds nothing wrong: {said}");
    Ok(())
}

#[test]
fn folders_and_group_are_made_as_the_server_wants_them() -> Result<()> {
    let root = tempfile::tempdir()?;
    fs::create_dir(root.path().join("etc"))?;
    let run = |program: &str, option: &str, file: &str| -> Result<()> {
        let output =
            Command::new(program).arg(option).arg("--root").arg(root.path()).arg(dist().join(file)).output()?;
        ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    run("systemd-sysusers", "--no-pager", "vtrace.sysusers.conf")?;
    let groups = fs::read_to_string(root.path().join("etc/group"))?;
    let group = groups.lines().find_map(|line| line.strip_prefix("vtrace:")).context("a group vtrace")?;
    let id: u32 = group.split(':').nth(1).context("a group has a number")?.parse()?;
    run("systemd-tmpfiles", "--create", "vtrace.tmpfiles.conf")?;
    for folder in ["run/vtrace", "var/lib/vtrace/virt"] {
        let found = fs::metadata(root.path().join(folder))?;
        assert_eq!((found.mode() & 0o7777, found.uid(), found.gid()), (0o755, 0, id), "{folder}");
    }
    Ok(())
}

/// udevadm can check rules from systemd 254 on.
#[test]
fn udev_rule_starts_the_agent_for_the_control_port_and_for_no_other() -> Result<()> {
    let rule = fs::read_to_string(dist().join("70-vtrace.rules"))?;
    let lines: Vec<&str> = rule.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
    let [line] = lines[..] else { anyhow::bail!("one rule: {rule}") };
    let name = format!("ATTR{{name}}==\"{}\"", vtrace_dp::device::lane_range::CONTROL_PORT_NAME);
    ensure!(line.starts_with("SUBSYSTEM==\"virtio-ports\", ") && line.contains(&name), "{line}");
    ensure!(line.contains("vtrace-agent.service") && dist().join("vtrace-agent.service").exists(), "{line}");
    let judged = Command::new("udevadm").args(["verify", "--root=/"]).arg(dist().join("70-vtrace.rules")).output();
    match judged {
        Ok(output) if !String::from_utf8_lossy(&output.stderr).contains("nknown command") => {
            ensure!(output.status.success(), "udevadm: {}", String::from_utf8_lossy(&output.stderr));
        }
        _ => println!("no udevadm here that verifies rules"),
    }
    Ok(())
}

#[test]
fn server_is_started_by_its_first_client_through_the_socket_of_systemd() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path().to_str().context("a temporary folder's name is text")?;
    let (control, guest) = (format!("{dir}/control.sock"), format!("{dir}/guest1.sock"));
    let log = fs::File::create(folder.path().join("log"))?;
    let mut activate = Command::new("systemd-socket-activate");
    activate.arg("-l").arg(&control).arg("-l").arg(&guest).arg(xtask::build::vtrace()?);
    activate.args(["server", "--dom", "guest1", "--dom", "guest2", "--dir", dir]).stderr(log);
    let _server = Ended(activate.stdin(Stdio::null()).spawn()?);
    let begun = Instant::now();
    while !Path::new(&guest).exists() {
        ensure!(begun.elapsed() < Duration::from_secs(10), "systemd-socket-activate listens");
        sleep(Duration::from_millis(10));
    }
    ensure!(!folder.path().join("guest2.sock").exists(), "no client has asked yet");
    let inode = fs::metadata(&control)?.ino();
    let (is_there, said) = vtrace(&["list", "--dir", dir])?;
    ensure!(is_there && said.contains("guest1:") && said.contains("guest2:"), "{said}");
    assert_eq!(fs::metadata(&control)?.ino(), inode, "the socket is the one that was passed");
    ensure!(folder.path().join("guest2.sock").exists(), "what was not passed is made");
    let said = fs::read_to_string(folder.path().join("log"))?;
    ensure!(said.contains("guest1.sock: taken over as it is"), "{said}");
    Ok(())
}

#[test]
fn socket_that_is_not_of_this_server_is_refused_and_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path().to_str().context("a temporary folder's name is text")?;
    let stray = format!("{dir}/guest9.sock");
    let mut activate = Command::new("systemd-socket-activate");
    activate
        .args(["--now", "-l", &stray])
        .arg(xtask::build::vtrace()?)
        .args(["server", "--dom", "guest1", "--dir", dir]);
    let supports_now = Command::new("systemd-socket-activate").arg("--help").output()?;
    if !String::from_utf8_lossy(&supports_now.stdout).contains("--now") {
        // Older ones wait for a client: that is us.
        activate = Command::new("systemd-socket-activate");
        activate.args(["-l", &stray]).arg(xtask::build::vtrace()?).args(["server", "--dom", "guest1", "--dir", dir]);
    }
    let child = activate.stderr(Stdio::piped()).stdin(Stdio::null()).spawn()?;
    let begun = Instant::now();
    while std::os::unix::net::UnixStream::connect(&stray).is_err() && begun.elapsed() < Duration::from_secs(10) {
        sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("guest9.sock is neither the clients' nor a guest's"), "{said}");
    ensure!(said.contains("each guest by --dom"), "{said}");
    ensure!(UnixListener::bind(folder.path().join("control.sock")).is_ok(), "nothing is left");
    Ok(())
}
