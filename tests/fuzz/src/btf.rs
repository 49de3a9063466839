//! A kernel's own description of its types: any bytes, as vmlinux's and as a module's.
//!
//! Input: u16 bytes of vmlinux, those bytes, the module's.

use vtrace_dp::clock::btf;

/// Looks for the fields.
pub fn run(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk::<2>() else { return };
    let (vmlinux, module) = rest.split_at(rest.len().min(u16::from_le_bytes(*length).into()));
    for module in [None, Some(module)] {
        if let Err(error) = btf::find(vmlinux, module) {
            assert!(error.to_string().chars().count() < 4096, "a complaint without end");
        }
    }
}

/// A header with one structure (Documentation/bpf/btf.rst): `kvm_vcpu` with a member, and nothing else.
pub fn seeds() -> Vec<Vec<u8>> {
    let strings = b"\0kvm_vcpu\0vcpu_id\0int\0";
    let types: Vec<u8> = [
        [17, 1 << 24, 4, 0x0100_0020].to_vec(),            // int
        [1, 4 << 24 | 1, 8, 10, 1, 0].to_vec(),            // struct kvm_vcpu { int vcpu_id }
        [1, 4 << 24 | 2, 8, 10, 2, 0, 10, 7, 32].to_vec(), // of itself, and of nothing
    ]
    .concat()
    .into_iter()
    .flat_map(u32::to_le_bytes)
    .collect();
    let bytes = |length: usize| u32::try_from(length).expect("a seed is short").to_le_bytes();
    let (types_bytes, strings_bytes) = (bytes(types.len()), bytes(strings.len()));
    let header: [&[u8]; 6] = [&[0x9f, 0xeb, 1, 0], &bytes(24), &bytes(0), &types_bytes, &types_bytes, &strings_bytes];
    let file = [&header.concat()[..], &types, strings].concat();
    let length = u16::try_from(file.len()).expect("a seed is short").to_le_bytes();
    vec![[&length[..], &file].concat(), [&length[..], &file, &file].concat()]
}
