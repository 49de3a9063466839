//! Files on several file systems, on full ones, and after a crash.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FallocateFlags, fallocate};
use tempfile::TempDir;
use vtrace_common::ids::Cpu;
use vtrace_dp::{
    ftrace::metadata::Metadata,
    trace::{
        format::areas::WriteState,
        write::{Finished, Writer, collapse::Compaction},
    },
};

use vtrace_tests::judge::trace_cmd;

use super::open;

/// A file system of its own, unmounted when dropped.
struct Mount {
    folder: TempDir,
    _image: Option<TempDir>,
}

impl Mount {
    fn tmpfs(size: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        call("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "none"], &[folder.path()])?;
        Ok(Self { folder, _image: None })
    }

    fn image(make: &str, words: &[&str], package: &str, bytes: u64) -> Result<Self> {
        xtask::packages::ensure(&[package])?;
        let (folder, image) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let path = image.path().join("image");
        File::create(&path)?.set_len(bytes)?;
        call(make, words, &[&path])?;
        call("mount", &["-o", "loop"], &[&path, folder.path()])?;
        Ok(Self { folder, _image: Some(image) })
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("file.dat")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = call("umount", &[], &[self.folder.path()]);
    }
}

fn call(program: &str, words: &[&str], paths: &[&Path]) -> Result<()> {
    let output =
        Command::new(program).args(words).args(paths).output().with_context(|| format!("cannot run {program}"))?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn create(path: &Path, page_bytes: u32, lanes: &[Cpu]) -> Result<Writer> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    let header_page = b"\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n\tfield: char data;\toffset:16;\tsize:4080;\tsigned:1;\n".to_vec();
    let metadata =
        Metadata { header_page, header_event: b"# compressed entry header\n".to_vec(), ..Metadata::default() };
    Ok(Writer::create(file, &metadata, "x86-tsc", page_bytes, lanes)?)
}

/// Page `index` of a lane: one event, and the rest filled with what only this page holds.
fn page(cpu: Cpu, index: u64, page_bytes: u32) -> Vec<u8> {
    let mut page = [(index + 1).to_le_bytes(), 8u64.to_le_bytes()].concat();
    page.extend([1u32.to_le_bytes(), cpu.0.to_le_bytes()].concat());
    let filler = (u64::from(cpu.0) << 32 | index).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    page.extend(filler.to_le_bytes().iter().cycle().take(page_bytes as usize - 24));
    page
}

/// Fills lane `n` with `counts[n]` pages; what does not fit on the disk is not counted.
fn fill(writer: &Writer, counts: &[u64], page_bytes: u32) -> Vec<(Cpu, u64)> {
    let mut filled = Vec::new();
    for (area, count) in writer.areas().iter().zip(counts) {
        let written = (0..*count).take_while(|index| {
            let at = area.offset + index * u64::from(page_bytes);
            writer.file().write_all_at(&page(area.cpu, *index, page_bytes), at).is_ok()
        });
        filled.push((area.cpu, written.count() as u64 * u64::from(page_bytes)));
    }
    filled
}

/// Every page of every lane is there, in order, and nothing else.
fn check(path: &Path, filled: &[(Cpu, u64)], page_bytes: u32) -> Result<()> {
    let reader = open(path)?;
    let top = reader.top().context("a top instance")?;
    let present: Vec<_> = filled.iter().filter(|(_, bytes)| *bytes > 0).copied().collect();
    assert_eq!(top.lanes.iter().map(|lane| (lane.cpu, lane.bytes)).collect::<Vec<_>>(), present);
    for lane in &top.lanes {
        assert_eq!(lane.offset % u64::from(page_bytes), 0);
        for (index, found) in (0..).zip(reader.pages(top, lane)) {
            assert!(found?.1 == page(lane.cpu, index, page_bytes), "{} page {index}", lane.cpu);
        }
    }
    assert_eq!(reader.areas()?.context("areas")?.state, WriteState::Finished);
    Ok(())
}

fn finish_on(path: &Path, page_bytes: u32) -> Result<Finished> {
    let lanes: Vec<Cpu> = (0..5).map(Cpu).collect();
    let writer = create(path, page_bytes, &lanes)?;
    let filled = fill(&writer, &[3, 0, 700 * 4096 / u64::from(page_bytes), 1, 2], page_bytes);
    let finished = writer.finish(&filled, b"1 init\n", &[], "{}")?;
    check(path, &filled, page_bytes)?;
    let data: u64 = filled.iter().map(|(_, bytes)| bytes).sum();
    let about = fs::metadata(path)?;
    assert!(about.len() < data + 6 * (u64::from(page_bytes) + 65536), "{} bytes are not collapsed", about.len());
    assert!(about.blocks() * 512 < data + (2 << 20), "{} bytes on disk for {data}", about.blocks() * 512);
    assert!(trace_cmd(&["dump", "--validate"], &[path])?.contains("is a valid trace-cmd file"));
    Ok(finished)
}

#[test]
fn ext4_takes_the_holes_out() -> Result<()> {
    let mount = Mount::image("mkfs.ext4", &["-q"], "e2fsprogs", 512 << 20)?;
    for page_bytes in [4096, 8192, 65536, 524_288] {
        assert_eq!(finish_on(&mount.path(), page_bytes)?.compaction, Compaction::Collapsed);
        fs::remove_file(mount.path())?;
    }
    Ok(())
}

#[test]
fn ext4_with_small_blocks_takes_the_holes_out() -> Result<()> {
    let mount = Mount::image("mkfs.ext4", &["-q", "-b", "1024"], "e2fsprogs", 512 << 20)?;
    assert_eq!(finish_on(&mount.path(), 4096)?.compaction, Compaction::Collapsed);
    Ok(())
}

#[test]
fn xfs_takes_the_holes_out() -> Result<()> {
    let mount = Mount::image("mkfs.xfs", &["-q"], "xfsprogs", 1 << 30)?;
    for page_bytes in [4096, 65536] {
        assert_eq!(finish_on(&mount.path(), page_bytes)?.compaction, Compaction::Collapsed);
        fs::remove_file(mount.path())?;
    }
    Ok(())
}

#[test]
fn btrfs_shares_what_it_copies() -> Result<()> {
    let mount = Mount::image("mkfs.btrfs", &["-q"], "btrfs-progs", 1 << 30)?;
    for page_bytes in [4096, 65536] {
        assert_eq!(finish_on(&mount.path(), page_bytes)?.compaction, Compaction::Copied);
        fs::remove_file(mount.path())?;
    }
    Ok(())
}

#[test]
fn tmpfs_is_copied_downwards() -> Result<()> {
    let mount = Mount::tmpfs("256m")?;
    for page_bytes in [4096, 8192, 65536, 524_288] {
        assert_eq!(finish_on(&mount.path(), page_bytes)?.compaction, Compaction::Copied);
        fs::remove_file(mount.path())?;
    }
    Ok(())
}

#[test]
fn copying_needs_no_room_for_a_second_copy() -> Result<()> {
    let mount = Mount::tmpfs("40m")?;
    let writer = create(&mount.path(), 4096, &[Cpu(0), Cpu(1)])?;
    let filled = fill(&writer, &[4000, 4000], 4096);
    assert_eq!(filled, [(Cpu(0), 4000 * 4096), (Cpu(1), 4000 * 4096)]);
    assert_eq!(writer.finish(&filled, b"", &[], "")?.compaction, Compaction::Copied);
    check(&mount.path(), &filled, 4096)
}

/// A file of two lanes on a disk that they filled.
fn full(mount: &Mount, page_bytes: u32) -> Result<(Writer, Vec<(Cpu, u64)>)> {
    let writer = create(&mount.path(), page_bytes, &[Cpu(0), Cpu(1)])?;
    let filled = fill(&writer, &[(1 << 20) / u64::from(page_bytes), 1 << 20], page_bytes);
    assert!(filled[1].1 > 0 && filled[1].1 < 1 << 30, "the disk is full");
    // What was written of a page that did not fit would be given back in the end: another file takes it.
    let torn = i64::try_from(writer.areas()[1].offset + filled[1].1)?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(writer.file(), flags, torn, i64::from(page_bytes))?;
    let hog = File::create(mount.path().with_file_name("hog"))?;
    while (&hog).write(&[1; 4096]).is_ok() {}
    Ok((writer, filled))
}

#[test]
fn full_disk_has_room_for_what_comes_at_the_end() -> Result<()> {
    let mount = Mount::tmpfs("8m")?;
    let (writer, filled) = full(&mount, 4096)?;
    assert_eq!(writer.finish(&filled, b"1 init\n", &[], "{}")?.compaction, Compaction::Copied);
    check(&mount.path(), &filled, 4096)
}

#[test]
fn lane_that_cannot_be_moved_keeps_its_hole() -> Result<()> {
    let mount = Mount::tmpfs("8m")?;
    let page_bytes = 256 << 10;
    let (writer, filled) = full(&mount, page_bytes)?;
    // What was reserved is just enough for the notes, and pages this large begin after it.
    let finished = writer.finish(&filled, b"1 init\n", &[], &"x".repeat(200 << 10))?;
    assert_eq!(finished.compaction, Compaction::Left);
    check(&mount.path(), &filled, page_bytes)?;
    assert!(trace_cmd(&["dump", "--validate"], &[&mount.path()])?.contains("is a valid trace-cmd file"));
    Ok(())
}

#[test]
fn end_that_finds_no_room_is_an_error_and_loses_no_page() -> Result<()> {
    let mount = Mount::tmpfs("8m")?;
    let (writer, filled) = full(&mount, 4096)?;
    let refused = writer.finish(&filled, b"1 init\n", &[], &"x".repeat(1 << 20));
    assert!(
        std::io::Error::from(refused.expect_err("no room for the notes")).kind() == std::io::ErrorKind::StorageFull
    );
    let reader = open(&mount.path())?;
    let areas = reader.areas()?.context("areas")?;
    assert_eq!(areas.state, WriteState::Closed);
    let file = File::open(mount.path())?;
    for (lane, (cpu, bytes)) in areas.lanes.iter().zip(&filled) {
        assert_eq!((lane.cpu, lane.moved.bytes + lane.rest.bytes), (*cpu, *bytes));
        let mut data = vec![0; usize::try_from(*bytes)?];
        let (moved, rest) = data.split_at_mut(usize::try_from(lane.moved.bytes)?);
        file.read_exact_at(moved, lane.moved.offset)?;
        file.read_exact_at(rest, lane.rest.offset)?;
        let right = (0..).zip(data.chunks(4096)).all(|(index, found)| found == page(*cpu, index, 4096));
        assert!(right, "{cpu}");
    }
    Ok(())
}

#[test]
fn file_that_was_never_finished_says_where_its_lanes_are() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("crashed.dat");
    let writer = create(&path, 4096, &[Cpu(0), Cpu(7)])?;
    let areas = writer.areas().to_vec();
    fill(&writer, &[3, 5], 4096);
    drop(writer);
    let reader = open(&path)?;
    assert!(reader.top().context("a top instance")?.lanes.is_empty());
    let found = reader.areas()?.context("areas")?;
    assert_eq!((found.state, found.page_bytes), (WriteState::Open, 4096));
    for (area, lane) in areas.iter().zip(&found.lanes) {
        assert_eq!((area.cpu, area.offset, area.bytes_max), (lane.cpu, lane.rest.offset, lane.rest.bytes));
    }
    assert!(trace_cmd(&["dump", "--validate"], &[&path])?.contains("is a valid trace-cmd file"));
    Ok(())
}

