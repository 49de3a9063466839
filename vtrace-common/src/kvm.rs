//! What the eBPF programs and their loader agree on. Layouts are proved at compile time.
//!
//! Loader ─► programs: [`Layout`], frozen before the programs are verified, so that every offset is a constant to the
//! verifier. Programs ─► loader: [`TscChange`] through the ring buffer, [`VcpuState`] through the iterator.
//!
//! Source of the fields: `struct kvm_vcpu_arch` in arch/x86/include/asm/kvm_host.h.

use core::mem::{offset_of, size_of};

/// A field that this kernel does not have.
pub const ABSENT: u32 = u32::MAX;
/// Bytes from the start of the first TSC field to the end of the last one that a single read covers
/// (104 in 5.10, 112 up to 7.3).
pub const SPAN_BYTES_MAX: u32 = 128;
/// vCPUs whose last state the programs remember; beyond it the oldest is forgotten and reported again.
pub const VCPUS_REMEMBERED_MAX: u32 = 8192;
/// Processes that can be watched at a time.
pub const PROCESSES_MAX: u32 = 1024;
/// Bytes of the ring buffer of changes.
pub const CHANGES_BYTES: u32 = 256 << 10;

/// Where the running kernel keeps what the programs read. Bytes from the start of the named struct.
///
/// Only `u32` fields, so that [`Layout::words`] is the struct as it lies in memory.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// `kvm_vcpu`: the first of the four TSC fields.
    pub span: u32,
    /// Bytes that the four TSC fields span, at most [`SPAN_BYTES_MAX`].
    pub span_bytes: u32,
    /// In the span: `l1_tsc_offset`.
    pub offset: u32,
    /// In the span: `l1_tsc_scaling_ratio`, or the active ratio where there is no other (5.10).
    pub ratio: u32,
    /// In the span: `tsc_offset`, the one the hardware uses now (L2's while a nested guest runs).
    pub active_offset: u32,
    /// In the span: `tsc_scaling_ratio`, as above.
    pub active_ratio: u32,
    /// `kvm_vcpu`: `arch.last_guest_tsc`, or [`ABSENT`].
    pub last_guest_tsc: u32,
    /// `kvm_vcpu`: `arch.guest_tsc_protected`, or [`ABSENT`].
    pub tsc_protected: u32,
    /// `kvm_vcpu`: `vcpu_id`.
    pub vcpu_id: u32,
    /// `kvm_vcpu`: `kvm`.
    pub kvm: u32,
    /// `kvm_vcpu`: `pid`, or [`ABSENT`].
    pub vcpu_pid: u32,
    /// `kvm_vcpu`: `stat.exits`, or [`ABSENT`].
    pub exits: u32,
    /// `pid`: `numbers[0].nr`.
    pub pid_number: u32,
    /// `task_struct`: `tgid`.
    pub task_tgid: u32,
    /// `file`: `f_inode`.
    pub file_inode: u32,
    /// `file`: `f_path.dentry`.
    pub file_dentry: u32,
    /// `file`: `private_data`.
    pub file_private: u32,
    /// `dentry`: `d_name.name`.
    pub dentry_name: u32,
    /// `inode`: `i_sb`.
    pub inode_super: u32,
    /// `super_block`: `s_magic`.
    pub super_magic: u32,
    /// Which argument of the `kvm_exit` tracepoint is the vCPU: 0, or 1 up to 5.10.
    pub exit_argument: u32,
    /// 1: each change is also written to the `bpf_trace_printk` event.
    pub announce: u32,
}

/// Words of a [`Layout`].
pub const LAYOUT_WORDS: usize = size_of::<Layout>() / size_of::<u32>();

impl Layout {
    /// Nothing known: what the object holds before the loader fills it in.
    pub const UNKNOWN: Self = Self {
        span: 0,
        span_bytes: 0,
        offset: 0,
        ratio: 0,
        active_offset: 0,
        active_ratio: 0,
        last_guest_tsc: ABSENT,
        tsc_protected: ABSENT,
        vcpu_id: 0,
        kvm: 0,
        vcpu_pid: ABSENT,
        exits: ABSENT,
        pid_number: 0,
        task_tgid: 0,
        file_inode: 0,
        file_dentry: 0,
        file_private: 0,
        dentry_name: 0,
        inode_super: 0,
        super_magic: 0,
        exit_argument: 0,
        announce: 0,
    };

