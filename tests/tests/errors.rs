//! What a person reads when something is missing: what failed, on what, why, and what to try.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use vtrace_tests::{
    recording::{Recorder, Recording},
    server::Server,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
};

/// It failed with `status`, says `why` and offers `remedy`.
fn complains(recording: &Recording, status: i32, why: &str, remedy: &str) {
    assert_eq!(recording.status, status, "{}", recording.said);
    assert!(recording.said.starts_with("vtrace: ") || status == 2, "{}", recording.said);
    assert!(recording.said.contains(why), "{why:?} is not in {}", recording.said);
    assert!(recording.said.contains(remedy), "{remedy:?} is not in {}", recording.said);
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

#[test]
fn missing_server_is_named_with_its_socket_and_leaves_no_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let nowhere = folder.path().join("nowhere");
    let files = tempfile::tempdir()?;
    let recorder = Recorder { server: &nowhere, folder: files.path() };
    let recording = recorder.run("-e sched --dom guest1 -e sched -- true")?;
    complains(&recording, 1, "nowhere/control.sock", "vtrace server --dom");
    assert!(is_empty(files.path()));
    Ok(())
}

#[test]
fn unknown_and_unconnected_guests_are_told_apart() -> Result<()> {
    let files = tempfile::tempdir()?;
    let server = Server::start(&["guest1", "other"])?;
    let recorder = Recorder { server: server.dir(), folder: files.path() };
    let recording = recorder.run("--dom gust1 -e sched -- true")?;
    complains(&recording, 1, "no guest of this name", "guest1, other");
    let recording = recorder.run("--dom guest1 -e sched -- true")?;
    complains(&recording, 1, "no virtual machine is connected to", "QEMU 10.2 or newer");
    assert!(is_empty(files.path()));
    Ok(())
}

#[test]
fn guest_that_cannot_be_recorded_stops_all_or_is_left_out_and_named() -> Result<()> {
    let files = tempfile::tempdir()?;
    let server = Server::start(&["guest1"])?;
    let recorder = Recorder { server: server.dir(), folder: files.path() };
    let words = "-e sched --dom guest1 -e sched -- sleep 0.2";
    complains(&recorder.run(words)?, 1, "cannot record guest1: no virtual machine", "QEMU 10.2 or newer");
    assert!(is_empty(files.path()), "nothing is recorded");
    let recording = recorder.run(&format!("--keep-going {words}"))?;
    complains(&recording, 1, "cannot record guest1; continuing without it: no virtual machine", "QEMU 10.2 or newer");
    assert!(recording.sum("host", "events")? > 0);
    let guest = recording.machine("guest1")?;
    assert!(guest["file"].is_null() && guest["remarks"].to_string().contains("left out: "), "{guest}");
    assert!(recording.file("host").exists() && !recording.file("guest1").exists());
    let nothing = recorder.run("--keep-going --dom guest1 -e sched -- sleep 0.2")?;
    complains(&nothing, 1, "cannot record guest1: no virtual machine", "QEMU 10.2 or newer");
    Ok(())
}

#[test]
fn options_that_exclude_each_other_are_told_apart() -> Result<()> {
    let files = tempfile::tempdir()?;
    let recorder = Recorder { server: files.path(), folder: files.path() };
    let wrong = [
        ("-e sched --file-version 6 --compression zstd", "--file-version 6 cannot be compressed", "--file-version 7"),
        ("-e sched --file-version 8", "invalid value '8' for '--file-version", "possible values: 6, 7"),
        ("-e sched --compression lzma", "invalid value 'lzma' for '--compression", "none, zstd, zlib"),
        ("-e sched --date -C local", "--date with -C local: user space cannot read", "mono"),
        ("-e sched -B i", "no event (-e) and no tracer (-p) after -B i", "-B NAME -e"),
        ("-B ../i -e sched", "-B \"../i\": letters, digits", "-B irqs -e irq"),
        ("-B i -e sched -B i -e irq", "-B i is given twice", "give it once"),
        ("--dom g -e sched -B i -e irq", "options between --dom g and -B i: a guest has either -B", "after -B"),
        ("--dom g -B i -e irq -B j -e sched", "-B j is the second for g: a guest has one instance", "one -B for each"),
        ("-e sched -B i -e irq -C mono", "-C mono for -B i", "-C before the first -B"),
        ("-e sched -M 0", "-M 0 for the host: not a hexadecimal mask", "-M 3 for CPUs 0 and 1"),
        ("-e sched -B i -e irq --subbuf-size 64 --file-version 6", "one page size", "--file-version 7"),
    ];
    for (words, why, remedy) in wrong {
        complains(&recorder.run(&format!("{words} -- true"))?, 2, why, remedy);
    }
    assert!(is_empty(files.path()));
    Ok(())
}

