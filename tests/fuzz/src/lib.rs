//! Fuzz targets: what reads bytes of others, fed by libFuzzer, and by plain tests with the same code.
//!
//! In:    any bytes
//! Out:   nothing; a target that breaks a promise panics
//! Runs:  `cargo xtask fuzz [TARGET]` under libFuzzer; `cargo test -p vtrace-fuzz` with seeds, regressions, random bytes
//! Trust: nothing
//!
//! | target | feeds | promises |
//! |---|---|---|
//! | [`btf`] | `vtrace_dp::clock::btf` | an answer, whatever the kernel's types say |
//! | [`canary`] | a lock of eight bytes | is found and reported: coverage feedback and crash reports work |
//! | [`client`] | a whole `vtrace_dp::server`, over its control socket | frames in answer, and the next client is served |
//! | [`console`] | `vtrace_dp::device::console` | one message of a kind waits for a port; names are those of its place |
//! | [`lane`] | `vtrace_dp::drain::ring::lane` | pages balance, sound ones are written, nothing outside the area |
//! | [`page`] | `vtrace_common::page` | an accepted header fits its page and says its own commit word |
//! | [`qmp`] | `vtrace_dp::vmm::attach` | an end, the same messages however cut, nothing that moves a cursor |
//! | [`restore`] | `vtrace_dp::trace::restore` | what was restored is finished; what a recording left can be read |
//! | [`ring`] | `vtrace_dp::virtq::ring` | ends, and every span lies inside guest memory |
//! | [`stream`] | `vtrace_dp::server::stream` | who goes on speaking is heard; whole pages, inside the area, all counted |
//! | [`texts`] | rules, setups, versions, tracefs' texts | an answer within its bounds |
//! | [`tracedat`] | `vtrace_dp::trace::{reader, fields, merge}`, `check` | an answer, in bounded memory; no more events than words |
//! | [`vhost_user`] | a whole `vtrace_dp::server`, over its vhost-user socket | the next monitor is served; nothing of this one is left |
//! | [`wire`] | `vtrace_common::wire` | the same frames however the stream is cut; what opens can be sent again |
//!
//! A target is three things of one name:
//!
//! 1. a module here with `run(bytes)`, which panics when a promise is broken, and `seeds()`, inputs made by the code
//!    that writes such bytes in earnest;
//! 2. its line in [`TARGETS`];
//! 3. a `[[bin]]` in Cargo.toml with `required-features = ["fuzzing"]`, whose file is `fuzz_target!` around `run`.
//!
//! An input that once broke a target is kept in `regressions/TARGET/`; tests and fuzzer start from there.

pub mod btf;
pub mod canary;
pub mod client;
pub mod console;
pub mod lane;
pub mod page;
pub mod qmp;
pub mod random;
pub mod restore;
pub mod ring;
pub mod stream;
pub mod texts;
pub mod tracedat;
pub mod vhost_user;
pub mod wire;

/// One fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its module, its bin, its folder of regressions.
    pub name: &'static str,
    /// Feeds it; panics when a promise is broken.
    pub run: fn(&[u8]),
    /// Inputs to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets but the canary.
pub const TARGETS: &[Target] = &[
    Target { name: "btf", run: btf::run, seeds: btf::seeds },
    Target { name: "client", run: client::run, seeds: client::seeds },
    Target { name: "console", run: console::run, seeds: console::seeds },
    Target { name: "lane", run: lane::run, seeds: lane::seeds },
    Target { name: "page", run: page::run, seeds: page::seeds },
    Target { name: "qmp", run: qmp::run, seeds: qmp::seeds },
    Target { name: "restore", run: restore::run, seeds: restore::seeds },
    Target { name: "ring", run: ring::run, seeds: ring::seeds },
    Target { name: "stream", run: stream::run, seeds: stream::seeds },
    Target { name: "texts", run: texts::run, seeds: texts::seeds },
    Target { name: "tracedat", run: tracedat::run, seeds: tracedat::seeds },
    Target { name: "vhost_user", run: vhost_user::run, seeds: vhost_user::seeds },
    Target { name: "wire", run: wire::run, seeds: wire::seeds },
];

#[cfg(test)]
mod tests;