    /// The struct as it lies in memory.
    pub const fn words(&self) -> [u32; LAYOUT_WORDS] {
        [
            self.span,
            self.span_bytes,
            self.offset,
            self.ratio,
            self.active_offset,
            self.active_ratio,
            self.last_guest_tsc,
            self.tsc_protected,
            self.vcpu_id,
            self.kvm,
            self.vcpu_pid,
            self.exits,
            self.pid_number,
            self.task_tgid,
            self.file_inode,
            self.file_dentry,
            self.file_private,
            self.dentry_name,
            self.inode_super,
            self.super_magic,
            self.exit_argument,
            self.announce,
        ]
    }
}

/// Where a state was seen: [`TscChange::source`].
pub mod source {
    /// The `task_file` iterator: the state at the moment of the snapshot, in or out of the guest.
    pub const SNAPSHOT: u8 = 0;
    /// `kvm_entry`: no code of this guest CPU ran between the state before and this one.
    pub const ENTRY: u8 = 1;
    /// `kvm_exit`: the run that just ended already used this state.
    pub const EXIT: u8 = 2;
    /// `kvm_emulate_insn`: stands in for `kvm_entry` in load tests where that one stays silent.
    pub const EMULATE: u8 = 3;
}

/// One state of one vCPU's TSC, written when it changes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TscChange {
    /// Kernel address of the `struct kvm_vcpu`: tells vCPUs apart, while they live.
    pub vcpu: u64,
    /// Kernel address of the `struct kvm`: tells several VMs of one process apart, while they live.
    pub kvm: u64,
    /// `arch.l1_tsc_offset`, cycles, two's complement.
    pub offset: u64,
    /// `arch.l1_tsc_scaling_ratio`, fixed point.
    pub ratio: u64,
    /// `arch.tsc_offset`: what the hardware uses now; differs from `offset` while a nested guest runs.
    pub active_offset: u64,
    /// `arch.tsc_scaling_ratio`, as above.
    pub active_ratio: u64,
    /// `arch.last_guest_tsc`: a hint at the guest's TSC when it was last left, under the state before; 0 if unknown.
    pub last_guest_tsc: u64,
    /// `bpf_ktime_get_ns()` (CLOCK_MONOTONIC) when it was seen.
    pub seen_ns: u64,
    /// Process (tgid) that runs the vCPU, or holds its descriptor in a snapshot.
    pub vmm_pid: u32,
    /// Thread that runs the vCPU; 0 in a snapshot if it never ran.
    pub vcpu_tid: u32,
    /// `vcpu_id`: the APIC id on x86.
    pub vcpu_id: u32,
    /// One of [`source`].
    pub source: u8,
    /// 1: the guest's TSC is out of KVM's hands (`guest_tsc_protected`).
    pub tsc_protected: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

/// One vCPU of the system at the moment of a snapshot.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VcpuState {
    /// Its TSC; `source` is [`source::SNAPSHOT`].
    pub tsc: TscChange,
    /// `stat.exits` so far: moves while the vCPU runs. `u64::MAX` if unknown.
    pub exits: u64,
    /// The descriptor that holds it, in `vmm_pid`.
    pub fd: u32,
    /// Zero.
    pub reserved: u32,
}

/// What the programs count, of every process.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hits {
    /// Calls of `kvm_entry`.
    pub entry: u64,
    /// Calls of `kvm_exit`.
    pub exit: u64,
    /// Calls of `kvm_emulate_insn`.
    pub emulate: u64,
    /// Changes that found the ring buffer full; each is tried again at the next call.
    pub full: u64,
    /// Reads of kernel memory that failed.
    pub unread: u64,
}

/// One vCPU's TSC as the programs last told it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReportedState {
    /// `tgid << 32 | tid` of the thread that ran it: a new VM at an old address is not taken for the old one.
    pub owner: u64,
    /// As in [`TscChange`].
    pub offset: u64,
    /// As in [`TscChange`].
    pub ratio: u64,
    /// As in [`TscChange`].
    pub active_offset: u64,
    /// As in [`TscChange`].
    pub active_ratio: u64,
}

/// What each CPU keeps for itself: one look-up a hit, while a vCPU stays where it is.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PerCpu {
    /// First, so that it is read as the first words.
    pub hits: Hits,
    /// The vCPU of the last hit on this CPU.
    pub vcpu: u64,
    /// What was last told about it.
    pub reported: ReportedState,
}

/// Words of a [`PerCpu`].
pub const PER_CPU_WORDS: usize = size_of::<PerCpu>() / size_of::<u64>();
/// Words of a [`Hits`].
pub const HITS_WORDS: usize = size_of::<Hits>() / size_of::<u64>();

