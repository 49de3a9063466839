//! Rights that a thread gives up for good, with those that it starts from then on.
//!
//! In:    what it still needs
//! Out:   nothing, or why a right could not be given up: it is there as before
//! Runs:  at the start, before there is another thread
//! Trust: the kernel; a thread that foreign bytes have turned against us is kept to what is left here
//!
//! A system call that is not allowed fails with EPERM. Ending the process would be worse: its guests would hang.

use std::{collections::BTreeMap, path::Path};

use caps::CapSet;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::{
    errno::Errno,
    libc::{c_long, c_ulong},
    sys::prctl,
    unistd::{self, Gid, Uid},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::{SysError, account::Account};

/// Why a right is kept.
#[derive(Debug, thiserror::Error)]
pub enum ConfineFault {
    /// A system call failed.
    #[error(transparent)]
    System(#[from] SysError),
    /// Capabilities stay.
    #[error("capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// The kernel has no Landlock, or it is switched off.
    #[error("this kernel does not restrict paths (Landlock)")]
    NoLandlock,
    /// It has, and refused.
    #[error("paths: {0}")]
    Paths(#[from] landlock::RulesetError),
    /// A folder that was to stay cannot be opened.
    #[error("paths: {0}")]
    Folder(#[from] landlock::PathFdError),
    /// The filter of system calls was refused.
    #[error("system calls: {0}")]
    Calls(#[from] seccompiler::Error),
    /// It could not be made.
    #[error("system calls: {0}")]
    Filter(#[from] seccompiler::BackendError),
}

/// A system call that stays allowed.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its number.
    pub number: c_long,
    /// With which arguments.
    pub only: Only,
}

/// Which arguments a call may have.
#[derive(Clone, Copy, Debug)]
pub enum Only {
    /// Any.
    Any,
    /// The argument of this index, counted from 0, is one of these numbers.
    One(u8, &'static [u32]),
    /// Of the argument of this index, these bits (the first number) are so (the second one).
    Bits(u8, u32, u32),
    /// The first argument is this process.
    Ourselves,
}

/// How far paths are out of reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// In every way that was asked for.
    Whole,
    /// In those that this kernel knows; newer ones know more.
    Part,
}

/// Becomes another user for good, with that user's group and no other.
pub fn become_user(account: Account) -> Result<(), ConfineFault> {
    // While there still is the right to.
    drop_bounding()?;
    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    unistd::setgroups(&[]).map_err(SysError::of("setgroups"))?;
    unistd::setresgid(gid, gid, gid).map_err(SysError::of("setresgid"))?;
    unistd::setresuid(uid, uid, uid).map_err(SysError::of("setresuid"))?;
    Ok(())
}

/// Gives every capability up, and what could bring one back: nothing that is started from here gets any.
pub fn drop_capabilities() -> Result<(), ConfineFault> {
    prctl::set_no_new_privs().map_err(SysError::of("prctl PR_SET_NO_NEW_PRIVS"))?;
    caps::clear(None, CapSet::Ambient)?;
    drop_bounding()?;
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set)?;
    }
    Ok(())
}

/// Takes every capability away from what is run from here. That takes a capability of its own; who lacks it was not given
/// the others, either.
fn drop_bounding() -> Result<(), ConfineFault> {
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    Ok(())
}

/// From now on no path can be opened, made, changed or run, no address can be bound or connected, and no process beyond
/// this one signalled; files in `folders` can be removed, and those `written` opened for writing. What is open stays open.
pub fn keep_folders(folders: &[&Path], written: &[&Path]) -> Result<Reach, ConfineFault> {
    let abi = ABI::V6;
    let rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?;
    let mut rules = rules.create()?;
    for folder in folders {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(folder)?, AccessFs::RemoveFile))?;
    }
    for file in written {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(file)?, AccessFs::WriteFile))?;
    }
    match rules.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Ok(Reach::Whole),
        RulesetStatus::PartiallyEnforced => Ok(Reach::Part),
        RulesetStatus::NotEnforced => Err(ConfineFault::NoLandlock),
    }
}

/// From now on every other system call fails with EPERM. `clone3`, whose arguments no filter can see, fails with ENOSYS:
/// C libraries take `clone` then.
pub fn keep_calls(calls: impl IntoIterator<Item = Call>) -> Result<(), ConfineFault> {
    prctl::set_no_new_privs().map_err(SysError::of("prctl PR_SET_NO_NEW_PRIVS"))?;
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = BTreeMap::new();
    for Call { number, only } in calls {
        rules.insert(number, only.rules()?);
    }
    let clone3 = libc::SYS_clone3;
    rules.insert(clone3, Vec::new());
    let none = BTreeMap::from([(clone3, Vec::new())]);
    // Both are made before one holds. Of two filters the stricter answer counts.
    let filters = [
        filter(none, SeccompAction::Allow, SeccompAction::Errno(number(Errno::ENOSYS)))?,
        filter(rules, SeccompAction::Errno(number(Errno::EPERM)), SeccompAction::Allow)?,
    ];
    for filter in &filters {
        seccompiler::apply_filter(filter)?;
    }
    Ok(())
}

