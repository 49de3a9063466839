//! An instance of our own: a ring buffer with its clock, size and events, removed when it is dropped.
//!
//! In:    an [`Arm`], `start`, marks
//! Out:   taps to read pages from; stats
//! Runs:  on the caller's thread
//! Full:  the kernel overwrites the oldest page and counts it; a reader never stops a writer
//! Trust: the kernel

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use vtrace_common::{
    ids::Cpu,
    limits::{PAGE_BYTES_MAX, PAGE_BYTES_MIN},
    wire::agent::{Arm, Failure, FailureKind, Piece, SettingChange},
};

use super::{
    INSTANCE_PREFIX, Tap, Tracefs, cpus, describe,
    events::{Events, switch_on},
    expressions, failure,
    markers::Markers,
    nearest, read, refused,
    setting_watch::{self, SettingWatch},
    settings, shortened,
    stats::Stats,
    top, write,
};

/// How full a CPU's buffer is when its readers wake up, in percent.
///
/// A wake-up costs an interrupt on the traced CPU and a pass of the pump; what is left above is the time the pump has
/// before pages are overwritten. With the kernel's default of 1.4 MiB a CPU, 10 % is about 35 pages a wake-up, and 9/10
/// of the buffer is head room. 1 % costs the agent's pump half as much CPU again or twice as much; 25 % saves up to a
/// seventh and loses events at rates at which 10 % does not; so does the kernel's own default, 50 % (docs/pump.md).
pub const BUFFER_PERCENT: u32 = 10;

/// The same for pages of [`PAGE_BYTES_LARGE`] and more, of which a buffer has few: 10 % of 1.4 MiB would be two of
/// 64 KiB. Waking for six took 0.35 CPU s/GiB of the host's pump where two took 0.52.
const BUFFER_PERCENT_LARGE: u32 = 30;

/// Pages that count as large.
const PAGE_BYTES_LARGE: u32 = 32 << 10;

const REMOVE_TRIES_MAX: u32 = 500;
const REMOVE_PAUSE: Duration = Duration::from_millis(4);

/// An instance of our own; removed when dropped. If a tap is still open, it cannot be removed, which is logged.
#[derive(Debug)]
pub struct Instance {
    tracefs: PathBuf,
    /// Its directory in `instances/`.
    directory: PathBuf,
    /// The directory of its files: the same, or the root of tracefs if the top buffer is borrowed.
    path: PathBuf,
    borrowed: Option<top::Borrowed>,
    switch: Option<File>,
    marker: Option<File>,
    cpus: Vec<Cpu>,
    page_bytes: u32,
    /// Which CPUs are traced, if not all.
    mask: Option<BTreeSet<Cpu>>,
    on: Events,
    markers: Option<Markers>,
    watch: Option<SettingWatch>,
    /// What was found while it was armed.
    remarks: Vec<String>,
    /// Writes that remove its filters and triggers.
    undo: Vec<expressions::Undo>,
}

impl Tracefs {
    /// Makes the instance `name` and prepares everything `arm` asks for; tracing stays off.
    ///
    /// # Errors
    /// As [`Tracefs::arm_with_markers`].
    pub fn arm(&self, name: &str, arm: &Arm) -> Result<Instance, Failure> {
        let mut instance = self.make_instance(name)?;
        if top::is_needed(self.root(), &instance.path, arm) {
            drop(instance);
            instance = self.make_instance(&format!("{name}{}", top::MARK))?;
            instance.borrow_top(top::Borrowed::take(self.root())?)?;
        }
        self.prepare(instance, arm, &mut |_| {})
    }

