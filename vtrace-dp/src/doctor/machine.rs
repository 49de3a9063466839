//! What the kernel, the CPU and QEMU of a machine can do for a recording.
//!
//! In:    /proc, /sys, /dev; a QEMU that says its version
//! Out:   a [`Finding`] each
//! Runs:  on the caller's thread
//! Full:  does not apply
//! Trust: the kernel; the QEMU that the person has in PATH, or names

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::{Finding, Place, text};
use crate::{
    clock::btf::{self, BtfError},
    printable::chain,
    recorder::plan::CLOCK,
    sys::uring::Ring,
    vmm::capacity::{DRIVER, VERSION_MIN},
};

/// What a ring buffer is that nobody has chosen a size for (trace_buf_size, kernel/trace/trace.c).
const BUFFER_KB: u64 = 1408;
/// Of the memory that is free, what buffers may take before that is worth a word.
const BUFFERS_SHARE: u64 = 4;
const QEMU: &str = "qemu-system-x86_64";

/// Everything about the machine, without its server.
pub fn all(place: &Place, qemu: Option<&Path>) -> Vec<Finding> {
    vec![
        kernel(place),
        tracefs(place),
        buffers(place),
        btf(place),
        tsc(place),
        io_uring(place, &|| Ring::new(2).map(drop).map_err(|error| error.to_string())),
        kvm(place),
        self::qemu(place, qemu),
    ]
}

/// The kernel's version.
pub fn kernel(place: &Place) -> Finding {
    let release = text(&place.proc.join("sys/kernel/osrelease")).unwrap_or_default();
    let found = format!("Linux {release}");
    match version(&release) {
        None => Finding::warn("kernel", format!("no version in {release:?}"), "Linux 6.1 or newer"),
        Some(version) if version < (5, 10) => Finding::fail("kernel", found, "Linux 6.1 or newer (guests: 5.10)"),
        Some(version) if version < (6, 1) => {
            Finding::warn("kernel", found, "enough for a guest; a host should have Linux 6.1 or newer")
        }
        Some(_) => Finding::ok("kernel", found),
    }
}

/// The first two numbers of a version.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|letter: char| !letter.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether tracefs is there, may be used, and has the clock.
pub fn tracefs(place: &Place) -> Finding {
    let root = place.sys.join("kernel/tracing");
    let mount = format!("mount -t tracefs nodev {} (kernel: CONFIG_FTRACE)", root.display());
    match std::fs::read_to_string(root.join("trace_clock")) {
        Ok(clocks) if clocks.split_whitespace().any(|clock| clock.trim_matches(['[', ']']) == CLOCK) => {
            Finding::ok("tracefs", format!("{}, clock {CLOCK}", root.display()))
        }
        Ok(clocks) => {
            let found = format!("no trace clock {CLOCK}, only {}", clocks.trim_end());
            Finding::fail("tracefs", found, "a kernel for x86-64; the host alone can be recorded with -C")
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Finding::fail("tracefs", format!("{} is closed to this user", root.display()), "be root")
        }
        Err(_) => Finding::fail("tracefs", format!("nothing at {}", root.display()), mount),
    }
}

/// Ring buffers: how large, of which pages, and whether there is memory for them.
pub fn buffers(place: &Place) -> Finding {
    let cpus = text(&place.proc.join("stat")).unwrap_or_default();
    let is_cpu =
        |line: &&str| line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let cpus = u64::try_from(cpus.lines().filter(is_cpu).count()).unwrap_or(0);
    let memory = text(&place.proc.join("meminfo")).unwrap_or_default();
    let available = memory.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available_kb: u64 = available.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
    let wanted_kb = cpus * BUFFER_KB;
    let found = format!("{BUFFER_KB} KiB for each of {cpus} CPUs, {} MiB free", available_kb >> 10);
    if wanted_kb.saturating_mul(BUFFERS_SHARE) > available_kb {
        return Finding::warn("buffers", found, "a smaller -b KB, or free some memory");
    }
    let pages = place.sys.join("kernel/tracing/buffer_subbuf_size_kb");
    if pages.exists() {
        return Finding::ok("buffers", format!("{found}, pages of 4 to 512 KiB"));
    }
    Finding::warn(
        "buffers",
        format!("{found}, pages of 4 KiB only"),
        "Linux 6.8 or newer, where --subbuf-size is wanted",
    )
}

/// What the eBPF programs need to know of the kernel's structures.
pub fn btf(place: &Place) -> Finding {
    match btf::find_in(&place.sys.join("kernel/btf")) {
        Ok(_) => Finding::ok("BTF", "fields of KVM's clock found"),
        Err(error @ BtfError::Unreadable { .. }) => {
            let remedy = "a kernel with CONFIG_DEBUG_INFO_BTF, root; until then guests' clocks are measured";
            Finding::warn("BTF", chain(&error), remedy)
        }
        Err(error) => {
            Finding::warn("BTF", chain(&error), "guests' clocks are measured; where KVM is a module: modprobe kvm")
        }
    }
}

