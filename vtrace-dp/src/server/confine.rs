//! What the server keeps of its rights once its sockets are there: it opens nothing any more.
//!
//! In:    the folders of its sockets, whom to become
//! Out:   a process that can serve what is connected, and no more; a line in the log that says how far that went
//! Runs:  once, before the first thread is started
//! Trust: the kernel. What it cannot do is said with the reason, and the server serves all the same
//!
//! Guests, VMMs and clients send bytes that this process reads. If one of them exploits a bug, it can do this and no
//! more: write to the files that clients have given for what is recorded just then, and stop the server.
//! Beyond these calls there is what io_uring does without them (kernel 5.6 and later): paths stay out of its reach by
//! Landlock, where the kernel has it.

use std::{collections::BTreeSet, path::Path};

use nix::{libc, unistd::geteuid};

use crate::sys::{
    account::{self, Account},
    confine::{Call, ConfineFault, Only, Reach, become_user, drop_capabilities, keep_calls, keep_folders},
};

/// The user that a server started by root becomes if no other is given, and if there is such a user.
pub const USER: &str = "vtrace";

/// Which user a server becomes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Confinement {
    /// [`USER`] if there is one, else whoever started it; without rights in either case.
    #[default]
    Usual,
    /// This user; there has to be one.
    As(String),
    /// Whoever started it, with all rights: to look for mistakes.
    None,
}

/// What a server opens once its sockets are there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Opens {
    /// Nothing: its guests have devices of ours.
    #[default]
    Nothing,
    /// /dev/null, where unwanted bytes of streams go.
    Nowhere,
    /// FIFOs, again and again, and their owners' folders in /proc, which takes a right of its own.
    Fifos,
}

/// Why a server cannot be confined as asked.
#[derive(Debug, thiserror::Error)]
pub enum ConfinementFault {
    /// There is no such user.
    #[error("there is no user {0:?}")]
    NoUser(String),
    /// Only root can become another user.
    #[error("only root can become {0:?}")]
    NotRoot(String),
}

