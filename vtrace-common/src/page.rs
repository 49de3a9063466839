//! The header of one ftrace sub-buffer: parse and validate.
//!
//! In:    the first 16 bytes of a page (guest-controlled)
//! Out:   [`Header`], or the reason it is refused
//! Trust: nothing
//!
//! Layout (kernel/trace/ring_buffer.c, `struct buffer_data_page`; `events/header_page` in tracefs): u64 time stamp,
//! u64 commit, data. The low 27 bits of commit are the data's length; bit 31 says that events before this page were
//! lost; bit 30 that their number (u64) follows the data. Bit 31 comes with ones in all higher bits: to the kernel
//! it is an int, `1 << 31`, and adding that to a long subtracts. (Other writers of trace.dat set bit 31 alone.)

/// Bytes of a page's header on a 64-bit kernel.
pub const HEADER_BYTES: usize = 16;
/// Commit bit: events were lost before this page (`RB_MISSED_EVENTS`).
pub const MISSED_EVENTS: u64 = 1 << 31;
/// Commit bit: the number of lost events follows the data (`RB_MISSED_STORED`).
pub const MISSED_STORED: u64 = 1 << 30;
/// Commit bits that hold the data's length.
pub const LENGTH_MASK: u64 = (1 << 27) - 1;

const LOW_MASK: u64 = u32::MAX as u64;

/// What a page says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Time stamp of the first event, in the trace clock's unit.
    pub time: u64,
    /// Bytes of events after the header.
    pub data_bytes: u32,
    /// Events before this page were lost.
    pub missed: bool,
    /// The number of lost events follows the data.
    pub missed_stored: bool,
}

/// Why a page is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Fewer bytes than a header.
    Short,
    /// The commit word claims more data than the page holds.
    Overlong {
        /// What it claims.
        data_bytes: u32,
    },
    /// Bits are set that no kernel sets.
    UnknownBits,
}

impl Header {
    /// Parses the header of a page of `page_bytes`. Hot.
    pub fn parse(bytes: &[u8], page_bytes: usize) -> Result<Self, Fault> {
        let room = page_bytes.checked_sub(HEADER_BYTES).ok_or(Fault::Short)?;
        let (time, commit) = match (word(bytes, 0), word(bytes, 8)) {
            (Some(time), Some(commit)) => (time, commit),
            _ => return Err(Fault::Short),
        };
        let missed = commit & MISSED_EVENTS != 0;
        let is_sign = missed && commit | LOW_MASK == u64::MAX;
        let known = LENGTH_MASK | MISSED_EVENTS | MISSED_STORED | if is_sign { !LOW_MASK } else { 0 };
        if commit & !known != 0 {
            return Err(Fault::UnknownBits);
        }
        let length = commit & LENGTH_MASK;
        let data_bytes = u32::try_from(length).unwrap_or(u32::MAX);
        if length > u64::try_from(room).unwrap_or(0) {
            return Err(Fault::Overlong { data_bytes });
        }
        Ok(Self { time, data_bytes, missed, missed_stored: commit & MISSED_STORED != 0 })
    }

    /// The commit word with which a kernel says the same.
    pub fn commit(&self) -> u64 {
        let missed = if self.missed { MISSED_EVENTS | !LOW_MASK } else { 0 };
        let stored = if self.missed_stored { MISSED_STORED } else { 0 };
        u64::from(self.data_bytes) | missed | stored
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    extern crate alloc;
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn page(time: u64, commit: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&time.to_le_bytes());
        bytes[8..].copy_from_slice(&commit.to_le_bytes());
        bytes
    }

    #[test]
    fn full_page_is_accepted_and_one_byte_more_is_refused() {
        assert_eq!(Header::parse(&page(7, 4080), 4096).unwrap().data_bytes, 4080);
        assert_eq!(Header::parse(&page(7, 4081), 4096), Err(Fault::Overlong { data_bytes: 4081 }));
    }

    #[test]
    fn bits_no_kernel_sets_are_refused() {
        assert_eq!(Header::parse(&page(7, 1 << 29), 4096), Err(Fault::UnknownBits));
        assert_eq!(Header::parse(&page(7, 1 << 63), 4096), Err(Fault::UnknownBits));
    }

    /// Read from a kernel of 6.18 that had overwritten events.
    #[test]
    fn page_after_a_gap_is_accepted_as_the_kernel_writes_it() {
        let header = Header::parse(&page(0xcc8_10d6_b908, 0xffff_ffff_c000_0fc0), 4096).unwrap();
        assert_eq!(header, Header { time: 0xcc8_10d6_b908, data_bytes: 0xfc0, missed: true, missed_stored: true });
        assert_eq!(header.commit(), 0xffff_ffff_c000_0fc0);
        assert_eq!(Header::parse(&page(0xcc8_10d6_b908, 0xc000_0fc0), 4096), Ok(header), "without the sign");
    }

    #[test]
    fn sign_belongs_to_a_gap_and_is_whole() {
        assert_eq!(Header::parse(&page(7, 0xffff_ffff_4000_0fc0), 4096), Err(Fault::UnknownBits));
        assert_eq!(Header::parse(&page(7, 0x7fff_ffff_8000_0fc0), 4096), Err(Fault::UnknownBits));
        assert_eq!(Header::parse(&page(7, 0xffff_ffff_a000_0fc0), 4096), Err(Fault::UnknownBits));
    }

    #[test]
    fn fifteen_bytes_are_no_header() {
        assert_eq!(Header::parse(&page(0, 0)[..15], 4096), Err(Fault::Short));
    }

    #[test]
    fn page_smaller_than_its_header_is_refused() {
        assert_eq!(Header::parse(&page(0, 0), 15), Err(Fault::Short));
        assert_eq!(Header::parse(&page(0, 0), 16).unwrap().data_bytes, 0);
    }

    proptest! {
        #[test]
        fn header_comes_back_from_its_own_commit_word(time: u64, data_bytes in 0u32..4081, missed: bool, stored: bool) {
            let header = Header { time, data_bytes, missed, missed_stored: stored };
            prop_assert_eq!(Header::parse(&page(time, header.commit()), 4096), Ok(header));
            prop_assert_eq!(Header::parse(&page(time, header.commit() & LOW_MASK), 4096), Ok(header));
        }

        #[test]
        fn accepted_header_says_what_the_commit_word_says(low: u32, high in 0usize..3, page_bytes in 0usize..1 << 28) {
            let commit = u64::from(low) | [0, !LOW_MASK, 1 << 40][high];
            if let Ok(header) = Header::parse(&page(7, commit), page_bytes) {
                prop_assert_eq!(header.commit() & LOW_MASK, commit & LOW_MASK);
                prop_assert!(header.data_bytes as usize + HEADER_BYTES <= page_bytes);
            }
        }

        #[test]
        fn any_bytes_give_an_answer(bytes: Vec<u8>, page_bytes: usize) {
            let _ = Header::parse(&bytes, page_bytes);
        }
    }
}
