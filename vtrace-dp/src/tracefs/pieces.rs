//! Texts as the pieces that a machine's description is sent in.
//!
//! In:    files of tracefs and procfs, texts
//! Out:   pieces of at most `PIECE_BYTES_MAX`; the last one of a text is shorter and may be empty
//! Runs:  on the caller's thread; a piece is read when the one before has been taken
//! Full:  one piece is held
//! Trust: the kernel

use std::{
    fs::File,
    io::{self, ErrorKind, Read},
    path::Path,
};

use vtrace_common::{
    limits::PIECE_BYTES_MAX,
    wire::agent::{Failure, Part, Piece},
};

use super::refused;

/// Sends a file; one that this kernel does not have is sent as an empty text.
pub(super) fn send_file(part: Part, name: &str, path: &Path, each: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
    let sent = match File::open(path) {
        Ok(mut file) => send(part, name, &mut file, each),
        Err(error) if error.kind() == ErrorKind::NotFound => send(part, name, &mut io::empty(), each),
        Err(error) => Err(error),
    };
    sent.map_err(|error| refused(path, &error))
}

/// Sends a text in pieces; the last one is shorter than the others and may be empty.
pub(super) fn send(part: Part, name: &str, text: &mut dyn Read, each: &mut dyn FnMut(Piece)) -> io::Result<()> {
    let mut block = vec![0; PIECE_BYTES_MAX];
    loop {
        let filled = fill(&mut block, text)?;
        let last = filled < PIECE_BYTES_MAX;
        each(Piece { part, name: name.into(), bytes: block[..filled].to_vec(), last });
        if last {
            return Ok(());
        }
    }
}

/// Reads until `block` is full or the text ends, asking for all that is left: see [`super::read`] for why.
fn fill(block: &mut [u8], text: &mut dyn Read) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match text.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(text: &[u8]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        send(Part::Kallsyms, "name", &mut &text[..], &mut |piece| pieces.push(piece)).unwrap();
        pieces
    }

    #[test]
    fn empty_text_is_one_last_piece() {
        let pieces = pieces(b"");
        assert_eq!(pieces.len(), 1);
        assert!(pieces[0].last && pieces[0].bytes.is_empty());
    }

    #[test]
    fn absent_file_is_an_empty_text() {
        let mut pieces = Vec::new();
        let path = Path::new("/proc/self/no such file");
        send_file(Part::PrintkFormats, "", path, &mut |piece| pieces.push(piece)).unwrap();
        assert_eq!(pieces.len(), 1);
    }

    proptest! {
        #[test]
        fn pieces_put_together_are_the_text(length in 0usize..3 * PIECE_BYTES_MAX + 2, whole: bool) {
            let length = if whole { length / PIECE_BYTES_MAX * PIECE_BYTES_MAX } else { length };
            let text: Vec<u8> = (0..=250).cycle().take(length).collect();
            let pieces = pieces(&text);
            prop_assert!(pieces.iter().all(|piece| piece.bytes.len() <= PIECE_BYTES_MAX));
            prop_assert_eq!(pieces.iter().filter(|piece| piece.last).count(), 1);
            prop_assert!(pieces.last().unwrap().last);
            prop_assert_eq!(pieces.into_iter().flat_map(|piece| piece.bytes).collect::<Vec<_>>(), text);
        }
    }
}
