//! Time, and CPU time by thread.
//!
//! In:    work to be done; whose CPU counts
//! Out:   seconds of both
//! Runs:  anywhere
//! Trust: the kernel's schedstat: nanoseconds that a thread has been on a CPU. Threads that end within a measurement take
//!        theirs along, so those that count must outlive it

use std::{
    collections::HashMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

pub(crate) const GIB: f64 = 1_073_741_824.0;

/// What moving some bytes took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) gb_per_s: f64,
    pub(crate) cpu_s_per_gib: f64,
}

impl Cost {
    /// Runs `work`, which moves `bytes`; `cpu` tells the CPU time that counts so far.
    pub(crate) fn of(
        bytes: u64,
        cpu: impl Fn() -> Result<Duration>,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<Self> {
        Self::of_moving(cpu, || work().map(|()| bytes))
    }

    /// Runs `work`, which knows afterwards how many bytes it moved.
    pub(crate) fn of_moving(cpu: impl Fn() -> Result<Duration>, work: impl FnOnce() -> Result<u64>) -> Result<Self> {
        let (begun, cpu_begun) = (Instant::now(), cpu()?);
        let bytes = real(work()?);
        let elapsed = begun.elapsed().as_secs_f64();
        let spent = cpu()?.saturating_sub(cpu_begun).as_secs_f64();
        Ok(Self { gb_per_s: bytes / 1e9 / elapsed, cpu_s_per_gib: spent / (bytes / GIB) })
    }
}

/// A count as a number to divide; exact below 2^53.
pub(crate) fn real(count: u64) -> f64 {
    let (high, low) =
        (u32::try_from(count >> 32).expect("32 bits"), u32::try_from(count & 0xffff_ffff).expect("32 bits"));
    f64::from(high) * 4_294_967_296.0 + f64::from(low)
}

/// The middle of some figures.
pub(crate) fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

/// CPU time of all threads of this process, those that have ended too.
pub(crate) fn process() -> Result<Duration> {
    use nix::time::{ClockId, clock_gettime};
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}

/// CPU time of the calling thread.
pub(crate) fn thread() -> Result<Duration> {
    use nix::time::{ClockId, clock_gettime};
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// CPU time of the threads of this process whose names begin so.
pub(crate) fn threads(prefix: &str) -> Result<Duration> {
    Ok(tasks("self")?.values().filter(|(name, _)| name.starts_with(prefix)).map(|(_, spent)| *spent).sum())
}

/// Name and CPU time of each thread of `process` (a number, or `self`).
pub(crate) fn tasks(process: &str) -> Result<HashMap<String, (String, Duration)>> {
    let each = each_task(process, |task| {
        let spent = fs::read_to_string(task.join("schedstat")).ok()?;
        Some(Duration::from_nanos(spent.split(' ').next()?.parse().ok()?))
    });
    each.context("no CPU times of threads")
}

/// CPU time of the kernel's own threads that work for this process's io_urings.
pub(crate) fn io_workers() -> Result<Duration> {
    threads("iou-wrk-")
}

/// Times that the threads of this process whose names begin so have been woken up or switched away.
pub(crate) fn switches(prefix: &str) -> Result<u64> {
    let each = each_task("self", |task| {
        let status = fs::read_to_string(task.join("status")).ok()?;
        let counts = status.lines().filter_map(|line| line.split_once("voluntary_ctxt_switches:"));
        Some(counts.filter_map(|(_, count)| count.trim().parse::<u64>().ok()).sum::<u64>())
    })?;
    Ok(each.values().filter(|(name, _)| name.starts_with(prefix)).map(|(_, count)| count).sum())
}

fn each_task<T>(process: &str, read: impl Fn(&Path) -> Option<T>) -> Result<HashMap<String, (String, T)>> {
    let mut found = HashMap::new();
    for task in fs::read_dir(format!("/proc/{process}/task")).context("no threads to be seen")? {
        let task = task?;
        // A thread may end while it is looked at.
        let Ok(name) = fs::read_to_string(task.path().join("comm")) else { continue };
        let Some(figure) = read(&task.path()) else { continue };
        found.insert(task.file_name().to_string_lossy().into_owned(), (name.trim_end().to_owned(), figure));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_an_even_count_lies_between_the_middle_two() {
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0, 2.0, 3.0])), (2.0, 2.5));
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn busy_thread_is_found_by_its_name_with_its_time() {
        let busy = std::thread::Builder::new().name("busy-bee".into());
        let (done, wait) = std::sync::mpsc::channel();
        let (go, end) = std::sync::mpsc::channel::<()>();
        let thread = busy.spawn(move || {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(20) {}
            done.send(()).unwrap();
            let _ = end.recv();
        });
        wait.recv().unwrap();
        assert!(threads("busy-").unwrap() > Duration::from_millis(2));
        assert_eq!(threads("no such thread").unwrap(), Duration::ZERO);
        assert!(switches("busy-").unwrap() > 0);
        drop(go);
        thread.unwrap().join().unwrap();
    }

    #[test]
    fn large_counts_stay_exact() {
        assert_eq!(real(5 << 32 | 7), 21_474_836_487.0);
    }
}
