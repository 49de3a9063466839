//! Bochs: an emulator of an Intel CPU whose VMX scales the TSC of its guests, with 48 bits. Nothing else here does.
//!
//! In:    a guest image, files to put into the machine. Out: what it wrote to its console, and files out of it.
//! Runs:  bochs as a child process; a call returns when the machine has powered itself off.
//! Full:  a machine that is not done in time is an error that shows its console. Trust: packages and sources checked by apt.
//!
//! It interprets: a kernel boots in half a minute, and whatever else the machine under it does makes no difference to
//! what is in it, so that it takes no turn with other machines. Files travel as tar archives on disks of the machine (/dev/sda in,
//! /dev/sdb out), because the BIOS reads an initramfs too slowly to put them there. Debian's own binary has a debugger in
//! it and wants a terminal: it is some three times slower than the one that is built here from the same source.

use crate::cache;
use crate::debian::{self, Set};
use crate::image::Image;
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What it boots from.
const FIRMWARE: Set = Set {
    name: "bochs-firmware",
    suites: &["bookworm"],
    packages: &["bochsbios", "vgabios", "isolinux", "syslinux-common", "xorriso"],
    with_dependencies: true,
};
/// Whose source is built, from which release of Debian.
const SOURCE: (&str, &str) = ("bochs", "trixie");
/// How it is built: an Intel server with VMX, nothing to look at, as fast as it gets.
const OPTIONS: [&str; 15] = [
    "--with-nogui",
    "--enable-cpu-level=6",
    "--enable-x86-64",
    "--enable-vmx=2",
    "--enable-avx",
    "--enable-evex",
    "--enable-memtype",
    "--enable-pci",
    "--enable-monitor-mwait",
    "--enable-repeat-speedups",
    "--enable-fast-function-calls",
    "--enable-handlers-chaining",
    "--enable-trace-linking",
    "--disable-debugger",
    "--disable-docbook",
];
/// How long one process waits while another builds it.
const BUILD_WAIT_MAX: Duration = Duration::from_secs(1800);
/// What the machine's own kernel needs to read its disks.
pub const DISK_MODULES: [&str; 2] = ["ata_piix", "sd_mod"];
/// What the kernel is told of the TSC, which counts instructions. It would read 3.5 GHz from CPUID, and three times as many
/// instructions would pass in each of its seconds.
const TSC_KHZ: u32 = 1_250_000;
/// A disk's size is a multiple of heads × sectors × 512.
const CYLINDER_BYTES: u64 = 16 * 63 * 512;
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How much of a console an error shows, in lines.
const CONSOLE_LINES: usize = 40;

/// What a machine is to do.
#[derive(Debug)]
pub struct Job<'a> {
    /// Kernel and initramfs; its `/run.sh` does the work and powers off.
    pub image: &'a Image,
    /// Files for the machine: where each goes, and where it lies.
    pub files: Vec<(String, PathBuf)>,
    /// More words for the kernel's command line.
    pub append: &'a str,
    /// Where its disks and logs are kept, and the files that come out.
    pub folder: &'a Path,
    /// Room for what comes out.
    pub out_bytes: u64,
    /// How long it may take.
    pub wait_max: Duration,
}

