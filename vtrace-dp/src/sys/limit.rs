//! What the kernel allows this process.
//!
//! In:    what it needs
//! Out:   its limits; a higher one, as far as it may be raised
//! Runs:  at the start

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::SysError;

/// Lets this process open `needed` descriptors, or as many as it may (RLIMIT_NOFILE). The soft limit is often 1024; where
/// that will do it stays, because what is started from here inherits it.
pub fn allow_descriptors(needed: u64) -> Result<(), SysError> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(SysError::of("getrlimit RLIMIT_NOFILE"))?;
    if soft >= needed {
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, needed.min(hard), hard).map_err(SysError::of("setrlimit RLIMIT_NOFILE"))
}

/// Bytes of addresses that this process may use (RLIMIT_AS).
pub fn address_space_bytes() -> u64 {
    getrlimit(Resource::RLIMIT_AS).map_or(u64::MAX, |(soft, _)| soft)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_limit_of_descriptors_is_raised_if_it_must_be_and_never_beyond_the_hard_one() {
        let limits = || getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let (soft, hard) = limits();
        allow_descriptors(1).unwrap();
        assert_eq!(limits(), (soft, hard));
        allow_descriptors(u64::MAX).unwrap();
        assert_eq!(limits(), (hard, hard));
    }
}
