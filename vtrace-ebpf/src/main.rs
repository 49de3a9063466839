//! The programs. Each says which vCPU it sees; what is read and when it is told stands in [`tsc`].
//!
//! In:    kvm tracepoints and the kernel's list of open files.
//! Out:   [`vtrace_common::kvm`] records: a ring buffer of changes, the iterator's file.
//! Runs:  in the vCPU's thread, between its exit and its entry; the iterator in the thread that reads it.
//! Full:  a change that finds no room is counted and tried again at the next call.
//! Trust: the loader's layout; a wrong offset reads a wrong number, never out of the kernel's leave (probe_read).
//!
//! kvm_entry comes from arch/x86/kvm/{svm/svm,vmx/vmx}.c (up to 5.10 from x86.c): a third KVM vendor may leave it out.
#![no_std]
#![no_main]

mod maps;
mod tsc;

use core::ffi::c_void;

use aya_ebpf::{macros::raw_tracepoint, programs::RawTracePointContext};
use vtrace_common::kvm::source;

/// The kernel's licence check: `bpf_probe_read_kernel` is for GPL-compatible programs only.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// `kvm_entry(vcpu, …)`. Hot.
#[raw_tracepoint(tracepoint = "kvm_entry")]
fn kvm_entry(context: RawTracePointContext) {
    tsc::watch(context.arg(0), source::ENTRY);
}

/// `kvm_exit(vcpu, isa)`; up to 5.10 `kvm_exit(exit_reason, vcpu, isa)`. Hot.
#[raw_tracepoint(tracepoint = "kvm_exit")]
fn kvm_exit(context: RawTracePointContext) {
    // Both are read, then one is chosen: a computed context address is refused by the verifier.
    let (first, second): (*const u8, *const u8) = (context.arg(0), context.arg(1));
    tsc::watch(if maps::layout!(exit_argument) == 0 { first } else { second }, source::EXIT);
}

/// `kvm_emulate_insn(vcpu, …)`: does the same as `kvm_entry`, for hosts where that one stays silent. Hot.
#[raw_tracepoint(tracepoint = "kvm_emulate_insn")]
fn kvm_emulate_insn(context: RawTracePointContext) {
    tsc::watch(context.arg(0), source::EMULATE);
}

/// Does nothing: what the other programs cost is measured against it.
#[raw_tracepoint]
fn empty(_context: RawTracePointContext) {}

/// `iter/task_file`: every open file of every process; writes one record for each that is a vCPU.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
fn every_vcpu(context: *mut c_void) -> i32 {
    tsc::snapshot(context.cast());
    0
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
