//! The host end of a port: a socket that QEMU connects to, or the FIFOs it has opened.
//!
//! In:    paths that `vtrace setup` chose
//! Out:   descriptors that bytes come out of and go into, and whose they are
//! Runs:  on the control thread and the worker's; nothing here waits
//! Full:  a second connection to a port waits until the first is gone
//! Trust: the folder: whoever may write there may be the guest's QEMU. All ports of a guest belong to one process while
//!        any is connected ([`Peers`]); FIFOs have no owner, the process that holds them is looked for in /proc

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
};

use nix::fcntl::{FcntlArg, fcntl};
use vtrace_common::ids::Cpu;

use crate::sys::{accept::accept as accept_connection, log_limit::PeerLog, socket::Peer};

/// What a FIFO holds, if the system allows it: fewer turns for QEMU and for us than with the usual 64 KiB.
const FIFO_BYTES: i32 = 256 << 10;

/// Where a port comes from.
#[derive(Debug)]
pub(crate) enum Port {
    /// QEMU connects here.
    Socket(UnixListener),
    /// QEMU reads one and writes the other.
    Fifos {
        /// To the guest.
        to_guest: PathBuf,
        /// From the guest.
        from_guest: PathBuf,
    },
}

/// A lane's port before anything has come over it.
#[derive(Debug)]
pub(crate) struct LanePort {
    /// CPU whose pages come over it.
    pub(crate) cpu: Cpu,
    /// Its socket or FIFOs.
    pub(crate) port: Port,
    /// Its path, for messages.
    pub(crate) path: String,
    /// Something is connected, or that cannot be known (FIFOs).
    pub(crate) is_there: Arc<AtomicBool>,
}

/// The process that has the ports of a guest. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Peers {
    known: Arc<Mutex<Known>>,
    log: Arc<PeerLog>,
}

#[derive(Debug, Default)]
struct Known {
    peer: Option<Peer>,
    ports: usize,
}

/// Counts one port of the admitted process until it is dropped.
#[derive(Debug)]
pub(crate) struct Admission {
    peers: Peers,
}

impl Peers {
    /// Of the guest of this name; it has no port yet.
    pub(crate) fn new(guest: &str) -> Self {
        Self { known: Arc::default(), log: Arc::new(PeerLog::new(guest)) }
    }

    /// Admits a port of `peer`, unless another process has ports of this guest.
    pub(crate) fn admit(&self, peer: Peer) -> Result<Admission, Peer> {
        let mut known = self.lock();
        match known.peer.filter(|_| known.ports > 0) {
            Some(other) if other != peer => return Err(other),
            _ => known.peer = Some(peer),
        }
        known.ports += 1;
        Ok(Admission { peers: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.peers.lock().ports -= 1;
    }
}

/// Accepts a connection: `None` if none waits, or if its process is not admitted.
pub(crate) fn accept(listener: &UnixListener, peers: &Peers) -> io::Result<Option<(OwnedFd, Peer, Admission)>> {
    let Some(socket) = accept_connection(listener)? else { return Ok(None) };
    let peer = Peer::of(&socket)?;
    socket.set_nonblocking(true)?;
    match peers.admit(peer) {
        Ok(admission) => Ok(Some((socket.into(), peer, admission))),
        Err(other) => {
            peers
                .log
                .warn(format_args!("pid {} is turned away: the other ports belong to pid {}", peer.pid, other.pid));
            Ok(None)
        }
    }
}

/// Opens the end of a FIFO that bytes of the guest come out of. Never waits for QEMU.
pub(crate) fn open_reader(path: &Path) -> io::Result<OwnedFd> {
    let file = fifo(path, OpenOptions::new().read(true))?;
    // Where the system's limit is lower it stays as it is.
    let _ = fcntl(&file, FcntlArg::F_SETPIPE_SZ(FIFO_BYTES));
    Ok(file.into())
}

/// Opens the end of a FIFO that bytes for the guest go into; `None` while no QEMU has the other.
pub(crate) fn open_writer(path: &Path) -> io::Result<Option<OwnedFd>> {
    match fifo(path, OpenOptions::new().write(true)) {
        Ok(file) => Ok(Some(file.into())),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

fn fifo(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file = options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOFOLLOW).open(path)?;
    if file.metadata()?.file_type().is_fifo() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a FIFO"))
    }
}

/// The process besides this one that has a FIFO open; its id is 0 if it cannot be seen.
pub(crate) fn holder(path: &Path) -> Peer {
    let unseen = Peer { pid: 0, uid: 0 };
    let Ok(wanted) = fs::metadata(path) else { return unseen };
    let Ok(processes) = fs::read_dir("/proc") else { return unseen };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let others = pids.filter(|pid: &u32| *pid != std::process::id());
    let has = |pid: &u32| {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        // By its name first: to look at what other descriptors lead to may take long.
        let named =
            |entry: &fs::DirEntry| fs::read_link(entry.path()).is_ok_and(|to| to.file_name() == path.file_name());
        let found = entries.flatten().filter(named).filter_map(|entry| fs::metadata(entry.path()).ok());
        found.into_iter().any(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
    };
    let found = others.into_iter().find(has);
    found.map_or(unseen, |pid| {
        let uid = fs::metadata(format!("/proc/{pid}")).map_or(0, |process| process.uid());
        Peer { pid, uid }
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn ports_of_a_guest_belong_to_one_process_until_all_are_gone() {
        let (peers, one, other) = (Peers::new("test"), Peer { pid: 7, uid: 0 }, Peer { pid: 8, uid: 0 });
        let admissions = [peers.admit(one).unwrap(), peers.admit(one).unwrap()];
        assert_eq!(peers.admit(other).unwrap_err(), one);
        let [first, second] = admissions;
        drop(first);
        assert_eq!(peers.admit(other).unwrap_err(), one);
        drop(second);
        peers.admit(other).unwrap();
    }

    #[test]
    fn fifo_is_opened_without_waiting_and_its_holder_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent-ctl-path.in");
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        assert!(open_writer(&path).unwrap().is_none(), "nothing reads it");
        let _reader = open_reader(&path).unwrap();
        assert!(open_writer(&path).unwrap().is_some());
        assert_eq!(holder(&path).pid, 0, "this process does not count");
        let script = format!("exec 3<>{}; echo; read line", path.display());
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]);
        let mut child = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        assert_eq!(holder(&path).pid, child.id());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn file_in_the_place_of_a_fifo_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.out");
        fs::write(&path, "").unwrap();
        assert!(open_reader(&path).is_err());
    }
}
