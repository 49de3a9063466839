//! The guest side: `vtrace agent`.
//!
//! | file | what happens |
//! |---|---|
//! | [`port`] | finds ports by name, opens them, waits for them |
//! | [`link`] | messages over the control port |
//! | [`control`] | the control loop |
//! | [`session`] | the states of a session: pure |
//! | [`machine`] | describes this guest to the host |
//! | [`policy`] | what the guest's owner allows |
//! | [`cpu_placement`] | the CPUs that the agent runs on |
//! | [`armed`] | what a session owns |
//! | [`late_cpus`] | lanes of CPUs that come online during a session |
//! | [`command`] | the commands that a host runs here |
//! | [`process_tree`] | ends all processes that a command has started |
//! | [`pump`] | the threads that move pages, and what they wait in |
//! | [`lane_io`] | one lane's descriptors: tap ─► pipe ─► port, splice(2) |
//! | [`lane`] | one lane's states and counts: pure |
//!
//! In:    requests of one host over `agent-ctl-path`
//! Out:   pages of every CPU over `trace-path-cpuN`; answers
//! Runs:  control on the main thread; the pump on threads of its own, one for every few lanes
//! Full:  a slow host blocks the ports; the ring buffers overwrite and count
//! Trust: the kernel; the host may ask anything, in any order, and gets an answer or a refusal
//!
//! Depends on `sys`, `tracefs` and `vtrace-common` only, and needs nothing of a C library at run time that a static
//! one lacks. Works from Linux 5.10 on, with io_uring or without it.

mod armed;
mod command;
mod control;
mod cpu_placement;
mod lane;
mod lane_io;
mod late_cpus;
mod link;
mod machine;
pub mod policy;
mod port;
mod process_tree;
mod pump;
mod session;
#[cfg(feature = "testing")]
pub mod testing;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};
use vtrace_common::{ids::Cpu, limits::LANES_MAX};

use self::cpu_placement::CpuPlacement;
pub use self::cpu_placement::CpuPlacementFault;
use crate::{
    sys::{SysError, limit::allow_descriptors, oom, signal::unblock_in, wait::readable},
    tracefs::{Tracefs, online_cpus, possible_cpus},
};
use control::{Control, ControlEnd, ControlOptions};
use policy::Policy;
use port::{FoundPort, HeldPorts, SerialPorts, Uevents};
use process_tree::adopt_orphans;

/// How long to wait for data ports after the control port has appeared.
const LANES_WAIT: Duration = Duration::from_millis(500);

/// How long a killed process may hold the control port, and the interval between attempts to open it.
const DYING_MAX: Duration = Duration::from_secs(3);
const DYING_LOOK: Duration = Duration::from_millis(50);

/// Descriptors of one lane: tap, port (twice), pipe and copy.
const LANE_DESCRIPTORS: u64 = 6;
/// Its other descriptors.
const OTHER_DESCRIPTORS: u64 = 64;

/// The agent's own score when memory runs out (proc_pid_oom_score_adj(5)): among the last to be ended.
const SCORE: i16 = -900;

