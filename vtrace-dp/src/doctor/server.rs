//! The server: run directory, sockets and their permissions, guests, agents.
//!
//! In:    a directory, /etc/group, the server's list of guests
//! Out:   a [`Finding`] for each check
//! Runs:  on the caller's thread
//! Trust: the server; texts of guests were cleaned there

use std::{
    fs::{self, Metadata},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use vtrace_common::SOFTWARE;
use vtrace_common::wire::client::{DriverState, GuestState};

use super::{Finding, SystemPaths, remedy, text};
use crate::{
    device::lane_range::CONTROL_PORT_NAME,
    recorder::guests::{refusal::holder, silence::SHOWN},
    server::{
        CONTROL_GROUP, CONTROL_SOCKET,
        link::{Link, LinkError},
    },
    vmm::setup::Transport,
};

/// Permission of others to write.
const OTHERS_WRITE: u32 = 0o002;
/// Permission of others to connect to a socket (to write) or to read a FIFO.
const OTHERS: u32 = 0o006;

/// The directory of all sockets: a user who may write there can act as the server.
pub fn run_directory(dir: &Path) -> Finding {
    let check = "run directory";
    let path = dir.display();
    let mode = |about: &Metadata| about.mode() & 0o7777;
    match fs::symlink_metadata(dir) {
        Err(error) => {
            Finding::fail(check, format!("{path}: {error}"), "vtrace server creates it; --dir DIR names another")
        }
        Ok(about) if !about.is_dir() => {
            Finding::fail(check, format!("{path} is not a directory"), "--dir DIR names another")
        }
        Ok(about) if about.mode() & OTHERS_WRITE != 0 => {
            let found = format!("{path} has mode {:04o}: any user can act as the server", mode(&about));
            Finding::fail(check, found, format!("chmod o-w {path}"))
        }
        Ok(about) if about.uid() != 0 => {
            let found = format!("{path} belongs to user {}", about.uid());
            Finding::warn(check, found, format!("chown root {path}, unless that user runs the server"))
        }
        Ok(about) => Finding::ok(check, format!("{path}, mode {:04o}", mode(&about))),
    }
}

/// The control socket.
pub fn control_socket(paths: &SystemPaths, dir: &Path) -> Finding {
    let path = dir.join(CONTROL_SOCKET);
    let finding = node("control", &path, &SOCKET);
    if finding.verdict != super::Severity::Ok {
        return finding;
    }
    let groups = text(&paths.groups).unwrap_or_default();
    let number = groups.lines().find_map(|line| line.strip_prefix(CONTROL_GROUP)?.strip_prefix(':')?.split(':').nth(1));
    let owner = fs::metadata(&path).map(|about| about.gid().to_string()).ok();
    match number {
        None => {
            let remedy = format!("groupadd -r {CONTROL_GROUP}, then restart the server");
            Finding::warn("control", format!("{}; no group {CONTROL_GROUP}: root only", finding.found), remedy)
        }
        Some(number) if owner.as_deref() != Some(number) => {
            let found = format!("{}, not of group {CONTROL_GROUP}", finding.found);
            Finding::warn("control", found, format!("chgrp {CONTROL_GROUP} {}, or restart the server", path.display()))
        }
        Some(_) => Finding::ok("control", format!("{}, group {CONTROL_GROUP}", finding.found)),
    }
}

/// What a socket or FIFO must be.
struct NodeKind {
    /// Name of the file type.
    kind: &'static str,
    is_kind: fn(&fs::FileType) -> bool,
    /// How to create it.
    create: &'static str,
    /// How to create it after another file was removed.
    recreate: &'static str,
    /// What others can do if the mode lets them.
    risk: &'static str,
}

/// The FIFO that QEMU writes the control port to.
const FIFO: NodeKind = NodeKind {
    kind: "FIFO",
    is_kind: FileTypeExt::is_fifo,
    create: "run vtrace setup again",
    recreate: "run vtrace setup again",
    risk: "any user can act as the guest",
};

const SOCKET: NodeKind = NodeKind {
    kind: "socket",
    is_kind: FileTypeExt::is_socket,
    create: "vtrace server --dom GUEST; --dir DIR names another directory",
    recreate: "restart the server",
    risk: "any user can connect",
};

fn node(check: &str, path: &Path, expected: &NodeKind) -> Finding {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) => Finding::fail(check, format!("{shown}: {error}"), expected.create),
        Ok(about) if !(expected.is_kind)(&about.file_type()) => Finding::fail(
            check,
            format!("{shown} is not a {}", expected.kind),
            format!("remove {shown}, then {}", expected.recreate),
        ),
        Ok(about) if about.mode() & OTHERS != 0 => {
            let found = format!("{shown} has mode {:04o}: {}", about.mode() & 0o7777, expected.risk);
            Finding::fail(check, found, format!("chmod 0660 {shown}"))
        }
        Ok(about) => Finding::ok(check, format!("{shown}, mode {:04o}", about.mode() & 0o7777)),
    }
}

