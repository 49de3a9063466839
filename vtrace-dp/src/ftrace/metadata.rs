//! What a machine tells about itself: gathered from pieces, written in front of the data.
//!
//! In:    pieces of texts, in the order of each text
//! Out:   [`Metadata`], or why a piece is refused
//! Full:  `limits::METADATA_BYTES_MAX` of bytes in one session, `limits::FORMATS_MAX` formats
//! Trust: nothing: pieces come from a guest. Texts with a NUL and names that could not be a system's are refused, since
//!        stock readers take both for ends of strings. What a format says is not looked at.

use std::collections::{BTreeMap, BTreeSet};

use vtrace_common::{
    limits::{CMDLINES_BYTES_MAX, FORMATS_MAX, METADATA_BYTES_MAX, NAME_BYTES_MAX},
    wire::agent::{Part, Piece},
};

/// Everything of a trace.dat but pages and options.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Metadata {
    /// events/header_page
    pub header_page: Vec<u8>,
    /// events/header_event
    pub header_event: Vec<u8>,
    /// events/ftrace/*/format
    pub ftrace_formats: Vec<Vec<u8>>,
    /// events/SYSTEM/*/format by system
    pub event_formats: BTreeMap<String, Vec<Vec<u8>>>,
    /// /proc/kallsyms
    pub kallsyms: Vec<u8>,
    /// printk_formats
    pub printk_formats: Vec<u8>,
    /// saved_cmdlines; may come as late as the end
    pub cmdlines: Vec<u8>,
    /// How far the pieces have come.
    pub gathered: PiecesReceived,
}

/// How far the pieces have come. No part of what they say: all are equal.
#[derive(Clone, Debug, Default)]
pub struct PiecesReceived {
    bytes: usize,
    formats: usize,
    /// Parts whose text is not complete, with the system an event format belongs to.
    open: BTreeMap<Part, String>,
    /// Parts of one text that are complete.
    complete: BTreeSet<Part>,
}

impl PartialEq for PiecesReceived {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for PiecesReceived {}

/// Why a piece is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MetadataFault {
    /// More than `limits::METADATA_BYTES_MAX`.
    #[error("more than {0} bytes of description")]
    TooLarge(usize),
    /// More than `limits::FORMATS_MAX`.
    #[error("more than {0} formats")]
    TooMany(usize),
    /// A NUL in a text, or a format without one byte.
    #[error("a piece of {0:?} is not text")]
    NotText(Part),
    /// A name that no system has.
    #[error("a system's name is empty, longer than {NAME_BYTES_MAX} bytes, or has other signs than letters have")]
    Name,
    /// A second text where a machine has one.
    #[error("{0:?} came twice")]
    Twice(Part),
    /// Two event formats at a time.
    #[error("a piece of another system came in the middle of an event format")]
    Mixed,
}

impl Metadata {
    /// Adds a piece. Pieces of one text come in order; command lines that come again replace those that came before.
    pub fn add(&mut self, piece: Piece) -> Result<(), MetadataFault> {
        let Piece { part, name, bytes, last } = piece;
        self.check(part, &name, &bytes)?;
        let starts = !self.gathered.open.contains_key(&part);
        if starts {
            self.start(part, &name)?;
        }
        let text = self.text(part, &name, starts);
        text.extend_from_slice(&bytes);
        if last && text.is_empty() && matches!(part, Part::FtraceFormat | Part::EventFormat) {
            return Err(MetadataFault::NotText(part));
        }
        self.gathered.bytes += bytes.len();
        if last {
            self.gathered.open.remove(&part);
            self.gathered.complete.insert(part);
        }
        Ok(())
    }

    fn check(&self, part: Part, name: &str, bytes: &[u8]) -> Result<(), MetadataFault> {
        if bytes.contains(&0) {
            return Err(MetadataFault::NotText(part));
        }
        if self.gathered.bytes + bytes.len() > METADATA_BYTES_MAX {
            return Err(MetadataFault::TooLarge(METADATA_BYTES_MAX));
        }
        if part == Part::Cmdlines {
            let before = if self.gathered.open.contains_key(&part) { self.cmdlines.len() } else { 0 };
            if before + bytes.len() > CMDLINES_BYTES_MAX {
                return Err(MetadataFault::TooLarge(CMDLINES_BYTES_MAX));
            }
        }
        match (part, self.gathered.open.get(&part)) {
            (Part::EventFormat, Some(system)) if system != name => Err(MetadataFault::Mixed),
            (Part::EventFormat, _) if !is_system_name(name) => Err(MetadataFault::Name),
            _ => Ok(()),
        }
    }

    fn start(&mut self, part: Part, name: &str) -> Result<(), MetadataFault> {
        match part {
            Part::FtraceFormat | Part::EventFormat => {
                if self.gathered.formats == FORMATS_MAX {
                    return Err(MetadataFault::TooMany(FORMATS_MAX));
                }
                self.gathered.formats += 1;
            }
            Part::Cmdlines => self.cmdlines.clear(),
            _ if self.gathered.complete.contains(&part) => return Err(MetadataFault::Twice(part)),
            _ => {}
        }
        self.gathered.open.insert(part, name.to_owned());
        Ok(())
    }

    fn text(&mut self, part: Part, name: &str, starts: bool) -> &mut Vec<u8> {
        let formats = match part {
            Part::HeaderPage => return &mut self.header_page,
            Part::HeaderEvent => return &mut self.header_event,
            Part::PrintkFormats => return &mut self.printk_formats,
            Part::Kallsyms => return &mut self.kallsyms,
            Part::Cmdlines => return &mut self.cmdlines,
            Part::FtraceFormat => &mut self.ftrace_formats,
            Part::EventFormat => self.event_formats.entry(name.to_owned()).or_default(),
        };
        if starts {
            formats.push(Vec::new());
        }
        formats.last_mut().expect("a text that was started has a place")
    }
}

