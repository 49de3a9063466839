//! The 16 bytes in front of every section of a version 7 file.
//!
//! Sections follow each other without gaps: a stock reader walks all headers from the first one to the end of
//! the file.

use super::layout::{NO_DESCRIPTION, SECTION_COMPRESSED, SECTION_HEADER_BYTES};

/// A section's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SectionHeader {
    /// What it is ([`super::layout::id`]).
    pub id: u16,
    /// Bit 0: the payload is compressed.
    pub flags: u16,
    /// Where its name stands in the strings section, −1 for none. Cosmetic.
    pub description: u32,
    /// Bytes from the end of this header to the next one.
    pub bytes: u64,
}

impl SectionHeader {
    /// A section that is not compressed and has no name.
    pub fn plain(id: u16, bytes: u64) -> Self {
        Self { id, flags: 0, description: NO_DESCRIPTION, bytes }
    }

    /// As it stands in the file.
    pub fn encode(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out[0..2].copy_from_slice(&self.id.to_le_bytes());
        out[2..4].copy_from_slice(&self.flags.to_le_bytes());
        out[4..8].copy_from_slice(&self.description.to_le_bytes());
        out[8..16].copy_from_slice(&self.bytes.to_le_bytes());
        out
    }

    /// The reverse of [`encode`](Self::encode): any 16 bytes are a header.
    pub fn parse(bytes: &[u8; 16]) -> Self {
        let [i0, i1, f0, f1, d0, d1, d2, d3, size @ ..] = *bytes;
        Self {
            id: u16::from_le_bytes([i0, i1]),
            flags: u16::from_le_bytes([f0, f1]),
            description: u32::from_le_bytes([d0, d1, d2, d3]),
            bytes: u64::from_le_bytes(size),
        }
    }

    /// The payload is compressed.
    pub fn is_compressed(&self) -> bool {
        self.flags & SECTION_COMPRESSED != 0
    }
}

/// Appends a section with this payload.
pub(crate) fn push(out: &mut Vec<u8>, id: u16, payload: &[u8]) {
    out.extend(SectionHeader::plain(id, bytes_of(payload)).encode());
    out.extend(payload);
}

/// A length as files count it.
pub(crate) fn bytes_of(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("usize has at most 64 bits")
}

const _: () = assert!(SECTION_HEADER_BYTES == 16);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn header_lies_as_the_format_says() {
        let header =
            SectionHeader { id: 0x0102, flags: 0x0304, description: 0x0506_0708, bytes: 0x1112_1314_1516_1718 };
        let expected = [2, 1, 4, 3, 8, 7, 6, 5, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11];
        assert_eq!(header.encode(), expected);
    }

    proptest! {
        #[test]
        fn any_header_says_its_own_bytes(bytes: [u8; 16]) {
            prop_assert_eq!(SectionHeader::parse(&bytes).encode(), bytes);
        }
    }
}
