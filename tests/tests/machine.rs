//! The virtual machines that other tests stand on: each kernel boots, obeys its shell, reboots, is killed.

use anyhow::{Result, ensure};
use serde_json::json;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::time::Duration;
use xtask::kernel::Kernel;
use xtask::machine::{Chardev, Machine, turn};
use xtask::qemu::Release;

fn boots_and_obeys(kernel: Kernel) -> Result<()> {
    let turn = turn()?;
    let machine = Machine::builder(&turn, kernel).cpus(2).boot()?;
    assert_eq!(machine.shell("uname -r")?.ok()?, kernel.unpack()?.release);
    assert_eq!(machine.shell("nproc")?.ok()?, "2");
    Ok(())
}

#[test]
fn kernel_6_1_boots_and_obeys() -> Result<()> {
    boots_and_obeys(Kernel::V6_1)
}

#[test]
fn kernel_6_12_boots_and_obeys() -> Result<()> {
    boots_and_obeys(Kernel::V6_12)
}

#[test]
fn newest_kernel_boots_and_obeys() -> Result<()> {
    boots_and_obeys(Kernel::Newest)
}

#[test]
fn shell_tells_status_and_keeps_every_byte() -> Result<()> {
    let turn = turn()?;
    let machine = Machine::builder(&turn, Kernel::V6_12).boot()?;
    let failed = machine.shell("echo out; echo err >&2; exit 7")?;
    assert_eq!((failed.status, failed.text().as_str()), (7, "out\nerr"));
    assert_eq!(machine.shell("echo 'unclosed")?.status, 2, "a syntax error is the command's own");
    assert_eq!(machine.shell("echo '@@answer 3 0 0'")?.text(), "@@answer 3 0 0");

    let bytes: Vec<u8> = (0..=255).cycle().take(100_001).collect();
    machine.put(&bytes, "/tmp/every byte")?;
    assert_eq!(machine.get("/tmp/every byte")?, bytes);

    machine.shell("(sleep 0.3; echo late; echo done >/tmp/flag) & echo early")?.ok()?;
    assert_eq!(machine.shell("while [ ! -f /tmp/flag ]; do sleep 0.1; done; echo now")?.text(), "now");

    let error = machine.shell_within("sleep 2", Duration::from_millis(300)).unwrap_err();
    assert!(format!("{error:#}").contains("no answer in time"), "{error:#}");
    assert_eq!(machine.shell("echo after")?.text(), "after", "a late answer is passed over");
    Ok(())
}

#[test]
fn machine_stops_resets_and_powers_off() -> Result<()> {
    let turn = turn()?;
    let machine = Machine::builder(&turn, Kernel::V6_12).reboots().run_script("echo from the run script").boot()?;
    assert!(machine.console().contains("from the run script"), "{}", machine.console());

    machine.qmp("stop", &json!(null))?;
    assert!(machine.shell_within("true", Duration::from_millis(300)).is_err(), "a stopped guest does not answer");
    machine.qmp("cont", &json!(null))?;
    machine.shell("touch /tmp/gone-after-reset")?.ok()?;
    machine.reset()?;
    assert_eq!(machine.shell("ls /tmp/gone-after-reset")?.status, 1);
    assert!(machine.qmp("no-such-command", &json!({})).is_err());
    machine.qmp("quit", &json!(null))?;
    assert!(machine.await_end(Duration::from_secs(10))?.success());
    Ok(())
}

#[test]
fn guest_that_stands_still_says_where() -> Result<()> {
    let turn = turn()?;
    let machine = Machine::builder(&turn, Kernel::V6_1).cpus(2).boot()?;
    machine.shell("sleep 1000 </dev/null >/dev/null 2>&1 &")?.ok()?;
    let said = machine.hang_report();
    for word in ["thread CPU 1/TCG: ", "RIP=", "CPU#1", "Kernel panic", "task:sleep", "NMI backtrace for cpu 1"] {
        ensure!(said.contains(word), "{word}: {said}");
    }
    Ok(())
}

#[test]
fn stock_ports_of_the_oldest_qemu_reach_the_host() -> Result<()> {
    let turn = turn()?;
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("port.sock");
    let listener = UnixListener::bind(&socket)?;
    let file = dir.path().join("port.out");
    let ports = [("agent-ctl-path", Chardev::Connect(socket)), ("trace-path-cpu0", Chardev::File(file.clone()))];
    let machine = Machine::builder(&turn, Kernel::V6_1).qemu(Release::Oldest).without_agent().stock_ports(&ports);
    let machine = machine.boot()?;
    let _peer = listener.accept()?;
    assert_eq!(machine.shell("cat /sys/class/virtio-ports/*/name")?.text(), "agent-ctl-path\ntrace-path-cpu0");
    machine.shell("for port in /sys/class/virtio-ports/*; do grep -q trace $port/name && echo page >/dev/${port##*/}; done; true")?.ok()?;
    assert_eq!(std::fs::read(&file)?, b"page\n");
    Ok(())
}

#[test]
fn guest_that_cannot_boot_is_explained() -> Result<()> {
    let turn = turn()?;
    let error = Machine::builder(&turn, Kernel::V6_12).append("rdinit=/missing").boot().unwrap_err();
    assert!(format!("{error:#}").contains("panic"), "{error:#}");
    let error = Machine::builder(&turn, Kernel::V6_12).arguments(&["-device", "no-such"]).boot().unwrap_err();
    assert!(format!("{error:#}").contains("no-such"), "{error:#}");
    Ok(())
}

#[test]
fn newest_qemu_takes_the_vhost_user_device() -> Result<()> {
    let turn = turn()?;
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("guest1.sock");
    let listener = UnixListener::bind(&socket)?;
    let peer = std::thread::spawn(move || -> std::io::Result<[u8; 4]> {
        let mut request = [0; 4];
        listener.accept()?.0.read_exact(&mut request)?;
        Ok(request)
    });
    let error = Machine::builder(&turn, Kernel::V6_12).vhost_user(&socket).start().unwrap_err();
    assert_eq!(u32::from_le_bytes(peer.join().unwrap()?), 1, "VHOST_USER_GET_FEATURES");
    assert!(format!("{error:#}").contains("vhost"), "{error:#}");
    Ok(())
}
