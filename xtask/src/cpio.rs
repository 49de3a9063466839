//! A cpio archive as the kernel unpacks it for an initramfs ("newc", Documentation/driver-api/early-userspace/buffer-format).
//!
//! In: folders, files and links. Out: bytes that depend on nothing else: no time, no owner but root.
//! Runs: in memory. Full: a file over 4 GiB is refused. Trust: the caller's own files.

use anyhow::{Context, Result};
use std::collections::BTreeSet;

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

/// An archive being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    folders: BTreeSet<String>,
}

impl Archive {
    /// A folder and those above it; once is enough.
    pub fn folder(&mut self, path: &str) -> Result<()> {
        let path = path.trim_matches('/');
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        for end in ends.filter(|&end| end > 0) {
            if self.folders.insert(path[..end].to_owned()) {
                self.entry(&path[..end], FOLDER, &[])?;
            }
        }
        Ok(())
    }

    /// A file that is read.
    pub fn file(&mut self, path: &str, data: &[u8]) -> Result<()> {
        self.leaf(path, FILE, data)
    }

    /// A file that is run.
    pub fn program(&mut self, path: &str, data: &[u8]) -> Result<()> {
        self.leaf(path, PROGRAM, data)
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.leaf(path, LINK, target.as_bytes())
    }

    /// The whole archive.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.inode = 0;
        self.record(0, "TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn leaf(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        let path = path.trim_start_matches('/');
        if let Some((folder, _)) = path.rsplit_once('/') {
            self.folder(folder)?;
        }
        self.entry(path, mode, data)
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.inode += 1;
        self.record(self.inode, path, mode, data)
    }

    fn record(&mut self, inode: u32, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        let size = u32::try_from(data.len()).with_context(|| format!("{path} is too large for an initramfs"))?;
        let name_size = u32::try_from(path.len() + 1)?;
        // inode, mode, uid, gid, links, mtime, size, 4 device numbers, name size with its NUL, checksum (unused)
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    /// Headers and data start at multiples of 4.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::default();
        archive.program("/bin/tool", b"12345").unwrap();
        archive.file("etc/deep/note", b"").unwrap();
        archive.link("/bin/other", "tool").unwrap();
        archive.finish().unwrap()
    }

    /// Mode, name and data of each record.
    fn records(bytes: &[u8]) -> Vec<(u32, String, Vec<u8>)> {
        let (mut at, mut records) = (0, Vec::new());
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |index: usize| {
                let start = at + 6 + 8 * index;
                u32::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16).unwrap()
            };
            let (size, name_size) = (usize::try_from(field(6)).unwrap(), usize::try_from(field(11)).unwrap());
            let name = String::from_utf8(bytes[at + 110..at + 110 + name_size - 1].to_vec()).unwrap();
            let data = (at + 110 + name_size).next_multiple_of(4);
            records.push((field(1), name, bytes[data..data + size].to_vec()));
            at = (data + size).next_multiple_of(4);
        }
        records
    }

    #[test]
    fn folders_come_once_and_before_what_lies_in_them() {
        let names: Vec<String> = records(&sample()).into_iter().map(|(_, name, _)| name).collect();
        assert_eq!(names, ["bin", "bin/tool", "etc", "etc/deep", "etc/deep/note", "bin/other", "TRAILER!!!"]);
    }

    #[test]
    fn records_keep_mode_and_data() {
        let records = records(&sample());
        assert_eq!(records[1], (0o100_755, "bin/tool".to_owned(), b"12345".to_vec()));
        assert_eq!(records[5], (0o120_777, "bin/other".to_owned(), b"tool".to_vec()));
    }

    #[test]
    fn same_files_make_the_same_bytes() {
        assert_eq!(sample(), sample());
        assert_eq!(sample().len() % 4, 0);
    }
}