#[test]
fn options_of_trace_cmd_that_are_left_out_are_answered_with_what_there_is() -> Result<()> {
    let files = tempfile::tempdir()?;
    let recorder = Recorder { server: files.path(), folder: files.path() };
    for (words, instead) in [
        ("-r 5 -e sched", "--rt=PRIO"),
        ("-e sched --tsync-interval 10", "every change of a guest's TSC is recorded"),
        ("-e sched -N host:1234", "vtrace server and vtrace agent"),
    ] {
        complains(&recorder.run(&format!("{words} -- true"))?, 2, "unexpected argument", instead);
    }
    Ok(())
}

#[test]
fn file_that_is_there_is_replaced_unless_one_asks_not_to() -> Result<()> {
    let files = tempfile::tempdir()?;
    let recorder = Recorder { server: files.path(), folder: files.path() };
    let first = recorder.run("--no-clobber -e sched -- sleep 0.2")?.ok()?;
    let before = fs::read(first.file("host"))?;
    let second = recorder.run("--no-clobber -e sched -- sleep 0.2")?;
    complains(&second, 1, "trace.dat: it exists already (--no-clobber)", "name another file (-o)");
    assert!(fs::read(first.file("host"))? == before);
    recorder.run("-e sched -- sleep 0.2")?.ok()?;
    assert!(fs::read(first.file("host"))? != before);
    fs::remove_file(first.file("host"))?;
    fs::write(recorder.folder.join("trace-guest1.dat"), "a guest's")?;
    let guest = recorder.run("--no-clobber -e sched --dom guest1 -e sched -- true")?;
    complains(&guest, 1, "trace-guest1.dat: it exists already", "omit --no-clobber");
    Ok(())
}

#[test]
fn path_that_is_not_utf8_is_recorded_to_and_replaced_like_any_other() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let odd = folder.path().join(OsStr::from_bytes(b"d\xe4"));
    fs::create_dir(&odd)?;
    for round in ["created", "replaced"] {
        let mut command = Command::new(xtask::build::vtrace()?);
        command.args(["record", "--json", "-e", "sched", "--dir"]).arg(folder.path()).arg("-o").arg(odd.join("t.dat"));
        let output = command.args(["--", "sleep", "0.1"]).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{round}: {said}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("d\u{fffd}/t.dat"), "{round}");
        let mut restore = Command::new(xtask::build::vtrace()?);
        assert!(restore.arg("restore").arg("--json").arg(odd.join("t.dat")).status()?.success(), "{round}");
    }
    Ok(())
}

#[test]
fn recording_that_gets_sigusr1_ends_in_order() -> Result<()> {
    let files = tempfile::tempdir()?;
    let mut command = Command::new(xtask::build::vtrace()?);
    command.args(["record", "-e", "sched", "--dir"]).arg(files.path()).arg("-o").arg(files.path().join("t.dat"));
    let child = command.stderr(Stdio::piped()).spawn()?;
    let begun = Instant::now();
    while !files.path().join("t.dat").exists() && begun.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(20));
    }
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGUSR1)?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("machine"), "{:?}: {said}", output.status);
    Ok(())
}

