//! What tasks and tests share: packages, guest images, virtual machines.
#![expect(clippy::print_stderr, clippy::print_stdout, reason = "tasks talk to the person at the terminal")]

pub mod bochs;
pub mod boot;
pub mod build;
pub mod cache;
pub mod cpio;
pub mod debian;
pub mod demo;
pub mod dist;
pub mod ebpf;
pub mod fuzz;
pub mod image;
pub mod kernel;
pub mod lab;
pub mod machine;
pub mod packages;
pub mod qemu;
pub mod soak;
pub mod test;
pub mod tidy;
