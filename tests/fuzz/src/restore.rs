//! Any file as a killed recording's: what was restored is finished, and can be read to its end.
//!
//! Input: u16 bytes of the beginning, the beginning, and what is in the file at [`DATA_AT`]; between them is a hole.

use std::{cell::RefCell, fs::File, os::unix::fs::FileExt, sync::OnceLock};

use vtrace_common::ids::Cpu;
use vtrace_dp::{
    ftrace::metadata::Metadata,
    trace::{
        read::{Reader, input::FileSource},
        restore::{Was, restore},
        write::Writer,
    },
    virtq::testing::memory_file,
};

/// Where a recording of ours puts its first page: room for the texts that come last is in front of it.
const DATA_AT: u64 = 63 << 20 | 4096;
/// Nothing makes a file longer than it was, but for what was cut off its end.
const FILE_BYTES_MAX: u64 = 128 << 20;

thread_local! {
    static FILE: RefCell<File> = RefCell::new(memory_file(0).expect("memory file"));
}

/// Restores, reads what came of it, restores again.
pub fn run(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<2>() else { return };
    let (head, data) = rest.split_at(rest.len().min(u16::from_le_bytes(*head).into()));
    FILE.with_borrow(|file| {
        file.set_len(0).expect("a memory file");
        file.write_all_at(head, 0).expect("a memory file");
        if !data.is_empty() {
            file.write_all_at(data, DATA_AT).expect("a memory file");
        }
        let again = || file.try_clone().expect("a descriptor");
        let Ok(restored) = restore(again()) else { return };
        let length = file.metadata().expect("a memory file").len();
        assert!(restored.was == Was::Finished || restored.bytes == length, "{} of {length} bytes", restored.bytes);
        assert!(length <= FILE_BYTES_MAX, "{length} bytes of {}", bytes.len());
        if restored.was == Was::Finished {
            return;
        }
        let source = FileSource::new(again()).expect("a memory file");
        // The texts in front of the pages are as they were, sense or not.
        if let Ok(reader) = Reader::open(source) {
            read(&reader);
        }
        let twice = restore(again()).map(|restored| restored.was);
        assert!(matches!(twice, Ok(Was::Finished)), "restored twice: {twice:?}");
    });
}

/// Every event of every lane that is said to be there.
fn read(reader: &Reader<FileSource>) {
    for buffer in reader.buffers() {
        for lane in &buffer.lanes {
            let _ = reader.events(buffer, lane, |_, _| {});
        }
    }
}

/// A recording that was killed with a page and a half, one before its first page, and one that had ended.
pub fn seeds() -> Vec<Vec<u8>> {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS
        .get_or_init(|| [Some(4096 + 2000), Some(0), None].map(|bytes| file(bytes).expect("a memory file")).to_vec())
        .clone()
}

/// The file of a recording that is killed after so many bytes, or ends normally.
fn file(killed_after: Option<usize>) -> std::io::Result<Vec<u8>> {
    let file = memory_file(0)?;
    let metadata = Metadata {
        header_page: b"page".to_vec(),
        header_event: b"event".to_vec(),
        event_formats: [("sched".to_owned(), vec![b"name: sched_switch\nID: 1\n".to_vec()])].into(),
        ..Metadata::default()
    };
    let writer = Writer::create(file.try_clone()?, &metadata, "local [x86-tsc]", 4096, &[Cpu(0), Cpu(1)])?;
    let page = [&1000_u64.to_le_bytes()[..], &4080_u64.to_le_bytes(), &[1; 4080]].concat();
    let at = writer.areas()[0].offset;
    writer.file().write_all_at(&[&page[..], &page].concat()[..killed_after.unwrap_or(4096)], at)?;
    match killed_after {
        Some(_) => drop(writer),
        None => drop(writer.finish(&[(Cpu(0), 4096), (Cpu(1), 0)], b"1 init\n", &[], "{}")?),
    }
    let length = file.metadata()?.len();
    assert!(at == DATA_AT || killed_after.is_none(), "data at {at}");
    let read = |at: u64, end: u64| {
        let mut bytes = vec![0; usize::try_from(end.min(length).saturating_sub(at)).expect("a seed is short")];
        file.read_exact_at(&mut bytes, at).map(|()| bytes)
    };
    let mut head = read(0, 64 << 10)?;
    head.truncate(head.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
    let length = u16::try_from(head.len()).expect("a head is short").to_le_bytes();
    Ok([&length[..], &head, &read(DATA_AT, DATA_AT + 2 * 4096)?].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_recording_left_can_be_read_once_it_is_restored() {
        for (seed, pages) in seeds()[..2].iter().zip([1, 0]) {
            run(seed);
            FILE.with_borrow(|file| {
                let reader = Reader::open(FileSource::new(file.try_clone().unwrap()).unwrap()).unwrap();
                let bytes: u64 = reader.buffers().iter().flat_map(|buffer| &buffer.lanes).map(|lane| lane.bytes).sum();
                assert_eq!(bytes, pages * 4096);
            });
        }
    }
}
