//! Kernel symbols, read once where reading them is slow.
//!
//! In:    /proc/kallsyms, /proc/modules
//! Out:   pieces of the whole text
//! Runs:  on the caller's thread; the lock is not held while a piece is taken
//! Full:  a text of more than [`KEPT_BYTES_MAX`] is not kept
//! Trust: the kernel
//!
//! An emulated guest needs 0.3 s (Linux 6.1) to 1 s (6.12, 7.3) to print its symbols, more than all other steps of arming;
//! a host needs 0.07 s. So a text that was slow to read is kept for the next session of this process. It is valid as long as
//! the same modules lie at the same addresses; it lacks symbols of BPF programs that were loaded since.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use vtrace_common::wire::agent::{Failure, Part, Piece};

use super::{
    pieces::{send, send_file},
    refused,
};

const PATH: &str = "/proc/kallsyms";
/// The text of 7.3 has 10 MB.
const KEPT_BYTES_MAX: usize = 16 << 20;
/// A text that can be read in less time is not kept.
const SLOW_MIN: Duration = Duration::from_millis(200);

static KEPT: Mutex<Option<Arc<Symbols>>> = Mutex::new(None);

#[derive(Debug)]
struct Symbols {
    modules: String,
    text: Vec<u8>,
}

/// Sends all kernel symbols.
pub(super) fn send_symbols(each: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
    let modules = addresses(&fs::read_to_string("/proc/modules").unwrap_or_default());
    let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(symbols) = kept.filter(|symbols| symbols.modules == modules) {
        let sent = send(Part::Kallsyms, "", &mut &symbols.text[..], each);
        return sent.map_err(|error| refused(Path::new(PATH), &error));
    }
    let fresh = read(Path::new(PATH), modules, each)?.map(Arc::new);
    *KEPT.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
    Ok(())
}

/// Sends the file and returns it, if it is worth keeping.
fn read(path: &Path, modules: String, each: &mut dyn FnMut(Piece)) -> Result<Option<Symbols>, Failure> {
    let (mut text, mut length, mut spent) = (Vec::new(), 0, Duration::ZERO);
    let mut resumed = Instant::now();
    send_file(Part::Kallsyms, "", path, &mut |piece| {
        spent += resumed.elapsed();
        length += piece.bytes.len();
        if length <= KEPT_BYTES_MAX {
            text.extend_from_slice(&piece.bytes);
        }
        each(piece);
        resumed = Instant::now();
    })?;
    log::debug!("{length} bytes of kernel symbols in {} ms", spent.as_millis());
    text.shrink_to_fit();
    Ok((spent >= SLOW_MIN && length <= KEPT_BYTES_MAX).then_some(Symbols { modules, text }))
}

/// Name, state and address of each module: what decides where its symbols lie. Counts of users change all the time.
/// Source: `m_show` in kernel/module/procfs.c (name, size, users, who, state, address).
fn addresses(modules: &str) -> String {
    let mut key = String::new();
    for line in modules.lines() {
        let mut words = line.split_whitespace();
        for word in [words.next(), words.nth(3), words.next()].into_iter().flatten() {
            key.push_str(word);
            key.push(' ');
        }
        key.push('\n');
    }
    key
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vtrace_common::limits::PIECE_BYTES_MAX;

    use super::*;

    const MODULES: &str =
        "kvm_amd 131072 0 - Live 0xffffffffc0a00000\nkvm 1093632 1 kvm_amd, Live 0xffffffffc0800000\n";

    fn file(bytes: usize) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), vec![b's'; bytes]).unwrap();
        file
    }

    #[test]
    fn more_users_leave_the_addresses_as_they_are() {
        assert_eq!(addresses(MODULES), addresses(&MODULES.replace("1093632 1", "1093632 2")));
        assert_eq!(addresses(MODULES).lines().next(), Some("kvm_amd Live 0xffffffffc0a00000 "));
    }

    #[test]
    fn module_that_moved_or_came_or_went_is_a_change() {
        let first_gone = MODULES.split_once('\n').unwrap().1;
        for changed in [&MODULES.replace("c0a", "c0b"), &MODULES.replace("Live", "Unloading"), first_gone] {
            assert_ne!(addresses(MODULES), addresses(changed));
        }
    }

    #[test]
    fn text_that_is_quick_to_read_is_not_kept_however_slowly_it_is_taken() {
        let slowly = &mut |_| std::thread::sleep(SLOW_MIN / 2);
        assert!(read(file(3 * PIECE_BYTES_MAX).path(), String::new(), slowly).unwrap().is_none());
    }

    #[test]
    fn kept_text_is_sent_as_it_was_read() {
        let mut sent = [Vec::new(), Vec::new()];
        for sent in &mut sent {
            send_symbols(&mut |piece| sent.extend_from_slice(&piece.bytes)).unwrap();
        }
        assert!(!sent[0].is_empty() && sent[0] == sent[1]);
        let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner).clone();
        println!("kept: {:?} bytes", kept.map(|symbols| symbols.text.len()));
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(modules: String) {
            let _ = addresses(&modules);
        }
    }
}
