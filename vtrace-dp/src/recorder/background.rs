//! Recordings as other processes see them: owner, progress, and for those in the background the outcome.
//!
//! In:    a name, a [`RecordingState`]
//! Out:   files in the run directory. In the background: `record-NAME.pid` (a process id, locked while it runs),
//!        `record-NAME.state` (JSON), `record-NAME.log` (its messages). In the foreground: `foreground-PID.pid` and
//!        `foreground-PID.state`, removed at its end
//! Runs:  in the recording's thread, once a second; readers at any time
//! Full:  a state is replaced as a whole; if the run directory takes no file, the recording continues unseen
//! Trust: the run directory belongs to root. Files read there are bounded and may be invalid JSON. Files have mode 0600:
//!        other users see only their owner
//!
//! The lock shows whether a recording runs: the kernel releases it when the process ends. A process id can be reused.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Prefix of the files of recordings in the background; their name follows.
const BACKGROUND: &str = "record-";
/// Prefix of the files of the others; their process id follows.
const FOREGROUND: &str = "foreground-";
/// Other users can neither read the state nor hold the lock.
const MODE: u32 = 0o600;
/// Longest state that is read.
const STATE_BYTES_MAX: u64 = 4 << 20;
/// A reader holds the lock for less than this.
const LOOK_TIME_MAX: Duration = Duration::from_millis(100);

/// Why a recording cannot be in the background, or cannot be found there.
#[derive(Debug, thiserror::Error)]
pub enum BackgroundFault {
    /// A recording of this name runs.
    #[error("a recording of this name runs already: pid {}", .0.pid)]
    Running(Box<RecordingState>),
    /// There is no recording of this name.
    #[error("no recording of this name is in the background")]
    NoSuch {
        /// The names that exist.
        known: Vec<String>,
    },
    /// There are several, and no name was given.
    #[error("{} recordings are in the background", .0.len())]
    Several(Vec<String>),
    /// The recording is in the foreground.
    #[error("{} is recorded in the foreground, by process {} of user {}", .0.name, .0.pid, .0.uid)]
    Foreground(Box<RecordingState>),
    /// The recording was killed.
    #[error("the recording of pid {} was killed before it ended", .0.pid)]
    Killed(Box<RecordingState>),
    /// A file of the run directory cannot be used.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

/// A recording's published state.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RecordingState {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// The user who runs it.
    pub uid: u32,
    /// It runs in the foreground.
    pub is_foreground: bool,
    /// Names of its guests.
    pub guests: Vec<String>,
    /// The paths of its files, the host's first; bytes that are not UTF-8 are replaced.
    pub files: Vec<String>,
    /// Its progress as one line.
    pub line: String,
    /// Its progress as JSON.
    pub progress: Value,
    /// Set when it has ended.
    pub outcome: Option<RecordingOutcome>,
}

/// How a recording ended.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RecordingOutcome {
    /// The exit status of `record`.
    pub status: u8,
    /// The closing table, or the error.
    pub text: String,
    /// The closing table as JSON; null after an error.
    pub summary: Value,
}

/// One recording as another process finds it.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct FoundRecording {
    /// Its last published state.
    pub state: RecordingState,
    /// Whether its process runs; true if only its user can tell.
    pub is_running: bool,
    /// It belongs to another user: only name and user are known.
    pub is_hidden: bool,
}

/// The files of one name.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Paths {
    pid: PathBuf,
    state: PathBuf,
    log: PathBuf,
}

impl Paths {
    fn new(dir: &Path, name: &str) -> Self {
        Self::of(dir, &format!("{BACKGROUND}{name}"))
    }

    /// `stem`: the common part of their names.
    fn of(dir: &Path, stem: &str) -> Self {
        let path = |suffix: &str| dir.join(format!("{stem}.{suffix}"));
        Self { pid: path("pid"), state: path("state"), log: path("log") }
    }

    fn remove(&self) {
        for path in [&self.state, &self.log, &self.pid] {
            // Files that stay are recognised as stale by their lock.
            let _ = fs::remove_file(path);
        }
    }
}

