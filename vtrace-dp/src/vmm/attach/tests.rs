//! Hot-plug and hot-unplug against a QEMU with prepared answers.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixListener,
    sync::{Arc, Mutex},
};

use serde_json::Value;
use tempfile::TempDir;

use super::*;
use crate::vmm::running;

/// The answer to a command with an argument (`qom-list /machine`), or to the command alone. A text that begins with
/// `no: ` is an error.
type Answers = BTreeMap<String, Value>;

/// A QEMU and the commands that it received.
struct Qemu {
    folder: TempDir,
    received: Arc<Mutex<Vec<String>>>,
}

impl Qemu {
    fn new(answers: Answers) -> (Self, Qmp) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&received);
        std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let greeting = json!({ "QMP": { "version": { "qemu": { "major": 11, "minor": 1, "micro": 3 } } } });
            socket.write_all(format!("{greeting}\n").as_bytes()).unwrap();
            for line in BufReader::new(socket.try_clone().unwrap()).lines().map_while(Result::ok) {
                let request: Value = serde_json::from_str(&line).unwrap();
                let words = words(&request);
                let answer = answers.get(&words).or_else(|| answers.get(request["execute"].as_str().unwrap()));
                let answer = match answer.cloned().unwrap_or_else(|| json!({})) {
                    Value::String(text) if text.starts_with("no: ") => {
                        json!({ "id": request["id"], "error": { "class": "GenericError", "desc": text[4..] } })
                    }
                    answer => json!({ "id": request["id"], "return": answer }),
                };
                log.lock().unwrap().push(words);
                let deleted = json!({ "event": "DEVICE_DELETED", "data": { "path": request["arguments"]["id"] } });
                let event = if request["execute"] == "device_del" { format!("{deleted}\n") } else { String::new() };
                socket.write_all(format!("{answer}\n{event}").as_bytes()).unwrap();
            }
        });
        let qmp = Qmp::connect(&folder.path().join("qmp")).unwrap();
        (Self { folder, received }, qmp)
    }

    /// Commands that change something.
    fn done(&self) -> Vec<String> {
        let changes = ["chardev-add", "chardev-remove", "device_add", "device_del"];
        let received = self.received.lock().unwrap();
        received.iter().filter(|words| changes.iter().any(|change| words.starts_with(change))).cloned().collect()
    }

    fn wanted(&self) -> AttachRequest {
        let sockets = ["g.sock", "g@2.sock"].map(|name| self.folder.path().join(name));
        AttachRequest { sockets: sockets.into(), lanes: 2, cpus: None, buses: Vec::new() }
    }
}

fn words(request: &Value) -> String {
    let arguments = &request["arguments"];
    let of = |name: &str| arguments[name].as_str().map(|text| format!(" {text}")).unwrap_or_default();
    format!("{}{}{}{}", request["execute"].as_str().unwrap(), of("path"), of("property"), of("id"))
}

/// A guest of three CPUs with shared memory and two free root ports.
fn healthy() -> Answers {
    let cpu = |index: u32| json!({ "cpu-index": index });
    let port = |name: &str| json!({ "name": name, "type": "child<pcie-root-port>" });
    let bus = |name: &str| json!([{ "name": name, "type": "child<PCIE>" }]);
    let answers = [
        ("query-status", json!({ "status": "running", "running": true })),
        ("query-chardev", json!([])),
        ("query-memdev", json!([{ "id": "mem0", "share": true }])),
        ("qom-get /machine memory-backend", json!("/objects/mem0")),
        ("query-cpus-fast", json!([cpu(0), cpu(2)])),
        (
            "qom-list /machine/peripheral",
            json!([{ "name": "type", "type": "string" }, port("rp0"), port("rp1"), port("rp2")]),
        ),
        ("qom-list /machine/peripheral-anon", json!([])),
        ("qom-list /machine/i440fx", json!("no: no such object")),
        ("qom-get", json!(true)),
        ("qom-list /machine/peripheral/rp0", bus("rp0")),
        ("qom-list /machine/peripheral/rp1", bus("rp1")),
        ("qom-list /machine/peripheral/rp2", bus("rp2")),
        ("qom-list /machine/peripheral/rp0/rp0", json!([])),
        ("qom-list /machine/peripheral/rp1/rp1", json!([{ "name": "child[0]", "type": "link<e1000>" }])),
        ("qom-list /machine/peripheral/rp2/rp2", json!([])),
    ];
    answers.into_iter().map(|(words, answer)| (words.to_owned(), answer)).collect()
}

