//! Reads one vCPU's TSC state and tells it when it is new.

use core::{ffi::c_void, mem::MaybeUninit};

use aya_ebpf::{
    bindings::seq_file,
    helpers::{
        bpf_get_current_pid_tgid, bpf_ktime_get_ns, bpf_printk, bpf_probe_read_kernel, bpf_seq_write, generated,
    },
};
use vtrace_common::kvm::{ABSENT, PerCpu, SPAN_BYTES_MAX, ReportedState, TscChange, VcpuState, source};

use crate::maps::{CHANGES, PER_CPU, TOLD, WANTED, layout};

/// `ANON_INODE_FS_MAGIC` in include/uapi/linux/magic.h.
const ANON_INODE_MAGIC: u64 = 0x0904_1934;
/// How the name of a vCPU's file starts (virt/kvm/kvm_main.c, `create_vcpu_fd`).
const VCPU_FILE_NAME: u64 = u64::from_le_bytes(*b"kvm-vcpu");

/// One vCPU was seen. Hot: one look-up and one read while nothing changes.
#[inline(always)]
pub fn watch(vcpu: *const u8, seen_by: u8) {
    let Some(per_cpu) = PER_CPU.get_ptr_mut(0) else { return };
    // SAFETY: this CPU's own element; the kernel lets no second run of a tracepoint program in between.
    let per_cpu = unsafe { &mut *per_cpu };
    match seen_by {
        source::ENTRY => per_cpu.hits.entry += 1,
        source::EXIT => per_cpu.hits.exit += 1,
        _ => per_cpu.hits.emulate += 1,
    }
    let owner = bpf_get_current_pid_tgid();
    if per_cpu.reported.owner != owner && !is_wanted(owner) {
        return;
    }
    let Some(now) = read_state(vcpu, owner) else {
        per_cpu.hits.unread += 1;
        return;
    };
    if per_cpu.vcpu != vcpu as u64 || per_cpu.reported != now {
        changed(per_cpu, vcpu, now, seen_by);
    }
}

/// Writes a record for the file the iterator stands on, if it is a vCPU. `context` is `struct bpf_iter__task_file`.
#[inline(always)]
pub fn snapshot(context: *const TaskFile) {
    // SAFETY: the kernel gives a whole context of this shape; the verifier checks each field's kind.
    let (meta, task, fd, file) = unsafe { ((*context).meta, (*context).task, (*context).fd, (*context).file) };
    if task.is_null() || file.is_null() {
        return;
    }
    let Some(vcpu) = vcpu_of(file.cast()) else { return };
    let Some(tgid) = read::<u32>(task.cast(), layout!(task_tgid)) else { return };
    let Some(state) = read_state(vcpu, u64::from(tgid) << 32 | u64::from(vcpu_thread(vcpu))) else { return };
    let mut record = MaybeUninit::<VcpuState>::uninit();
    record.write(VcpuState {
        tsc: change(vcpu, &state, source::SNAPSHOT),
        exits: read_if_present(vcpu, layout!(exits)).unwrap_or(u64::MAX),
        fd,
        reserved: 0,
    });
    // SAFETY: `meta` and its `seq` are the kernel's own, `record` was written whole above.
    unsafe { bpf_seq_write((*meta).seq, record.as_ptr().cast(), size_of::<VcpuState>() as u32) };
}

/// `struct bpf_iter__task_file`, kernel/bpf/task_iter.c.
#[repr(C)]
pub struct TaskFile {
    meta: *const IterMeta,
    task: *const c_void,
    fd: u32,
    file: *const c_void,
}

/// The start of `struct bpf_iter_meta`, include/linux/bpf.h.
#[repr(C)]
pub struct IterMeta {
    seq: *mut seq_file,
}

/// Whether the loader asked for this thread's process, or for everyone.
#[inline(always)]
fn is_wanted(owner: u64) -> bool {
    WANTED.get_ptr((owner >> 32) as u32).is_some() || WANTED.get_ptr(0).is_some()
}

/// The four fields in one read.
#[inline(always)]
fn read_state(vcpu: *const u8, owner: u64) -> Option<ReportedState> {
    let mut span = MaybeUninit::<[u64; SPAN_BYTES_MAX as usize / 8]>::uninit();
    let (from, bytes) = (vcpu.wrapping_add(layout!(span) as usize), layout!(span_bytes));
    // SAFETY: the loader keeps `span_bytes` within `span` (and the verifier refuses the program if it did not).
    let failed = unsafe { generated::bpf_probe_read_kernel(span.as_mut_ptr().cast(), bytes, from.cast()) };
    if failed != 0 {
        return None;
    }
    let at = |offset: u32| {
        // SAFETY: the loader keeps the four offsets, multiples of eight, below `span_bytes`, which was just written.
        unsafe { *span.as_ptr().cast::<u64>().byte_add(offset as usize) }
    };
    Some(ReportedState {
        owner,
        offset: at(layout!(offset)),
        ratio: at(layout!(ratio)),
        active_offset: at(layout!(active_offset)),
        active_ratio: at(layout!(active_ratio)),
    })
}