/// A recording's files in the run directory, removed on drop.
#[derive(Debug)]
pub struct PublishedState {
    paths: Paths,
    /// Holds the lock while open.
    lock: File,
    state: RecordingState,
    stays: bool,
}

/// A recording in the background. Its files are removed on drop before it has begun; afterwards they stay until its
/// outcome has been read.
#[derive(Debug)]
pub struct Background {
    published: PublishedState,
    log: File,
}

impl PublishedState {
    /// Publishes a recording in the foreground, and removes the files of killed ones.
    ///
    /// # Errors
    /// [`BackgroundFault::File`]
    pub fn in_foreground(dir: &Path, state: RecordingState) -> Result<Self, BackgroundFault> {
        for stem in stems(dir, FOREGROUND) {
            let paths = Paths::of(dir, &stem);
            // A process that takes this name now finds its locked file removed, and creates it again.
            if let Ok(Some(_lock)) = lock(&paths.pid) {
                paths.remove();
            }
        }
        let paths = Paths::of(dir, &format!("{FOREGROUND}{}", std::process::id()));
        Self::take(dir, paths, RecordingState { is_foreground: true, ..state })
    }

    fn take(dir: &Path, paths: Paths, mut state: RecordingState) -> Result<Self, BackgroundFault> {
        fs::create_dir_all(dir).map_err(failed(dir))?;
        let lock = lock(&paths.pid).map_err(failed(&paths.pid))?;
        let Some(mut lock) = lock else { return Err(BackgroundFault::Running(Box::new(read(&paths)))) };
        (state.pid, state.uid) = (std::process::id(), geteuid().as_raw());
        lock.set_len(0).and_then(|()| writeln!(lock, "{}", state.pid)).map_err(failed(&paths.pid))?;
        let published = Self { paths, lock, state, stays: false };
        published.write().map_err(failed(&published.paths.state))?;
        Ok(published)
    }

    /// Publishes the progress.
    pub fn publish(&mut self, line: String, progress: Value) {
        (self.state.line, self.state.progress) = (line, progress);
        self.try_write();
    }

    fn try_write(&self) {
        if let Err(error) = self.write() {
            log::debug!("{}: {error}", self.paths.state.display());
        }
    }

    /// Writes a new file and renames it: a reader sees the old state or the new one.
    fn write(&self) -> io::Result<()> {
        let new = self.paths.state.with_extension("state.new");
        let text = serde_json::to_vec(&self.state).map_err(io::Error::other)?;
        // A file that is there already may be a link: it is removed, not written to.
        let _ = fs::remove_file(&new);
        let mut file = open(options().create_new(true), &new)?;
        file.write_all(&text)?;
        fs::rename(&new, &self.paths.state)
    }
}

impl Drop for PublishedState {
    fn drop(&mut self) {
        if !self.stays {
            self.paths.remove();
        } else if self.state.outcome.is_some() {
            // The process id can be reused from now on.
            let _ = fs::remove_file(&self.paths.pid);
        }
        let _ = self.lock.unlock();
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> BackgroundFault {
    let path = path.to_path_buf();
    move |source| BackgroundFault::File { path, source }
}

impl Background {
    /// Takes the name, and replaces the files of a recording that has ended or was killed.
    ///
    /// # Errors
    /// [`BackgroundFault::Running`], [`BackgroundFault::File`]
    pub fn take(dir: &Path, state: RecordingState) -> Result<Self, BackgroundFault> {
        let published = PublishedState::take(dir, Paths::new(dir, &state.name), state)?;
        let path = &published.paths.log;
        let log = open(options().append(true).create(true), path).map_err(failed(path))?;
        log.set_len(0).map_err(failed(path))?;
        Ok(Self { published, log })
    }

    /// The file for its messages.
    pub fn log(&self) -> &File {
        &self.log
    }

    /// The recording has begun: its files stay from now on.
    pub fn begin(&mut self) {
        self.published.stays = true;
    }

    /// Publishes the progress.
    pub fn publish(&mut self, line: String, progress: Value) {
        self.published.publish(line, progress);
    }

    /// Publishes the outcome.
    pub fn end(mut self, outcome: RecordingOutcome) {
        self.published.state.outcome = Some(outcome);
        self.published.try_write();
    }
}

/// Options to create and write a file of the run directory.
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(MODE);
    options
}

/// Opens a file of the run directory. Symbolic links are not followed; a FIFO or a device is refused without waiting.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let odd = || io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
    let opened = options.custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK).open(path);
    // A FIFO without a reader, or a socket.
    let is_odd = |error: &io::Error| error.raw_os_error() == Some(nix::libc::ENXIO);
    let file = opened.map_err(|error| if is_odd(&error) { odd() } else { error })?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(odd()) }
}

