//! A Unix stream to QEMU with time limits: lines and counted bytes.
//!
//! In: a socket that QEMU listens on. Out: lines, bytes. Runs: in the caller's thread. Full: does not apply.
//! Trust: QEMU and the guest are ours; a line longer than 1 MiB is refused all the same.

use anyhow::{Context, Result, bail, ensure};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const LINE_SIZE_MAX: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Channel {
    stream: UnixStream,
    /// Bytes that came and were not asked for yet.
    waiting: Vec<u8>,
}

impl Channel {
    /// Connects as soon as QEMU listens.
    pub(super) fn connect(path: &Path, wait_max: Duration) -> Result<Self> {
        let end = Instant::now() + wait_max;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(Self { stream, waiting: Vec::new() }),
                Err(error) if Instant::now() > end => {
                    return Err(error).with_context(|| format!("QEMU does not listen on {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.set_write_timeout(Some(Duration::from_secs(30)))?;
        self.stream.write_all(bytes).context("QEMU does not take what we send")
    }

    /// The next line without its end.
    pub(super) fn line(&mut self, end: Instant) -> Result<Vec<u8>> {
        loop {
            if let Some(at) = self.waiting.iter().position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.waiting.drain(..=at).collect();
                line.pop();
                return Ok(line);
            }
            ensure!(self.waiting.len() < LINE_SIZE_MAX, "a line without an end");
            self.fill(end)?;
        }
    }

    /// The next `size` bytes.
    pub(super) fn bytes(&mut self, size: usize, end: Instant) -> Result<Vec<u8>> {
        while self.waiting.len() < size {
            self.fill(end)?;
        }
        Ok(self.waiting.drain(..size).collect())
    }

    fn fill(&mut self, end: Instant) -> Result<()> {
        let left = end.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "no answer in time");
        self.stream.set_read_timeout(Some(left))?;
        let mut buffer = [0; 64 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => bail!("QEMU closed the connection"),
            Ok(size) => self.waiting.extend_from_slice(&buffer[..size]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error).context("cannot read from QEMU"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (UnixStream, Channel) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (theirs, Channel { stream: ours, waiting: Vec::new() })
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn bytes_after_a_line_are_not_lost() {
        let (mut peer, mut channel) = pair();
        peer.write_all(b"head 4\n\n\0\xff\nnext\n").unwrap();
        assert_eq!(channel.line(soon()).unwrap(), b"head 4");
        assert_eq!(channel.bytes(4, soon()).unwrap(), b"\n\0\xff\n");
        assert_eq!(channel.line(soon()).unwrap(), b"next");
    }

    #[test]
    fn silent_peer_is_an_error_in_time() {
        let (peer, mut channel) = pair();
        let start = Instant::now();
        assert!(channel.line(start + Duration::from_millis(50)).is_err());
        assert!(start.elapsed() < Duration::from_secs(4));
        drop(peer);
        assert!(channel.bytes(1, soon()).unwrap_err().to_string().contains("closed"));
    }
}
