//! The fields of events, as a file's formats tell them.
//!
//! In:    texts of events/SYSTEM/EVENT/format; the bytes of an event
//! Out:   numbers and bytes of its fields
//! Runs:  pure
//! Trust: nothing: formats and events come from guests; a field that does not lie in its event has no value
//!
//! Source: kernel/trace/trace_events.c (`f_show()`); `__data_loc` in include/trace/stages/stage1_struct_define.h.

use std::collections::HashMap;

use super::metadata::Metadata;

/// How one kind of event lies in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EventFormat {
    /// Its number, the first two bytes of every such event.
    pub id: u16,
    /// Its system.
    pub system: String,
    /// Its name.
    pub name: String,
    /// Its fields, the common ones first.
    pub fields: Vec<Field>,
}

/// One field of an event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Field {
    /// Its name, without brackets.
    pub name: String,
    /// Where it begins in the event.
    pub offset: usize,
    /// Its bytes there.
    pub bytes: usize,
    /// A number with a sign.
    pub signed: bool,
    /// Where its contents are.
    pub location: FieldLocation,
}

/// Where the contents of a field are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FieldLocation {
    /// In the field itself.
    Inline,
    /// The field says where: length << 16 | offset in the event.
    DataLocation,
    /// The same, from the end of the field on.
    RelativeLocation,
}

impl EventFormat {
    /// Reads a format. `None`: there is no name or no number in it.
    pub fn parse(system: &str, text: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(text);
        let line = |start: &str| text.lines().find_map(|line| line.strip_prefix(start)).map(str::trim);
        let name = line("name:")?.to_owned();
        let id = line("ID:")?.parse().ok()?;
        let fields = text.lines().filter_map(Field::parse).collect();
        Some(Self { id, system: system.to_owned(), name, fields })
    }

    /// The field of this name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.iter().find(|field| field.name == name)
    }
}

impl Field {
    /// `field:TYPE NAME[N]; offset:N; size:N; signed:N;`
    fn parse(line: &str) -> Option<Self> {
        let mut parts = line.trim().strip_prefix("field:")?.split(';').map(str::trim);
        let declaration = parts.next()?;
        let mut number = |name: &str| parts.next()?.strip_prefix(name)?.parse::<usize>().ok();
        let (offset, bytes) = (number("offset:")?, number("size:")?);
        let signed = number("signed:") == Some(1);
        let location = match declaration.split_whitespace().next()? {
            "__data_loc" => FieldLocation::DataLocation,
            "__rel_loc" => FieldLocation::RelativeLocation,
            _ => FieldLocation::Inline,
        };
        let name = declaration.rsplit(char::is_whitespace).find(|word| !word.starts_with('['))?;
        let name = name.trim_start_matches('*').split('[').next()?;
        Some(Self { name: name.to_owned(), offset, bytes, signed, location })
    }

    fn own<'e>(&self, event: &'e [u8]) -> Option<&'e [u8]> {
        event.get(self.offset..self.offset.checked_add(self.bytes)?)
    }

    /// Its value in `event`: a number of 1, 2, 4 or 8 bytes; one with a sign is extended. Hot.
    pub fn number(&self, event: &[u8]) -> Option<u64> {
        let bytes = self.own(event)?;
        let (&last, rest) = bytes.split_last()?;
        if !matches!(rest.len(), 0 | 1 | 3 | 7) {
            return None;
        }
        let fill = if self.signed && last & 0x80 != 0 { 0xff } else { 0 };
        let mut word = [fill; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        Some(u64::from_le_bytes(word))
    }

    /// Its value as a thread, a CPU, a vector: nothing that is negative or long.
    pub fn small(&self, event: &[u8]) -> Option<u32> {
        u32::try_from(self.number(event)?).ok()
    }

    /// Its contents in `event`, wherever they are.
    pub fn contents<'e>(&self, event: &'e [u8]) -> Option<&'e [u8]> {
        let own = self.own(event)?;
        let base = match self.location {
            FieldLocation::Inline => return Some(own),
            FieldLocation::DataLocation => 0,
            FieldLocation::RelativeLocation => self.offset + self.bytes,
        };
        let word = u32::from_le_bytes(own.try_into().ok()?);
        let start = usize::try_from(word & 0xffff).ok()?.checked_add(base)?;
        event.get(start..start.checked_add(usize::try_from(word >> 16).ok()?)?)
    }
}

/// All formats of a file.
#[derive(Clone, Debug, Default)]
pub struct Formats(HashMap<u16, EventFormat>);