/// Opens and locks a file; `None` if another process holds the lock.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let begun = Instant::now();
    loop {
        let file = open(options().read(true).create(true), path)?;
        match file.try_lock() {
            // Its previous owner may have removed it in the meantime.
            Ok(()) if fs::metadata(path).is_ok_and(|now| file.metadata().is_ok_and(|ours| ours.ino() == now.ino())) => {
                return Ok(Some(file));
            }
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if begun.elapsed() > LOOK_TIME_MAX => return Ok(None),
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOOK_TIME_MAX / 10),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// Whether a process holds the lock; the file's owner if it cannot be opened.
fn is_running(path: &Path) -> Result<bool, u32> {
    match open(OpenOptions::new().read(true), path) {
        Ok(file) => Ok(matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            fs::symlink_metadata(path).map_or(Ok(false), |about| Err(about.uid()))
        }
        Err(_) => Ok(false),
    }
}

/// The state of a recording; without a valid one, the process id in its pid file.
fn read(paths: &Paths) -> RecordingState {
    let bounded = |path: &Path| {
        let mut bytes = Vec::new();
        let file = open(OpenOptions::new().read(true), path).ok()?;
        file.take(STATE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    };
    let pid = || bounded(&paths.pid).and_then(|bytes| String::from_utf8(bytes).ok()?.trim().parse().ok());
    let state = bounded(&paths.state).and_then(|bytes| serde_json::from_slice(&bytes).ok());
    state.unwrap_or_else(|| RecordingState { pid: pid().unwrap_or(0), ..RecordingState::default() })
}

/// All running recordings, and those in the background that have ended, sorted by file name.
pub fn list(dir: &Path) -> Vec<FoundRecording> {
    let background = stems(dir, BACKGROUND).into_iter().map(|stem| look(dir, &stem));
    let foreground = stems(dir, FOREGROUND).into_iter().map(|stem| look(dir, &stem));
    background.chain(foreground.filter(|found| found.is_running)).collect()
}

/// The common part of the file names of each recording.
fn stems(dir: &Path, prefix: &str) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok().filter(|name| name.starts_with(prefix))?;
        name.strip_suffix(".pid").or_else(|| name.strip_suffix(".state")).map(str::to_owned)
    });
    let mut names: Vec<String> = names.collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn look(dir: &Path, stem: &str) -> FoundRecording {
    let paths = Paths::of(dir, stem);
    let name = stem.strip_prefix(BACKGROUND);
    // The lock first: a recording that ends in between has published its outcome.
    match is_running(&paths.pid) {
        Ok(is_running) => {
            let state = read(&paths);
            let name = name.map_or_else(|| state.name.clone(), str::to_owned);
            FoundRecording { state: RecordingState { name, ..state }, is_running, is_hidden: false }
        }
        Err(uid) => {
            let name = name.unwrap_or_default().to_owned();
            let state =
                RecordingState { name, uid, is_foreground: !stem.starts_with(BACKGROUND), ..RecordingState::default() };
            FoundRecording { state, is_running: true, is_hidden: true }
        }
    }
}

