//! `cargo xtask lab nested`: the whole product on a host that has a real KVM, with a guest whose TSC is moved.
//!
//! In:    kernels for host and guest, the newest QEMU, `vtrace`. Out: trace files, and what stock trace-cmd makes of them.
//! Runs:  three machines in each other: this one, a Debian host under QEMU's TCG with SVM and kvm-amd, and in that a
//!        Debian guest under QEMU's KVM with our agent; over the vhost-user device, but on 6.14 to 6.19 over QEMU's own
//!        (start.sh says why).
//! Full:  does not apply. Trust: both guests are ours; the judge is stock trace-cmd,
//!        and vtrace's own check has to agree.

use super::judge;
use crate::image::Recipe;
use crate::kernel::Kernel;
use crate::machine::{Machine, turn};
use crate::qemu::{Qemu, Release};
use crate::{build, cache, debian, packages};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const START: &str = include_str!("nested/start.sh");
const MOVES: &str = include_str!("nested/moves.sh");
const REST: &str = include_str!("nested/rest.sh");
const STOP: &str = include_str!("nested/stop.sh");
const IN_GUEST: &str = include_str!("nested/in-guest.sh");
/// Of the guest; the host has as many.
const CPUS: u32 = 2;
/// How long the inner guest may take until its agent is there.
const INNER_BOOT_WAIT_MAX: Duration = Duration::from_secs(300);
/// How long the recording may take, its end included.
const RECORD_WAIT_MAX: Duration = Duration::from_secs(300);
/// Of the guest: plenty in every run of its vCPUs, and what causes exits. Arming all there are takes a slow guest too long.
const EVENTS: &str = "-e sched -e irq -e irq_vectors -e timer -e syscalls -e kmem -e rcu";
/// Room for what comes out.
const DISK_BYTES: u64 = 4 << 30;
/// Moves of the guest's TSC that must have been seen at least, where it is moved.
const STEPS_MIN: usize = 3;
/// What is recorded, and how.
const RECORDINGS: [Recording; 4] = [
    Recording { name: "rest", in_guest: "rest", words: "", kind: Kind::Kvm },
    Recording { name: "moves", in_guest: "moves", words: "", kind: Kind::Kvm },
    Recording { name: "raw", in_guest: "moves", words: "--raw-clock", kind: Kind::Raw },
    Recording { name: "measured", in_guest: "rest", words: "", kind: Kind::Measured },
];
/// What the host's kernel counts among the clocks it would use; it leaves out a TSC that it found unstable.
const CLOCKS: &str = "/sys/devices/system/clocksource/clocksource0/available_clocksource";
/// What is said of a guest's clock then, in the closing table and in the file.
const MEASURED: &str = "measured, 2 vCPUs, ±";
const WHY_MEASURED: &str = "the host's kernel finds its TSC unstable";
/// The files of QEMU that a machine without a display needs.
const FIRMWARE: [&str; 4] = ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin"];

/// One recording.
struct Recording {
    name: &'static str,
    /// What the guest does meanwhile.
    in_guest: &'static str,
    /// More words for `vtrace record`.
    words: &'static str,
    kind: Kind,
}

/// Whose word the file's times are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// KVM's.
    Kvm,
    /// The guest's own.
    Raw,
    /// Measured, since the host is made to say that its TSC is unstable.
    Measured,
}

/// Boots, records, judges.
///
/// # Errors
/// When something does not boot, the recording fails, the TSC was not moved, or the judge finds events at wrong times.
pub fn run(kernel: Kernel) -> Result<()> {
    packages::ensure(&["trace-cmd"])?;
    let begun = Instant::now();
    let folder = cache::target().join("lab-nested");
    fs::create_dir_all(&folder)?;
    if let Err(error) = boot_and_record(kernel, &folder) {
        // Now and then an emulated machine stands still for good. What is judged below is not tried again.
        println!("UNSTEADY, once more: {error:#}");
        boot_and_record(kernel, &folder)?;
    }
    println!("files under {}, {:.0?}", folder.display(), begun.elapsed());
    RECORDINGS.iter().try_for_each(|recording| {
        println!("\n{}:", recording.name);
        recording.judge(&folder).with_context(|| format!("recording {}", recording.name))
    })
}

