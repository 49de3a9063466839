//! vhost-user requests, as the `vhost` crate hands them over.
//!
//! In:    parsed requests; the crate has checked sizes, alignment and the number of descriptors
//! Out:   calls of [`Backend`]
//! Runs:  on the device's thread
//! Trust: the VMM. A request that cannot be obeyed is obeyed as far as it can be and logged: a refusal while QEMU starts
//!        the device is an error that can end it. Only requests that no correct VMM makes are refused.

use std::fs::File;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::{
    Error, Result, VhostUserBackendReqHandlerMut,
    message::{
        VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
        VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
        VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
    },
};
use vtrace_common::limits::{MEMORY_REGIONS_MAX, RINGS_MAX};

use super::{
    backend::{Addresses, Backend, RingState},
    negotiate,
};
use crate::sys::descriptor::{DescriptorFault, eventfd};

/// The answer to requests of features that were not offered.
const NOT_OFFERED: Error = Error::InvalidOperation("not offered");

impl Backend {
    fn slot(&mut self, index: u32) -> Result<&mut RingState> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.slots.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// Logs why a descriptor is refused: a write to it could wait for ever.
    fn refuse(&self, ring: u8, what: &str, fault: DescriptorFault) -> Error {
        self.log.warn(format_args!("ring {ring}: its {what} is refused: {fault}"));
        Error::InvalidParam
    }
}

fn index(index: u32) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(negotiate::offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !negotiate::offered() != 0 {
            self.log.warn(format_args!("the VMM accepts features that were not offered: {features:#x}"));
        }
        self.accepted = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.set_memory(regions, files);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, entries: u32) -> Result<()> {
        // What is no ring's size is found out when the ring starts.
        self.slot(index)?.entries = u16::try_from(entries).unwrap_or(u16::MAX);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.slot(index)?.addresses = Some(Addresses { descriptors, available, used });
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.slot(index)?.base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, ring: u32) -> Result<VhostUserVringState> {
        // Without an answer QEMU would wait for ever, so a ring that does not exist has one too.
        let base = self.stop(index(ring));
        Ok(VhostUserVringState::new(ring, u32::from(base)))
    }

    fn set_vring_kick(&mut self, ring: u8, kick: Option<File>) -> Result<()> {
        if self.slot(u32::from(ring))?.running {
            self.log.warn(format_args!("ring {ring} runs and keeps the kick it has"));
            return Ok(());
        }
        if kick.is_none() {
            self.log.warn(format_args!("ring {ring} has no kick and is not served"));
        }
        let kick = kick.map(|kick| eventfd(kick.into())).transpose();
        let kick = kick.map_err(|fault| self.refuse(ring, "kick", fault))?;
        self.slot(u32::from(ring))?.kick = kick;
        self.start_if_ready(usize::from(ring));
        Ok(())
    }

    fn set_vring_call(&mut self, ring: u8, call: Option<File>) -> Result<()> {
        self.name_ring(ring);
        let call = call.map(|call| eventfd(call.into())).transpose();
        let call = call.map_err(|fault| self.refuse(ring, "call", fault))?;
        self.set_call(usize::from(ring), call);
        Ok(())
    }

    fn set_vring_err(&mut self, _ring: u8, _error: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(negotiate::offered_protocol())
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::try_from(RINGS_MAX).expect("256 fits"))
    }

    fn set_vring_enable(&mut self, ring: u32, enable: bool) -> Result<()> {
        self.slot(ring)?.enabled = enable;
        self.start_if_ready(index(ring));
        Ok(())
    }

    fn get_config(&mut self, offset: u32, bytes: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        if self.ports() == 0 {
            self.log.error(format_args!("the device has too few rings: num_vqs must be 2 x (CPUs + 2)"));
        }
        Ok(negotiate::config(self.ports(), offset, bytes))
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // emerg_wr is the only writable field, and VIRTIO_CONSOLE_F_EMERG_WRITE is not offered.
        Ok(())
    }

    fn set_gpu_socket(&mut self, _backend: vhost::vhost_user::GpuBackend) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(NOT_OFFERED)
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(NOT_OFFERED)
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(u64::try_from(MEMORY_REGIONS_MAX).expect("64 fits"))
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.add_region(region, file);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.remove_region(region);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(NOT_OFFERED)
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(NOT_OFFERED)
    }
}
