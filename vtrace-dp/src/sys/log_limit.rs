//! A bound on log lines that a peer can cause.
//!
//! In:    lines, each with its level
//! Out:   lines in the log, at most [`BURST_LINES`] at once and then one every [`LINE_EVERY`]; the next line says how
//!        many were left out
//! Runs:  on any thread; a lock is held for some instructions
//! Full:  a line beyond the bound is counted and dropped; a table of users beyond [`USERS_MAX`] shares one limit
//! Trust: nothing: guests, virtual machine monitors and clients choose how often they fail

use std::{
    collections::HashMap,
    fmt::Arguments,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Lines that may come at once.
pub const BURST_LINES: u32 = 100;
/// Time for one more line after that.
pub const LINE_EVERY: Duration = Duration::from_secs(10);
/// Users that have a limit of their own.
pub const USERS_MAX: usize = 64;

/// The log of one peer: a guest, with its virtual machine monitor and its agent.
#[derive(Debug)]
pub struct PeerLog {
    name: String,
    bucket: Mutex<Bucket>,
}

/// Lines left, as of a time.
#[derive(Clone, Copy, Default, Debug)]
struct Bucket {
    /// Lines of the burst that are used up.
    used: u32,
    /// When `used` last fell.
    since: Option<Instant>,
    /// Lines dropped since the last one that was logged.
    dropped: u64,
}

impl Bucket {
    /// Whether one more line may be logged at `now`, and how many were dropped before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let earned = now.saturating_duration_since(since).as_secs() / LINE_EVERY.as_secs();
        if earned > 0 || self.used == 0 {
            self.used = self.used.saturating_sub(u32::try_from(earned).unwrap_or(u32::MAX));
            self.since = Some(now);
        }
        if self.used >= BURST_LINES {
            self.dropped += 1;
            return None;
        }
        self.used += 1;
        Some(std::mem::take(&mut self.dropped))
    }

    /// Whether nothing is used up at `now`.
    fn is_full(&self, now: Instant) -> bool {
        let idle = self.since.map_or(Duration::MAX, |since| now.saturating_duration_since(since));
        idle >= LINE_EVERY.saturating_mul(self.used.max(1))
    }
}

impl PeerLog {
    /// A log whose lines begin with `name`.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), bucket: Mutex::default() }
    }

    /// Logs a line at level info, unless there were too many.
    pub fn info(&self, line: Arguments<'_>) {
        self.log(log::Level::Info, line);
    }

    /// Logs a line at level warn, unless there were too many.
    pub fn warn(&self, line: Arguments<'_>) {
        self.log(log::Level::Warn, line);
    }

    /// Logs a line at level error, unless there were too many.
    pub fn error(&self, line: Arguments<'_>) {
        self.log(log::Level::Error, line);
    }

    fn log(&self, level: log::Level, line: Arguments<'_>) {
        let admitted = lock(&self.bucket).admit(Instant::now());
        write(level, format_args!("{}: {line}", self.name), admitted);
    }
}

/// One limit for each user, and one for all of them together.
#[derive(Debug, Default)]
pub struct UserLogLimits(Mutex<Users>);

#[derive(Debug, Default)]
struct Users {
    all: Bucket,
    each: HashMap<u32, Bucket>,
    others: Bucket,
}

impl Users {
    fn admit(&mut self, uid: u32, now: Instant) -> Option<u64> {
        if !self.each.contains_key(&uid) && self.each.len() >= USERS_MAX {
            self.each.retain(|_, bucket| bucket.dropped > 0 || !bucket.is_full(now));
        }
        let has_own = self.each.contains_key(&uid) || self.each.len() < USERS_MAX;
        let bucket = if has_own { self.each.entry(uid).or_default() } else { &mut self.others };
        let dropped = bucket.admit(now)?;
        match self.all.admit(now) {
            Some(dropped_of_all) => Some(dropped + dropped_of_all),
            None => {
                bucket.dropped += dropped;
                None
            }
        }
    }
}

impl UserLogLimits {
    /// Logs a line that user `uid` has caused, unless that user or all together caused too many.
    pub fn log(&self, uid: u32, level: log::Level, line: Arguments<'_>) {
        let admitted = lock(&self.0).admit(uid, Instant::now());
        write(level, line, admitted);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write(level: log::Level, line: Arguments<'_>, admitted: Option<u64>) {
    match admitted {
        None => {}
        Some(0) => log::log!(level, "{line}"),
        Some(dropped) => log::log!(level, "{line} ({dropped} lines before it were left out)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flood_of_lines_leaves_a_burst_and_then_one_line_each_interval() {
        let (mut bucket, begin) = (Bucket::default(), Instant::now());
        let logged = (0..100_000).filter(|_| bucket.admit(begin).is_some()).count();
        assert_eq!(logged, usize::try_from(BURST_LINES).unwrap());
        // A day in steps of a second.
        let hours = (1..=86_400).filter(|s| bucket.admit(begin + Duration::from_secs(*s)).is_some()).count();
        assert_eq!(hours, 8640);
    }

    #[test]
    fn next_line_counts_those_that_were_dropped() {
        let (mut bucket, begin) = (Bucket::default(), Instant::now());
        for _ in 0..BURST_LINES + 7 {
            bucket.admit(begin);
        }
        assert_eq!(bucket.admit(begin + LINE_EVERY), Some(7));
        assert_eq!(bucket.admit(begin + LINE_EVERY), None);
    }

    #[test]
    fn idle_time_gives_back_a_whole_burst_and_no_more() {
        let (mut bucket, begin) = (Bucket::default(), Instant::now());
        for _ in 0..BURST_LINES {
            bucket.admit(begin);
        }
        let later = begin + LINE_EVERY * 10 * BURST_LINES;
        let logged = (0..1000).filter(|_| bucket.admit(later).is_some()).count();
        assert_eq!(logged, usize::try_from(BURST_LINES).unwrap());
    }

    #[test]
    fn one_user_leaves_lines_to_others_and_many_users_share_the_bound_of_all() {
        let (mut users, now) = (Users::default(), Instant::now());
        let burst = usize::try_from(BURST_LINES).unwrap();
        let first = (0..burst / 2).filter(|_| users.admit(1, now).is_some()).count();
        assert_eq!((first, users.admit(2, now)), (burst / 2, Some(0)));
        let rest = (0..10_000u32).filter(|uid| users.admit(uid + 3, now).is_some()).count();
        assert_eq!(rest, burst - burst / 2 - 1);
        assert!(users.each.len() <= USERS_MAX);
    }
}
