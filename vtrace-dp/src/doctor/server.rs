//! The run directory, its sockets and their rights, the server behind them, its guests and their agents.
//!
//! In:    a folder, /etc/group, the server's list of guests
//! Out:   a [`Finding`] each
//! Runs:  on the caller's thread; a server that does not answer is waited for as every client does
//! Full:  does not apply
//! Trust: the server; what guests say of themselves was cleaned there

use std::{
    fs::{self, Metadata},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use vtrace_common::SOFTWARE;
use vtrace_common::wire::client::{DriverState, GuestState};

use super::{Finding, Place, text};
use crate::{
    device::lane_range::CONTROL_PORT_NAME,
    recorder::guests::{refusal::holder, silence::SHOWN},
    server::{
        CONTROL_GROUP, CONTROL_SOCKET,
        link::{Link, LinkError},
    },
};

/// Others may write.
const OTHERS_WRITE: u32 = 0o002;
/// Whoever is neither owner nor of the group may connect: that takes the right to write.
const OTHERS: u32 = 0o006;

/// The folder of all sockets: whoever may write there can be the server.
pub fn run_directory(dir: &Path) -> Finding {
    let check = "run directory";
    let place = dir.display();
    let mode = |about: &Metadata| about.mode() & 0o7777;
    match fs::symlink_metadata(dir) {
        Err(error) => Finding::fail(check, format!("{place}: {error}"), "vtrace server makes it; or --dir DIR"),
        Ok(about) if !about.is_dir() => Finding::fail(check, format!("{place} is no directory"), "--dir DIR"),
        Ok(about) if about.mode() & OTHERS_WRITE != 0 => {
            let found = format!("{place} has mode {:04o}: anybody can be its server", mode(&about));
            Finding::fail(check, found, format!("chmod o-w {place}"))
        }
        Ok(about) if about.uid() != 0 => {
            let found = format!("{place} belongs to user {}", about.uid());
            Finding::warn(check, found, format!("chown root {place}, unless that user runs the server"))
        }
        Ok(about) => Finding::ok(check, format!("{place}, mode {:04o}", mode(&about))),
    }
}

/// The clients' socket.
pub fn control_socket(place: &Place, dir: &Path) -> Finding {
    let path = dir.join(CONTROL_SOCKET);
    let finding = way("control", &path, &SOCKET);
    if finding.verdict != super::Verdict::Ok {
        return finding;
    }
    let groups = text(&place.groups).unwrap_or_default();
    let number = groups.lines().find_map(|line| line.strip_prefix(CONTROL_GROUP)?.strip_prefix(':')?.split(':').nth(1));
    let owner = fs::metadata(&path).map(|about| about.gid().to_string()).ok();
    match number {
        None => {
            let remedy = format!("groupadd -r {CONTROL_GROUP}, then start the server again");
            Finding::warn("control", format!("{}; there is no group {CONTROL_GROUP}: root only", finding.found), remedy)
        }
        Some(number) if owner.as_deref() != Some(number) => {
            let found = format!("{}, not of group {CONTROL_GROUP}", finding.found);
            Finding::warn(
                "control",
                found,
                format!("chgrp {CONTROL_GROUP} {}, or start the server again", path.display()),
            )
        }
        Some(_) => Finding::ok("control", format!("{}, group {CONTROL_GROUP}", finding.found)),
    }
}

/// Something in the file system that ports or commands come through.
struct Way {
    /// What it is to be.
    kind: &'static str,
    is_kind: fn(&fs::FileType) -> bool,
    /// What makes it.
    made_by: &'static str,
    /// What makes it once more when something else is in its place.
    made_again: &'static str,
    /// What others can do where its mode lets them.
    anybody: &'static str,
}

/// What QEMU writes the control port to.
const FIFO: Way = Way {
    kind: "FIFO",
    is_kind: FileTypeExt::is_fifo,
    made_by: "vtrace setup once more",
    made_again: "vtrace setup once more",
    anybody: "anybody may be its guest",
};

const SOCKET: Way = Way {
    kind: "socket",
    is_kind: FileTypeExt::is_socket,
    made_by: "vtrace server --dom GUEST; or --dir DIR",
    made_again: "start the server again",
    anybody: "anybody may connect",
};

fn way(check: &str, path: &Path, way: &Way) -> Finding {
    let place = path.display();
    match fs::symlink_metadata(path) {
        Err(error) => Finding::fail(check, format!("{place}: {error}"), way.made_by),
        Ok(about) if !(way.is_kind)(&about.file_type()) => {
            Finding::fail(check, format!("{place} is no {}", way.kind), format!("remove {place}, {}", way.made_again))
        }
        Ok(about) if about.mode() & OTHERS != 0 => {
            let found = format!("{place} has mode {:04o}: {}", about.mode() & 0o7777, way.anybody);
            Finding::fail(check, found, format!("chmod 0660 {place}"))
        }
        Ok(about) => Finding::ok(check, format!("{place}, mode {:04o}", about.mode() & 0o7777)),
    }
}

/// Whether a server answers, and is of our version.
pub fn server(link: &Result<Link, LinkError>) -> Finding {
    let link = match link {
        Ok(link) => link,
        Err(error) => {
            let remedy = match error {
                LinkError::NoServer { .. } => "vtrace server --dom GUEST, or systemctl start vtrace-server",
                LinkError::Denied { .. } => "be root, or a member of group vtrace",
                LinkError::Version { .. } => "use the same version of vtrace for server and record",
                _ => "see whether its process is stopped, or look at its log",
            };
            return Finding::fail("server", error.to_string(), remedy);
        }
    };
    let found = format!("{}, pid {}", link.server().software, link.peer().pid);
    same_software("server", found, &link.server().software)
}

/// The wire agrees, or nobody would have come so far.
fn same_software(check: &str, found: String, software: &str) -> Finding {
    // An agent says what it is before its version.
    let version = |software: &str| software.rsplit(' ').next().map(str::to_owned);
    if version(software) == version(SOFTWARE) {
        return Finding::ok(check, found);
    }
    Finding::warn(check, format!("{found}; this is {SOFTWARE}"), "use the same version of vtrace everywhere")
}

/// The guests asked for, or all.
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

/// What a guest cannot be recorded without is not there: fine with a guest that may come, not with one that was asked for.
fn absent(is_named: bool, guest: &str, what: &str, remedy: impl Into<String>) -> Finding {
    if is_named { Finding::fail(guest, what, remedy) } else { Finding::warn(guest, what, remedy) }
}

/// A guest's socket, its virtual machine, its memory, its agent: as far as they are there.
fn guest(state: &GuestState, is_named: bool) -> Vec<Finding> {
    let name = &state.name;
    let mut findings = Vec::new();
    let path = Path::new(&state.socket);
    let road = Road::of(path);
    if path.is_absolute() {
        findings.push(way(name, path, if road == Road::Fifos { &FIFO } else { &SOCKET }));
    }
    let Some(pid) = state.vmm_pid else {
        findings.push(absent(is_named, name, "no virtual machine is connected", road.without_vmm(state)));
        return findings;
    };
    findings.push(driver(name, pid, state, road));
    let unready = state.further.iter().filter(|device| device.driver != DriverState::Running).count();
    if unready > 0 {
        let found = format!("{unready} of its {} devices have no driver", state.further.len() + 1);
        findings.push(Finding::warn(name, found, "give QEMU all of them, where its CPUs need them"));
    }
    if state.driver == DriverState::Running {
        findings.push(agent(state, road, is_named));
    }
    if let Some(who) = holder(state) {
        findings.push(Finding::warn(name, who, "wait for it, or stop it"));
    }
    findings
}

/// How a guest's ports come to the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Road {
    /// A device of the server's.
    Device,
    /// QEMU's own device, over sockets.
    Sockets,
    /// The same over FIFOs.
    Fifos,
}