/// Something differs from this CPU's memory: tells it, unless only the CPU is new. What cannot be told is forgotten, so
/// that the next hit tries again.
#[inline(always)]
fn changed(per_cpu: &mut PerCpu, vcpu: *const u8, now: ReportedState, seen_by: u8) {
    if !is_wanted(now.owner) {
        return;
    }
    let key = vcpu as u64;
    // SAFETY: a copy is taken at once; an element that is reused meanwhile differs and costs one record too many.
    let before = TOLD.get_ptr(key).map(|told| unsafe { *told });
    if before != Some(now) && !report(per_cpu, vcpu, &now, seen_by) {
        return;
    }
    per_cpu.vcpu = key;
    per_cpu.reported = now;
}

/// Puts one record into the ring buffer and, if asked, one line into the host's trace.
#[inline(always)]
fn report(per_cpu: &mut PerCpu, vcpu: *const u8, now: &ReportedState, seen_by: u8) -> bool {
    let Some(mut record) = CHANGES.reserve::<TscChange>(0) else {
        per_cpu.hits.full += 1;
        return false;
    };
    let change = change(vcpu, now, seen_by);
    record.write(change);
    record.submit(0);
    // Without room in the map the record comes again: once too often is harmless, never is not.
    let _ = TOLD.insert(vcpu as u64, now, 0);
    if layout!(announce) != 0 {
        // SAFETY: three scalars for three conversions.
        unsafe { bpf_printk!(c"vtrace tsc: vcpu %u offset %lld ratio %llx", change.vcpu_id, now.offset, now.ratio) };
    }
    true
}

/// The whole record of one vCPU.
#[inline(always)]
fn change(vcpu: *const u8, now: &ReportedState, seen_by: u8) -> TscChange {
    TscChange {
        vcpu: vcpu as u64,
        kvm: read(vcpu, layout!(kvm)).unwrap_or(0),
        offset: now.offset,
        ratio: now.ratio,
        active_offset: now.active_offset,
        active_ratio: now.active_ratio,
        last_guest_tsc: read_if_present(vcpu, layout!(last_guest_tsc)).unwrap_or(0),
        // SAFETY: a helper without arguments.
        seen_ns: unsafe { bpf_ktime_get_ns() },
        vmm_pid: (now.owner >> 32) as u32,
        vcpu_tid: now.owner as u32,
        vcpu_id: read(vcpu, layout!(vcpu_id)).unwrap_or(u32::MAX),
        source: seen_by,
        tsc_protected: read_if_present(vcpu, layout!(tsc_protected)).unwrap_or(0),
        reserved: [0; 2],
    }
}

/// The `struct kvm_vcpu` of an open file, if the file is a vCPU's.
#[inline(always)]
fn vcpu_of(file: *const u8) -> Option<*const u8> {
    let inode: *const u8 = read(file, layout!(file_inode))?;
    let super_block: *const u8 = read(inode, layout!(inode_super))?;
    let magic: u64 = read(super_block, layout!(super_magic))?;
    if magic != ANON_INODE_MAGIC {
        return None;
    }
    let dentry: *const u8 = read(file, layout!(file_dentry))?;
    let name: *const u8 = read(dentry, layout!(dentry_name))?;
    if read::<u64>(name, 0)? != VCPU_FILE_NAME {
        return None;
    }
    read(file, layout!(file_private))
}

/// The thread that last ran a vCPU; 0 if none did.
#[inline(always)]
fn vcpu_thread(vcpu: *const u8) -> u32 {
    let pid: Option<*const u8> = read_if_present(vcpu, layout!(vcpu_pid));
    pid.filter(|pid| !pid.is_null()).and_then(|pid| read(pid, layout!(pid_number))).unwrap_or(0)
}

/// One field of a kernel struct.
#[inline(always)]
fn read<T>(base: *const u8, offset: u32) -> Option<T> {
    // SAFETY: the helper checks the address; `T` is a plain number or an address that is only read the same way.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset as usize).cast::<T>()) }.ok()
}

/// One field that not every kernel has.
#[inline(always)]
fn read_if_present<T>(base: *const u8, offset: u32) -> Option<T> {
    if offset == ABSENT { None } else { read(base, offset) }
}
