//! What may be shown to people: foreign text, errors with all their sources, times.
//!
//! In:    text of a guest: names, reasons, what its commands write; errors and numbers of ours
//! Out:   the text without what moves a terminal's cursor, hides letters or turns their order round; one line of an error;
//!        a number with its unit
//! Runs:  pure
//! Full:  as long as the text, but for what [`cut`] leaves out
//! Trust: nothing

use std::{borrow::Cow, fmt};

/// The text with a '?' for each control character but the tab, and for each character that is not seen but changes how
/// others are (Unicode UAX #9, explicit directional marks; zero-width ones).
pub fn printable(text: &str) -> String {
    text.chars().map(|letter| if is_seen(letter) { letter } else { '?' }).collect()
}

/// The same of bytes that may be no text.
pub fn printable_bytes(bytes: &[u8]) -> String {
    let text: Cow<'_, str> = String::from_utf8_lossy(bytes);
    printable(&text)
}

/// The first bytes of a text, at most so many, that are whole letters.
pub fn cut(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

/// An error with all its sources, one behind the other.
pub fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// A time for a person.
pub(crate) struct Nanoseconds(pub(crate) u64);

impl fmt::Display for Nanoseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ns if ns < 1000 => write!(f, "{ns} ns"),
            ns if ns < 1_000_000 => write!(f, "{}.{} µs", ns / 1000, ns / 100 % 10),
            ns => write!(f, "{}.{} ms", ns / 1_000_000, ns / 100_000 % 10),
        }
    }
}

fn is_seen(letter: char) -> bool {
    match letter {
        '\t' => true,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' => false,
        _ => !letter.is_control(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_moves_no_cursor_and_hides_nothing() {
        assert_eq!(printable("Linux \x1b[2J\n"), "Linux ?[2J?");
        assert_eq!(printable("a\tb 'c' \"d\" /e/ ä"), "a\tb 'c' \"d\" /e/ ä");
        assert_eq!(printable("cod\u{202e}exe.txt\u{9b}2J"), "cod?exe.txt?2J");
        assert_eq!(printable_bytes(b"\xff\r\n"), "\u{fffd}??");
    }

    #[test]
    fn text_is_cut_at_a_letter() {
        assert_eq!(cut("aää", 4), "aä");
        assert_eq!(cut("aää", 99), "aää");
    }

    proptest! {
        #[test]
        fn no_text_is_longer_or_less_visible_than_it_was(text: String) {
            let shown = printable(&text);
            prop_assert_eq!(shown.chars().count(), text.chars().count());
            prop_assert!(shown.chars().all(is_seen));
            prop_assert_eq!(printable(&shown), shown);
        }
    }
}