    /// The same, with the markers of applications ([`super::markers`]). `each` is called with the number of events that are
    /// on, after each step: on a slow machine arming can take minutes.
    ///
    /// # Errors
    /// `NoSuchEvent`, `NoSuchClock`, `NoSuchTracer`, `NoSuchFunction`, `NoSuchOption`, `NoSuchPageSize`, `Expression`,
    /// `Memory` (the ring buffers do not fit), `State` (an instance of that name, or the top buffer, is in use), else
    /// `Kernel`. Nothing is left then.
    pub fn arm_with_markers(&self, name: &str, arm: &Arm, each: &mut dyn FnMut(usize)) -> Result<Instance, Failure> {
        let mut instance = self.make_buffer(name, arm)?;
        instance.markers = Some(Markers::arm(self.root(), &instance.path)); // options of the request follow
        self.prepare(instance, arm, each)
    }

    fn prepare(&self, mut instance: Instance, arm: &Arm, each: &mut dyn FnMut(usize)) -> Result<Instance, Failure> {
        instance.set_tracing(false)?;
        instance.set_clock(&arm.clock)?;
        if arm.subbuf_kb > 0 {
            instance.set_page_size(arm.subbuf_kb)?; // before the buffer's: the kernel keeps its bytes, not its pages
        }
        if arm.buffer_kb > 0 {
            write(&instance.path.join("buffer_size_kb"), &arm.buffer_kb.to_string())?;
        }
        instance.page_bytes = page_bytes(&read(&instance.path.join("events/header_page"))?)?;
        write(&instance.path.join("buffer_percent"), &instance.percent().to_string())?;
        instance.undo = settings::undo(&instance.path, arm);
        settings::grow_saved_names(self.root());
        settings::apply(&instance.path, arm)?;
        if !arm.cpu_mask.is_empty() {
            instance.mask = parse_mask(&read(&instance.path.join("tracing_cpumask"))?);
        }
        let available = Events::parse(&read(&self.root().join("available_events"))?);
        instance.remarks = expressions::apply(&instance.path, &available, &arm.events, &mut instance.undo)?;
        instance.check_clock(arm)?;
        instance.on = switch_on(&instance.path, &available, &arm.events, each)?;
        Ok(instance)
    }

    /// An instance, or the top buffer if the request needs it.
    fn make_buffer(&self, name: &str, arm: &Arm) -> Result<Instance, Failure> {
        let instance = self.make_instance(name)?;
        if !top::is_needed(self.root(), &instance.path, arm) {
            return Ok(instance);
        }
        drop(instance);
        let mut instance = self.make_instance(&format!("{name}{}", top::MARK))?;
        instance.borrow_top(top::Borrowed::take(self.root())?)?;
        log::info!("the top buffer is used");
        Ok(instance)
    }

    fn make_instance(&self, name: &str) -> Result<Instance, Failure> {
        assert!(
            name.starts_with(INSTANCE_PREFIX) && !name.contains('/'),
            "{name} is not the name of an instance of vtrace"
        );
        let path = self.root().join("instances").join(name);
        match fs::create_dir(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let in_use = |error: io::Error| {
                    failure(FailureKind::State, &path.to_string_lossy(), &format!("in use: {error}"))
                };
                remove_directory(&path).map_err(in_use)?;
                fs::create_dir(&path).map_err(|error| refused(&path, &error))?;
            }
            made => made.map_err(|error| refused(&path, &error))?,
        }
        let mut instance = Instance {
            tracefs: self.root().into(),
            directory: path.clone(),
            path,
            borrowed: None,
            switch: None,
            marker: None,
            cpus: Vec::new(),
            page_bytes: 0,
            mask: None,
            on: Events::default(),
            markers: None,
            watch: None,
            remarks: Vec::new(),
            undo: Vec::new(),
        };
        instance.switch = Some(instance.open_to_write("tracing_on")?);
        instance.marker = Some(instance.open_to_write("trace_marker")?);
        instance.cpus = instance.online()?;
        Ok(instance)
    }
}

impl Instance {
    /// CPUs that were online when it was made, in order.
    pub fn cpus(&self) -> &[Cpu] {
        &self.cpus
    }

    /// Bytes of one page (sub-buffer), header included.
    pub fn page_bytes(&self) -> u32 {
        self.page_bytes
    }

