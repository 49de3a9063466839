//! `cargo xtask lab vmx`: guests whose TSC is scaled, on the only machine here that can do that.
//!
//! In:    a kernel, Bochs, the clock's tests, `vtrace`, QEMU. Out: what the tests and the judge say.
//! Runs:  Bochs with a Debian host and kvm-intel.ko: first the clock's tests with a guest of twenty instructions at three
//!        ratios; then the whole product, with a Debian guest under QEMU's KVM at three ratios, each of which is moved
//!        and put to another ratio while it is recorded.
//! Full:  does not apply. Trust: the machines are ours; the judge is stock trace-cmd, and vtrace's own check.

use super::{clock_tests, judge, nested};
use crate::bochs::{self, Job};
use crate::image::Recipe;
use crate::kernel::Kernel;
use crate::{cache, packages};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const CONVERSIONS: &str = include_str!("vmx/conversions.sh");
const RECORD: &str = include_str!("vmx/record.sh");
const DURING: &str = include_str!("vmx/during.sh");
/// QEMU cannot change the rate of a guest that runs.
const SET_RATE: &str = "xtask/src/lab/vmx/set_rate.c";
/// Thousandths of the host's rate that the guests' TSCs run at.
const RATES: [u32; 3] = [353, 571, 1870];
/// How long the machine may take: it interprets.
const TESTS_WAIT_MAX: Duration = Duration::from_secs(1500);
const RECORD_WAIT_MAX: Duration = Duration::from_secs(5400);
const OUT_BYTES: u64 = 1 << 30;

/// Runs both parts.
///
/// # Errors
/// When a conversion lies outside its run, a recording fails, or stock trace-cmd shows an event where its vCPU did not run.
pub fn run(kernel: Kernel) -> Result<()> {
    packages::ensure(&["trace-cmd"])?;
    conversions(kernel)?;
    recordings(kernel)
}

/// Every conversion of a live guest, against the host's TSC before and after its run.
fn conversions(kernel: Kernel) -> Result<()> {
    let begun = Instant::now();
    let tests = clock_tests()?;
    let mut recipe = Recipe::new(kernel);
    ["kvm_intel"].into_iter().chain(bochs::DISK_MODULES).for_each(|name| recipe.module(name));
    recipe.run_script(CONVERSIONS);
    let folder = cache::target().join("lab-vmx/conversions");
    let job = Job {
        image: &recipe.make()?,
        files: vec![("/bin/clock-tests".into(), tests)],
        append: "",
        folder: &folder,
        out_bytes: 1 << 20,
        wait_max: TESTS_WAIT_MAX,
    };
    bochs::run(&job)?;
    let said = fs::read_to_string(folder.join("said"))?;
    println!("{said}clock's tests under VMX: {:.0?}", begun.elapsed());
    ensure!(said.contains("test result: ok"), "the clock's tests failed");
    ensure!(said.contains(&format!(" {} ratios: 0 outside", RATES.len())), "the TSC was not scaled");
    Ok(())
}

/// A Linux guest at each rate, recorded while its TSC is moved.
fn recordings(kernel: Kernel) -> Result<()> {
    let begun = Instant::now();
    let folder = cache::target().join("lab-vmx/record");
    fs::create_dir_all(&folder)?;
    let mut recipe = Recipe::new(kernel);
    ["kvm_intel"].into_iter().chain(bochs::DISK_MODULES).for_each(|name| recipe.module(name));
    let later = RATES.iter().cycle().skip(1);
    let rates: Vec<String> = RATES.iter().zip(later).map(|(rate, later)| format!("{rate}:{later}")).collect();
    recipe.run_script(&format!("rates='{}'\n{RECORD}", rates.join(" ")));
    let mut files = nested::host_files(kernel)?;
    files.push(("/bin/during".into(), nested::written("during", DURING)?));
    files.push(("/qemu/set_rate.so".into(), set_rate(&folder)?));
    let job = Job {
        image: &recipe.make()?,
        files,
        append: "",
        folder: &folder,
        out_bytes: OUT_BYTES,
        wait_max: RECORD_WAIT_MAX,
    };
    let console = bochs::run(&job)?;
    fs::read_to_string(folder.join("said")).map(|said| println!("{said}"))?;
    println!("files under {}, {:.0?}", folder.display(), begun.elapsed());
    for rate in RATES {
        println!("\n{rate} thousandths of the host's rate:");
        let [host, guest] = ["", "-guest1"].map(|machine| folder.join(format!("rate{rate}{machine}.dat")));
        judge_scaled(&host, &guest).with_context(|| format!("{rate} thousandths; the console:\n{console}"))?;
    }
    Ok(())
}

/// Judges two files of one recording whose guest was scaled: stock trace-cmd and `vtrace check`.
///
/// # Errors
/// When an event is outside that may not be, or times go back.
pub fn judge_scaled(host: &Path, guest: &Path) -> Result<()> {
    let verdict = judge::judge_runs(host, guest)?;
    println!("{verdict}");
    let checked = nested::check(host, guest)?;
    println!("{}", verdict.summary(checked.within_bound));
    verdict.ensure_inside(checked.bound_ns, checked.within_bound)?;
    judge::ensure_in_order(guest)
}

/// The library that changes a guest's rate from inside QEMU.
fn set_rate(folder: &Path) -> Result<PathBuf> {
    let library = folder.join("set_rate.so");
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o"]).arg(&library);
    let status = cc.arg(cache::repository().join(SET_RATE)).status().context("cannot run cc")?;
    ensure!(status.success(), "{SET_RATE} does not compile");
    Ok(library)
}
