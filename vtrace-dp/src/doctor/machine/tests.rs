//! Each check on a machine that passes and on ones that do not.

use std::{fs, os::unix::fs::PermissionsExt};

use nix::errno::Errno;
use tempfile::TempDir;

use super::*;
use crate::doctor::Severity::{self, Fail, Ok as Fine, Warn};

/// A machine made of files.
struct FakeMachine(TempDir, SystemPaths);

impl FakeMachine {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_path_buf();
        for (name, text) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let paths = SystemPaths {
            proc: root.join("proc"),
            sys: root.join("sys"),
            dev: root.join("dev"),
            groups: root.join("group"),
            path: root.join("bin").into(),
        };
        Self(folder, paths)
    }
}

/// The severity of a check on a machine of these files.
fn verdict(check: fn(&SystemPaths) -> Finding, files: &[(&str, &str)]) -> Severity {
    let FakeMachine(_folder, paths) = FakeMachine::new(files);
    let finding = check(&paths);
    assert_eq!(finding.remedy.is_empty(), finding.verdict == Fine, "{finding}");
    finding.verdict
}

#[test]
fn old_kernels_warn_or_fail() {
    for (release, expected) in
        [("6.18.0-x", Fine), ("6.1.0-50", Fine), ("5.10.0", Warn), ("5.4.0", Fail), ("odd", Warn)]
    {
        assert_eq!(verdict(kernel, &[("proc/sys/kernel/osrelease", release)]), expected, "{release}");
    }
}

#[test]
fn missing_tracefs_and_a_missing_clock_fail() {
    assert_eq!(verdict(tracefs, &[("sys/kernel/tracing/trace_clock", "[local] global x86-tsc\n")]), Fine);
    assert_eq!(verdict(tracefs, &[("sys/kernel/tracing/trace_clock", "[local] global\n")]), Fail);
    assert_eq!(verdict(tracefs, &[]), Fail);
}

#[test]
fn large_buffers_and_fixed_page_sizes_warn() {
    let stat = ("proc/stat", "cpu  1 2\ncpu0 1 2\ncpu1 1 2\nintr 7\n");
    let pages = ("sys/kernel/tracing/buffer_subbuf_size_kb", "4\n");
    let memory = |kb| format!("MemTotal: 99 kB\nMemAvailable:    {kb} kB\n");
    assert_eq!(verdict(buffers, &[stat, pages, ("proc/meminfo", &memory(1 << 20))]), Fine);
    assert_eq!(verdict(buffers, &[stat, ("proc/meminfo", &memory(1 << 20))]), Warn);
    assert_eq!(verdict(buffers, &[stat, pages, ("proc/meminfo", &memory(4096))]), Warn);
}

#[test]
fn missing_and_broken_btf_warn() {
    assert_eq!(verdict(btf, &[]), Warn);
    assert_eq!(verdict(btf, &[("sys/kernel/btf/vmlinux", "no BTF")]), Warn);
}

#[test]
fn tsc_that_changes_stops_or_is_not_trusted_is_reported() {
    let machine = |flags: &str, source: &str| {
        let about = format!("processor: 0\nflags\t\t: fpu {flags} sse\n");
        let source_file = "sys/devices/system/clocksource/clocksource0/current_clocksource";
        verdict(tsc, &[("proc/cpuinfo", &about), (source_file, source)])
    };
    assert_eq!(machine("constant_tsc nonstop_tsc", "tsc\n"), Fine);
    assert_eq!(machine("constant_tsc", "tsc\n"), Warn);
    assert_eq!(machine("constant_tsc nonstop_tsc", "hpet\n"), Warn);
    assert_eq!(machine("tsc", "tsc\n"), Fail);
}

