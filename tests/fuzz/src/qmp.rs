//! Answers of a QEMU: a plugging in, or out, comes to an end whatever is said, and lines are the same however they are cut.
//!
//! Input: u8 (bit 0: detach, else attach), then what QEMU says; then it closes its end.

use std::{io::Write, os::unix::net::UnixStream, time::Duration};

use vtrace_dp::vmm::{
    attach::{AttachRequest, attach, detach},
    qmp::{Qmp, QmpDecoder, QmpMessage},
};

/// A socket takes so much at once; the other end is not read while it is filled.
const BYTES_MAX: usize = 64 << 10;
/// QEMU says all it says before it is asked.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// Cuts the lines in two ways, then plugs in or out.
pub fn run(bytes: &[u8]) {
    let Some((&what, said)) = bytes.split_first() else { return };
    let said = &said[..said.len().min(BYTES_MAX)];
    assert_eq!(messages(said, said.len().max(1)), messages(said, 7), "cut otherwise");
    let (ours, mut theirs) = UnixStream::pair().expect("two sockets");
    theirs.write_all(said).expect("a socket takes that much at once");
    theirs.shutdown(std::net::Shutdown::Write).expect("it is connected");
    let Ok(mut qmp) = Qmp::over(ours, WAIT_MAX) else { return };
    let wanted =
        AttachRequest { sockets: vec!["/run/vtrace/guest1.sock".into()], lanes: 126, cpus: None, buses: Vec::new() };
    let told = if what & 1 == 0 {
        attach(&mut qmp, &wanted).map(|_| ()).err().map(|error| error.to_string())
    } else {
        detach(&mut qmp, &wanted.sockets).map(|_| ()).err().map(|error| error.to_string())
    };
    let told = told.unwrap_or_default();
    assert!(told.len() < 2048 && !told.chars().any(char::is_control), "{told:?}");
}

/// The messages, up to the first that is not valid: then `None`.
fn messages(said: &[u8], step: usize) -> Vec<Option<QmpMessage>> {
    let (mut lines, mut found) = (QmpDecoder::default(), Vec::new());
    for piece in said.chunks(step) {
        lines.push(piece);
        loop {
            match lines.next_message() {
                Ok(Some(message)) => found.push(Some(message)),
                Ok(None) => break,
                Err(_) => {
                    found.push(None);
                    return found;
                }
            }
        }
    }
    found
}

/// A QEMU that has room for a device, and one that has a device which can go; one that refuses everything.
pub fn seeds() -> Vec<Vec<u8>> {
    let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 1, "major": 11}, "package": ""}}}"#;
    let answers = |answers: &[&str]| {
        let mut id = 0;
        let lines = answers.iter().map(|answer| {
            // Events have no number: they answer no request.
            id += u32::from(!answer.contains("event"));
            format!("{{{answer}, \"id\": {id}}}\n")
        });
        format!("{greeting}\n{}", lines.collect::<String>()).into_bytes()
    };
    let nothing = r#""return": {}"#;
    let none = r#""return": []"#;
    let running = r#""return": {"status": "running", "running": true}"#;
    let port = r#""return": [{"name": "rp0", "type": "child<pcie-root-port>"}]"#;
    let bus = r#""return": [{"name": "rp0.0", "type": "child<PCIE>"}]"#;
    let refused = r#""error": {"class": "GenericError", "desc": "no\u001b[2J"}"#;
    let memory = r#""return": [{"id": "mem", "share": true}]"#;
    let cpus = r#""return": [{"cpu-index": 0}, {"cpu-index": 1}]"#;
    let chardev = r#""return": [{"label": "vtrace0", "filename": "unix:/run/vtrace/guest1.sock"}]"#;
    let device = r#""return": [{"name": "vtrace0", "type": "child<vhost-user-test-device-pci>"}]"#;
    let label = r#""return": "vtrace0""#;
    let into = [nothing, nothing, running, none, none, none, memory, refused, cpus, port, refused, bus, none, none];
    let into = [&into[..], &[refused, none, none, nothing, nothing]].concat();
    let gone = r#""event": "DEVICE_DELETED", "data": {"path": "/machine/peripheral/vtrace0"}"#;
    let hotpluggable = r#""return": true"#;
    let out = [nothing, chardev, device, label, hotpluggable, none, running, nothing, gone, nothing, nothing];
    let all = [vec![refused; 6], vec![nothing; 3]].concat();
    let with = |what: u8, said: Vec<u8>| [vec![what], said].concat();
    vec![with(0, answers(&into)), with(1, answers(&out)), with(0, answers(&all)), with(1, b"SSH-2.0-\x07\n".to_vec())]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise the fuzzer starts far from what it is to reach.
    #[test]
    fn seeds_are_plugged_in_and_out_to_the_end() {
        let over = |seed: &[u8]| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&seed[1..]).unwrap();
            (Qmp::over(ours, WAIT_MAX).unwrap(), theirs)
        };
        let [into, out, ..] = &seeds()[..] else { panic!("two seeds") };
        let sockets = vec!["/run/vtrace/guest1.sock".into()];
        let wanted = AttachRequest { sockets: sockets.clone(), lanes: 126, cpus: None, buses: Vec::new() };
        let attached = attach(&mut over(into).0, &wanted).unwrap();
        assert_eq!((attached.cpus, attached.devices), (2, vec![("vtrace0".to_owned(), "rp0.0".to_owned())]));
        assert_eq!(detach(&mut over(out).0, &sockets).unwrap(), 1);
    }
}
