//! libvirt: the elements that give a domain its ports.
//!
//! In:    a guest's folder and setup
//! Out:   [`Elements`]: text for three places of the domain's XML
//! Trust: names and paths of the user; characters that are special in XML are escaped
//!
//! Controllers are numbered from 1: libvirt creates controller 0 for its own guest agent.

use std::{fmt::Write, path::Path};

use super::{
    qemu::{CONTROLLER_PORTS, Guest, port_addresses},
    setup::Transport,
};

/// Index of our first virtio-serial controller.
const CONTROLLER_FIRST: usize = 1;
/// Seconds between two attempts to connect.
const RECONNECT_S: u32 = 1;

/// XML to add to a domain.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Elements {
    /// Inside `<devices>`.
    pub devices: String,
    /// Inside `<domain>`.
    pub domain: String,
    /// XML name space that the domain must declare for `<qemu:…>`.
    pub name_space: Option<&'static str>,
}

/// The elements that give a domain the guest's ports.
pub fn elements(guest: &Guest<'_>) -> Elements {
    match guest.setup.transport {
        Transport::VhostUser => vhost_user(guest),
        Transport::Socket => channels(guest, |name| {
            let path = escaped(&guest.folder.socket(name));
            format!(
                "<channel type='unix'>\n  <source mode='connect' path='{path}'>\n    <reconnect enabled='yes' \
                 timeout='{RECONNECT_S}'/>\n  </source>"
            )
        }),
        Transport::Pipe => channels(guest, |name| {
            format!("<channel type='pipe'>\n  <source path='{}'/>", escaped(&guest.folder.port(name)))
        }),
    }
}

fn channels(guest: &Guest<'_>, begin: impl Fn(&str) -> String) -> Elements {
    let mut devices = String::new();
    for (name, address) in port_addresses(guest.setup) {
        let controller = CONTROLLER_FIRST + address.controller;
        if address.port == 1 {
            line(
                &mut devices,
                format_args!("<controller type='virtio-serial' index='{controller}' ports='{CONTROLLER_PORTS}'/>"),
            );
        }
        line(&mut devices, format_args!("{}", begin(&name)));
        line(&mut devices, format_args!("  <target type='virtio' name='{name}'/>"));
        let port = address.port;
        line(
            &mut devices,
            format_args!("  <address type='virtio-serial' controller='{controller}' bus='0' port='{port}'/>"),
        );
        line(&mut devices, format_args!("</channel>"));
    }
    Elements { devices, ..Elements::default() }
}

fn vhost_user(guest: &Guest<'_>) -> Elements {
    let mut domain = String::new();
    line(&mut domain, format_args!("<memoryBacking>\n  <source type='memfd'/>\n  <access mode='shared'/>"));
    line(&mut domain, format_args!("</memoryBacking>\n<qemu:commandline>"));
    for option in guest.vhost_user() {
        line(&mut domain, format_args!("  <qemu:arg value='{}'/>", escaped(Path::new(&option))));
    }
    line(&mut domain, format_args!("</qemu:commandline>"));
    let name_space = Some("xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'");
    Elements { domain, name_space, ..Elements::default() }
}

fn line(text: &mut String, words: std::fmt::Arguments<'_>) {
    writeln!(text, "{words}").expect("a String takes everything");
}

fn escaped(path: &Path) -> String {
    let text = path.display().to_string();
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::{
        qemu::MachineType,
        setup::{Folder, Setup},
    };

    fn of(transport: Transport, cpus: usize, root: &str) -> Elements {
        let folder = Folder::of(Path::new(root), "guest1");
        let setup = Setup { transport, cpus };
        let run = Path::new("/run/vtrace");
        elements(&Guest { name: "guest1", folder: &folder, setup, run, memory: "4G", machine: MachineType::Q35 })
    }

    #[test]
    fn each_port_is_a_channel_and_each_thirty_have_a_controller() {
        let devices = of(Transport::Pipe, 31, "/var/lib/vtrace/virt").devices;
        assert_eq!((devices.matches("<channel").count(), devices.matches("<controller").count()), (32, 2));
        assert!(
            devices
                .contains("name='trace-path-cpu30'/>\n  <address type='virtio-serial' controller='2' bus='0' port='2'")
        );
    }

    #[test]
    fn special_characters_of_xml_in_a_path_are_escaped() {
        let devices = of(Transport::Socket, 1, "/a&b<c'd").devices;
        assert!(devices.contains("path='/a&amp;b&lt;c&apos;d/guest1/agent-ctl-path.sock'"), "{devices}");
    }

    #[test]
    fn vhost_user_device_is_passed_through_to_qemu_with_shared_memory() {
        let elements = of(Transport::VhostUser, 2, "/var/lib/vtrace/virt");
        assert_eq!((elements.devices.as_str(), elements.name_space.is_some()), ("", true));
        assert!(elements.domain.contains("<access mode='shared'/>"));
        assert!(elements.domain.contains("num_vqs=8,"));
    }
}