fn obstacle(change: impl FnOnce(&mut Answers)) -> String {
    let mut answers = healthy();
    change(&mut answers);
    let (qemu, mut qmp) = Qemu::new(answers);
    let error = attach(&mut qmp, &qemu.wanted()).unwrap_err();
    assert_eq!(qemu.done(), [""; 0], "nothing is changed where something is missing: {error}");
    error.to_string()
}

#[test]
fn every_cpu_has_a_port_and_every_device_one_more() {
    assert_eq!(ports(2, 126), [3]);
    assert_eq!(ports(0, 126), [1]);
    assert_eq!(ports(126, 126), [127]);
    assert_eq!(ports(300, 126), [127, 127, 49]);
    assert_eq!(ports(4, 2), [3, 3]);
}

#[test]
fn devices_go_to_free_ports_and_each_has_its_chardev() {
    let (qemu, mut qmp) = Qemu::new(healthy());
    let attached = attach(&mut qmp, &qemu.wanted()).unwrap();
    assert_eq!((attached.cpus, attached.running), (3, true), "a CPU that is not there has a port as well");
    let places: Vec<&str> = attached.devices.iter().map(|(_, bus)| bus.as_str()).collect();
    assert_eq!(places, ["rp0", "rp2"]);
    assert_eq!(qemu.done(), ["chardev-add vtrace0", "device_add vtrace0", "chardev-add vtrace0", "device_add vtrace0"]);
}

#[test]
fn each_thing_that_is_missing_is_found_before_anything_is_changed() {
    let set =
        |words: &'static str, answer: Value| move |answers: &mut Answers| drop(answers.insert(words.into(), answer));
    let text = obstacle(set("query-memdev", json!([{ "id": "mem0", "share": false }])));
    assert!(text.contains("memory (mem0) is not shared"), "{text}");
    let text =
        obstacle(set("qom-list /machine/peripheral/rp2/rp2", json!([{ "name": "child[0]", "type": "link<x>" }])));
    assert_eq!(text, "2 free PCI hot-plug slots are needed, the guest has 1");
    let text = obstacle(set("query-cpus-fast", json!([{ "cpu-index": 7 }])));
    assert_eq!(text, "8 CPUs need 4 devices, and the server has 2 for this guest");
    let text = obstacle(set("query-status", json!({ "status": "inmigrate", "running": false })));
    assert!(text.contains("\"inmigrate\""), "{text}");
    let text = obstacle(set("device-list-properties", json!("no: not found")));
    assert!(text.contains("built without"), "{text}");
    let text = obstacle(set("query-cpus-fast", json!("odd")));
    assert_eq!(text, "unexpected answer of QEMU to query-cpus-fast");
}

#[test]
fn device_that_qemu_refuses_leaves_no_chardev() {
    let mut answers = healthy();
    answers.insert("device_add".into(), json!("no: out of bounds"));
    let (qemu, mut qmp) = Qemu::new(answers);
    let error = attach(&mut qmp, &qemu.wanted()).unwrap_err();
    assert_eq!(error.to_string(), "QEMU refuses device_add: out of bounds");
    assert_eq!(qemu.done(), ["chardev-add vtrace0", "device_add vtrace0", "chardev-remove vtrace0"]);
}

/// A QEMU with one of our devices, on a chardev that leads to `socket`.
fn attached_to(socket: &std::path::Path, state: &str) -> Answers {
    let mut answers = healthy();
    let name = format!("{state}unix:{}", socket.display());
    answers.insert("query-chardev".into(), json!([{ "label": "c", "filename": name }]));
    let device = json!([{ "name": "old", "type": format!("child<{DRIVER}>") }]);
    answers.insert("qom-list /machine/peripheral".into(), device);
    answers.insert("qom-get /machine/peripheral/old chardev".into(), json!("c"));
    answers
}

#[test]
fn device_of_a_dead_server_is_found_by_its_socket_and_taken_out_with_its_chardev() {
    let socket = PathBuf::from("/run/vtrace/g.sock");
    let (qemu, mut qmp) = Qemu::new(attached_to(&socket, ""));
    let wanted = AttachRequest { sockets: vec![socket.clone()], ..qemu.wanted() };
    let error = attach(&mut qmp, &wanted).unwrap_err().to_string();
    assert_eq!(error, "QEMU has a device for this guest already: /machine/peripheral/old");
    assert_eq!(qemu.done(), [""; 0]);
    let (qemu, mut qmp) = Qemu::new(attached_to(&socket, "disconnected:"));
    assert_eq!(detach(&mut qmp, &[socket]).unwrap(), 1);
    assert_eq!(qemu.done(), ["device_del /machine/peripheral/old", "chardev-remove c"]);
    let other = detach(&mut qmp, &["/run/vtrace/other.sock".into()]).unwrap_err();
    assert!(matches!(other, HotplugError::NotAttached(_)), "{other}");
}

