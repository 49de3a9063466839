//! Gives the lanes of a file the host's times, one lane after the other, so that a kill at any moment loses nothing.
//!
//! In:    a closed file with the guest's own times; the guest's clock
//! Out:   the same lanes with the host's times, each at another place in the file; the areas say which and where
//! Runs:  on the writer's thread, after the last page is written; or in `restore`, which resumes after a kill
//! Full:  needs space for a second copy of the largest lane; a lane that does not fit stays as it is, and is reported
//! Trust: the file is ours and nothing else writes to it
//!
//! Order, for each lane: its pages are rewritten to free space ([`super::host_times`]) ─► the areas record the new
//! place and that the lane has host times ─► the old place is freed. A kill before the second step leaves the guest's
//! own pages intact: `restore` starts this lane again, and the partial copy belongs to no lane. The clock needed for
//! the conversion is in the file before the first lane is touched
//! ([`crate::trace::format::segments::Shown::Pending`]).
//!
//! The last lane goes first: a lane that outgrows its area pushes the lanes after it up, so lanes stay in order.

use std::fs::File;

use vtrace_common::ids::Cpu;

use super::{
    collapse::punch,
    frame::WriteFault,
    host_times::{RewriteFault, Rewritten, rewrite, room_bytes},
};
use crate::{
    clock::table::Table,
    trace::format::{
        areas::{Areas, Extent, LaneArea},
        uncertainty::{UNCERTAINTIES_MAX, Uncertainty},
    },
};

/// The closing note of a file that was killed meanwhile, until it is restored.
pub(crate) const PENDING_NOTE: &str = "{\"pending\":\"host times\"}";

/// Why a lane keeps the guest's own times.
#[derive(Debug, thiserror::Error)]
pub enum HostingFault {
    /// Its pages could not be rewritten.
    #[error(transparent)]
    Rewrite(#[from] RewriteFault),
    /// Its new place could not be recorded in the areas.
    #[error(transparent)]
    Write(#[from] WriteFault),
}

/// What was done.
#[derive(Debug)]
pub struct Hosted {
    /// The lanes that have host times now.
    pub lanes: Vec<(Cpu, Rewritten)>,
    /// Which of their times are not exact.
    pub uncertainties: Vec<Uncertainty>,
    /// Why the other lanes have not.
    pub fault: Option<HostingFault>,
}

/// Gives host times to every lane that does not have them yet. `save` puts the areas into the file.
pub(crate) fn host_lanes(
    file: &File,
    areas: &mut Areas,
    unit: u64,
    table: &Table,
    save: &mut dyn FnMut(&Areas) -> Result<(), WriteFault>,
) -> Hosted {
    let mut hosted = Hosted { lanes: Vec::new(), uncertainties: Vec::new(), fault: None };
    for index in (0..areas.lanes.len()).rev() {
        let lane = areas.lanes[index];
        let Some(way) = table.lane(lane.cpu).filter(|_| !lane.is_hosted && lane.bytes() > 0) else { continue };
        let to = place(areas, index, unit);
        match rewrite(file, [lane.moved, lane.rest], to, areas.page_bytes, way) {
            Ok((done, uncertainties)) => {
                let rest = Extent { offset: to, bytes: done.bytes };
                areas.lanes[index] = LaneArea { moved: Extent::default(), rest, is_hosted: true, ..lane };
                hosted.lanes.push((lane.cpu, done));
                let room = UNCERTAINTIES_MAX - hosted.uncertainties.len();
                hosted.uncertainties.extend(uncertainties.into_iter().take(room));
            }
            Err(fault) => {
                // The rest of the file may need this space; best effort.
                let _ = punch(file, Extent { offset: to, bytes: room_bytes(lane.bytes(), areas.page_bytes) });
                hosted.fault = Some(fault.into());
                return hosted;
            }
        }
        areas.file_bytes = areas.file_bytes.max(areas.lanes[index].rest.end());
        if let Err(fault) = save(areas) {
            hosted.fault = Some(fault.into());
            return hosted;
        }
        // A part that cannot be punched is removed later, with the hole that contains it.
        for part in [lane.moved, lane.rest].into_iter().filter(|part| part.bytes > 0) {
            let _ = punch(file, Extent { bytes: part.bytes.next_multiple_of(unit), ..part });
        }
    }
    hosted
}

/// Where a lane's rewritten pages go: directly after its current ones, if that works for every lane up to this one;
/// else far enough after them to leave room for the preceding lanes.
fn place(areas: &Areas, index: usize, unit: u64) -> u64 {
    let after = |at: usize| areas.lanes[at].end().next_multiple_of(unit);
    let room = |at: usize| match areas.lanes[at].is_hosted {
        true => 0,
        false => room_bytes(areas.lanes[at].bytes(), areas.page_bytes).next_multiple_of(unit),
    };
    let fits = |at: usize| areas.lanes.get(at + 1).is_none_or(|next| after(at) + room(at) <= next.offset());
    let pushed: u64 = if (0..=index).all(fits) { 0 } else { (0..index).map(room).sum() };
    after(index) + pushed
}

#[cfg(test)]
mod tests;
