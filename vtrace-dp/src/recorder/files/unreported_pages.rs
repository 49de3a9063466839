//! Pages that a lost server wrote after its last ledger, found in the file.
//!
//! In:    a guest's file, the last ledgers
//! Out:   ledgers that count every whole page in the areas
//! Trust: nothing in the pages: only complete pages with times that do not go back are counted

use std::os::unix::fs::FileExt;

use vtrace_common::wire::client::{Area, LaneLedger};

use crate::trace::{restore::uncounted_pages::whole_at, write::Writer};

/// The last ledgers, with the whole pages that follow in each area added.
pub(super) fn count(writer: &Writer, last: &[LaneLedger], page_bytes: u32) -> Vec<LaneLedger> {
    let mut ledgers = Vec::new();
    for area in writer.areas() {
        let known = last.iter().find(|lane| lane.cpu == area.cpu).copied().unwrap_or_default();
        let mut ledger = known.ledger;
        let pages_out = ledger.pages_out + pages_after(writer, area, ledger.pages_out, page_bytes);
        ledger.set_out(pages_out, page_bytes.into());
        ledger.pages_in = ledger.pages_out + ledger.pages_lost;
        ledgers.push(LaneLedger { cpu: area.cpu, ledger, ..known });
    }
    ledgers
}

/// Whole pages in `area` after the first `pages`.
fn pages_after(writer: &Writer, area: &Area, pages: u64, page_bytes: u32) -> u64 {
    let mut page = vec![0; usize::try_from(page_bytes).expect("usize is 64 bits")];
    let mut time_at = |written: u64| {
        writer.file().read_exact_at(&mut page, area.place(written)).ok()?;
        whole_at(&page)
    };
    let bytes = u64::from(page_bytes);
    let begin = pages * bytes;
    // A lane that has wrapped has older pages here. No lane has more pages than its area holds.
    let room = if area.begins_again { area.bytes_max } else { area.room(begin) };
    let mut last_time = begin.checked_sub(bytes).and_then(&mut time_at).unwrap_or(0);
    let mut found = 0;
    while found < room / bytes {
        match time_at(begin + found * bytes) {
            Some(time) if time >= last_time => last_time = time,
            _ => break,
        }
        found += 1;
    }
    found
}