impl Road {
    /// As the name of what the guest's control port comes over says it.
    fn of(path: &Path) -> Self {
        let is_stream = path.file_stem().is_some_and(|stem| stem == CONTROL_PORT_NAME);
        match path.extension() {
            Some(end) if is_stream && end == "sock" => Self::Sockets,
            Some(end) if is_stream && end == "out" => Self::Fifos,
            _ => Self::Device,
        }
    }

    /// What to do where no QEMU is there.
    fn without_vmm(self, state: &GuestState) -> String {
        let GuestState { name, socket, .. } = state;
        match self {
            Self::Device => format!("start QEMU with a device at {socket}, or vtrace attach {name} --qmp SOCKET"),
            Self::Sockets => format!("start QEMU with what vtrace setup --dom {name} --transport socket prints"),
            Self::Fifos => format!("start QEMU with what vtrace setup --dom {name} --transport pipe prints"),
        }
    }

    /// What to do where a CPU has no port.
    fn without_port(self) -> &'static str {
        match self {
            Self::Device => "give its device 2 × (CPUs + 2) rings, num_vqs=…; beyond 126 CPUs several devices",
            Self::Sockets | Self::Fifos => "vtrace setup with --cpus N, all that may be plugged in; then a new QEMU",
        }
    }
}

fn driver(name: &str, pid: u32, state: &GuestState, road: Road) -> Finding {
    let vmm = match pid {
        0 => "a virtual machine, whose process is not seen".into(),
        pid => format!("virtual machine of pid {pid}"),
    };
    match &state.driver {
        DriverState::Running => match road {
            Road::Device => Finding::ok(name, format!("{vmm}, memory shared, driver running")),
            Road::Sockets => Finding::ok(name, format!("{vmm}, QEMU's own device, connected")),
            Road::Fifos => Finding::ok(name, format!("{vmm}, QEMU's own device, FIFOs open")),
        },
        DriverState::Absent => Finding::warn(
            name,
            format!("{vmm}, no driver"),
            "wait until it has booted; its kernel needs virtio_console",
        ),
        DriverState::Unfit(feature) => {
            Finding::fail(name, format!("{vmm}, driver without {feature}"), "do not switch indirect_desc off")
        }
        DriverState::MemoryNotShared => {
            let remedy = "-object memory-backend-memfd,id=mem0,size=SIZE,share=on -machine …,memory-backend=mem0";
            Finding::fail(name, format!("{vmm}, its memory is not shared"), remedy)
        }
    }
}

