//! Files in another form: stock tools see the same events in it, of every instance.

use std::{fs::File, path::Path};

use anyhow::Result;
use vtrace_dp::trace::{
    format::{compressed::Compression, option::TraceOption},
    write::pack::{Form, FormatVersion, pack, pack_instance},
};
use vtrace_tests::judge::{Line, convert_packed, lines, shark_entries, trace_cmd, trace_cmd_newest};

use super::{
    assert_same, events,
    host::{Recording, record},
    open, shown,
};

const FORMS: [Form; 3] = [
    Form { version: FormatVersion::V7, compression: Compression::None },
    Form { version: FormatVersion::V7, compression: Compression::Zstd },
    Form { version: FormatVersion::V6, compression: Compression::None },
];

fn options(recording: &Recording) -> Vec<TraceOption> {
    let clock = TraceOption::TraceClock("local [x86-tsc]".to_owned());
    let more = [clock, TraceOption::Tsc2Nsec { mult: 5_592_405, shift: 24 }, TraceOption::TraceId(7)];
    [recording.options(), more.to_vec()].concat()
}

/// `PREFIX: ` in front of a line of an instance.
fn of_instance(report: &str, name: &str) -> Vec<Line> {
    let prefix = format!("{name}:");
    let lines_of = report.lines().filter_map(|line| line.trim_start().strip_prefix(&prefix));
    lines(&lines_of.collect::<Vec<_>>().join("\n"))
}

fn stock_sees_all(path: &Path, top: &Path, named: &Path) -> Result<()> {
    assert!(trace_cmd(&["dump", "--validate"], &[path])?.contains("is a valid trace-cmd file"));
    for report in [trace_cmd(&["report", "-t"], &[path])?, trace_cmd_newest(&["report", "-t"], &[path])?] {
        let instance = of_instance(&report, "more");
        let all = lines(&report);
        let rest: Vec<Line> = all.into_iter().filter(|line| line.file.as_deref() != Some("more")).collect();
        for (found, file) in [(rest, top), (instance, named)] {
            let expected = shown(&lines(&trace_cmd(&["report", "-t"], &[file])?));
            assert_same(&shown(&found), &expected, &format!("{} in {}", file.display(), path.display()));
        }
    }
    Ok(())
}

#[test]
fn stock_tools_see_every_event_of_every_instance_in_every_form() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (recording, more) = (record("pack-top", 4)?, record("pack-more", 4)?);
    let (top, named) = (folder.path().join("top.dat"), folder.path().join("named.dat"));
    recording.write(&top, &options(&recording), "{\"kept\":1}")?;
    more.write(&named, &options(&more), "{}")?;
    for (at, form) in FORMS.into_iter().enumerate() {
        let path = folder.path().join(format!("packed{at}.dat"));
        let bytes = pack(File::open(&top)?, &[("more", File::open(&named)?)], form, &File::create_new(&path)?)?;
        assert_eq!(bytes, std::fs::metadata(&path)?.len());
        stock_sees_all(&path, &top, &named)?;
        let reader = open(&path)?;
        assert_eq!((reader.compression(), reader.buffers().len()), (form.compression, 2));
        assert_same(&events(&path)?, &events(&top)?, "as we read them");
        let keeps = if form.version == FormatVersion::V7 { Some("{\"kept\":1}") } else { None };
        assert_eq!(reader.notes()?.as_deref(), keeps);
        assert!(reader.options().contains(&TraceOption::TraceId(7)));
        // The first stream is the top instance; others are streams of their own.
        assert_eq!(shark_entries(&path)?.len(), events(&top)?.len(), "KernelShark's library");
    }
    Ok(())
}

#[test]
fn file_whose_pages_are_an_instances_has_an_empty_top_in_every_form() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (recording, plain) = (record("pack-instance", 4)?, folder.path().join("plain.dat"));
    recording.write(&plain, &options(&recording), "{\"kept\":1}")?;
    let expected = shown(&lines(&trace_cmd(&["report", "-t"], &[&plain])?));
    for (at, form) in FORMS.into_iter().enumerate() {
        let path = folder.path().join(format!("packed{at}.dat"));
        let bytes = pack_instance(File::open(&plain)?, "more", form, &File::create_new(&path)?)?;
        assert_eq!(bytes, std::fs::metadata(&path)?.len());
        assert!(trace_cmd(&["dump", "--validate"], &[&path])?.contains("is a valid trace-cmd file"));
        for report in [trace_cmd(&["report", "-t"], &[&path])?, trace_cmd_newest(&["report", "-t"], &[&path])?] {
            assert_same(&shown(&of_instance(&report, "more")), &expected, &format!("{form:?}"));
            assert!(lines(&report).iter().all(|line| line.file.as_deref() == Some("more")), "nothing else");
        }
        assert!(open(&path)?.options().contains(&TraceOption::TraceId(7)));
    }
    Ok(())
}

#[test]
fn large_pages_and_lanes_without_any_are_packed_too() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut recording = record("pack-large", 512)?;
    recording.lanes[0].1.clear();
    let plain = folder.path().join("plain.dat");
    recording.write(&plain, &recording.options(), "")?;
    for (at, form) in FORMS.into_iter().enumerate() {
        let path = folder.path().join(format!("packed{at}.dat"));
        pack(File::open(&plain)?, &[], form, &File::create_new(&path)?)?;
        assert_same(&shown(&lines(&trace_cmd(&["report"], &[&path])?)), &events(&plain)?, &format!("{form:?}"));
    }
    Ok(())
}

#[test]
fn zstd_takes_less_room_than_stock_makes_of_the_same_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let recording = record("pack-size", 4)?;
    let [plain, ours, theirs] = ["plain.dat", "ours.dat", "theirs.dat"].map(|name| folder.path().join(name));
    recording.write(&plain, &options(&recording), "{}")?;
    let bytes = pack(File::open(&plain)?, &[], FORMS[1], &File::create_new(&ours)?)?;
    convert_packed(&plain, "7", "zstd", &theirs)?;
    let stock = std::fs::metadata(&theirs)?.len();
    assert!(bytes <= stock + stock / 20, "{bytes} bytes, {stock} of stock trace-cmd");
    Ok(())
}

#[test]
fn version_6_is_never_compressed_and_has_one_page_size() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let [small, large, out] = ["small.dat", "large.dat", "out.dat"].map(|name| folder.path().join(name));
    let recording = record("pack-small", 4)?;
    recording.write(&small, &recording.options(), "")?;
    let recording = record("pack-other", 64)?;
    recording.write(&large, &recording.options(), "")?;
    let compressed = Form { version: FormatVersion::V6, compression: Compression::Zstd };
    let refused = pack(File::open(&small)?, &[], compressed, &File::create_new(&out)?);
    assert_eq!(refused.unwrap_err().to_string(), "version 6 cannot be compressed");
    let refused = pack(File::open(&small)?, &[("large", File::open(&large)?)], FORMS[2], &File::create(&out)?);
    assert_eq!(refused.unwrap_err().to_string(), "version 6 has one page size for all instances");
    Ok(())
}
