//! Bochs: an emulator of an Intel CPU whose VMX scales the TSC of its guests, with 48 bits. Nothing else here does.
//!
//! In:    a guest image, files to put into the machine. Out: what it wrote to its console, and files out of it.
//! Runs:  bochs as a child process in a terminal of its own; a call returns when the machine has powered itself off.
//! Full:  a machine that is not done in time is an error that shows its console. Trust: packages checked by apt.
//!
//! It interprets: a kernel boots in a minute or two, and whatever else the machine under it does makes no difference to
//! what is in it, so that it takes no turn with other machines. Files travel as tar archives on disks of the machine (/dev/sda in,
//! /dev/sdb out), because the BIOS reads an initramfs too slowly to put them there.

use crate::debian::{self, Set};
use crate::image::Image;
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const BOCHS: Set = Set {
    name: "bochs",
    suites: &["bookworm"],
    packages: &["bochs", "bochs-term", "bochsbios", "vgabios", "isolinux", "syslinux-common", "xorriso"],
    with_dependencies: true,
};
/// What the machine's own kernel needs to read its disks.
pub const DISK_MODULES: [&str; 2] = ["ata_piix", "sd_mod"];
/// A disk's size is a multiple of heads × sectors × 512.
const CYLINDER_BYTES: u64 = 16 * 63 * 512;
const LOOK_EVERY: Duration = Duration::from_millis(200);
const SCREEN_WAIT_MAX: Duration = Duration::from_secs(60);
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
    let root = debian::unpack(&BOCHS)?;
    fs::create_dir_all(job.folder)?;
    let disks = [job.folder.join("in.disk"), job.folder.join("out.disk")];
    write_disk(&disks[0], &job.files, job.folder)?;
    File::create(&disks[1])?.set_len(job.out_bytes.next_multiple_of(CYLINDER_BYTES))?;
    let cd = write_cd(&root, job)?;
    let serial = job.folder.join("console.log");
    let _ = fs::remove_file(&serial); // it may not be there
    fs::write(job.folder.join("bochsrc"), settings(&root, job.folder, &cd, &disks)?)?;
    fs::write(job.folder.join("rc"), "c\n")?; // Debian's Bochs begins in its debugger
    let mut child = start(&root, job)?;
    let result = look_away(&mut child, job.folder).and_then(|mut screen| {
        let result = wait(&mut child, &serial, job.wait_max);
        let _ = screen.kill();
        let _ = screen.wait();
        result
    });
    let _ = child.kill(); // with its terminal it takes Bochs along
    let _ = child.wait();
    let console = result?;
    let status = Command::new("tar").arg("-xf").arg(&disks[1]).arg("-C").arg(job.folder).status()?;
    ensure!(status.success(), "what came out of the machine is no archive:\n{}", last_lines(&console));
    disks.iter().chain([&cd]).try_for_each(fs::remove_file)?;
    Ok(console)
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
    let append = format!("console=ttyS0 panic=-1 nokaslr mitigations=off vtrace.agent=off {}", job.append);
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

/// bochsrc.
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
        "plugin_ctrl: unmapped=1, biosdev=1, speaker=0, extfpuirq=1, parallel=0, serial=1, gameport=0, e1000=0, \
         es1370=0, sb16=0\nconfig_interface: textconfig\ndisplay_library: term\nmemory: guest=2048, host=2048\n\
         romimage: file=\"{}\"\nvgaromimage: file=\"{}\"\n\
         cpu: model=corei7_skylake_x, count=1, ips=50000000, reset_on_triple_fault=0\nboot: cdrom\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\nata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15\n\
         {}{}ata1-master: type=cdrom, path=\"{}\", status=inserted\n\
         com1: enabled=1, mode=file, dev=\"{}\"\nlog: \"{}\"\nclock: sync=none, time0=local\npanic: action=fatal\n",
        bios.display(),
        vga.display(),
        disk("ata0-master", &disks[0])?,
        disk("ata0-slave", &disks[1])?,
        cd.display(),
        folder.join("console.log").display(),
        folder.join("bochs.log").display(),
    ))
}

/// Bochs wants a terminal. It ends in time even if this process does not see to it.
fn start(root: &Path, job: &Job<'_>) -> Result<Child> {
    let folder = job.folder;
    let bochs = debian::command(root, "usr/bin/bochs-bin")?;
    let library = root.join("usr/lib/x86_64-linux-gnu");
    let words = std::iter::once(bochs.get_program()).chain(bochs.get_args());
    let words: Vec<String> = words.map(|word| format!("'{}'", word.to_string_lossy())).collect();
    let line = format!(
        "exec timeout --foreground {} {} -q -f '{}/bochsrc' -rc rc",
        job.wait_max.as_secs(),
        words.join(" "),
        folder.display()
    );
    let mut script = Command::new("script");
    script.args(["-qfc", &line, "/dev/null"]).current_dir(folder).env("TERM", "xterm");
    // The libraries of its plugins are found by its own loader's path.
    script.env("LTDL_LIBRARY_PATH", library.join("bochs/plugins")).env("BXSHARE", root.join("usr/share/bochs"));
    script.stdin(Stdio::piped()).stdout(File::create(folder.join("bochs.out"))?).stderr(Stdio::null());
    script.spawn().context("cannot run script")
}

/// A Bochs with a debugger opens a terminal more for the machine's screen, and blocks once nobody reads that: reads it.
fn look_away(child: &mut Child, folder: &Path) -> Result<Child> {
    let begun = Instant::now();
    loop {
        let said = fs::read(folder.join("bochs.out")).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let screen = said.split_once("connected to screen \"").and_then(|(_, rest)| rest.split_once('"'));
        if let Some((screen, _)) = screen {
            let read = format!("stty -F '{screen}' raw -echo && exec cat '{screen}'");
            let mut sh = Command::new("sh");
            sh.args(["-c", &read]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            return sh.spawn().context("cannot run sh");
        }
        ensure!(child.try_wait()?.is_none() && begun.elapsed() < SCREEN_WAIT_MAX, "Bochs does not start: {said}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Waits until the machine has powered off.
fn wait(child: &mut Child, serial: &Path, wait_max: Duration) -> Result<String> {
    let begun = Instant::now();
    let console = || fs::read(serial).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    loop {
        std::thread::sleep(LOOK_EVERY);
        if child.try_wait()?.is_some() || console().contains("reboot: Power down") {
            return Ok(console());
        }
        if begun.elapsed() > wait_max {
            bail!("the machine is not done after {wait_max:?}; its console:\n{}", last_lines(&console()));
        }
    }
}

fn last_lines(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
}