/// Whether a server of our version answers.
pub fn server(link: &Result<Link, LinkError>) -> Finding {
    let link = match link {
        Ok(link) => link,
        Err(error) => return Finding::fail("server", error.to_string(), remedy::of_link(error)),
    };
    let found = format!("{}, pid {}", link.server().software, link.peer().pid);
    same_software("server", found, &link.server().software)
}

/// The software version; the wire version agrees, or there would be no link.
fn same_software(check: &str, found: String, software: &str) -> Finding {
    // An agent's software has another name before the version.
    let version = |software: &str| software.rsplit(' ').next().map(str::to_owned);
    if version(software) == version(SOFTWARE) {
        return Finding::ok(check, found);
    }
    Finding::warn(check, format!("{found}; this is {SOFTWARE}"), "use the same version of vtrace everywhere")
}

/// The guests in `wanted`, or all.
pub fn guests(states: &[GuestState], wanted: &[String]) -> Vec<Finding> {
    let missing = wanted.iter().filter(|name| states.iter().all(|state| state.name != **name));
    let missing = missing.map(|name| {
        let known: Vec<&str> = states.iter().map(|state| state.name.as_str()).collect();
        Finding::fail(name, "the server has no guest of this name", format!("it has: {}", known.join(", ")))
    });
    let chosen = states.iter().filter(|state| wanted.is_empty() || wanted.contains(&state.name));
    let is_named = !wanted.is_empty();
    missing.chain(chosen.flat_map(|state| guest(state, is_named))).collect()
}

/// A missing requirement: it fails for a guest that was named, and warns for one that may start later.
fn absent(is_named: bool, guest: &str, what: &str, remedy: impl Into<String>) -> Finding {
    if is_named { Finding::fail(guest, what, remedy) } else { Finding::warn(guest, what, remedy) }
}

/// A guest's socket, virtual machine, memory and agent.
fn guest(state: &GuestState, is_named: bool) -> Vec<Finding> {
    let name = &state.name;
    let mut findings = Vec::new();
    let path = Path::new(&state.socket);
    let transport = transport(path);
    if path.is_absolute() {
        findings.push(node(name, path, if transport == Transport::Pipe { &FIFO } else { &SOCKET }));
    }
    let Some(pid) = state.vmm_pid else {
        findings.push(absent(is_named, name, "no virtual machine is connected", without_vmm(transport, state)));
        return findings;
    };
    findings.push(driver(name, pid, state, transport));
    let unready = state.further.iter().filter(|device| device.driver != DriverState::Running).count();
    if unready > 0 {
        let found = format!("{unready} of its {} devices have no driver", state.further.len() + 1);
        findings.push(Finding::warn(name, found, "give QEMU all of them, if its CPUs need them"));
    }
    if state.driver == DriverState::Running {
        findings.push(agent(state, transport, is_named));
    }
    if let Some(who) = holder(state) {
        findings.push(Finding::warn(name, who, "wait for it, or stop it"));
    }
    findings
}

/// The transport, from the path of the guest's control port.
fn transport(path: &Path) -> Transport {
    let is_stream = path.file_stem().is_some_and(|stem| stem == CONTROL_PORT_NAME);
    match path.extension() {
        Some(end) if is_stream && end == "sock" => Transport::Socket,
        Some(end) if is_stream && end == "out" => Transport::Pipe,
        _ => Transport::VhostUser,
    }
}

/// Advice for a guest whose QEMU is not connected.
fn without_vmm(transport: Transport, state: &GuestState) -> String {
    let GuestState { name, socket, .. } = state;
    match transport {
        Transport::VhostUser => format!("start QEMU with a device at {socket}, or vtrace attach {name} --qmp SOCKET"),
        Transport::Socket | Transport::Pipe => {
            let transport = transport.name();
            format!("start QEMU with the options that vtrace setup --dom {name} --transport {transport} prints")
        }
    }
}

/// Advice for a CPU without a port.
fn without_port(transport: Transport) -> &'static str {
    match transport {
        Transport::VhostUser => remedy::NO_PORT,
        Transport::Socket | Transport::Pipe => {
            "vtrace setup --cpus N with all CPUs that may be plugged in, then restart QEMU"
        }
    }
}

