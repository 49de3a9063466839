//! A name in an open folder: created, renamed and removed through the folder's descriptor, whatever becomes of its path.
//!
//! In:    a path
//! Out:   a [`FolderEntry`]; files opened without following a link
//! Trust: whoever owns a folder on the path can change names in it at any time. Symbolic links are followed only where
//!        root or this process's user made them: another user's link could point this process at any file

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, readlinkat, renameat2},
    sys::stat::{FileStat, Mode, SFlag, fstat, fstatat},
    unistd::{UnlinkatFlags, geteuid, unlinkat},
};

/// As many links as the kernel follows in one path.
const LINKS_MAX: usize = 40;

/// A name in an open folder. The name itself may not exist, and is not a link when it is resolved.
#[derive(Clone, Debug)]
pub struct FolderEntry {
    folder: Arc<OwnedFd>,
    name: OsString,
    path: PathBuf,
}

impl FolderEntry {
    /// Resolves `path`, of which all but the last name must exist. A symbolic link as the last name is followed, even if
    /// what it leads to does not exist.
    ///
    /// # Errors
    /// As open(2); `PermissionDenied` for a link that another user made, `InvalidInput` for a path without a last name.
    pub fn resolve(path: &Path) -> io::Result<Self> {
        let mut folder = openat(AT_FDCWD, ".", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut pending = reversed_parts(path);
        let mut links = 0;
        let mut ends_with_link = false;
        while let Some(part) = pending.pop() {
            let is_last = pending.is_empty();
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let found = match openat(&folder, part.as_os_str(), flags, Mode::empty()) {
                Err(Errno::ENOENT) if is_last => return Ok(Self::new(folder, part, path, ends_with_link)),
                found => found?,
            };
            let about = fstat(&found)?;
            match kind_of(&about) {
                SFlag::S_IFLNK => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(Errno::ELOOP.into());
                    }
                    check_owner(&about)?;
                    ends_with_link |= is_last;
                    pending.extend(reversed_parts(Path::new(&readlinkat(&found, "")?)));
                }
                _ if is_last && part != ".." && part != "/" => {
                    return Ok(Self::new(folder, part, path, ends_with_link));
                }
                SFlag::S_IFDIR => folder = found,
                _ => return Err(Errno::ENOTDIR.into()),
            }
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"))
    }

    fn new(folder: OwnedFd, name: OsString, typed: &Path, ends_with_link: bool) -> Self {
        let place = fs::read_link(format!("/proc/self/fd/{}", folder.as_raw_fd()));
        let path = match place {
            Ok(place) if ends_with_link => place.join(&name),
            _ => typed.into(),
        };
        Self { folder: Arc::new(folder), name, path }
    }

    /// The path for people: as typed, or where its link leads.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The entry with `suffix` at the end of its name, in the same folder.
    #[must_use]
    pub fn with_suffix(&self, suffix: &str) -> Self {
        let append = |text: &OsStr| {
            let mut longer = text.to_owned();
            longer.push(suffix);
            longer
        };
        let path = append(self.path.as_os_str()).into();
        Self { folder: Arc::clone(&self.folder), name: append(&self.name), path }
    }

    /// Its inode's attributes; those of a link, not of what the link leads to.
    ///
    /// # Errors
    /// As fstatat(2).
    pub fn stat(&self) -> io::Result<FileStat> {
        Ok(fstatat(&self.folder, self.name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?)
    }

    /// Whether the name refers to `file`.
    pub fn refers_to(&self, file: &File) -> bool {
        let (Ok(named), Ok(open)) = (self.stat(), fstat(file)) else { return false };
        (named.st_dev, named.st_ino) == (open.st_dev, open.st_ino)
    }

    /// Opens a regular file to read and write. Links, FIFOs, devices and folders are refused without waiting.
    ///
    /// # Errors
    /// As openat(2); `InvalidInput` if it is not a regular file.
    pub fn open(&self) -> io::Result<File> {
        let not_a_file = || io::Error::new(io::ErrorKind::InvalidInput, "it is not a file");
        let flags = OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let opened = openat(&self.folder, self.name.as_os_str(), flags, Mode::empty());
        let file = match opened {
            Err(Errno::ELOOP | Errno::EISDIR | Errno::ENXIO) => return Err(not_a_file()),
            opened => File::from(opened?),
        };
        if kind_of(&fstat(&file)?) == SFlag::S_IFREG { Ok(file) } else { Err(not_a_file()) }
    }

    /// Creates a file to read and write. Nothing may have this name.
    ///
    /// # Errors
    /// As openat(2): `AlreadyExists` for anything of this name, a link included.
    pub fn create_new(&self) -> io::Result<File> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(0o666);
        Ok(openat(&self.folder, self.name.as_os_str(), flags, mode)?.into())
    }

