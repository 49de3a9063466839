//! Which machine to boot: QEMU's command line.
//!
//! In: choices. Out: a booted [`Machine`]. Runs: in the caller's thread until the guest's shell greets.
//! Full: does not apply. Trust: the caller.

use super::channel::Channel;
use super::{Machine, PATIENCE, Turn, hang_report, qmp, shell};
use crate::image::Recipe;
use crate::kernel::Kernel;
use crate::qemu::{Qemu, Release};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

/// Descriptors per queue: enough for a page run, little enough guest memory (4 KiB each and port).
const QUEUE_SIZE: u32 = 128;

/// Without a check of the timer: it counts ticks against a loop, and on a busy machine an emulated CPU is not given them.
const KERNEL_PARAMETERS: &str = "console=ttyS0 quiet panic=-1 no_timer_check";

/// How a stock virtio-serial port reaches the host.
#[derive(Debug, Clone)]
pub enum Chardev {
    /// QEMU listens on a Unix socket and does not wait for anyone.
    Listen(PathBuf),
    /// QEMU connects to a Unix socket that must be there.
    Connect(PathBuf),
    /// Two FIFOs that must be there: PATH.in and PATH.out.
    Pipe(PathBuf),
    /// Guest bytes are appended to a file.
    File(PathBuf),
}

/// A machine not yet booted.
#[derive(Debug)]
pub struct Builder {
    turn: Turn,
    recipe: Recipe,
    release: Release,
    cpus: u32,
    memory_mb: u32,
    is_memory_shared: bool,
    may_reboot: bool,
    has_agent: bool,
    boot_wait_max: Duration,
    append: String,
    /// Devices and whatever else the caller adds.
    arguments: Vec<String>,
    chardevs: usize,
}

impl Machine {
    /// A guest with 2 CPUs and 512 MiB on the newest QEMU. The turn goes with the machine.
    pub fn builder(turn: &Turn, kernel: Kernel) -> Builder {
        Builder {
            turn: turn.clone(),
            recipe: Recipe::new(kernel),
            release: Release::Newest,
            cpus: 2,
            memory_mb: 512,
            is_memory_shared: true,
            may_reboot: false,
            has_agent: true,
            boot_wait_max: Duration::from_secs(120),
            append: String::new(),
            arguments: Vec::new(),
            chardevs: 0,
        }
    }
}

impl Builder {
    /// Another QEMU than the newest.
    #[must_use]
    pub fn qemu(mut self, release: Release) -> Self {
        self.release = release;
        self
    }

    /// Number of vCPUs. To be set before `vhost_user`, whose number of ports follows from it.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Memory in MiB.
    #[must_use]
    pub fn memory_mb(mut self, memory_mb: u32) -> Self {
        self.memory_mb = memory_mb;
        self
    }

    /// Keeps the guest's memory from the vhost-user peer: a mistake that users make.
    #[must_use]
    pub fn private_memory(mut self) -> Self {
        self.is_memory_shared = false;
        self
    }

    /// Lets the guest reboot; without it a reset ends QEMU.
    #[must_use]
    pub fn reboots(mut self) -> Self {
        self.may_reboot = true;
        self
    }

    /// Starts no agent; `start-agent` in the guest does.
    #[must_use]
    pub fn without_agent(mut self) -> Self {
        self.has_agent = false;
        self
    }

    /// How long booting may take, 120 s if not set.
    #[must_use]
    pub fn boot_within(mut self, wait_max: Duration) -> Self {
        self.boot_wait_max = wait_max;
        self
    }

    /// vtrace's device: the control port and one port per CPU, served by whoever listens on `socket`.
    #[must_use]
    pub fn vhost_user(self, socket: &Path) -> Self {
        let ports = self.cpus + 1;
        self.vhost_user_ports(socket, ports)
    }

    /// vtrace's device with `ports` ports, the control port included.
    #[must_use]
    pub fn vhost_user_ports(mut self, socket: &Path, ports: u32) -> Self {
        let id = self.chardev(&format!("socket,path={}", socket.display()));
        let queues = 2 * (ports + 1);
        self.arguments(&[
            "-device",
            &format!(
                "vhost-user-test-device-pci,id=vu-{id},chardev={id},virtio-id=3,num_vqs={queues},vq_size={QUEUE_SIZE},\
                 config_size=12"
            ),
        ])
    }

    /// Several of vtrace's devices, of `lanes` lanes each, for all CPUs: the first connects to `socket`, NAME.sock, the
    /// others to NAME@2.sock and so on beside it.
    #[must_use]
    pub fn vhost_user_devices(self, socket: &Path, lanes: u32) -> Self {
        let (name, cpus) = (socket.with_extension("").display().to_string(), self.cpus);
        (1..).zip((0..cpus).step_by(usize::try_from(lanes).expect("few"))).fold(self, |builder, (device, first)| {
            let ports = lanes.min(cpus - first) + 1;
            match device {
                1 => builder.vhost_user_ports(socket, ports),
                _ => builder.vhost_user_ports(Path::new(&format!("{name}@{device}.sock")), ports),
            }
        })
    }

