//! The Debian packages of `cargo xtask dist`, installed in a clean Debian: alone, and booted with systemd.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use xtask::{debian::bare::BareRoot, dist};

/// What a small Debian server has.
const PACKAGES: [&str; 5] = ["dbus", "man-db", "systemd", "systemd-sysv", "udev"];
/// Bytes of a package and of its program: 7.8 MB when this was written, 54 MB with debug information.
const PROGRAM_BYTES_MAX: u64 = 16_000_000;

/// Runs in the booted container once all units are up; leaves what it saw in /out, and ends the container.
const PROBE: &str = "\
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=-/bin/sh -x /out/probe.sh
ExecStopPost=systemctl --no-block poweroff
StandardOutput=file:/out/output
StandardError=file:/out/errors
[Install]
WantedBy=multi-user.target
";
const PROBE_SCRIPT: &str = "\
dpkg -i /out/*.deb
groupadd alice
echo 'VTRACE_GUESTS=--dom guest1' > /etc/vtrace/server.conf
echo 'VTRACE_GUESTS=--dom guest2' > /etc/vtrace/server@alice.conf
systemctl enable --now vtrace-server.socket
vtrace list > /out/list 2>&1
systemctl is-active vtrace-server.service > /out/server
systemctl enable --now vtrace-server@alice
systemctl is-active vtrace-server@alice > /out/alice
sleep 1
vtrace list --dir /run/vtrace/alice > /out/list-alice 2>&1
stat -c '%G %a' /run/vtrace/control.sock /run/vtrace/alice > /out/groups
vtrace doctor > /out/doctor 2>&1
echo $? > /out/doctor-status
systemctl status --no-pager 'vtrace*' > /out/status
dpkg --purge vtrace vtrace-agent
systemctl is-active vtrace-server.service > /out/server-after
true
";

fn succeeded(output: &Output) -> Result<String> {
    let text = String::from_utf8_lossy(&[&*output.stdout, &*output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "{}: {text}", output.status);
    Ok(text)
}

/// The two packages in a folder of their own.
fn packages(folder: &Path) -> Result<dist::Files> {
    let files = dist::make()?;
    for package in [&files.host, &files.guest] {
        fs::copy(package, folder.join(package.file_name().context("a file has a name")?))?;
    }
    Ok(files)
}

#[test]
fn packages_install_and_leave_nothing_when_they_are_purged() -> Result<()> {
    let (folder, room) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let files = packages(folder.path())?;
    ensure!(fs::metadata(&files.program)?.len() < PROGRAM_BYTES_MAX, "the program is stripped");
    let root = BareRoot::with("packages", &PACKAGES)?;
    let script = "\
        cd \"$0\"; find / -xdev -name '*vtrace*' | sort > before; dpkg -i ./*.deb; vtrace --version; vtrace-agent --version
        getent group vtrace; test -d /var/lib/vtrace/virt; test -d /etc/vtrace
        man -w vtrace-record; bash -c '. /usr/share/bash-completion/completions/vtrace; complete -p vtrace'
        systemd-analyze verify --man=no vtrace-server.service vtrace-server@a.service vtrace-agent.service
        dpkg --verify vtrace vtrace-agent
        vtrace doctor || test $? = 1
        dpkg --purge vtrace vtrace-agent; rm -r /run/vtrace /var/lib/vtrace
        find / -xdev -name '*vtrace*' | sort > after; cmp before after";
    let mut command = root.command(room.path(), &[folder.path()], Path::new("/"), "sh");
    let said = succeeded(&command.args(["-ex", "-c", script]).arg(folder.path()).output()?)?;
    ensure!(said.contains("vtrace 0.") && said.contains("/usr/share/man/man1/vtrace-record.1.gz"), "{said}");
    Ok(())
}

#[test]
fn server_of_the_package_starts_with_its_first_client_under_systemd() -> Result<()> {
    xtask::packages::ensure(&["systemd-container"])?;
    let folder = tempfile::tempdir()?;
    packages(folder.path())?;
    fs::write(folder.path().join("probe.sh"), PROBE_SCRIPT)?;
    let root = BareRoot::with("packages", &PACKAGES)?;
    let unit = folder.path().join("probe.service");
    fs::write(&unit, PROBE)?;
    let mut container = Command::new("systemd-nspawn");
    container.args(["--quiet", "--register=no", "--keep-unit", "--volatile=overlay", "--console=pipe", "--directory"]);
    container.arg(root.path()).arg(format!("--bind={}:/out", folder.path().display()));
    container.arg(format!("--bind-ro={}:/etc/systemd/system/probe.service", unit.display()));
    container.args(["--boot", "systemd.wants=probe.service"]).stdin(std::process::Stdio::null());
    let output = container.output().context("cannot run systemd-nspawn")?;
    let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap_or_default();
    let log = format!("{}{}", read("errors"), String::from_utf8_lossy(&output.stderr));
    ensure!(read("server").trim() == "active" && read("alice").trim() == "active", "{log}\n{}", read("status"));
    ensure!(read("list").contains("guest1:"), "{}\n{log}", read("list"));
    ensure!(read("list-alice").contains("guest2:") && !read("list-alice").contains("guest1"), "{}", read("list-alice"));
    assert_eq!(read("groups"), "vtrace 660\nalice 755\n");
    ensure!(["0", "1"].contains(&read("doctor-status").trim()), "doctor: {}", read("doctor"));
    ensure!(read("doctor").contains("guest1"), "{}", read("doctor"));
    ensure!(read("server-after").trim() == "inactive", "{log}");
    Ok(())
}