/// Systems are named by C identifiers (`TRACE_SYSTEM`), a few modules' with a dash.
fn is_system_name(name: &str) -> bool {
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len());
    fits && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte)) && !name.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn piece(part: Part, name: &str, bytes: &[u8], last: bool) -> Piece {
        Piece { part, name: name.to_owned(), bytes: bytes.to_vec(), last }
    }

    #[test]
    fn pieces_of_one_text_become_one_text() {
        let mut metadata = Metadata::default();
        metadata.add(piece(Part::Kallsyms, "", b"ffff t ", false)).unwrap();
        metadata.add(piece(Part::EventFormat, "sched", b"name: a", true)).unwrap();
        metadata.add(piece(Part::Kallsyms, "", b"first\n", true)).unwrap();
        metadata.add(piece(Part::EventFormat, "sched", b"name: b", false)).unwrap();
        metadata.add(piece(Part::EventFormat, "sched", b"bb", true)).unwrap();
        assert_eq!(metadata.kallsyms, b"ffff t first\n");
        assert_eq!(metadata.event_formats["sched"], [b"name: a".to_vec(), b"name: bbb".to_vec()]);
    }

    #[test]
    fn command_lines_that_come_again_replace_the_first() {
        let mut metadata = Metadata::default();
        metadata.add(piece(Part::Cmdlines, "", b"1 init\n", true)).unwrap();
        metadata.add(piece(Part::Cmdlines, "", b"2 k", false)).unwrap();
        metadata.add(piece(Part::Cmdlines, "", b"threadd\n", true)).unwrap();
        assert_eq!(metadata.cmdlines, b"2 kthreadd\n");
    }

    #[test]
    fn second_text_where_there_is_one_is_refused() {
        let mut metadata = Metadata::default();
        metadata.add(piece(Part::HeaderPage, "", b"x", true)).unwrap();
        let again = metadata.add(piece(Part::HeaderPage, "", b"y", true));
        assert_eq!(again, Err(MetadataFault::Twice(Part::HeaderPage)));
    }

    #[test]
    fn hostile_pieces_are_refused() {
        let mut metadata = Metadata::default();
        let nul = metadata.add(piece(Part::EventFormat, "sched", b"a\0b", true));
        assert_eq!(nul, Err(MetadataFault::NotText(Part::EventFormat)));
        for name in ["", "a\0b", "../x", "a/b", "ä", ".", &"x".repeat(NAME_BYTES_MAX + 1)] {
            assert_eq!(metadata.add(piece(Part::EventFormat, name, b"f", true)), Err(MetadataFault::Name), "{name:?}");
        }
        metadata.add(piece(Part::EventFormat, "sched", b"f", false)).unwrap();
        assert_eq!(metadata.add(piece(Part::EventFormat, "irq", b"f", true)), Err(MetadataFault::Mixed));
        let empty = metadata.add(piece(Part::FtraceFormat, "", b"", true));
        assert_eq!(empty, Err(MetadataFault::NotText(Part::FtraceFormat)));
    }

    #[test]
    fn more_than_the_bound_is_refused() {
        let mut metadata = Metadata::default();
        let large = vec![b'x'; CMDLINES_BYTES_MAX];
        metadata.add(piece(Part::Cmdlines, "", &large, false)).unwrap();
        assert_eq!(
            metadata.add(piece(Part::Cmdlines, "", b"x", true)),
            Err(MetadataFault::TooLarge(CMDLINES_BYTES_MAX))
        );
        for _ in 0..METADATA_BYTES_MAX / CMDLINES_BYTES_MAX - 1 {
            metadata.add(piece(Part::Kallsyms, "", &large, false)).unwrap();
        }
        let full = metadata.add(piece(Part::Kallsyms, "", b"x", false));
        assert_eq!(full, Err(MetadataFault::TooLarge(METADATA_BYTES_MAX)));
    }

    #[test]
    fn formats_without_end_are_refused() {
        let mut metadata = Metadata::default();
        for _ in 0..FORMATS_MAX {
            metadata.add(piece(Part::FtraceFormat, "", b"f", true)).unwrap();
        }
        let more = metadata.add(piece(Part::EventFormat, "sched", b"f", true));
        assert_eq!(more, Err(MetadataFault::TooMany(FORMATS_MAX)));
    }

    fn any_part() -> impl Strategy<Value = Part> {
        use Part::{Cmdlines, EventFormat, FtraceFormat, HeaderEvent, HeaderPage, Kallsyms, PrintkFormats};
        prop::sample::select(vec![
            HeaderPage,
            HeaderEvent,
            FtraceFormat,
            EventFormat,
            PrintkFormats,
            Kallsyms,
            Cmdlines,
        ])
    }

    proptest! {
        #[test]
        fn any_pieces_give_an_answer_and_stay_text(
            pieces in prop::collection::vec((any_part(), ".{0,5}", prop::collection::vec(any::<u8>(), 0..9), any::<bool>()), 0..40)
        ) {
            let mut metadata = Metadata::default();
            for (part, name, bytes, last) in pieces {
                let _ = metadata.add(Piece { part, name, bytes, last });
            }
            let texts = metadata.event_formats.values().flatten().chain(&metadata.ftrace_formats);
            prop_assert!(texts.chain([&metadata.kallsyms, &metadata.cmdlines]).all(|text| !text.contains(&0)));
            prop_assert!(metadata.event_formats.keys().all(|system| !system.is_empty() && !system.contains('\0')));
        }
    }
}