/// The recording of this name in the background, or without a name the only one; running ones take precedence.
///
/// # Errors
/// [`BackgroundFault::NoSuch`], [`BackgroundFault::Several`], [`BackgroundFault::Foreground`]
pub fn choose(dir: &Path, name: Option<&str>) -> Result<FoundRecording, BackgroundFault> {
    let (foreground, mut all): (Vec<_>, Vec<_>) = list(dir).into_iter().partition(|found| found.state.is_foreground);
    let mut others = foreground.into_iter().filter(|found| !found.is_hidden).map(|found| found.state);
    let other = others.find(|state| name.is_none_or(|name| name == state.name));
    if let Some(state) = other.filter(|_| all.iter().all(|found| name.is_some_and(|name| name != found.state.name))) {
        return Err(BackgroundFault::Foreground(Box::new(state)));
    }
    let known = |all: &[FoundRecording]| all.iter().map(|found| found.state.name.clone()).collect::<Vec<_>>();
    if let Some(name) = name {
        let names = known(&all);
        return all.into_iter().find(|found| found.state.name == name).ok_or(BackgroundFault::NoSuch { known: names });
    }
    if all.iter().any(|found| found.is_running) {
        all.retain(|found| found.is_running);
    }
    match all.len() {
        0 => Err(BackgroundFault::NoSuch { known: Vec::new() }),
        1 => Ok(all.remove(0)),
        _ => Err(BackgroundFault::Several(known(&all))),
    }
}