    /// Contents of trace_clock: all clocks, the chosen one in brackets.
    pub fn clock(&self) -> String {
        let text = read(&self.path.join("trace_clock")).unwrap_or_default();
        shortened(text.trim_end())
    }

    /// How many events are on.
    pub fn events(&self) -> u32 {
        u32::try_from(self.on.count()).unwrap_or(u32::MAX)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a CPU's ring buffer, non-blocking. Two taps of one CPU take different pages.
    ///
    /// # Errors
    /// `Kernel`, when the CPU does not exist or the kernel refuses.
    pub fn tap(&self, cpu: Cpu) -> Result<Tap, Failure> {
        let path = self.path.join(format!("per_cpu/{cpu}/trace_pipe_raw"));
        let opened = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&path);
        opened.map(|file| Tap { cpu, fd: file.into() }).map_err(|error| refused(&path, &error))
    }

    /// Switches tracing on or off: one write to an open file.
    ///
    /// # Errors
    /// `Kernel`
    pub fn set_tracing(&self, on: bool) -> Result<(), Failure> {
        let mut switch = self.switch.as_ref().expect("open until it is removed");
        switch.write_all(if on { b"1" } else { b"0" }).map_err(|error| refused(&self.path.join("tracing_on"), &error))
    }

    /// Switches tracing on and from now on detects changes of settings. All taps of online CPUs must be open.
    ///
    /// # Errors
    /// `Kernel`
    pub fn start_tracing(&mut self) -> Result<(), Failure> {
        self.set_tracing(true)?;
        self.watch = Some(SettingWatch::begin(&self.path, &self.cpus));
        Ok(())
    }

    /// Settings that changed since [`Instance::start_tracing`]; to be asked before tracing is switched off.
    pub fn setting_changes(&self) -> Vec<SettingChange> {
        self.watch.as_ref().map(SettingWatch::changes).unwrap_or_default()
    }

    /// Refuses triggers that made the kernel switch the buffer's clock.
    ///
    /// Source: kernel/trace/trace_events_hist.c, `event_hist_trigger_parse()`: a trigger with `common_timestamp` sets the
    /// clock that its `clock=` names, `global` by default.
    fn check_clock(&self, arm: &Arm) -> Result<(), Failure> {
        let Some(found) = setting_watch::value(&self.path, "trace_clock") else { return Ok(()) };
        if arm.clock.is_empty() || found == arm.clock {
            return Ok(());
        }
        let triggers = arm.events.iter().flat_map(|request| &request.triggers);
        let culprit = triggers.clone().find(|trigger| trigger.contains("common_timestamp"));
        let object = culprit.or_else(|| triggers.clone().next()).map_or("trace_clock", String::as_str);
        let detail = format!(
            "it makes the kernel switch the buffer's clock from {0} to {found}: add :clock={0} to the trigger",
            arm.clock
        );
        Err(failure(FailureKind::Expression, object, &detail))
    }

    /// What the summary says about it: filters and triggers that fit some events only, markers of applications.
    pub fn remarks(&self) -> Vec<String> {
        let markers = self.markers.iter().flat_map(|markers| markers.remarks(&self.tracefs));
        self.remarks.iter().cloned().chain(markers).collect()
    }