/// Runs the machine until it powers off; what it wrote to /dev/sdb lies in `folder` then. The console is what is returned.
///
/// # Errors
/// When a part cannot be had or made, or the machine is not done in time.
pub fn run(job: &Job<'_>) -> Result<String> {
    let (program, root) = (program()?, debian::unpack(&FIRMWARE)?);
    fs::create_dir_all(job.folder)?;
    let disks = [job.folder.join("in.disk"), job.folder.join("out.disk")];
    write_disk(&disks[0], &job.files, job.folder)?;
    File::create(&disks[1])?.set_len(job.out_bytes.next_multiple_of(CYLINDER_BYTES))?;
    let cd = write_cd(&root, job)?;
    let serial = job.folder.join("console.log");
    for left in disks.iter().map(|disk| disk.with_extension("disk.lock")).chain([serial.clone()]) {
        let _ = fs::remove_file(left); // of a machine that was killed; it may not be there
    }
    fs::write(job.folder.join("bochsrc"), settings(&root, job.folder, &cd, &disks)?)?;
    let mut child = start(&program, job.folder)?;
    let result = wait(&mut child, &serial, job.wait_max);
    let _ = child.kill();
    let _ = child.wait();
    let console = result?;
    let status = Command::new("tar").arg("-xf").arg(&disks[1]).arg("-C").arg(job.folder).status()?;
    ensure!(status.success(), "what came out of the machine is no archive:\n{}", last_lines(&console));
    disks.iter().chain([&cd]).try_for_each(fs::remove_file)?;
    Ok(console)
}

/// Bochs, built on first use.
fn program() -> Result<PathBuf> {
    let (package, suite) = SOURCE;
    let dir = cache::dir(&format!("{package}-{suite}"))?;
    let _turn = cache::lock(&dir.join(".lock"), "the build of Bochs", BUILD_WAIT_MAX)?;
    let (program, stamp, options) = (dir.join("bochs"), dir.join("options"), OPTIONS.join(" "));
    if fs::read_to_string(&stamp).is_ok_and(|found| found == options) && program.exists() {
        return Ok(program);
    }
    let source = debian::source(package, suite)?;
    eprintln!("building Bochs, once, in a few minutes");
    let scratch = tempfile::tempdir_in(&dir)?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let log = dir.join("build.log");
    let make = format!("cp -r '{}/.' . && ./configure {options} && make -j{jobs}", source.display());
    let output = File::create(&log)?;
    let mut sh = Command::new("sh");
    sh.args(["-ec", &make]).current_dir(&scratch).stdin(Stdio::null());
    let status = sh.stdout(output.try_clone()?).stderr(output).status()?;
    ensure!(status.success(), "Bochs does not build, see {}", log.display());
    fs::copy(scratch.path().join("bochs"), &program)?;
    fs::write(stamp, options)?;
    Ok(program)
}

/// The files in an archive, at the start of a disk.
fn write_disk(disk: &Path, files: &[(String, PathBuf)], folder: &Path) -> Result<()> {
    let tree = tempfile::tempdir_in(folder)?;
    for (inside, outside) in files {
        let place = tree.path().join(inside.trim_start_matches('/'));
        fs::create_dir_all(place.parent().context("a file lies in a folder")?)?;
        let _ = fs::remove_file(&place); // one that was named twice
        symlink(fs::canonicalize(outside)?, &place).with_context(|| format!("cannot take {}", outside.display()))?;
    }
    let status = Command::new("tar")
        .args(["-c", "-h", "--mode=0755", "-f"])
        .arg(disk)
        .arg("-C")
        .arg(tree.path())
        .arg(".")
        .status()?;
    ensure!(status.success(), "tar cannot pack the files for the machine");
    let bytes = fs::metadata(disk)?.len();
    File::options().write(true).open(disk)?.set_len(bytes.next_multiple_of(CYLINDER_BYTES))?;
    Ok(())
}

