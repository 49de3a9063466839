//! Real-time priority for the calling thread.
//!
//! In:    a priority of SCHED_FIFO
//! Out:   the thread runs before every ordinary one, and so do threads that it starts from then on
//! Runs:  on the caller's thread, which alone is changed
//! Trust: the kernel
#![expect(unsafe_code, reason = "nix has no sched_setscheduler")]

use nix::{errno::Errno, libc};

use super::SysError;

/// Gives the calling thread SCHED_FIFO with `priority`, 1 to 99. Its processes' children do not inherit more than the
/// kernel lets them: the limit is RLIMIT_RTPRIO, or CAP_SYS_NICE.
///
/// # Errors
/// `EPERM` without the privilege (or in a cgroup without real-time budget), `EINVAL` for another priority.
pub fn run_in_real_time(priority: u8) -> Result<(), SysError> {
    let parameters = libc::sched_param { sched_priority: i32::from(priority) };
    // SAFETY: 0 is the calling thread; the kernel reads the one structure during the call and keeps no address.
    let answer = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
    Errno::result(answer).map(|_| ()).map_err(SysError::of("sched_setscheduler"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priority_that_does_not_exist_is_refused() {
        for priority in [0, 100] {
            assert_eq!(run_in_real_time(priority).unwrap_err().errno, Errno::EINVAL, "{priority}");
        }
    }
}
