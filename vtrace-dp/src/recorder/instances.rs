//! The host's instances: more buffers beside its top one, each recorded into a file of its own and joined at the end.
//!
//! In:    a [`Plan`]
//! Out:   finished files beside the host's, which [`super::files::finish_form`] makes one with it
//! Runs:  on record's thread; each has a pump of its own
//! Full:  as the host's ([`super::host`]); a recording that is killed leaves a file that `restore` finishes for each
//! Trust: the kernel

use std::path::{Path, PathBuf};

use vtrace_common::wire::client::LaneLedger;

use super::{
    error::RecordError,
    files::{machine_file::MachineFile, output::Output},
    host::{Host, HostError, HostReport},
    plan::{InstancePlan, Plan},
    session::GuestSession,
};

/// An instance of the host.
pub(crate) struct Instance {
    /// Its name in the file.
    pub(super) name: String,
    pub(super) host: Host,
    output: Option<Output>,
    pub(super) file: Option<MachineFile>,
    /// Once it has stopped.
    pub(super) report: Option<HostReport>,
}

impl Instance {
    /// The instance's name among machines.
    pub(super) fn title(&self) -> String {
        format!("host:{}", self.name)
    }

    pub(super) fn ledger(&self) -> Vec<LaneLedger> {
        self.host.recorder.ledger()
    }
}

/// Opens the files and prepares everything; tracing stays off.
pub(super) fn arm(plan: &Plan) -> Result<Vec<Instance>, RecordError> {
    let arm = |instance: &InstancePlan| {
        let output = Output::open(&part_path(&plan.host.output, &instance.name))?;
        let host = Host::arm(&instance.arm)?;
        Ok(Instance { name: instance.name.clone(), host, output: Some(output), file: None, report: None })
    };
    plan.instances.iter().map(arm).collect()
}

/// What a guest's one buffer is called in its file, if it has a name.
pub(super) fn of_guest<'a>(plan: &'a Plan, session: &GuestSession) -> Option<&'a str> {
    plan.guests.iter().find(|guest| guest.name == session.name)?.instance.as_deref()
}

/// Where an instance is until it is in the host's file.
fn part_path(host: &Path, name: &str) -> PathBuf {
    let mut path = host.as_os_str().to_owned();
    path.push(format!(".{name}.part"));
    path.into()
}

/// Writes the heads of the files and gives pages their places.
pub(super) fn attach(plan: &Plan, instances: &mut [Instance]) -> Result<(), RecordError> {
    for instance in instances {
        let output = instance.output.take().expect("a file is made once");
        let host = &mut instance.host;
        let file = MachineFile::create(&host.metadata, &host.armed, output, plan.bounds())?;
        host.attach(&file.writer, plan.rt)?;
        instance.file = Some(file);
    }
    Ok(())
}

/// Switches all on.
pub(super) fn start(instances: &mut [Instance], marker: &str) -> Result<(), HostError> {
    instances.iter_mut().try_for_each(|instance| instance.host.start(marker))
}

/// Files that are written now, in the order of the instances.
pub(super) fn files(instances: &mut [Instance]) -> impl Iterator<Item = &mut MachineFile> {
    instances.iter_mut().filter_map(|instance| instance.file.as_mut())
}

/// What is left of them when they have stopped: files that are to be finished, and what is in them.
pub(super) fn take(instances: &mut [Instance]) -> Vec<(MachineFile, HostReport)> {
    instances.iter_mut().filter_map(|instance| instance.file.take().zip(instance.report.take())).collect()
}

/// Switches all off, and takes what is left.
pub(super) fn stop(instances: &mut [Instance]) -> Result<(), HostError> {
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
    fn part_of_a_file_stands_beside_it_and_is_no_guests() {
        assert_eq!(part_path(Path::new("out/trace.dat"), "irqs"), Path::new("out/trace.dat.irqs.part"));
    }

    #[test]
    fn missing_folder_is_an_error_of_the_file() {
        let error = Output::open(&part_path(Path::new("/nowhere/trace.dat"), "irqs")).unwrap_err();
        let FileError { path, .. } = error;
        assert_eq!(path, Path::new("/nowhere/trace.dat.irqs.part"));
    }
}
