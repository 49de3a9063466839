//! Users and groups of this machine, from its own files (passwd(5), group(5)).
//!
//! In:    names
//! Out:   numbers; `None` if there is no such name
//! Runs:  at the start
//! Full:  does not apply
//! Trust: the files
//!
//! getpwnam(3) and getgrnam(3) would load shared libraries, and a static binary dies of that.

use std::fs;

/// A user.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Account {
    /// Its number.
    pub uid: u32,
    /// The number of its group.
    pub gid: u32,
}

/// The user of this name.
pub fn user(name: &str) -> Option<Account> {
    user_in(&fs::read_to_string("/etc/passwd").ok()?, name)
}

/// The number of the group of this name.
pub fn group(name: &str) -> Option<u32> {
    field(&fs::read_to_string("/etc/group").ok()?, name, 2)
}

fn user_in(users: &str, name: &str) -> Option<Account> {
    Some(Account { uid: field(users, name, 2)?, gid: field(users, name, 3)? })
}

/// A number in the line that begins with this name.
fn field(lines: &str, name: &str, index: usize) -> Option<u32> {
    let mut fields = lines.lines().map(|line| line.split(':'));
    fields.find_map(|mut fields| (fields.next() == Some(name)).then(|| fields.nth(index - 1)?.parse().ok()))?
}

#[cfg(test)]
pub(crate) mod testing {
    //! Another user, for tests that root runs.
    #![expect(unsafe_code, reason = "the C library would make all threads of the process another user")]

    use std::thread;

    use nix::{errno::Errno, libc};

    /// Does `work` on a thread that belongs to user and group `id`, and to no other group.
    pub(crate) fn as_user<T: Send>(id: u32, work: impl FnOnce() -> T + Send) -> T {
        let become_user = move || {
            // SAFETY: no groups are read; the calls change this thread's own credentials, and the thread ends with `work`.
            Errno::result(unsafe { libc::syscall(libc::SYS_setgroups, 0, 0) }).unwrap();
            // SAFETY: as above; the call takes numbers only.
            Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, id, id, id) }).unwrap();
            // SAFETY: as above.
            Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, id, id, id) }).unwrap();
            work()
        };
        thread::scope(|scope| scope.spawn(become_user).join().unwrap())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_is_found_as_a_whole() {
        let groups = "root:x:0:\nvtrace-old:x:7:\nvtrace:x:998:alice,bob\nbroken\n";
        assert_eq!(field(groups, "vtrace", 2), Some(998));
        assert_eq!(field(groups, "trace", 2), None);
        assert_eq!(field("vtrace:x:many:", "vtrace", 2), None);
        let users = "root:x:0:0:root:/root:/bin/sh\nvtrace:x:990:991::/nonexistent:/bin/false\n";
        assert_eq!(user_in(users, "vtrace"), Some(Account { uid: 990, gid: 991 }));
    }

    #[test]
    fn root_is_there() {
        assert_eq!(user("root"), Some(Account { uid: 0, gid: 0 }));
    }
}
