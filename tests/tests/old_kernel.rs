//! The oldest kernel that is recorded: bullseye's 5.10.

use anyhow::{Result, ensure};
use vtrace_tests::{
    guest::is_clear,
    judge::{lines, trace_cmd},
    recording::Recorder,
    server::Server,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
};

const GUEST: &str = "guest1";

#[test]
fn guest_of_5_10_is_recorded_whole_and_what_it_lacks_is_said() -> Result<()> {
    let (turn, folder) = (turn()?, tempfile::tempdir()?);
    let server = Server::start(&[GUEST])?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let machine = Machine::builder(&turn, Kernel::V5_10).vhost_user(&server.socket(GUEST)).boot()?;
    server.await_agent(GUEST)?;
    let busy = "(i=0; while [ $i -lt 400 ]; do /bin/true; i=$((i+1)); done) </dev/null >/dev/null 2>&1 &";
    machine.shell(busy)?.ok()?;
    let recording = recorder.run(&format!("-e irq --dom {GUEST} -e sched -e syscalls -- sleep 3"))?.ok()?;
    assert_eq!(recording.sum(GUEST, "pages_lost")?, 0, "{:#}", recording.summary);
    let report = lines(&trace_cmd(&["report"], &[&recording.file(GUEST)])?);
    let events = recording.sum(GUEST, "events")?;
    ensure!(events > 1000 && u64::try_from(report.len())? == events, "{} lines, {events} events", report.len());

    // Sub-buffers have one size there, and the kernel says nothing of it.
    let refused = recorder.run(&format!("--dom {GUEST} -e sched --subbuf-size 64 -- true"))?;
    ensure!(refused.status == 1 && refused.said.contains("sub"), "{}", refused.said);
    let functions = recorder.run(&format!("--dom {GUEST} -p function -l vfs_* -- sleep 1"))?.ok()?;
    ensure!(functions.sum(GUEST, "events")? > 0, "{:#}", functions.summary);
    is_clear(&machine)
}
