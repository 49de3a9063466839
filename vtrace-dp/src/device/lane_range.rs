//! Which lanes a device carries.
//!
//! In:    the number of a port on its device
//! Out:   the CPU it belongs to, the name it has in the guest
//! Runs:  anywhere; nothing here has an effect
//! Full:  ports beyond a device's lanes are not there: the next device has these CPUs
//! Trust: the VMM chooses how many ports a device has, and which device comes first; names depend on neither
//!
//! Device d of a guest, counted from 0, carries the CPUs from d × lanes on. On each device port i belongs to the i-th of
//! them; port 0 is the control port of the first device, and the others never announce it.

use vtrace_common::{
    ids::Cpu,
    limits::{DEVICE_LANES_MAX, DEVICES_MAX, LANES_MAX, PORT_NAME_BYTES_MAX},
};

/// Name of the control port.
pub const CONTROL_PORT_NAME: &str = "agent-ctl-path";
/// Prefix of a lane's port name; the CPU's number follows.
pub const LANE_PORT_PREFIX: &str = "trace-path-cpu";

const _: () = assert!(LANES_MAX < 10_000 && LANE_PORT_PREFIX.len() + 4 <= PORT_NAME_BYTES_MAX);

/// The lanes of one device of a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneRange {
    device: usize,
    lanes: usize,
}

impl LaneRange {
    /// The only device of a guest.
    pub const ONLY: Self = Self { device: 0, lanes: DEVICE_LANES_MAX };

    /// Device number `device` of a guest whose devices carry `lanes` lanes each; both are cut to what there can be.
    pub fn new(device: usize, lanes: usize) -> Self {
        Self { device: device.min(DEVICES_MAX - 1), lanes: lanes.min(DEVICE_LANES_MAX) }
    }

    /// Lanes the device has room for.
    pub fn lanes(self) -> usize {
        self.lanes
    }

    /// Whether this port is announced to the guest.
    pub fn has(self, port: usize) -> bool {
        (port == 0 && self.device == 0) || self.lane(port).is_some()
    }

    /// The CPU whose pages come over this port.
    pub fn lane(self, port: usize) -> Option<Cpu> {
        let at = port.checked_sub(1).filter(|at| *at < self.lanes)?;
        Some(Cpu(u32::try_from(self.device * self.lanes + at).expect("LANES_MAX is far below 2^32")))
    }

    /// The port's name in the guest.
    pub fn name(self, port: usize) -> Option<String> {
        let control = || (port == 0 && self.device == 0).then(|| CONTROL_PORT_NAME.to_owned());
        self.lane(port).map(|cpu| format!("{LANE_PORT_PREFIX}{}", cpu.0)).or_else(control)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use vtrace_common::limits::PORTS_MAX;

    use super::*;

    #[test]
    fn first_device_has_the_control_port_and_the_first_lanes() {
        assert_eq!(LaneRange::ONLY.name(0).unwrap(), "agent-ctl-path");
        assert_eq!(LaneRange::ONLY.name(1).unwrap(), "trace-path-cpu0");
        assert_eq!((LaneRange::ONLY.lane(0), LaneRange::ONLY.lane(126)), (None, Some(Cpu(125))));
    }

    #[test]
    fn further_device_goes_on_where_the_one_before_it_ends() {
        let second = LaneRange::new(1, DEVICE_LANES_MAX);
        assert_eq!((second.name(0), second.has(0)), (None, false));
        assert_eq!(second.name(1).unwrap(), "trace-path-cpu126");
        assert_eq!(LaneRange::new(2, 2).lane(1), Some(Cpu(4)));
    }

    #[test]
    fn ports_beyond_a_devices_lanes_are_not_there() {
        let first = LaneRange::new(0, 2);
        assert!(first.has(2) && !first.has(3));
        assert_eq!((first.lane(3), first.name(3)), (None, None));
    }

    #[test]
    fn no_two_ports_of_a_guest_have_one_name() {
        for lanes in [1, 2, 125, DEVICE_LANES_MAX] {
            let places = (0..DEVICES_MAX).map(|device| LaneRange::new(device, lanes));
            let names: Vec<_> =
                places.flat_map(|place| (0..PORTS_MAX).filter_map(move |port| place.name(port))).collect();
            assert_eq!(names.len(), 1 + DEVICES_MAX * lanes);
            assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
        }
    }
}
