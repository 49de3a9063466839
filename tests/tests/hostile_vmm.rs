//! Servers under random vhost-user requests: valid and invalid ones with odd descriptors, monitors that die at any byte,
//! memory of terabytes, rings that change while they are served. None becomes unusable, and each leaves nothing.
//!
//! The servers run in this process, whose allocator counts.

use std::{
    collections::BTreeMap,
    fs,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use vtrace_dp::server::{GuestConfig, GuestSocket, Server, ServerConfig};
use vtrace_fuzz::vhost_user::{attack, random_input, serves};
use vtrace_tests::heap;

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;

/// Each has two guests: the monitor of one is attacking, that of the other connects afterwards as well.
const SERVERS: u64 = 200;
/// Monitors of one server, one after the other.
const MONITORS: u64 = 8;
/// Servers before the first look: what is made once is made.
const WARM_UP: u64 = 10;
/// How long the last monitor may be on its way out.
const SETTLE_MAX: Duration = Duration::from_secs(30);
/// Bytes that 190 servers together may leave: less than one block each.
const SLACK_BYTES: isize = 8 << 10;

/// What this process holds.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Holdings {
    /// How many descriptors lead where.
    descriptors: BTreeMap<String, usize>,
    threads: usize,
    /// Mappings of memory that monitors have shared.
    mappings: usize,
}

impl Holdings {
    fn now() -> Result<Self> {
        let mut descriptors = BTreeMap::new();
        for entry in fs::read_dir("/proc/self/fd")?.flatten() {
            // The descriptor of this listing is gone by now.
            let Ok(link) = fs::read_link(entry.path()) else { continue };
            let kind: String = link.to_string_lossy().chars().filter(|letter| !letter.is_ascii_digit()).collect();
            *descriptors.entry(kind).or_default() += 1;
        }
        let maps = fs::read_to_string("/proc/self/maps")?;
        let mappings = maps.lines().filter(|line| line.contains("memfd:")).count();
        Ok(Self { descriptors, threads: fs::read_dir("/proc/self/task")?.count(), mappings })
    }

    /// Once monitors that have gone are forgotten: the same in several looks.
    fn settled() -> Result<Self> {
        let (mut last, mut same) = (Self::now()?, 0);
        while same < 5 {
            sleep(Duration::from_millis(2));
            let now = Self::now()?;
            same = if now == last { same + 1 } else { 0 };
            last = now;
        }
        Ok(last)
    }

    /// Waits until this process holds `self` again.
    fn come_back(&self, after: &str) -> Result<()> {
        let begun = Instant::now();
        loop {
            let now = Self::now()?;
            if now == *self {
                return Ok(());
            }
            ensure!(begun.elapsed() < SETTLE_MAX, "{after}: {self:?} became {now:?}");
            sleep(Duration::from_millis(1));
        }
    }
}

/// A server under attack from its start to its end.
fn attacked_server(number: u64) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let guests = ["attacking", "other"].map(|name| GuestConfig::new(name, GuestSocket::InDirectory));
    let directory = folder.path().to_path_buf();
    let server = Server::start(&ServerConfig { directory, guests: guests.into(), ..ServerConfig::default() })?;
    let [attacking, other] = ["attacking.sock", "other.sock"].map(|name| folder.path().join(name));
    ensure!(serves(&attacking) && serves(&other), "server {number} does not begin to serve");
    let before = Holdings::settled()?;
    for monitor in 0..MONITORS {
        let input = number * MONITORS + monitor;
        attack(&attacking, &random_input(input));
        // One that is turned away comes while the last is on its way out.
        let begun = Instant::now();
        while !serves(&attacking) {
            ensure!(begun.elapsed() < SETTLE_MAX, "no monitor is served after input {input}");
        }
        ensure!(serves(&other), "the other guest's monitor is not served after input {input}");
        before.come_back(&format!("input {input}"))?;
    }
    server.stop();
    Ok(())
}

#[test]
fn two_hundred_servers_under_random_requests_stay_usable_and_leave_nothing() -> Result<()> {
    (0..WARM_UP).try_for_each(attacked_server)?;
    let before = Holdings::settled()?;
    let (bytes_before, blocks_before) = heap::live();
    for number in WARM_UP..SERVERS {
        attacked_server(number)?;
        before.come_back(&format!("server {number}"))?;
    }
    let (bytes, blocks) = heap::live();
    println!(
        "{SERVERS} servers, {} monitors: {bytes_before} bytes in {blocks_before} blocks became {bytes} in {blocks}",
        SERVERS * MONITORS
    );
    ensure!(
        bytes - bytes_before <= SLACK_BYTES,
        "{bytes_before} bytes in {blocks_before} blocks became {bytes} in {blocks}"
    );
    Ok(())
}
