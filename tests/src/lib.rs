//! Machines, peers and judges that the tests share.
//!
//! | module | what |
//! |---|---|
//! | [`crash`] | a random instant, and what a disk has at it |
//! | [`disk`] | a file system that is small, or hangs |
//! | [`guest`] | what a session has left in a guest |
//! | [`heap`] | what is alive of all that a process has allocated |
//! | [`server`] | a real `vtrace server` in a folder of its own |
//! | [`recording`] | one run of `vtrace record`: its words, its status, its files |
//! | [`fixture`] | a server, its guests and a folder, as most tests need them |
//! | [`transport`] | a guest as `vtrace setup` makes it |
//! | [`judge`] | what stock tools say of a file |

#![expect(clippy::print_stderr, reason = "a failed test shows what its server said")]

pub mod crash;
pub mod disk;
pub mod fixture;
pub mod guest;
pub mod heap;
pub mod judge;
pub mod recording;
pub mod server;
pub mod transport;
