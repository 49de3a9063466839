//! `vtrace doctor`: what this machine and its guests have of what a recording needs.
//!
//! | file | what |
//! |---|---|
//! | [`machine`] | kernel, tracefs, clock, KVM, QEMU |
//! | [`server`] | run directory, sockets, server, guests, agents |
//! | [`vmm`] | a guest's QEMU as it runs |
//! | [`disk`] | how fast pages can be written, and for how long |
//!
//! In:    files of the kernel, the run directory, a server's answers, a file that is written and removed
//! Out:   a [`Finding`] for each check: what is there, whether it will do, what to do
//! Runs:  on the caller's thread; nothing is changed but that file
//! Full:  each check ends in seconds
//! Trust: the kernel; a server's answers and QMP's are checked as always; of the words of QEMU's program only numbers and
//!        one name are taken
//!
//! A check reads below the roots in [`Place`], so each can be shown a machine where it has to complain.

pub mod disk;
pub mod machine;
pub mod server;
pub mod vmm;

use std::{
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

/// How a check came out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It will do.
    Ok,
    /// A recording is possible, and something about it is worse or cannot be had.
    Warn,
    /// A recording is not possible.
    Fail,
}

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: String,
    /// How it came out.
    pub verdict: Verdict,
    /// What is there.
    pub found: String,
    /// What to do about it; empty if nothing has to be done.
    pub remedy: String,
}

impl Finding {
    fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Ok, found: found.into(), remedy: String::new() }
    }

    fn warn(check: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Warn, found: found.into(), remedy: remedy.into() }
    }

    fn fail(check: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Fail, found: found.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        write!(f, "{verdict:<5}{:<14} {}", self.check, self.found)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "\n{:20}→ {}", "", self.remedy) }
    }
}

/// Where a machine shows what it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// /proc
    pub proc: PathBuf,
    /// /sys
    pub sys: PathBuf,
    /// /dev
    pub dev: PathBuf,
    /// /etc/group
    pub groups: PathBuf,
    /// Where programs are looked for.
    pub path: OsString,
}

impl Place {
    /// This machine.
    pub fn here() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let [proc, sys, dev, groups] = ["/proc", "/sys", "/dev", "/etc/group"].map(PathBuf::from);
        Self { proc, sys, dev, groups, path }
    }
}

/// A short file's text without its end of line.
fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end().to_owned())
}

/// The worst of them.
pub fn worst(findings: &[Finding]) -> Verdict {
    findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
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
        assert_eq!(worst(&[]), Verdict::Ok);
        assert_eq!(worst(&[ok.clone(), warn.clone(), ok.clone()]), Verdict::Warn);
        assert_eq!(worst(&[Finding::fail("c", "", ""), warn, ok]), Verdict::Fail);
    }
}
