//! What the programs keep and share with their loader.

use aya_ebpf::{
    Global,
    macros::map,
    maps::{HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use vtrace_common::kvm::{CHANGES_BYTES, Layout, PROCESSES_MAX, PerCpu, ReportedState, VCPUS_REMEMBERED_MAX};

/// Offsets of the running kernel; the loader fills it in and freezes it, so each word is a constant to the verifier.
#[unsafe(no_mangle)]
pub static LAYOUT: Global<Layout> = Global::new(Layout::UNKNOWN);

/// One word of [`LAYOUT`]; volatile, because the compiler must not believe what the object says.
macro_rules! layout {
    ($field:ident) => {{
        let words = (&raw const $crate::maps::LAYOUT).cast::<vtrace_common::kvm::Layout>();
        // SAFETY: `Global` is a transparent cell of this type, written only before the program is loaded.
        unsafe { core::ptr::read_volatile(&raw const (*words).$field) }
    }};
}
pub(crate) use layout;

/// What each CPU keeps for itself.
#[map]
pub static PER_CPU: PerCpuArray<PerCpu> = PerCpuArray::with_max_entries(1, 0);

/// What was last told about each vCPU, by its address: a vCPU that changes its CPU is not told again.
#[map]
pub static TOLD: LruHashMap<u64, ReportedState> = LruHashMap::with_max_entries(VCPUS_REMEMBERED_MAX, 0);

/// Processes (tgid) whose vCPUs are told; 0 is everyone.
#[map]
pub static WANTED: HashMap<u32, u8> = HashMap::with_max_entries(PROCESSES_MAX, 0);

/// Records of `TscChange`.
#[map]
pub static CHANGES: RingBuf = RingBuf::with_byte_size(CHANGES_BYTES, 0);
