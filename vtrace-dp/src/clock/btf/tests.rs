//! Small kernels made by hand, this one, and damage. Debian's kernels: tests/tests/kernel_fields.rs.

use super::*;
use proptest::prelude::*;

/// A file of BTF made by hand.
#[derive(Default)]
struct Made {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

impl Made {
    fn new() -> Self {
        Self { strings: vec![0], ..Self::default() }
    }

    fn string(&mut self, text: &str) -> u32 {
        let at = u32::try_from(self.strings.len()).unwrap();
        self.strings.extend_from_slice(text.as_bytes());
        self.strings.push(0);
        at
    }

    fn words(&mut self, words: &[u32]) -> u32 {
        self.types.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        self.count += 1;
        self.count
    }

    /// A struct (4) or union (5); a member is its name, type and bit offset, anonymous if the name is empty.
    fn structure(&mut self, kind: u32, name: &str, members: &[(&str, u32, u32)]) -> u32 {
        let name = if name.is_empty() { 0 } else { self.string(name) };
        let mut words = vec![name, kind << 24 | u32::try_from(members.len()).unwrap(), 8];
        for &(member, id, bits) in members {
            let member = if member.is_empty() { 0 } else { self.string(member) };
            words.extend([member, id, bits]);
        }
        self.words(&words)
    }