    /// Writes `text` into the trace, as one event; the kernel cuts it to what fits a page. Where not all CPUs are traced,
    /// on one that is. While tracing or markers are off (`traceoff`, `nomarkers`), or no CPU that is traced is online,
    /// nothing is written.
    ///
    /// # Errors
    /// `Kernel`
    pub fn mark(&self, text: &str) -> Result<(), Failure> {
        let mut marker = self.marker.as_ref().expect("open until it is removed");
        let mut write = || marker.write(text.as_bytes()); // not write_all: what was cut would become a second event
        let written = match &self.mask {
            Some(mask) => on_one_of(mask, write),
            None => write(),
        };
        match written {
            Ok(_) => Ok(()),
            // EBADF: tracing is off. EINVAL: the option `markers` is off.
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EBADF | nix::libc::EINVAL)) => {
                log::info!("{text:?} is not in the trace: {error}");
                Ok(())
            }
            Err(error) => Err(refused(&self.path.join("trace_marker"), &error)),
        }
    }

    /// per_cpu/cpuN/stats as the kernel writes it; empty if it cannot be read. [`super::stats::Stats`] parses it.
    pub fn stats(&self, cpu: Cpu) -> String {
        let text = read(&self.path.join(format!("per_cpu/{cpu}/stats"))).unwrap_or_default();
        shortened(&text)
    }

    /// CPUs that were offline when it was made and are traced if they come online, in order.
    pub fn absent_cpus(&self) -> Vec<Cpu> {
        let cpus = cpus::possible_cpus().or_else(|| self.buffers().ok()).unwrap_or_default();
        let mut absent: Vec<Cpu> = cpus.into_iter().filter(|cpu| !self.cpus.contains(cpu)).collect();
        absent.retain(|cpu| self.mask.as_ref().is_none_or(|mask| mask.contains(cpu)));
        absent
    }

    /// Whether a CPU has written into its ring buffer, or tried to.
    pub fn has_recorded(&self, cpu: Cpu) -> bool {
        Stats::parse(&self.stats(cpu)).is_ok_and(|stats| stats.recorded() > 0)
    }

    /// The description that is known before the trace: header page to kernel symbols, in the order of a trace.dat.
    ///
    /// # Errors
    /// `Kernel`, when a file cannot be read. Files that this kernel does not have give an empty text.
    pub fn describe(&self, kallsyms: bool, each: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
        describe::before(&self.tracefs, &self.path, &self.on, kallsyms, each)
    }

    /// The description that is known only after the trace: command lines.
    ///
    /// # Errors
    /// `Kernel`, when saved_cmdlines cannot be read.
    pub fn describe_end(&self, each: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
        describe::after(&self.tracefs, each)
    }

    /// Removes it.
    ///
    /// # Errors
    /// `Kernel` (`EBUSY`): a tap is still open
    pub fn remove(mut self) -> Result<(), Failure> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<(), Failure> {
        let Some(mut switch) = self.switch.take() else { return Ok(()) };
        let stopped = switch.write_all(b"0");
        drop((switch, self.marker.take(), self.watch.take()));
        // An instance takes its filters and triggers with it, but for hist triggers, whose variables hold it.
        let is_borrowed = self.borrowed.is_some();
        for (path, text) in self.undo.iter().rev().filter(|(_, text)| is_borrowed || text.starts_with("!hist")) {
            // A trigger whose count has run out is gone already.
            let _ = write(path, text);
        }
        if let Some(borrowed) = self.borrowed.take() {
            borrowed.give_back();
        }
        let removed = stopped.and(remove_directory(&self.directory));
        removed.map_err(|error| refused(&self.directory, &error))
    }

    /// Traces into the top buffer from now on.
    fn borrow_top(&mut self, borrowed: top::Borrowed) -> Result<(), Failure> {
        self.path.clone_from(&self.tracefs);
        self.borrowed = Some(borrowed);
        self.switch = Some(self.open_to_write("tracing_on")?);
        self.marker = Some(self.open_to_write("trace_marker")?);
        Ok(())
    }

    fn open_to_write(&self, name: &str) -> Result<File, Failure> {
        let path = self.path.join(name);
        OpenOptions::new().write(true).open(&path).map_err(|error| refused(&path, &error))
    }

    fn set_clock(&self, wanted: &str) -> Result<(), Failure> {
        if wanted.is_empty() {
            return Ok(());
        }
        let path = self.path.join("trace_clock");
        let text = read(&path)?;
        let clocks: Vec<&str> = text.split_whitespace().map(|clock| clock.trim_matches(['[', ']'])).collect();
        if !clocks.contains(&wanted) {
            let near = nearest(wanted, clocks.iter().copied(), usize::MAX);
            let detail = format!("this kernel has {}", clocks.join(", "));
            return Err(Failure { near, ..failure(FailureKind::NoSuchClock, wanted, &detail) });
        }
        write(&path, wanted)
    }

    /// Sets the size of a page (sub-buffer), for all CPUs.
    fn set_page_size(&self, kb: u32) -> Result<(), Failure> {
        let object = format!("--subbuf-size {kb}");
        let no_such = |detail: &str| Err(failure(FailureKind::NoSuchPageSize, &object, detail));
        let bytes = usize::try_from(kb).ok().and_then(|kb| kb.checked_mul(1024)).unwrap_or(usize::MAX);
        if !bytes.is_power_of_two() || !(PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&bytes) {
            let range = format!("not a power of two from {} to {}", PAGE_BYTES_MIN >> 10, PAGE_BYTES_MAX >> 10);
            return no_such(&range);
        }
        let path = self.path.join("buffer_subbuf_size_kb");
        match fs::metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                no_such("this kernel has one page size only (before 6.8)")
            }
            _ => write(&path, &kb.to_string()),
        }
    }

    /// How full a buffer is when its readers wake up.
    fn percent(&self) -> u32 {
        if self.page_bytes >= PAGE_BYTES_LARGE { BUFFER_PERCENT_LARGE } else { BUFFER_PERCENT }
    }

    /// Full pages that a tap holds, at least, when poll(2) says that it can be read; 0 where it makes no such promise:
    /// on kernels before 6.1, where it does not keep to `buffer_percent`, and for buffers of a few pages.
    ///
    /// Source: kernel/trace/ring_buffer.c, `full_hit()`: the page being written to is one of the dirty ones.
    pub fn pages_promised(&self) -> usize {
        if !kernel_is_at_least(6, 1) {
            return 0;
        }
        let text = read(&self.path.join("buffer_size_kb")).unwrap_or_default();
        let kb: u64 = text.split_whitespace().next().and_then(|kb| kb.parse().ok()).unwrap_or(0);
        let pages = kb.saturating_mul(1024) / u64::from(self.page_bytes.max(1));
        let promised = (pages.saturating_mul(u64::from(self.percent())) / 100).saturating_sub(1);
        usize::try_from(promised).unwrap_or(usize::MAX)
    }

    /// CPUs that are online; where sysfs does not say, those that have a buffer.
    fn online(&self) -> Result<Vec<Cpu>, Failure> {
        if let Some(cpus) = cpus::online_cpus() {
            return Ok(cpus);
        }
        self.buffers()
    }

    /// CPUs that have a buffer, or could have one.
    fn buffers(&self) -> Result<Vec<Cpu>, Failure> {
        let path = self.path.join("per_cpu");
        let entries = fs::read_dir(&path).map_err(|error| refused(&path, &error))?;
        let number = |name: std::ffi::OsString| name.to_str()?.strip_prefix("cpu")?.parse().ok().map(Cpu);
        let mut cpus: Vec<Cpu> = entries.flatten().filter_map(|entry| number(entry.file_name())).collect();
        cpus.sort_unstable();
        Ok(cpus)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(refusal) = self.take_down() {
            log::warn!("cannot remove {}: {}", refusal.object, refusal.detail);
        }
    }
}