/// Boots the host, has it record, and brings its files into `folder`.
fn boot_and_record(kernel: Kernel, folder: &Path) -> Result<()> {
    let begun = Instant::now();
    let disk = folder.join("out.disk");
    File::create(&disk)?.set_len(DISK_BYTES)?;
    let turn = turn()?;
    let host = host(&turn, kernel, &disk)?;
    println!("host booted: Linux {}, {:.0?}", host.shell("uname -r")?.ok()?, begun.elapsed());
    let result = record(&host, begun);
    // Logs are worth having whether it worked or not.
    host.shell_within("tar -c -C /tmp/out . >/dev/vda && sync", RECORD_WAIT_MAX)?.ok()?;
    drop(host);
    let status = Command::new("tar").arg("-xf").arg(&disk).arg("-C").arg(folder).status()?;
    ensure!(status.success(), "what came out of the host is no archive");
    fs::remove_file(&disk)?;
    result.with_context(|| fs::read_to_string(folder.join("qemu.log")).unwrap_or_default())
}

impl Recording {
    fn judge(&self, folder: &Path) -> Result<()> {
        let [host, guest] = ["", "-guest1"].map(|guest| folder.join(format!("{}{guest}.dat", self.name)));
        let verdict =
            if self.kind == Kind::Raw { judge::judge_raw(&host, &guest)? } else { judge::judge(&host, &guest)? };
        println!("{verdict}");
        match self.kind {
            Kind::Kvm => {
                let steps_min = if self.in_guest == "moves" { STEPS_MIN } else { 0 };
                verdict.ensure_right(steps_min, Some(check(&host, &guest)?.bound_ns))
            }
            Kind::Raw => verdict.ensure_raw(STEPS_MIN),
            Kind::Measured => {
                let said = fs::read(&guest)?;
                let is_there = |words: &str| said.windows(words.len()).any(|window| window == words.as_bytes());
                let stands = is_there(&format!("vtrace clock: {MEASURED}")) && is_there(WHY_MEASURED);
                ensure!(stands, "the file does not say that its clock was measured, and why");
                verdict.ensure_within(check(&host, &guest)?.bound_ns)
            }
        }
    }
}

/// What `vtrace check` finds in a guest's file.
pub(super) struct Checked {
    /// How far off the file says that its times can be.
    pub(super) bound_ns: u64,
    /// Events outside, but by no more than the file says of each of them.
    pub(super) within_bound: u64,
}

/// `vtrace check` on both files; prints what it says.
///
/// # Errors
/// When it finds an event outside by more than the file says of it.
pub(super) fn check(host: &Path, guest: &Path) -> Result<Checked> {
    let vtrace = build::vtrace()?;
    let run = |more: &[&str]| Command::new(&vtrace).arg("check").args(more).arg(host).arg(guest).output();
    let said = run(&["--verbose"])?;
    print!("vtrace check: {}", String::from_utf8_lossy(&said.stdout));
    ensure!(said.status.success(), "vtrace check is not content: {}", String::from_utf8_lossy(&said.stderr));
    let json: serde_json::Value = serde_json::from_slice(&run(&["--json"])?.stdout)?;
    let number = |name: &str| json["guests"][0][name].as_u64();
    let bound_ns = number("bound_ns").context("the file states no bound")?;
    Ok(Checked { bound_ns, within_bound: number("within_bound").context("vtrace check does not count")? })
}

