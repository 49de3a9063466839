//! Files of ours and of stock kind, whole and broken.

use std::{fs, os::unix::fs::FileExt};

use proptest::prelude::*;

use super::*;
use crate::trace::format::description;
use crate::trace::write::Writer;

/// A page with one event of four bytes.
fn page(time: u64) -> Vec<u8> {
    let mut page = [time.to_le_bytes(), 8u64.to_le_bytes()].concat();
    page.extend([1u32.to_le_bytes(), 7u32.to_le_bytes()].concat());
    page.resize(4096, 0);
    page
}

fn metadata() -> Metadata {
    Metadata {
        header_page: b"page".to_vec(),
        header_event: b"event".to_vec(),
        ftrace_formats: vec![b"name: function".to_vec()],
        event_formats: [("sched".to_owned(), vec![b"name: sched_switch".to_vec()])].into(),
        kallsyms: b"ffff t x\n".to_vec(),
        cmdlines: b"1 init\n".to_vec(),
        ..Metadata::default()
    }
}

/// A finished file of ours: CPU 0 with two pages, CPU 3 with one.
fn version_7() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.dat");
    let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    let writer = Writer::create(file, &metadata(), "local [x86-tsc]", 4096, &[Cpu(3), Cpu(0)]).unwrap();
    let pages = [[page(10), page(20)].concat(), page(30)];
    for (area, pages) in writer.areas().iter().zip(&pages) {
        writer.file().write_all_at(pages, area.offset).unwrap();
    }
    let options = [TraceOption::TraceId(5), TraceOption::CpuStat("CPU: 0\n".to_owned())];
    writer.finish(&[(Cpu(3), 4096), (Cpu(0), 8192)], b"1 init\n", &options, "{}").unwrap();
    fs::read(path).unwrap()
}

/// What a stock trace-cmd of old writes: everything in one row, and one instance.
fn version_6() -> Vec<u8> {
    let mut out = [MAGIC.as_slice(), b"6\0\0\x08", &4096u32.to_le_bytes()].concat();
    for section in description::FIXED_SECTIONS.into_iter().chain([id::CMDLINES]) {
        out.extend(description::body(section, &metadata()).unwrap());
    }
    out.extend(1u32.to_le_bytes());
    out.extend(V6_OPTIONS);
    crate::trace::format::option::push(&mut out, id::TRACEID, &5u64.to_le_bytes()).unwrap();
    crate::trace::format::option::push(
        &mut out,
        id::BUFFER,
        &[&12288u64.to_le_bytes(), b"other\0".as_slice()].concat(),
    )
    .unwrap();
    out.extend(0u16.to_le_bytes());
    out.extend(V6_FLYRECORD);
    out.extend([4096u64.to_le_bytes(), 8192u64.to_le_bytes()].concat());
    out.resize(4096, 0);
    out.extend([page(10), page(20)].concat());
    out.extend([V6_FLYRECORD.as_slice(), &16384u64.to_le_bytes(), &4096u64.to_le_bytes()].concat());
    out.resize(16384, 0);
    out.extend(page(40));
    out
}

fn times<S: Source>(reader: &Reader<S>, buffer: &Buffer) -> Vec<(Cpu, u64)> {
    let mut times = Vec::new();
    for lane in &buffer.lanes {
        reader.events(buffer, lane, |time, data| times.push((lane.cpu, time + u64::from(data[0]) - 7))).unwrap();
    }
    times
}

/// Everything a reader can be asked.
fn read_all(bytes: &[u8]) -> Result<usize, ReadFault> {
    let reader = Reader::open(bytes)?;
    let _ = (reader.notes(), reader.areas());
    let mut events = 0;
    for buffer in reader.buffers() {
        for lane in &buffer.lanes {
            let _ = reader.events(buffer, lane, |_, _| events += 1);
        }
    }
    Ok(events)
}

