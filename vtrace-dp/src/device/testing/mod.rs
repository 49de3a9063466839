//! A VMM and its guest, for tests of the device and of the server.

#[cfg(test)]
pub(crate) mod vmm;
