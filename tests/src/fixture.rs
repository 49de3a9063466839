//! What most tests start from: a server, the guests it serves, and a folder to record in.

use std::path::Path;

use anyhow::{Result, ensure};
use tempfile::TempDir;
use xtask::{
    kernel::Kernel,
    machine::{Machine, Turn, turn},
};

use crate::{
    recording::{Recorder, Recording},
    server::Server,
};

/// The guest of most tests.
pub const GUEST: &str = "guest1";
/// A task that sleeps and wakes.
const LOAD: &str = "(while :; do sleep 0.01; done) </dev/null >/dev/null 2>&1 &";

/// A server, started for guests that are not booted yet.
#[derive(Debug)]
pub struct Fixture {
    /// The server.
    pub server: Server,
    folder: TempDir,
    turn: Turn,
}

impl Fixture {
    /// Waits for its turn, and starts a server for `guests`.
    pub fn of(guests: &[&str]) -> Result<Self> {
        let (turn, folder) = (turn()?, tempfile::tempdir()?);
        Ok(Self { server: Server::start(guests)?, folder, turn })
    }

    /// One of its guests under load, its agent ready.
    pub fn boot(&self, guest: &str, cpus: u32) -> Result<Machine> {
        let socket = self.server.socket(guest);
        let machine = Machine::builder(&self.turn, Kernel::V6_12).cpus(cpus).vhost_user(&socket).boot()?;
        self.server.await_agent(guest)?;
        machine.shell(LOAD)?.ok()?;
        Ok(machine)
    }

    /// Records into its folder.
    pub fn recorder(&self) -> Recorder<'_> {
        self.recorder_in(self.folder.path())
    }

    /// Records into another folder.
    pub fn recorder_in<'a>(&'a self, folder: &'a Path) -> Recorder<'a> {
        Recorder { server: self.server.dir(), folder }
    }

    /// Records [`GUEST`] with these options until pages arrive, then runs `breaking`. The recording fails with `why` in its
    /// remarks, and its file is complete.
    pub fn broken(
        &self,
        options: &str,
        breaking: impl FnOnce() -> Result<()>,
        why: impl AsRef<str>,
    ) -> Result<Recording> {
        let recorder = self.recorder();
        let child = recorder.start(&format!("--dom {GUEST} {options} -- sleep 1000"))?;
        self.server.await_pages(GUEST, 1)?;
        breaking()?;
        let recording = recorder.finish(child)?;
        ensure!(recording.status == 1, "status {}: {}", recording.status, recording.said);
        ensure!(recording.remarks(GUEST)?.contains(why.as_ref()), "{:#}", recording.summary);
        recording.whole(GUEST)
    }
}
