//! The events of many lanes, by time.
//!
//! In:    lanes of a file, and how their stamps become times
//! Out:   events one by one; where events were lost in front of one
//! Runs:  on the caller's thread; one page (of a compressed lane: one chunk) of each lane is held
//! Trust: nothing; a lane whose times step back is put where its next event says, and the others go on
//!
//! Events of one lane keep their order. Of events of one time those of the lane that was given first come first.

use std::{cmp::Reverse, collections::BinaryHeap, ops::Range};

use vtrace_common::ids::Cpu;

use super::{Buffer, LanePages, Reader, WalkFault, input::Source, times::FileClock};
use crate::ftrace::events::{PageFault, Walk};

/// Lanes being read together.
#[derive(Debug)]
pub struct Merge<'a, S> {
    lanes: Vec<LaneCursor<'a, S>>,
    /// Next event of each lane that has one: its time, its lane.
    next: BinaryHeap<Reverse<(u64, usize)>>,
    /// The lane whose event was given away last: its next one is looked for when it is asked for.
    taken: Option<usize>,
}

/// An event and where it is from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Merged<'m> {
    /// Its CPU.
    pub cpu: Cpu,
    /// When, as a stock reader shows it.
    pub time: u64,
    /// What: begins with the event's id (u16).
    pub data: &'m [u8],
    /// Set if events of this CPU were lost before this one: the time of the last event before them, 0 without one.
    pub lost_since: Option<u64>,
}

#[derive(Debug)]
struct LaneCursor<'a, S> {
    cpu: Cpu,
    stamps: FileClock,
    pages: LanePages<'a, S>,
    page: Vec<u8>,
    page_at: u64,
    walk: Option<Walk>,
    /// The event that is next.
    time: u64,
    range: Range<usize>,
    lost_since: Option<u64>,
}

impl<'a, S: Source> Merge<'a, S> {
    /// All lanes of these instances.
    ///
    /// # Errors
    /// The first page of a lane cannot be read or is broken.
    pub fn new(reader: &'a Reader<S>, buffers: &[(&Buffer, FileClock)]) -> Result<Self, WalkFault> {
        let lanes = buffers.iter().flat_map(|(buffer, stamps)| {
            buffer.lanes.iter().map(move |lane| (lane.cpu, stamps.clone(), reader.pages(buffer, lane)))
        });
        Self::from_pages(lanes)
    }

    /// These lanes: of each its CPU, how its stamps become times, and its pages.
    ///
    /// # Errors
    /// The first page of a lane cannot be read or is broken.
    pub fn from_pages(lanes: impl IntoIterator<Item = (Cpu, FileClock, LanePages<'a, S>)>) -> Result<Self, WalkFault> {
        let mut merge = Self { lanes: Vec::new(), next: BinaryHeap::new(), taken: None };
        for (cpu, stamps, pages) in lanes {
            let (page, page_at, walk, range) = (Vec::new(), 0, None, 0..0);
            merge.lanes.push(LaneCursor { cpu, stamps, pages, page, page_at, walk, time: 0, range, lost_since: None });
            merge.advance(merge.lanes.len() - 1)?;
        }
        Ok(merge)
    }

    fn advance(&mut self, index: usize) -> Result<(), WalkFault> {
        if self.lanes[index].step()? {
            self.next.push(Reverse((self.lanes[index].time, index)));
        }
        Ok(())
    }

    /// The next event of all.
    ///
    /// # Errors
    /// A page cannot be read or is broken. Its lane has no more events then; the others have.
    pub fn next_event(&mut self) -> Result<Option<Merged<'_>>, WalkFault> {
        if let Some(taken) = self.taken.take() {
            self.advance(taken)?;
        }
        let Some(Reverse((time, index))) = self.next.pop() else { return Ok(None) };
        self.taken = Some(index);
        let lane = &self.lanes[index];
        let (cpu, data) = (lane.cpu, &lane.page[lane.range.clone()]);
        Ok(Some(Merged { cpu, time, data, lost_since: lane.lost_since }))
    }
}

