//! per_cpu/cpuN/stats: the kernel's counters.
//!
//! In:    the text of the file, from the host or a guest
//! Out:   [`Stats`], or the counter that is missing or malformed
//! Trust: nothing
//!
//! Source: `tracing_stats_read` in kernel/trace/trace.c.

/// The counters of one CPU's ring buffer since it was made or cleared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Events in it now.
    pub entries: u64,
    /// Events that were overwritten before they were read.
    pub overrun: u64,
    /// Events lost because a writer was interrupted by a whole buffer of others.
    pub commit_overrun: u64,
    /// Bytes in it now, headers of pages not counted.
    pub bytes: u64,
    /// Events not written because the buffer was full (overwriting is off).
    pub dropped_events: u64,
    /// Events that were read out.
    pub read_events: u64,
}

/// Why a text is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StatsFault {
    /// A counter is missing.
    #[error("no line {0:?}")]
    Missing(&'static str),
    /// A counter is not a number.
    #[error("{name:?} is {value:?}")]
    Number {
        /// Its name.
        name: &'static str,
        /// Its text.
        value: String,
    },
}

impl Stats {
    /// Events that were recorded, read or not, or lost in the attempt.
    pub fn recorded(&self) -> u64 {
        self.entries.saturating_add(self.read_events).saturating_add(self.lost())
    }

    /// Parses lines of `name: number`; other names are ignored.
    ///
    /// # Errors
    /// When one of the six counters is missing or no u64.
    pub fn parse(text: &str) -> Result<Self, StatsFault> {
        let counter = |name: &'static str| {
            let mut values = text.lines().filter_map(|line| line.split_once(':'));
            let (_, value) = values.find(|(key, _)| *key == name).ok_or(StatsFault::Missing(name))?;
            let value = value.trim();
            value.parse().map_err(|_| StatsFault::Number { name, value: value.chars().take(32).collect() })
        };
        Ok(Self {
            entries: counter("entries")?,
            overrun: counter("overrun")?,
            commit_overrun: counter("commit overrun")?,
            bytes: counter("bytes")?,
            dropped_events: counter("dropped events")?,
            read_events: counter("read events")?,
        })
    }

    /// Events that are lost.
    pub fn lost(&self) -> u64 {
        self.overrun.saturating_add(self.commit_overrun).saturating_add(self.dropped_events)
    }
}

/// Events lost between two texts of one CPU; `before` is empty for a CPU that was not there yet. `None`: a text is not
/// the kernel's.
pub fn events_lost(before: &str, after: &str) -> Option<u64> {
    let (before, after) = between(before, after)?;
    Some(after.lost().saturating_sub(before.lost()))
}

/// Events read between two texts of one CPU, as [`events_lost`].
pub fn events_read(before: &str, after: &str) -> Option<u64> {
    let (before, after) = between(before, after)?;
    Some(after.read_events.saturating_sub(before.read_events))
}

fn between(before: &str, after: &str) -> Option<(Stats, Stats)> {
    let before = if before.is_empty() { Stats::default() } else { Stats::parse(before).ok()? };
    Some((before, Stats::parse(after).ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str = "entries: 12\noverrun: 3\ncommit overrun: 1\nbytes: 4060\noldest event ts:  1249.539636\n\
                        now ts: 1249.557488\ndropped events: 2\nread events: 77\n";

    #[test]
    fn kernels_text_is_understood() {
        let stats = Stats::parse(TEXT).unwrap();
        assert_eq!((stats.entries, stats.bytes, stats.read_events), (12, 4060, 77));
        assert_eq!(stats.lost(), 6);
    }

    #[test]
    fn missing_counter_is_named() {
        let text = TEXT.replace("commit overrun: 1\n", "");
        assert_eq!(Stats::parse(&text), Err(StatsFault::Missing("commit overrun")));
    }

    #[test]
    fn number_beyond_64_bits_is_refused() {
        let text = TEXT.replace("4060", "18446744073709551616");
        assert!(matches!(Stats::parse(&text), Err(StatsFault::Number { name: "bytes", .. })));
    }

    #[test]
    fn counts_between_two_texts_are_unknown_where_a_text_is_not_the_kernels() {
        let before = TEXT.replace("overrun: 3", "overrun: 1").replace("read events: 77", "read events: 70");
        assert_eq!((events_lost(&before, TEXT), events_read(&before, TEXT)), (Some(2), Some(7)));
        assert_eq!((events_lost("", TEXT), events_read("", TEXT)), (Some(6), Some(77)));
        assert_eq!((events_lost(TEXT, ""), events_read("entries: x", TEXT)), (None, None));
    }

    proptest! {
        #[test]
        fn counters_come_back_as_written(counters: [u64; 6]) {
            let [entries, overrun, commit_overrun, bytes, dropped_events, read_events] = counters;
            let text = format!(
                "entries: {entries}\noverrun: {overrun}\ncommit overrun: {commit_overrun}\nbytes: {bytes}\n\
                 oldest event ts: 1.2\ndropped events: {dropped_events}\nread events: {read_events}\n"
            );
            let wanted = Stats { entries, overrun, commit_overrun, bytes, dropped_events, read_events };
            prop_assert_eq!(Stats::parse(&text), Ok(wanted));
        }

        #[test]
        fn any_text_gives_an_answer(text: String, cut in 0usize..200) {
            let _ = Stats::parse(&text);
            let _ = Stats::parse(TEXT.get(..cut).unwrap_or(TEXT));
        }
    }
}
