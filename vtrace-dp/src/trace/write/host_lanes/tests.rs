//! Files that are left at any step, and what `restore` makes of them.

use std::os::unix::fs::FileExt;

use super::*;
use crate::{
    clock::{
        math::Pair,
        ratio::{Isa, Ratio},
        testing::{Change, Life, Story},
    },
    ftrace::metadata::Metadata,
    trace::{
        format::{option::TraceOption, segments::Shown},
        read::{Reader, input::FileSource},
        restore::{Was, restore},
        write::{Bounds, Writer},
    },
};
use vtrace_common::time::HostTsc;

const CPUS: [Cpu; 3] = [Cpu(0), Cpu(1), Cpu(5)];

fn life(cpu: Cpu) -> Life {
    let raw = (1u64 << 47).try_into().unwrap();
    let slower = Pair { offset: 5_000_000, ratio: Some(Ratio { raw, fraction_bits: 48 }) };
    let changes = [9_000_000, 0, 700].map(|offset| Change { after: 11_000_000, pair: Pair { offset, ratio: None } });
    let changes = [&changes[..], &[Change { after: 1, pair: slower }]].concat();
    Life { cpu, ..Life::new(u64::from(cpu.0) * 7919 + 77, changes) }
}

/// A file with the guests' pages, and what is known of their clocks.
struct Recorded {
    file: File,
    writer: Writer,
    filled: Vec<(Cpu, u64)>,
    table: Table,
}

fn recorded(bounds: Bounds) -> Recorded {
    let stories: Vec<Story> = CPUS.iter().map(|cpu| life(*cpu).live(|at| at.0.to_le_bytes().to_vec())).collect();
    let seen = stories.iter().flat_map(|story| story.seen.iter().copied());
    let mut table = Table::build(HostTsc(life(CPUS[0]).since), Isa::Vmx, seen, &CPUS).unwrap();
    CPUS.iter().zip(&stories).for_each(|(cpu, story)| table.learn(*cpu, story.runs.clone()));
    let file = tempfile::tempfile().unwrap();
    let metadata = Metadata { header_page: b"page".to_vec(), ..Metadata::default() };
    let again = file.try_clone().unwrap();
    let writer = Writer::create_bounded(again, &metadata, "x86-tsc", 4096, &CPUS, bounds).unwrap();
    let mut filled = Vec::new();
    for (area, story) in writer.areas().iter().zip(&stories) {
        file.write_all_at(&story.pages, area.offset).unwrap();
        filled.push((area.cpu, story.pages.len() as u64));
    }
    Recorded { file, writer, filled, table }
}

fn options() -> Vec<TraceOption> {
    vec![TraceOption::TraceId(7), TraceOption::TraceClock("local [x86-tsc]".into())]
}

/// The pages of all lanes, and what their times are said to be.
fn contents(file: &File) -> (Vec<Vec<Vec<u8>>>, Option<Shown>) {
    let reader = Reader::open(FileSource::new(file.try_clone().unwrap()).unwrap()).unwrap();
    let top = reader.top().unwrap();
    let pages = |lane| reader.pages(top, lane).map(|page| page.unwrap().1).collect();
    (top.lanes.iter().map(pages).collect(), reader.segments().unwrap().map(|segments| segments.shown))
}

fn undisturbed() -> Vec<Vec<Vec<u8>>> {
    let Recorded { file, mut writer, mut filled, table } = recorded(Bounds::default());
    let hosted = writer.host_times(&mut filled, &table, b"", &options()).unwrap();
    assert_eq!((hosted.lanes.len(), hosted.fault.is_none()), (CPUS.len(), true));
    writer.finish(&filled, b"", &options(), "{}").unwrap();
    contents(&file).0
}

