//! Times for which an agent owes an answer: it, or its guest, is paused, suspended, hung or dead.
//!
//! In:    when it was asked, when it answered
//! Out:   the current and the longest silence, and their texts
//! Runs:  pure

use std::{
    fmt,
    time::{Duration, Instant},
};

/// Shortest silence that is reported: agents are asked every second.
pub const SHOWN: Duration = Duration::from_secs(5);

/// The silence of one agent.
#[derive(Clone, Debug, Default)]
pub struct Silence {
    asked: Option<Instant>,
    longest: Duration,
}

impl Silence {
    /// It was asked: from `now` on it owes an answer, unless it did already.
    pub fn asked(&mut self, now: Instant) {
        self.asked.get_or_insert(now);
    }

    /// It answered, or is not asked any more.
    pub fn ends(&mut self, now: Instant) {
        self.longest = self.longest(now);
        self.asked = None;
    }

    /// Whether it has answered is not known any more.
    pub fn forget(&mut self) {
        self.asked = None;
    }

    /// Time for which it has owed an answer.
    pub fn lasts(&self, now: Instant) -> Duration {
        self.asked.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// The longest such time.
    pub fn longest(&self, now: Instant) -> Duration {
        self.longest.max(self.lasts(now))
    }
}

/// The end of a status line, `, silent for 35 s`, or nothing below [`SHOWN`]. The field: seconds.
pub(crate) struct SilenceSuffix(pub(crate) u64);

impl fmt::Display for SilenceSuffix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 >= SHOWN.as_secs() { write!(f, ", silent for {} s", self.0) } else { Ok(()) }
    }
}

/// The remark in the closing table about the longest silence.
pub(crate) fn remark(longest: Duration) -> Option<String> {
    let seconds = longest.as_secs();
    let why = "it or its agent was paused, suspended or hung";
    (longest >= SHOWN).then(|| format!("its agent did not answer for {seconds} s: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_from_the_first_unanswered_question() {
        let (begun, mut silence) = (Instant::now(), Silence::default());
        let at = |seconds| begun + Duration::from_secs(seconds);
        assert_eq!(silence.lasts(at(100)), Duration::ZERO, "not asked yet");
        for seconds in 0..=7 {
            silence.asked(at(seconds));
        }
        assert_eq!(silence.lasts(at(7)), Duration::from_secs(7));
        silence.ends(at(8));
        assert_eq!((silence.lasts(at(20)), silence.longest(at(20))), (Duration::ZERO, Duration::from_secs(8)));
        silence.asked(at(20));
        assert_eq!(silence.longest(at(21)), Duration::from_secs(8), "the longest, not the last");
        assert_eq!(silence.longest(at(30)), Duration::from_secs(10), "one that goes on counts");
    }

    #[test]
    fn short_silences_are_not_reported() {
        assert_eq!(
            (SilenceSuffix(4).to_string(), SilenceSuffix(35).to_string()),
            (String::new(), ", silent for 35 s".into())
        );
        assert_eq!(remark(Duration::from_millis(4999)), None);
        assert!(remark(Duration::from_millis(35_900)).is_some_and(|said| said.contains("did not answer for 35 s")));
    }
}
