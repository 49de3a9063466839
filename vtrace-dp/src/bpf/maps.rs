//! The maps that the eBPF programs share with this process.
//!
//! In:    an [`Object`]; keys to insert
//! Out:   records in the order in which they were written; the values of all CPUs
//! Full:  a program that finds the ring buffer full counts that itself; nothing is overwritten
//! Trust: the kernel. A record of an unexpected length is an error

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd},
};

use aya::{
    Pod,
    maps::{HashMap, MapData, PerCpuArray, RingBuf},
};

use super::{BpfError, map_failed, object::Object};

/// A ring buffer that programs write records to. Its descriptor polls readable while a record waits.
pub struct RecordRing {
    ring: RingBuf<MapData>,
}

impl RecordRing {
    /// The ring buffer `name` of the object.
    ///
    /// # Errors
    /// The object has no such map.
    pub fn open(object: &mut Object, name: &'static str) -> Result<Self, BpfError> {
        Ok(Self { ring: object.take_map(name)? })
    }

    /// Takes the next record and decodes it; `Ok(None)` if none waits.
    ///
    /// # Errors
    /// [`BpfError::Mismatch`] if `decode` does not accept the record.
    pub fn next<T>(&mut self, decode: fn(&[u8]) -> Option<T>) -> Result<Option<T>, BpfError> {
        match self.ring.next() {
            None => Ok(None),
            Some(record) => decode(&record).map(Some).ok_or(BpfError::Mismatch { what: "record of this length" }),
        }
    }
}

impl AsFd for RecordRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl fmt::Debug for RecordRing {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("RecordRing").finish_non_exhaustive()
    }
}

/// A set of numbers that programs look up.
#[derive(Debug)]
pub struct KeySet {
    map: HashMap<MapData, u32, u8>,
    name: &'static str,
}

impl KeySet {
    /// The hash map `name` of the object, used as a set.
    ///
    /// # Errors
    /// The object has no such map.
    pub fn open(object: &mut Object, name: &'static str) -> Result<Self, BpfError> {
        Ok(Self { map: object.take_map(name)?, name })
    }

    /// Adds `key`.
    ///
    /// # Errors
    /// The map is full.
    pub fn insert(&mut self, key: u32) -> Result<(), BpfError> {
        self.map.insert(key, 1, 0).map_err(|source| map_failed(self.name, source))
    }
}

/// One value on each CPU, written by programs.
pub struct PerCpuValue<T: Pod> {
    map: PerCpuArray<MapData, T>,
    name: &'static str,
}

impl<T: Pod> PerCpuValue<T> {
    /// The only element of the per-CPU array `name` of the object.
    ///
    /// # Errors
    /// The object has no such map, or its values have another size.
    pub fn open(object: &mut Object, name: &'static str) -> Result<Self, BpfError> {
        Ok(Self { map: object.take_map(name)?, name })
    }

    /// The values of all CPUs.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn of_each_cpu(&self) -> Result<Vec<T>, BpfError> {
        let values = self.map.get(&0, 0).map_err(|source| map_failed(self.name, source))?;
        Ok(values.iter().copied().collect())
    }
}

impl<T: Pod> fmt::Debug for PerCpuValue<T> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("PerCpuValue").field("name", &self.name).finish_non_exhaustive()
    }
}
