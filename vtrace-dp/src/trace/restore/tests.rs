//! Files that end anywhere, restored and read back.

use std::fs::OpenOptions;

use proptest::prelude::*;
use vtrace_common::ids::Cpu;

use super::*;
use crate::{
    ftrace::metadata::Metadata,
    trace::{
        format::compressed::Compression,
        write::{
            Bounds, Writer,
            pack::{Form, FormatVersion, pack},
        },
    },
};

const PAGE: u64 = 4096;

fn page(time: u64) -> Vec<u8> {
    let mut page = [time.to_le_bytes(), 8u64.to_le_bytes()].concat();
    page.extend([1u32.to_le_bytes(), 7u32.to_le_bytes()].concat());
    page.resize(4096, 0);
    page
}

fn options() -> Vec<TraceOption> {
    vec![TraceOption::TraceClock("local [x86-tsc]".into()), TraceOption::TraceId(7)]
}

/// A recording of two lanes with so many pages each.
fn writer(folder: &str, bounds: Bounds, pages: [u64; 2]) -> (File, Writer) {
    let file = tempfile::tempfile_in(folder).unwrap();
    let metadata = Metadata { header_page: b"page".to_vec(), cmdlines: b"1 init\n".to_vec(), ..Metadata::default() };
    let again = file.try_clone().unwrap();
    let mut writer = Writer::create_bounded(again, &metadata, "x86-tsc", 4096, &[Cpu(0), Cpu(3)], bounds).unwrap();
    writer.update_options(&options()).unwrap();
    for (area, count) in writer.areas().iter().zip(pages) {
        for index in 0..count {
            writer.file().write_all_at(&page(100 + index), area.offset + index * PAGE).unwrap();
        }
    }
    (file, writer)
}

fn times(file: &File) -> Vec<Vec<u64>> {
    let reader = Reader::open(FileSource::new(file.try_clone().unwrap()).unwrap()).unwrap();
    assert_eq!(reader.options()[..2], options(), "options are those that were known");
    let Some(top) = reader.top() else { return Vec::new() };
    let lane = |lane| {
        let mut times = Vec::new();
        reader.events(top, lane, |time, _| times.push(time)).unwrap();
        times
    };
    top.lanes.iter().map(lane).collect()
}

const FOLDERS: [&str; 2] = [env!("CARGO_MANIFEST_DIR"), "/dev/shm"];

#[test]
fn packed_file_is_finished_already_and_that_of_another_program_is_refused() {
    let forms = [
        (FormatVersion::V7, Compression::None),
        (FormatVersion::V7, Compression::Zstd),
        (FormatVersion::V6, Compression::None),
    ];
    for (recorder, is_ours) in [("vtrace 0.1.0", true), ("trace-cmd 3.4", false)] {
        let (file, writer) = writer(FOLDERS[1], Bounds::default(), [3, 5]);
        let filled = [(Cpu(0), 3 * PAGE), (Cpu(3), 5 * PAGE)];
        let version = TraceOption::Version(recorder.to_owned());
        writer.finish(&filled, b"1 init\n", &[options(), vec![version]].concat(), "{}").unwrap();
        for (version, compression) in forms {
            let packed = tempfile::tempfile_in(FOLDERS[1]).unwrap();
            let form = Form { version, compression };
            let bytes = pack(file.try_clone().unwrap(), &[], form, &packed).unwrap();
            let restored = restore(packed.try_clone().unwrap());
            match restored {
                Ok(restored) => {
                    assert!(is_ours && restored.was == Was::Finished && restored.bytes == bytes, "{form:?}")
                }
                Err(fault) => assert!(!is_ours && matches!(fault, RestoreFault::NotOurs), "{form:?}: {fault}"),
            }
            packed.set_len(bytes - 1).unwrap();
            assert!(matches!(restore(packed), Err(RestoreFault::NotOurs)), "a packed file that is cut is not finished");
        }
    }
}

#[test]
fn file_that_was_never_closed_gets_all_its_pages() {
    for folder in FOLDERS {
        let (file, writer) = writer(folder, Bounds::default(), [3, 5]);
        drop(writer);
        let restored = restore(file.try_clone().unwrap()).unwrap();
        assert_eq!((restored.was, restored.linked, restored.is_missing_pages()), (Was::Open, true, false));
        assert_eq!(restored.lanes.iter().map(|lane| lane.pages).collect::<Vec<_>>(), [3, 5]);
        assert_eq!(times(&file), [(100..103).collect::<Vec<_>>(), (100..105).collect()]);
        let again = restore(file.try_clone().unwrap()).unwrap();
        assert_eq!((again.was, again.bytes), (Was::Finished, restored.bytes), "once is enough");
    }
}

#[test]
fn file_without_pages_becomes_a_valid_empty_one() {
    let (file, writer) = writer(FOLDERS[0], Bounds::default(), [0, 0]);
    drop(writer);
    let restored = restore(file.try_clone().unwrap()).unwrap();
    assert_eq!(restored.lanes.len(), 2);
    assert!(times(&file).is_empty());
}