/// Calls whose arguments do not matter: they act on what is open.
const PLAIN: [libc::c_long; 52] = [
    // Sockets: devices, clients. None is made any more.
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_getsockopt,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    // Files and rings: pages, events, the log.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_close,
    libc::SYS_pipe2,
    libc::SYS_splice,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Of a path they tell that it is there: sockets are removed by the inode they were made with.
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    // The file system of a guest's memory file.
    libc::SYS_fstatfs,
    // Memory: guests', our own.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_getrandom,
    // Threads.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What signals take: the C library starts threads with it and tells of its own mistakes.
const SIGNALS: [libc::c_long; 3] = [libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn];

/// Calls that are allowed in some cases: no memory that is run, no new process, no signal to others.
const NARROW: [Call; 8] = [
    Call { number: libc::SYS_mmap, only: Only::Bits(2, libc::PROT_EXEC.unsigned_abs(), 0) },
    Call { number: libc::SYS_mprotect, only: Only::Bits(2, libc::PROT_EXEC.unsigned_abs(), 0) },
    Call { number: libc::SYS_clone, only: Only::Bits(0, THREAD, THREAD) },
    Call { number: libc::SYS_prctl, only: Only::One(0, &[libc::PR_SET_NAME.unsigned_abs()]) },
    Call { number: libc::SYS_fcntl, only: Only::One(1, &DESCRIPTOR_COMMANDS) },
    // FIONBIO and FIONREAD (asm-generic/ioctls.h): what comes, and not to wait for it.
    Call { number: libc::SYS_ioctl, only: Only::One(1, &[0x5421, 0x541b]) },
    Call { number: libc::SYS_tgkill, only: Only::Ourselves },
    // A pair without a name for each VMM: its checked requests go through it to the `vhost` crate.
    Call { number: libc::SYS_socketpair, only: Only::One(0, &[libc::AF_UNIX.unsigned_abs()]) },
];

const THREAD: u32 = libc::CLONE_THREAD.unsigned_abs();
const DESCRIPTOR_COMMANDS: [u32; 8] = [
    libc::F_DUPFD_CLOEXEC.unsigned_abs(),
    libc::F_GETFD.unsigned_abs(),
    libc::F_SETFD.unsigned_abs(),
    libc::F_GETFL.unsigned_abs(),
    libc::F_SETFL.unsigned_abs(),
    libc::F_SETPIPE_SZ.unsigned_abs(),
    libc::F_GETPIPE_SZ.unsigned_abs(),
    libc::F_GET_SEALS.unsigned_abs(),
];

/// Removes a socket. No filter can see which path: only where Landlock sees it.
const REMOVE: Call = Call { number: libc::SYS_unlink, only: Only::Any };

/// Opens a file, and looks for a FIFO's owner.
const OPEN: Call = Call { number: libc::SYS_openat, only: Only::Any };
const LOOK: [libc::c_long; 3] = [libc::SYS_getdents64, libc::SYS_readlink, libc::SYS_readlinkat];

/// Gives up what serving does not take, for this thread and those it starts. `sockets` are removed at the end.
///
/// # Errors
/// [`ConfinementFault`]: it cannot become the user that was asked for.
pub(super) fn enter<'a>(
    how: &Confinement,
    opens: Opens,
    sockets: impl IntoIterator<Item = &'a Path>,
) -> Result<(), ConfinementFault> {
    if *how == Confinement::None {
        log::warn!("not confined, as asked for: this process keeps all its rights");
        return Ok(());
    }
    let account = whom(how)?;
    let mut given_up = GivenUp::default();
    if let Some((name, account)) = account.filter(|_| opens < Opens::Fifos || *how != Confinement::Usual) {
        given_up.step(&format!("every user but {name} (uid {})", account.uid), become_user(account));
    }
    let mut calls: Vec<Call> = NARROW.to_vec();
    if opens == Opens::Fifos {
        log::warn!(
            "not given up: user, capabilities and paths: FIFOs are opened again, their owners looked for in /proc"
        );
        calls.extend(LOOK.map(|number| Call { number, only: Only::Any }).into_iter().chain([OPEN, REMOVE]));
    } else {
        given_up.step("capabilities", drop_capabilities());
        let removes = given_up.paths(opens, sockets);
        calls.extend(removes.then_some(REMOVE));
        calls.extend((opens == Opens::Nowhere).then_some(OPEN));
    }
    calls.extend(PLAIN.iter().chain(&SIGNALS).map(|number| Call { number: *number, only: Only::Any }));
    given_up.step("all system calls but a few", keep_calls(calls));
    log::info!("given up: {}", given_up.0.join(", "));
    Ok(())
}

/// What was given up so far.
#[derive(Default)]
struct GivenUp(Vec<String>);

impl GivenUp {
    fn step(&mut self, what: &str, done: Result<(), ConfineFault>) {
        match done {
            Ok(()) => self.0.push(what.to_owned()),
            Err(fault) => log::warn!("not given up: {what}: {fault}"),
        }
    }

    /// All paths but those of `sockets`, which are removed at the end; whether that came about.
    fn paths<'a>(&mut self, opens: Opens, sockets: impl IntoIterator<Item = &'a Path>) -> bool {
        let folders: BTreeSet<&Path> = sockets.into_iter().filter_map(Path::parent).collect();
        // Without a folder in front the socket is where we are.
        let folders: Vec<_> = folders.into_iter().map(|path| if path == "" { Path::new(".") } else { path }).collect();
        let written: &[&Path] = if opens == Opens::Nowhere { &[Path::new("/dev/null")] } else { &[] };
        let reach = keep_folders(&folders, written);
        let kept = reach.is_ok();
        match reach {
            Ok(Reach::Whole) => self.step("paths and addresses", Ok(())),
            Ok(Reach::Part) => self.step("paths, as far as this kernel knows (6.12 knows all)", Ok(())),
            Err(fault) => self.step("paths and addresses", Err(fault)),
        }
        kept
    }
}

