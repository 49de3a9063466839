//! How long an agent leaves us without an answer: it, or its guest, is paused, asleep, hung, or dead.
//!
//! In:    when it was asked, when it said something
//! Out:   how long it has been silent, the longest time, words for people
//! Runs:  pure
//! Trust: nothing to trust: silence is what is measured

use std::{
    fmt,
    time::{Duration, Instant},
};

/// A shorter silence is not worth a word: agents are asked every second.
pub const SHOWN: Duration = Duration::from_secs(5);

/// One agent's.
#[derive(Clone, Debug, Default)]
pub struct Silence {
    asked: Option<Instant>,
    longest: Duration,
}

impl Silence {
    /// It has to say something from `now` on, unless it had to already.
    pub fn asked(&mut self, now: Instant) {
        self.asked.get_or_insert(now);
    }

    /// It has said something, or is not asked any more.
    pub fn ends(&mut self, now: Instant) {
        self.longest = self.longest(now);
        self.asked = None;
    }

    /// Nobody can say any more whether it has answered.
    pub fn forget(&mut self) {
        self.asked = None;
    }

    /// For how long it has owed an answer.
    pub fn lasts(&self, now: Instant) -> Duration {
        self.asked.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// The longest time that it has owed one.
    pub fn longest(&self, now: Instant) -> Duration {
        self.longest.max(self.lasts(now))
    }
}

/// What is said of a silence of so many seconds, if anything: `, silent for 35 s`.
pub(crate) struct Said(pub(crate) u64);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 >= SHOWN.as_secs() { write!(f, ", silent for {} s", self.0) } else { Ok(()) }
    }
}

/// What the closing table says of the longest silence.
pub(crate) fn remark(longest: Duration) -> Option<String> {
    let seconds = longest.as_secs();
    let why = "it was paused, asleep or hung, or its agent was";
    (longest >= SHOWN).then(|| format!("its agent said nothing for {seconds} s: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_from_the_first_question_that_is_not_answered() {
        let (begun, mut silence) = (Instant::now(), Silence::default());
        let at = |seconds| begun + Duration::from_secs(seconds);
        assert_eq!(silence.lasts(at(100)), Duration::ZERO, "nobody has asked");
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
    fn short_silences_are_not_worth_a_word() {
        assert_eq!((Said(4).to_string(), Said(35).to_string()), (String::new(), ", silent for 35 s".into()));
        assert_eq!(remark(Duration::from_millis(4999)), None);
        assert!(remark(Duration::from_millis(35_900)).is_some_and(|said| said.contains("said nothing for 35 s")));
    }
}
