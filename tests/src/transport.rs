//! A guest whose ports come over QEMU's own device, as `vtrace setup` makes and prints it.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};

/// Runs `vtrace setup` for a guest with folders in `root`; gives the words it prints for QEMU.
pub fn set_up(root: &Path, guest: &str, words: &str) -> Result<Vec<String>> {
    let said = print(root, guest, words)?;
    // As a shell reads them: each value one word, the ends of lines joined.
    let output = Command::new("sh").args(["-c", &format!("printf '%s\\n' {}", said.trim_end())]).output()?;
    ensure!(output.status.success(), "what setup prints is no command line: {said}");
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

/// Runs `vtrace setup`; gives what it prints.
pub fn print(root: &Path, guest: &str, words: &str) -> Result<String> {
    let mut command = Command::new(xtask::build::vtrace()?);
    command.args(["setup", "--dom", guest, "--root"]).arg(root).args(words.split_whitespace());
    let output = command.output().context("cannot run vtrace setup")?;
    ensure!(output.status.success(), "vtrace setup: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
