//! The host's side of the guest's shell on the second serial port; the other side is image/init.sh.
//!
//! In: scripts. Out: what they printed and their status. Runs: in the caller's thread, one command at a time.
//! Full: a command that does not end in time is an error, and the answer that comes later is passed over.
//! Trust: the guest is ours.

use super::Channel;
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};

/// How much goes to the guest before it answers: its serial driver drops what is over 64 KiB ahead of the reader.
const CHUNK_SIZE: usize = 16 * 1024;
/// A guest that says nothing for so long is nudged.
const NUDGE_AFTER: Duration = Duration::from_secs(5);

/// What a command in the guest printed (both streams) and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; 128 + the signal where one ended it.
    pub status: i32,
    /// Its output as it was.
    pub bytes: Vec<u8>,
}

impl Output {
    /// The output as text, without the line end at its end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).trim_end_matches('\n').to_owned()
    }

    /// The text of a command that must succeed.
    ///
    /// # Errors
    /// When its status is not 0.
    pub fn ok(self) -> Result<String> {
        ensure!(self.status == 0, "the command ended with status {}: {}", self.status, self.text());
        Ok(self.text())
    }
}

#[derive(Debug)]
pub(super) struct Shell {
    channel: Channel,
    commands: u64,
    has_greeted: bool,
}

impl Shell {
    pub(super) fn new(channel: Channel) -> Self {
        Self { channel, commands: 0, has_greeted: false }
    }

    /// Waits for the line that init writes once it listens.
    pub(super) fn await_greeting(&mut self, wait_max: Duration) -> Result<()> {
        let end = Instant::now() + wait_max;
        while !contains(&self.channel.line(end)?, b"@@ready ") {}
        self.has_greeted = true;
        Ok(())
    }

    /// Whether anybody ever listened.
    pub(super) fn has_greeted(&self) -> bool {
        self.has_greeted
    }

    pub(super) fn run(&mut self, script: &str, wait_max: Duration) -> Result<Output> {
        ensure!(script.len() < CHUNK_SIZE, "a command of {} bytes is too long: put it into a file", script.len());
        self.begin(script)?;
        self.answer(Instant::now() + wait_max, true)
    }

    pub(super) fn put(&mut self, bytes: &[u8], guest: &str, wait_max: Duration) -> Result<()> {
        self.run(&format!(": >'{guest}'"), wait_max)?.ok()?;
        for chunk in bytes.chunks(CHUNK_SIZE) {
            self.begin(&format!("head -c {} <&3 >>'{guest}'", chunk.len()))?;
            self.channel.send(chunk)?;
            self.answer(Instant::now() + wait_max, false)?.ok()?;
        }
        Ok(())
    }

    fn begin(&mut self, script: &str) -> Result<()> {
        self.commands += 1;
        self.channel.send(format!("{} {}\n", self.commands, base64(script.as_bytes())).as_bytes())
    }

    /// The answer to the last command; late answers to earlier ones are passed over. An emulated serial port now and
    /// then sits on what it has until it is touched again: an empty line, whose echo is ignored, does that.
    fn answer(&mut self, end: Instant, may_nudge: bool) -> Result<Output> {
        loop {
            let nudge_at = if may_nudge { end.min(Instant::now() + NUDGE_AFTER) } else { end };
            let line = match self.channel.line(nudge_at) {
                Err(_) if nudge_at < end && nudge_at <= Instant::now() => {
                    self.channel.send(b"\n")?;
                    continue;
                }
                line => line?,
            };
            ensure!(!contains(&line, b"@@ready "), "the guest booted again before it answered");
            let Some((id, status, size)) = answer_of(&line) else { continue };
            let bytes = self.channel.bytes(size, end).context("the answer is cut off")?;
            if id == self.commands {
                return Ok(Output { status, bytes });
            }
        }
    }
}

/// `@@answer ID STATUS SIZE`
fn answer_of(line: &[u8]) -> Option<(u64, i32, usize)> {
    let mut words = std::str::from_utf8(line).ok()?.strip_prefix("@@answer ")?.split_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

fn contains(line: &[u8], part: &[u8]) -> bool {
    line.windows(part.len()).any(|window| window == part)
}

/// Base64 with padding (RFC 4648 section 4).
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let byte = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            let letter = LETTERS[usize::try_from(bits >> (18 - 6 * place) & 63).expect("six bits")];
            text.push(if place <= group.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        let examples =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("\u{ff}?~", "w78/fg==")];
        for (plain, encoded) in examples {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }

    #[test]
    fn answer_line_is_told_from_other_lines() {
        assert_eq!(answer_of(b"@@answer 7 127 12"), Some((7, 127, 12)));
        assert_eq!(answer_of(b"@@answer 7 x 12"), None);
        assert_eq!(answer_of(b"noise"), None);
    }
}
