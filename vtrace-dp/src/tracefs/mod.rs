//! tracefs: mounts it, makes instances with events and taps, and describes the machine.
//!
//! In:    an [`Arm`]: clock, events, buffer size
//! Out:   an [`Instance`] (taps, switch, marker, stats) and pieces of description; or a [`Failure`] that names the object
//! Runs:  on the caller's thread; every call may block on the kernel, none on another program
//! Full:  descriptions come in pieces of `limits::PIECE_BYTES_MAX`; command lines end at `limits::CMDLINES_BYTES_MAX`
//! Trust: the kernel; names inside our instances. The top buffer is written to only where an instance cannot do it
//!        ([`top`]), and is restored
//!
//! Works from Linux 5.10 on (`buffer_percent` is older, larger sub-buffers are newer and optional).

mod cpus;
mod describe;
mod events;
mod expressions;
mod instance;
mod markers;
mod pattern;
mod pieces;
mod setting_watch;
mod settings;
pub mod stats;
mod symbols;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod top;

use std::{
    fs,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{TRACEFS_MAGIC, statfs},
};
use vtrace_common::{
    ids::Cpu,
    limits::{NEAR_MAX, PIECE_BYTES_MAX, TEXT_BYTES_MAX},
    wire::agent::{Arm, EventRequest, Failure, FailureKind, OfferPiece, Offered},
};

pub use cpus::{online_cpus, parse_cpus, possible_cpus};
pub use instance::{BUFFER_PERCENT, Instance};

/// The file with a buffer's clock.
pub const TRACE_CLOCK: &str = "trace_clock";

/// Prefix of the names of our instances; a process id follows, then anything.
pub const INSTANCE_PREFIX: &str = "vtrace-";

/// A longer name is not compared with others: the cost of a distance is the product of both lengths.
const RANKED_BYTES_MAX: usize = 128;

const READ_BYTES: usize = 16 << 10;

const MOUNT_POINTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// A mounted tracefs.
#[derive(Debug)]
pub struct Tracefs {
    root: PathBuf,
}

/// An open `trace_pipe_raw`.
///
/// A page that was spliced out of it is returned to its ring buffer when it leaves the last pipe, but holds no reference to
/// that buffer: if the instance was removed before, the kernel writes to freed memory and kills the thread that read the
/// pipe (kernel/trace/trace.c `buffer_ref_release()`; seen on 6.18). So pipes are emptied or closed first. A virtio port
/// copies; a FIFO or a pipe as a port holds the pages until they are read.
#[derive(Debug)]
pub struct Tap {
    /// The CPU of its ring buffer.
    pub cpu: Cpu,
    /// Non-blocking.
    pub fd: OwnedFd,
}

impl Tracefs {
    /// Finds tracefs at one of its usual places, or mounts it at the first.
    ///
    /// # Errors
    /// `NoTracefs` when it is not mounted and cannot be (no CONFIG_FTRACE, no privilege).
    pub fn find_or_mount() -> Result<Self, Failure> {
        let is_tracefs = |path: &&str| statfs(*path).is_ok_and(|found| found.filesystem_type() == TRACEFS_MAGIC);
        let root = match MOUNT_POINTS.iter().copied().find(is_tracefs) {
            Some(root) => root,
            None => mount(Some("tracefs"), MOUNT_POINTS[0], Some("tracefs"), MsFlags::empty(), None::<&str>)
                .map(|()| MOUNT_POINTS[0])
                .map_err(|errno| failure(FailureKind::NoTracefs, MOUNT_POINTS[0], errno.desc()))?,
        };
        let mut entries =
            fs::read_dir(root).map_err(|error| failure(FailureKind::NoTracefs, root, &error.to_string()))?;
        if entries.next().is_none() {
            let cause = lockdown().map_or("is empty".into(), |mode| format!("is empty: kernel lockdown ({mode})"));
            return Err(failure(FailureKind::NoTracefs, root, &format!("{root} {cause}")));
        }
        Ok(Self { root: root.into() })
    }

    /// Its mount point.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The clocks, tracers and events of this kernel, in pieces.
    ///
    /// # Errors
    /// `Kernel`
    pub fn offer(&self, each: &mut dyn FnMut(OfferPiece)) -> Result<(), Failure> {
        let files = [
            (Offered::Clocks, "trace_clock"),
            (Offered::Tracers, "available_tracers"),
            (Offered::Events, "available_events"),
        ];
        for (offered, file) in files {
            let text = read(&self.root.join(file))?;
            let mut pieces = text.as_bytes().chunks(PIECE_BYTES_MAX);
            // An empty text has one piece, too.
            let mut piece = pieces.next().unwrap_or_default();
            loop {
                let next = pieces.next();
                each(OfferPiece { offered, bytes: piece.to_vec(), last: next.is_none() });
                match next {
                    Some(next) => piece = next,
                    None => break,
                }
            }
        }
        Ok(())
    }

