//! Whether a client's file and areas can be written to.
//!
//! In:    a `Lanes` request and the descriptors that came with it
//! Out:   nothing, or a [`LanesFault`]
//! Runs:  on the client's thread
//! Trust: nothing: areas may overlap, wrap around or belong to no CPU; the descriptor may be anything

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vtrace_common::{
    ids::Cpu,
    limits::{LANES_MAX, PAGE_BYTES_MAX, PAGE_BYTES_MIN},
    wire::client::Lanes,
};

use crate::{drain::Portless, sys::direct::is_direct};

/// Why pages cannot go there.
#[derive(Debug, thiserror::Error)]
pub(super) enum LanesFault {
    #[error("the descriptor cannot be examined")]
    Examine(#[source] io::Error),
    #[error("the descriptor is not a regular file's")]
    NotRegular,
    #[error("the file is not open for writing")]
    NotWritable,
    #[error("the file is open for appending: pages would not go to their places")]
    Appending,
    #[error("the second descriptor is of another file")]
    OtherFile,
    #[error("the second descriptor does not go past the page cache (O_DIRECT)")]
    NotDirect,
    #[error("{0} bytes is not a valid page size")]
    Page(u32),
    #[error("{0} lanes")]
    Count(usize),
    #[error("{0} has no port: {1}")]
    NoPort(Cpu, Portless),
    #[error("{0} has two areas")]
    Twice(Cpu),
    #[error("the area of {0} does not begin at a multiple of the page, holds no page, or ends beyond every file")]
    Shape(Cpu),
    #[error("the areas of {0} and {1} overlap")]
    Overlap(Cpu, Cpu),
}

/// Refuses what is not a regular file, writable wherever one likes.
pub(super) fn check_file(file: &File) -> Result<(), LanesFault> {
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(|errno| LanesFault::Examine(errno.into()))?;
    let flags = OFlag::from_bits_retain(flags);
    if !file.metadata().map_err(LanesFault::Examine)?.is_file() {
        return Err(LanesFault::NotRegular);
    }
    let access = flags & OFlag::O_ACCMODE;
    if flags.contains(OFlag::O_PATH) || !(access == OFlag::O_WRONLY || access == OFlag::O_RDWR) {
        return Err(LanesFault::NotWritable);
    }
    if flags.contains(OFlag::O_APPEND) { Err(LanesFault::Appending) } else { Ok(()) }
}

/// Refuses what is not another description of `file`, writable and with O_DIRECT.
pub(super) fn check_direct(file: &File, direct: &File) -> Result<(), LanesFault> {
    check_file(direct)?;
    let identity = |file: &File| Ok((file.metadata()?.dev(), file.metadata()?.ino()));
    if identity(file).map_err(LanesFault::Examine)? != identity(direct).map_err(LanesFault::Examine)? {
        return Err(LanesFault::OtherFile);
    }
    let is_direct = is_direct(direct).map_err(|error| LanesFault::Examine(error.into()))?;
    if is_direct { Ok(()) } else { Err(LanesFault::NotDirect) }
}

/// Refuses areas that overlap, are out of place or belong to a CPU without a port.
pub(super) fn check_areas(lanes: &Lanes, has_port: impl Fn(Cpu) -> Result<(), Portless>) -> Result<(), LanesFault> {
    let page = usize::try_from(lanes.page_bytes).unwrap_or(usize::MAX);
    if !(PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&page) || !page.is_power_of_two() {
        return Err(LanesFault::Page(lanes.page_bytes));
    }
    if !(1..=LANES_MAX).contains(&lanes.areas.len()) {
        return Err(LanesFault::Count(lanes.areas.len()));
    }
    let mut areas = lanes.areas.clone();
    areas.sort_by_key(|area| area.cpu);
    if let Some(pair) = areas.windows(2).find(|pair| pair[0].cpu == pair[1].cpu) {
        return Err(LanesFault::Twice(pair[0].cpu));
    }
    let page = u64::from(lanes.page_bytes);
    for area in &areas {
        has_port(area.cpu).map_err(|why| LanesFault::NoPort(area.cpu, why))?;
        let end = area.offset.checked_add(area.bytes_max).and_then(|end| i64::try_from(end).ok());
        let whole = !area.begins_again || area.bytes_max.is_multiple_of(page);
        if !area.offset.is_multiple_of(page) || area.bytes_max < page || !whole || end.is_none() {
            return Err(LanesFault::Shape(area.cpu));
        }
    }
    areas.sort_by_key(|area| area.offset);
    let overlap = areas.windows(2).find(|pair| pair[0].offset + pair[0].bytes_max > pair[1].offset);
    overlap.map_or(Ok(()), |pair| Err(LanesFault::Overlap(pair[0].cpu, pair[1].cpu)))
}

#[cfg(test)]
mod tests {
    use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt};