fn driver(name: &str, pid: u32, state: &GuestState, transport: Transport) -> Finding {
    let vmm = match pid {
        0 => "virtual machine of an unknown process".into(),
        pid => format!("virtual machine of pid {pid}"),
    };
    match &state.driver {
        DriverState::Running => match transport {
            Transport::VhostUser => Finding::ok(name, format!("{vmm}, memory shared, driver running")),
            Transport::Socket => Finding::ok(name, format!("{vmm}, QEMU's own device, connected")),
            Transport::Pipe => Finding::ok(name, format!("{vmm}, QEMU's own device, FIFOs open")),
        },
        absent @ DriverState::Absent => Finding::warn(name, format!("{vmm}, no driver"), remedy::of_driver(absent)),
        unfit @ DriverState::Unfit(feature) => {
            Finding::fail(name, format!("{vmm}, driver without {feature}"), remedy::of_driver(unfit))
        }
        private @ DriverState::MemoryNotShared => {
            Finding::fail(name, format!("{vmm}, its memory is not shared"), remedy::of_driver(private))
        }
    }
}

fn agent(state: &GuestState, transport: Transport, is_named: bool) -> Finding {
    let name = &state.name;
    let Some(agent) = &state.agent else {
        return absent(is_named, name, "no agent", remedy::NO_AGENT);
    };
    let Some(machine) = &agent.machine else {
        let found = format!("its agent ({}) is of another version", agent.hello.software);
        return Finding::fail(name, found, remedy::AGENT_VERSION);
    };
    if let Some(cpu) = machine.cpus.iter().find(|cpu| !machine.lanes.contains(cpu)) {
        let found = format!("its {cpu} has no port");
        return Finding::warn(name, found, without_port(transport));
    }
    if u64::from(state.silent_s) >= SHOWN.as_secs() {
        let found = format!("its agent has not responded for {} s", state.silent_s);
        return Finding::warn(name, found, remedy::SILENT_GUEST);
    }
    let found = format!("agent {}, {} CPUs, {}", agent.hello.software, machine.cpus.len(), machine.uname);
    same_software(name, found, &agent.hello.software)
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::PermissionsExt, net::UnixListener};

    use vtrace_common::{
        ids::Cpu,
        wire::{
            Hello,
            agent::Machine,
            client::{AgentState, DeviceState},
        },
    };

    use super::{
        super::Severity::{self, Fail, Ok as Fine, Warn},
        *,
    };

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn missing_or_world_writable_run_directory_fails() {
        let folder = tempfile::tempdir().unwrap();
        chmod(folder.path(), 0o755);
        assert_ne!(run_directory(folder.path()).verdict, Fail);
        chmod(folder.path(), 0o777);
        let open = run_directory(folder.path());
        assert!(open.verdict == Fail && open.remedy.starts_with("chmod o-w"), "{open}");
        assert_eq!(run_directory(&folder.path().join("missing")).verdict, Fail);
        fs::write(folder.path().join("file"), "").unwrap();
        assert_eq!(run_directory(&folder.path().join("file")).verdict, Fail);
    }

    #[test]
    fn control_socket_that_is_missing_open_to_all_or_without_a_group_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(CONTROL_SOCKET);
        let paths = SystemPaths { groups: folder.path().join("group"), ..SystemPaths::of_this_machine() };
        let verdict = || control_socket(&paths, folder.path()).verdict;
        assert_eq!(verdict(), Fail);
        fs::write(&path, "").unwrap();
        assert_eq!(verdict(), Fail);
        fs::remove_file(&path).unwrap();
        let _listener = UnixListener::bind(&path).unwrap();
        chmod(&path, 0o666);
        assert_eq!(verdict(), Fail);
        chmod(&path, 0o660);
        assert_eq!(verdict(), Warn, "no such group");
        let group = fs::metadata(&path).unwrap().gid();
        fs::write(&paths.groups, format!("root:x:0:\nvtracer:x:8:\nvtrace:x:{group}:me\n")).unwrap();
        assert_eq!(verdict(), Fine);
        fs::write(&paths.groups, format!("vtrace:x:{}:\n", group + 1)).unwrap();
        assert_eq!(verdict(), Warn, "of another group");
    }

    #[test]
    fn missing_server_fails_and_another_version_warns() {
        let folder = tempfile::tempdir().unwrap();
        let finding = server(&Link::connect(folder.path()));
        assert!(finding.verdict == Fail && finding.remedy.contains("vtrace server"), "{finding}");
        assert_eq!(same_software("server", String::new(), SOFTWARE).verdict, Fine);
        let agent = SOFTWARE.replace("vtrace", "vtrace agent");
        assert_eq!(same_software("guest1", String::new(), &agent).verdict, Fine);
        assert_eq!(same_software("server", String::new(), "vtrace 0.0.9").verdict, Warn);
    }

    fn healthy() -> GuestState {
        let machine = Machine { cpus: vec![Cpu(0), Cpu(1)], lanes: vec![Cpu(0), Cpu(1)], ..Machine::default() };
        GuestState {
            name: "guest1".into(),
            socket: "descriptor 7".into(),
            vmm_pid: Some(77),
            driver: DriverState::Running,
            agent: Some(AgentState { hello: Hello::ours(SOFTWARE), machine: Some(machine) }),
            holder_pid: None,
            holder_uid: None,
            further: Vec::new(),
            lanes_per_device: 126,
            silent_s: 0,
        }
    }

    fn worst(state: GuestState) -> Severity {
        super::super::worst(&guests(&[state], &[]))
    }

    #[test]
    fn healthy_guest_is_ok() {
        assert_eq!(worst(healthy()), Fine);
    }

    #[test]
    fn each_missing_requirement_of_a_guest_is_reported() {
        let lacking = |change: fn(&mut GuestState)| {
            let mut state = healthy();
            change(&mut state);
            worst(state)
        };
        assert_eq!(lacking(|state| state.vmm_pid = None), Warn);
        assert_eq!(lacking(|state| state.driver = DriverState::Absent), Warn);
        assert_eq!(lacking(|state| state.driver = DriverState::MemoryNotShared), Fail);
        assert_eq!(lacking(|state| state.driver = DriverState::Unfit("X".into())), Fail);
        assert_eq!(lacking(|state| state.agent = None), Warn);
        assert_eq!(lacking(|state| state.agent.as_mut().unwrap().machine = None), Fail);
        assert_eq!(lacking(|state| state.agent.as_mut().unwrap().hello.software = "vtrace 9".into()), Warn);
        assert_eq!(lacking(|state| state.agent.as_mut().unwrap().machine.as_mut().unwrap().lanes.truncate(1)), Warn);
        assert_eq!(lacking(|state| state.holder_pid = Some(5)), Warn);
        assert_eq!((lacking(|state| state.silent_s = 4), lacking(|state| state.silent_s = 5)), (Fine, Warn));
        assert_eq!(lacking(|state| state.socket = "/nowhere/guest1.sock".into()), Fail);
        let absent = DeviceState { vmm_pid: None, driver: DriverState::Absent };
        let mut state = healthy();
        state.further = vec![absent];
        assert_eq!(worst(state), Warn);
    }

    #[test]
    fn guest_with_qemus_own_device_needs_no_shared_memory() {
        let folder = tempfile::tempdir().unwrap();
        let [socket, fifo] = ["sock", "out"].map(|end| folder.path().join(CONTROL_PORT_NAME).with_extension(end));
        let _listener = UnixListener::bind(&socket).unwrap();
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        chmod(&socket, 0o660);
        for (path, pid, expected) in [
            (&socket, 77, "virtual machine of pid 77, QEMU's own device, connected"),
            (&fifo, 77, "virtual machine of pid 77, QEMU's own device, FIFOs open"),
            (&fifo, 0, "virtual machine of an unknown process, QEMU's own device, FIFOs open"),
        ] {
            let state = GuestState { socket: path.display().to_string(), vmm_pid: Some(pid), ..healthy() };
            let findings = guest(&state, false);
            assert!(findings.iter().all(|finding| finding.verdict == Fine), "{findings:?}");
            assert_eq!((findings.len(), findings[1].found.as_str()), (3, expected));
            let gone = guest(&GuestState { vmm_pid: None, ..state.clone() }, false);
            assert!(gone[1].remedy.contains("vtrace setup --dom guest1 --transport"), "{gone:?}");
            let asked_for = guest(&GuestState { vmm_pid: None, ..state.clone() }, true);
            assert_eq!(
                (gone[1].verdict, asked_for[1].verdict),
                (Warn, Fail),
                "a guest that may come, and one that has to"
            );
            let mut few = state;
            few.agent.as_mut().unwrap().machine.as_mut().unwrap().lanes.truncate(1);
            assert!(guest(&few, false)[2].remedy.contains("--cpus N"));
        }
        chmod(&fifo, 0o666);
        assert_eq!(node("guest1", &fifo, &FIFO).verdict, Fail);
        assert_eq!(node("guest1", &socket, &FIFO).verdict, Fail);
        assert_eq!(node("guest1", &folder.path().join("missing"), &FIFO).verdict, Fail);
    }

    #[test]
    fn unknown_guest_fails_and_others_are_not_checked() {
        let findings = guests(&[healthy()], &["guest2".into()]);
        assert_eq!((findings.len(), findings[0].verdict), (1, Fail));
        assert!(findings[0].remedy.contains("guest1"));
    }
}
