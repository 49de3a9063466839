//! Options of `record` that say how files and messages are, tried on this host alone; stock tools are the judges.

use std::{fs, path::Path, process::Command, time::SystemTime};

use anyhow::{Context, Result, ensure};
use vtrace_tests::{
    judge::{Line, lines, trace_cmd, trace_cmd_newest},
    recording::{Recorder, Recording},
};

fn recorder(folder: &Path) -> Recorder<'_> {
    Recorder { server: folder, folder }
}

fn events_of(recording: &Recording, machine: &str) -> Result<usize> {
    Ok(usize::try_from(recording.sum(machine, "events")?)?)
}

fn of(report: &[Line], instance: Option<&str>) -> usize {
    report.iter().filter(|line| line.file.as_deref() == instance).count()
}

#[test]
fn instances_and_their_options_are_parts_of_one_file_whatever_its_form() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for form in ["", "--compression zstd", "--compression any", "--file-version 6"] {
        let words = format!("{form} -e sched -B irqs -e irq -b 64 -B calls -e raw_syscalls:sys_enter -- sleep 0.5");
        let recording = recorder(folder.path()).run(&words)?.ok()?;
        let file = recording.file("host");
        let left: Vec<_> = fs::read_dir(folder.path())?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
        assert_eq!(left, ["trace.dat"], "nothing but the file is left");
        for report in [trace_cmd(&["report", "-t"], &[&file])?, trace_cmd_newest(&["report", "-t"], &[&file])?] {
            let report = lines(&report);
            for (machine, instance) in [("host", None), ("host:irqs", Some("irqs")), ("host:calls", Some("calls"))] {
                assert_eq!(of(&report, instance), events_of(&recording, machine)?, "{form} {machine}");
                assert_eq!(recording.sum(machine, "pages_lost")?, 0);
            }
            let calls = report.iter().filter(|line| line.file.as_deref() == Some("calls") && line.event != "print");
            assert!(calls.clone().count() > 10 && calls.clone().all(|line| line.event == "sys_enter"), "{form}");
            let markers = report.iter().filter(|line| line.event == "print" && line.fields.contains("vtrace: start"));
            assert_eq!(markers.count(), 3, "one marker in each");
        }
        assert!(trace_cmd(&["dump", "--validate"], &[&file])?.contains("is a valid trace-cmd file"));
    }
    Ok(())
}

#[test]
fn compressed_files_say_so_and_are_smaller() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let bytes = |form: &str| -> Result<u64> {
        let recording = recorder(folder.path()).run(&format!("{form} -e sched -- sleep 0.2"))?.ok()?;
        let bytes = fs::metadata(recording.file("host"))?.len();
        assert_eq!(recording.machine("host")?["bytes"], bytes);
        Ok(bytes)
    };
    let plain = bytes("")?;
    assert!(bytes("--compression zstd")? * 2 < plain);
    let summary = trace_cmd(&["dump", "--summary"], &[&folder.path().join("trace.dat")])?;
    assert!(summary.contains("zstd\t[Compression algorithm]"), "{summary}");
    // Debian's trace-cmd has no zlib: our own reader has to do.
    assert!(bytes("--compression zlib")? * 2 < plain);
    Ok(())
}

#[test]
fn dates_are_times_of_day() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for clock in ["", "-C mono", "-C boot"] {
        let recording = recorder(folder.path()).run(&format!("--date {clock} -e sched -- sleep 0.2"))?.ok()?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos();
        let report = lines(&trace_cmd(&["report", "-t"], &[&recording.file("host")])?);
        let last = report.iter().map(|line| line.time).max().context("an event")?;
        let ago = now.checked_sub(last.into()).context("no event is of the future")?;
        assert!(ago < 10_000_000_000, "{clock}: the last event was {ago} ns ago");
    }
    Ok(())
}

#[test]
fn quiet_says_nothing_and_a_terminal_gets_one_line_that_goes_away() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut quiet = recorder(folder.path()).command("-q -e sched -- sleep 0.1")?;
    let said = quiet.output()?;
    ensure!(said.status.success() && said.stdout.is_empty() && said.stderr.is_empty(), "{said:?}");
    let pipe = recorder(folder.path()).command("-e sched -- sleep 2.2")?.output()?;
    let text = String::from_utf8(pipe.stderr)?;
    assert!(!text.contains('\x1b') && !text.contains("recording "), "no live line without a terminal: {text:?}");
    // script(1) gives it a terminal.
    let vtrace = xtask::build::vtrace()?;
    let command = format!("{} record -o {}/t.dat -e sched -- sleep 2.2", vtrace.display(), folder.path().display());
    let said = Command::new("script").args(["-qec", &command, "/dev/null"]).env("COLUMNS", "200").output()?;
    let text = String::from_utf8(said.stdout)?;
    let lines: Vec<&str> = text.split("\r\x1b[K").filter(|line| line.starts_with("recording ")).collect();
    assert!(lines.len() >= 2, "{text:?}");
    for word in [" s, ", " lanes, ", " GB/s, ", " lost"] {
        assert!(lines[0].contains(word), "{word:?} is not in {:?}", lines[0]);
    }
    assert!(text.contains("\r\x1b[Kmachine") || text.contains("\r\x1b[K\r\nmachine"), "it is gone: {text:?}");
    Ok(())
}

#[test]
fn interval_of_trace_cmds_scripts_is_taken_and_said_to_do_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let recording = recorder(folder.path()).run("-s 1000 -e sched -- sleep 0.1")?.ok()?;
    let remarks: Vec<&str> = recording.said.lines().filter(|line| line.contains("-s has no effect")).collect();
    ensure!(remarks.len() == 1 && events_of(&recording, "host")? > 0, "{}", recording.said);
    let quiet = recorder(folder.path()).command("-q -s 1000 -s 5 -e sched -- true")?.output()?;
    ensure!(quiet.status.success() && quiet.stderr.is_empty(), "{quiet:?}");
    Ok(())
}

#[test]
fn help_is_grouped_by_need() -> Result<()> {
    let said = Command::new(xtask::build::vtrace()?).args(["record", "--help"]).output()?;
    let text = String::from_utf8(said.stdout)?;
    let heads = ["Events and tracers", "Filters", "Ring buffers", "Machines", "Output files", "Session", "Report"];
    let places: Vec<usize> = heads
        .iter()
        .map(|head| text.find(&format!("\n{head}")).with_context(|| format!("{head}: {text}")))
        .collect::<Result<_>>()?;
    assert!(places.is_sorted(), "{text}");
    let lonely =
        text.split("\nOptions:").nth(1).unwrap_or_default().lines().take_while(|line| !line.is_empty() || line == &"");
    let options = lonely.take_while(|line| !heads.iter().any(|head| line.starts_with(head)));
    let options: Vec<&str> = options.filter(|line| line.trim_start().starts_with('-')).collect();
    assert!(options.iter().all(|line| line.contains("--help")), "each option has its group: {options:?}");
    Ok(())
}
