//! The machine: kernel, tracefs, memory, CPU, io_uring, KVM, QEMU.
//!
//! In:    /proc, /sys, /dev; the output of QEMU's --version and -device help
//! Out:   a [`Finding`] for each check
//! Runs:  on the caller's thread
//! Trust: the kernel; the QEMU in PATH, or the one that the user names

use std::{
    fs::File,
    path::Path,
    process::{Command, Stdio},
};

use super::{Finding, SystemPaths, text};
use crate::{
    clock::btf::{self, BtfError},
    printable::chain,
    recorder::plan::CLOCK,
    sys::{
        SysError,
        page_guest::{PageGuest, PageGuestError},
        uring::Ring,
    },
    vmm::qemu::{DRIVER, QemuVersion, VHOST_USER_SINCE},
};

/// Default size of a CPU's ring buffer (trace_buf_size, kernel/trace/trace.c).
const BUFFER_KB: u64 = 1408;
/// Ring buffers above 1/4 of the available memory are a warning.
const BUFFERS_SHARE: u64 = 4;
const QEMU: &str = "qemu-system-x86_64";

/// All checks of the machine.
pub fn all(paths: &SystemPaths, qemu: Option<&Path>) -> Vec<Finding> {
    vec![
        kernel(paths),
        tracefs(paths),
        buffers(paths),
        btf(paths),
        tsc(paths),
        io_uring(paths, &|| Ring::new(2).map(drop)),
        kvm(paths, &PageGuest::try_halt),
        self::qemu(paths, qemu),
    ]
}

/// Kernel version.
pub fn kernel(paths: &SystemPaths) -> Finding {
    let release = text(&paths.proc.join("sys/kernel/osrelease")).unwrap_or_default();
    let found = format!("Linux {release}");
    match version(&release) {
        None => Finding::warn("kernel", format!("no version in {release:?}"), "Linux 6.1 or newer"),
        Some(version) if version < (5, 10) => Finding::fail("kernel", found, "Linux 6.1 or newer (guests: 5.10)"),
        Some(version) if version < (6, 1) => {
            Finding::warn("kernel", found, "sufficient in a guest; a host should have Linux 6.1 or newer")
        }
        Some(_) => Finding::ok("kernel", found),
    }
}

/// The first two numbers of a version.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|letter: char| !letter.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Tracefs: mounted, accessible, with the clock x86-tsc.
pub fn tracefs(paths: &SystemPaths) -> Finding {
    let root = paths.sys.join("kernel/tracing");
    let mount = format!("mount -t tracefs nodev {} (kernel: CONFIG_FTRACE)", root.display());
    match std::fs::read_to_string(root.join("trace_clock")) {
        Ok(clocks) if clocks.split_whitespace().any(|clock| clock.trim_matches(['[', ']']) == CLOCK) => {
            Finding::ok("tracefs", format!("{}, clock {CLOCK}", root.display()))
        }
        Ok(clocks) => {
            let found = format!("no trace clock {CLOCK}, only {}", clocks.trim_end());
            Finding::fail("tracefs", found, "use a kernel for x86-64; the host alone can be recorded with -C")
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Finding::fail("tracefs", format!("{} is not accessible for this user", root.display()), "run as root")
        }
        Err(_) => Finding::fail("tracefs", format!("nothing at {}", root.display()), mount),
    }
}

/// Ring buffers: default size, page size, available memory.
pub fn buffers(paths: &SystemPaths) -> Finding {
    let cpus = text(&paths.proc.join("stat")).unwrap_or_default();
    let is_cpu =
        |line: &&str| line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let cpus = u64::try_from(cpus.lines().filter(is_cpu).count()).unwrap_or(0);
    let memory = text(&paths.proc.join("meminfo")).unwrap_or_default();
    let available = memory.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available_kb: u64 = available.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
    let wanted_kb = cpus * BUFFER_KB;
    let found = format!("{BUFFER_KB} KiB for each of {cpus} CPUs, {} MiB free", available_kb >> 10);
    if wanted_kb.saturating_mul(BUFFERS_SHARE) > available_kb {
        return Finding::warn("buffers", found, "use smaller buffers (-b KB), or free some memory");
    }
    let pages = paths.sys.join("kernel/tracing/buffer_subbuf_size_kb");
    match pages.try_exists() {
        Ok(true) => return Finding::ok("buffers", format!("{found}, pages of 4 to 512 KiB")),
        Err(error) => {
            return Finding::warn("buffers", format!("{found}, page sizes not checked: {error}"), "run as root");
        }
        Ok(false) => {}
    }
    Finding::warn("buffers", format!("{found}, pages of 4 KiB only"), "--subbuf-size needs Linux 6.8 or newer")
}

/// BTF: the structures of KVM's clock that the eBPF programs read.
pub fn btf(paths: &SystemPaths) -> Finding {
    match btf::find_in(&paths.sys.join("kernel/btf")) {
        Ok(_) => Finding::ok("BTF", "fields of KVM's clock found"),
        Err(error @ BtfError::Unreadable { .. }) => {
            let remedy = "use a kernel with CONFIG_DEBUG_INFO_BTF and run as root; otherwise guest clocks are measured";
            Finding::warn("BTF", chain(&error), remedy)
        }
        Err(error) => {
            Finding::warn("BTF", chain(&error), "modprobe kvm if KVM is a module; otherwise guest clocks are measured")
        }
    }
}