/// Runs itself again where files may not become large.
#[test]
fn limit_of_the_process_makes_areas_smaller() -> Result<()> {
    const INSIDE: &str = "VTRACE_TEST_SMALL_FILES";
    if std::env::var_os(INSIDE).is_none() {
        let me = std::env::current_exe()?;
        let name = "files::limit_of_the_process_makes_areas_smaller";
        let limited = format!("ulimit -f 1048576 && exec '{}' --exact {name}", me.display());
        return call("bash", &["-c", &format!("{INSIDE}=1; export {INSIDE}; {limited}")], &[]);
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("small.dat");
    let writer = create(&path, 4096, &[Cpu(0), Cpu(1)])?;
    let end = writer.areas().iter().map(|area| area.offset + area.bytes_max).max().context("areas")?;
    assert!((256 << 20..=1 << 30).contains(&end), "{end}");
    let filled = fill(&writer, &[30, 40], 4096);
    writer.finish(&filled, b"", &[], "")?;
    check(&path, &filled, 4096)
}

#[test]
fn lane_that_holds_more_than_its_area_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("refused.dat");
    let writer = create(&path, 4096, &[Cpu(0)])?;
    let bytes_max = writer.areas()[0].bytes_max;
    assert!(writer.finish(&[(Cpu(0), bytes_max + 1)], b"", &[], "").is_err());
    assert!(create(&folder.path().join("odd.dat"), 5000, &[Cpu(0)]).is_err());
    assert!(create(&folder.path().join("twice.dat"), 4096, &[Cpu(1), Cpu(1)]).is_err());
    Ok(())
}

