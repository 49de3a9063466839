//! Rewrites a finished file in the form that was asked for: another version, compressed, with the host's instances in
//! it; or as a new inode, where a server may still write to the old one.
//!
//! In:    a finished file, finished files of instances
//! Out:   one file of the same name; the parts are removed
//! Runs:  on record's thread, as the last step
//! Full:  a disk without room for both leaves the files as they were, with an error
//! Trust: as [`crate::trace::write::pack`]

use std::{fs::File, io, path::PathBuf};

use super::output::{create_locked, new_entry};
use crate::{
    sys::folder_entry::FolderEntry,
    trace::{
        format::compressed::Compression,
        write::pack::{Form, FormatVersion, PackFault, pack, pack_instance},
    },
};

/// A finished file of an instance.
#[derive(Debug)]
pub(crate) struct PartFile {
    pub(crate) name: String,
    pub(crate) entry: FolderEntry,
    pub(crate) file: File,
}

/// The form that a finished file is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct WantedForm<'a> {
    pub(crate) form: Form,
    /// Its pages belong to an instance of this name; the top buffer is empty.
    pub(crate) instance: Option<&'a str>,
    /// It is written to a new inode in any case: a server may have the old one open.
    pub(crate) anew: bool,
}

/// Why a finished file keeps its form.
#[derive(Debug, thiserror::Error)]
#[error("{} {}{}", .path.display(), if is_plain(*.form) { "stays as it is" } else { "stays version 7, not compressed" }, remaining(.parts))]
pub(crate) struct ReformError {
    path: PathBuf,
    form: Form,
    /// Files of instances that stay.
    parts: Vec<PathBuf>,
    source: ReformCause,
}

/// The operation that failed.
#[derive(Debug, thiserror::Error)]
enum ReformCause {
    #[error("{what}")]
    File { what: &'static str, source: io::Error },
    #[error(transparent)]
    Pack(#[from] PackFault),
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> ReformCause {
    move |source| ReformCause::File { what, source }
}

/// Where the instances are, as the end of a message.
fn remaining(parts: &[PathBuf]) -> String {
    if parts.is_empty() {
        return String::new();
    }
    let paths: Vec<String> = parts.iter().map(|path| path.display().to_string()).collect();
    format!(" (its instances are in {})", paths.join(", "))
}

/// Whether a file has this form when it is finished.
fn is_plain(form: Form) -> bool {
    form.version == FormatVersion::V7 && form.compression == Compression::None
}

/// Rewrites the finished file `entry` in the wanted form. Its new size in bytes; `None` if it has that form already.
pub(crate) fn reform(
    entry: &FolderEntry,
    file: &File,
    parts: Vec<PartFile>,
    wanted: WantedForm<'_>,
) -> Result<Option<u64>, ReformError> {
    let form = wanted.form;
    if is_plain(form) && parts.is_empty() && wanted.instance.is_none() && !wanted.anew {
        return Ok(None);
    }
    match replace(entry, file, &parts, wanted) {
        Ok(bytes) => {
            for part in parts {
                if let Err(error) = part.entry.remove() {
                    log::warn!("{} stays: {error}", part.entry.path().display());
                }
            }
            Ok(Some(bytes))
        }
        Err(source) => {
            let parts = parts.iter().map(|part| part.entry.path().into()).collect();
            Err(ReformError { path: entry.path().into(), form, parts, source })
        }
    }
}

fn replace(entry: &FolderEntry, file: &File, parts: &[PartFile], wanted: WantedForm<'_>) -> Result<u64, ReformCause> {
    let new = new_entry(entry);
    let out = create_locked(&new).map_err(failed("create a new file"))?;
    let written = write_new(&out, file, parts, wanted)
        .and_then(|bytes| new.rename_to(entry, true).map(|()| bytes).map_err(failed("rename")));
    if written.is_err() {
        // Best effort: the first error is reported.
        let _ = new.remove();
    }
    written
}

fn write_new(out: &File, file: &File, parts: &[PartFile], wanted: WantedForm<'_>) -> Result<u64, ReformCause> {
    let permissions = file.metadata().map_err(failed("read permissions"))?.permissions();
    out.set_permissions(permissions).map_err(failed("set permissions"))?;
    let top = file.try_clone().map_err(failed("dup"))?;
    if let Some(name) = wanted.instance {
        return Ok(pack_instance(top, name, wanted.form, out)?);
    }
    let mut named = Vec::new();
    for part in parts {
        named.push((part.name.as_str(), part.file.try_clone().map_err(failed("dup"))?));
    }
    Ok(pack(top, &named, wanted.form, out)?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::printable::chain;

    #[test]
    fn file_that_cannot_be_read_stays_as_it_was_and_says_where_its_parts_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.dat");
        fs::write(&path, "no trace").unwrap();
        let part = folder.path().join("trace.dat.irqs.part");
        fs::write(&part, "none").unwrap();
        let entry = |path| FolderEntry::resolve(path).unwrap();
        let parts = vec![PartFile { name: "irqs".into(), entry: entry(&part), file: File::open(&part).unwrap() }];
        let error = reform(&entry(&path), &File::open(&path).unwrap(), parts, WantedForm::default()).unwrap_err();
        let said = chain(&error);
        assert!(said.contains("stays as it is"), "{said}");
        assert!(said.contains("not a trace.dat"), "{said}");
        assert!(said.contains("trace.dat.irqs.part)"), "{said}");
        assert_eq!(fs::read(&path).unwrap(), b"no trace");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left");
    }
}
