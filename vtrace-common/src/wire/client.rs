//! record (or another client) ⇄ server, over the control socket.
//!
//! A client claims guests, one at a time each; what it says to an agent goes through the server, which checks it and
//! passes it on. The file of a guest is opened by the client and its descriptor passed with [`ToServer::Lanes`]
//! (`SCM_RIGHTS`): the server never opens a path for anyone.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use super::{
    Family, Fault, Hello, Message,
    agent::{Echo, FromAgent, Machine, ToAgent},
    bounded, text,
};
use crate::{
    ids::Cpu,
    ledger::Ledger,
    limits::{DEVICES_MAX, GUESTS_MAX, LANES_MAX, NAME_BYTES_MAX},
    time::HostTsc,
};

extern crate alloc;

/// Requests to a server. `guest` is a name given with `--dom`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ToServer {
    /// Which guests are there? → `Guests`
    List,
    /// Make this guest mine. → `Claimed` or `Refused`
    Claim {
        /// Its name.
        guest: String,
    },
    /// Pass this on to the agent of a claimed guest. Answers come as `FromServer::Agent`.
    Agent {
        /// Its name.
        guest: String,
        /// The request.
        request: ToAgent,
    },
    /// Write this guest's pages there; one descriptor, writable and seekable, comes with it. With a second one, another
    /// description of the same file that has O_DIRECT, pages go past the page cache where they can. → `LanesReady`
    Lanes(Lanes),
    /// What has come so far? → `Ledger`
    Ledger {
        /// Its name.
        guest: String,
    },
    /// The agent has sent this much per lane: write the rest and close the lanes. → `Finished`
    Finish {
        /// Its name.
        guest: String,
        /// Bytes the agent put into each port; what has not come `wait_ms_max` later counts as lost on the way.
        sent: Vec<LaneSent>,
        /// How long to wait for what is still on its way.
        wait_ms_max: u32,
    },
    /// I am done with this guest. → `Released`
    Release {
        /// Its name.
        guest: String,
    },
}

/// Where the pages of a guest go.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lanes {
    /// The guest's name.
    pub guest: String,
    /// Bytes of one page, as its agent said when it was armed.
    pub page_bytes: u32,
    /// One area of the file for each lane.
    pub areas: Vec<Area>,
}

/// A lane's part of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Area {
    /// Whose part.
    pub cpu: Cpu,
    /// Where it begins; a multiple of the page.
    pub offset: u64,
    /// Bytes that belong to it; pages beyond are refused and counted.
    pub bytes_max: u64,
    /// Where it ends, the lane begins again at its start, over its oldest pages, and nothing is refused. `bytes_max` is a
    /// multiple of the page then.
    pub begins_again: bool,
}

impl Area {
    /// Where in the file the next page goes when `written` bytes of whole pages have been put into it. Hot.
    pub fn place(&self, written: u64) -> u64 {
        self.offset + if self.begins_again { written % self.bytes_max } else { written }
    }

    /// Bytes from that place to the end. Hot.
    pub fn room(&self, written: u64) -> u64 {
        let used = if self.begins_again { written % self.bytes_max } else { written };
        self.bytes_max.saturating_sub(used)
    }

    /// What was written ends where the area does, and the next page goes to its start. Hot.
    pub fn is_at_start(&self, written: u64) -> bool {
        self.begins_again && written.is_multiple_of(self.bytes_max)
    }
}

/// How much an agent reports to have sent on a lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LaneSent {
    /// CPU of the lane.
    pub cpu: Cpu,
    /// Bytes put into the port since `Start`: the `bytes_out` of the agent's ledger.
    pub bytes_out: u64,
}

/// The host's side of one lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LaneLedger {
    /// CPU of the lane.
    pub cpu: Cpu,
    /// From the source to the file. Lost: a bad header, no room left in the area, a write that failed.
    pub ledger: Ledger,
    /// Bytes after the last whole page.
    pub bytes_torn: u64,
    /// Bytes the agent sent that never came; `None` until the agent has reported how many it sent.
    pub bytes_missing: Option<u64>,
    /// `errno` of the first write that failed, 0 if none did.
    pub write_errno: i32,
}

/// Answers of a server.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FromServer {
    /// Answer to `List`.
    Guests(Vec<GuestState>),
    /// The guest is yours.
    Claimed(Claimed),
    /// The agent of a claimed guest says this.
    Agent {
        /// Its name.
        guest: String,
        /// What it says.
        answer: FromAgent,
    },
    /// An echo, with the host's stamps around it.
    Echo {
        /// Its name.
        guest: String,
        /// The host's TSC right before the probe went into the ring.
        host_sent: HostTsc,
        /// What the guest saw.
        echo: Echo,
        /// The host's TSC right after the echo came out of the ring.
        host_received: HostTsc,
    },
    /// Pages that come from now on are written.
    LanesReady {
        /// Its name.
        guest: String,
    },
    /// Answer to `Ledger`.
    Ledger {
        /// Its name.
        guest: String,
        /// One entry a lane.
        lanes: Vec<LaneLedger>,
    },
    /// Answer to `Finish`: nothing is written any more.
    Finished {
        /// Its name.
        guest: String,
        /// One entry a lane.
        lanes: Vec<LaneLedger>,
    },
    /// Answer to `Release`.
    Released {
        /// Its name.
        guest: String,
    },
    /// The agent closed its control port, or the device is gone. The claim stays; `Finish` still works.
    Gone {
        /// Its name.
        guest: String,
        /// What went away.
        what: Gone,
    },
    /// A request could not be met.
    Refused(Refusal),
}

