//! What stock tools show of guests whose clocks are shifted, step, are scaled or go back: host times, event by event.
//!
//! Pages are made as a kernel's ring buffer makes them ([`vtrace_dp::ftrace::testing`]); every event carries the host time at
//! which it happened.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vtrace_common::{
    ids::Cpu,
    time::{GuestTsc, HostTsc},
};
use vtrace_dp::{
    clock::{
        exact_shift::{Shape, shape},
        math::Pair,
        ratio::{Isa, Ratio},
        table::{Certainty, Conversion, Table},
        testing::{Change, Life, Story},
    },
    ftrace::{events::Events, metadata::Metadata},
    trace::{
        format::{
            option::TraceOption,
            segments::{Segments, Shown},
        },
        read::{Reader, input::FileSource},
        write::{Bounds, Writer, host_times::Rewritten},
    },
};
use vtrace_tests::judge::{lines, shark_entries, trace_cmd, trace_cmd_newest};

const LANES: [Cpu; 2] = [Cpu(0), Cpu(2)];
const MULT: u32 = 5_592_405;
const SHIFT: u32 = 24;
const PAGE_BYTES: u32 = 4096;
const EVENT_ID: u16 = 900;

const HEADER_PAGE: &str = "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n\tfield: char data;\toffset:16;\tsize:4080;\tsigned:1;\n";
const HEADER_EVENT: &str = "# compressed entry header\n\ttype_len    :    5 bits\n\ttime_delta  :   27 bits\n\tarray       :   32 bits\n\n\tpadding     : type == 29\n\ttime_extend : type == 30\n\ttime_stamp : type == 31\n\tdata max type_len  == 28\n";
const FORMAT: &str = "name: truth\nID: 900\nformat:\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;\n\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;\n\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\tfield:u64 host;\toffset:8;\tsize:8;\tsigned:0;\n\nprint fmt: \"host=%llu\", REC->host\n";

/// One guest with two lanes, in a file.
struct Guest {
    table: Table,
    stories: Vec<Story>,
    shape: Shape,
    rewritten: Vec<Rewritten>,
}

fn payload(at: HostTsc) -> Vec<u8> {
    let mut event = [EVENT_ID.to_le_bytes().as_slice(), &[0, 0], &7i32.to_le_bytes(), &at.0.to_le_bytes()].concat();
    event.resize(event.len() + usize::try_from(at.0 % 5).expect("small") * 8, 0);
    event
}

fn offset(offset: i64) -> Pair {
    Pair { offset: offset.cast_unsigned(), ratio: None }
}

fn scaled(offset: i64, thousandths: u64) -> Pair {
    let raw = u64::try_from((1u128 << 48) * u128::from(thousandths) / 1000).expect("small");
    let raw = raw.try_into().expect("not zero");
    Pair { offset: offset.cast_unsigned(), ratio: Some(Ratio { raw, fraction_bits: 48 }) }
}

fn metadata() -> Metadata {
    Metadata {
        header_page: HEADER_PAGE.into(),
        header_event: HEADER_EVENT.into(),
        event_formats: [("vtrace".to_owned(), vec![FORMAT.into()])].into(),
        ..Metadata::default()
    }
}

/// A guest's file when its last page has come, and all that is known of its clock.
struct Recorded {
    writer: Writer,
    filled: Vec<(Cpu, u64)>,
    table: Table,
    stories: Vec<Story>,
}

const CMDLINES: &[u8] = b"7 guest\n";

/// Segments of all vCPUs.
fn segments(table: &Table) -> usize {
    table.histories().map(|history| history.segments().len()).sum()
}

fn options() -> Vec<TraceOption> {
    vec![
        TraceOption::TraceClock("local [x86-tsc]".to_owned()),
        TraceOption::Tsc2Nsec { mult: MULT, shift: SHIFT },
        TraceOption::TraceId(0x2222),
    ]
}

/// What the guest did on both CPUs, and what is known of its clock. `gap_max`: cycles between two events at most; `rest`:
/// of the host after the last change.
fn live(pairs: &[Pair], gap_max: u64, rest: u64) -> Result<(Table, Vec<Story>)> {
    let lives = LANES.map(|cpu| {
        let changes = pairs.iter().map(|pair| Change { after: 17_000_000, pair: *pair }).collect();
        let mut life = Life { cpu, rest: 500_000_000, ..Life::new(u64::from(cpu.0) * 7919 + 3, changes) };
        // Long silences too: a slower guest's short deltas become long ones.
        (life.gap_max, life.pause_max, life.run_max) = (gap_max, 90_000, 200_000);
        life.rest = rest;
        life
    });
    let stories: Vec<Story> = lives.iter().map(|life| life.live(payload)).collect();
    let seen = stories.iter().flat_map(|story| story.seen.iter().copied());
    let mut table = Table::build(HostTsc(lives[0].since), Isa::Vmx, seen, &LANES)?;
    LANES.iter().zip(&stories).for_each(|(cpu, story)| table.learn(*cpu, story.runs.clone()));
    Ok((table, stories))
}

