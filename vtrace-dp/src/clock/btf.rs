//! Finds, in the running kernel's BTF, the fields that the eBPF programs read.
//!
//! In:    /sys/kernel/btf/vmlinux, and /sys/kernel/btf/kvm where KVM is a module.
//! Out:   [`Fields`]: a [`Layout`] for the programs, and what this kernel lacks.
//! Runs:  once, when the clock starts.
//! Full:  does not apply.
//! Trust: the kernel. A field that is missing is named; nothing is guessed.
//!
//! Source: struct kvm_vcpu (include/linux/kvm_host.h), kvm_vcpu_arch (arch/x86/include/asm/kvm_host.h), the tracepoints
//! of arch/x86/kvm/trace.h. Built-in code pulls `struct kvm_vcpu` into vmlinux on every Debian kernel from 5.10 to 7.3
//! though KVM is a module there; a module's own copy counts more where there is one. 5.10 has no BTF for modules.

mod types;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;
pub use types::Malformed;
use types::{Btf, Type};
use vtrace_common::kvm::{ABSENT, Layout, SPAN_BYTES_MAX};

/// Where the kernel shows its types.
const BTF_DIR: &str = "/sys/kernel/btf";

/// The kernel's types could not be read as needed.
#[derive(Debug, Error)]
pub enum BtfError {
    /// A file of BTF could not be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A file is not BTF, or is cut.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The kernel has no such struct.
    #[error("this kernel's BTF has no struct {structure}")]
    NoStruct {
        /// Its name.
        structure: &'static str,
    },
    /// The struct has no such field.
    #[error("this kernel's struct {structure} has no field {field}")]
    NoField {
        /// Its name.
        structure: &'static str,
        /// The field, with dots for structs inside.
        field: &'static str,
    },
    /// Copies of a struct differ.
    #[error("this kernel's BTF has several structs {structure} that differ in {field}")]
    Differs {
        /// Its name.
        structure: &'static str,
        /// The first field that differs.
        field: &'static str,
    },
    /// The TSC fields do not lie close enough together, or not at multiples of eight.
    #[error("the TSC fields of this kernel's struct kvm_vcpu span {bytes} bytes; one read takes {SPAN_BYTES_MAX}")]
    TscSpan {
        /// From the start of the first field to the end of the last.
        bytes: u32,
    },
}

/// What was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fields {
    /// For the programs. `exit_argument` is 0 where it is not known.
    pub layout: Layout,
    /// Which argument of `kvm_exit` is the vCPU; `None` without BTF of the module (5.10).
    pub exit_argument: Option<u32>,
    /// False up to 5.13: then there is one ratio, the one in force.
    pub has_l1_ratio: bool,
    /// `kvm`: `userspace_pid`, the thread that made the VM (the number in debugfs folder names).
    pub userspace_pid: Option<u32>,
    /// `kvm_caps`, where there is one (from 5.18 on).
    pub caps: Option<Caps>,
}

/// `struct kvm_caps`: byte offsets. Its address is in /proc/kallsyms where data symbols are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caps {
    /// `has_tsc_control`, a bool.
    pub has_tsc_control: u32,
    /// `tsc_scaling_ratio_frac_bits`, a u8.
    pub tsc_scaling_ratio_frac_bits: u32,
    /// `default_tsc_scaling_ratio`, a u64.
    pub default_tsc_scaling_ratio: u32,
}

/// The fields of the running kernel.
///
/// # Errors
/// As [`find`], and [`BtfError::Unreadable`].
pub fn find_here() -> Result<Fields, BtfError> {
    find_in(Path::new(BTF_DIR))
}

/// The fields of a kernel that shows its types in `folder`.
///
/// # Errors
/// As [`find_here`].
pub fn find_in(folder: &Path) -> Result<Fields, BtfError> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read(&path).map_err(|source| BtfError::Unreadable { path, source })
    };
    let vmlinux = read("vmlinux")?;
    let module = match read("kvm") {
        // KVM is built in, not loaded yet, or this kernel has no BTF for modules.
        Err(BtfError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
        other => Some(other?),
    };
    find(&vmlinux, module.as_deref())
}