/// What went away.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Gone {
    /// The agent closed its control port (it ended, or the guest's driver was unbound).
    Agent,
    /// The VMM closed the socket of a device.
    Device,
}

/// One guest as the server sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GuestState {
    /// Its name.
    pub name: String,
    /// The device's socket.
    pub socket: String,
    /// The VMM that is connected, by SO_PEERCRED.
    pub vmm_pid: Option<u32>,
    /// The driver is running and has accepted what it must.
    pub driver: DriverState,
    /// The agent's hello, when its control port is open.
    pub agent: Option<AgentState>,
    /// Process that holds the guest; 0 for one of another user, which only root is told of.
    pub holder_pid: Option<u32>,
    /// Whose process that is.
    pub holder_uid: Option<u32>,
    /// Its devices after the first, in order.
    pub further: Vec<DeviceState>,
    /// CPUs that each of its devices carries at most.
    pub lanes_per_device: u32,
    /// Seconds for which its agent has owed an answer; 0 if it owes none. An idle agent that is reached through a
    /// device is not asked.
    pub silent_s: u32,
}

/// A device of a guest that has several; the first one's state is the guest's.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeviceState {
    /// The VMM that is connected: the first device's, by SO_PEERCRED.
    pub vmm_pid: Option<u32>,
    /// How far its driver has come.
    pub driver: DriverState,
}

/// How far the guest's driver has come.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DriverState {
    /// No VMM, or no driver yet.
    Absent,
    /// Rings are running.
    Running,
    /// The driver did not accept a feature without which pages would be lost; its name.
    Unfit(String),
    /// The VMM's memory is not shared with us (`share=on` is missing).
    MemoryNotShared,
}

/// An agent whose control port is open.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AgentState {
    /// What it said first.
    pub hello: Hello,
    /// Where it runs; missing if it speaks another version.
    pub machine: Option<Machine>,
}

/// A guest is claimed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Claimed {
    /// Its name.
    pub guest: String,
    /// The VMM's process.
    pub vmm_pid: u32,
    /// Its agent's machine.
    pub machine: Machine,
}

/// Why a request could not be met.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Refusal {
    /// No guest of this name; `known` are the names there are.
    NoSuchGuest {
        /// What was asked for.
        guest: String,
        /// What there is.
        known: Vec<String>,
    },
    /// No VMM is connected to this guest's socket.
    NotConnected {
        /// The guest.
        guest: String,
        /// Where QEMU has to connect.
        socket: String,
    },
    /// The VMM is connected, but its driver cannot be used.
    Driver {
        /// The guest.
        guest: String,
        /// In which way.
        state: DriverState,
    },
    /// No agent has opened the control port.
    NoAgent {
        /// The guest.
        guest: String,
    },
    /// The agent speaks another wire version.
    AgentVersion {
        /// The guest.
        guest: String,
        /// What it said of itself.
        hello: Hello,
    },
    /// Another client holds the guest.
    Held {
        /// The guest.
        guest: String,
        /// Who; 0 for a process of another user, which only root is told of.
        holder_pid: u32,
        /// Whose process that is.
        holder_uid: u32,
    },
    /// The request needs a claim, or lanes, that this client does not have.
    State {
        /// The guest.
        guest: String,
        /// What is missing.
        detail: String,
    },
    /// The request itself is wrong.
    Request {
        /// In which way.
        detail: String,
    },
    /// The server serves as many clients as it can.
    Full,
}

fn name(name: &str) -> Result<(), Fault> {
    bounded(name.len(), NAME_BYTES_MAX)
}

impl Message for ToServer {
    const FAMILY: Family = Family::ToServer;
    fn check(&self) -> Result<(), Fault> {
        match self {
            Self::List => Ok(()),
            Self::Claim { guest } | Self::Ledger { guest } | Self::Release { guest } => name(guest),
            Self::Agent { guest, request } => name(guest).and_then(|()| request.check()),
            Self::Lanes(lanes) => name(&lanes.guest).and_then(|()| bounded(lanes.areas.len(), LANES_MAX)),
            Self::Finish { guest, sent, .. } => name(guest).and_then(|()| bounded(sent.len(), LANES_MAX)),
        }
    }
}

impl Message for FromServer {
    const FAMILY: Family = Family::FromServer;
    fn check(&self) -> Result<(), Fault> {
        match self {
            Self::Guests(guests) => {
                bounded(guests.len(), GUESTS_MAX)?;
                guests.iter().try_for_each(|guest| {
                    bounded(guest.further.len(), DEVICES_MAX - 1)?;
                    name(&guest.name).and_then(|()| text(&guest.socket))
                })
            }
            Self::Agent { guest, answer } => name(guest).and_then(|()| answer.check()),
            Self::Ledger { guest, lanes } | Self::Finished { guest, lanes } => {
                name(guest).and_then(|()| bounded(lanes.len(), LANES_MAX))
            }
            Self::LanesReady { guest } | Self::Released { guest } => name(guest),
            Self::Claimed(Claimed { guest, .. }) => name(guest),
            Self::Echo { guest, .. } | Self::Gone { guest, .. } => name(guest),
            Self::Refused(_) => Ok(()),
        }
    }
}
