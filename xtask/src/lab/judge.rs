//! Judges.
use anyhow::Result;
use std::path::Path;

/// V.
#[derive(Debug)]
pub struct Verdict;
/// J.
pub fn judge(_host: &Path, _guest: &Path) -> Result<Verdict> { Ok(Verdict) }
impl Verdict {
    /// E.
    pub fn ensure_right(&self, _changes: usize) -> Result<()> { Ok(()) }
}
impl std::fmt::Display for Verdict { fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { write!(f, "-") } }
