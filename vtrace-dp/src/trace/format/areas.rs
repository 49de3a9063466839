//! Where the lanes of a file lie while it is being written: what `restore` needs after a crash.
//!
//! In:    the areas a writer reserved, and every step by which it moves pages together
//! Out:   a section of our own ([`id::AREAS`]) at a fixed place in front of everything that is written late, always
//!        rewritten in place; the way back from a file to the places of all pages
//! Runs:  with the writer
//! Full:  the section is written when the file is made, rewriting it needs no new room
//! Trust: a file may come from anyone: what it says is bounded by the file's size
//!
//! It is right after a crash of the program at any moment. After a crash of the machine it is as right as the file
//! system keeps the order of writes.

use vtrace_common::{ids::Cpu, limits::CPUS_MAX};

use super::{
    layout::{SECTION_HEADER_BYTES, id},
    section::SectionHeader,
};
use crate::trace::read::input::{Input, ReadFault, Source};

/// A stretch of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Extent {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
}

impl Extent {
    /// Where it ends.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }
}

/// How far a file has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteState {
    /// Pages are being written: the pages of a lane are somewhere in its area, from its start on.
    Open,
    /// All pages are written and counted, and are being moved together.
    Closed,
    /// The file is complete; its options say the same.
    Finished,
}

/// Where one lane's pages are: first those in `moved`, then those in `rest`. `moved` holds what was moved already, or
/// the older pages of a lane that began again at its area's start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LaneArea {
    /// The lane's CPU.
    pub cpu: Cpu,
    /// The first pages.
    pub moved: Extent,
    /// The other pages, where they were written; of an open file, the whole area.
    pub rest: Extent,
    /// The guest's own times were replaced by the host's ([`crate::trace::write::host_lanes`]).
    pub is_hosted: bool,
}

impl LaneArea {
    /// Of its pages.
    pub fn bytes(&self) -> u64 {
        self.moved.bytes.saturating_add(self.rest.bytes)
    }

    /// Where the first byte of any page is.
    pub fn offset(&self) -> u64 {
        if self.moved.bytes > 0 { self.moved.offset.min(self.rest.offset) } else { self.rest.offset }
    }

    /// Where the last byte of any page ends.
    pub fn end(&self) -> u64 {
        self.moved.end().max(self.rest.end())
    }
}

/// Where all pages of a file are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Areas {
    /// How far the file has come.
    pub state: WriteState,
    /// Bytes of one page.
    pub page_bytes: u32,
    /// The file's size for which `lanes` are right.
    pub file_bytes: u64,
    /// A stretch that is being taken out of the file. It is out when the file is that much shorter than `file_bytes`.
    pub pending: Extent,
    /// Where options that are known before the end are kept ([`crate::trace::write::early_options`]).
    pub early_at: u64,
    /// A lane keeps only its newest bytes, at least so many, and begins again at its area's start when it has reached
    /// the end ([`crate::trace::write::newest_pages`]); 0: it keeps all.
    pub newest_bytes: u64,
    /// One entry a lane.
    pub lanes: Vec<LaneArea>,
}

const VERSION: u32 = 2;
const HEAD_BYTES: u64 = 4 * 4 + 5 * 8;
const LANE_BYTES: u64 = 2 * 4 + 4 * 8;

impl Areas {
    /// Bytes of the section for so many lanes, header included.
    pub fn section_bytes(lanes: usize) -> u64 {
        SECTION_HEADER_BYTES + payload_bytes(lanes)
    }

    /// The section.
    pub fn encode(&self) -> Vec<u8> {
        let count = u32::try_from(self.lanes.len()).expect("lanes are bounded by limits::CPUS_MAX");
        let mut out = SectionHeader::plain(id::AREAS, payload_bytes(self.lanes.len())).encode().to_vec();
        for word in [VERSION, self.state.code(), self.page_bytes, count] {
            out.extend(word.to_le_bytes());
        }
        for word in [self.file_bytes, self.pending.offset, self.pending.bytes, self.early_at, self.newest_bytes] {
            out.extend(word.to_le_bytes());
        }
        for lane in &self.lanes {
            out.extend(lane.cpu.0.to_le_bytes());
            out.extend(u32::from(lane.is_hosted).to_le_bytes());
            for word in [lane.moved.offset, lane.moved.bytes, lane.rest.offset, lane.rest.bytes] {
                out.extend(word.to_le_bytes());
            }
        }
        out
    }