#[test]
fn both_versions_say_what_was_put_in() {
    let (seven, six) = (version_7(), version_6());
    let seven = Reader::open(seven.as_slice()).unwrap();
    assert_eq!(times(&seven, seven.top().unwrap()), [(Cpu(0), 10), (Cpu(0), 20), (Cpu(3), 30)]);
    assert_eq!(seven.notes().unwrap().as_deref(), Some("{}"));
    assert!(seven.options().contains(&TraceOption::CpuCount(4)), "as many as KernelShark needs");
    let six = Reader::open(six.as_slice()).unwrap();
    assert_eq!(times(&six, six.top().unwrap()), [(Cpu(0), 10), (Cpu(0), 20)]);
    let other = six.buffers().iter().find(|buffer| buffer.name == "other").unwrap();
    assert_eq!(times(&six, other), [(Cpu(0), 40)]);
    for (metadata_found, options) in [(seven.metadata(), seven.options()), (six.metadata(), six.options())] {
        assert_eq!(*metadata_found, metadata());
        assert!(options.contains(&TraceOption::TraceId(5)));
    }
}

#[test]
fn file_whose_end_is_cut_off_is_refused() {
    let whole = version_7();
    let short = &whole[..whole.len() - 1];
    assert!(matches!(Reader::open(short), Err(ReadFault::Short { what: "pages of a lane", .. })));
}

#[test]
fn options_that_run_in_circles_are_refused() {
    let mut bytes = version_7();
    let pointer: [u8; 8] = bytes[24..32].try_into().unwrap();
    let at = usize::try_from(u64::from_le_bytes(pointer)).unwrap();
    let header = SectionHeader::parse(bytes[at..at + 16].try_into().unwrap());
    let next = at + 16 + usize::try_from(header.bytes).unwrap() - 8;
    bytes[next..next + 8].copy_from_slice(&pointer);
    assert!(Reader::open(bytes.as_slice()).is_err());
}

#[test]
fn other_kinds_of_files_are_named() {
    assert!(matches!(read_all(b"ELF"), Err(ReadFault::NotATrace)));
    let mut big_endian = version_6();
    big_endian[12] = 1;
    assert!(matches!(read_all(&big_endian), Err(ReadFault::Unsupported { .. })));
    let mut compressed = version_7();
    compressed[18..22].copy_from_slice(b"lzma");
    assert!(matches!(read_all(&compressed), Err(ReadFault::Unsupported { .. })));
}

proptest! {
    #[test]
    fn any_bytes_after_a_head_give_an_answer(version in prop::sample::select(vec!["6", "7"]), bytes: Vec<u8>) {
        let mut file = [MAGIC.as_slice(), version.as_bytes(), b"\0\0\x08\0\x10\0\0"].concat();
        file.extend(bytes);
        let _ = read_all(&file);
    }

    #[test]
    fn file_with_changed_bytes_gives_an_answer(
        six: bool, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut: prop::sample::Index,
    ) {
        use std::sync::OnceLock;
        static FILES: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
        let files = FILES.get_or_init(|| [version_6(), version_7()]);
        let mut bytes = files[usize::from(!six)].clone();
        // Most of a file is zeros between pages: change what says something.
        let telling: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0 || *at < 1024).collect();
        for (at, byte) in changes {
            bytes[telling[at.index(telling.len())]] = byte;
        }
        let _ = read_all(&bytes);
        let _ = read_all(&bytes[..cut.index(bytes.len())]);
    }
}

proptest! {
    /// Of the pages of a lane those are given that can hold events of a stretch, and hardly more.
    #[test]
    fn pages_between_two_times_hold_all_events_between_them(
        mut begins in prop::collection::vec(0..100u64, 0..12), from in 0..110u64, length in 0..40u64,
    ) {
        begins.sort_unstable();
        let file: Vec<u8> = begins.iter().flat_map(|time| page(*time)).collect();
        let (source, to) = (file.as_slice(), from + length);
        let lane = LaneData { cpu: Cpu(0), offset: 0, bytes: u64::try_from(file.len()).unwrap() };
        let pages = LanePages::between(&source, &lane, 4096, from, to).unwrap();
        let found: Vec<u64> = pages.map(|page| u64::from_le_bytes(page.unwrap().1[..8].try_into().unwrap())).collect();
        let between = |times: &[u64]| times.iter().copied().filter(|time| (from..=to).contains(time)).collect::<Vec<_>>();
        prop_assert_eq!(between(&found), between(&begins));
        // The page before may reach into the stretch; no other is read.
        prop_assert!(found.len() <= between(&begins).len() + 1 && found.iter().all(|time| *time <= to));
    }
}