#[test]
fn device_without_its_server_is_replaced_unless_it_cannot_be_unplugged() {
    let socket = PathBuf::from("/run/vtrace/g.sock");
    let request = |qemu: &Qemu| AttachRequest {
        sockets: vec![socket.clone()],
        lanes: 126,
        buses: vec!["rp0".into()],
        ..qemu.wanted()
    };
    let (qemu, mut qmp) = Qemu::new(attached_to(&socket, "disconnected:"));
    assert_eq!(attach(&mut qmp, &request(&qemu)).unwrap().replaced, 1);
    let expected =
        ["device_del /machine/peripheral/old", "chardev-remove c", "chardev-add vtrace0", "device_add vtrace0"];
    assert_eq!(qemu.done(), expected);

    let mut answers = attached_to(&socket, "disconnected:");
    answers.insert("qom-get /machine/peripheral/old hotpluggable".into(), json!(false));
    let (qemu, mut qmp) = Qemu::new(answers);
    let error = attach(&mut qmp, &request(&qemu)).unwrap_err().to_string();
    assert!(error.contains("on pcie.0"), "{error}");
    assert_eq!(qemu.done(), [""; 0]);
}

#[test]
fn paused_guest_is_not_asked_to_release_a_device() {
    let socket = PathBuf::from("/run/vtrace/g.sock");
    let mut answers = attached_to(&socket, "disconnected:");
    answers.insert("query-status".into(), json!({ "status": "paused", "running": false }));
    let (qemu, mut qmp) = Qemu::new(answers);
    assert!(matches!(detach(&mut qmp, &[socket]), Err(HotplugError::Paused)));
    assert!(qemu.done().is_empty());
}

#[test]
fn running_qemu_is_inspected_and_nothing_is_changed() {
    let socket = PathBuf::from("/run/vtrace/g.sock");
    let mut answers = attached_to(&socket, "disconnected:");
    answers.insert("query-kvm".into(), json!({ "enabled": true, "present": true }));
    answers.insert("qom-get /machine/peripheral/old num_vqs".into(), json!(8));
    let (qemu, mut qmp) = Qemu::new(answers);
    let running = running::inspect(&mut qmp, std::slice::from_ref(&socket)).unwrap();
    let device = running::RunningDevice { lanes: 2, is_connected: false, is_hotpluggable: true };
    assert_eq!((running.cpus, running.kvm, &running.devices[..]), (3, Some(true), &[device][..]));
    assert_eq!((running.state.as_str(), running.ports), ("running", running::SerialPorts::default()));
    assert!(qemu.done().is_empty());

    let (_qemu, mut qmp) = Qemu::new(healthy());
    let running = running::inspect(&mut qmp, &[socket]).unwrap();
    assert_eq!((running.devices.len(), running.slots, running.kvm), (0, 2, None), "one that says nothing of KVM");
}

#[test]
fn ports_of_qemus_own_device_are_recognised_by_their_names() {
    let socket = PathBuf::from("/v/g/agent-ctl-path.sock");
    let mut answers = healthy();
    let port = |name: &str| json!({ "name": name, "type": "child<virtserialport>" });
    answers.insert("qom-list /machine/peripheral-anon".into(), json!([port("p0"), port("p1"), port("p2")]));
    for (port, name) in [("p0", "agent-ctl-path"), ("p1", "trace-path-cpu1"), ("p2", "org.qemu.guest_agent.0")] {
        answers.insert(format!("qom-get /machine/peripheral-anon/{port} name"), json!(name));
    }
    answers.insert("qom-get /machine/peripheral-anon/p0 chardev".into(), json!("c"));
    answers.insert("query-chardev".into(), json!([{ "label": "c", "filename": "unix:/v/g/agent-ctl-path.sock" }]));
    let (_qemu, mut qmp) = Qemu::new(answers);
    let ports = running::inspect(&mut qmp, &[socket]).unwrap().ports;
    assert_eq!(ports.lanes, [vtrace_common::ids::Cpu(1)]);
    assert_eq!(ports.control_is_ours, Some(true));
}
