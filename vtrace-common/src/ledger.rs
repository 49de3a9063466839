//! The page ledger: what one lane took in, passed on and lost. Agent, drain, recorder, files and `--json` count in it.

use core::ops::AddAssign;

/// Counts of one lane. `pages_in == pages_out + pages_lost` whenever the lane holds no page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Ledger {
    /// Pages taken from the source: a ring buffer, a virtqueue or a stream.
    pub pages_in: u64,
    /// Pages passed on: into the port (agent), into the file (host).
    pub pages_out: u64,
    /// Pages taken and not passed on.
    pub pages_lost: u64,
    /// Bytes passed on.
    pub bytes_out: u64,
    /// Events that the kernel overwrote or dropped before they were read. `None`: not known here.
    pub events_lost: Option<u64>,
}

impl Ledger {
    /// Every page that was taken is accounted for.
    #[must_use]
    pub const fn is_balanced(&self) -> bool {
        match self.pages_out.checked_add(self.pages_lost) {
            Some(pages) => self.pages_in == pages,
            None => false,
        }
    }

    /// Pages taken, neither passed on nor lost yet.
    #[must_use]
    pub const fn pages_held(&self) -> u64 {
        self.pages_in.saturating_sub(self.pages_out).saturating_sub(self.pages_lost)
    }

    /// Counts this many whole pages, in all, as passed on. Hot.
    pub const fn set_out(&mut self, pages: u64, page_bytes: u64) {
        self.pages_out = pages;
        self.bytes_out = pages * page_bytes;
    }

    /// Counts every page that was not passed on as lost: the lane ends here.
    pub const fn settle(&mut self) {
        self.pages_lost = self.pages_in.saturating_sub(self.pages_out);
    }
}

/// Sums saturate: counts of a guest may be anything. What is not known of one lane is not known of the sum.
impl AddAssign for Ledger {
    fn add_assign(&mut self, other: Self) {
        self.pages_in = self.pages_in.saturating_add(other.pages_in);
        self.pages_out = self.pages_out.saturating_add(other.pages_out);
        self.pages_lost = self.pages_lost.saturating_add(other.pages_lost);
        self.bytes_out = self.bytes_out.saturating_add(other.bytes_out);
        self.events_lost = match (self.events_lost, other.events_lost) {
            (Some(one), Some(other)) => Some(one.saturating_add(other)),
            _ => None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_pages_keep_a_ledger_from_balancing_until_it_is_settled() {
        let mut ledger = Ledger { pages_in: 9, pages_out: 5, pages_lost: 1, ..Ledger::default() };
        assert_eq!((ledger.is_balanced(), ledger.pages_held()), (false, 3));
        ledger.settle();
        assert_eq!((ledger.is_balanced(), ledger.pages_held(), ledger.pages_lost), (true, 0, 4));
    }

    #[test]
    fn counts_that_overflow_are_not_balanced() {
        let ledger = Ledger { pages_in: 0, pages_out: u64::MAX, pages_lost: 1, ..Ledger::default() };
        assert!(!ledger.is_balanced());
    }

    #[test]
    fn sum_with_an_unknown_count_is_unknown() {
        let mut sum = Ledger { pages_in: u64::MAX, events_lost: Some(1), ..Ledger::default() };
        sum += Ledger { pages_in: 1, events_lost: Some(2), ..Ledger::default() };
        assert_eq!((sum.pages_in, sum.events_lost), (u64::MAX, Some(3)));
        sum += Ledger::default();
        assert_eq!(sum.events_lost, None);
    }
}