    /// The same where another file may have this name: it is removed first. Of a link the link itself is removed.
    ///
    /// # Errors
    /// As unlinkat(2) and openat(2).
    pub fn create_anew(&self) -> io::Result<File> {
        match self.remove() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.create_new(),
        }
    }

    /// Gives the name to a new file with this content. It is written as `NAME.new`.
    ///
    /// # Errors
    /// As [`FolderEntry::create_anew`], write(2) and renameat2(2).
    pub fn replace(&self, content: &[u8]) -> io::Result<()> {
        let new = self.with_suffix(".new");
        new.create_anew()?.write_all(content)?;
        new.rename_to(self, true)
    }

    /// Renames it to `other`; replaces what has that name if `replace`.
    ///
    /// # Errors
    /// As renameat2(2).
    pub fn rename_to(&self, other: &Self, replace: bool) -> io::Result<()> {
        let flags = if replace { RenameFlags::empty() } else { RenameFlags::RENAME_NOREPLACE };
        Ok(renameat2(&self.folder, self.name.as_os_str(), &other.folder, other.name.as_os_str(), flags)?)
    }

    /// Removes the name.
    ///
    /// # Errors
    /// As unlinkat(2).
    pub fn remove(&self) -> io::Result<()> {
        Ok(unlinkat(&self.folder, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir)?)
    }

    /// Writes the folder to disk: a name that was created or renamed survives a power failure.
    ///
    /// # Errors
    /// As openat(2) and fsync(2); some file systems cannot.
    pub fn sync_folder(&self) -> io::Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        File::from(openat(&self.folder, ".", flags, Mode::empty())?).sync_all()
    }
}

/// The parts of a path, the last first; `/` for the root.
fn reversed_parts(path: &Path) -> Vec<OsString> {
    let is_step = |component: &Component| !matches!(component, Component::CurDir);
    path.components().rev().filter(is_step).map(|component| component.as_os_str().to_owned()).collect()
}

fn kind_of(about: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(about.st_mode & SFlag::S_IFMT.bits())
}

fn check_owner(link: &FileStat) -> io::Result<()> {
    if link.st_uid == 0 || link.st_uid == geteuid().as_raw() {
        return Ok(());
    }
    let why = format!("a symbolic link on it belongs to user {}", link.st_uid);
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{lchown, symlink};

    use super::*;

    #[test]
    fn link_of_another_user_is_not_followed_at_any_place_of_a_path() {
        if !geteuid().is_root() {
            println!("skipped: needs root to make another user's link");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().join("real");
        fs::create_dir(&real).unwrap();
        fs::write(real.join("trace.dat"), "precious").unwrap();
        symlink(&real, folder.path().join("mine")).unwrap();
        symlink(&real, folder.path().join("theirs")).unwrap();
        lchown(folder.path().join("theirs"), Some(1234), None).unwrap();
        let theirs = FolderEntry::resolve(&folder.path().join("theirs/trace.dat")).unwrap_err();
        assert_eq!(theirs.kind(), io::ErrorKind::PermissionDenied);
        assert!(theirs.to_string().contains("user 1234"), "{theirs}");
        let mine = FolderEntry::resolve(&folder.path().join("mine/trace.dat")).unwrap();
        assert!(mine.refers_to(&File::open(real.join("trace.dat")).unwrap()));
    }

    #[test]
    fn dangling_link_names_what_it_leads_to() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link.dat");
        symlink("real.dat", &link).unwrap();
        let entry = FolderEntry::resolve(&link).unwrap();
        assert_eq!(entry.path(), folder.path().canonicalize().unwrap().join("real.dat"));
        entry.create_new().unwrap();
        assert!(folder.path().join("real.dat").is_file());
    }

    #[test]
    fn created_file_follows_no_link_and_replaces_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let precious = folder.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, folder.path().join("trace.dat.new")).unwrap();
        let new = FolderEntry::resolve(&folder.path().join("trace.dat")).unwrap().with_suffix(".new");
        assert_eq!(new.create_new().unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(new.open().unwrap_err().to_string(), "it is not a file");
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
    }

    #[test]
    fn replaced_file_follows_no_link_that_was_planted_under_its_new_name() {
        let folder = tempfile::tempdir().unwrap();
        let [precious, setup, new] = ["precious", "guest.toml", "guest.toml.new"].map(|name| folder.path().join(name));
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, &new).unwrap();
        FolderEntry::resolve(&setup).unwrap().replace(b"cpus = 1").unwrap();
        assert_eq!((fs::read(&setup).unwrap(), fs::read(&precious).unwrap()), (b"cpus = 1".into(), b"precious".into()));
        assert!(!setup.is_symlink() && new.symlink_metadata().is_err());
        fs::create_dir(&new).unwrap();
        FolderEntry::resolve(&setup).unwrap().replace(b"cpus = 2").unwrap_err();
        assert_eq!(fs::read(&setup).unwrap(), b"cpus = 1");
    }

    #[test]
    fn links_in_a_circle_and_paths_without_a_name_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        symlink("b", folder.path().join("a")).unwrap();
        symlink("a", folder.path().join("b")).unwrap();
        assert_eq!(FolderEntry::resolve(&folder.path().join("a")).unwrap_err().raw_os_error(), Some(nix::libc::ELOOP));
        for path in ["", "/", ".", "..", "/.."] {
            assert!(FolderEntry::resolve(Path::new(path)).is_err(), "{path:?}");
        }
        assert!(FolderEntry::resolve(Path::new("/nowhere/trace.dat")).is_err());
    }
}
