//! The bodies of the sections that describe a machine; in a version 6 file the same bytes follow each other.
//!
//! In:    [`Metadata`], or the bytes of a file
//! Out:   section bodies; [`Metadata`]
//! Trust: what is read comes from anyone ([`crate::trace::read::input`])

use vtrace_common::limits::{CMDLINES_BYTES_MAX, FORMATS_MAX, METADATA_BYTES_MAX, NAME_BYTES_MAX};

use super::{
    layout::{HEADER_EVENT_NAME, HEADER_PAGE_NAME, id},
    section::bytes_of,
};
use crate::{
    ftrace::metadata::Metadata,
    trace::read::input::{Input, ReadFault, Source},
};

/// Sections in the order they are written, without command lines.
pub const FIXED_SECTIONS: [u16; 5] = [id::HEADER_INFO, id::FTRACE_EVENTS, id::EVENT_FORMATS, id::KALLSYMS, id::PRINTK];

/// The body of one of [`FIXED_SECTIONS`] or of CMDLINES. `None`: a text is longer than its section can say.
pub(crate) fn body(section: u16, metadata: &Metadata) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    match section {
        id::HEADER_INFO => {
            out.extend(HEADER_PAGE_NAME);
            push_long(&mut out, &metadata.header_page);
            out.extend(HEADER_EVENT_NAME);
            push_long(&mut out, &metadata.header_event);
        }
        id::FTRACE_EVENTS => push_formats(&mut out, &metadata.ftrace_formats)?,
        id::EVENT_FORMATS => {
            out.extend(u32::try_from(metadata.event_formats.len()).ok()?.to_le_bytes());
            for (system, formats) in &metadata.event_formats {
                out.extend(system.as_bytes());
                out.push(0);
                push_formats(&mut out, formats)?;
            }
        }
        id::KALLSYMS => push_short(&mut out, &metadata.kallsyms)?,
        id::PRINTK => push_short(&mut out, &metadata.printk_formats)?,
        id::CMDLINES => push_long(&mut out, &metadata.cmdlines),
        _ => return None,
    }
    Some(out)
}

pub(crate) fn push_long(out: &mut Vec<u8>, text: &[u8]) {
    out.extend(bytes_of(text).to_le_bytes());
    out.extend(text);
}

fn push_short(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    out.extend(u32::try_from(text.len()).ok()?.to_le_bytes());
    out.extend(text);
    Some(())
}

fn push_formats(out: &mut Vec<u8>, formats: &[Vec<u8>]) -> Option<()> {
    out.extend(u32::try_from(formats.len()).ok()?.to_le_bytes());
    formats.iter().for_each(|format| push_long(out, format));
    Some(())
}

/// Reads the body of a section into `metadata`. Sections of other ids are left alone.
pub(crate) fn read<S: Source + ?Sized>(
    section: u16,
    input: &mut Input<'_, S>,
    metadata: &mut Metadata,
) -> Result<(), ReadFault> {
    match section {
        id::HEADER_INFO => {
            metadata.header_page = read_named(input, HEADER_PAGE_NAME)?;
            metadata.header_event = read_named(input, HEADER_EVENT_NAME)?;
        }
        id::FTRACE_EVENTS => metadata.ftrace_formats = read_formats(input)?,
        id::EVENT_FORMATS => read_systems(input, metadata)?,
        id::KALLSYMS => metadata.kallsyms = read_short(input, "kernel symbols")?,
        id::PRINTK => metadata.printk_formats = read_short(input, "printk formats")?,
        id::CMDLINES => {
            let count = input.u64("length of command lines")?;
            // Stock tools write as many as a kernel has; ours are bounded, theirs by what any text may have.
            const _: () = assert!(CMDLINES_BYTES_MAX < METADATA_BYTES_MAX);
            metadata.cmdlines = input.bytes(count, METADATA_BYTES_MAX, "command lines")?;
        }
        _ => {}
    }
    Ok(())
}

fn read_named<S: Source + ?Sized>(input: &mut Input<'_, S>, name: &'static [u8]) -> Result<Vec<u8>, ReadFault> {
    let offset = input.at();
    let found = input.text(name.len(), "name of a header")?;
    if name.strip_suffix(b"\0") != Some(&found) {
        return Err(ReadFault::Nonsense { what: "name of a header", offset });
    }
    let count = input.u64("length of a header")?;
    input.bytes(count, METADATA_BYTES_MAX, "header")
}

