//! `vtrace setup`

use std::fs;

use super::{
    args::{MEMORY, SetupArgs},
    complaint::Complaint,
    output::{put, say},
};
use crate::{
    server::{DIRECTORY, check_name},
    vmm::{
        libvirt,
        qemu::{Guest, PROGRAMS, QemuVersion, VHOST_USER_SINCE},
        setup::{Folder, ROOT, Setup, SetupFault, Transport},
    },
};

/// Groups that libvirt's QEMU runs as, by distribution.
const LIBVIRT_GROUPS: [&str; 2] = ["libvirt-qemu", "qemu"];

/// Creates the guest's folder and prints what to add to its virtual machine.
pub(super) fn run(args: &SetupArgs) -> Result<u8, Complaint> {
    let failed = format!("cannot set up {}", args.dom);
    check_name(&args.dom).map_err(|fault| Complaint::usage(&failed, fault, "use another name"))?;
    if args.qemu == Some(None) && args.libvirt {
        return Err(Complaint::usage(&failed, "--qemu without FILE and --libvirt exclude each other", "omit --qemu"));
    }
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
    let guest =
        Guest { name: &args.dom, folder: &folder, setup, run: &args.dir, memory: &args.memory, machine: args.machine };
    say(&format!("{}: QEMU {version}, {} ports, transport {}", args.dom, args.cpus + 1, transport.name()));
    if args.libvirt {
        print_elements(&guest)?;
    } else {
        print_options(&guest, version)?;
    }
    say(&next(args, &folder, transport));
    Ok(0)
}

/// The version of the QEMU that will run the guest.
fn version(args: &SetupArgs) -> Result<QemuVersion, Complaint> {
    if let Some(Some(program)) = &args.qemu {
        let failed = format!("cannot set up {}", args.dom);
        return QemuVersion::of(program).map_err(|error| {
            Complaint::new(failed, format!("{}: {error}", program.display()), "--qemu-version VERSION")
        });
    }
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

/// What to do next, with the options that differ from their defaults.
fn next(args: &SetupArgs, folder: &Folder, transport: Transport) -> String {
    let mut options = String::new();
    if args.root.as_os_str() != ROOT {
        options.push_str(&format!(" --root {}", quoted(&args.root.display().to_string())));
    }
    let mut dir = String::new();
    if args.dir.as_os_str() != DIRECTORY {
        dir = format!(" --dir {}", quoted(&args.dir.display().to_string()));
    }
    let order = if transport == Transport::VhostUser { " before the guest starts" } else { ", now or later" };
    let mut text = format!("  next: vtrace server --dom {}{options}{dir}{order}; vtrace agent in the guest", args.dom);
    if transport != Transport::VhostUser {
        return text;
    }
    if args.libvirt {
        text.push_str(&format!("\n  migration, save, snapshot: shut {} down and remove the device first", args.dom));
        return text;
    }
    let qmp = folder.qmp();
    let attach = format!("{}{dir} --qmp {}", args.dom, quoted(&qmp.display().to_string()));
    text.push_str(&format!("\n  after a restart of the server: vtrace attach {attach}"));
    text.push_str(&format!("\n  before migration, save or snapshot: vtrace detach {attach}"));
    if args.memory == MEMORY {
        text.push_str(&format!("\n  the guest gets {MEMORY} of memory; --memory SIZE for another size"));
    }
    text
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
    use clap::Parser;

    use super::*;
    use crate::cli::args::{Args, Verb};

    fn next_of(words: &str) -> String {
        let command = format!("vtrace setup --dom guest1 --cpus 1 {words}");
        let args = Args::try_parse_from(command.split_whitespace()).unwrap();
        let Verb::Setup(args) = args.verb else { unreachable!() };
        next(&args, &Folder::of(&args.root, &args.dom), args.transport.unwrap())
    }

    #[test]
    fn next_steps_keep_the_directories_and_name_attach_and_detach() {
        let text = next_of("--transport vhost-user --dir /r --root /v --memory 1G");
        let expected = "  next: vtrace server --dom guest1 --root /v --dir /r before the guest starts; vtrace agent in the guest\n  \
                        after a restart of the server: vtrace attach guest1 --dir /r --qmp /v/guest1/qemu/qmp.sock\n  \
                        before migration, save or snapshot: vtrace detach guest1 --dir /r --qmp /v/guest1/qemu/qmp.sock";
        assert_eq!(text, expected);
        assert!(next_of("--transport vhost-user").contains("gets 4G of memory"));
        assert_eq!(
            next_of("--transport socket --dir /r"),
            "  next: vtrace server --dom guest1 --dir /r, now or later; vtrace agent in the guest"
        );
    }

    #[test]
    fn qemu_is_a_program_or_the_form_and_a_version_may_be_one_number() {
        for (words, expected) in
            [("--qemu", Some(None)), ("--qemu /q", Some(Some("/q".into()))), ("--qemu-version 11", None)]
        {
            let command = format!("vtrace setup --dom guest1 --cpus 1 {words}");
            let Verb::Setup(args) = Args::try_parse_from(command.split_whitespace()).unwrap().verb else {
                unreachable!()
            };
            assert_eq!(args.qemu, expected, "{words}");
        }
    }

    #[test]
    fn word_that_a_shell_would_change_is_quoted() {
        assert_eq!(quoted("socket,id=a,path=/b/c.sock"), "socket,id=a,path=/b/c.sock");
        assert_eq!(quoted("/a b/it's"), r"'/a b/it'\''s'");
    }
}