impl Formats {
    /// Those of ftrace itself and of all systems. Formats that make no sense are left out.
    pub fn parse(metadata: &Metadata) -> Self {
        let own = metadata.ftrace_formats.iter().map(|text| ("ftrace", text));
        let systems = metadata.event_formats.iter();
        let all = own.chain(systems.flat_map(|(system, texts)| texts.iter().map(|text| (system.as_str(), text))));
        let parsed = all.filter_map(|(system, text)| EventFormat::parse(system, text));
        Self(parsed.map(|format| (format.id, format)).collect())
    }

    /// The format of an event, by its first two bytes. Hot.
    pub fn of_event(&self, event: &[u8]) -> Option<&EventFormat> {
        self.0.get(&id(event)?)
    }

    /// All of them, in no order.
    pub fn each(&self) -> impl Iterator<Item = &EventFormat> {
        self.0.values()
    }
}

/// An event's number. Hot.
pub fn id(event: &[u8]) -> Option<u16> {
    Some(u16::from_le_bytes(event.get(..2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FORMAT: &str = "name: sample\nID: 372\nformat:\n\
        \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
        \tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
        \tfield:char comm[4];\toffset:8;\tsize:4;\tsigned:0;\n\
        \tfield:__data_loc char[] name;\toffset:12;\tsize:4;\tsigned:0;\n\
        \tfield:__rel_loc char[] rest;\toffset:16;\tsize:4;\tsigned:0;\n\
        \tfield:const void *where;\toffset:20;\tsize:8;\tsigned:0;\n\n\
        print fmt: \"%s field:int x; offset:0; size:4;\", REC->comm\n";

    fn event() -> Vec<u8> {
        let mut event = vec![0x74, 1, 0, 0];
        event.extend((-7i32).to_le_bytes());
        event.extend(b"abc\0");
        event.extend((3u32 << 16 | 28).to_le_bytes());
        event.extend((2u32 << 16 | 11).to_le_bytes());
        event.extend(0x1122_3344_5566_7788u64.to_le_bytes());
        event.extend(b"namrs");
        event
    }

    #[test]
    fn fields_are_found_by_name_and_read_where_they_lie() {
        let format = EventFormat::parse("sched", FORMAT.as_bytes()).unwrap();
        let event = event();
        let field = |name| format.field(name).unwrap();
        assert_eq!((format.id, format.name.as_str(), format.fields.len()), (372, "sample", 6));
        assert_eq!(field("common_type").small(&event), Some(372));
        assert_eq!(field("common_pid").number(&event), Some((-7i64).cast_unsigned()));
        assert_eq!(field("common_pid").small(&event), None);
        assert_eq!(field("comm").contents(&event), Some(b"abc\0".as_slice()));
        assert_eq!(field("name").contents(&event), Some(b"nam".as_slice()));
        assert_eq!(field("rest").contents(&event), Some(b"rs".as_slice()));
        assert_eq!(field("where").number(&event), Some(0x1122_3344_5566_7788));
    }

    #[test]
    fn field_beyond_its_event_has_no_value() {
        let format = EventFormat::parse("sched", FORMAT.as_bytes()).unwrap();
        let event = event();
        assert_eq!(format.field("where").unwrap().number(&event[..27]), None);
        assert_eq!(format.field("name").unwrap().contents(&event[..30]), None);
    }

    #[test]
    fn format_of_an_event_is_found_by_its_number() {
        let metadata = Metadata {
            ftrace_formats: vec![b"nonsense".to_vec()],
            event_formats: [("sched".to_owned(), vec![FORMAT.as_bytes().to_vec()])].into(),
            ..Metadata::default()
        };
        let formats = Formats::parse(&metadata);
        assert_eq!(formats.of_event(&event()).unwrap().name, "sample");
        assert_eq!(formats.of_event(&[1]), None);
    }

    proptest! {
        #[test]
        fn any_format_and_event_give_an_answer(text in "(name: [a-z]{1,4}\n|ID: [0-9]{1,6}\n|\tfield:[a-z_ \\[\\]*]{0,20};\toffset:[0-9]{1,20};\tsize:[0-9]{1,20};\tsigned:[01];\n){0,8}", event: Vec<u8>) {
            if let Some(format) = EventFormat::parse("any", text.as_bytes()) {
                for field in &format.fields {
                    let _ = (field.number(&event), field.contents(&event), field.small(&event));
                }
            }
        }

        #[test]
        fn changed_byte_of_a_format_gives_an_answer(at in 0..FORMAT.len(), byte: u8) {
            let mut text = FORMAT.as_bytes().to_vec();
            text[at] = byte;
            if let Some(format) = EventFormat::parse("any", &text) {
                for field in &format.fields {
                    let _ = (field.number(&event()), field.contents(&event()));
                }
            }
        }
    }
}
