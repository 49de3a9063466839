//! trace.dat: any file, opened and walked to its last event, and looked at as if its recording had been killed.
//!
//! Input: the file.

use std::{fs::OpenOptions, os::unix::fs::FileExt, sync::OnceLock};

use vtrace_common::ids::Cpu;
use vtrace_dp::{
    analysis::check::{self, guest::GuestFile},
    clock::shift::{ShiftSample, TimeShift},
    ftrace::{fields::Formats, metadata::Metadata},
    trace::{
        format::{compressed::Compression, option::TraceOption},
        read::{Reader, merge::Merge, times::FileClock},
        restore,
        write::Writer,
    },
};

/// Events that are looked at: a small file can hold many, packed.
const EVENTS_MAX: usize = 1 << 16;

/// Reads everything there is.
pub fn run(bytes: &[u8]) {
    if let Ok(lanes) = restore::look(&bytes, 4096) {
        let pages: u64 = lanes.iter().map(|lane| lane.pages).sum();
        assert!(pages <= bytes.len() as u64 / 4096, "{pages} pages in {} bytes", bytes.len());
    }
    let Ok(reader) = Reader::open(bytes) else { return };
    let _ = (reader.notes(), reader.areas(), reader.segments());
    decode(&reader);
    // As host and as guest of itself.
    let _ = check::check(&reader, &[GuestFile { file: "guest.dat".into(), reader: &reader }])
        .map(|report| report.text(true));
    if reader.compression() != Compression::None {
        return;
    }
    for buffer in reader.buffers() {
        for lane in &buffer.lanes {
            let mut events = 0u64;
            let _ = reader.events(buffer, lane, |_, _| events += 1);
            assert!(events <= lane.bytes / 4, "{events} events in {} bytes", lane.bytes);
        }
    }
}

/// Every field of every event, by time.
fn decode(reader: &Reader<&[u8]>) {
    let formats = Formats::parse(reader.metadata());
    let Ok(stamps) = FileClock::from_options(reader.options(), reader.other_options()) else { return };
    let buffers: Vec<_> = reader.buffers().iter().take(16).map(|buffer| (buffer, stamps.clone())).collect();
    let Ok(mut merge) = Merge::new(reader, &buffers) else { return };
    for _ in 0..EVENTS_MAX {
        let Ok(Some(event)) = merge.next_event() else { return };
        for field in formats.of_event(event.data).iter().flat_map(|format| &format.fields) {
            let _ = (field.number(event.data), field.contents(event.data));
        }
    }
}

/// A file of our own.
pub fn seeds() -> Vec<Vec<u8>> {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS.get_or_init(|| vec![file().expect("the temporary folder takes a file")]).clone()
}

fn file() -> std::io::Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("seed.dat");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    let metadata = Metadata {
        header_page: b"page".to_vec(),
        header_event: b"event".to_vec(),
        event_formats: [("sched".to_owned(), vec![b"name: sched_switch\nID: 1\n".to_vec()])].into(),
        ..Metadata::default()
    };
    let writer = Writer::create(file, &metadata, "local [x86-tsc]", 4096, &[Cpu(0)])?;
    writer.file().write_all_at(&page(), writer.areas()[0].offset)?;
    let samples = [7, 9].map(|time| ShiftSample { time, offset: -5 }).to_vec();
    let shift = TimeShift { peer: 1, interpolate: false, cpus: vec![samples] };
    let guest = TraceOption::Guest { name: "guest1".to_owned(), trace_id: 2, vcpus: vec![(Cpu(0), 42)] };
    let options = [TraceOption::TraceId(1), TraceOption::TimeShift(shift), guest];
    writer.finish(&[(Cpu(0), 4096)], b"1 init\n", &options, "{}")?;
    std::fs::read(path)
}

/// One event of each kind: short, time extend, long, discarded, absolute stamp.
fn page() -> Vec<u8> {
    let words: [u32; 12] = [1, 7, 30 | 5 << 5, 1, 1 << 5, 8, 1, 29 | 1 << 5, 4, 31, 1, 29];
    let mut page = [1000u64.to_le_bytes(), 48u64.to_le_bytes()].concat();
    words.iter().for_each(|word| page.extend(word.to_le_bytes()));
    page.resize(4096, 0);
    page
}
