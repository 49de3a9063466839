//! The parts of a trace.dat, each encoded and parsed in one place.
//!
//! | module | what |
//! |---|---|
//! | [`layout`] | numbers and fixed parts |
//! | [`section`] | the 16 bytes before every section |
//! | [`option`] | options: ids and payloads |
//! | [`description`] | the bodies of the sections that describe a machine |
//! | [`areas`] | where the lanes lie while a file is written (a section of ours) |
//! | [`segments`] | a guest's clock (a section of ours) |
//! | [`uncertainty`] | which times are not exact, and by how much |
//! | [`compressed`] | blocks of zstd or zlib |
//!
//! In:    values to encode; bytes to parse
//! Out:   bytes; values, or a fault
//! Trust: nothing that is parsed

pub mod areas;
pub mod compressed;
pub mod description;
pub mod layout;
pub mod option;
pub mod section;
pub mod segments;
pub mod uncertainty;