impl<S: Source> LaneCursor<'_, S> {
    /// Finds the next event; false at the end.
    fn step(&mut self) -> Result<bool, WalkFault> {
        self.lost_since = None;
        let last = self.time;
        loop {
            let offset = self.page_at;
            let broken = |source: PageFault| WalkFault::Page { offset, source };
            match self.walk.as_mut().and_then(|walk| walk.next(&self.page)) {
                Some(event) => {
                    let (raw, range) = event.map_err(broken)?;
                    (self.time, self.range) = (self.stamps.shown(self.cpu, raw), range);
                    return Ok(true);
                }
                None if !self.turn()? => return Ok(false),
                None => {
                    let missed = self.walk.as_ref().is_some_and(|walk| walk.header().missed);
                    if missed && self.lost_since.is_none() {
                        self.lost_since = Some(last);
                    }
                }
            }
        }
    }

    /// Turns to the next page; false at the end.
    fn turn(&mut self) -> Result<bool, WalkFault> {
        self.walk = None;
        let Some(page) = self.pages.next() else { return Ok(false) };
        (self.page_at, self.page) = page?;
        let walk = Walk::new(&self.page).map_err(|source| WalkFault::Page { offset: self.page_at, source })?;
        self.walk = Some(walk);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileExt};

    use proptest::prelude::*;

    use super::*;
    use crate::{ftrace::metadata::Metadata, trace::write::Writer};

    /// A page with events of four bytes at these times; the first of its numbers says whether some were lost before.
    fn page(times: &[u64], lost: bool) -> Vec<u8> {
        let commit = (8 * times.len() as u64) | if lost { 1 << 31 } else { 0 };
        let mut page = [times[0].to_le_bytes(), commit.to_le_bytes()].concat();
        let mut last = times[0];
        for time in times {
            let delta = u32::try_from(time - last).unwrap();
            page.extend([(1 | delta << 5).to_le_bytes(), u32::try_from(*time).unwrap().to_le_bytes()].concat());
            last = *time;
        }
        page.resize(4096, 0);
        page
    }

    fn file(lanes: &[(Cpu, Vec<u8>)]) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.dat");
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        let cpus: Vec<Cpu> = lanes.iter().map(|(cpu, _)| *cpu).collect();
        let writer = Writer::create(file, &Metadata::default(), "local", 4096, &cpus).unwrap();
        for (area, (_, pages)) in writer.areas().iter().zip(lanes) {
            writer.file().write_all_at(pages, area.offset).unwrap();
        }
        let filled: Vec<_> = lanes.iter().map(|(cpu, pages)| (*cpu, pages.len() as u64)).collect();
        writer.finish(&filled, b"", &[], "").unwrap();
        fs::read(path).unwrap()
    }

    type Seen = (u32, u64, Option<u64>);

    fn merged(bytes: &[u8]) -> Vec<Seen> {
        let reader = Reader::open(bytes).unwrap();
        let mut merge = Merge::new(&reader, &[(reader.top().unwrap(), FileClock::default())]).unwrap();
        let mut seen = Vec::new();
        while let Some(event) = merge.next_event().unwrap() {
            assert_eq!(u64::from(u32::from_le_bytes(event.data.try_into().unwrap())), event.time);
            seen.push((event.cpu.0, event.time, event.lost_since));
        }
        seen
    }

    #[test]
    fn events_of_two_lanes_come_by_time_with_their_losses() {
        let lanes =
            [(Cpu(0), [page(&[5, 9], false), page(&[20, 21], true)].concat()), (Cpu(2), page(&[7, 20, 30], true))];
        let expected = [
            (0, 5, None),
            (2, 7, Some(0)),
            (0, 9, None),
            (0, 20, Some(9)),
            (2, 20, None),
            (0, 21, None),
            (2, 30, None),
        ];
        assert_eq!(merged(&file(&lanes)), expected);
    }

    #[test]
    fn broken_page_is_an_error_and_the_other_lane_goes_on() {
        let mut broken = page(&[5], false);
        broken[16..20].copy_from_slice(&2u32.to_le_bytes());
        let bytes = file(&[(Cpu(0), [page(&[1], false), broken].concat()), (Cpu(1), page(&[8], false))]);
        let reader = Reader::open(bytes.as_slice()).unwrap();
        let mut merge = Merge::new(&reader, &[(reader.top().unwrap(), FileClock::default())]).unwrap();
        assert_eq!(merge.next_event().unwrap().map(|event| event.time), Some(1));
        assert!(merge.next_event().is_err());
        assert_eq!(merge.next_event().unwrap().map(|event| event.time), Some(8));
        assert_eq!(merge.next_event().unwrap(), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn sorted_lanes_become_one_sorted_stream(
            lanes in prop::collection::vec(prop::collection::vec(0..1000u64, 1..40), 1..5),
        ) {
            let mut expected = Vec::new();
            let lanes: Vec<_> = (0..).zip(lanes).map(|(cpu, mut times)| {
                times.sort_unstable();
                expected.extend(times.iter().map(|time| (*time, cpu)));
                (Cpu(cpu), times.chunks(7).flat_map(|times| page(times, false)).collect::<Vec<_>>())
            }).collect();
            expected.sort_unstable();
            let seen: Vec<_> = merged(&file(&lanes)).iter().map(|(cpu, time, _)| (*time, *cpu)).collect();
            prop_assert_eq!(seen, expected);
        }
    }
}
