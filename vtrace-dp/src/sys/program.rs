//! Programs that people name: where they are, how they are started, how they ended.

#![expect(unsafe_code, reason = "pidfd_open(2) has no wrapper; pre_exec: a command enters its control group first")]

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
};

use super::account::Account;

/// Where a program is that could be executed; one without a slash is looked for in PATH.
pub fn find(program: &OsStr) -> Option<PathBuf> {
    let executable =
        |path: &PathBuf| path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
    if program.as_encoded_bytes().contains(&b'/') {
        return Some(PathBuf::from(program)).filter(executable);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(executable)
}

/// A command of at least one word. With `buffers` of tracefs, `vtrace launch` puts itself among the processes that are
/// traced there before it becomes the command.
pub fn command<'a, W: AsRef<OsStr>>(words: &[W], buffers: impl IntoIterator<Item = &'a Path>) -> Command {
    command_as(words, buffers, None)
}

/// The same for another user: `vtrace launch` gives up its rights when it has used them.
pub fn command_as<'a, W: AsRef<OsStr>>(
    words: &[W],
    buffers: impl IntoIterator<Item = &'a Path>,
    user: Option<Account>,
) -> Command {
    let (program, arguments) = words.split_first().expect("a command has a program");
    let buffers: Vec<&Path> = buffers.into_iter().collect();
    if buffers.is_empty() && user.is_none() {
        let mut command = Command::new(program);
        command.args(arguments);
        return command;
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg("launch");
    for buffer in buffers {
        command.arg("--buffer").arg(buffer);
    }
    if let Some(user) = user {
        command.args(["--uid", &user.uid.to_string(), "--gid", &user.gid.to_string()]);
    }
    command.arg("--").args(words);
    command
}

/// Lets `command` start in the control group whose open `cgroup.procs` this is.
pub fn enter_in(command: &mut Command, processes: File) {
    let enter = move || nix::unistd::write(&processes, b"0").map(drop).map_err(io::Error::from);
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; this is one write(2) to a descriptor that the
    // closure owns. It moves the child alone.
    let _ = unsafe { command.pre_exec(enter) };
}

/// A descriptor that becomes readable when `child` has ended (pidfd_open(2), Linux 5.3).
pub fn watch(child: &Child) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(child.id()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a system call on two numbers; the child is not waited for while we hold it, so the number is its own.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for us (close-on-exec); no other code knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An exit code, or 128 + signal, as a shell gives it.
pub fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code & 0xff).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_joins_every_buffer_before_it_begins() {
        let words = |command: &Command| command.get_args().map(|word| word.to_owned()).collect::<Vec<_>>();
        let bound = command(&["ls", "-l"], [Path::new("/a"), Path::new("/b")]);
        assert_eq!(bound.get_program(), "/proc/self/exe");
        assert_eq!(words(&bound), ["launch", "--buffer", "/a", "--buffer", "/b", "--", "ls", "-l"]);
        let free = command(&["ls", "-l"], None);
        assert_eq!((free.get_program(), &words(&free)[..]), (OsStr::new("ls"), &["-l".into()][..]));
    }

    #[test]
    fn command_of_another_user_joins_its_buffer_before_the_rights_to_do_so_are_given_up() {
        let command = command_as(&["ls"], [Path::new("/a")], Some(Account { uid: 7, gid: 8 }));
        let words: Vec<_> = command.get_args().collect();
        assert_eq!(command.get_program(), "/proc/self/exe");
        assert_eq!(words, ["launch", "--buffer", "/a", "--uid", "7", "--gid", "8", "--", "ls"]);
    }
}