    /// The same request without the events that match `denied` patterns.
    ///
    /// # Errors
    /// `NotAllowed` when a request matches denied events only; `Kernel`
    pub fn without_denied(&self, mut arm: Arm, denied: &[String]) -> Result<Arm, Failure> {
        let available = events::Events::parse(&read(&self.root.join("available_events"))?);
        events::leave_out(&available, &mut arm.events, denied)?;
        Ok(arm)
    }

    /// How many events of this kernel match a request.
    ///
    /// # Errors
    /// `NoSuchEvent` when there are none; `Kernel`
    pub fn count_events(&self, request: &EventRequest) -> Result<u64, Failure> {
        let available = events::Events::parse(&read(&self.root.join("available_events"))?);
        let count = available.choose(std::slice::from_ref(request))?.count();
        Ok(u64::try_from(count).unwrap_or(u64::MAX))
    }

    /// Removes instances whose owner (the process id in the name) is dead. Returns how many were removed.
    pub fn remove_stale(&self) -> usize {
        self.remove_instances(|owner| owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()))
    }

    /// Removes every instance with our prefix: for a guest, whose one agent owns them all. One whose tap is open in a living
    /// process stays. Returns how many were removed.
    pub fn remove_ours(&self) -> usize {
        self.remove_instances(|_| true)
    }

    fn remove_instances(&self, wanted: impl Fn(Option<u32>) -> bool) -> usize {
        let Ok(entries) = fs::read_dir(self.root.join("instances")) else { return 0 };
        let stale = entries.flatten().filter(|entry| {
            let name = entry.file_name();
            name.to_str().and_then(|name| name.strip_prefix(INSTANCE_PREFIX)).is_some_and(|rest| wanted(owner(rest)))
        });
        let remove = |entry: &fs::DirEntry| {
            // Its owner died while it had the top buffer.
            if entry.file_name().to_string_lossy().ends_with(top::MARK) {
                expressions::clear(&self.root);
                top::reset(&self.root);
                let _ = write(&self.root.join("tracing_on"), "1");
            }
            instance::remove_directory(&entry.path()).is_ok()
        };
        stale.filter(remove).count()
    }
}

/// Adds this process to those that are traced in `buffer` (an instance's directory, or the root).
///
/// # Errors
/// `Kernel`
pub fn join(buffer: &Path) -> Result<(), Failure> {
    settings::add_process(buffer, std::process::id())
}

/// The process id that follows the prefix.
fn owner(rest: &str) -> Option<u32> {
    let end = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// A failure with texts cut to their bounds.
fn failure(kind: FailureKind, object: &str, detail: &str) -> Failure {
    Failure { kind, object: shortened(object), detail: shortened(detail), near: Vec::new() }
}

/// The failure for an errno of a file in tracefs.
fn refused(path: &Path, error: &io::Error) -> Failure {
    let kind = if error.raw_os_error() == Some(nix::libc::ENOMEM) { FailureKind::Memory } else { FailureKind::Kernel };
    let is_forbidden = matches!(error.raw_os_error(), Some(nix::libc::EPERM | nix::libc::EACCES));
    let detail = match lockdown().filter(|_| is_forbidden) {
        Some(mode) => format!("{error}: kernel lockdown ({mode})"),
        None => error.to_string(),
    };
    failure(kind, &path.to_string_lossy(), &detail)
}

/// The mode of the kernel's lockdown (kernel_lockdown(7)), if it is on.
fn lockdown() -> Option<String> {
    locked_down(&fs::read_to_string("/sys/kernel/security/lockdown").ok()?)
}

/// The mode in brackets, of `none [integrity] confidentiality`.
fn locked_down(text: &str) -> Option<String> {
    let (mode, _) = text.split_once('[')?.1.split_once(']')?;
    (mode != "none").then(|| mode.into())
}

fn shortened(text: &str) -> String {
    text[..text.floor_char_boundary(TEXT_BYTES_MAX)].into()
}

/// A whole file. Its first read asks for [`READ_BYTES`]: some files of tracefs (events/header_page) return everything to
/// the first read and nothing to a second, and std's first read of a file of unknown size asks for 32 bytes.
fn read(path: &Path) -> Result<String, Failure> {
    let mut bytes = Vec::with_capacity(READ_BYTES);
    let read = fs::File::open(path).and_then(|mut file| file.read_to_end(&mut bytes));
    read.map(|_| String::from_utf8_lossy(&bytes).into_owned()).map_err(|error| refused(path, &error))
}

/// Writes without creating or truncating: a missing file means that the kernel does not have the feature.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let written = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()));
    written.map_err(|error| refused(path, &error))
}

/// The names that look most like `wanted`, nearest first, at most [`NEAR_MAX`].
fn nearest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>, distance_max: usize) -> Vec<String> {
    if wanted.len() > RANKED_BYTES_MAX {
        return Vec::new();
    }
    let mut ranked: Vec<(usize, &str)> = names
        .map(|name| (strsim::osa_distance(wanted, name), name))
        .filter(|(distance, _)| *distance <= distance_max)
        .collect();
    ranked.sort_unstable();
    ranked.dedup();
    ranked.into_iter().take(NEAR_MAX).map(|(_, name)| name.into()).collect()
}

#[cfg(test)]
mod tests;
