//! Detects settings of a buffer that another program, or a trigger, changed while it was recorded.
//!
//! In:    the buffer's directory, once tracing is on
//! Out:   [`SettingChange`]s at the end: settings whose value differs, files that were written or opened meanwhile
//! Runs:  on the caller's thread; costs nothing while the recording runs (inotify(7) tells of writes and opens)
//! Full:  the kernel's queue of events has a bound; identical events take one place
//! Trust: the kernel

use std::path::{Path, PathBuf};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor},
};
use vtrace_common::{ids::Cpu, limits::CHANGES_MAX, wire::agent::SettingChange};

use super::{read, shortened};

/// Settings that decide what a page means and which events come.
const SETTINGS: [&str; 7] = [
    "trace_clock",
    "tracing_on",
    "current_tracer",
    "buffer_size_kb",
    "buffer_subbuf_size_kb",
    "tracing_cpumask",
    "set_event",
];
/// Writing to it clears the ring buffers; reading takes nothing.
const TRACE: &str = "trace";
/// Reading takes events out of the ring buffers.
const TRACE_PIPE: &str = "trace_pipe";

/// The settings of a buffer when its tracing was switched on, and a watch of their files.
#[derive(Debug)]
pub(super) struct SettingWatch {
    buffer: PathBuf,
    values: Vec<(&'static str, String)>,
    inotify: Option<Inotify>,
    watched: Vec<(WatchDescriptor, String)>,
}

impl SettingWatch {
    /// Starts with the present values. `cpus`: those whose taps are open; opens that follow are another program's.
    pub(super) fn begin(buffer: &Path, cpus: &[Cpu]) -> Self {
        let mut values = Vec::new();
        for setting in SETTINGS {
            if let Some(value) = value(buffer, setting) {
                values.push((setting, value));
            }
        }
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
        let inotify = inotify.inspect_err(|errno| log::debug!("changes that are undone are not seen: {errno}")).ok();
        let mut watch = Self { buffer: buffer.into(), values, inotify, watched: Vec::new() };
        for setting in SETTINGS {
            watch.add(setting.into(), AddWatchFlags::IN_MODIFY);
        }
        watch.add(TRACE.into(), AddWatchFlags::IN_MODIFY);
        watch.add(TRACE_PIPE.into(), AddWatchFlags::IN_OPEN);
        for cpu in cpus {
            for pipe in ["trace_pipe", "trace_pipe_raw"] {
                watch.add(format!("per_cpu/{cpu}/{pipe}"), AddWatchFlags::IN_OPEN);
            }
        }
        watch
    }

    /// A file that this kernel does not have is not watched.
    fn add(&mut self, file: String, events: AddWatchFlags) {
        let Some(inotify) = &self.inotify else { return };
        if let Ok(descriptor) = inotify.add_watch(&self.buffer.join(&file), events) {
            self.watched.push((descriptor, file));
        }
    }

    /// What has changed since the begin, at most [`CHANGES_MAX`]. To be called before tracing is switched off.
    pub(super) fn changes(&self) -> Vec<SettingChange> {
        let mut changes = Vec::new();
        for (setting, armed) in &self.values {
            let found = value(&self.buffer, setting).unwrap_or_else(|| "not readable".into());
            if found != *armed {
                let (armed, found) = (short(setting, armed), short(setting, &found));
                changes.push(SettingChange { setting: (*setting).into(), armed, found });
            }
        }
        for file in self.touched() {
            if changes.iter().all(|change| change.setting != file) {
                changes.push(SettingChange { setting: file, armed: String::new(), found: String::new() });
            }
        }
        changes.truncate(CHANGES_MAX);
        changes
    }

    /// Files that were written, or pipes that were opened.
    fn touched(&self) -> Vec<String> {
        let mut files = Vec::new();
        let Some(inotify) = &self.inotify else { return files };
        loop {
            match inotify.read_events() {
                Ok(events) => {
                    for event in events {
                        let watched = self.watched.iter().find(|(descriptor, _)| *descriptor == event.wd);
                        if let Some((_, file)) = watched.filter(|(_, file)| !files.contains(file)) {
                            files.push(file.clone());
                        }
                    }
                }
                Err(Errno::EINTR) => {}
                Err(_) => return files,
            }
        }
    }
}

/// The value of a setting: of a list in brackets the chosen one.
pub(super) fn value(buffer: &Path, setting: &str) -> Option<String> {
    let text = read(&buffer.join(setting)).ok()?;
    let text = text.trim_end();
    let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    Some(match chosen {
        Some((chosen, _)) if setting == "trace_clock" => chosen.into(),
        _ => text.into(),
    })
}

/// A value that fits a remark.
fn short(setting: &str, value: &str) -> String {
    match setting {
        "set_event" => format!("{} events", value.lines().count()),
        _ => shortened(value),
    }
}