/// The status of `vtrace WORDS PATHS` and all it prints; it must end by itself.
fn vtrace(words: &[&str], paths: &[&Path]) -> Result<(Option<i32>, String)> {
    let mut command = Command::new("timeout");
    let output = command.arg("60").arg(xtask::build::vtrace()?).args(words).args(paths).output()?;
    Ok((output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()))
}

#[test]
fn inputs_that_are_no_files_are_named_and_not_waited_for() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let files = tempfile::tempdir()?;
    let recorder = Recorder { server: files.path(), folder: files.path() };
    let trace = recorder.run("-e sched -- sleep 0.2")?.ok()?.file("host");
    let path = |name: &str| folder.path().join(name);
    let (fifo, socket) = (path("fifo"), path("socket"));
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR)?;
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let (zero, missing) = (Path::new("/dev/zero"), path("missing"));
    let odd = [
        (fifo.as_path(), "it is a FIFO"),
        (folder.path(), "it is a directory"),
        (&socket, "it is a socket"),
        (zero, "it is a device"),
        (&missing, "No such file"),
    ];
    for (odd, why) in odd {
        for paths in [[odd, &trace], [&trace, odd]] {
            let (status, said) = vtrace(&["check"], &paths)?;
            assert!(status == Some(1) && said.contains(why), "check {paths:?}: {status:?}: {said}");
        }
        let (status, said) = vtrace(&["agent", "--policy"], &[odd])?;
        assert!(
            status == Some(1) && said.contains(odd.to_str().context("a name")?),
            "agent {odd:?}: {status:?}: {said}"
        );
    }
    // A directory is searched, and what is in it is opened only if it is a file.
    for (path, wanted) in [(fifo.as_path(), 1), (&socket, 1), (zero, 1), (&missing, 1), (folder.path(), 0)] {
        let (status, said) = vtrace(&["restore"], &[path])?;
        assert_eq!(status, Some(wanted), "restore {path:?}: {said}");
    }
    for odd in [fifo.as_path(), folder.path(), &socket, zero] {
        let (status, said) = vtrace(&["record", "-e", "sched", "-o"], &[odd, Path::new("true")])?;
        assert!(matches!(status, Some(1 | 2)), "record -o {odd:?}: {status:?}: {said}");
    }
    assert!(socket.exists() && fifo.exists() && fs::read_dir(folder.path())?.count() == 2, "nothing is replaced");
    // Where a program or a socket is wanted, anything else is not waited for.
    for odd in [fifo.as_path(), folder.path(), zero, &trace] {
        let setup = ["setup", "guest1", "--root", files.path().to_str().context("a name")?, "--qemu"];
        for words in [&setup[..], &["doctor", "--qemu"]] {
            let (status, said) = vtrace(words, &[odd])?;
            assert!(matches!(status, Some(0..=2)), "{words:?} {odd:?}: {status:?}: {said}");
        }
        for words in [&["attach", "guest1", "--qmp"][..], &["detach", "guest1", "--qmp"]] {
            let (status, said) = vtrace(words, &[odd])?;
            assert!(matches!(status, Some(1 | 2)), "{words:?} {odd:?}: {status:?}: {said}");
        }
    }
    let (status, said) = vtrace(&["check"], &[&trace, &trace])?;
    assert!(status == Some(2) && said.contains("are of the same machine"), "{status:?}: {said}");
    Ok(())
}

#[test]
fn file_that_is_finished_needs_no_restore_whatever_its_form() -> Result<()> {
    let files = tempfile::tempdir()?;
    let recorder = Recorder { server: files.path(), folder: files.path() };
    for words in ["", "--file-version 6", "--compression zstd", "-B i -e irq"] {
        let file = recorder.run(&format!("-e sched {words} -- sleep 0.2"))?.ok()?.file("host");
        let before = fs::read(&file)?;
        let (status, said) = vtrace(&["restore"], &[&file])?;
        assert!(status == Some(0) && said.contains("finished already"), "{words}: {status:?}: {said}");
        assert!(fs::read(&file)? == before, "{words}");
    }
    Ok(())
}