/// Waits until the recording of this name has ended. Returns its outcome and removes its files.
///
/// # Errors
/// [`BackgroundFault::Killed`]
pub fn await_end(dir: &Path, name: &str) -> Result<RecordingOutcome, BackgroundFault> {
    while is_running(&Paths::new(dir, name).pid) == Ok(true) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let FoundRecording { mut state, .. } = look(dir, &format!("{BACKGROUND}{name}"));
    let outcome = state.outcome.take();
    Paths::new(dir, name).remove();
    outcome.ok_or_else(|| BackgroundFault::Killed(Box::new(state)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(name: &str) -> RecordingState {
        RecordingState {
            name: name.into(),
            guests: vec!["guest1".into()],
            files: vec!["t.dat".into()],
            ..RecordingState::default()
        }
    }

    fn names(dir: &Path) -> Vec<(String, bool)> {
        list(dir).into_iter().map(|found| (found.state.name, found.is_running)).collect()
    }

    #[test]
    fn fifo_in_the_place_of_a_file_is_refused_without_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let paths = Paths::new(dir, "guest1");
        for (path, what) in [(&paths.pid, "lock"), (&paths.log, "log")] {
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let Err(BackgroundFault::File { source, .. }) = Background::take(dir, state("guest1")) else {
                panic!("{what}: a FIFO was taken")
            };
            assert!(source.to_string().contains("not a regular file"), "{what}: {source}");
            // Readers do not wait either.
            assert!(list(dir).iter().all(|found| !found.is_running), "{what}");
            let _ = fs::remove_file(path);
        }
        for path in [&paths.state, &paths.state.with_extension("state.new")] {
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        assert_eq!(names(dir), [("guest1".into(), false)]);
        Background::take(dir, state("guest1")).unwrap();
    }

    #[test]
    fn name_is_taken_once_and_free_again_when_its_owner_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("run");
        let mut first = Background::take(&dir, state("guest1")).unwrap();
        first.begin();
        let Err(BackgroundFault::Running(found)) = Background::take(&dir, state("guest1")) else {
            panic!("taken twice")
        };
        assert_eq!((found.pid, found.guests[0].as_str()), (std::process::id(), "guest1"));
        let _other = Background::take(&dir, state("guest2")).unwrap();
        assert_eq!(names(&dir), [("guest1".into(), true), ("guest2".into(), true)]);
        assert!(matches!(choose(&dir, None), Err(BackgroundFault::Several(names)) if names == ["guest1", "guest2"]));
        first.end(RecordingOutcome { status: 3, text: "table".into(), summary: Value::Null });
        assert_eq!(choose(&dir, None).unwrap().state.name, "guest2");
        assert!(!choose(&dir, Some("guest1")).unwrap().is_running);
        assert_eq!(await_end(&dir, "guest1").unwrap().status, 3);
        assert!(matches!(choose(&dir, Some("guest1")), Err(BackgroundFault::NoSuch { known }) if known == ["guest2"]));
        Background::take(&dir, state("guest1")).unwrap();
    }

    #[test]
    fn recording_that_did_not_begin_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        drop(Background::take(folder.path(), state("host")).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(matches!(choose(folder.path(), None), Err(BackgroundFault::NoSuch { known }) if known.is_empty()));
    }

    #[test]
    fn killed_recording_differs_from_one_that_ended_whatever_process_has_its_id() {
        let folder = tempfile::tempdir().unwrap();
        let mut killed = Background::take(folder.path(), state("host")).unwrap();
        killed.begin();
        killed.publish("recording 1 s".into(), Value::Null);
        // As a kill does: the lock goes, the files stay.
        killed.published.lock.unlock().unwrap();
        std::mem::forget(killed);
        assert_eq!(names(folder.path()), [("host".into(), false)]);
        let Err(BackgroundFault::Killed(found)) = await_end(folder.path(), "host") else { panic!("it did not end") };
        assert_eq!(found.files, ["t.dat"]);
        assert!(names(folder.path()).is_empty(), "said once");
    }

    #[test]
    fn invalid_json_and_links_are_ignored() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("record-a.state"), b"{\xff").unwrap();
        fs::write(folder.path().join("record-a.pid"), "77\n").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("record-b.state")).unwrap();
        let found = list(folder.path());
        assert_eq!((found[0].state.pid, found[0].is_running, found.len()), (77, false, 2));
        assert_eq!(found[1].state, state_of_nothing("b"));
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("record-c.pid")).unwrap();
        assert!(matches!(Background::take(folder.path(), state("c")), Err(BackgroundFault::File { .. })));
    }

    #[test]
    fn recording_in_the_foreground_is_listed_while_it_runs_and_takes_no_name() {
        let folder = tempfile::tempdir().unwrap();
        // A killed one: its lock is free.
        let killed = Paths::of(folder.path(), "foreground-7");
        fs::write(&killed.pid, "7\n").unwrap();
        fs::write(&killed.state, serde_json::to_vec(&state("guest1")).unwrap()).unwrap();
        assert!(list(folder.path()).is_empty(), "one that is gone is not published");
        let published = PublishedState::in_foreground(folder.path(), state("guest1")).unwrap();
        assert!(!killed.pid.exists() && !killed.state.exists(), "the next one clears up");
        let [found] = &list(folder.path())[..] else { panic!("one recording") };
        let expected = ("guest1", std::process::id(), true, true);
        assert_eq!((&*found.state.name, found.state.pid, found.state.is_foreground, found.is_running), expected);
        let refused = choose(folder.path(), None).unwrap_err();
        let (pid, uid) = (std::process::id(), geteuid());
        let text = format!("guest1 is recorded in the foreground, by process {pid} of user {uid}");
        assert_eq!(refused.to_string(), text);
        assert!(matches!(choose(folder.path(), Some("host")), Err(BackgroundFault::NoSuch { .. })));
        let background = Background::take(folder.path(), state("guest1")).unwrap();
        assert!(!choose(folder.path(), Some("guest1")).unwrap().state.is_foreground);
        drop((published, background));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn files_of_a_recording_have_mode_0600() {
        let folder = tempfile::tempdir().unwrap();
        let _background = Background::take(folder.path(), state("host")).unwrap();
        let _shown = PublishedState::in_foreground(folder.path(), state("host")).unwrap();
        let files: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap()).collect();
        assert_eq!(files.len(), 5);
        for file in files {
            assert_eq!(file.metadata().unwrap().mode() & 0o777, MODE, "{:?}", file.file_name());
        }
    }

    fn state_of_nothing(name: &str) -> RecordingState {
        RecordingState { name: name.into(), ..RecordingState::default() }
    }
}
