//! Page headers: any 16 bytes, any page size.
//!
//! Input: u32 page size (little endian), then the page.

use vtrace_common::{
    limits::{PAGE_BYTES_MAX, PAGE_BYTES_MIN},
    page::{HEADER_BYTES, Header, MISSED_EVENTS, MISSED_STORED},
};

/// Parses one header.
pub fn run(bytes: &[u8]) {
    let Some((size, page)) = bytes.split_first_chunk::<4>() else { return };
    let page_bytes = usize::try_from(u32::from_le_bytes(*size)).expect("usize has 64 bits");
    let Ok(header) = Header::parse(page, page_bytes) else { return };
    let data_bytes = usize::try_from(header.data_bytes).expect("usize has 64 bits");
    assert!(HEADER_BYTES + data_bytes <= page_bytes, "{data_bytes} bytes of data accepted in {page_bytes}");
    assert_eq!(header.time.to_le_bytes(), page[..8], "another time stamp than the page's");
    let commit = header.commit().to_le_bytes();
    assert_eq!(commit[..4], page[8..12], "another commit word than the page's");
    assert!(commit[4..] == page[12..16] || page[12..16] == [0; 4], "more than the sign of bit 31 differs");
}

/// Empty, full, overlong and lossy pages of the smallest and the largest size.
pub fn seeds() -> Vec<Vec<u8>> {
    let sizes = [PAGE_BYTES_MIN, PAGE_BYTES_MAX].map(|bytes| u32::try_from(bytes).expect("limits fit u32"));
    let header = u32::try_from(HEADER_BYTES).expect("16 fits u32");
    let seed = |page_bytes: u32, commit: u64| {
        [&page_bytes.to_le_bytes()[..], &0x1234_5678_9abc_u64.to_le_bytes(), &commit.to_le_bytes()].concat()
    };
    let commits = |page_bytes: u32| {
        let full = u64::from(page_bytes - header);
        let (lossy, sign) = ((full - 8) | MISSED_EVENTS, !u64::from(u32::MAX));
        [0, full, full + 1, lossy, lossy | sign, lossy | MISSED_STORED, lossy | MISSED_STORED | sign]
    };
    sizes.iter().flat_map(|&size| commits(size).map(|commit| seed(size, commit))).collect()
}