fn agent(state: &GuestState, road: Road, is_named: bool) -> Finding {
    let name = &state.name;
    let Some(agent) = &state.agent else {
        return absent(is_named, name, "no agent", "run vtrace agent in the guest");
    };
    let Some(machine) = &agent.machine else {
        let remedy = "copy this vtrace into the guest and start its agent again";
        return Finding::fail(name, format!("its agent ({}) is of another version", agent.hello.software), remedy);
    };
    if let Some(cpu) = machine.cpus.iter().find(|cpu| !machine.lanes.contains(cpu)) {
        let found = format!("its {cpu} has no port");
        return Finding::warn(name, found, road.without_port());
    }
    if u64::from(state.silent_s) >= SHOWN.as_secs() {
        let found = format!("its agent has said nothing for {} s", state.silent_s);
        return Finding::warn(name, found, "is the guest paused (QEMU: cont) or asleep (system_wakeup)?");
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
        super::Verdict::{self, Fail, Ok as Fine, Warn},
        *,
    };

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn run_directory_that_is_missing_or_open_to_all_fails() {
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
    fn control_socket_that_is_missing_open_to_all_or_of_no_group_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(CONTROL_SOCKET);
        let place = Place { groups: folder.path().join("group"), ..Place::here() };
        let verdict = || control_socket(&place, folder.path()).verdict;
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
        fs::write(&place.groups, format!("root:x:0:\nvtracer:x:8:\nvtrace:x:{group}:me\n")).unwrap();
        assert_eq!(verdict(), Fine);
        fs::write(&place.groups, format!("vtrace:x:{}:\n", group + 1)).unwrap();
        assert_eq!(verdict(), Warn, "of another group");
    }

    #[test]
    fn server_that_is_not_there_fails_and_another_software_is_warned_of() {
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

    fn worst(state: GuestState) -> Verdict {
        super::super::worst(&guests(&[state], &[]))
    }

    #[test]
    fn healthy_guest_has_nothing_to_complain_of() {
        assert_eq!(worst(healthy()), Fine);
    }

    #[test]
    fn each_thing_a_guest_can_lack_is_told() {
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
    fn guest_of_qemus_own_device_is_told_of_no_shared_memory_and_of_no_rings() {
        let folder = tempfile::tempdir().unwrap();
        let [socket, fifo] = ["sock", "out"].map(|end| folder.path().join(CONTROL_PORT_NAME).with_extension(end));
        let _listener = UnixListener::bind(&socket).unwrap();
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        chmod(&socket, 0o660);
        for (path, pid, expected) in [
            (&socket, 77, "virtual machine of pid 77, QEMU's own device, connected"),
            (&fifo, 77, "virtual machine of pid 77, QEMU's own device, FIFOs open"),
            (&fifo, 0, "a virtual machine, whose process is not seen, QEMU's own device, FIFOs open"),
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
        assert_eq!(way("guest1", &fifo, &FIFO).verdict, Fail);
        assert_eq!(way("guest1", &socket, &FIFO).verdict, Fail);
        assert_eq!(way("guest1", &folder.path().join("missing"), &FIFO).verdict, Fail);
    }

    #[test]
    fn guest_that_the_server_does_not_know_fails_and_others_are_not_looked_at() {
        let findings = guests(&[healthy()], &["guest2".into()]);
        assert_eq!((findings.len(), findings[0].verdict), (1, Fail));
        assert!(findings[0].remedy.contains("guest1"));
    }
}