/// Writes the guest's pages as a recording would.
fn record(path: &Path, pairs: &[Pair], gap_max: u64, rest: u64) -> Result<Recorded> {
    let (table, stories) = live(pairs, gap_max, rest)?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    let writer = Writer::create(file, &metadata(), "local [x86-tsc]", PAGE_BYTES, &LANES)?;
    let mut filled = Vec::new();
    for (area, story) in writer.areas().iter().zip(&stories) {
        writer.file().write_all_at(&story.pages, area.offset)?;
        filled.push((area.cpu, u64::try_from(story.pages.len())?));
    }
    Ok(Recorded { writer, filled, table, stories })
}

/// Writes the guest's file as a recording would: pages first, then whatever its clock needs.
fn write(path: &Path, pairs: &[Pair]) -> Result<Guest> {
    write_as(path, pairs, false)
}

/// The same; `is_raw`: the guest's own times are asked for.
fn write_as(path: &Path, pairs: &[Pair], is_raw: bool) -> Result<Guest> {
    let Recorded { mut writer, mut filled, table, stories } = record(path, pairs, 250_000_000, 30_000_000_000 / 8)?;
    let mut options = options();
    let shape = shape(&table, &LANES, 0x1111);
    let (mut rewritten, mut uncertainties) = (Vec::new(), Vec::new());
    let shown = match &shape {
        _ if is_raw => Shown::Raw,
        Shape::Shift(shift) => {
            options.push(TraceOption::TimeShift(shift.clone()));
            Shown::Shifted
        }
        Shape::Rewrite => {
            let hosted = writer.host_times(&mut filled, &table, CMDLINES, &options)?;
            hosted.fault.map_or(Ok(()), Err)?;
            uncertainties = hosted.uncertainties;
            rewritten.extend(hosted.lanes.into_iter().map(|(_, done)| done));
            Shown::Rewritten
        }
    };
    options.push(TraceOption::Segments(Segments { shown, table: table.clone(), uncertainties }));
    writer.finish(&filled, CMDLINES, &options, "{}")?;
    Ok(Guest { table, stories, shape, rewritten })
}

impl Guest {
    /// What `clock` computes of the guest's own pages, beside what is true: CPU, conversion, truth.
    fn converted(&self) -> Vec<(Cpu, Conversion, HostTsc)> {
        let mut all = Vec::new();
        for (cpu, story) in LANES.iter().zip(&self.stories) {
            let mut lane = self.table.lane(*cpu).expect("a lane that is known");
            let pages: Vec<&[u8]> = story.pages.chunks(4096).collect();
            let begin = |page: &&[u8]| GuestTsc(Events::new(page).expect("a page").header().time);
            lane.look_ahead((0..).zip(pages.iter().map(begin)).collect::<Vec<_>>().into_iter().rev());
            let (mut out, mut truth) = (Vec::new(), story.truth.iter());
            for (number, page) in pages.iter().enumerate() {
                let events = Events::new(page).expect("a page").map(|event| event.expect("an event"));
                let times: Vec<_> = events.map(|event| (GuestTsc(event.time), event.stamp)).collect();
                let next = pages.get(number + 1).map(|next| GuestTsc(Events::new(next).expect("a page").header().time));
                lane.page(&times, next, &mut out);
                all.extend(out.iter().map(|one| (*cpu, *one, *truth.next().expect("an event each"))));
            }
        }
        all
    }
}

/// As stock readers compute it: half by half (`mul_u64_u32_shr()`).
fn ns(tsc: HostTsc) -> u64 {
    let (high, low) = (tsc.0 >> 32, tsc.0 & u64::from(u32::MAX));
    let mult = u64::from(MULT);
    ((low * mult) >> SHIFT) + ((high * mult) << (32 - SHIFT))
}