#[test]
fn file_that_a_writer_has_locked_is_refused_and_a_readers_lock_does_not_count() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.dat");
    let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
    let recording = open();
    assert_eq!(try_write_lock(&recording).unwrap(), WriteLock::Held);
    assert!(matches!(restore(open()), Err(RestoreFault::Busy)));
    drop(recording);
    let reader = File::open(&path).unwrap();
    reader.lock().unwrap();
    assert!(!matches!(restore(open()), Err(RestoreFault::Busy)));
}

#[test]
fn gap_is_said_in_the_file() {
    let (file, writer) = writer(FOLDERS[0], Bounds::default(), [2, 0]);
    let area = writer.areas()[0];
    writer.file().write_all_at(&page(300), area.offset + 5 * PAGE).unwrap();
    drop(writer);
    let restored = restore(file.try_clone().unwrap()).unwrap();
    assert_eq!((restored.lanes[0].pages, restored.lanes[0].pages_missing), (3, 3));
    assert_eq!(times(&file), [vec![100, 101, 300]]);
    let reader = Reader::open(FileSource::new(file).unwrap()).unwrap();
    let top = reader.top().unwrap();
    let pages: Vec<_> = reader.pages(top, &top.lanes[0]).map(|page| page.unwrap().1).collect();
    let marked = |page: &Vec<u8>| vtrace_common::page::Header::parse(page, 4096).unwrap().missed;
    assert_eq!(pages.iter().map(marked).collect::<Vec<_>>(), [false, false, false, false, false, true]);
}

#[test]
fn newest_pages_of_a_lane_that_began_again_are_in_order() {
    for folder in FOLDERS {
        for crash in [true, false] {
            let bounds = Bounds { newest_bytes: Some(1 << 20), lane_bytes_max: Some(1) };
            let (file, writer) = writer(folder, bounds, [0, 4]);
            let area = writer.areas()[0];
            let count = area.bytes_max / PAGE + 300;
            for index in 0..count {
                writer.file().write_all_at(&page(1000 + index), area.place(index * PAGE)).unwrap();
            }
            // After a crash the number of bytes to keep is unknown: all pages present are kept.
            let kept = if crash { area.bytes_max } else { writer.kept_bytes(&area, count * PAGE) } / PAGE;
            if crash {
                drop(writer);
                assert_eq!(restore(file.try_clone().unwrap()).unwrap().lanes[0].pages, kept);
            } else {
                writer.finish(&[(Cpu(0), count * PAGE), (Cpu(3), 4 * PAGE)], b"", &options(), "{}").unwrap();
            }
            assert_eq!(times(&file), [(1000 + count - kept..1000 + count).collect(), (100..104).collect::<Vec<_>>()]);
        }
    }
}

#[test]
fn old_pages_give_their_room_back_while_recording_and_the_newest_are_found_after_a_crash() {
    for folder in FOLDERS {
        for crash in [true, false] {
            let bounds = Bounds { newest_bytes: Some(1 << 20), lane_bytes_max: None };
            let count = 5000;
            let (file, mut writer) = writer(folder, bounds, [count, 4]);
            writer.drop_older(&[(Cpu(0), count * PAGE), (Cpu(3), 4 * PAGE)]).unwrap();
            file.sync_all().unwrap();
            let room = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
            assert!(room < 8 << 20, "{room} bytes of {} are kept", count * PAGE);
            let kept = writer.kept_bytes(&writer.areas()[0], count * PAGE) / PAGE;
            if crash {
                drop(writer);
                assert_eq!(restore(file.try_clone().unwrap()).unwrap().lanes[0].pages, kept);
            } else {
                writer.finish(&[(Cpu(0), count * PAGE), (Cpu(3), 4 * PAGE)], b"", &options(), "{}").unwrap();
            }
            assert_eq!(times(&file), [(100 + count - kept..100 + count).collect(), (100..104).collect::<Vec<_>>()]);
        }
    }
}

fn bytes(pages: [u64; 2]) -> Vec<u8> {
    let bounds = Bounds { lane_bytes_max: Some(1), newest_bytes: None };
    let (file, writer) = writer("/dev/shm", bounds, pages);
    drop(writer);
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn file_that_was_cut_off_gives_what_is_in_front(cut: prop::sample::Index) {
        let whole = bytes([9, 4]);
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all_at(&whole[..cut.index(whole.len())], 0).unwrap();
        if let Ok(restored) = restore(file.try_clone().unwrap()) {
            prop_assert!(restored.lanes.iter().map(|lane| lane.pages).sum::<u64>() <= 13);
            let again = restore(file).unwrap();
            prop_assert_eq!(again.was, Was::Finished);
        }
    }

    #[test]
    fn file_with_changed_bits_gives_an_answer(flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..6)) {
        let mut changed = bytes([3, 2]);
        for (at, bits) in flips {
            // Where something is said, not in the holes.
            let at = at.index(700);
            changed[at] ^= bits;
        }
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all_at(&changed, 0).unwrap();
        if restore(file.try_clone().unwrap()).is_ok() {
            let _ = Reader::open(FileSource::new(file).unwrap());
        }
    }
}