impl Hits {
    /// These and the counters of one more CPU.
    #[must_use]
    pub const fn plus(self, words: &[u64; PER_CPU_WORDS]) -> Self {
        Self {
            entry: self.entry.wrapping_add(words[0]),
            exit: self.exit.wrapping_add(words[1]),
            emulate: self.emulate.wrapping_add(words[2]),
            full: self.full.wrapping_add(words[3]),
            unread: self.unread.wrapping_add(words[4]),
        }
    }
}

impl TscChange {
    /// Reads one record; `None` if it has another length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; size_of::<Self>()] = bytes.try_into().ok()?;
        Some(Self {
            vcpu: word(bytes, offset_of!(Self, vcpu)),
            kvm: word(bytes, offset_of!(Self, kvm)),
            offset: word(bytes, offset_of!(Self, offset)),
            ratio: word(bytes, offset_of!(Self, ratio)),
            active_offset: word(bytes, offset_of!(Self, active_offset)),
            active_ratio: word(bytes, offset_of!(Self, active_ratio)),
            last_guest_tsc: word(bytes, offset_of!(Self, last_guest_tsc)),
            seen_ns: word(bytes, offset_of!(Self, seen_ns)),
            vmm_pid: half(bytes, offset_of!(Self, vmm_pid)),
            vcpu_tid: half(bytes, offset_of!(Self, vcpu_tid)),
            vcpu_id: half(bytes, offset_of!(Self, vcpu_id)),
            source: bytes[offset_of!(Self, source)],
            tsc_protected: bytes[offset_of!(Self, tsc_protected)],
            reserved: [0; 2],
        })
    }
}

impl VcpuState {
    /// Reads one record; `None` if it has another length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; size_of::<Self>()] = bytes.try_into().ok()?;
        Some(Self {
            tsc: TscChange::from_bytes(&bytes[..size_of::<TscChange>()])?,
            exits: word(bytes, offset_of!(Self, exits)),
            fd: half(bytes, offset_of!(Self, fd)),
            reserved: 0,
        })
    }
}

/// The u64 at `at` of a record that is longer than that.
fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(core::array::from_fn(|byte| bytes[at + byte]))
}

/// The u32 at `at` of a record that is longer than that.
fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(core::array::from_fn(|byte| bytes[at + byte]))
}

const _: () = {
    assert!(size_of::<TscChange>() == 80);
    assert!(offset_of!(TscChange, offset) == 16);
    assert!(offset_of!(TscChange, vmm_pid) == 64);
    assert!(offset_of!(TscChange, source) == 76);
    assert!(size_of::<VcpuState>() == 96);
    assert!(offset_of!(VcpuState, exits) == 80);
    assert!(size_of::<Layout>() == LAYOUT_WORDS * 4 && LAYOUT_WORDS == 22);
    assert!(offset_of!(Layout, announce) == (LAYOUT_WORDS - 1) * 4);
    assert!(offset_of!(PerCpu, hits) == 0 && offset_of!(Hits, unread) == (HITS_WORDS - 1) * 8);
    assert!(SPAN_BYTES_MAX.is_multiple_of(8));
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_of_another_length_is_refused() {
        assert_eq!(TscChange::from_bytes(&[0; 79]), None);
        assert_eq!(TscChange::from_bytes(&[0; 81]), None);
        assert_eq!(VcpuState::from_bytes(&[0; 95]), None);
    }

    #[test]
    fn every_field_is_read_from_its_own_place() {
        let bytes: [u8; 96] = core::array::from_fn(|at| u8::try_from(at).expect("96 fits"));
        let state = VcpuState::from_bytes(&bytes).expect("right length");
        assert_eq!(state.tsc.vcpu, 0x0706_0504_0302_0100);
        assert_eq!(state.tsc.seen_ns, 0x3f3e_3d3c_3b3a_3938);
        assert_eq!(state.tsc.vcpu_id, 0x4b4a_4948);
        assert_eq!((state.tsc.source, state.tsc.tsc_protected), (0x4c, 0x4d));
        assert_eq!((state.exits, state.fd), (0x5756_5554_5352_5150, 0x5b5a_5958));
    }

    #[test]
    fn layout_words_stand_in_field_order() {
        let words = Layout { span: 7, exits: 8, announce: 9, ..Layout::UNKNOWN }.words();
        assert_eq!((words[0], words[offset_of!(Layout, exits) / 4], words[LAYOUT_WORDS - 1]), (7, 8, 9));
    }
}