/// Both readers of files, and KernelShark's: CPU, nanoseconds, and the true host time where it is shown.
fn judge(path: &Path, guest: &Guest, what: &str) -> Result<()> {
    let mut expected: Vec<(Cpu, u64, u64)> =
        guest.converted().iter().map(|(cpu, one, truth)| (*cpu, ns(one.at), truth.0)).collect();
    expected.sort_unstable();
    for (name, report) in
        [("3.1.6", trace_cmd(&["report", "-t"], &[path])?), ("forky", trace_cmd_newest(&["report", "-t"], &[path])?)]
    {
        let truth = |fields: &str| fields.strip_prefix("host=").and_then(|host| host.parse().ok()).unwrap_or(0);
        let mut found: Vec<(Cpu, u64, u64)> =
            lines(&report).iter().map(|line| (line.cpu, line.time, truth(&line.fields))).collect();
        found.sort_unstable();
        let differs = found.iter().zip(&expected).find(|(found, expected)| found != expected);
        assert!(differs.is_none() && found.len() == expected.len(), "{what}, {name}: {} {differs:?}", found.len());
    }
    let mut found = shark_entries(path)?;
    found.sort_unstable();
    let expected: Vec<(Cpu, u64)> = expected.iter().map(|(cpu, ns, _)| (*cpu, *ns)).collect();
    assert!(found == expected, "{what}: KernelShark loads {} of {} entries", found.len(), expected.len());
    let checked = trace_cmd(&["report", "--ts-check"], &[path])?;
    assert!(!checked.contains("BACKWARD"), "{what}");
    assert!(trace_cmd(&["dump", "--validate"], &[path])?.contains("is a valid trace-cmd file"), "{what}");
    let reader = Reader::open(FileSource::new(File::open(path)?)?)?;
    assert_eq!(segments(&reader.segments()?.context("segments")?.table), segments(&guest.table));
    Ok(())
}

/// All shown times are true, to half the resolution of the guest's clock.
fn exact(guest: &Guest, half: u64) {
    let converted = guest.converted();
    assert!(converted.len() > 200, "{} events", converted.len());
    for (_, one, truth) in converted {
        assert!(one.certainty == Certainty::Exact && one.at.0.abs_diff(truth.0) <= half, "{one:?} {truth:?}");
    }
}

#[test]
fn constant_offsets_are_shown_as_host_times() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for start in [0, 5_000_000_017, -4_300_000_000_000, 1 << 62, i64::MIN + 12_345] {
        let path = folder.path().join(format!("constant{start}.dat"));
        let guest = write(&path, &[offset(start)])?;
        assert!(matches!(guest.shape, Shape::Shift(_)));
        exact(&guest, 0);
        judge(&path, &guest, &format!("offset {start}"))?;
    }
    Ok(())
}

#[test]
fn steps_forward_are_shown_as_host_times() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("steps.dat");
    let guest = write(&path, &[offset(-1 << 41), offset(-1 << 40), offset((-1 << 40) + 1), offset(1 << 50)])?;
    assert!(matches!(&guest.shape, Shape::Shift(shift) if shift.cpus[2].len() == 5));
    exact(&guest, 0);
    judge(&path, &guest, "steps")
}

#[test]
fn scaled_clocks_are_shown_as_host_times() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut added = 0;
    for thousandths in [350, 571, 999, 1870] {
        let path = folder.path().join(format!("scaled{thousandths}.dat"));
        let guest = write(&path, &[scaled(-99, thousandths)])?;
        assert_eq!(guest.shape, Shape::Rewrite);
        exact(&guest, scaled(0, thousandths).resolution() / 2);
        judge(&path, &guest, &format!("{thousandths} thousandths"))?;
        added += guest.rewritten.iter().map(|done| done.pages_added).sum::<u64>();
    }
    println!("{added} pages were added");
    Ok(())
}