#[test]
fn io_uring_that_is_disabled_or_refused_is_reported() {
    let machine = |switch: &str, works: bool| {
        let FakeMachine(_folder, paths) = FakeMachine::new(&[("proc/sys/kernel/io_uring_disabled", switch)]);
        io_uring(&paths, &|| if works { Ok(()) } else { Err(SysError { call: "io_uring_setup", errno: Errno::EPERM }) })
    };
    assert_eq!(machine("0\n", true).verdict, Fine);
    assert_eq!(machine("1\n", true).verdict, Warn);
    assert_eq!(machine("2\n", true).verdict, Fail);
    let refused = machine("0\n", false);
    assert_eq!((refused.verdict, refused.found.as_str()), (Fail, "io_uring_setup: EPERM: Operation not permitted"));
    assert!(machine("2\n", true).remedy.contains("sysctl kernel.io_uring_disabled=0"));
}

#[test]
fn kvm_is_ok_only_if_a_guest_runs() {
    let machine = |files: &[(&str, &str)], runs: bool| {
        let FakeMachine(_folder, paths) = FakeMachine::new(files);
        kvm(&paths, &|| if runs { Ok(()) } else { Err(PageGuestError::Exit("InternalError".into())) })
    };
    let loaded = [("dev/kvm", ""), ("sys/module/kvm_amd/x", "")];
    assert_eq!(machine(&loaded, true).verdict, Fine);
    let broken = machine(&loaded, false);
    let found = "no guest can run: the vCPU ended with InternalError instead of halting";
    assert!(broken.verdict == Warn && broken.found.contains(found), "{broken}");
    assert_eq!(machine(&[("dev/kvm", "")], true).verdict, Warn);
    assert_eq!(machine(&[("sys/module/kvm_intel/x", "")], true).verdict, Warn);
    assert_eq!(machine(&[], true).verdict, Warn);
}

#[test]
fn page_sizes_that_cannot_be_examined_are_reported_as_such() {
    let FakeMachine(folder, paths) = FakeMachine::new(&[("sys/module/kvm_amd/x", "")]);
    // A link to itself: an error of open(2) and stat(2) that root gets too.
    fs::create_dir(folder.path().join("sys/kernel")).unwrap();
    std::os::unix::fs::symlink("tracing", folder.path().join("sys/kernel/tracing")).unwrap();
    let finding = buffers(&paths);
    assert!(finding.found.contains("not checked") && !finding.remedy.contains("6.8"), "{finding}");
}

#[test]
fn qemu_is_judged_by_its_version_and_by_its_device() {
    let machine = |version: &str, devices: &str| {
        let house = FakeMachine::new(&[]);
        let script = format!(
            "#!/bin/sh\ncase $1 in --version) echo 'QEMU emulator version {version} (x)';; *) echo '{devices}';; esac\n"
        );
        let bin = house.0.path().join("bin");
        fs::create_dir(&bin).unwrap();
        // Written under another name: a file that was open for writing a moment ago may still be busy.
        fs::write(bin.join("new"), script).unwrap();
        fs::set_permissions(bin.join("new"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(bin.join("new"), bin.join(QEMU)).unwrap();
        qemu(&house.1, None)
    };
    let device = format!("name \"{DRIVER}\", bus PCI");
    assert_eq!(machine("11.1.3", &device).verdict, Fine);
    assert_eq!(machine("11.1.3", "name \"e1000\"").verdict, Warn);
    assert_eq!(machine("7.2.22", &device).verdict, Warn);
    assert_eq!(machine("", &device).verdict, Warn);
    let FakeMachine(_folder, paths) = FakeMachine::new(&[]);
    assert!(qemu(&paths, None).found.contains("in PATH"));
    assert_eq!(qemu(&paths, Some(Path::new("/nowhere/qemu"))).verdict, Warn);
}

#[test]
fn this_machine_is_checked_without_a_panic() {
    let findings = all(&SystemPaths::of_this_machine(), None);
    assert_eq!(findings.len(), 8);
    assert_eq!(findings[0].verdict, Fine, "{}", findings[0]);
}
