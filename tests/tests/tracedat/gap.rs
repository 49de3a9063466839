//! A page that is refused on its way leaves a mark that stock tools show.

use std::{os::unix::fs::FileExt, sync::Arc};

use anyhow::Result;
use vtrace_common::{ids::Cpu, page::Header, wire::client::Area};
use vtrace_dp::{
    drain::{ledger::Counters, ring::lane::RingLane, sink::FileSink},
    virtq::{
        memory::{Batch, Span},
        testing::{guest_memory, memory_file},
    },
};
use vtrace_tests::judge::trace_cmd;

use super::host::record;

const PAGE: usize = 4096;

/// What a lane makes of pages that come over a ring.
fn drained(pages: &[u8]) -> Result<Vec<u8>> {
    let bytes = u64::try_from(pages.len())?;
    let memory = guest_memory(&[(0, bytes)]);
    let span = Span { gpa: 0, bytes: u32::try_from(bytes)? };
    memory.copy_in(span, pages)?;
    let file = memory_file(0)?;
    let (mut sink, mut batch) = (FileSink::new(file.try_clone()?)?, Batch::new(memory));
    let area = Area { cpu: Cpu(0), offset: 0, bytes_max: bytes, begins_again: false };
    let mut lane = RingLane::new(area, u32::try_from(PAGE)?, Arc::new(Counters::new(Cpu(0))));
    lane.accept(span, &mut batch, &mut sink)?;
    let counts = lane.close(&mut batch, &mut sink, None);
    assert_eq!((counts.ledger.pages_in, counts.ledger.pages_lost), (bytes / 4096, 1));
    let mut written = vec![0; pages.len() - PAGE];
    file.read_exact_at(&mut written, 0)?;
    Ok(written)
}

#[test]
fn refused_page_is_shown_by_stock_report_where_it_is_missing() -> Result<()> {
    let mut recording = record("gap", 4)?;
    let lane = recording.lanes.iter().position(|(_, pages)| pages.len() >= 3 * PAGE).expect("a CPU with three pages");
    let cpu = recording.lanes[lane].0.0;
    let mut pages = recording.lanes[lane].1.clone();
    pages[PAGE + 8..PAGE + 16].copy_from_slice(&u64::MAX.to_le_bytes());
    recording.lanes[lane].1 = drained(&pages)?;
    let written = &recording.lanes[lane].1;
    let missed = written.chunks_exact(PAGE).map(|page| Header::parse(page, PAGE).expect("a sound page").missed);
    assert_eq!(missed.clone().filter(|missed| *missed).count(), 1);
    assert_eq!(missed.enumerate().find(|(_, missed)| *missed).map(|(index, _)| index), Some(1));
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("gap.dat");
    recording.write(&file, &recording.options(), "{}")?;
    let report = trace_cmd(&["report"], &[&file])?;
    let marks: Vec<_> = report.lines().filter(|line| line.contains("EVENTS DROPPED")).collect();
    assert_eq!(marks, [format!("CPU:{cpu} [EVENTS DROPPED]")]);
    Ok(())
}
