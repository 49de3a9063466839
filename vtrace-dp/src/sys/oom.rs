//! How soon the kernel ends this process when memory runs out (proc_pid_oom_score_adj(5)).
//!
//! In:    a score from -1000 (never) to 1000
//! Out:   the score before
//! Trust: the kernel; without the right to lower the score it stays

#![expect(unsafe_code, reason = "pre_exec: a child inherits the score")]

use std::{fs, io, os::unix::process::CommandExt, process::Command};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

/// Sets this process's score; returns what it was.
pub fn set_score(score: i16) -> io::Result<i16> {
    let path = "/proc/self/oom_score_adj";
    let before = fs::read_to_string(path)?;
    let before = before.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    fs::write(path, score.to_string())?;
    Ok(before)
}

/// Gives `command` this score instead of the one it inherits.
pub fn set_score_in(command: &mut Command, score: i16) {
    let text = score.to_string();
    let set = move || -> io::Result<()> {
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let file = open(c"/proc/self/oom_score_adj", flags, Mode::empty())?;
        nix::unistd::write(&file, text.as_bytes())?;
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are an open(2), a write(2) and a
    // close(2) on texts that were made before. Nothing else can touch the child's score.
    let _ = unsafe { command.pre_exec(set) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_does_not_inherit_the_score() {
        let own = set_score(fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim().parse().unwrap()).unwrap();
        let mut command = Command::new("cat");
        set_score_in(command.arg("/proc/self/oom_score_adj"), own.max(0) + 7);
        let output = command.output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), (own.max(0) + 7).to_string());
    }
}
