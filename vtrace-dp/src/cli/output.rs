//! Standard output, standard error, exit status.
//!
//! In:    text
//! Out:   data on stdout, everything else on stderr

use std::io::{self, Write};

use super::complaint::Complaint;

/// Text for a person, on stderr. A closed stderr is not an error.
pub(super) fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", text.trim_end());
}

/// Data, on stdout. A reader that has ended (`| head`) is not an error.
pub(super) fn put(text: &str) -> Result<(), Complaint> {
    match writeln!(io::stdout().lock(), "{}", text.trim_end()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Complaint::new("cannot write to stdout", error, "free space where stdout is redirected to"))
        }
        _ => Ok(()),
    }
}

/// Data as JSON with line breaks, on stdout.
pub(super) fn put_json(data: &impl serde::Serialize) -> Result<(), Complaint> {
    put(&serde_json::to_string_pretty(data).expect("plain data"))
}
