//! The host side of a guest: its folder and FIFOs.
//!
//! In:    a guest's name, its CPUs, how its ports come to the host; the version of its QEMU
//! Out:   a folder that server and QEMU share ([`Folder`])
//! Runs:  on the caller's thread; repeating it changes nothing
//! Full:  at most [`LANES_MAX`] CPUs
//! Trust: processes that may write the folder can act as the guest's server or its QEMU
//!
//! `ROOT/NAME/guest.toml` stores the transport and the number of CPUs; the server reads it. The folder also contains the
//! ports, named as in the guest: `PORT.sock`, or `PORT.in` and `PORT.out` as QEMU's `-chardev pipe` names them (in: to the
//! guest).

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::{
    sys::stat::Mode,
    unistd::{Gid, chown, mkfifo},
};
use serde::Deserialize;
use vtrace_common::limits::{DEVICE_LANES_MAX, LANES_MAX};

use crate::{
    device::lane_range::{CONTROL_PORT_NAME, LANE_PORT_PREFIX},
    sys::folder_entry::FolderEntry,
};

/// Default directory of the guests' folders.
pub const ROOT: &str = "/var/lib/vtrace/virt";
/// File with a guest's setup.
const FILE: &str = "guest.toml";
/// Longest path of a unix socket (sun_path, unix(7)), without its terminating zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// How trace data leaves a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// Our vhost-user device: data goes from guest memory to the file (QEMU 10.2)
    VhostUser,
    /// QEMU's device with a unix socket for each port; QEMU reconnects by itself
    Socket,
    /// QEMU's device with two FIFOs for each port
    Pipe,
}

impl Transport {
    /// Name on the command line and in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::VhostUser => "vhost-user",
            Self::Socket => "socket",
            Self::Pipe => "pipe",
        }
    }
}

/// A guest's setup.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// How trace data leaves the guest.
    pub transport: Transport,
    /// Number of CPUs with a port: 1 to [`LANES_MAX`].
    pub cpus: usize,
}

impl Setup {
    /// Parses `text`, the content of `path`.
    ///
    /// # Errors
    /// [`SetupFault::Parse`], [`SetupFault::Cpus`]
    pub fn parse(text: &str, path: PathBuf) -> Result<Self, SetupFault> {
        let parsed: Result<Self, _> = toml::from_str(text);
        let setup = parsed.map_err(|error| SetupFault::Parse { path, detail: error.to_string() })?;
        check_cpus(setup.cpus).map(|()| setup)
    }

    /// Number of vhost-user devices that the CPUs need.
    pub fn devices(self) -> usize {
        self.cpus.div_ceil(DEVICE_LANES_MAX)
    }

    /// Names of the ports: the control port, then one for each CPU.
    pub fn ports(self) -> impl Iterator<Item = String> {
        let lanes = (0..self.cpus).map(|cpu| format!("{LANE_PORT_PREFIX}{cpu}"));
        std::iter::once(CONTROL_PORT_NAME.to_owned()).chain(lanes)
    }
}

/// A guest's folder that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SetupFault {
    /// A system call failed.
    #[error("{}: {call}", path.display())]
    File {
        /// Path.
        path: PathBuf,
        /// Name of the call.
        call: &'static str,
        /// The error.
        source: io::Error,
    },
    /// The file is not valid.
    #[error("{}: {detail}", path.display())]
    Parse {
        /// Path of the file.
        path: PathBuf,
        /// Line and reason.
        detail: String,
    },
    /// No CPUs, or too many.
    #[error("{0} CPUs: 1 to {LANES_MAX} can have a port")]
    Cpus(usize),
    /// Another file has the name of a FIFO.
    #[error("{} exists and is not a FIFO", .0.display())]
    NotFifo(PathBuf),
    /// The path is too long for a socket.
    #[error("{} is longer than a socket's path may be ({SOCKET_PATH_BYTES_MAX} bytes)", .0.display())]
    Long(PathBuf),
}

/// The folder of one guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// The folder of a guest whose name was checked ([`check_name`](crate::server::check_name)).
    pub fn of(root: &Path, guest: &str) -> Self {
        Self { path: root.join(guest) }
    }

    /// Path of a port, without its suffix.
    pub fn port(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The socket of a port.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.sock"))
    }

    /// The directory in which QEMU creates sockets.
    fn qemu(&self) -> PathBuf {
        self.path.join("qemu")
    }

    /// QEMU's QMP socket.
    pub fn qmp(&self) -> PathBuf {
        self.qemu().join("qmp.sock")
    }

    /// The FIFO that QEMU reads for a port.
    pub fn fifo_in(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.in"))
    }

    /// The FIFO that QEMU writes for a port.
    pub fn fifo_out(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.out"))
    }

    /// The guest's setup; `None` if it has none.
    ///
    /// # Errors
    /// [`SetupFault`] for a file that cannot be read or is not valid.
    pub fn setup(&self) -> Result<Option<Setup>, SetupFault> {
        let path = self.path.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(SetupFault::File { path, call: "read", source }),
        };
        Setup::parse(&text, path).map(Some)
    }

    /// Creates the folder and the files that `setup` needs, for QEMU's `group` if given, and removes other FIFOs.
    ///
    /// # Errors
    /// [`SetupFault`]; files created before the error stay.
    pub fn make(&self, setup: Setup, group: Option<u32>) -> Result<(), SetupFault> {
        check_cpus(setup.cpus)?;
        fs::create_dir_all(&self.path).map_err(|source| fault(&self.path, "mkdir", source))?;
        permit(&self.path, 0o750, group)?;
        let mut wanted = Vec::new();
        match setup.transport {
            Transport::VhostUser => {
                check_length(self.qmp())?;
                fs::create_dir_all(self.qemu()).map_err(|source| fault(&self.qemu(), "mkdir", source))?;
                permit(&self.qemu(), 0o770, group)?;
            }
            Transport::Socket => setup.ports().try_for_each(|name| check_length(self.socket(&name)))?,
            Transport::Pipe => wanted = setup.ports().flat_map(|n| [self.fifo_in(&n), self.fifo_out(&n)]).collect(),
        }
        wanted.iter().try_for_each(|path| make_fifo(path, group))?;
        self.remove_others(&wanted)?;
        let path = self.path.join(FILE);
        let text = format!("transport = \"{}\"\ncpus = {}\n", setup.transport.name(), setup.cpus);
        let written = FolderEntry::resolve(&path).and_then(|entry| entry.replace(text.as_bytes()));
        written.map_err(|source| fault(&path, "write", source))
    }

    /// Removes FIFOs of an earlier setup: a QEMU that opened them would wait for ever.
    fn remove_others(&self, wanted: &[PathBuf]) -> Result<(), SetupFault> {
        let entries = fs::read_dir(&self.path).map_err(|source| fault(&self.path, "read", source))?;
        let stale = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_fifo()));
        for path in stale.map(|entry| entry.path()).filter(|path| !wanted.contains(path)) {
            fs::remove_file(&path).map_err(|source| fault(&path, "remove", source))?;
        }
        Ok(())
    }
}

