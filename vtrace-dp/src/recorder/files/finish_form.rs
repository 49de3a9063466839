//! A finished file gets the form that was asked for: another version, compressed, with the host's instances in it; or it
//! is written anew because somebody may still write to it as it is.
//!
//! In:    a finished file, finished files of instances
//! Out:   one file of the same name; the parts are gone
//! Runs:  on record's thread, behind everything else
//! Full:  a disk without room for both leaves the files as they were, and that is said
//! Trust: as [`crate::trace::write::pack`]

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use super::output::new_path;
use crate::{
    printable::chain,
    trace::{
        format::compressed::Compression,
        write::pack::{Form, Version, pack, pack_instance},
    },
};

/// A finished file of an instance.
#[derive(Debug)]
pub(crate) struct PartFile {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) file: File,
}

/// What a finished file is to become.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Wanted<'a> {
    pub(crate) form: Form,
    /// Its pages are those of an instance of this name; the top one is empty.
    pub(crate) instance: Option<&'a str>,
    /// It is written to another inode in any case: whoever has this one open reaches it no more.
    pub(crate) anew: bool,
}

/// Whether a file has this form when it is finished.
fn is_plain(form: Form) -> bool {
    form.version == Version::V7 && form.compression == Compression::None
}

/// Makes the file at `path` what is wanted, and says how large it is then; nothing if it is that already.
///
/// # Errors
/// Why it stays as it is, in words.
pub(crate) fn reform(
    path: &Path,
    file: &File,
    parts: Vec<PartFile>,
    wanted: Wanted<'_>,
) -> Result<Option<u64>, String> {
    let Wanted { form, instance, anew } = wanted;
    if is_plain(form) && parts.is_empty() && instance.is_none() && !anew {
        return Ok(None);
    }
    let new = new_path(path);
    let packed = write_new(&new, file, &parts, wanted).and_then(|bytes| {
        fs::rename(&new, path).map_err(|error| error.to_string())?;
        Ok(bytes)
    });
    match packed {
        Ok(bytes) => {
            for part in parts {
                if let Err(error) = fs::remove_file(&part.path) {
                    log::warn!("{} stays: {error}", part.path.display());
                }
            }
            Ok(Some(bytes))
        }
        Err(why) => {
            // It may not be there at all.
            let _ = fs::remove_file(&new);
            let kept: Vec<String> = parts.iter().map(|part| part.path.display().to_string()).collect();
            let kept =
                if kept.is_empty() { String::new() } else { format!("; its instances are in {}", kept.join(", ")) };
            let stays = if is_plain(form) { "stays as it is" } else { "stays version 7, not compressed" };
            Err(format!("{} {stays}: {why}{kept}", path.display()))
        }
    }
}

fn write_new(new: &Path, file: &File, parts: &[PartFile], wanted: Wanted<'_>) -> Result<u64, String> {
    let text = |error: io::Error| error.to_string();
    let out = File::options().read(true).write(true).create(true).truncate(true).open(new).map_err(text)?;
    out.set_permissions(file.metadata().map_err(text)?.permissions()).map_err(text)?;
    if let Some(name) = wanted.instance {
        let file = file.try_clone().map_err(text)?;
        return pack_instance(file, name, wanted.form, &out).map_err(|fault| chain(&fault));
    }
    let clone = |part: &PartFile| Ok::<_, io::Error>((part.name.clone(), part.file.try_clone()?));
    let clones = parts.iter().map(clone).collect::<io::Result<Vec<_>>>().map_err(text)?;
    let named: Vec<(&str, File)> = clones
        .iter()
        .map(|(name, file)| Ok((name.as_str(), file.try_clone()?)))
        .collect::<io::Result<_>>()
        .map_err(text)?;
    pack(file.try_clone().map_err(text)?, &named, wanted.form, &out).map_err(|fault| chain(&fault))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_that_cannot_be_read_stays_as_it_was_and_says_where_its_parts_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.dat");
        fs::write(&path, "no trace").unwrap();
        let part = folder.path().join("trace.dat.irqs.part");
        fs::write(&part, "none").unwrap();
        let parts = vec![PartFile { name: "irqs".into(), path: part.clone(), file: File::open(&part).unwrap() }];
        let said = reform(&path, &File::open(&path).unwrap(), parts, Wanted::default()).unwrap_err();
        assert!(said.contains("stays as it is: not a trace.dat"), "{said}");
        assert!(said.ends_with("trace.dat.irqs.part"), "{said}");
        assert_eq!(fs::read(&path).unwrap(), b"no trace");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left");
    }
}
