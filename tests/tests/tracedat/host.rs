//! Real pages: a little scheduling on this machine, out of its own tracefs, read file by file.

use std::{
    fs::{self, OpenOptions},
    io::{ErrorKind, Read},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use vtrace_common::ids::Cpu;
use vtrace_dp::{
    ftrace::metadata::Metadata,
    trace::{
        format::option::TraceOption,
        write::{Finished, Writer},
    },
};

const TRACEFS: &str = "/sys/kernel/tracing";

/// What one instance recorded.
pub(crate) struct Recording {
    pub(crate) metadata: Metadata,
    pub(crate) page_bytes: u32,
    pub(crate) lanes: Vec<(Cpu, Vec<u8>)>,
    pub(crate) stats: Vec<String>,
}

/// Removes its instance.
struct Instance(PathBuf);

impl Instance {
    fn new(name: &str, page_kb: u32) -> Result<Self> {
        let path = Path::new(TRACEFS).join("instances").join(format!("vtrace-test-{name}-{}", std::process::id()));
        fs::create_dir(&path)
            .with_context(|| format!("cannot make {}: root and a mounted tracefs are needed", path.display()))?;
        let instance = Self(path);
        instance.write("tracing_on", "0")?;
        instance.write("trace_clock", "x86-tsc")?;
        if page_kb != 4 {
            instance.write("buffer_subbuf_size_kb", &page_kb.to_string())?;
        }
        instance.write("buffer_size_kb", &(page_kb * 64).max(2048).to_string())?;
        for event in ["sched/sched_switch", "sched/sched_waking"] {
            instance.write(&format!("events/{event}/enable"), "1")?;
        }
        Ok(instance)
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        fs::write(self.0.join(file), text).with_context(|| format!("cannot write {text:?} to {file}"))
    }

    fn cpus(&self) -> Result<Vec<Cpu>> {
        let entries = fs::read_dir(self.0.join("per_cpu"))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let numbers = names.map(|name: Result<String>| Ok(Cpu(name?.trim_start_matches("cpu").parse()?)));
        let mut cpus = numbers.collect::<Result<Vec<_>>>()?;
        cpus.sort_unstable();
        Ok(cpus)
    }

    fn pages(&self, cpu: Cpu, page_bytes: u32) -> Result<Vec<u8>> {
        let path = self.0.join(format!("per_cpu/{cpu}/trace_pipe_raw"));
        let mut file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
        let (mut pages, mut page) = (Vec::new(), vec![0; page_bytes as usize]);
        loop {
            match file.read(&mut page) {
                Ok(0) => return Ok(pages),
                Ok(bytes) => pages.extend(&page[..bytes]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(pages),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// Something to schedule, on every CPU.
fn load() -> Result<()> {
    let sleepers: Vec<_> =
        (0..4).map(|_| thread::spawn(|| (0..200).for_each(|_| thread::sleep(Duration::from_micros(200))))).collect();
    for _ in 0..20 {
        Command::new("true").status()?;
    }
    sleepers.into_iter().for_each(|sleeper| sleeper.join().expect("a sleeper does not panic"));
    Ok(())
}

/// Records with pages of `page_kb`.
pub(crate) fn record(name: &str, page_kb: u32) -> Result<Recording> {
    let instance = Instance::new(name, page_kb)?;
    instance.write("tracing_on", "1")?;
    load()?;
    instance.write("tracing_on", "0")?;
    let page_bytes = page_kb << 10;
    let mut recording = Recording { metadata: describe()?, page_bytes, lanes: Vec::new(), stats: Vec::new() };
    for cpu in instance.cpus()? {
        recording.lanes.push((cpu, instance.pages(cpu, page_bytes)?));
        let stats = fs::read_to_string(instance.0.join(format!("per_cpu/{cpu}/stats")))?;
        recording.stats.push(format!("CPU: {}\n{stats}", cpu.0));
    }
    Ok(recording)
}

/// In reads of 64 KiB: header_page ends with the first read, however short (`show_header_page_file()` in the kernel).
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let (mut file, mut text, mut buffer) = (fs::File::open(path)?, Vec::new(), vec![0; 64 << 10]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(text),
            bytes => text.extend(&buffer[..bytes]),
        }
    }
}

fn describe() -> Result<Metadata> {
    let read = |file: &str| read(&Path::new(TRACEFS).join(file)).with_context(|| format!("cannot read {file}"));
    let mut metadata = Metadata {
        header_page: read("events/header_page")?,
        header_event: read("events/header_event")?,
        kallsyms: fs::read("/proc/kallsyms")?,
        printk_formats: read("printk_formats")?,
        cmdlines: read("saved_cmdlines")?,
        ..Metadata::default()
    };
    for system in ["ftrace", "sched"] {
        let mut formats = Vec::new();
        for entry in fs::read_dir(Path::new(TRACEFS).join("events").join(system))? {
            let format = entry?.path().join("format");
            if format.exists() {
                formats.push(fs::read(format)?);
            }
        }
        match system {
            "ftrace" => metadata.ftrace_formats = formats,
            _ => drop(metadata.event_formats.insert(system.to_owned(), formats)),
        }
    }
    Ok(metadata)
}

impl Recording {
    /// Writes it as a recording would: areas first, pages into them, the rest at the end.
    pub(crate) fn write(&self, path: &Path, options: &[TraceOption], notes: &str) -> Result<Finished> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        let lanes: Vec<Cpu> = self.lanes.iter().map(|(cpu, _)| *cpu).collect();
        let writer = Writer::create(file, &self.metadata, "local [x86-tsc]", self.page_bytes, &lanes)?;
        for (area, (cpu, pages)) in writer.areas().iter().zip(&self.lanes) {
            assert_eq!(area.cpu, *cpu);
            writer.file().write_all_at(pages, area.offset)?;
        }
        let filled: Vec<(Cpu, u64)> = self.lanes.iter().map(|(cpu, pages)| (*cpu, pages.len() as u64)).collect();
        Ok(writer.finish(&filled, &self.metadata.cmdlines, options, notes)?)
    }

    /// Options of a file that stands alone: raw cycles are shown.
    pub(crate) fn options(&self) -> Vec<TraceOption> {
        let mut options = vec![
            TraceOption::TraceClock("local [x86-tsc]".to_owned()),
            TraceOption::Uname("Linux here 6 x86_64".to_owned()),
            TraceOption::Version("vtrace test".to_owned()),
        ];
        options.extend(self.stats.iter().cloned().map(TraceOption::CpuStat));
        options
    }
}