fn fault(path: &Path, call: &'static str, source: io::Error) -> SetupFault {
    SetupFault::File { path: path.into(), call, source }
}

fn make_fifo(path: &Path, group: Option<u32>) -> Result<(), SetupFault> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_fifo() => {}
        Ok(_) => return Err(SetupFault::NotFifo(path.into())),
        Err(_) => mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| fault(path, "mkfifo", errno.into()))?,
    }
    permit(path, 0o660, group)
}

fn permit(path: &Path, mode: u32, group: Option<u32>) -> Result<(), SetupFault> {
    let permissions = fs::Permissions::from_mode(mode);
    fs::set_permissions(path, permissions).map_err(|source| fault(path, "chmod", source))?;
    let Some(group) = group.map(Gid::from_raw) else { return Ok(()) };
    chown(path, None, Some(group)).map_err(|errno| fault(path, "chown", errno.into()))
}

fn check_cpus(cpus: usize) -> Result<(), SetupFault> {
    if (1..=LANES_MAX).contains(&cpus) { Ok(()) } else { Err(SetupFault::Cpus(cpus)) }
}

fn check_length(path: PathBuf) -> Result<(), SetupFault> {
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX { Err(SetupFault::Long(path)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Folder) -> Vec<String> {
        let entries = fs::read_dir(&folder.path).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn setup_done_twice_is_as_done_once_and_is_read_back() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::of(root.path(), "guest1");
        assert_eq!(folder.setup().unwrap(), None);
        let setup = Setup { transport: Transport::Pipe, cpus: 1 };
        let expected =
            ["agent-ctl-path.in", "agent-ctl-path.out", "guest.toml", "trace-path-cpu0.in", "trace-path-cpu0.out"];
        for _ in 0..2 {
            folder.make(setup, None).unwrap();
            assert_eq!((names(&folder), folder.setup().unwrap()), (expected.map(String::from).to_vec(), Some(setup)));
        }
        let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(folder.path.clone()), mode(folder.fifo_in("trace-path-cpu0"))), (0o750, 0o660));
    }

    #[test]
    fn fifos_of_another_setup_are_removed_and_other_files_are_not() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::of(root.path(), "guest1");
        folder.make(Setup { transport: Transport::Pipe, cpus: 2 }, None).unwrap();
        fs::write(folder.path.join("notes"), "a person's").unwrap();
        folder.make(Setup { transport: Transport::Socket, cpus: 2 }, None).unwrap();
        assert_eq!(names(&folder), ["guest.toml", "notes"]);
        fs::write(folder.fifo_in("trace-path-cpu0"), "a person's").unwrap();
        let fault = folder.make(Setup { transport: Transport::Pipe, cpus: 1 }, None).unwrap_err();
        assert!(matches!(fault, SetupFault::NotFifo(_)), "{fault}");
    }

    #[test]
    fn link_planted_as_the_new_setup_is_replaced_and_its_target_stays() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::of(root.path(), "guest1");
        let precious = root.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        fs::create_dir(&folder.path).unwrap();
        std::os::unix::fs::symlink(&precious, folder.path.join("guest.toml.new")).unwrap();
        folder.make(Setup { transport: Transport::Socket, cpus: 1 }, None).unwrap();
        assert_eq!((fs::read(&precious).unwrap(), names(&folder)), (b"precious".into(), vec!["guest.toml".to_owned()]));
    }

    #[test]
    fn invalid_setups_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::of(root.path(), "guest1");
        for cpus in [0, LANES_MAX + 1] {
            assert!(matches!(folder.make(Setup { transport: Transport::Pipe, cpus }, None), Err(SetupFault::Cpus(_))));
        }
        let deep = Folder::of(&root.path().join("d".repeat(90)), "guest1");
        let fault = deep.make(Setup { transport: Transport::Socket, cpus: 1 }, None).unwrap_err();
        assert!(matches!(fault, SetupFault::Long(_)), "{fault}");
        folder.make(Setup { transport: Transport::Socket, cpus: 1 }, None).unwrap();
        for text in ["transport = \"carrier-pigeon\"\ncpus = 1", "cpus = 1", "transport = \"pipe\"\ncpus = 0"] {
            fs::write(folder.path.join(FILE), text).unwrap();
            assert!(folder.setup().is_err(), "{text}");
        }
    }
}
