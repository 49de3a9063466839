//! What makes figures of this moment doubtful.
//!
//! In:    /proc
//! Out:   a line for each thing that is not as it should be
//! Runs:  before a run and after it

use std::fs;

/// Programs that take whole CPUs and are often forgotten.
const BUSY: [&str; 8] = ["rustc", "cargo", "cc1", "ld", "lld", "rust-lld", "qemu-system-x86", "ld-linux-x86-64"];
/// Memory that must be free for pages of measured files.
const FREE_MB_MIN: u64 = 6 << 10;

/// Why figures made now should not be trusted, as far as can be seen.
pub(crate) fn doubts() -> Vec<String> {
    let mut doubts = Vec::new();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let minute: f64 = load.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    if minute > 0.5 {
        doubts
            .push(format!("load average {} (1, 5, 15 minutes)", load.split(' ').take(3).collect::<Vec<_>>().join(" ")));
    }
    let running = running();
    if !running.is_empty() {
        doubts.push(format!("other programs run: {}", running.join(", ")));
    }
    if let Some(free_mb) = free_mb().filter(|free| *free < FREE_MB_MIN) {
        doubts.push(format!("{free_mb} MiB of memory are free"));
    }
    if cfg!(debug_assertions) {
        doubts.push("this is a debug build: say --release".into());
    }
    doubts
}

/// Names of busy programs, each once, with how many there are. The cargo that started us is one of ours.
fn running() -> Vec<String> {
    let parent = nix::unistd::getppid().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbered = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let others = numbered.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()) && *name != parent);
    let names: Vec<String> = others
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok())
        .map(|name| name.trim_end().to_owned())
        .collect();
    let count = |wanted: &&str| names.iter().filter(|name| name == wanted).count();
    BUSY.iter().map(|name| (count(name), name)).filter(|(n, _)| *n > 0).map(|(n, name)| format!("{n} {name}")).collect()
}

fn free_mb() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().split(' ').next()?.parse::<u64>().ok()? / 1024)
}