/// How to run an agent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AgentConfig {
    /// Name of the control port.
    pub control_port: String,
    /// Prefix of the names of data ports; the CPU's number follows.
    pub lane_port_prefix: String,
    /// End after one session instead of waiting for the next host.
    pub once: bool,
    /// Verification: each page is copied to `DIR/cpuN.raw` before it goes to its port. If its sha256 differs from that of
    /// what the host received, pages were lost. Costs as much as sending.
    pub tee: Option<PathBuf>,
    /// Verification: trace even where the driver has no VIRTIO_RING_F_INDIRECT_DESC. Pages are lost, and counted.
    pub without_indirect: bool,
    /// The file with the owner's rules, which has to exist; if `None`, `/etc/vtrace/agent.toml`, which need not.
    pub policy: Option<PathBuf>,
    /// The programs that a host may run; replaces the file's list.
    pub exec: Option<policy::Exec>,
    /// The CPUs that the agent itself runs on (`0-3,8`); its commands run on those it inherits.
    pub cpus: Option<String>,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            control_port: "agent-ctl-path".into(),
            lane_port_prefix: "trace-path-cpu".into(),
            once: false,
            tee: None,
            without_indirect: false,
            policy: None,
            exec: None,
            cpus: None,
        }
    }
}

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Another process has the control port open.
    #[error("control port {name} is in use: another agent runs in this guest{}", holder.map_or(String::new(), |pid| format!(", process {pid}")))]
    Busy {
        /// The port's name.
        name: String,
        /// The process that has it open, if this user may see it.
        holder: Option<u32>,
    },
    /// The control port cannot be opened.
    #[error("control port {name}")]
    Port {
        /// The port's name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The owner's rules cannot be read.
    #[error(transparent)]
    Policy(#[from] policy::PolicyFault),
    /// The CPUs of `--agent-cpus` cannot be used.
    #[error("--agent-cpus")]
    CpuPlacement(#[from] CpuPlacementFault),
    /// A system call that every Linux has failed.
    #[error(transparent)]
    System(#[from] SysError),
}

/// Serves hosts until SIGTERM or SIGINT (both are blocked in the calling thread from now on), or one session with
/// `once`. Nothing is left in tracefs.
///
/// # Errors
/// [`AgentError`]. A host that disconnects and a port that is unplugged are not errors.
pub fn run(config: AgentConfig) -> Result<(), AgentError> {
    let place = CpuPlacement::take(config.cpus.as_deref())?;
    let quit = signals()?;
    let news = Uevents::listen()?;
    let cpus = possible_cpus().map_or(0, |cpus| u64::try_from(cpus.len().min(LANES_MAX)).unwrap_or(u64::MAX));
    if let Err(error) = allow_descriptors(cpus.saturating_mul(LANE_DESCRIPTORS).saturating_add(OTHER_DESCRIPTORS)) {
        log::warn!("the limit of open files may be too low for {cpus} CPUs: {error}");
    }
    let ports = SerialPorts {
        class: "/sys/class/virtio-ports".into(),
        nodes: "/dev".into(),
        control: config.control_port,
        lane_prefix: config.lane_port_prefix,
        held: HeldPorts::default(),
    };
    let policy = Policy::load(config.policy, config.exec)?;
    // An agent that the OOM killer ends leaves its ring buffers, and frees no memory.
    if let Err(error) = oom::set_score(SCORE) {
        log::debug!("cannot set oom_score_adj: {error}");
    }
    adopt_orphans();
    let AgentConfig { tee, once, without_indirect, .. } = config;
    let options = ControlOptions { tee, once, without_indirect, policy, place };
    while let Some(port) = open_control(&ports, &news, &quit)? {
        // Only the agent that has the control port open may clean up: another agent's instance is in use.
        // After a port was unplugged, too: an instance that was busy then is still there.
        remove_stale();
        match Control::new(port, &ports, &options, quit.as_fd())?.serve()? {
            ControlEnd::Unplugged => {}
            ControlEnd::Asked | ControlEnd::Served => break,
        }
    }
    Ok(())
}

fn signals() -> Result<SignalFd, SysError> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block().map_err(SysError::of("sigprocmask"))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(SysError::of("signalfd"))
}

/// Waits for the control port and opens it; `None` when asked to quit.
fn open_control(ports: &SerialPorts, news: &Uevents, quit: &SignalFd) -> Result<Option<OwnedFd>, AgentError> {
    let mut is_logged = false;
    let dead_by = Instant::now() + DYING_MAX;
    loop {
        match ports.control().map_or(Ok(None), |found| try_open(ports, &found)) {
            Ok(Some(port)) => return Ok(await_lanes(ports, news, quit)?.then_some(port)),
            Err(AgentError::Busy { .. }) if Instant::now() < dead_by => {
                if !await_news(news, quit, Some(Instant::now() + DYING_LOOK))? {
                    return Ok(None);
                }
                continue;
            }
            outcome => _ = outcome?,
        }
        if !std::mem::replace(&mut is_logged, true) {
            load_drivers();
            log::info!(
                "waiting for control port {}; if there is no {}: modprobe virtio_pci virtio_console",
                ports.control,
                ports.class.display()
            );
            continue;
        }
        if !await_news(news, quit, None)? {
            return Ok(None);
        }
    }
}

/// Loads the drivers of virtio ports, if this kernel has them as modules and they are not loaded.
fn load_drivers() {
    if Path::new("/sys/bus/virtio/drivers/virtio_console").exists() {
        return;
    }
    for module in ["virtio_pci", "virtio_console"] {
        let mut command = Command::new("modprobe");
        unblock_in(command.arg(module).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()));
        match command.status() {
            Ok(status) if status.success() => log::info!("modprobe {module}"),
            outcome => log::debug!("modprobe {module}: {outcome:?}"),
        }
    }
}

/// `None` when the port goes away while it is being opened.
fn try_open(ports: &SerialPorts, found: &FoundPort) -> Result<Option<OwnedFd>, AgentError> {
    match ports.open_control(found) {
        Ok(port) => Ok(Some(port)),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EBUSY | Errno::EMFILE) => {
                Err(AgentError::Busy { name: found.name.clone(), holder: ports.holder(found) })
            }
            Some(Errno::ENODEV | Errno::ENXIO | Errno::ENOENT) => Ok(None),
            _ => Err(AgentError::Port { name: found.name.clone(), source: error }),
        },
    }
}

/// Waits up to [`LANES_WAIT`] until every CPU has its port: they appear one by one. False when asked to quit.
fn await_lanes(ports: &SerialPorts, news: &Uevents, quit: &SignalFd) -> Result<bool, SysError> {
    let cpus = online_cpus().unwrap_or_default();
    let until = Instant::now() + LANES_WAIT;
    let complete = |lanes: Vec<Cpu>| cpus.iter().all(|cpu| lanes.contains(cpu));
    while !complete(ports.lanes().cpus()) && Instant::now() < until {
        if !await_news(news, quit, Some(until))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Sleeps until a virtio port has changed, or until `until`. False when asked to quit.
fn await_news(news: &Uevents, quit: &SignalFd, until: Option<Instant>) -> Result<bool, SysError> {
    let mut ready = Vec::new();
    loop {
        if news.take() {
            return Ok(true);
        }
        let limit = until.map(|until| until.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        readable(&[news.as_fd(), quit.as_fd()], limit, &mut ready)?;
        if ready.is_empty() || ready.contains(&1) {
            return Ok(ready.is_empty());
        }
    }
}

/// Removes the instances of an agent that was killed. Without tracefs there are none; arming a session reports that.
fn remove_stale() {
    let removed = Tracefs::find_or_mount().map(|tracefs| tracefs.remove_ours()).unwrap_or(0);
    if removed > 0 {
        log::warn!("removed {removed} tracefs instance(s) of a killed agent or an unplugged port");
    }
}
