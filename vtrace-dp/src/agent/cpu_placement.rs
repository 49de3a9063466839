//! The CPUs the agent itself runs on: housekeeping ones, where others are to be left alone.
//!
//! In:    a list of CPUs, as `--agent-cpus` names them
//! Out:   the calling thread and those it starts from now on run there
//! Runs:  once, before any other thread exists; [`CpuPlacement::with_inherited_cpus`] for each command of a host
//! Full:  does not apply
//! Trust: the kernel: which CPUs are online

use nix::{
    errno::Errno,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use vtrace_common::ids::Cpu;

use crate::tracefs::{online_cpus, parse_cpus};

/// The calling thread.
const SELF: Pid = Pid::from_raw(0);

/// Why the agent cannot run where it was told to.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CpuPlacementFault {
    /// No list of CPUs.
    #[error("{0} is no list of CPUs such as 0-3,8")]
    List(String),
    /// Not there, or offline.
    #[error("{cpu} is not online (online are {online})")]
    Offline {
        /// Which.
        cpu: Cpu,
        /// Those that are.
        online: String,
    },
    /// Outside the cpuset of the agent's control group, or more than the C library's set can name.
    #[error("CPUs {asked}")]
    Refused {
        /// Which.
        asked: String,
        /// Why.
        source: Errno,
    },
}

/// Where the agent runs, and where it would have run.
#[derive(Debug, Default)]
pub(super) struct CpuPlacement {
    /// Its own CPUs and those it has inherited; none when it stays where it is.
    sets: Option<(CpuSet, CpuSet)>,
}

impl CpuPlacement {
    /// Moves the calling thread, and all it will start, to the CPUs of `list`; without one nothing moves.
    ///
    /// # Errors
    /// [`CpuPlacementFault`]; then nothing has moved.
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

    /// Runs `start` where the agent would run by itself: what it starts is no part of the agent.
    pub(super) fn with_inherited_cpus<T>(&self, start: impl FnOnce() -> T) -> T {
        let Some((own, inherited)) = &self.sets else { return start() };
        // CPUs may have gone offline meanwhile: then the kernel has moved the thread itself, and it stays there.
        let moved = sched_setaffinity(SELF, inherited);
        let started = start();
        if let Err(errno) = moved.and_then(|()| sched_setaffinity(SELF, own)) {
            log::warn!("the agent's CPUs: {errno}");
        }
        started
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a thread of its own: a test that fails leaves no other one on fewer CPUs.
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