    use proptest::prelude::*;
    use vtrace_common::wire::client::Area;

    use super::*;

    fn area(cpu: u32, offset: u64, bytes_max: u64) -> Area {
        Area { cpu: Cpu(cpu), offset, bytes_max, begins_again: false }
    }

    fn check(areas: &[Area]) -> Result<(), LanesFault> {
        let few = || Portless::Few { socket: "guest1.sock".into(), ports: 3 };
        let has_port = |cpu: Cpu| if cpu.0 < 2 { Ok(()) } else { Err(few()) };
        check_areas(&Lanes { guest: "guest1".into(), page_bytes: 4096, areas: areas.to_vec() }, has_port)
    }

    #[test]
    fn areas_side_by_side_are_taken_in_any_order() {
        check(&[area(1, 4096, 8192), area(0, 12288, 4096)]).unwrap();
    }

    #[test]
    fn page_that_no_kernel_has_and_area_that_begins_again_within_a_page_are_refused() {
        let check = |page_bytes, area| {
            check_areas(&Lanes { guest: "guest1".into(), page_bytes, areas: vec![area] }, |_| Ok(()))
        };
        for page_bytes in [0, 1, 2048, 5000, 12288, 1 << 20, u32::MAX] {
            assert!(matches!(check(page_bytes, area(0, 0, 1 << 30)), Err(LanesFault::Page(_))), "{page_bytes}");
        }
        check(65536, area(0, 0, 3 << 15)).unwrap();
        let again = Area { begins_again: true, ..area(0, 0, 3 << 15) };
        assert!(matches!(check(65536, again), Err(LanesFault::Shape(Cpu(0)))));
    }

    #[test]
    fn areas_that_overlap_are_refused() {
        assert!(matches!(check(&[area(0, 0, 8192), area(1, 4096, 4096)]), Err(LanesFault::Overlap(Cpu(0), Cpu(1)))));
    }

    #[test]
    fn areas_out_of_place_are_refused() {
        for (offset, bytes) in [(1, 4096), (4096, 0), (4096, 4095), (u64::MAX - 4095, 4096), (1 << 62, 1 << 62)] {
            assert!(matches!(check(&[area(0, offset, bytes)]), Err(LanesFault::Shape(Cpu(0)))), "{offset} {bytes}");
        }
    }

    #[test]
    fn cpu_without_a_port_and_cpu_with_two_areas_are_refused() {
        assert!(matches!(check(&[area(2, 0, 4096)]), Err(LanesFault::NoPort(Cpu(2), _))));
        assert!(matches!(check(&[area(0, 0, 4096), area(0, 8192, 4096)]), Err(LanesFault::Twice(Cpu(0)))));
        assert!(matches!(check(&[]), Err(LanesFault::Count(0))));
    }

    #[test]
    fn only_a_regular_file_open_for_writing_anywhere_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.dat");
        check_file(&File::create(&path).unwrap()).unwrap();
        assert!(matches!(check_file(&File::open(&path).unwrap()), Err(LanesFault::NotWritable)));
        let appending = OpenOptions::new().append(true).open(&path).unwrap();
        assert!(matches!(check_file(&appending), Err(LanesFault::Appending)));
        let null = OpenOptions::new().write(true).open("/dev/null").unwrap();
        assert!(matches!(check_file(&null), Err(LanesFault::NotRegular)));
    }

    #[test]
    fn second_descriptor_is_of_the_same_file_writable_and_direct() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (path, other) = (folder.path().join("trace.dat"), folder.path().join("other.dat"));
        let (file, another) = (File::create(&path).unwrap(), File::create(&other).unwrap());
        assert!(matches!(check_direct(&file, &another), Err(LanesFault::OtherFile)));
        assert!(matches!(check_direct(&file, &file), Err(LanesFault::NotDirect)));
        let Ok(direct) = crate::sys::direct::reopen(&file) else {
            return println!("skipped: no O_DIRECT in the source folder");
        };
        check_direct(&file, &direct).unwrap();
        assert!(matches!(check_direct(&another, &direct), Err(LanesFault::OtherFile)));
        let reading = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
        assert!(matches!(check_direct(&file, &reading), Err(LanesFault::NotWritable)));
    }

    proptest! {
        #[test]
        fn any_areas_that_are_taken_are_disjoint(
            areas in proptest::collection::vec((0u32..4, 0u64..64, 0u64..16), 0..6),
        ) {
            let areas: Vec<_> = areas.into_iter().map(|(cpu, at, long)| area(cpu, at * 2048, long * 2048)).collect();
            if check(&areas).is_ok() {
                for (at, one) in areas.iter().enumerate() {
                    for other in &areas[at + 1..] {
                        prop_assert!(one.offset + one.bytes_max <= other.offset || other.offset + other.bytes_max <= one.offset);
                    }
                }
            }
        }
    }
}