    fn file(&self) -> Vec<u8> {
        let types = u32::try_from(self.types.len()).unwrap();
        let strings = u32::try_from(self.strings.len()).unwrap();
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        bytes.extend([24, 0, types, types, strings].into_iter().flat_map(u32::to_le_bytes));
        bytes.extend_from_slice(&self.types);
        bytes.extend_from_slice(&self.strings);
        bytes
    }
}

/// The least kernel that has what the programs need; `l1_ratio` at most once.
fn kernel(l1_ratio: Option<u32>, active_ratio_bits: u32) -> Made {
    let mut made = Made::new();
    let name = made.string("u64");
    let number = made.words(&[name, 1 << 24, 8, 64]);
    let pointer = made.words(&[0, 2 << 24, number]);
    let mut arch = vec![("l1_tsc_offset", number, 64), ("tsc_offset", number, 128)];
    arch.extend(l1_ratio.map(|bits| ("l1_tsc_scaling_ratio", number, bits)));
    arch.push(("tsc_scaling_ratio", number, active_ratio_bits));
    let arch = made.structure(4, "kvm_vcpu_arch", &arch);
    made.structure(4, "kvm_vcpu", &[("kvm", pointer, 0), ("vcpu_id", number, 64), ("arch", arch, 640)]);
    let upid = made.structure(4, "upid", &[("nr", number, 0)]);
    made.structure(4, "pid", &[("numbers", upid, 768)]);
    made.structure(4, "task_struct", &[("tgid", number, 320)]);
    let path = made.structure(4, "path", &[("mnt", pointer, 0), ("dentry", pointer, 64)]);
    let either = made.structure(5, "", &[("f_path", path, 0), ("__f_path", path, 0)]);
    made.structure(4, "file", &[("f_inode", pointer, 0), ("private_data", pointer, 64), ("", either, 128)]);
    let name = made.structure(4, "qstr", &[("hash_len", number, 0), ("name", pointer, 64)]);
    made.structure(4, "dentry", &[("d_name", name, 256)]);
    made.structure(4, "inode", &[("i_sb", pointer, 320)]);
    made.structure(4, "super_block", &[("s_magic", number, 768)]);
    made
}

#[test]
fn fields_are_found_through_structs_inside_and_anonymous_members() {
    let layout = find(&kernel(Some(832), 896).file(), None).unwrap().layout;
    assert_eq!((layout.span, layout.span_bytes), (80 + 8, 112));
    assert_eq!((layout.offset, layout.active_offset, layout.ratio, layout.active_ratio), (0, 8, 96, 104));
    assert_eq!((layout.vcpu_id, layout.file_dentry, layout.dentry_name, layout.pid_number), (8, 24, 40, 96));
    assert_eq!((layout.last_guest_tsc, layout.tsc_protected, layout.exits), (ABSENT, ABSENT, ABSENT));
}

#[test]
fn kernel_without_l1_ratio_gives_the_ratio_in_force() {
    let fields = find(&kernel(None, 896).file(), None).unwrap();
    assert!(!fields.has_l1_ratio);
    assert_eq!(fields.layout.ratio, fields.layout.active_ratio);
    assert_eq!((fields.exit_argument, fields.caps, fields.userspace_pid), (None, None, None));
}

#[test]
fn missing_field_is_named() {
    let mut made = Made::new();
    let number = made.words(&[0, 1 << 24, 8, 64]);
    let arch = made.structure(4, "kvm_vcpu_arch", &[("tsc_offset", number, 0)]);
    made.structure(4, "kvm_vcpu", &[("kvm", number, 0), ("vcpu_id", number, 64), ("arch", arch, 128)]);
    let error = find(&made.file(), None).unwrap_err().to_string();
    assert_eq!(error, "this kernel's struct kvm_vcpu has no field arch.l1_tsc_offset");
}

#[test]
fn missing_struct_is_named() {
    let error = find(&Made::new().file(), None).unwrap_err().to_string();
    assert_eq!(error, "this kernel's BTF has no struct kvm_vcpu");
}

#[test]
fn fields_too_far_apart_for_one_read_are_refused() {
    let error = find(&kernel(None, 64 + 128 * 8).file(), None).unwrap_err();
    assert!(matches!(error, BtfError::TscSpan { bytes: 136 }), "{error}");
}

#[test]
fn copies_of_a_struct_must_agree() {
    let mut made = kernel(None, 896);
    made.structure(4, "super_block", &[("s_magic", 1, 768)]);
    find(&made.file(), None).unwrap();
    made.structure(4, "super_block", &[("s_magic", 1, 832)]);
    let error = find(&made.file(), None).unwrap_err();
    assert!(matches!(error, BtfError::Differs { structure: "super_block", field: "s_magic" }), "{error}");
}

#[test]
fn modules_own_struct_counts_more_and_shares_types_and_strings_of_its_base() {
    let base = kernel(None, 896);
    // Numbers and strings of the module go on where the base ends.
    let mut module = Made { count: base.count, strings: Vec::new(), types: Vec::new() };
    let shift = u32::try_from(base.strings.len()).unwrap();
    let at = |name: &str| {
        let find = format!("{name}\0");
        let found = base.strings.windows(find.len()).position(|window| window == find.as_bytes());
        u32::try_from(found.unwrap()).unwrap()
    };
    let vcpu_arch = 3; // in the base: number, pointer, kvm_vcpu_arch
    let members = [at("kvm"), 2, 0, at("vcpu_id"), 1, 320, at("arch"), vcpu_arch, 1280];
    let vcpu = module.words(&[&[at("kvm_vcpu"), 4 << 24 | 3, 200], &members[..]].concat());
    let pointer = module.words(&[0, 2 << 24, vcpu]);
    let prototype = module.words(&[0, 13 << 24 | 3, 0, 0, 2, 0, 1, 0, pointer]);
    let hook = module.words(&[0, 2 << 24, prototype]);
    let name = shift + module.string("btf_trace_kvm_exit");
    module.words(&[name, 8 << 24, hook]);
    let fields = find(&base.file(), Some(&module.file())).unwrap();
    assert_eq!((fields.layout.vcpu_id, fields.layout.span), (40, 168));
    assert_eq!(fields.exit_argument, Some(1), "(exit_reason, vcpu, isa)");
}

#[test]
fn running_kernels_fields_are_found() {
    let fields = find_here().unwrap();
    assert_eq!(fields.layout.span_bytes, if fields.has_l1_ratio { 112 } else { 104 });
    assert_ne!(fields.layout.exits, ABSENT);
}

proptest! {
    #[test]
    fn any_bytes_give_fields_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let _ = find(&bytes, None);
    }

    #[test]
    fn damaged_btf_gives_fields_or_an_error(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
        let mut bytes = kernel(Some(832), 896).file();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = find(&bytes, Some(&bytes));
        bytes.truncate(cut.index(bytes.len()));
        let _ = find(&bytes, None);
    }
}
