//! Ends all processes that a host's commands have started, when the session ends.
//!
//! In:    a command that is about to be started; the end of a session
//! Out:   none of its processes exists any more
//! Runs:  on the control thread
//! Full:  without control groups, a command that forks faster than /proc can be read survives [`END_MAX`]; that is logged
//! Trust: nothing: a command may fork, leave its process group and its session (setsid), and ignore every signal but SIGKILL
//!
//! Where there is a cgroup v2 hierarchy with `cgroup.kill` (Linux 5.14) each command has a group of its own, which the
//! kernel ends at once. Elsewhere the agent is the subreaper of its descendants (PR_SET_CHILD_SUBREAPER): a process whose
//! parent has ended becomes its child, and is found in /proc. Neither reaches a process that another service starts at the
//! command's request (`systemd-run`, cron, a container runtime).

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        prctl::{get_child_subreaper, set_child_subreaper},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::sys::program;

/// How long processes may take to end after SIGKILL, and how often they are looked for.
const END_MAX: Duration = Duration::from_secs(2);
const END_LOOK: Duration = Duration::from_millis(2);

/// Makes this process the parent of descendants whose own parent has ended.
pub(super) fn adopt_orphans() {
    if let Err(errno) = set_child_subreaper(true) {
        log::warn!("processes that a command leaves may survive its session: prctl: {errno}");
    }
}

/// Ends every descendant of this process, if it adopts orphans. Only while it has no children that are to live.
pub(super) fn end_orphans() {
    if !get_child_subreaper().unwrap_or(false) {
        return;
    }
    let begun = Instant::now();
    loop {
        let descendants = descendants(std::process::id());
        for pid in &descendants {
            // One that has ended meanwhile is what was wanted.
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        reap();
        if descendants.is_empty() {
            return;
        }
        if begun.elapsed() > END_MAX {
            return log::warn!("{} processes of a command do not end", descendants.len());
        }
        sleep(END_LOOK);
    }
}

fn reap() {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return log::debug!("waitpid: {errno}"),
        }
    }
}

/// The processes below `root`, but for those that have ended and are not waited for.
fn descendants(root: u32) -> Vec<i32> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let stat = fs::read(entry.path().join("stat")).unwrap_or_default();
        if let Some(parent) = parent(&String::from_utf8_lossy(&stat)) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut waiting = vec![i32::try_from(root).expect("a process id")];
    while let Some(pid) = waiting.pop() {
        let below = children.remove(&pid).unwrap_or_default();
        found.extend(&below);
        waiting.extend(below);
    }
    found
}

/// The parent of a process that lives, from /proc/PID/stat: `pid (name) state parent …`; the name may hold anything.
fn parent(stat: &str) -> Option<i32> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    let state = fields.next()?;
    fields.next()?.parse().ok().filter(|_| state != "Z" && state != "X")
}

/// A control group for one command.
#[derive(Debug)]
pub(super) struct ControlGroup {
    directory: PathBuf,
}

impl ControlGroup {
    /// Makes a group below this process's own and lets `command` start in it; `None` where the kernel cannot.
    pub(super) fn make(command: &mut Command) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let name = format!("vtrace-agent-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = own_group(&mounts, &own)?.join(name);
        fs::create_dir(&directory).ok()?;
        let group = Self { directory };
        if !group.directory.join("cgroup.kill").exists() {
            return None; // before 5.14
        }
        let processes = OpenOptions::new().write(true).open(group.directory.join("cgroup.procs")).ok()?;
        program::enter_in(command, processes);
        Some(group)
    }

    fn end(&self) -> io::Result<()> {
        io::Write::write_all(&mut File::create(self.directory.join("cgroup.kill"))?, b"1")
    }
}

impl Drop for ControlGroup {
    /// Ends all processes of the group and removes it.
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::debug!("{}: {error}", self.directory.display());
        }
        let begun = Instant::now();
        while let Err(error) = fs::remove_dir(&self.directory) {
            if begun.elapsed() > END_MAX {
                return log::warn!("{} stays: {error}", self.directory.display());
            }
            sleep(END_LOOK);
        }
    }
}

/// The directory of a process's own group in the cgroup v2 hierarchy, from /proc/self/mounts and /proc/self/cgroup.
fn own_group(mounts: &str, own: &str) -> Option<PathBuf> {
    let mut fields = mounts.lines().map(|line| line.split(' '));
    let mount = fields.find_map(|mut fields| {
        let directory = fields.nth(1)?;
        (fields.next() == Some("cgroup2")).then_some(directory)
    })?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let is_below = !Path::new(path).components().any(|part| part.as_os_str() == "..");
    is_below.then(|| Path::new(mount).join(path))
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn group_is_found_below_the_mount_of_version_2() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let group = |own| own_group(mounts, own);
        assert_eq!(group("1:cpu:/x\n0::/a/b\n"), Some("/sys/fs/cgroup/unified/a/b".into()));
        assert_eq!(group("0::/\n"), Some("/sys/fs/cgroup/unified/".into()));
        assert_eq!((group("1:cpu:/x\n"), group("0::/../outside\n")), (None, None));
    }

    #[test]
    fn parent_is_read_after_a_name_that_holds_anything() {
        assert_eq!(parent("7 (a) S (b) 1) R 42 7 7"), Some(42));
        assert_eq!((parent("7 (a) Z 42 7"), parent("7 (a"), parent("")), (None, None, None));
    }

    #[test]
    fn descendant_in_a_session_of_its_own_is_found() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "setsid sleep 1000 & echo $!; wait"]).stdout(Stdio::piped());
        let mut child = shell.spawn().unwrap();
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
        let apart: i32 = line.trim().parse().unwrap();
        let found = descendants(child.id());
        kill(Pid::from_raw(apart), Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        assert_eq!(found, [apart]);
    }
}