#[test]
fn many_processes_are_written_at_once() -> Result<()> {
    let files = tempfile::tempdir()?;
    let recorder = Recorder { server: files.path(), folder: files.path() };
    let pids = (1000..1800).map(|pid| pid.to_string()).collect::<Vec<_>>().join(",");
    let begun = Instant::now();
    recorder.run(&format!("-e sched_switch -P {pids} -- true"))?.ok()?;
    // One by one they take 20 to 40 ms each.
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
    Ok(())
}

#[test]
fn second_server_in_the_same_folder_is_refused() -> Result<()> {
    let server = Server::start(&["guest1"])?;
    let mut second = Command::new(xtask::build::vtrace()?);
    let second = second.args(["server", "--dom", "guest1", "--dir"]).arg(server.dir()).output()?;
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("another server") && said.contains(&server.pid().to_string()), "{said}");
    server.list()?;
    Ok(())
}

#[test]
fn wrong_command_lines_exit_with_2_and_say_what_is_right() -> Result<()> {
    let files = tempfile::tempdir()?;
    let recorder = Recorder { server: files.path(), folder: files.path() };
    complains(&recorder.run("-- true")?, 2, "nothing to record", "-e sched");
    complains(
        &recorder.run("--dom guest1 -- true")?,
        2,
        "no event (-e) and no tracer (-p) after --dom guest1",
        "--dom GUEST -e",
    );
    complains(&recorder.run("--dom a/b -e sched -- true")?, 2, "is not valid as a guest's name", "vtrace list");
    complains(&recorder.run("--no-such-option")?, 2, "unexpected argument", "--help");
    Ok(())
}

#[test]
fn command_that_does_not_exist_is_found_before_anything_starts() -> Result<()> {
    let files = tempfile::tempdir()?;
    let recorder = Recorder { server: files.path(), folder: files.path() };
    complains(
        &recorder.run("-e sched -- no-such-program")?,
        1,
        "command not found",
        "give the options of record before",
    );
    assert!(is_empty(files.path()));
    Ok(())
}

#[test]
fn event_that_does_not_exist_on_the_host_is_named_with_near_matches() -> Result<()> {
    let files = tempfile::tempdir()?;
    let recorder = Recorder { server: files.path(), folder: files.path() };
    complains(&recorder.run("-e shced -- true")?, 1, "no event matches \"shced\"", "sched");
    assert!(is_empty(files.path()));
    Ok(())
}

#[test]
fn place_that_cannot_be_written_and_full_disk_are_told_apart() -> Result<()> {
    let files = tempfile::tempdir()?;
    let missing = files.path().join("missing");
    let recorder = Recorder { server: files.path(), folder: &missing };
    complains(&recorder.run("-e sched -- true")?, 1, "No such file or directory", "create the directory");

    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(files.path()).status()?;
    assert!(mounted.success());
    let recorder = Recorder { server: files.path(), folder: files.path() };
    let recording = recorder.run("-e sched -- sleep 0.2");
    Command::new("umount").arg("-l").arg(files.path()).status()?;
    complains(&recording?, 1, "No space left on device", "free some space");
    Ok(())
}

#[test]
fn recording_without_root_is_refused_with_the_way_to_do_it() -> Result<()> {
    let binary = tempfile::tempdir()?;
    let path = binary.path().join("vtrace");
    fs::copy(xtask::build::vtrace()?, &path)?;
    Command::new("chmod").args(["-R", "a+rx"]).arg(binary.path()).status()?;
    let setpriv = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let output =
        Command::new("setpriv").args(setpriv).arg(path).args(["record", "-e", "sched", "--", "true"]).output()?;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("only root") && said.contains("sudo vtrace record"), "{said}");
    Ok(())
}

