//! `vtrace setup`

use std::fs;

use super::{
    args::SetupArgs,
    complaint::Complaint,
    output::{put, say},
};
use crate::{
    server::check_name,
    vmm::{
        libvirt,
        qemu::{Guest, PROGRAMS, QemuVersion, VHOST_USER_SINCE},
        setup::{Folder, Setup, SetupFault, Transport},
    },
};

/// Groups that libvirt's QEMU runs as, by distribution.
const LIBVIRT_GROUPS: [&str; 2] = ["libvirt-qemu", "qemu"];

/// Creates the guest's folder and prints what to add to its virtual machine.
pub(super) fn run(args: &SetupArgs) -> Result<u8, Complaint> {
    let failed = format!("cannot set up {}", args.dom);
    check_name(&args.dom).map_err(|fault| Complaint::usage(&failed, fault, "use another name"))?;
    let version = version(args)?;
    let transport = args.transport.unwrap_or_else(|| version.transport());
    if transport == Transport::VhostUser && version < VHOST_USER_SINCE {
        let why =
            format!("QEMU {version} does not support the vhost-user device: {VHOST_USER_SINCE} or newer is needed");
        return Err(Complaint::usage(&failed, why, "--transport socket"));
    }
    let group = group(args)?;
    let folder = Folder::of(&args.root, &args.dom);
    let setup = Setup { transport, cpus: args.cpus };
    folder.make(setup, group).map_err(|fault| Complaint::setup(&failed, &fault))?;
    let guest = Guest { name: &args.dom, folder: &folder, setup, run: &args.dir, memory: &args.memory };
    say(&format!("{}: QEMU {version}, {} ports, transport {}", args.dom, args.cpus + 1, transport.name()));
    if args.libvirt {
        print_elements(&guest)?;
    } else {
        print_options(&guest, version)?;
    }
    say(&next(args, transport));
    Ok(0)
}

/// The version of the QEMU that will run the guest.
fn version(args: &SetupArgs) -> Result<QemuVersion, Complaint> {
    args.qemu_version.or_else(QemuVersion::installed).ok_or_else(|| {
        let why = format!("no QEMU is installed here ({})", PROGRAMS.join(", "));
        Complaint::usage(
            format!("cannot set up {}", args.dom),
            why,
            "give the version that runs the guest, such as --qemu-version 10.0",
        )
    })
}

/// The group that may open the guest's files; `None` leaves it as it is.
fn group(args: &SetupArgs) -> Result<Option<u32>, Complaint> {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    match &args.group {
        Some(name) => group_id(&groups, name).map(Some).ok_or_else(|| {
            Complaint::usage(format!("cannot set up {}", args.dom), format!("there is no group {name}"), "--group kvm")
        }),
        None if args.libvirt => Ok(LIBVIRT_GROUPS.iter().find_map(|name| group_id(&groups, name))),
        None => Ok(None),
    }
}

/// Number of a group in the text of /etc/group.
fn group_id(groups: &str, name: &str) -> Option<u32> {
    let line = groups.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split(':').nth(1)?.parse().ok()
}

/// Prints each option with its value in a line, to be pasted after a command.
fn print_options(guest: &Guest<'_>, version: QemuVersion) -> Result<(), Complaint> {
    let options = guest.options(version);
    let lines: Vec<_> = options.chunks(2).map(|pair| format!("  {} {}", pair[0], quoted(&pair[1]))).collect();
    put(&lines.join(" \\\n"))
}

fn print_elements(guest: &Guest<'_>) -> Result<(), Complaint> {
    let elements = libvirt::elements(guest);
    if !elements.devices.is_empty() {
        put(&format!("<!-- inside <devices> -->\n{}", elements.devices))?;
    }
    if let Some(name_space) = elements.name_space {
        put(&format!("<!-- <domain {name_space} …>, and inside it: -->"))?;
    }
    if elements.domain.is_empty() { Ok(()) } else { put(&elements.domain) }
}

/// A word, quoted for a shell.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./,=:@+".contains(letter);
    if word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

fn next(args: &SetupArgs, transport: Transport) -> String {
    let order = if transport == Transport::VhostUser { " before the guest starts" } else { ", now or later" };
    let memory = match (transport, args.memory.as_str()) {
        (Transport::VhostUser, "MEMORY") if !args.libvirt => {
            "\n  replace MEMORY by the size of the guest's memory, as in -m"
        }
        _ => "",
    };
    let root = if args.root.as_os_str() == crate::vmm::setup::ROOT {
        String::new()
    } else {
        format!(" --root {}", args.root.display())
    };
    format!("  next: vtrace server --dom {}{root}{order}; vtrace agent in the guest{memory}", args.dom)
}

impl Complaint {
    /// A guest's folder that cannot be used.
    pub(super) fn setup(failed: &str, fault: &SetupFault) -> Self {
        match fault {
            SetupFault::File { call, path, source } => {
                Self::new(failed, format!("{}: {call}: {source}", path.display()), "run as root, or use --root DIR")
            }
            SetupFault::Parse { .. } => Self::new(failed, fault, "run vtrace setup again"),
            SetupFault::NotFifo(path) => Self::new(failed, fault, format!("move {} away", path.display())),
            SetupFault::Cpus(_) => Self::new(failed, fault, "--cpus, as in QEMU's -smp"),
            SetupFault::Long(_) => Self::new(failed, fault, "use a shorter --root or name"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_that_a_shell_would_change_is_quoted() {
        assert_eq!(quoted("socket,id=a,path=/b/c.sock"), "socket,id=a,path=/b/c.sock");
        assert_eq!(quoted("/a b/it's"), r"'/a b/it'\''s'");
    }
}