/// Removes an instance. While it is busy, tries again for 2 s: the kernel releases the files of an io_uring some time after
/// it was closed.
pub(super) fn remove_directory(path: &Path) -> io::Result<()> {
    for attempt in 1..REMOVE_TRIES_MAX {
        match fs::remove_dir(path) {
            // A variable of a hist trigger holds the instance.
            Err(error) if error.kind() == ErrorKind::ResourceBusy && attempt == 1 => {
                expressions::clear_hist_triggers(path)
            }
            Err(error) if error.kind() == ErrorKind::ResourceBusy => sleep(REMOVE_PAUSE),
            removed => return removed,
        }
    }
    fs::remove_dir(path)
}

/// Bytes of one page: where its data begins plus how much fits (`field: char data; offset:16; size:4080; …`).
pub(super) fn page_bytes(header_page: &str) -> Result<u32, Failure> {
    let number = |line: &str, key: &str| line.split_once(key)?.1.split(';').next()?.trim().parse::<u32>().ok();
    let data = header_page.lines().find(|line| line.contains("char data;"));
    let sum = data.and_then(|line| number(line, "offset:")?.checked_add(number(line, "size:")?));
    let is_possible = |bytes: &u32| {
        let bytes = usize::try_from(*bytes).unwrap_or(usize::MAX);
        bytes.is_power_of_two() && (PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&bytes)
    };
    sum.filter(is_possible).ok_or_else(|| failure(FailureKind::Kernel, "events/header_page", header_page))
}

