//! The field finder on Debian's kernels, from 5.10 to the newest: no guest is booted.
//!
//! What the offsets mean is proved by `cargo xtask lab svm`, where the same kernels run.

use anyhow::{Context, Result, bail, ensure};
use object::{Object, ObjectSection};
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use vtrace_common::kvm::ABSENT;
use vtrace_dp::clock::btf::{Caps, Fields, find};
use xtask::kernel::Kernel;

/// The section `.BTF` of a kernel or module.
fn btf(elf: &[u8]) -> Result<Option<Vec<u8>>> {
    let file = object::File::parse(elf).context("not an ELF file")?;
    file.section_by_name(".BTF").map(|section| Ok(section.data()?.to_vec())).transpose()
}

/// The kernel inside a bzImage: Documentation/arch/x86/boot.rst, `payload_offset`.
fn unpacked(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("not a bzImage")?;
        Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
    };
    let setup = (usize::from(image[0x1f1]) + 1) * 512;
    let (start, length) = (setup + word(0x248)?, word(0x24c)?);
    let payload = image.get(start..start + length).context("not a bzImage")?;
    let program = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0xfd, b'7', b'z', b'X', ..] => "xz",
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        _ => bail!("packed in a way not known here"),
    };
    pipe(program, payload)
}

fn pipe(program: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut command = Command::new(program);
    let command = command.arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    let mut stdin = child.stdin.take().context("it has one")?;
    let bytes = bytes.to_vec();
    // What follows the packed kernel (its size) makes the program complain and end early: both are expected.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&bytes)));
    let output = child.wait_with_output()?;
    ensure!(writer.join().is_ok() && !output.stdout.is_empty(), "{program} gave nothing");
    Ok(output.stdout)
}

fn fields(kernel: Kernel) -> Result<Fields> {
    let files = kernel.unpack()?;
    let vmlinux = btf(&unpacked(&fs::read(&files.vmlinuz)?)?)?.context("this kernel has no BTF")?;
    let modules = files.modules(&["kvm"])?;
    let module = modules.iter().find(|module| module.name == "kvm").context("KVM is a module")?;
    let fields = find(&vmlinux, btf(&module.bytes)?.as_deref())?;
    // What holds for all of them.
    let layout = fields.layout;
    assert_eq!(layout.span_bytes, if fields.has_l1_ratio { 112 } else { 104 });
    assert_eq!((layout.offset, layout.active_offset, layout.ratio), (0, 8, 96));
    assert_eq!(layout.active_ratio, layout.span_bytes - 8);
    assert_eq!((layout.kvm, layout.vcpu_id), (0, 36));
    assert!(![layout.exits, layout.last_guest_tsc, layout.vcpu_pid].contains(&ABSENT));
    Ok(fields)
}

const CAPS: Option<Caps> =
    Some(Caps { has_tsc_control: 0, tsc_scaling_ratio_frac_bits: 8, default_tsc_scaling_ratio: 24 });

#[test]
fn kernel_5_10_has_one_ratio_and_no_btf_for_modules() -> Result<()> {
    let fields = fields(Kernel::V5_10)?;
    assert_eq!((fields.layout.span, fields.layout.vcpu_pid), (3800, 144));
    assert!(!fields.has_l1_ratio);
    assert_eq!(fields.layout.ratio, fields.layout.active_ratio);
    assert_eq!((fields.exit_argument, fields.caps, fields.layout.tsc_protected), (None, None, ABSENT));
    Ok(())
}

#[test]
fn kernel_6_1_has_its_own_ratio_for_l1() -> Result<()> {
    let fields = fields(Kernel::V6_1)?;
    assert_eq!((fields.layout.span, fields.layout.vcpu_pid), (2472, 120));
    assert_eq!((fields.exit_argument, fields.caps, fields.layout.tsc_protected), (Some(0), CAPS, ABSENT));
    Ok(())
}

#[test]
fn kernel_6_12_has_the_fields_of_6_1() -> Result<()> {
    let fields = fields(Kernel::V6_12)?;
    assert_eq!((fields.layout.span, fields.layout.vcpu_pid), (2464, 120));
    assert_eq!((fields.exit_argument, fields.caps, fields.layout.tsc_protected), (Some(0), CAPS, ABSENT));
    Ok(())
}

#[test]
fn kernel_6_18_knows_a_protected_tsc_and_its_module_has_copies_of_the_struct() -> Result<()> {
    let fields = fields(Kernel::V6_18)?;
    assert_eq!((fields.layout.span, fields.layout.vcpu_pid), (2608, 120));
    assert_eq!((fields.exit_argument, fields.caps), (Some(0), CAPS));
    assert_eq!(fields.layout.tsc_protected, 288 + 5129);
    Ok(())
}

#[test]
fn newest_kernel_has_the_fields_of_6_18() -> Result<()> {
    let fields = fields(Kernel::Newest)?;
    assert_eq!((fields.exit_argument, fields.caps), (Some(0), CAPS));
    assert_ne!(fields.layout.tsc_protected, ABSENT);
    assert_ne!(fields.userspace_pid, None);
    Ok(())
}