/// Whom to become, if anybody.
fn whom(how: &Confinement) -> Result<Option<(&str, Account)>, ConfinementFault> {
    let is_root = geteuid().is_root();
    match how {
        Confinement::None => Ok(None),
        Confinement::Usual => Ok(account::user(USER).filter(|_| is_root).map(|account| (USER, account))),
        Confinement::As(name) => {
            let account = account::user(name).ok_or_else(|| ConfinementFault::NoUser(name.clone()))?;
            if account.uid == geteuid().as_raw() {
                return Ok(None);
            }
            if is_root { Ok(Some((name, account))) } else { Err(ConfinementFault::NotRoot(name.clone())) }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::{ErrorKind, Write},
        os::{
            fd::AsFd,
            unix::net::{UnixListener, UnixStream},
        },
        process::Command,
        thread,
    };

    use nix::sys::{
        eventfd::EventFd,
        socket::{AddressFamily, SockFlag, SockType},
    };

    use super::*;
    use crate::sys::{
        socket::{receive, send_all},
        writes,
    };

    /// Runs `inside` on a thread that has given its rights up; they are a thread's own.
    fn confined(sockets: &Path, inside: impl FnOnce() + Send) {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(&Confinement::Usual, Opens::Nowhere, [sockets]).unwrap();
                inside();
            });
            thread.join().unwrap();
        });
    }

    #[test]
    fn what_a_server_does_not_need_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let shadow = |result: std::io::Result<File>| result.unwrap_err().kind();
        confined(&socket, || {
            assert_eq!(shadow(File::open("/etc/shadow")), ErrorKind::PermissionDenied);
            assert_eq!(shadow(File::create(folder.path().join("new"))), ErrorKind::PermissionDenied);
            assert_eq!(Command::new("/bin/true").spawn().unwrap_err().kind(), ErrorKind::PermissionDenied);
            assert_eq!(UnixStream::connect(&socket).unwrap_err().kind(), ErrorKind::PermissionDenied);
            assert_eq!(fs::rename(&socket, "/tmp/other").unwrap_err().kind(), ErrorKind::PermissionDenied);
            let run = memmap2::MmapOptions::new().len(4096).map_anon().unwrap().make_exec();
            assert_eq!(run.unwrap_err().kind(), ErrorKind::PermissionDenied);
            let init = nix::sys::signal::kill(nix::unistd::Pid::from_raw(1), None);
            assert_eq!(init, Err(nix::errno::Errno::EPERM));
        });
        drop(listener);
    }

    #[test]
    fn what_a_server_needs_still_works() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (peer, mut file) = (UnixStream::connect(&socket).unwrap(), tempfile::tempfile().unwrap());
        send_all(peer.as_fd(), b"take it", &[file.as_fd()]).unwrap();
        confined(&socket, || {
            let (accepted, _) = listener.accept().unwrap();
            let (count, descriptors) = receive(accepted.as_fd(), &mut [0; 64]).unwrap();
            assert_eq!((count, descriptors.len()), (7, 1));
            file.write_all(b"pages").unwrap();
            assert_eq!(file.metadata().unwrap().len(), 5);
            assert!(writes::is_available(), "io_uring");
            EventFd::new().unwrap().write(1).unwrap();
            UnixStream::pair().unwrap();
            let network = nix::sys::socket::socketpair(AddressFamily::Inet, SockType::Stream, None, SockFlag::empty());
            assert_eq!(network.unwrap_err(), nix::errno::Errno::EPERM, "only pairs of AF_UNIX");
            assert_eq!(thread::spawn(|| 7).join().unwrap(), 7);
            let panics = thread::Builder::new().name("fails".into()).spawn(|| panic!("on purpose")).unwrap();
            assert!(panics.join().is_err());
            File::options().write(true).open("/dev/null").unwrap();
            fs::remove_file(&socket).unwrap();
        });
    }

    #[test]
    fn user_that_is_not_there_is_refused() {
        let fault = enter(&Confinement::As("no-such-user".into()), Opens::Nothing, []).unwrap_err();
        assert_eq!(fault.to_string(), "there is no user \"no-such-user\"");
    }
}
