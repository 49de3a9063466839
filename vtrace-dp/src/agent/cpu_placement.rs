//! The CPUs that the agent itself runs on (`--agent-cpus`), such as housekeeping CPUs.
//!
//! In:    a list of CPUs
//! Out:   the affinity of the calling thread and of those it starts from now on
//! Runs:  once, before any other thread exists; [`CpuPlacement::with_inherited_cpus`] for each command of a host
//! Trust: the kernel

use nix::{
    errno::Errno,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use vtrace_common::ids::Cpu;

use crate::tracefs::{online_cpus, parse_cpus};

/// The calling thread.
const SELF: Pid = Pid::from_raw(0);

/// Why the agent cannot run on the CPUs of `--agent-cpus`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CpuPlacementFault {
    /// The text is not a list of CPUs.
    #[error("{0} is not a list of CPUs such as 0-3,8")]
    List(String),
    /// A CPU does not exist or is offline.
    #[error("{cpu} is not online (online are {online})")]
    Offline {
        /// The first such CPU.
        cpu: Cpu,
        /// The CPUs that are online.
        online: String,
    },
    /// The kernel refused: the CPUs are outside the cpuset of the agent's control group.
    #[error("CPUs {asked}")]
    Refused {
        /// The list.
        asked: String,
        /// What the kernel said.
        source: Errno,
    },
}

/// The agent's affinity, and the one it has inherited.
#[derive(Debug, Default)]
pub(super) struct CpuPlacement {
    /// Its own CPUs and the inherited ones; `None` without `--agent-cpus`.
    sets: Option<(CpuSet, CpuSet)>,
}

impl CpuPlacement {
    /// Binds the calling thread, and all it will start, to the CPUs of `list`, if there is one.
    ///
    /// # Errors
    /// [`CpuPlacementFault`]; then nothing has changed.
    pub(super) fn take(list: Option<&str>) -> Result<Self, CpuPlacementFault> {
        let Some(list) = list else { return Ok(Self::default()) };
        let cpus = parse_cpus(list).ok_or_else(|| CpuPlacementFault::List(list.into()))?;
        let online = online_cpus().unwrap_or_default();
        if let Some(cpu) = cpus.iter().find(|cpu| !online.contains(cpu)) {
            let online = online.iter().map(|cpu| cpu.0.to_string()).collect::<Vec<_>>().join(",");
            return Err(CpuPlacementFault::Offline { cpu: *cpu, online });
        }
        let refused = |source| CpuPlacementFault::Refused { asked: list.into(), source };
        let inherited = sched_getaffinity(SELF).map_err(refused)?;
        let mut own = CpuSet::new();
        for cpu in cpus {
            own.set(usize::try_from(cpu.0).expect("usize has at least 32 bits")).map_err(refused)?;
        }
        sched_setaffinity(SELF, &own).map_err(refused)?;
        Ok(Self { sets: Some((own, inherited)) })
    }

    /// Runs `start` on the inherited CPUs: for processes that are not part of the agent.
    pub(super) fn with_inherited_cpus<T>(&self, start: impl FnOnce() -> T) -> T {
        let Some((own, inherited)) = &self.sets else { return start() };
        // Fails if all of them have gone offline: the kernel has moved the thread then.
        let moved = sched_setaffinity(SELF, inherited);
        let started = start();
        if let Err(errno) = moved.and_then(|()| sched_setaffinity(SELF, own)) {
            log::warn!("cannot set the CPU affinity of the agent: {errno}");
        }
        started
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `work` on a thread of its own, so that other tests keep their affinity.
    fn apart<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(work).join().unwrap()
    }

    fn is_on(cpu: Cpu) -> bool {
        let set = sched_getaffinity(SELF).unwrap();
        let on: Vec<usize> = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap()).collect();
        on == [usize::try_from(cpu.0).unwrap()]
    }

    #[test]
    fn threads_started_later_are_where_the_agent_is_and_commands_are_not() {
        apart(|| {
            let before = sched_getaffinity(SELF).unwrap();
            let cpu = *online_cpus().unwrap().last().unwrap();
            let place = CpuPlacement::take(Some(&cpu.0.to_string())).unwrap();
            assert!(is_on(cpu));
            assert!(apart(move || is_on(cpu)));
            assert_eq!(place.with_inherited_cpus(|| apart(|| sched_getaffinity(SELF).unwrap())), before);
            assert!(is_on(cpu), "the agent itself has come back");
        });
    }

    #[test]
    fn agent_without_a_list_stays_where_it_is() {
        apart(|| {
            let before = sched_getaffinity(SELF).unwrap();
            CpuPlacement::take(None).unwrap().with_inherited_cpus(|| ());
            assert_eq!(sched_getaffinity(SELF).unwrap(), before);
        });
    }

    #[test]
    fn cpu_that_is_not_online_is_named_and_nothing_moves() {
        apart(|| {
            let before = sched_getaffinity(SELF).unwrap();
            let fault = CpuPlacement::take(Some("0,4000")).unwrap_err();
            assert!(fault.to_string().starts_with("cpu4000 is not online (online are 0"), "{fault}");
            assert_eq!(sched_getaffinity(SELF).unwrap(), before);
        });
    }

    #[test]
    fn list_that_is_none_is_refused() {
        for list in ["", "a", "3-1", "0-", "0,,1", "99999"] {
            assert_eq!(CpuPlacement::take(Some(list)).unwrap_err(), CpuPlacementFault::List(list.into()));
        }
    }
}
