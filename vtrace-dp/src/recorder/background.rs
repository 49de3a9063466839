//! Recordings as other processes see them: who runs, how far it is, and of those in the background how it ended.
//!
//! In:    a name; what the recording says of itself
//! Out:   in the run directory, of one in the background, `record-NAME.pid` (a process id, locked while it runs),
//!        `record-NAME.state` (JSON) and `record-NAME.log` (what it would have shown); of one that a terminal waits for
//!        `foreground-PID.pid` and `foreground-PID.state`, which go with it
//! Runs:  the recording on its own thread, once a second; readers whenever they like
//! Full:  a state is replaced as a whole; a run directory that takes no file ends nothing but what can be seen
//! Trust: whoever may write to the run directory: root. What is read there is bounded and need not be JSON. Only the user
//!        who records can read the files: others see whose they are
//!
//! The lock says whether it runs: it goes with the process however that ends. A process id alone says nothing, another
//! process may have it by now.

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

/// Recordings in the background have files that begin so, then comes their name.
const BACKGROUND: &str = "record-";
/// The others; then comes their process.
const FOREGROUND: &str = "foreground-";
/// Nobody else is to read of files and guests, nor to hold the lock.
const MODE: u32 = 0o600;
/// A state that is longer is none of ours.
const STATE_BYTES_MAX: u64 = 4 << 20;
/// Someone who only looks holds the lock for less.
const LOOK_TIME_MAX: Duration = Duration::from_millis(100);

/// Why a recording cannot be in the background, or be seen there.
#[derive(Debug, thiserror::Error)]
pub enum BackgroundFault {
    /// One of this name runs.
    #[error("a recording of this name runs already: pid {}", .0.pid)]
    Running(Box<State>),
    /// None of this name, and those there are.
    #[error("no recording of this name is in the background")]
    NoSuch {
        /// What was asked for; none: there was nothing to choose from.
        known: Vec<String>,
    },
    /// Several, and none was named.
    #[error("{} recordings are in the background", .0.len())]
    Several(Vec<String>),
    /// It is in the foreground.
    #[error("{} is recorded in the foreground, by process {} of user {}", .0.name, .0.pid, .0.uid)]
    Foreground(Box<State>),
    /// It was killed.
    #[error("the recording of pid {} was killed before it ended", .0.pid)]
    Killed(Box<State>),
    /// A file.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What a recording says of itself.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Who runs it.
    pub uid: u32,
    /// A terminal waits for it.
    pub is_foreground: bool,
    /// The guests that it records.
    pub guests: Vec<String>,
    /// Where to, the host's first.
    pub files: Vec<PathBuf>,
    /// How far it is, as one line.
    pub line: String,
    /// The same for programs.
    pub progress: Value,
    /// How it ended.
    pub outcome: Option<Outcome>,
}

/// How a recording ended.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Outcome {
    /// What `record` would have exited with.
    pub status: u8,
    /// The closing table, or what failed.
    pub text: String,
    /// The same as JSON; null if there is none.
    pub summary: Value,
}

/// One recording as another process finds it.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Found {
    /// What it said last.
    pub state: State,
    /// Whether its process is there, or nobody but its user can tell.
    pub is_running: bool,
    /// It is another user's: no more is known than whose, and its name.
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

    /// `stem`: what all of them begin with.
    fn of(dir: &Path, stem: &str) -> Self {
        let path = |suffix: &str| dir.join(format!("{stem}.{suffix}"));
        Self { pid: path("pid"), state: path("state"), log: path("log") }
    }

    fn remove(&self) {
        for path in [&self.state, &self.log, &self.pid] {
            // What is not there need not go; what cannot be removed is found to be stale.
            let _ = fs::remove_file(path);
        }
    }
}

/// What a recording shows of itself. Dropped it leaves nothing.
#[derive(Debug)]
pub struct Shown {
    paths: Paths,
    /// Its lock is held as long as this is open.
    lock: File,
    state: State,
    stays: bool,
}

/// A recording in the background, for itself. Dropped before it has begun it leaves nothing; later it stays for
/// whoever asks how it ended.
#[derive(Debug)]
pub struct Background {
    shown: Shown,
    log: File,
}

impl Shown {
    /// A recording in the foreground. What others that were killed have left is removed.
    ///
    /// # Errors
    /// [`BackgroundFault::File`]
    pub fn in_foreground(dir: &Path, state: State) -> Result<Self, BackgroundFault> {
        for stem in stems(dir, FOREGROUND) {
            let paths = Paths::of(dir, &stem);
            // Whoever takes this name now sees that the file it has locked is gone, and takes it once more.
            if let Ok(Some(_lock)) = lock(&paths.pid) {
                paths.remove();
            }
        }
        let paths = Paths::of(dir, &format!("{FOREGROUND}{}", std::process::id()));
        Self::take(dir, paths, State { is_foreground: true, ..state })
    }

