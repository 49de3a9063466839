//! What the device offers, and what follows from what the driver accepts.
//!
//! In:    feature bits, ring indices, configuration reads from the VMM
//! Out:   decisions; nothing here has an effect
//! Runs:  on the device's thread
//! Trust: the VMM with asking sensible questions; whatever it asks has an answer
//!
//! Source: virtio 1.3, 5.3 (console) and 6 (reserved features); QEMU docs/interop/vhost-user.rst.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vtrace_common::limits::{PORTS_MAX, RINGS_MAX};

/// Several ports and a control queue (virtio 1.3, 5.3.3).
const VIRTIO_CONSOLE_F_MULTIPORT: u32 = 1;
/// Bytes of `struct virtio_console_config` (5.3.4): u16 cols, u16 rows, u32 max_nr_ports, u32 emerg_wr.
pub const CONFIG_BYTES: usize = 12;
/// Rings that are there whatever the ports: port 0's two and the control queue's two (5.3.2).
pub const RINGS_MIN: usize = 4;

/// Without these the device cannot do its work; in the order in which they are reported.
const NEEDED: [(u32, &str); 3] = [
    (VIRTIO_F_VERSION_1, "VIRTIO_F_VERSION_1"),
    (VIRTIO_CONSOLE_F_MULTIPORT, "VIRTIO_CONSOLE_F_MULTIPORT"),
    // Linux's splice into a port loses pages silently when a ring without it is nearly full.
    (VIRTIO_RING_F_INDIRECT_DESC, "VIRTIO_RING_F_INDIRECT_DESC"),
];

/// The device's feature bits. No packed ring: only the split ring is implemented.
pub const fn offered() -> u64 {
    1 << VIRTIO_F_VERSION_1
        | 1 << VIRTIO_CONSOLE_F_MULTIPORT
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
}

/// vhost-user's own features. MQ makes the VMM ask how many rings there may be; CONFIG carries the port count.
pub const fn offered_protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        .union(VhostUserProtocolFeatures::REPLY_ACK)
        .union(VhostUserProtocolFeatures::CONFIG)
        .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
}

/// The first needed feature that is not among `accepted`.
pub fn missing(accepted: u64) -> Option<&'static str> {
    NEEDED.iter().find(|(bit, _)| accepted & (1 << bit) == 0).map(|(_, name)| *name)
}

/// Whether the driver accepted VIRTIO_RING_F_EVENT_IDX.
pub fn event_idx(accepted: u64) -> bool {
    accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0
}

/// Rings wait for SET_VRING_ENABLE if the VMM negotiated protocol features, else they run at once (vhost-user, "Ring
/// states").
pub fn rings_wait(accepted: u64) -> bool {
    accepted & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
}

/// Ports of a device with `rings` rings. QEMU names every ring once before the guest reads the configuration
/// (SET_VRING_CALL while it realizes the device), so its command line alone decides. 0 if there are too few for one.
pub fn ports(rings: usize) -> usize {
    (rings.min(RINGS_MAX) / 2).saturating_sub(1)
}

/// Ports when the VMM has named no ring yet: those that take the ring count from GET_QUEUE_NUM make them all.
pub fn ports_of(ring_index_max: Option<u8>) -> usize {
    ring_index_max.map_or(PORTS_MAX, |index| ports(usize::from(index) + 1))
}

/// `bytes` of the configuration space from `offset`; what is not there reads as 0.
pub fn config(ports: usize, offset: u32, bytes: u32) -> Vec<u8> {
    let ports = u32::try_from(ports).expect("PORTS_MAX is far below 2^32");
    let mut space = [0; CONFIG_BYTES];
    space[4..8].copy_from_slice(&ports.to_le_bytes());
    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(CONFIG_BYTES);
    let mut answer = space[from..].to_vec();
    answer.resize(usize::try_from(bytes).unwrap_or(0).min(vhost::vhost_user::message::MAX_MSG_SIZE), 0);
    answer
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn driver_that_accepts_everything_misses_nothing() {
        assert_eq!(missing(offered()), None);
        assert!(event_idx(offered()) && rings_wait(offered()));
    }

    #[test]
    fn driver_without_indirect_descriptors_is_named_unfit() {
        let accepted = offered() & !(1 << VIRTIO_RING_F_INDIRECT_DESC);
        assert_eq!(missing(accepted), Some("VIRTIO_RING_F_INDIRECT_DESC"));
        assert_eq!(missing(0), Some("VIRTIO_F_VERSION_1"));
    }

    #[test]
    fn event_idx_is_welcome_and_not_needed() {
        assert_eq!(missing(offered() & !(1 << VIRTIO_RING_F_EVENT_IDX)), None);
    }

    #[test]
    fn packed_rings_are_not_offered() {
        assert_eq!(offered() & (1 << virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED), 0);
    }

    #[test]
    fn port_count_follows_from_the_rings_named() {
        assert_eq!((ports_of(Some(7)), ports_of(Some(5)), ports_of(Some(3))), (3, 2, 1));
        assert_eq!((ports_of(Some(1)), ports_of(Some(0))), (0, 0));
        assert_eq!((ports_of(Some(255)), ports_of(None)), (PORTS_MAX, PORTS_MAX));
    }

    #[test]
    fn configuration_holds_the_port_count() {
        assert_eq!(config(3, 0, 12), [0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(config(3, 4, 4), [3, 0, 0, 0]);
        assert_eq!(config(3, 0, 64).len(), 64);
    }

    proptest! {
        #[test]
        fn any_part_of_the_configuration_has_the_length_asked_for(offset: u32, bytes in 0u32..=4096) {
            prop_assert_eq!(config(PORTS_MAX, offset, bytes).len(), usize::try_from(bytes).unwrap());
        }
    }
}
