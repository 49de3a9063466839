//! What makes frames and pages of a stream's bytes, without a guest: for fuzz targets.
//!
//! In:    bytes as they come
//! Out:   frames; pages in a file
//! Runs:  on the caller's thread
//! Full:  as [`Cutter`] and [`StreamLane`] have it
//! Trust: nothing

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use vtrace_common::wire::client::{Area, LaneLedger};

use super::cutter::Cutter;
use crate::drain::{ledger::Counters, stream::lane::StreamLane};

/// Whole frames out of a stream that comes in `pieces`; of each whether it says that it is a hello.
pub fn cut(pieces: &[&[u8]]) -> Vec<(bool, Vec<u8>)> {
    let (mut cutter, mut found) = (Cutter::default(), Vec::new());
    for piece in pieces {
        cutter.push(piece);
        found.extend(std::iter::from_fn(|| cutter.next_piece()).map(|piece| (piece.is_hello, piece.bytes)));
    }
    found
}

/// A lane that gets `pieces` of a stream and then is closed, as the worker does it, but for splice(2).
pub fn land(pieces: &[&[u8]], file: &File, area: Area, page_bytes: u32) -> LaneLedger {
    let counters = Arc::new(Counters::new(area.cpu));
    let mut lane = StreamLane::new(area, page_bytes, Arc::clone(&counters));
    for mut piece in pieces.iter().copied() {
        while !piece.is_empty() {
            let room = usize::try_from(lane.room()).map_or(piece.len(), |room| room.min(piece.len()));
            let (now, later) = piece.split_at(room);
            match file.write_all_at(now, lane.offset()) {
                _ if now.is_empty() => {
                    lane.refused(counted(later));
                    break;
                }
                Ok(()) => lane.landed(counted(now), file),
                Err(error) => lane.fail(&error),
            }
            piece = later;
        }
    }
    lane.close(file, None);
    counters.read()
}

fn counted(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("a count of bytes")
}
