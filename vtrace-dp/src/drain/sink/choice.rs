//! How the pages of a guest get into its file: through the page cache, or past it.
//!
//! In:    what the person asked for; an open file
//! Out:   nothing, or a second descriptor of the file for the server to write with
//! Runs:  on record's thread
//! Trust: the kernel's word about its file systems

use std::{fs::File, io};

use crate::{
    drain::sink::direct::ALIGNMENT,
    sys::{
        direct::{Terms, reopen},
        writes::is_available,
    },
};

/// Which way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum SinkChoice {
    /// Past the page cache where that is to be had, else through it
    #[default]
    Auto,
    /// Past the page cache (O_DIRECT, io_uring)
    Direct,
    /// Through the page cache
    Buffered,
}

/// The descriptor that a server needs besides `file`, if the choice falls on writes past the page cache.
pub(crate) fn open_direct(choice: SinkChoice, file: &File) -> io::Result<Option<File>> {
    match choice {
        SinkChoice::Buffered => Ok(None),
        SinkChoice::Direct => reopen(file).map(Some),
        // What is said to be possible may still fail; then there is the other way.
        SinkChoice::Auto if is_worth_it(file) => Ok(reopen(file).ok()),
        SinkChoice::Auto => Ok(None),
    }
}

/// The file system takes writes of pages straight to its disk. One without a disk of its own only pretends to, or, like
/// btrfs, keeps sums of bytes that a guest may still change.
fn is_worth_it(file: &File) -> bool {
    let alignment = u32::try_from(ALIGNMENT).expect("4096");
    let terms = Terms::of(file).ok();
    terms.is_some_and(|terms| terms.is_on_block_device && terms.are_met_by(alignment)) && is_available()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_files_are_never_written_past_the_page_cache_unless_asked() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        assert!(open_direct(SinkChoice::Auto, &file).unwrap().is_none());
        assert!(open_direct(SinkChoice::Buffered, &file).unwrap().is_none());
    }

    #[test]
    fn what_was_asked_for_by_name_is_tried_on_any_file() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        match open_direct(SinkChoice::Direct, &file) {
            Ok(direct) => assert!(direct.is_some()),
            Err(error) => println!("skipped: no O_DIRECT in the source folder: {error}"),
        }
    }
}