#[test]
fn host_without_tracefs_is_told_how_to_mount_it() -> Result<()> {
    let files = tempfile::tempdir()?;
    let vtrace = xtask::build::vtrace()?;
    // A mount namespace whose tracefs is covered, and no right to mount another.
    let script = format!(
        "mount -t tmpfs none /sys/kernel/tracing && (mount -t tmpfs none /sys/kernel/debug || true) && \
         exec setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin -- {} record -o {}/trace.dat -e sched -- true",
        vtrace.display(),
        files.path().display()
    );
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("no tracefs") && said.contains("mount -t tracefs"), "{said}");
    Ok(())
}

#[test]
fn guest_without_agent_with_an_old_agent_and_with_a_missing_event_is_explained() -> Result<()> {
    let turn = turn()?;
    let files = tempfile::tempdir()?;
    let server = Server::start(&["guest1"])?;
    let recorder = Recorder { server: server.dir(), folder: files.path() };
    let machine = Machine::builder(&turn, Kernel::V6_12).without_agent().vhost_user(&server.socket("guest1")).boot()?;
    server.await_state("has a driver", |state| state["driver"] == "Running")?;
    complains(&recorder.run("--dom guest1 -e sched -- true")?, 1, "no agent has opened", "vtrace agent");

    // A hello of wire version 9: magic, version, family 0, length, then min 9, max 9, "old".
    let hello = r"vtrc\x09\x00\x00\x00\x06\x00\x00\x00\x09\x09\x03old";
    machine.shell(&format!(
        "port=$(grep -lx agent-ctl-path /sys/class/virtio-ports/*/name); port=${{port%/name}}
         exec 7>/dev/${{port##*/}}; printf '{hello}' >&7; (sleep 1000) & echo $! >/tmp/holder"
    ))?;
    server.await_state("has an old agent", |state| state["agent"].is_object())?;
    complains(&recorder.run("--dom guest1 -e sched -- true")?, 1, "wire version 9", "copy this vtrace");
    machine.shell("kill $(cat /tmp/holder)")?.ok()?;
    server.await_state("has lost its agent", |state| state["agent"].is_null())?;

    machine.shell("vtrace agent >/dev/console 2>&1 &")?;
    server.await_agent("guest1")?;
    let recording = recorder.run("--dom guest1 -e shced -- true")?;
    complains(&recording, 1, "cannot record guest1: no event matches \"shced\"", "sched");
    // Each of them is looked at; a kernel that is not asked for its verdict would trace every function.
    for words in ["-l vfs_read -l vfs_raed", "-l vfs_read -n nosuch_*", "-g vfs_raed"] {
        let tracer = if words.starts_with("-g") { "function_graph" } else { "function" };
        let recording = recorder.run(&format!("--dom guest1 -p {tracer} {words} -- true"))?;
        complains(&recording, 1, "no traceable function matches", "available_filter_functions");
    }
    assert!(is_empty(files.path()));
    let recording = recorder.run("--keep-going --dom guest1 -e sched --dom other -e sched -- sleep 0.2")?;
    complains(&recording, 1, "cannot record other; continuing without it", "it has: guest1");
    assert!(recording.sum("guest1", "events")? > 0 && recording.file("guest1").exists());
    assert!(recording.machine("guest1")?["failed"] == false && recording.machine("other")?["failed"] == true);
    recorder.run("--dom guest1 -e sched -- sleep 0.2")?.ok()?;
    Ok(())
}

#[test]
fn guest_whose_memory_is_not_shared_is_told_how_to_share_it() -> Result<()> {
    let turn = turn()?;
    let files = tempfile::tempdir()?;
    let server = Server::start(&["guest1"])?;
    let recorder = Recorder { server: server.dir(), folder: files.path() };
    let started = Machine::builder(&turn, Kernel::V6_12)
        .private_memory()
        .without_agent()
        .vhost_user(&server.socket("guest1"))
        .start()?;
    server.await_state("tried to share its memory", |state| state["driver"] == "MemoryNotShared")?;
    let recording = recorder.run("--dom guest1 -e sched -- true")?;
    complains(&recording, 1, "memory is not shared", "share=on");
    drop(started);
    Ok(())
}