    fn take(dir: &Path, paths: Paths, mut state: State) -> Result<Self, BackgroundFault> {
        fs::create_dir_all(dir).map_err(failed(dir))?;
        let lock = lock(&paths.pid).map_err(failed(&paths.pid))?;
        let Some(mut lock) = lock else { return Err(BackgroundFault::Running(Box::new(read(&paths)))) };
        (state.pid, state.uid) = (std::process::id(), geteuid().as_raw());
        lock.set_len(0).and_then(|()| writeln!(lock, "{}", state.pid)).map_err(failed(&paths.pid))?;
        let shown = Self { paths, lock, state, stays: false };
        shown.write().map_err(failed(&shown.paths.state))?;
        Ok(shown)
    }

    /// How far it is.
    pub fn publish(&mut self, line: String, progress: Value) {
        (self.state.line, self.state.progress) = (line, progress);
        self.try_write();
    }

    fn try_write(&self) {
        if let Err(error) = self.write() {
            log::debug!("{}: {error}", self.paths.state.display());
        }
    }

    /// Under another name first: a reader sees the one before or this one.
    fn write(&self) -> io::Result<()> {
        let new = self.paths.state.with_extension("state.new");
        let text = serde_json::to_vec(&self.state).map_err(io::Error::other)?;
        let mut file = open(options().create(true).truncate(true), &new)?;
        file.write_all(&text)?;
        fs::rename(&new, &self.paths.state)
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if !self.stays {
            self.paths.remove();
        } else if self.state.outcome.is_some() {
            // Its number means nothing from now on.
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
    /// Takes the name. What one that ended or was killed has left is replaced.
    ///
    /// # Errors
    /// [`BackgroundFault::Running`], [`BackgroundFault::File`]
    pub fn take(dir: &Path, state: State) -> Result<Self, BackgroundFault> {
        let shown = Shown::take(dir, Paths::new(dir, &state.name), state)?;
        let path = &shown.paths.log;
        let log = open(options().append(true).create(true), path).map_err(failed(path))?;
        log.set_len(0).map_err(failed(path))?;
        Ok(Self { shown, log })
    }

    /// Where what is said goes.
    pub fn log(&self) -> &File {
        &self.log
    }

    /// The recording has begun: from now on it leaves word of how it ended.
    pub fn begin(&mut self) {
        self.shown.stays = true;
    }

    /// How far it is.
    pub fn publish(&mut self, line: String, progress: Value) {
        self.shown.publish(line, progress);
    }

    /// It has ended.
    pub fn end(mut self, outcome: Outcome) {
        self.shown.state.outcome = Some(outcome);
        self.shown.try_write();
    }
}

/// To write one of ours.
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(MODE);
    options
}

/// Opens a file of the run directory. Links are not followed: they could lead out of it. A FIFO or a device in its place
/// is refused, and not waited for.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let odd = || io::Error::new(io::ErrorKind::InvalidInput, "something else than a file of vtrace's is there");
    let opened = options.custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK).open(path);
    // A FIFO that nobody reads; a socket.
    let is_odd = |error: &io::Error| error.raw_os_error() == Some(nix::libc::ENXIO);
    let file = opened.map_err(|error| if is_odd(&error) { odd() } else { error })?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(odd()) }
}