/// Whether the TSC counts evenly, everywhere.
pub fn tsc(place: &Place) -> Finding {
    let about = text(&place.proc.join("cpuinfo")).unwrap_or_default();
    let flags = about.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    let source =
        text(&place.sys.join("devices/system/clocksource/clocksource0/current_clocksource")).unwrap_or_default();
    if !has("constant_tsc") {
        let remedy = "a CPU (or -cpu …,+invtsc) with an invariant TSC: host and guests cannot be brought together";
        return Finding::fail("TSC", "its frequency may change (no constant_tsc)", remedy);
    }
    if !has("nonstop_tsc") {
        return Finding::warn(
            "TSC",
            "stops when a CPU sleeps deeply (no nonstop_tsc)",
            "intel_idle.max_cstate=1, or another CPU",
        );
    }
    if !matches!(source.as_str(), "tsc" | "kvm-clock") {
        let found = format!("invariant, but the kernel keeps time by {source}: it may have found it unsteady");
        return Finding::warn("TSC", found, "look for \"clocksource\" in dmesg");
    }
    Finding::ok("TSC", format!("invariant, the kernel keeps time by {source}"))
}

/// Whether io_uring may be used; `ring` tries it.
pub fn io_uring(place: &Place, ring: &dyn Fn() -> Result<(), String>) -> Finding {
    let remedy =
        "sysctl kernel.io_uring_disabled=0; until then no agent runs here, and a server writes through the page cache";
    match text(&place.proc.join("sys/kernel/io_uring_disabled")).as_deref() {
        Some("2") => return Finding::fail("io_uring", "switched off (kernel.io_uring_disabled=2)", remedy),
        Some("1") => {
            return Finding::warn(
                "io_uring",
                "for root and one group only (kernel.io_uring_disabled=1)",
                "run agent and server as root",
            );
        }
        // Kernels before 6.6 have no such switch.
        _ => {}
    }
    match ring() {
        Ok(()) => Finding::ok("io_uring", "allowed"),
        Err(why) => Finding::fail("io_uring", why, "Linux 5.10 or newer; a seccomp filter (containers) may forbid it"),
    }
}

/// Whether guests run by KVM.
pub fn kvm(place: &Place) -> Finding {
    let loaded = |name: &&&str| place.sys.join("module").join(name).exists();
    let module = ["kvm_intel", "kvm_amd", "kvm"].iter().find(loaded);
    match (place.dev.join("kvm").exists(), module) {
        (true, Some(module)) => Finding::ok("KVM", format!("{module}, /dev/kvm")),
        (true, None) => {
            Finding::warn("KVM", "/dev/kvm without a module of a known name", "guests' clocks may have to be measured")
        }
        (false, Some(module)) => {
            Finding::warn("KVM", format!("{module}, but no /dev/kvm"), "virtualization may be off in the firmware")
        }
        (false, None) => Finding::warn("KVM", "not loaded", "modprobe kvm_intel or kvm_amd; a guest needs none"),
    }
}

/// Which roads QEMU has.
pub fn qemu(place: &Place, named: Option<&Path>) -> Finding {
    let path = match named {
        Some(path) => Some(path.to_path_buf()),
        None => std::env::split_paths(&place.path).map(|folder| folder.join(QEMU)).find(|path| path.is_file()),
    };
    let Some(path) = path else {
        return Finding::warn("QEMU", format!("no {QEMU} in PATH"), "--qemu FILE names another; a guest needs none");
    };
    let Some(said) = says(&path, &["--version"]) else {
        return Finding::warn(
            "QEMU",
            format!("{} does not say its version", path.display()),
            "--qemu FILE names another",
        );
    };
    let number = said.split_once("version ").and_then(|(_, rest)| version(rest));
    let Some((major, minor)) = number else {
        return Finding::warn(
            "QEMU",
            format!("{} does not say its version", path.display()),
            "--qemu FILE names another",
        );
    };
    let found = format!("{major}.{minor} ({})", path.display());
    let stock = "QEMU 10.2 or newer for the vhost-user device; this one has stock virtio-serial ports";
    if (major, minor) < (VERSION_MIN.major, VERSION_MIN.minor) {
        return Finding::warn("QEMU", found, stock);
    }
    match says(&path, &["-device", "help"]) {
        Some(devices) if devices.contains(&format!("\"{DRIVER}\"")) => {
            Finding::ok("QEMU", format!("{found}, has {DRIVER}"))
        }
        _ => Finding::warn("QEMU", format!("{found} was built without {DRIVER}"), stock),
    }
}

fn says(program: &PathBuf, words: &[&str]) -> Option<String> {
    let output = Command::new(program).args(words).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests;
