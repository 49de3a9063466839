//! Text for people: foreign text, errors with their sources, times.
//!
//! In:    text of guests: names, reasons, output of commands; errors; numbers
//! Out:   text without characters that move the cursor, are invisible or change the direction of others; an error in one
//!        line; a time with its unit
//! Trust: nothing

use std::{borrow::Cow, fmt};

/// The text with a '?' for each control character except the tab, and for each invisible character that changes others
/// (zero-width ones, and the directional marks of Unicode UAX #9).
pub fn printable(text: &str) -> String {
    text.chars().map(|letter| if is_visible(letter) { letter } else { '?' }).collect()
}

/// The same for bytes that may not be UTF-8.
pub fn printable_bytes(bytes: &[u8]) -> String {
    let text: Cow<'_, str> = String::from_utf8_lossy(bytes);
    printable(&text)
}

/// The longest prefix of at most `bytes_max` bytes that does not split a character.
pub fn cut(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

/// An error and its sources, separated by colons.
pub fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// A time in nanoseconds, shown in ns, µs or ms.
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

fn is_visible(letter: char) -> bool {
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
    fn text_is_cut_between_characters() {
        assert_eq!(cut("aää", 4), "aä");
        assert_eq!(cut("aää", 99), "aää");
    }

    proptest! {
        #[test]
        fn printable_text_has_as_many_characters_all_visible(text: String) {
            let shown = printable(&text);
            prop_assert_eq!(shown.chars().count(), text.chars().count());
            prop_assert!(shown.chars().all(is_visible));
            prop_assert_eq!(printable(&shown), shown);
        }
    }
}