    /// Reads the payload of the section.
    pub fn read<S: Source + ?Sized>(input: &mut Input<'_, S>) -> Result<Self, ReadFault> {
        let offset = input.at();
        let nonsense = || ReadFault::Nonsense { what: "list of areas", offset };
        if input.u32("version of areas")? != VERSION {
            return Err(nonsense());
        }
        let state = WriteState::from_code(input.u32("state of areas")?).ok_or_else(nonsense)?;
        let page_bytes = input.u32("page of areas")?;
        let count = input.u32("number of areas")?;
        if usize::try_from(count).map_or(true, |count| count > CPUS_MAX) {
            return Err(nonsense());
        }
        let file_bytes = input.u64("size of areas")?;
        let pending = read_extent(input)?;
        let (early_at, newest_bytes) = (input.u64("place of early options")?, input.u64("bytes kept of a lane")?);
        let mut lanes = Vec::new();
        for _ in 0..count {
            let cpu = Cpu(input.u32("CPU of an area")?);
            let is_hosted = input.u32("kind of an area")? & 1 != 0;
            lanes.push(LaneArea { cpu, moved: read_extent(input)?, rest: read_extent(input)?, is_hosted });
        }
        Ok(Self { state, page_bytes, file_bytes, pending, early_at, newest_bytes, lanes })
    }

    /// The same for a file of this size: what was pending is out, or it is not.
    pub fn settle(mut self, file_bytes: u64) -> Self {
        let pending = std::mem::take(&mut self.pending);
        if pending.bytes > 0 && self.file_bytes.checked_sub(pending.bytes) == Some(file_bytes) {
            self.take_out(pending);
        }
        self
    }

    /// Says that `hole` is out of the file.
    pub(crate) fn take_out(&mut self, hole: Extent) {
        self.pending = Extent::default();
        self.file_bytes = self.file_bytes.saturating_sub(hole.bytes);
        for extent in self.lanes.iter_mut().flat_map(|lane| [&mut lane.moved, &mut lane.rest]) {
            if extent.offset >= hole.end() {
                extent.offset -= hole.bytes;
            }
        }
    }
}

fn payload_bytes(lanes: usize) -> u64 {
    HEAD_BYTES + LANE_BYTES * u64::try_from(lanes).expect("usize has at most 64 bits")
}

fn read_extent<S: Source + ?Sized>(input: &mut Input<'_, S>) -> Result<Extent, ReadFault> {
    Ok(Extent { offset: input.u64("area")?, bytes: input.u64("area")? })
}

impl WriteState {
    fn code(self) -> u32 {
        match self {
            Self::Open => 0,
            Self::Closed => 1,
            Self::Finished => 2,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        [Self::Open, Self::Closed, Self::Finished].into_iter().find(|state| state.code() == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Areas {
        let lane = |cpu, offset| {
            let rest = Extent { offset, bytes: 10 };
            LaneArea { cpu: Cpu(cpu), moved: Extent::default(), rest, is_hosted: cpu == 3 }
        };
        let pending = Extent { offset: 110, bytes: 90 };
        Areas {
            state: WriteState::Closed,
            page_bytes: 4096,
            file_bytes: 1000,
            pending,
            early_at: 77,
            newest_bytes: 0,
            lanes: vec![lane(0, 100), lane(3, 200)],
        }
    }

    #[test]
    fn section_says_what_was_put_in() {
        let bytes = sample().encode();
        assert_eq!(bytes.len() as u64, Areas::section_bytes(2));
        let payload = &bytes[16..];
        assert_eq!(Areas::read(&mut Input::new(&payload, 0, u64::MAX)).unwrap(), sample());
    }

    #[test]
    fn pending_hole_is_out_when_the_file_is_shorter() {
        let before = sample().settle(1000);
        assert_eq!((before.lanes[1].rest.offset, before.file_bytes), (200, 1000));
        let after = sample().settle(910);
        assert_eq!((after.lanes[0].rest.offset, after.lanes[1].rest.offset, after.file_bytes), (100, 110, 910));
    }

    proptest! {
        #[test]
        fn any_payload_gives_an_answer(bytes: Vec<u8>, file_bytes: u64) {
            let bytes = bytes.as_slice();
            let _ = Areas::read(&mut Input::new(&bytes, 0, u64::MAX)).map(|areas| areas.settle(file_bytes));
        }

        #[test]
        fn payload_with_a_changed_byte_gives_an_answer(at: prop::sample::Index, byte: u8, file_bytes: u64) {
            let mut bytes = sample().encode()[16..].to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let bytes = bytes.as_slice();
            let _ = Areas::read(&mut Input::new(&bytes, 0, u64::MAX)).map(|areas| areas.settle(file_bytes));
        }
    }
}