/// The host under test: KVM as a module, QEMU, and an image of the guest.
fn host(turn: &crate::machine::Turn, kernel: Kernel, disk: &Path) -> Result<Machine> {
    let drive = format!("file={},if=none,format=raw,id=out", disk.display());
    let mut builder = Machine::builder(turn, kernel)
        .cpus(CPUS)
        .memory_mb(3072)
        .without_agent()
        // A slow host makes Linux mistrust the TSC, and KVM then writes a new offset at every entry.
        .append("tsc=reliable")
        .module("kvm_amd")
        .module("virtio_blk")
        .arguments(&["-drive", &drive, "-device", "virtio-blk-pci,drive=out"]);
    for (inside, outside) in host_files(kernel)? {
        builder = builder.file(&inside, &outside);
    }
    builder.boot()
}

/// What a host needs to run a guest with our agent: where each file goes, and where it lies.
pub(super) fn host_files(kernel: Kernel) -> Result<Vec<(String, PathBuf)>> {
    let mut guest = Recipe::new(kernel);
    guest.module("msr");
    guest.file("/bin/rest", written("rest", REST)?);
    guest.file("/bin/moves", written("moves", MOVES)?);
    let guest = guest.make()?;
    let mut files = qemu()?;
    files.extend([("/guest/vmlinuz".into(), guest.vmlinuz), ("/guest/initramfs".into(), guest.initramfs)]);
    for (name, text) in [("start-guest", START), ("stop-guest", STOP), ("in-guest", IN_GUEST)] {
        files.push((format!("/bin/{name}"), written(name, text)?));
    }
    Ok(files)
}

/// QEMU with its loader, libraries and firmware: where each goes, and where it lies.
fn qemu() -> Result<Vec<(String, PathBuf)>> {
    let root = Qemu::unpack(Release::Newest)?.root().to_path_buf();
    let mut files = vec![("/qemu/qemu-system-x86_64".to_owned(), root.join("usr/bin/qemu-system-x86_64"))];
    for library in debian::libraries(&root, "usr/bin/qemu-system-x86_64")? {
        let name = library.file_name().context("a library has a name")?.to_string_lossy();
        files.push((format!("/qemu/lib/{name}"), library.clone()));
    }
    for name in FIRMWARE {
        let places = ["usr/share/seabios", "usr/share/qemu"].map(|dir| root.join(dir).join(name));
        let place = places.into_iter().find(|path| path.exists());
        files.push((format!("/qemu/share/{name}"), place.with_context(|| format!("QEMU has no {name}"))?));
    }
    Ok(files)
}

/// A script as a file, for an image.
pub(super) fn written(name: &str, text: &str) -> Result<PathBuf> {
    let folder = cache::target().join("lab-nested");
    fs::create_dir_all(&folder)?;
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Boots the guest in the host and records both while the guest moves its TSC.
fn record(host: &Machine, begun: Instant) -> Result<()> {
    let start = format!("sh /bin/start-guest {} host {CPUS}", INNER_BOOT_WAIT_MAX.as_secs());
    println!("{}", host.shell_within(&start, INNER_BOOT_WAIT_MAX + Duration::from_secs(30))?.ok()?);
    println!("guest booted under KVM, its agent is there: {:.0?}", begun.elapsed());
    for Recording { name, in_guest, words, kind } in RECORDINGS {
        if kind == Kind::Measured {
            let distrust = format!("echo 'acpi_pm ' >/tmp/clocks && mount --bind /tmp/clocks {CLOCKS}");
            host.shell(&distrust)?.ok()?;
        }
        let record = format!(
            "cd /tmp/out; vtrace record {words} --dir /run/vtrace -o {name}.dat -b 16384 -e kvm -e sched \
             --dom guest1 -b 8192 {EVENTS} -- in-guest {in_guest}"
        );
        let said = host.shell_within(&record, RECORD_WAIT_MAX)?.ok()?;
        println!("{said}");
        let is_said = said.contains(&format!("clock guest1: {MEASURED}")) && said.contains(WHY_MEASURED);
        ensure!(is_said == (kind == Kind::Measured), "the closing table does not say whose word its times are");
        println!("{name} recorded: {:.0?}", begun.elapsed());
    }
    host.shell("cat /tmp/out/guest.answers; stop-guest")?.ok().map(|said| println!("{said}"))
}