/// The fields of a kernel, from the bytes of its BTF and, where KVM is a module, of the module's.
///
/// # Errors
/// Names the struct or field that is missing, differs between copies, or cannot be read by the programs.
pub fn find(vmlinux: &[u8], module: Option<&[u8]>) -> Result<Fields, BtfError> {
    let vmlinux = Btf::parse(vmlinux, None)?;
    let module = module.map(|bytes| Btf::parse(bytes, Some(&vmlinux))).transpose()?;
    let kernel = Kernel { vmlinux: &vmlinux, module: module.as_ref() };
    let vcpu = kernel.structure("kvm_vcpu", &["kvm", "vcpu_id", "arch.l1_tsc_offset", "arch.tsc_scaling_ratio"])?;
    let span = TscSpan::find(&vcpu)?;
    let exit_argument = kernel.files().find_map(|file| file.tracepoint_argument("kvm_exit", "kvm_vcpu"));
    let offset = |structure, field| kernel.structure(structure, &[field])?.offset(field);
    let layout = Layout {
        span: span.start,
        span_bytes: span.bytes,
        offset: span.offset,
        ratio: span.ratio,
        active_offset: span.active_offset,
        active_ratio: span.active_ratio,
        last_guest_tsc: vcpu.offset_if_any("arch.last_guest_tsc")?.unwrap_or(ABSENT),
        tsc_protected: vcpu.offset_if_any("arch.guest_tsc_protected")?.unwrap_or(ABSENT),
        vcpu_id: vcpu.offset("vcpu_id")?,
        kvm: vcpu.offset("kvm")?,
        vcpu_pid: vcpu.offset_if_any("pid")?.unwrap_or(ABSENT),
        exits: vcpu.offset_if_any("stat.exits")?.unwrap_or(ABSENT),
        pid_number: offset("pid", "numbers")? + offset("upid", "nr")?,
        task_tgid: offset("task_struct", "tgid")?,
        file_inode: offset("file", "f_inode")?,
        file_dentry: offset("file", "f_path.dentry")?,
        file_private: offset("file", "private_data")?,
        dentry_name: offset("dentry", "d_name.name")?,
        inode_super: offset("inode", "i_sb")?,
        super_magic: offset("super_block", "s_magic")?,
        exit_argument: exit_argument.unwrap_or(0),
        announce: 0,
    };
    let has_l1_ratio = vcpu.offset_if_any("arch.l1_tsc_scaling_ratio")?.is_some();
    let userspace_pid = kernel.structure("kvm", &["userspace_pid"]).and_then(|kvm| kvm.offset("userspace_pid")).ok();
    Ok(Fields { layout, exit_argument, has_l1_ratio, userspace_pid, caps: caps(&kernel) })
}

/// 5.10 keeps these three as variables of their own.
fn caps(kernel: &Kernel<'_>) -> Option<Caps> {
    let caps = kernel.structure("kvm_caps", &["has_tsc_control"]).ok()?;
    Some(Caps {
        has_tsc_control: caps.offset("has_tsc_control").ok()?,
        tsc_scaling_ratio_frac_bits: caps.offset("tsc_scaling_ratio_frac_bits").ok()?,
        default_tsc_scaling_ratio: caps.offset("default_tsc_scaling_ratio").ok()?,
    })
}

/// The four TSC fields as one stretch of memory.
struct TscSpan {
    start: u32,
    bytes: u32,
    offset: u32,
    ratio: u32,
    active_offset: u32,
    active_ratio: u32,
}

impl TscSpan {
    fn find(vcpu: &Copies<'_>) -> Result<Self, BtfError> {
        let offset = vcpu.offset("arch.l1_tsc_offset")?;
        let active_offset = vcpu.offset("arch.tsc_offset")?;
        let active_ratio = vcpu.offset("arch.tsc_scaling_ratio")?;
        let ratio = vcpu.offset_if_any("arch.l1_tsc_scaling_ratio")?.unwrap_or(active_ratio);
        let all = [offset, ratio, active_offset, active_ratio];
        let start = all.into_iter().min().expect("four fields");
        let bytes = all.into_iter().max().expect("four fields") - start + 8;
        if bytes > SPAN_BYTES_MAX || all.into_iter().any(|field| !(field - start).is_multiple_of(8)) {
            return Err(BtfError::TscSpan { bytes });
        }
        Ok(Self {
            start,
            bytes,
            offset: offset - start,
            ratio: ratio - start,
            active_offset: active_offset - start,
            active_ratio: active_ratio - start,
        })
    }
}

/// The files of BTF that describe one kernel.
struct Kernel<'a> {
    vmlinux: &'a Btf<'a>,
    module: Option<&'a Btf<'a>>,
}

impl<'a> Kernel<'a> {
    /// The module first: what runs is its code.
    fn files(&self) -> impl Iterator<Item = &'a Btf<'a>> + use<'a> {
        self.module.into_iter().chain([self.vmlinux])
    }

    /// All copies of a struct in the first file that has one with `needed`.
    fn structure(&self, name: &'static str, needed: &[&'static str]) -> Result<Copies<'a>, BtfError> {
        let mut missing = BtfError::NoStruct { structure: name };
        for file in self.files() {
            let copies: Vec<Type<'a>> = file.structs(name).collect();
            let lacking = lacking(file, &copies, needed)?;
            match lacking {
                None if !copies.is_empty() => return Ok(Copies { file, name, copies }),
                None => {}
                Some(field) => missing = BtfError::NoField { structure: name, field },
            }
        }
        Err(missing)
    }
}

/// The first of the needed fields that a copy lacks.
fn lacking<'a>(file: &Btf<'a>, copies: &[Type<'a>], needed: &[&'static str]) -> Result<Option<&'static str>, BtfError> {
    for &field in needed {
        for &copy in copies {
            if file.offset(copy, field)?.is_none() {
                return Ok(Some(field));
            }
        }
    }
    Ok(None)
}

/// The copies of one struct in one file: compilation units that see different pointee types add one each.
struct Copies<'a> {
    file: &'a Btf<'a>,
    name: &'static str,
    copies: Vec<Type<'a>>,
}

impl Copies<'_> {
    fn offset(&self, field: &'static str) -> Result<u32, BtfError> {
        self.offset_if_any(field)?.ok_or(BtfError::NoField { structure: self.name, field })
    }

    /// `None` where no copy has the field; copies that disagree are refused.
    fn offset_if_any(&self, field: &'static str) -> Result<Option<u32>, BtfError> {
        let mut found = None;
        for (index, &copy) in self.copies.iter().enumerate() {
            let offset = self.file.offset(copy, field)?;
            if index > 0 && offset != found {
                return Err(BtfError::Differs { structure: self.name, field });
            }
            found = offset;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
