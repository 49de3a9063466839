//! What stock trace-cmd writes compressed: blocks of zstd or zlib.
//!
//! In:    a block: u32 compressed bytes, u32 bytes, data; or data of our own
//! Out:   the data; or a block
//! Full:  a block says how large it is; what is larger than its bound, or than it says, is refused
//! Trust: nothing; both decoders are memory safe. Only our own data meets the encoder in C
//!
//! Source: lib/trace-cmd/trace-compress.c of trace-cmd.

use std::io::{self, Read, Write};

use flate2::{read::ZlibDecoder, write::ZlibEncoder};
use ruzstd::decoding::StreamingDecoder;

use super::section::bytes_of;
use crate::trace::read::input::{Input, ReadFault, Source};

/// Bytes of one chunk of pages; stock trace-cmd packs ten pages into one.
pub const CHUNK_BYTES_MAX: usize = 16 << 20;
/// What a block may take more than what is in it, if it cannot be compressed.
const OVERHEAD_BYTES_MAX: usize = 64 << 10;

/// zstd's own choice; 1 is as fast here and packs 2 % worse.
const ZSTD_LEVEL: i32 = 3;

/// How a file is compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum Compression {
    /// Not at all
    #[default]
    None,
    /// The best there is (also spelled `any`)
    #[value(alias = "any")]
    Zstd,
    /// Read by few: Debian's trace-cmd 3.1 cannot
    Zlib,
}

impl Compression {
    /// By the name in the head of a file.
    pub fn named(name: &[u8]) -> Option<Self> {
        match name {
            b"none" => Some(Self::None),
            b"zstd" => Some(Self::Zstd),
            b"zlib" => Some(Self::Zlib),
            _ => None,
        }
    }

    /// Its name, and the version of the format, as they stand in the head of a file.
    pub fn name(self) -> (&'static str, &'static str) {
        match self {
            Self::None => ("none", ""),
            Self::Zstd => ("zstd", "1.5"),
            Self::Zlib => ("zlib", "1.2"),
        }
    }

    /// Makes a block of `data`.
    ///
    /// # Errors
    /// The encoder fails, or `data` is longer than a block can say.
    pub fn pack(self, data: &[u8]) -> io::Result<Vec<u8>> {
        let packed = match self {
            Self::None => data.to_vec(),
            Self::Zstd => zstd::bulk::compress(data, ZSTD_LEVEL)?,
            Self::Zlib => {
                let mut encoder = ZlibEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(data)?;
                encoder.finish()?
            }
        };
        let long = |_| io::Error::new(io::ErrorKind::FileTooLarge, "a block of more than 4 GiB");
        let mut block = Vec::with_capacity(8 + packed.len());
        for bytes in [packed.len(), data.len()] {
            block.extend(u32::try_from(bytes).map_err(long)?.to_le_bytes());
        }
        block.extend(packed);
        Ok(block)
    }

    /// Reads the next block, at most `bytes_max` of data.
    ///
    /// # Errors
    /// It is larger, reaches beyond its end, or holds anything but what it says.
    pub fn block<S: Source + ?Sized>(self, input: &mut Input<'_, S>, bytes_max: usize) -> Result<Vec<u8>, ReadFault> {
        let offset = input.at();
        let packed = input.u32("compressed length of a block")?;
        let count = u64::from(input.u32("length of a block")?);
        let count_max = u64::try_from(bytes_max).unwrap_or(u64::MAX);
        if count > count_max {
            return Err(ReadFault::TooLarge { what: "compressed block", offset, count, count_max });
        }
        let packed_max = bytes_max.saturating_add(OVERHEAD_BYTES_MAX);
        let packed = input.bytes(u64::from(packed), packed_max, "compressed block")?;
        self.unpack(&packed, count).ok_or(ReadFault::Nonsense { what: "compressed block", offset })
    }

    /// `None`: these bytes do not become exactly `count`.
    fn unpack(self, packed: &[u8], count: u64) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        let one_more = count + 1;
        match self {
            Self::None => out.extend(packed),
            Self::Zlib => drop(ZlibDecoder::new(packed).take(one_more).read_to_end(&mut out).ok()?),
            Self::Zstd => drop(StreamingDecoder::new(packed).ok()?.take(one_more).read_to_end(&mut out).ok()?),
        }
        (bytes_of(&out) == count).then_some(out)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(kind: Compression, data: &[u8], said: usize) -> Vec<u8> {
        let mut block = kind.pack(data).unwrap();
        block[4..8].copy_from_slice(&u32::try_from(said).unwrap().to_le_bytes());
        block
    }

    fn read(kind: Compression, block: &[u8], bytes_max: usize) -> Result<Vec<u8>, ReadFault> {
        kind.block(&mut Input::new(&block, 0, u64::MAX), bytes_max)
    }

    #[test]
    fn block_of_more_or_less_than_it_says_is_refused() {
        for kind in [Compression::Zstd, Compression::Zlib] {
            let data = [7; 4096];
            assert_eq!(read(kind, &block(kind, &data, 4096), 4096).unwrap(), data);
            for said in [0, 4095, 4097] {
                let refused = read(kind, &block(kind, &data, said), 1 << 20);
                assert!(matches!(refused, Err(ReadFault::Nonsense { .. })), "{said}");
            }
        }
    }

    #[test]
    fn block_beyond_its_bound_asks_for_no_memory() {
        let block = block(Compression::Zstd, &[0; 1 << 20], 1 << 20);
        assert!(block.len() < 4096, "a small block can be large");
        assert!(matches!(read(Compression::Zstd, &block, 4096), Err(ReadFault::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn block_says_what_was_put_in(zstd: bool, data: Vec<u8>) {
            let kind = if zstd { Compression::Zstd } else { Compression::Zlib };
            prop_assert_eq!(read(kind, &block(kind, &data, data.len()), 1 << 20).unwrap(), data);
        }

        #[test]
        fn any_block_gives_an_answer(zstd: bool, bytes: Vec<u8>, at: prop::sample::Index, byte: u8) {
            let kind = if zstd { Compression::Zstd } else { Compression::Zlib };
            let _ = read(kind, &bytes, 1 << 16);
            let mut changed = block(kind, &bytes, bytes.len());
            let at = at.index(changed.len());
            changed[at] = byte;
            let _ = read(kind, &changed, 1 << 16);
        }
    }
}
