//! The report on a guest that hangs: the state of QEMU's threads and CPUs, and the stacks of all tasks, which its kernel
//! prints when an NMI makes it panic.
//!
//! In: QMP and the console of the guest. Out: text for an error. Runs: in the caller's thread, about ten seconds.

use super::qmp::Qmp;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Kernel parameters that [`of`] needs: an unknown NMI panics the kernel, which then prints the stacks of all tasks (bit 0)
/// and of all CPUs (bit 6; Documentation/admin-guide/kernel-parameters.txt).
pub(super) const PARAMETERS: &str = "unknown_nmi_panic panic_print=0x41";

const ANSWER_MAX: Duration = Duration::from_secs(5);
const SAMPLES: usize = 3;
/// The kernel prints its stacks over an emulated serial port.
const PANIC_PRINT_MAX: Duration = Duration::from_secs(20);

/// Samples QEMU, then panics the guest. `pid` is QEMU's process.
pub(super) fn of(qmp: &mut Qmp, pid: u32, console: &Path) -> String {
    let mut said = threads(pid);
    said += &format!("QEMU says: {:?}\n", qmp.execute("query-status", &Value::Null, ANSWER_MAX));
    for _ in 0..SAMPLES {
        let registers = json!({ "command-line": "info registers -a" });
        match qmp.execute("human-monitor-command", &registers, ANSWER_MAX) {
            Ok(registers) => said.extend(places(registers.as_str().unwrap_or_default())),
            Err(error) => said += &format!("no registers: {error:#}\n"),
        }
        sleep(Duration::from_millis(300));
    }
    if let Err(error) = qmp.execute("inject-nmi", &Value::Null, ANSWER_MAX) {
        said += &format!("no NMI: {error:#}\n");
    }
    await_silence(console);
    said
}

/// State, wait channel and system call of each thread of a process (proc(5): stat, wchan, syscall).
fn threads(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().filter_map(Result::ok);
    let line = |task: fs::DirEntry| {
        let word = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default().trim().to_owned();
        let stat = word("stat");
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('?');
        format!("thread {}: {state}, in {}, system call {}\n", word("comm"), word("wchan"), word("syscall"))
    };
    tasks.map(line).collect()
}

/// The lines with a CPU's number, instruction pointer and fault address.
fn places(registers: &str) -> impl Iterator<Item = String> {
    let names = |line: &&str| ["CPU#", "RIP=", "CR2="].iter().any(|name| line.starts_with(name));
    registers.lines().filter(names).map(|line| format!("{}\n", line.trim_end()))
}

/// Waits until nothing has come to the console for two seconds.
fn await_silence(console: &Path) {
    let size = || fs::metadata(console).map_or(0, |metadata| metadata.len());
    let (end, mut last, mut since) = (Instant::now() + PANIC_PRINT_MAX, size(), Instant::now());
    while Instant::now() < end && since.elapsed() < Duration::from_secs(2) {
        sleep(Duration::from_millis(100));
        if size() != last {
            (last, since) = (size(), Instant::now());
        }
    }
}
