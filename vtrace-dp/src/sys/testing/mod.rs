//! Virtual machines of a few instructions, for tests and benchmarks.

#[cfg(any(test, feature = "testing"))]
pub mod page_guest;