#[test]
fn lanes_that_keep_their_newest_pages_only_and_have_begun_again_are_shown_as_host_times() -> Result<()> {
    let (folder, newest_bytes, in_front) = (tempfile::tempdir()?, 4 << 20, 2 << 20);
    let path = folder.path().join("newest.dat");
    let (table, stories) = live(&moved(), MANY[0], MANY[1])?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    let bounds = Bounds { lane_bytes_max: Some(1), newest_bytes: Some(newest_bytes) };
    let mut writer = Writer::create_bounded(file, &metadata(), "local [x86-tsc]", PAGE_BYTES, &LANES, bounds)?;
    let (mut filled, mut kept) = (Vec::new(), Vec::new());
    for (area, story) in writer.areas().iter().zip(&stories) {
        // As if older pages had filled the area up to here: the last ones lie at its start.
        let (older, newer) = story.pages.split_at(story.pages.len() - in_front);
        writer.file().write_all_at(older, area.offset + area.bytes_max - u64::try_from(older.len())?)?;
        writer.file().write_all_at(newer, area.offset)?;
        let written = area.bytes_max + u64::try_from(in_front)?;
        filled.push((area.cpu, written));
        let left = story.pages.len() - usize::try_from(writer.kept_bytes(area, written))?;
        let events = |pages: &[u8]| pages.chunks(4096).flat_map(|page| Events::new(page).expect("a page")).count();
        kept.extend(story.truth[events(&story.pages[..left])..].iter().map(|truth| (area.cpu, ns(*truth))));
    }
    let hosted = writer.host_times(&mut filled, &table, CMDLINES, &options())?;
    hosted.fault.map_or(Ok(()), Err)?;
    writer.finish(&filled, CMDLINES, &options(), "{}")?;
    kept.sort_unstable();
    assert_eq!(hosted.uncertainties.len(), 0);
    for report in [trace_cmd(&["report", "-t"], &[&path])?, trace_cmd_newest(&["report", "-t"], &[&path])?] {
        let mut found: Vec<(Cpu, u64)> = lines(&report).iter().map(|line| (line.cpu, line.time)).collect();
        found.sort_unstable();
        let is_near = |((cpu, time), truth): (&(Cpu, u64), &(Cpu, u64))| *cpu == truth.0 && time.abs_diff(truth.1) <= 1;
        assert!(
            found.len() == kept.len() && found.iter().zip(&kept).all(is_near),
            "{} and {}",
            found.len(),
            kept.len()
        );
    }
    assert!(std::fs::metadata(&path)?.len() < 4 * newest_bytes, "what is too old is gone");
    Ok(())
}

#[test]
fn ratio_that_bends_within_a_page_is_followed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("bends.dat");
    let guest = write(&path, &[scaled(0, 350), scaled(1 << 50, 1870), scaled(1 << 51, 700), offset(1 << 52)])?;
    exact(&guest, 1);
    judge(&path, &guest, "bends")
}

#[test]
fn clock_that_went_back_is_shown_as_host_times_within_what_is_said() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("back.dat");
    let guest =
        write(&path, &[offset(7_000_000), offset(0), offset(-5_000_000), offset(9_000_000), offset(-20_000_000)])?;
    assert_eq!(guest.shape, Shape::Rewrite);
    let converted = guest.converted();
    for (_, one, truth) in &converted {
        assert!(one.possible.low <= *truth && *truth <= one.possible.high, "{one:?} {truth:?}");
        assert!(one.certainty != Certainty::Exact || one.at == *truth, "{one:?} {truth:?}");
    }
    let trapped = converted.iter().filter(|(_, one, _)| one.certainty == Certainty::Trapped).count();
    let traps: usize = guest.stories.iter().map(|story| story.traps).sum();
    assert!(traps > 0 && trapped >= traps, "{trapped} of {traps}");
    assert_eq!(guest.rewritten.iter().map(|done| done.trapped).sum::<u64>(), u64::try_from(trapped)?);
    judge(&path, &guest, "back")
}

#[test]
fn raw_clock_leaves_the_guests_own_times_and_all_that_it_takes_to_convert_them() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("raw.dat");
    let guest = write_as(&path, &[offset(7_000_000), scaled(1 << 40, 571), offset(1 << 50)], true)?;
    let pages = guest.stories.iter().flat_map(|story| story.pages.chunks(4096));
    let times = pages.flat_map(|page| Events::new(page).expect("a page").map(|event| event.expect("an event").time));
    let mut own: Vec<u64> = times.map(|time| ns(HostTsc(time))).collect();
    own.sort_unstable();
    for report in [trace_cmd(&["report", "-t"], &[&path])?, trace_cmd_newest(&["report", "-t"], &[&path])?] {
        let mut found: Vec<u64> = lines(&report).iter().map(|line| line.time).collect();
        found.sort_unstable();
        assert!(found == own, "{} and {} events", found.len(), own.len());
    }
    let reader = Reader::open(FileSource::new(File::open(&path)?)?)?;
    let kept = reader.segments()?.context("segments")?;
    assert_eq!((kept.shown, segments(&kept.table)), (Shown::Raw, segments(&guest.table)));
    // What was kept converts as what was known when it was recorded.
    exact(&Guest { table: kept.table, ..guest }, 1);
    Ok(())
}

/// Where the child of the test below works; only it is told.
const CHILD_FOLDER: &str = "VTRACE_TEST_KILLED_IN";
/// A thousand pages or so, so that a kill meets the middle.
const MANY: [u64; 2] = [4000, 100_000_000];

