//! Texts: a guest owner's rules, a guest's setup, QEMU's version, and what a kernel says in tracefs and sysfs.
//!
//! Input: u8 which text, then the text.

use std::path::Path;

use vtrace_common::{
    limits::{CPUS_MAX, LANES_MAX, PAGE_BYTES_MAX, PAGE_BYTES_MIN},
    wire::agent::EventRequest,
};
use vtrace_dp::{
    agent::{policy::Exec, testing::exec},
    ftrace::fields::EventFormat,
    tracefs::{parse_cpus, stats::Stats, testing},
    vmm::{
        libvirt,
        qemu::{Guest, MachineType, QemuVersion},
        setup::{Folder, Setup},
    },
};

/// Reads one text.
pub fn run(bytes: &[u8]) {
    let Some((which, bytes)) = bytes.split_first() else { return };
    let text = &String::from_utf8_lossy(bytes);
    match which % 9 {
        0 => rules(text),
        1 => setup(text),
        2 => version(text),
        3 => folder(text),
        4 => cpus(text),
        5 => drop(Stats::parse(text).map(|stats| (stats.recorded(), stats.lost()))),
        6 => events(text),
        7 => header_page(text),
        _ => drop((testing::commands(text), EventFormat::parse("system", bytes))),
    }
}

/// Programs are run only where the rules say so.
fn rules(text: &str) {
    if let Ok(allowed) = exec(text) {
        assert!(allowed == Exec::Never || text.contains("exec"), "{allowed:?}");
    }
}

fn setup(text: &str) {
    let Ok(setup) = Setup::parse(text, "guest.toml".into()) else { return };
    assert!((1..=LANES_MAX).contains(&setup.cpus) && setup.ports().count() == setup.cpus + 1);
    let written = format!("transport = \"{}\"\ncpus = {}\n", setup.transport.name(), setup.cpus);
    assert_eq!(Setup::parse(&written, "guest.toml".into()).ok(), Some(setup));
}

fn version(text: &str) {
    if let Some(version) = QemuVersion::in_text(text) {
        assert_eq!(version.to_string().parse(), Ok(version));
    }
}

/// A folder of any name stays one value among QEMU's options and one attribute among libvirt's.
fn folder(text: &str) {
    let folder = Folder::of(Path::new(text), "guest1");
    for transport in ["vhost-user", "socket", "pipe"] {
        let setup = Setup::parse(&format!("transport = {transport:?}\ncpus = 1"), "guest.toml".into());
        let setup = setup.expect("a setup as it is written");
        let guest = Guest {
            name: "guest1",
            folder: &folder,
            setup,
            run: Path::new(text),
            memory: "1G",
            machine: MachineType::Q35,
        };
        for word in
            guest.options(QemuVersion { major: 11, minor: 1, micro: 0 }).iter().filter(|word| word.contains("path="))
        {
            let rest = word.split_once("path=").map(|(_, rest)| rest.replace(",,", "")).unwrap_or_default();
            let end = rest.split(',').next().unwrap_or_default();
            assert!([".sock", "path", "cpu0"].iter().any(|tail| end.ends_with(tail)), "{word}");
        }
        let elements = libvirt::elements(&guest);
        for line in format!("{}{}", elements.devices, elements.domain).split("path='").skip(1) {
            let path = line.split('\'').next().unwrap_or_default();
            assert!(!path.contains('<') && path.ends_with(['k', 'h', '0']), "{line}");
        }
    }
}

fn cpus(text: &str) {
    let cpus = parse_cpus(text).unwrap_or_default();
    assert!(cpus.iter().all(|cpu| usize::try_from(cpu.0).is_ok_and(|cpu| cpu < CPUS_MAX)));
}

fn events(text: &str) {
    let requests = ["sched", "irq:*", "all", "*:*_exit"].map(EventRequest::from);
    for request in &requests {
        for (system, event) in testing::choose(text, std::slice::from_ref(request)).unwrap_or_default() {
            assert!(text.contains(&format!("{system}:{event}")), "{system}:{event} is not available");
            assert!(![&system, &event].iter().any(|name| name.contains('/') || **name == ".."), "{system}/{event}");
        }
    }
}

fn header_page(text: &str) {
    if let Ok(bytes) = testing::page_bytes(text) {
        let bytes = usize::try_from(bytes).expect("usize has 64 bits");
        assert!(bytes.is_power_of_two() && (PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&bytes), "{bytes}");
    }
}

/// One of each as it is in earnest.
pub fn seeds() -> Vec<Vec<u8>> {
    let rules = "exec = [\"fio\", \"/bin/true\"]\nkallsyms = false\nbuffer_mib_max = 64\n\
                 events_denied = [\"kvm\"]\ntracers_allowed = [\"function\"]\n";
    let stats = "entries: 1\noverrun: 2\ncommit overrun: 0\nbytes: 64\noldest event ts: 1.5\ndropped events: 0\n\
                 read events: 7\n";
    let page = "\tfield: u64 timestamp;\toffset:0;\tsize:8;\n\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;\n";
    let format = "name: sched_switch\nID: 316\nformat:\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;\t\
                  signed:0;\n\n\tfield:char prev_comm[16];\toffset:8;\tsize:16;\tsigned:0;\n\nprint fmt: \"x\"\n";
    let texts = [
        (0, rules),
        (0, "exec = \"any\"\nuser = \"root\""),
        (1, "transport = \"pipe\"\ncpus = 4\n"),
        (2, "QEMU emulator version 10.0.13 (Debian 1:10.0.13)\nCopyright\n"),
        (3, "/var/lib/a,b'c<d&e\"f"),
        (4, "0-3,8\n"),
        (5, stats),
        (6, "sched:sched_switch\nirq:irq_handler_exit\n:mod:late\nx86:../y\n"),
        (7, page),
        (8, "12 bash\n13 a b\n"),
        (8, format),
    ];
    texts.iter().map(|(which, text)| [&[*which], text.as_bytes()].concat()).collect()
}
