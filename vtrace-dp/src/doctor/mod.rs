//! `vtrace doctor`: checks what recording needs on this machine and in its guests.
//!
//! | file | what |
//! |---|---|
//! | [`machine`] | kernel, tracefs, clock, KVM, QEMU |
//! | [`server`] | run directory, sockets, server, guests, agents |
//! | [`vmm`] | a guest's running QEMU |
//! | [`disk`] | write speed and free space |
//! | [`remedy`] | advice, shared with the errors of other verbs |
//!
//! In:    files of the kernel, the run directory, answers of the server and of QMP, a temporary file
//! Out:   a [`Finding`] for each check
//! Runs:  on the caller's thread; each check ends in seconds; nothing is changed except the temporary file
//! Trust: the kernel; answers of the server and of QMP are bounded and checked
//!
//! A check reads only paths below [`SystemPaths`], so that tests can present any machine.

pub mod disk;
pub mod machine;
pub mod remedy;
pub mod server;
pub mod vmm;

use std::{
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

/// Result of a check.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// No problem.
    Ok,
    /// Recording is possible, with a limitation.
    Warn,
    /// Recording is not possible.
    Fail,
}

/// A check and its result.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// Name of the check, or of the guest.
    pub check: String,
    /// Result.
    pub verdict: Severity,
    /// What was found.
    pub found: String,
    /// Advice; empty for [`Severity::Ok`].
    pub remedy: String,
}

impl Finding {
    fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Severity::Ok, found: found.into(), remedy: String::new() }
    }

    fn warn(check: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Severity::Warn, found: found.into(), remedy: remedy.into() }
    }

    fn fail(check: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Severity::Fail, found: found.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Severity::Ok => "ok",
            Severity::Warn => "warn",
            Severity::Fail => "FAIL",
        };
        write!(f, "{verdict:<5}{:<14} {}", self.check, self.found)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "\n{:20}→ {}", "", self.remedy) }
    }
}

/// Where a machine's properties are read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SystemPaths {
    /// /proc
    pub proc: PathBuf,
    /// /sys
    pub sys: PathBuf,
    /// /dev
    pub dev: PathBuf,
    /// /etc/group
    pub groups: PathBuf,
    /// Search path of programs.
    pub path: OsString,
}

impl SystemPaths {
    /// The paths of this machine.
    pub fn of_this_machine() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let [proc, sys, dev, groups] = ["/proc", "/sys", "/dev", "/etc/group"].map(PathBuf::from);
        Self { proc, sys, dev, groups, path }
    }
}

/// Text of a short file without its end of line.
fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end().to_owned())
}

/// The worst result.
pub fn worst(findings: &[Finding]) -> Severity {
    findings.iter().map(|finding| finding.verdict).max().unwrap_or(Severity::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finding_is_one_line_and_its_remedy_another() {
        assert_eq!(Finding::ok("kernel", "Linux 6.18").to_string(), "ok   kernel         Linux 6.18");
        let text = Finding::fail("tracefs", "not mounted", "mount it").to_string();
        assert_eq!(text, "FAIL tracefs        not mounted\n                    → mount it");
    }

    #[test]
    fn worst_finding_counts() {
        let (ok, warn) = (Finding::ok("a", ""), Finding::warn("b", "", ""));
        assert_eq!(worst(&[]), Severity::Ok);
        assert_eq!(worst(&[ok.clone(), warn.clone(), ok.clone()]), Severity::Warn);
        assert_eq!(worst(&[Finding::fail("c", "", ""), warn, ok]), Severity::Fail);
    }
}
