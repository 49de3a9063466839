//! What `vtrace setup --libvirt` prints, judged by the schemas that libvirt itself judges domains by.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Result, ensure};
use vtrace_tests::transport;
use xtask::{
    debian::{Set, unpack},
    packages,
};

/// libvirt 9.0 and 11.3.
const SCHEMAS: [Set; 2] = [
    Set { name: "libvirt-schemas-bookworm", suites: &["bookworm"], packages: &["libvirt0"], with_dependencies: false },
    Set {
        name: "libvirt-schemas-trixie",
        suites: &["trixie"],
        packages: &["libvirt-common"],
        with_dependencies: false,
    },
];
/// What a domain declares so that words for QEMU may stand in it.
const NAME_SPACE: &str = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'";

/// A domain that has nothing but what was printed.
fn domain(printed: &str) -> String {
    let is_passed_through = printed.contains(NAME_SPACE);
    assert_eq!(printed.starts_with("<!-- inside <devices> -->"), !is_passed_through, "it says where it belongs");
    let (space, inside, devices) = if is_passed_through { (NAME_SPACE, printed, "") } else { ("", "", printed) };
    format!(
        "<domain type='kvm' {space}><name>guest1</name><memory unit='MiB'>512</memory><vcpu>40</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os>{inside}<devices>{devices}</devices></domain>"
    )
}

/// xmllint, on a file of this text.
fn judged(schema: &Path, folder: &Path, text: &str) -> Result<Output> {
    let path = folder.join("domain.xml");
    fs::write(&path, text)?;
    Ok(Command::new("xmllint").args(["--noout", "--relaxng"]).arg(schema).arg(path).output()?)
}

#[test]
fn every_transports_elements_are_a_domain_that_libvirt_takes() -> Result<()> {
    packages::ensure(&["libxml2-utils"])?;
    let folder = tempfile::tempdir()?;
    for schemas in SCHEMAS {
        let schema: PathBuf = unpack(&schemas)?.join("usr/share/libvirt/schemas/domain.rng");
        for (transport, version) in [("vhost-user", "11.1"), ("socket", "7.2"), ("socket", "10.0"), ("pipe", "10.0")] {
            // More CPUs than a controller has ports.
            let words = format!("--libvirt --cpus 40 --qemu-version {version} --transport {transport}");
            let text = domain(&transport::print(folder.path(), "guest1", &words)?);
            let output = judged(&schema, folder.path(), &text)?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{}, {transport}: {said}\n{text}", schemas.name);
            // The judge is awake.
            for (right, wrong) in [("name='", "nom='"), ("<devices>", "<devices><port/>"), ("value='", "wert='")] {
                let broken = text.replace(right, wrong);
                let output = judged(&schema, folder.path(), &broken)?;
                ensure!(broken == text || !output.status.success(), "{transport}: {wrong} was taken");
            }
        }
    }
    Ok(())
}