/// Calls `done` on one of these CPUs, if the thread may run there.
fn on_one_of<T>(cpus: &BTreeSet<Cpu>, done: impl FnOnce() -> T) -> T {
    let (thread, mut there) = (Pid::from_raw(0), CpuSet::new());
    for cpu in cpus.iter().filter_map(|cpu| usize::try_from(cpu.0).ok()) {
        // A CPU beyond the size of the set is ignored.
        let _ = there.set(cpu);
    }
    let before = sched_getaffinity(thread).and_then(|before| sched_setaffinity(thread, &there).map(|()| before));
    let result = done();
    if let Err(errno) = before.and_then(|before| sched_setaffinity(thread, &before)) {
        log::debug!("cannot change the CPU affinity to write a marker: {errno}");
    }
    result
}

fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    release.is_ok_and(|release| parse_release(&release) >= Some((major, minor)))
}

/// `6.18.44-fc` is 6.18.
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Parses a mask of CPUs as the kernel writes it (`3,00000001`: words of 32 bits, the highest first); `None` if it is
/// malformed.
fn parse_mask(text: &str) -> Option<BTreeSet<Cpu>> {
    let words = text.trim().rsplit(',').map(|word| u32::from_str_radix(word, 16).ok()).collect::<Option<Vec<_>>>()?;
    let cpus = (0..)
        .zip(words)
        .flat_map(|(at, word)| (0..32).filter(move |bit| word >> bit & 1 == 1).map(move |bit| (at, bit)));
    cpus.map(|(at, bit): (u32, u32)| Some(Cpu(at.checked_mul(32)?.checked_add(bit)?))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn page_is_its_header_and_its_data() {
        let text = "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n\tfield: local_t commit;\toffset:8;\t\
                    size:8;\tsigned:1;\n\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n\
                    \tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;\n";
        assert_eq!(page_bytes(text), Ok(4096));
        assert_eq!(page_bytes(&text.replace("4080", "65520")), Ok(65536));
        for odd in ["4081", "x", "4294967295", "16"] {
            assert_eq!(page_bytes(&text.replace("4080", odd)).unwrap_err().kind, FailureKind::Kernel, "{odd}");
        }
    }

    #[test]
    fn masks_of_cpus_are_understood_or_refused() {
        assert_eq!(parse_mask("5\n"), Some([Cpu(0), Cpu(2)].into()));
        assert_eq!(parse_mask("2,00000000,80000001"), Some([Cpu(0), Cpu(31), Cpu(65)].into()));
        assert_eq!(parse_mask("00000000,00000000"), Some([].into()));
        for odd in ["", "x", "1,", "100000000", "-1"] {
            assert_eq!(parse_mask(odd), None, "{odd}");
        }
    }

    #[test]
    fn release_is_two_numbers_or_nothing() {
        assert_eq!(parse_release("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(parse_release("6.1-rc1"), Some((6, 1)));
        assert_eq!((parse_release("x"), parse_release("6")), (None, None));
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(text: String) {
            let _ = page_bytes(&text);
            let _ = parse_mask(&text);
            let _ = parse_release(&text);
        }
    }
}