    /// QEMU's own virtio-serial with one named port after the other, for a QEMU that does not take ours.
    #[must_use]
    pub fn stock_ports(mut self, ports: &[(&str, Chardev)]) -> Self {
        // Port 0 is kept for consoles.
        let device = format!("virtio-serial-pci,id=vs,max_ports={}", ports.len() + 1);
        self = self.arguments(&["-device", &device]);
        for (name, chardev) in ports {
            let id = self.chardev(&match chardev {
                Chardev::Listen(path) => format!("socket,path={},server=on,wait=off", path.display()),
                Chardev::Connect(path) => format!("socket,path={}", path.display()),
                Chardev::Pipe(path) => format!("pipe,path={}", path.display()),
                Chardev::File(path) => format!("file,path={}", path.display()),
            });
            self = self.arguments(&["-device", &format!("virtserialport,bus=vs.0,chardev={id},name={name}")]);
        }
        self
    }

    /// A free slot `rp0` on the PCI Express bus, for `device_add`.
    #[must_use]
    pub fn hot_plug(self) -> Self {
        self.arguments(&["-device", "pcie-root-port,id=rp0,chassis=1,slot=1"])
    }

    /// More words for QEMU's command line.
    #[must_use]
    pub fn arguments(mut self, words: &[&str]) -> Self {
        self.arguments.extend(words.iter().map(ToString::to_string));
        self
    }

    /// More words for the kernel's command line.
    #[must_use]
    pub fn append(mut self, words: &str) -> Self {
        self.append = format!("{} {words}", self.append);
        self
    }

    /// One more kernel module.
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        self.recipe.module(name);
        self
    }

    /// A busybox sh script that runs in the guest before the agent starts.
    #[must_use]
    pub fn run_script(mut self, text: &str) -> Self {
        self.recipe.run_script(text);
        self
    }

    /// One more file in the guest, executable.
    #[must_use]
    pub fn file(mut self, guest: &str, host: &Path) -> Self {
        self.recipe.file(guest, host.to_path_buf());
        self
    }

    /// Starts QEMU and waits until the guest's shell greets.
    ///
    /// # Errors
    /// When the image cannot be made, QEMU refuses its command line, or the guest does not come up in time; the error
    /// shows what QEMU and the guest's console said.
    pub fn boot(self) -> Result<Machine> {
        let machine = self.start()?;
        machine.await_boot()?;
        Ok(machine)
    }

    /// Starts QEMU and does not wait for the guest.
    pub fn start(self) -> Result<Machine> {
        let dir = tempfile::Builder::new().prefix("vtrace-machine-").tempdir()?;
        let mut command = self.command(dir.path())?;
        let log = File::create(dir.path().join("qemu.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child = command.spawn().context("cannot start QEMU")?;
        let connected = self.turn.note(child.id(), dir.path()).and_then(|()| connect(dir.path(), &mut child));
        match connected {
            Ok((shell, qmp)) => Ok(Machine {
                child: Mutex::new(child),
                shell: Mutex::new(shell),
                qmp: Mutex::new(qmp),
                dir,
                boot_wait_max: self.boot_wait_max,
                _turn: self.turn,
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = std::fs::read_to_string(dir.path().join("qemu.log")).unwrap_or_default();
                Err(error.context(format!("QEMU does not start: {}", said.trim())))
            }
        }
    }

    fn command(&self, dir: &Path) -> Result<Command> {
        let image = self.recipe.make()?;
        let memory = format!("{}M", self.memory_mb);
        let shared = if self.is_memory_shared { "on" } else { "off" };
        let agent = if self.has_agent { "" } else { " vtrace.agent=off" };
        let socket = |name: &str| format!("socket,id={name},path={},server=on,wait=off", dir.join(name).display());
        let mut command = Qemu::unpack(self.release)?.command()?;
        command.args(["-name", "guest,debug-threads=on", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-M", "q35,memory-backend=memory", "-accel", "tcg,thread=multi", "-cpu", "max"]);
        command.args(["-smp", &self.cpus.to_string(), "-m", &memory]);
        command.args(["-object", &format!("memory-backend-memfd,id=memory,size={memory},share={shared}")]);
        command.arg("-kernel").arg(&image.vmlinuz).arg("-initrd").arg(&image.initramfs);
        command.args(["-append", &format!("{KERNEL_PARAMETERS} {}{agent}{}", hang_report::PARAMETERS, self.append)]);
        command.arg("-serial").arg(format!("file:{}", dir.join("console.log").display()));
        command.args(["-chardev", &socket("shell"), "-serial", "chardev:shell"]);
        command.args(["-chardev", &socket("qmp"), "-mon", "chardev=qmp,mode=control"]);
        if !self.may_reboot {
            command.arg("-no-reboot");
        }
        command.args(&self.arguments);
        Ok(command)
    }

    fn chardev(&mut self, what: &str) -> String {
        let id = format!("c{}", self.chardevs);
        self.chardevs += 1;
        let (kind, rest) = what.split_once(',').unwrap_or((what, ""));
        self.arguments.extend(["-chardev".to_owned(), format!("{kind},id={id},{rest}")]);
        id
    }
}

/// Connects both channels, or says at once that QEMU ended.
fn connect(dir: &Path, child: &mut std::process::Child) -> Result<(shell::Shell, qmp::Qmp)> {
    let end = std::time::Instant::now() + PATIENCE;
    while !(dir.join("qmp").exists() && dir.join("shell").exists()) {
        if let Some(status) = child.try_wait()? {
            anyhow::bail!("it ended with {status}");
        }
        ensure!(std::time::Instant::now() < end, "it opens no channel");
        std::thread::sleep(Duration::from_millis(5));
    }
    let shell = shell::Shell::new(Channel::connect(&dir.join("shell"), PATIENCE)?);
    let qmp = qmp::Qmp::new(Channel::connect(&dir.join("qmp"), PATIENCE)?, PATIENCE)?;
    Ok((shell, qmp))
}