fn moved() -> [Pair; 4] {
    [offset(7_000_000), offset(0), scaled(-5_000_000, 571), offset(9_000_000)]
}

#[test]
#[ignore = "the child of the one below, which kills it"]
fn child_gives_host_times_until_it_is_killed() -> Result<()> {
    let Some(folder) = std::env::var_os(CHILD_FOLDER) else { return Ok(()) };
    let path = Path::new(&folder).join("guest.dat");
    let Recorded { mut writer, mut filled, table, .. } = record(&path, &moved(), MANY[0], MANY[1])?;
    std::fs::write(path.with_extension("ready"), "")?;
    let hosted = writer.host_times(&mut filled, &table, CMDLINES, &options())?;
    hosted.fault.map_or(Ok(()), Err)?;
    std::fs::write(path.with_extension("done"), "")?;
    std::thread::sleep(std::time::Duration::from_secs(60));
    Ok(())
}

#[test]
fn recording_killed_while_it_gives_host_times_is_restored_to_the_same_bytes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (raw, undisturbed) = (folder.path().join("raw.dat"), folder.path().join("undisturbed.dat"));
    let Recorded { writer, filled, .. } = record(&raw, &moved(), MANY[0], MANY[1])?;
    writer.finish(&filled, CMDLINES, &options(), "{}")?;
    let own = pages(&raw)?;
    let Recorded { mut writer, mut filled, table, stories } = record(&undisturbed, &moved(), MANY[0], MANY[1])?;
    let begun = Instant::now();
    let hosted = writer.host_times(&mut filled, &table, CMDLINES, &options())?;
    let took = begun.elapsed();
    hosted.fault.map_or(Ok(()), Err)?;
    writer.finish(&filled, CMDLINES, &options(), "{}")?;
    let expected = pages(&undisturbed)?;
    let (mut interrupted, mut is_judged) = (0, false);
    for round in 0..ROUNDS {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("guest.dat");
        let is_done = kill_child(folder.path(), took * round / (ROUNDS - 1))?;
        let output = Command::new(xtask::build::vtrace()?).args(["restore", "--json"]).arg(&path).output()?;
        let said: Value = serde_json::from_slice(&output.stdout)?;
        assert!(output.status.success(), "{said}");
        interrupted += u32::from(!is_done && said[0]["converted"].as_u64().is_some_and(|events| events > 0));
        // Killed before the file knew the guest's clock: it keeps the guest's times, all of them.
        let has_clock = Reader::open(FileSource::new(File::open(&path)?)?)?.segments()?.is_some();
        let right = if has_clock { &expected } else { &own };
        assert!(pages(&path)? == *right, "killed after {round} of {ROUNDS} parts: {said}");
        if has_clock && !is_judged {
            is_judged = true;
            let guest =
                Guest { table: table.clone(), stories: stories.clone(), shape: Shape::Rewrite, rewritten: Vec::new() };
            judge(&path, &guest, "restored")?;
        }
    }
    println!("{interrupted} of {ROUNDS} were killed in the middle of {took:?}");
    assert!(is_judged && interrupted > 0, "none was killed in the middle");
    Ok(())
}

/// How often it is killed, each time later.
const ROUNDS: u32 = 6;

/// Kills the child so long after it began to give host times; whether it was done before that.
fn kill_child(folder: &Path, after: Duration) -> Result<bool> {
    let words = ["--exact", "child_gives_host_times_until_it_is_killed", "--ignored", "--quiet"];
    let mut child = Command::new(std::env::current_exe()?).args(words).env(CHILD_FOLDER, folder).spawn()?;
    let begun = Instant::now();
    while !folder.join("guest.ready").exists() {
        ensure!(begun.elapsed() < Duration::from_secs(60) && child.try_wait()?.is_none(), "the child does not come up");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(after);
    let is_done = folder.join("guest.done").exists();
    child.kill()?;
    child.wait()?;
    Ok(is_done)
}

fn pages(path: &Path) -> Result<Vec<Vec<u8>>> {
    let reader = Reader::open(FileSource::new(File::open(path)?)?)?;
    let top = reader.top().context("it has pages")?;
    let lane = |lane| -> Result<Vec<u8>> {
        let pages = reader.pages(top, lane).map(|page| page.map(|(_, bytes)| bytes)).collect::<Result<Vec<_>, _>>()?;
        Ok(pages.concat())
    };
    top.lanes.iter().map(lane).collect()
}