fn number(errno: Errno) -> u32 {
    u32::try_from(errno as i32).expect("errors are positive")
}

fn filter(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, ConfineFault> {
    Ok(SeccompFilter::new(rules, others, these, TargetArch::x86_64)?.try_into()?)
}

impl Only {
    /// Rules of which one has to hold; none stands for a call with any arguments.
    fn rules(self) -> Result<Vec<SeccompRule>, ConfineFault> {
        let equal = |argument: u8, operator: SeccompCmpOp, value: c_ulong| {
            let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
            Ok(SeccompRule::new(vec![condition])?)
        };
        match self {
            Self::Any => Ok(Vec::new()),
            Self::One(argument, values) => {
                values.iter().map(|value| equal(argument, SeccompCmpOp::Eq, c_ulong::from(*value))).collect()
            }
            Self::Bits(argument, bits, value) => {
                Ok(vec![equal(argument, SeccompCmpOp::MaskedEq(bits.into()), value.into())?])
            }
            Self::Ourselves => Ok(vec![equal(0, SeccompCmpOp::Eq, std::process::id().into())?]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::ErrorKind,
        net::TcpListener,
        process::Command,
        thread,
    };

    use super::*;

    /// What is given up is given up by a thread: this one's goes with it.
    fn aside<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| scope.spawn(work).join().unwrap())
    }

    #[test]
    fn capabilities_are_gone_for_good() {
        aside(|| {
            drop_capabilities().unwrap();
            for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable, CapSet::Ambient, CapSet::Bounding] {
                assert_eq!(caps::read(None, set).unwrap().len(), 0, "{set:?}");
            }
            let said = Command::new("grep").args(["^Cap\\|^NoNewPrivs", "/proc/self/status"]).output().unwrap();
            let said = String::from_utf8_lossy(&said.stdout).into_owned();
            assert!(said.contains("NoNewPrivs:\t1") && said.contains("CapEff:\t0000000000000000"), "{said}");
        });
    }

    #[test]
    fn paths_are_out_of_reach_but_for_removing_in_the_folders_kept() {
        let (kept, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mine, theirs) = (kept.path().join("a"), other.path().join("a"));
        fs::write(&mine, "a").unwrap();
        fs::write(&theirs, "a").unwrap();
        let open = File::options().write(true).open(&theirs).unwrap();
        let result = aside(|| {
            let reach = keep_folders(&[kept.path()], &[]);
            if reach.is_ok() {
                assert_eq!(File::open("/etc/shadow").unwrap_err().kind(), ErrorKind::PermissionDenied);
                assert_eq!(File::open(&mine).unwrap_err().kind(), ErrorKind::PermissionDenied);
                assert_eq!(Command::new("/bin/true").spawn().unwrap_err().kind(), ErrorKind::PermissionDenied);
                assert_eq!(fs::remove_file(&theirs).unwrap_err().kind(), ErrorKind::PermissionDenied);
                open.set_len(0).expect("what is open stays open");
                fs::remove_file(&mine).unwrap();
            }
            if reach.as_ref().is_ok_and(|reach| *reach == Reach::Whole) {
                assert_eq!(TcpListener::bind("127.0.0.1:0").unwrap_err().kind(), ErrorKind::PermissionDenied);
            }
            reach
        });
        assert!(matches!(result, Ok(_) | Err(ConfineFault::NoLandlock)), "{result:?}");
    }

    #[test]
    fn only_the_calls_kept_are_possible_and_only_with_their_arguments() {
        let calls = [libc::SYS_futex, libc::SYS_exit, libc::SYS_madvise, libc::SYS_munmap, libc::SYS_sigaltstack];
        let any = |number| Call { number, only: Only::Any };
        let own = Call { number: libc::SYS_tgkill, only: Only::Ourselves };
        let named = Call { number: libc::SYS_prctl, only: Only::One(0, &[15]) };
        let cloexec = Call { number: libc::SYS_eventfd2, only: Only::Bits(1, 0o2_000_000, 0o2_000_000) };
        let seen = aside(move || {
            keep_calls(calls.map(any).into_iter().chain([own, named, cloexec])).unwrap();
            let refused = |result: Result<(), Errno>| result == Err(Errno::EPERM);
            let opened = nix::fcntl::open("/etc/shadow", nix::fcntl::OFlag::O_RDONLY, nix::sys::stat::Mode::empty());
            let name = prctl::set_name(c"kept");
            let other = prctl::set_dumpable(true);
            let flags = nix::sys::eventfd::EfdFlags::EFD_CLOEXEC;
            let bare = nix::sys::eventfd::EventFd::from_flags(nix::sys::eventfd::EfdFlags::empty()).map(drop);
            let whole = nix::sys::eventfd::EventFd::from_flags(flags).map(std::mem::forget);
            // A failed assertion writes, which is refused here.
            (refused(opened.map(drop)), name, refused(other), refused(bare), whole)
        });
        assert_eq!(seen, (true, Ok(()), true, true, Ok(())));
    }
}