/// A CD that boots the kernel.
fn write_cd(root: &Path, job: &Job<'_>) -> Result<PathBuf> {
    let tree = tempfile::tempdir_in(job.folder)?;
    fs::create_dir(tree.path().join("isolinux"))?;
    let put = |from: PathBuf, name: &str| {
        fs::copy(&from, tree.path().join(name)).with_context(|| format!("cannot copy {}", from.display()))
    };
    put(root.join("usr/lib/ISOLINUX/isolinux.bin"), "isolinux/isolinux.bin")?;
    put(root.join("usr/lib/syslinux/modules/bios/ldlinux.c32"), "isolinux/ldlinux.c32")?;
    put(job.image.vmlinuz.clone(), "vmlinuz")?;
    let packed = File::create(tree.path().join("initrd.gz"))?;
    let status = Command::new("gzip").args(["-6", "-c"]).arg(&job.image.initramfs).stdout(packed).status()?;
    ensure!(status.success(), "gzip cannot pack the initramfs");
    let append = format!(
        "console=ttyS0 quiet panic=-1 nokaslr mitigations=off vtrace.agent=off tsc=reliable tsc_early_khz={TSC_KHZ} {}",
        job.append
    );
    let menu =
        format!("default l\nprompt 0\ntimeout 1\nlabel l\n kernel /vmlinuz\n append initrd=/initrd.gz {append}\n");
    fs::write(tree.path().join("isolinux/isolinux.cfg"), menu)?;
    let cd = job.folder.join("boot.iso");
    let _ = fs::remove_file(&cd); // it may not be there
    let mut xorriso = debian::command(root, "usr/bin/xorriso")?;
    xorriso.args(["-as", "mkisofs", "-quiet", "-o"]).arg(&cd);
    xorriso.args(["-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"]);
    xorriso.args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]).arg(tree.path());
    let output = xorriso.output().context("cannot run xorriso")?;
    ensure!(output.status.success(), "xorriso: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(cd)
}

/// bochsrc. Nothing but a panic is logged: Bochs logs its speed from a signal handler once a second, and stands still for
/// good where that finds the log's lock taken by a line being written.
fn settings(root: &Path, folder: &Path, cd: &Path, disks: &[PathBuf; 2]) -> Result<String> {
    let share = root.join("usr/share");
    let disk = |place: &str, path: &Path| -> Result<String> {
        let cylinders = fs::metadata(path)?.len() / CYLINDER_BYTES;
        let path = path.display();
        Ok(format!(
            "{place}: type=disk, path=\"{path}\", mode=flat, cylinders={cylinders}, heads=16, spt=63, translation=auto\n"
        ))
    };
    let (bios, vga) = (share.join("bochs/BIOS-bochs-latest"), share.join("vgabios/vgabios.bin"));
    Ok(format!(
        "config_interface: textconfig\ndisplay_library: nogui\nmemory: guest=2048, host=2048\n\
         romimage: file=\"{}\"\nvgaromimage: file=\"{}\"\n\
         cpu: model=corei7_skylake_x, count=1, ips=50000000, reset_on_triple_fault=0\nboot: cdrom\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\nata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15\n\
         {}{}ata1-master: type=cdrom, path=\"{}\", status=inserted\n\
         com1: enabled=1, mode=file, dev=\"{}\"\nlog: \"{}\"\nclock: sync=none, time0=local\npanic: action=fatal\n\
         info: action=ignore\nerror: action=ignore\n",
        bios.display(),
        vga.display(),
        disk("ata0-master", &disks[0])?,
        disk("ata0-slave", &disks[1])?,
        cd.display(),
        folder.join("console.log").display(),
        folder.join("bochs.log").display(),
    ))
}

/// Starts Bochs; it goes when this process does.
fn start(program: &Path, folder: &Path) -> Result<Child> {
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--pdeathsig", "KILL"]).arg(program).args(["-q", "-f", "bochsrc"]).current_dir(folder);
    let said = File::create(folder.join("bochs.out"))?;
    setpriv.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
    setpriv.spawn().context("cannot run setpriv")
}

/// Waits until the machine has powered off.
fn wait(child: &mut Child, serial: &Path, wait_max: Duration) -> Result<String> {
    let begun = Instant::now();
    let console = || fs::read(serial).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    loop {
        std::thread::sleep(LOOK_EVERY);
        let has_ended = child.try_wait()?.is_some();
        if console().trim_end().ends_with("reboot: Power down") {
            return Ok(console());
        }
        ensure!(!has_ended, "Bochs has ended, see bochs.out beside {}:\n{}", serial.display(), last_lines(&console()));
        if begun.elapsed() > wait_max {
            bail!("the machine is not done after {wait_max:?}; its console:\n{}", last_lines(&console()));
        }
    }
}

fn last_lines(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
}
