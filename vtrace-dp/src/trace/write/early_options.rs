//! Options that are known before the end of a recording, kept so that a crash cannot take them.
//!
//! In:    options, as often as more is known
//! Out:   the newest that were written whole
//! Runs:  with the writer, a few times a recording
//! Full:  two slots take turns: one that could not be written leaves the other as it was
//! Trust: a file may come from anyone: lengths are compared with the slot's, and a checksum guards against a torn
//!        write (not against a forger)
//!
//! A slot: u64 mark, u64 turn, u32 bytes, u32 0, u64 checksum, then options as in an options section.

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::trace::{
    format::{
        layout::EARLY_BYTES_MAX,
        option::{self, OptionFault},
        section::bytes_of,
    },
    read::input::{Input, ReadFault, Source},
};

/// Id and payload of an option.
pub type RawOption = (u16, Vec<u8>);

/// "vtrEarly"
const MARK: u64 = u64::from_le_bytes(*b"vtrEarly");
const HEAD_BYTES: u64 = 32;
const SLOTS: u64 = 2;

/// Bytes that both slots take.
pub(crate) const ROOM_BYTES: u64 = SLOTS * EARLY_BYTES_MAX;

/// Writes `options` to the slot whose turn it is.
///
/// # Errors
/// They are longer than a slot (`InvalidInput`), or cannot be written.
pub(crate) fn write(file: &File, early_at: u64, turn: u64, options: &[RawOption]) -> io::Result<()> {
    let payload = encode(options).map_err(|fault| io::Error::new(io::ErrorKind::InvalidInput, fault))?;
    if bytes_of(&payload) > EARLY_BYTES_MAX - HEAD_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more options than there is room for"));
    }
    let mut slot = Vec::new();
    for word in [MARK, turn, bytes_of(&payload), checksum(turn, &payload)] {
        slot.extend(word.to_le_bytes());
    }
    slot.extend(payload);
    file.write_all_at(&slot, early_at + turn % SLOTS * EARLY_BYTES_MAX)
}

/// The newest options that were written whole, and their turn. None if none were.
pub(crate) fn read<S: Source>(source: &S, early_at: u64) -> Option<(u64, Vec<RawOption>)> {
    let slot =
        |index| early_at.checked_add(index * EARLY_BYTES_MAX).and_then(|at| read_slot(source, at).ok().flatten());
    (0..SLOTS).filter_map(slot).max_by_key(|(turn, _)| *turn)
}

fn read_slot<S: Source>(source: &S, at: u64) -> Result<Option<(u64, Vec<RawOption>)>, ReadFault> {
    let mut input = Input::new(source, at, at.saturating_add(EARLY_BYTES_MAX));
    let mark = input.u64("early options")?;
    let turn = input.u64("early options")?;
    let bytes = input.u64("early options")?;
    let sum = input.u64("early options")?;
    if mark != MARK {
        return Ok(None);
    }
    let bytes_max = usize::try_from(EARLY_BYTES_MAX).expect("a slot fits into memory");
    let payload = input.bytes(bytes, bytes_max, "early options")?;
    Ok((checksum(turn, &payload) == sum).then(|| (turn, decode(&payload))))
}

/// Encodes options one after the other.
pub(crate) fn encode(options: &[RawOption]) -> Result<Vec<u8>, OptionFault> {
    let mut out = Vec::new();
    options.iter().try_for_each(|(id, payload)| option::push(&mut out, *id, payload))?;
    Ok(out)
}

/// Decodes options up to the first truncated one.
fn decode(payload: &[u8]) -> Vec<RawOption> {
    let mut input = Input::new(&payload, 0, bytes_of(payload));
    let mut options = Vec::new();
    while let Ok(id) = input.u16("option") {
        let Ok(bytes) = input.u32("option") else { break };
        let Ok(payload) = input.bytes(u64::from(bytes), payload.len(), "option") else { break };
        options.push((id, payload));
    }
    options
}

/// FNV-1a with 64 bits (draft-eastlake-fnv): enough to tell a whole write from a torn one.
fn checksum(turn: u64, payload: &[u8]) -> u64 {
    let bytes = turn.to_le_bytes();
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().chain(payload).fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options(text: &str) -> Vec<RawOption> {
        vec![(5, text.as_bytes().to_vec()), (11, vec![1; 8])]
    }

    fn bytes(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn newest_whole_options_are_found() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(read(&bytes(&file).as_slice(), 10), None);
        for turn in 0..5 {
            write(&file, 10, turn, &options(&turn.to_string())).unwrap();
            assert_eq!(read(&bytes(&file).as_slice(), 10), Some((turn, options(&turn.to_string()))));
        }
    }

    #[test]
    fn options_longer_than_a_slot_are_refused() {
        let file = tempfile::tempfile().unwrap();
        let long = vec![(5, vec![0; usize::try_from(EARLY_BYTES_MAX).unwrap()])];
        assert!(write(&file, 0, 0, &long).is_err());
        assert!(bytes(&file).is_empty());
    }

    proptest! {
        #[test]
        fn write_that_was_cut_off_leaves_those_before(cut in 0usize..100, turn in 0u64..9) {
            let file = tempfile::tempfile().unwrap();
            write(&file, 0, turn, &options("before")).unwrap();
            let before = bytes(&file);
            write(&file, 0, turn + 1, &options("a longer text that comes after")).unwrap();
            let mut torn = bytes(&file);
            let at = usize::try_from((turn + 1) % SLOTS * EARLY_BYTES_MAX).unwrap();
            let cut = (at + cut).min(torn.len());
            torn.truncate(if at == 0 { torn.len() } else { cut });
            if at == 0 {
                torn[cut..(cut + 60).min(before.len())].fill(0);
            }
            let found = read(&torn.as_slice(), 0);
            prop_assert!(found == Some((turn, options("before"))) || cut - at >= 32 + 36, "{found:?} {cut}");
        }

        #[test]
        fn any_bytes_give_an_answer(bytes: Vec<u8>, early_at: u64) {
            let _ = read(&bytes.as_slice(), early_at);
        }
    }
}