/// Lays the pages of every lane as they lie when it has begun again at its area's start: the older ones up to the end.
fn begin_again(file: &File, writer: &Writer, areas: &mut Areas) {
    for (lane, area) in areas.lanes.iter_mut().zip(writer.areas()) {
        let mut pages = vec![0; usize::try_from(lane.rest.bytes).unwrap()];
        file.read_exact_at(&mut pages, lane.rest.offset).unwrap();
        let (older, newer) = pages.split_at(pages.len() / 4096 / 3 * 4096);
        lane.moved = Extent { offset: area.offset + area.bytes_max - older.len() as u64, bytes: older.len() as u64 };
        lane.rest = Extent { offset: area.offset, bytes: newer.len() as u64 };
        file.write_all_at(older, lane.moved.offset).unwrap();
        file.write_all_at(newer, lane.rest.offset).unwrap();
    }
}

/// Leaves the file when the areas were to be written for the `steps`th time.
fn left_after(steps: usize, recorded: &Recorded, in_parts: bool) -> Areas {
    let Recorded { file, writer, filled, table } = recorded;
    let mut areas = writer.begin_hosting(filled, table, b"", &options()).unwrap();
    let mut left = steps;
    let areas_at = find(file, &areas.encode());
    if in_parts {
        begin_again(file, writer, &mut areas);
        file.write_all_at(&areas.encode(), areas_at).unwrap();
    }
    let mut save = |areas: &Areas| {
        left = left.checked_sub(1).ok_or(WriteFault::PageSize(0))?;
        file.write_all_at(&areas.encode(), areas_at).unwrap();
        Ok(())
    };
    let hosted = host_lanes(file, &mut areas, 4096, table, &mut save);
    assert_eq!(hosted.fault.is_some(), steps < CPUS.len());
    areas
}

fn find(file: &File, wanted: &[u8]) -> u64 {
    let mut front = vec![0; 1 << 20];
    file.read_exact_at(&mut front, 0).unwrap();
    front.windows(wanted.len()).position(|window| window == wanted).unwrap() as u64
}

#[test]
fn file_that_is_left_at_any_step_is_restored_to_what_it_would_have_been() {
    let expected = undisturbed();
    let narrow = Bounds { lane_bytes_max: Some(1), newest_bytes: None };
    for (bounds, in_parts) in [(Bounds::default(), false), (narrow, false), (Bounds::default(), true), (narrow, true)] {
        for steps in 0..=CPUS.len() {
            let recorded = recorded(bounds);
            left_after(steps, &recorded, in_parts);
            let Recorded { file, writer, .. } = recorded;
            drop(writer);
            let restored = restore(file.try_clone().unwrap()).unwrap();
            assert_eq!((restored.was, restored.converted == 0), (Was::Closed, steps == CPUS.len()), "{steps} steps");
            let (pages, shown) = contents(&file);
            assert_eq!(shown, Some(Shown::Rewritten));
            assert!(pages == expected, "{steps} steps");
            assert_eq!(restore(file.try_clone().unwrap()).unwrap().was, Was::Finished);
        }
    }
}

#[test]
fn lane_that_does_not_fit_its_area_pushes_those_after_it_up() {
    let unit = 4096;
    let lane = |cpu, offset, pages| crate::trace::format::areas::LaneArea {
        cpu: Cpu(cpu),
        rest: Extent { offset, bytes: pages * unit },
        ..Default::default()
    };
    let mut areas = Areas {
        state: crate::trace::format::areas::WriteState::Closed,
        page_bytes: 4096,
        file_bytes: 0,
        pending: Extent::default(),
        early_at: 0,
        newest_bytes: 0,
        lanes: vec![lane(0, 0, 10), lane(1, 1 << 30, 1 << 18), lane(2, 2 << 30, 3)],
    };
    let mut end = u64::MAX;
    for index in [2, 1, 0] {
        let to = place(&areas, index, unit);
        let lane = &mut areas.lanes[index];
        let room = room_bytes(lane.rest.bytes, 4096);
        assert!(to >= lane.rest.end() && to + room <= end, "{index} at {to:#x}");
        (lane.rest, lane.is_hosted, end) = (Extent { offset: to, bytes: room }, true, to);
    }
    let near = place(&Areas { lanes: vec![lane(0, 0, 10), lane(1, 1 << 30, 10)], ..areas }, 1, unit);
    assert_eq!(near, (1 << 30) + 10 * unit, "where all fit, none is pushed");
}