/// `VTRACE_TEST_FOLDER=/somewhere cargo test … -- --ignored --nocapture finish_of`: prints how long the end takes.
#[test]
#[ignore = "writes 2 GiB, to measure"]
fn finish_of_two_lanes_of_a_gibibyte() -> Result<()> {
    let folder = std::env::var_os("VTRACE_TEST_FOLDER").context("VTRACE_TEST_FOLDER is the folder to measure in")?;
    let folder = tempfile::tempdir_in(folder)?;
    for synced in [false, true] {
        let path = folder.path().join("large.dat");
        let writer = create(&path, 4096, &[Cpu(0), Cpu(1)])?;
        let pages: Vec<u8> = (0..256).flat_map(|index| page(Cpu(0), index, 4096)).collect();
        for area in writer.areas() {
            for step in 0..1 << 10 {
                writer.file().write_all_at(&pages, area.offset + (step << 20))?;
            }
        }
        let filled = [(Cpu(0), 1 << 30), (Cpu(1), 1 << 30)];
        if synced {
            writer.file().sync_all()?;
        }
        let begun = std::time::Instant::now();
        let finished = writer.finish(&filled, b"1 init\n", &[], "{}")?;
        eprintln!("{:?}, written back before: {synced}: {:?}", finished.compaction, begun.elapsed());
        fs::remove_file(path)?;
    }
    Ok(())
}
