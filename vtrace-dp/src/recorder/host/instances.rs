//! The host's instances (`-B`): additional buffers, each recorded into its own file and merged into the host's at the end.
//!
//! In:    a [`Plan`]
//! Out:   finished files beside the host's, which `files::finish_form` merges into it
//! Runs:  on record's thread; each has its own pump
//! Full:  as [`super`]; a killed recording leaves one file per instance, which `restore` finishes
//! Trust: the kernel

use std::path::{Path, PathBuf};

use vtrace_common::wire::client::LaneLedger;

use super::{Host, HostError, HostReport};
use crate::recorder::{
    error::RecordError,
    files::{machine_file::MachineFile, output::OutputFile},
    guests::session::GuestSession,
    plan::Plan,
};

/// One instance of the host.
pub(crate) struct Instance {
    /// Its name in the file.
    pub(crate) name: String,
    /// The size of each CPU's buffer that was asked for, KiB; 0 for the kernel's default.
    pub(crate) buffer_kb: u32,
    pub(crate) host: Host,
    output: Option<OutputFile>,
    pub(crate) file: Option<MachineFile>,
    /// Set once it has stopped.
    report: Option<HostReport>,
}

impl Instance {
    /// Its name in the closing table.
    pub(crate) fn title(&self) -> String {
        format!("host:{}", self.name)
    }

    pub(crate) fn ledger(&self) -> Vec<LaneLedger> {
        self.host.recorder.ledger()
    }
}

/// Opens the files and arms the instances; tracing stays off.
pub(crate) fn arm(plan: &Plan) -> Result<Vec<Instance>, RecordError> {
    let mut instances = Vec::new();
    for instance in &plan.instances {
        let output = OutputFile::open(&part_path(&plan.host.output, &instance.name))?;
        let host = Host::arm(&instance.arm, false)?;
        instances.push(Instance {
            name: instance.name.clone(),
            buffer_kb: instance.arm.buffer_kb,
            host,
            output: Some(output),
            file: None,
            report: None,
        });
    }
    Ok(instances)
}

/// The name of a guest's buffer in its file; `None` for the top buffer.
pub(crate) fn of_guest<'a>(plan: &'a Plan, session: &GuestSession) -> Option<&'a str> {
    plan.guest(&session.name)?.instance.as_deref()
}

/// The file of an instance until it is merged into the host's.
fn part_path(host: &Path, name: &str) -> PathBuf {
    let mut path = host.as_os_str().to_owned();
    path.push(format!(".{name}.part"));
    path.into()
}

/// Writes the heads of the files and starts to move pages.
pub(crate) fn attach(plan: &Plan, instances: &mut [Instance]) -> Result<(), RecordError> {
    for (instance, planned) in instances.iter_mut().zip(&plan.instances) {
        let output = instance.output.take().expect("a file is made once");
        let host = &mut instance.host;
        let file = MachineFile::create(&host.metadata, &host.armed, output, plan.bounds(planned.newest_bytes))?;
        host.attach(&file.writer, plan.rt)?;
        instance.file = Some(file);
    }
    Ok(())
}

/// Switches tracing on in all of them.
pub(crate) fn start(instances: &mut [Instance], marker: &str) -> Result<(), HostError> {
    instances.iter_mut().try_for_each(|instance| instance.host.start(marker))
}

/// Their files, in order.
pub(crate) fn files(instances: &mut [Instance]) -> impl Iterator<Item = &mut MachineFile> {
    instances.iter_mut().filter_map(|instance| instance.file.as_mut())
}

/// Their files and reports, once they have stopped.
pub(crate) fn take(instances: &mut [Instance]) -> Vec<(MachineFile, HostReport)> {
    instances.iter_mut().filter_map(|instance| instance.file.take().zip(instance.report.take())).collect()
}

/// Switches tracing off in all of them and moves the remaining pages.
pub(crate) fn stop(instances: &mut [Instance]) -> Result<(), HostError> {
    for instance in instances {
        instance.report = Some(instance.host.stop()?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::files::output::FileError;

    #[test]
    fn instances_part_is_beside_the_hosts_file() {
        assert_eq!(part_path(Path::new("out/trace.dat"), "irqs"), Path::new("out/trace.dat.irqs.part"));
    }

    #[test]
    fn missing_folder_is_an_error_of_the_file() {
        let error = OutputFile::open(&part_path(Path::new("/nowhere/trace.dat"), "irqs")).unwrap_err();
        let FileError { path, .. } = error;
        assert_eq!(path, Path::new("/nowhere/trace.dat.irqs.part"));
    }
}
