//! `cargo xtask lab`: the clock against a real KVM, where this machine's own does not do.
//!
//! [`svm`] runs the clock's live tests in a guest that is itself a host of the least guest there is; [`nested`] runs the
//! whole product there, with a real Linux in a real KVM; [`vmx`] runs both where a guest's TSC can be scaled.
//!
//! In:    a kernel. Out: what the tests and judges say.
//! Runs:  QEMU's TCG with SVM, Debian's kvm-amd.ko in it: kvm_entry fires, TSC offsets are obeyed, KVM is a module.
//! Full:  does not apply. Trust: the guest is ours.

pub mod judge;
pub mod nested;
pub mod vmx;

use crate::kernel::Kernel;
use crate::machine::{Machine, turn};
use crate::{build, cache};
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long the tests of one kernel may take; TCG is slow and tests share the machine.
const TESTS_WAIT_MAX: Duration = Duration::from_secs(600);
/// What the tests say where kvm_entry keeps silent; here it must not.
const SILENT: &str = "kvm_entry: 0 hits";

/// Runs the clock's tests on each kernel.
///
/// # Errors
/// When one fails, or kvm_entry does not fire.
pub fn svm(kernels: &[Kernel]) -> Result<()> {
    let tests = build::for_guest("clock-tests", &build::unit_tests("vtrace_dp")?)?;
    for &kernel in kernels {
        let turn = turn()?;
        let mut builder = Machine::builder(&turn, kernel)
            .memory_mb(1024)
            .without_agent()
            // A slow host makes Linux mistrust the TSC, and KVM then writes a new offset at every entry.
            .append("tsc=reliable")
            .module("kvm_amd");
        for (inside, outside) in &tests {
            builder = builder.file(inside, outside);
        }
        let machine = builder.boot()?;
        let script = "mount -t tracefs tracefs /sys/kernel/tracing; uname -r; \
             RUST_BACKTRACE=0 clock-tests clock::feed recorder::kvm running_kernel --include-ignored --skip hit_costs \
             --test-threads=1 --nocapture"; // nanoseconds mean nothing under TCG
        let output = machine.shell_within(script, TESTS_WAIT_MAX)?;
        println!("{}", output.text());
        ensure!(output.status == 0, "the clock's tests failed on {kernel:?}");
        ensure!(!output.text().contains(SILENT), "kvm_entry did not fire on {kernel:?}");
    }
    Ok(())
}

/// The unit tests of vtrace-dp as a static program, for machines slower than TCG's.
fn clock_tests() -> Result<PathBuf> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "test",
            "--quiet",
            "--locked",
            "--no-run",
            "--release", // they parse BTF, on machines that are emulated
            "--message-format=json-render-diagnostics",
            "--package",
            "vtrace-dp",
            "--lib",
        ])
        .args(["--target", build::TARGET])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols") // 100 MB fewer through the initramfs
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", cache::target().join("static"))
        .current_dir(cache::repository())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "the tests of vtrace-dp do not build");
    build::test_program(&String::from_utf8(output.stdout)?, "vtrace_dp")
}