/// The locked file of this name; `None` if another process holds it.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let begun = Instant::now();
    loop {
        let file = open(options().read(true).create(true), path)?;
        match file.try_lock() {
            // It may have been removed by the one before us, in between.
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

/// Whether a process holds the lock, or whose it is if we may not know.
fn is_running(path: &Path) -> Result<bool, u32> {
    match open(OpenOptions::new().read(true), path) {
        Ok(file) => Ok(matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            fs::symlink_metadata(path).map_or(Ok(false), |about| Err(about.uid()))
        }
        Err(_) => Ok(false),
    }
}

/// What is known of a name: its state; where there is none, the number in its pid file.
fn read(paths: &Paths) -> State {
    let bounded = |path: &Path| {
        let mut bytes = Vec::new();
        let file = open(OpenOptions::new().read(true), path).ok()?;
        file.take(STATE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    };
    let pid = || bounded(&paths.pid).and_then(|bytes| String::from_utf8(bytes).ok()?.trim().parse().ok());
    let state = bounded(&paths.state).and_then(|bytes| serde_json::from_slice(&bytes).ok());
    state.unwrap_or_else(|| State { pid: pid().unwrap_or(0), ..State::default() })
}

/// All recordings: those that run, and those in the background that have left word; by their files' names.
pub fn list(dir: &Path) -> Vec<Found> {
    let background = stems(dir, BACKGROUND).into_iter().map(|stem| look(dir, &stem));
    let foreground = stems(dir, FOREGROUND).into_iter().map(|stem| look(dir, &stem));
    background.chain(foreground.filter(|found| found.is_running)).collect()
}

/// What the files of one recording each begin with.
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

fn look(dir: &Path, stem: &str) -> Found {
    let paths = Paths::of(dir, stem);
    let name = stem.strip_prefix(BACKGROUND);
    // In this order: one that ends in between has left its last word.
    match is_running(&paths.pid) {
        Ok(is_running) => {
            let state = read(&paths);
            let name = name.map_or_else(|| state.name.clone(), str::to_owned);
            Found { state: State { name, ..state }, is_running, is_hidden: false }
        }
        Err(uid) => {
            let name = name.unwrap_or_default().to_owned();
            let state = State { name, uid, is_foreground: !stem.starts_with(BACKGROUND), ..State::default() };
            Found { state, is_running: true, is_hidden: true }
        }
    }
}

/// The recording of this name in the background, or the only one there is. One that runs is chosen before one that has
/// ended.
///
/// # Errors
/// [`BackgroundFault::NoSuch`], [`BackgroundFault::Several`], [`BackgroundFault::Foreground`]
pub fn choose(dir: &Path, name: Option<&str>) -> Result<Found, BackgroundFault> {
    let (foreground, mut all): (Vec<_>, Vec<_>) = list(dir).into_iter().partition(|found| found.state.is_foreground);
    let mut others = foreground.into_iter().filter(|found| !found.is_hidden).map(|found| found.state);
    let other = others.find(|state| name.is_none_or(|name| name == state.name));
    if let Some(state) = other.filter(|_| all.iter().all(|found| name.is_some_and(|name| name != found.state.name))) {
        return Err(BackgroundFault::Foreground(Box::new(state)));
    }
    let known = |all: &[Found]| all.iter().map(|found| found.state.name.clone()).collect::<Vec<_>>();
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

/// Waits until the recording of this name has ended, and says how. What it has left is removed.
///
/// # Errors
/// [`BackgroundFault::Killed`]
pub fn await_end(dir: &Path, name: &str) -> Result<Outcome, BackgroundFault> {
    while is_running(&Paths::new(dir, name).pid) == Ok(true) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let Found { mut state, .. } = look(dir, &format!("{BACKGROUND}{name}"));
    let outcome = state.outcome.take();
    Paths::new(dir, name).remove();
    outcome.ok_or_else(|| BackgroundFault::Killed(Box::new(state)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(name: &str) -> State {
        State { name: name.into(), guests: vec!["guest1".into()], files: vec!["t.dat".into()], ..State::default() }
    }

    fn names(dir: &Path) -> Vec<(String, bool)> {
        list(dir).into_iter().map(|found| (found.state.name, found.is_running)).collect()
    }

    #[test]
    fn fifo_in_the_place_of_a_file_is_refused_and_nobody_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let paths = Paths::new(dir, "guest1");
        for (path, what) in
            [(&paths.pid, "lock"), (&paths.state.with_extension("state.new"), "state"), (&paths.log, "log")]
        {
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let Err(BackgroundFault::File { source, .. }) = Background::take(dir, state("guest1")) else {
                panic!("{what}: a FIFO was taken")
            };
            assert!(source.to_string().contains("something else"), "{what}: {source}");
            // Whoever looks does not wait, either.
            assert!(list(dir).iter().all(|found| !found.is_running), "{what}");
            let _ = fs::remove_file(path);
        }
        nix::unistd::mkfifo(&paths.state, nix::sys::stat::Mode::S_IRWXU).unwrap();
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
        first.end(Outcome { status: 3, text: "table".into(), summary: Value::Null });
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
    fn killed_recording_is_told_from_one_that_ended_whatever_process_has_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let mut killed = Background::take(folder.path(), state("host")).unwrap();
        killed.begin();
        killed.publish("recording 1 s".into(), Value::Null);
        // As a kill does: the lock goes, the files stay.
        killed.shown.lock.unlock().unwrap();
        std::mem::forget(killed);
        assert_eq!(names(folder.path()), [("host".into(), false)]);
        let Err(BackgroundFault::Killed(found)) = await_end(folder.path(), "host") else { panic!("it did not end") };
        assert_eq!(found.files, [PathBuf::from("t.dat")]);
        assert!(names(folder.path()).is_empty(), "said once");
    }

    #[test]
    fn state_that_is_no_json_and_a_link_are_nothing_to_trip_over() {
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
    fn recording_in_the_foreground_is_seen_while_it_is_there_and_takes_no_name() {
        let folder = tempfile::tempdir().unwrap();
        // One that was killed: nobody holds its lock.
        let killed = Paths::of(folder.path(), "foreground-7");
        fs::write(&killed.pid, "7\n").unwrap();
        fs::write(&killed.state, serde_json::to_vec(&state("guest1")).unwrap()).unwrap();
        assert!(list(folder.path()).is_empty(), "one that is gone is not shown");
        let shown = Shown::in_foreground(folder.path(), state("guest1")).unwrap();
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
        drop((shown, background));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn files_of_a_recording_are_its_users_alone() {
        let folder = tempfile::tempdir().unwrap();
        let _background = Background::take(folder.path(), state("host")).unwrap();
        let _shown = Shown::in_foreground(folder.path(), state("host")).unwrap();
        let files: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap()).collect();
        assert_eq!(files.len(), 5);
        for file in files {
            assert_eq!(file.metadata().unwrap().mode() & 0o777, MODE, "{:?}", file.file_name());
        }
    }

    fn state_of_nothing(name: &str) -> State {
        State { name: name.into(), ..State::default() }
    }
}