/// TSC: constant, never stopped, trusted by the kernel.
pub fn tsc(paths: &SystemPaths) -> Finding {
    let about = text(&paths.proc.join("cpuinfo")).unwrap_or_default();
    let flags = about.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    let source =
        text(&paths.sys.join("devices/system/clocksource/clocksource0/current_clocksource")).unwrap_or_default();
    if !has("constant_tsc") {
        let remedy = "use a CPU (or -cpu …,+invtsc) with an invariant TSC: guest times cannot be converted without";
        return Finding::fail("TSC", "frequency may change (no constant_tsc)", remedy);
    }
    if !has("nonstop_tsc") {
        return Finding::warn(
            "TSC",
            "stops in deep CPU idle states (no nonstop_tsc)",
            "boot with intel_idle.max_cstate=1, or use another CPU",
        );
    }
    if !matches!(source.as_str(), "tsc" | "kvm-clock") {
        let found = format!("invariant, but the kernel's clocksource is {source}: it may have found the TSC unstable");
        return Finding::warn("TSC", found, "see dmesg | grep clocksource");
    }
    Finding::ok("TSC", format!("invariant, clocksource {source}"))
}

/// io_uring: allowed for this user; `ring` sets one up.
pub fn io_uring(paths: &SystemPaths, ring: &dyn Fn() -> Result<(), SysError>) -> Finding {
    let remedy =
        "sysctl kernel.io_uring_disabled=0; otherwise no agent runs here, and a server writes through the page cache";
    match text(&paths.proc.join("sys/kernel/io_uring_disabled")).as_deref() {
        Some("2") => return Finding::fail("io_uring", "disabled (kernel.io_uring_disabled=2)", remedy),
        Some("1") => {
            return Finding::warn(
                "io_uring",
                "only for root and one group (kernel.io_uring_disabled=1)",
                "run agent and server as root",
            );
        }
        // Kernels before 6.6 have no such setting.
        _ => {}
    }
    match ring() {
        Ok(()) => Finding::ok("io_uring", "allowed"),
        Err(error) => {
            let remedy = "use Linux 5.10 or newer; a container's seccomp filter may forbid io_uring";
            Finding::fail("io_uring", error.to_string(), remedy)
        }
    }
}

/// KVM: module, device, and whether a guest can run; `run` runs one of a few instructions.
pub fn kvm(paths: &SystemPaths, run: &dyn Fn() -> Result<(), PageGuestError>) -> Finding {
    let device = paths.dev.join("kvm");
    let module = ["kvm_intel", "kvm_amd", "kvm"].into_iter().find(|name| paths.sys.join("module").join(name).exists());
    match (device.exists(), module) {
        (true, module) => {
            let found = format!("{}, /dev/kvm", module.unwrap_or("no known module"));
            if let Err(error) = File::options().read(true).write(true).open(&device) {
                let found = format!("{found}: not checked whether guests run: {error}");
                return Finding::warn("KVM", found, "run as root, or join group kvm");
            }
            match (run(), module) {
                (Ok(()), Some(_)) => Finding::ok("KVM", format!("{found}, a guest runs")),
                (Ok(()), None) => Finding::warn("KVM", found, "guest clocks may have to be measured"),
                (Err(error), _) => {
                    let remedy = "see dmesg; without KVM, QEMU needs -accel tcg; a nested hypervisor may be broken";
                    Finding::warn("KVM", format!("{found}, but no guest can run: {}", chain(&error)), remedy)
                }
            }
        }
        (false, Some(module)) => {
            Finding::warn("KVM", format!("{module}, but no /dev/kvm"), "enable virtualization in the firmware")
        }
        (false, None) => Finding::warn("KVM", "not loaded", "modprobe kvm_intel or kvm_amd; not needed in a guest"),
    }
}

/// QEMU: version, and whether it has our device.
pub fn qemu(paths: &SystemPaths, named: Option<&Path>) -> Finding {
    let path = match named {
        Some(path) => Some(path.to_path_buf()),
        None => std::env::split_paths(&paths.path).map(|folder| folder.join(QEMU)).find(|path| path.is_file()),
    };
    let Some(path) = path else {
        return Finding::warn("QEMU", format!("no {QEMU} in PATH"), "--qemu FILE names another; not needed in a guest");
    };
    let version = match QemuVersion::of(&path) {
        Ok(version) => version,
        Err(error) => {
            return Finding::warn("QEMU", format!("{}: {error}", path.display()), "--qemu FILE names another");
        }
    };
    let found = format!("{version} ({})", path.display());
    let stock = "the vhost-user device needs QEMU 10.2 or newer; this one has stock virtio-serial ports";
    if version < VHOST_USER_SINCE {
        return Finding::warn("QEMU", found, stock);
    }
    match device_help(&path) {
        Some(devices) if devices.contains(&format!("\"{DRIVER}\"")) => {
            Finding::ok("QEMU", format!("{found}, has {DRIVER}"))
        }
        _ => Finding::warn("QEMU", format!("{found} was built without {DRIVER}"), stock),
    }
}

/// What QEMU prints for `-device help`.
fn device_help(program: &Path) -> Option<String> {
    let output = Command::new(program).args(["-device", "help"]).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests;