fn read_short<S: Source + ?Sized>(input: &mut Input<'_, S>, what: &'static str) -> Result<Vec<u8>, ReadFault> {
    let count = input.u32(what)?;
    input.bytes(u64::from(count), METADATA_BYTES_MAX, what)
}

fn read_formats<S: Source + ?Sized>(input: &mut Input<'_, S>) -> Result<Vec<Vec<u8>>, ReadFault> {
    let offset = input.at();
    let count = bounded(input.u32("number of formats")?, FORMATS_MAX, "list of formats", offset)?;
    let mut formats = Vec::new();
    for _ in 0..count {
        let bytes = input.u64("length of a format")?;
        formats.push(input.bytes(bytes, METADATA_BYTES_MAX, "format")?);
    }
    Ok(formats)
}

fn read_systems<S: Source + ?Sized>(input: &mut Input<'_, S>, metadata: &mut Metadata) -> Result<(), ReadFault> {
    let offset = input.at();
    let count = bounded(input.u32("number of systems")?, FORMATS_MAX, "list of systems", offset)?;
    for _ in 0..count {
        let offset = input.at();
        let name = input.text(NAME_BYTES_MAX, "name of a system")?;
        let name = String::from_utf8(name).map_err(|_| ReadFault::Nonsense { what: "name of a system", offset })?;
        let formats = read_formats(input)?;
        metadata.event_formats.entry(name).or_default().extend(formats);
    }
    Ok(())
}

fn bounded(count: u32, count_max: usize, what: &'static str, offset: u64) -> Result<u32, ReadFault> {
    let max = u64::try_from(count_max).unwrap_or(u64::MAX);
    let fits = u64::from(count) <= max;
    if fits { Ok(count) } else { Err(ReadFault::TooLarge { what, offset, count: u64::from(count), count_max: max }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [u16; 6] =
        [id::HEADER_INFO, id::FTRACE_EVENTS, id::EVENT_FORMATS, id::KALLSYMS, id::PRINTK, id::CMDLINES];

    fn sample() -> Metadata {
        Metadata {
            header_page: b"page".to_vec(),
            header_event: b"event".to_vec(),
            ftrace_formats: vec![b"one".to_vec(), b"two".to_vec()],
            event_formats: [("sched".to_owned(), vec![b"three".to_vec()]), ("irq".to_owned(), vec![])].into(),
            kallsyms: b"ffff t x\n".to_vec(),
            printk_formats: vec![],
            cmdlines: b"1 init\n".to_vec(),
            ..Metadata::default()
        }
    }

    #[test]
    fn bodies_say_what_was_put_in() {
        let mut back = Metadata::default();
        for section in ALL {
            let body = body(section, &sample()).unwrap();
            let body = body.as_slice();
            let mut input = Input::new(&body, 0, u64::MAX);
            read(section, &mut input, &mut back).unwrap();
            assert_eq!(input.left(), 0, "section {section}");
        }
        assert_eq!(back, sample());
    }

    #[test]
    fn number_of_formats_alone_asks_for_no_memory() {
        let body = u32::MAX.to_le_bytes();
        let refused = read_formats(&mut Input::new(&body.as_slice(), 0, 4));
        assert!(matches!(refused, Err(ReadFault::TooLarge { count: 0xffff_ffff, .. })));
    }

    proptest! {
        #[test]
        fn any_body_gives_an_answer(section in prop::sample::select(ALL.to_vec()), bytes: Vec<u8>) {
            let bytes = bytes.as_slice();
            let _ = read(section, &mut Input::new(&bytes, 0, u64::MAX), &mut Metadata::default());
        }

        #[test]
        fn body_with_a_changed_byte_gives_an_answer(section in prop::sample::select(ALL.to_vec()), at: prop::sample::Index, byte: u8) {
            let mut body = body(section, &sample()).unwrap();
            let at = at.index(body.len());
            body[at] = byte;
            let _ = read(section, &mut Input::new(&body.as_slice(), 0, u64::MAX), &mut Metadata::default());
        }
    }
}
