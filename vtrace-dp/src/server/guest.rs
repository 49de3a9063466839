//! The guests of a server: the state of each, its holder, the messages between holder and agent.
//!
//! In:    commands of client threads; events of the device
//! Out:   requests to the agent; messages to the holder; the state that `List` shows
//! Runs:  [`Guest`] on its first device's thread, [`GuestSlot`] shared with all client threads
//! Full:  a device with [`FRAMES_WAITING_MAX`] unserved commands refuses more; frames of the agent wait in its ring while
//!        the holder does not read
//! Trust: agents with nothing; clients with what the control socket's permissions allow them

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use vtrace_common::{
    limits::{FRAMES_WAITING_MAX, NAME_BYTES_MAX},
    wire::{
        Capabilities, Hello, VERSION,
        agent::{FromAgent, Machine, ToAgent},
        client::{AgentState, Claimed, DriverState, FromServer, Gone, GuestState, Refusal},
    },
};

use super::{
    devices::{DeviceParts, Devices},
    holder::{Claim, Claims, Release},
    outbox::{Notifier, Session},
};
use crate::{
    device::{AgentEvent, ControlPort, Foreign, Owner, Turn},
    printable::{cut, printable},
    sys::{log_limit::PeerLog, socket::Peer},
};

/// How long a server that ends waits for an agent to close its session.
const STOP_TIME_MAX: Duration = Duration::from_secs(1);

/// What is kept of an agent's uname; the kernel's five names of 64 bytes are never longer.
const UNAME_BYTES_MAX: usize = 325;
/// What is kept of an agent's name of itself.
const SOFTWARE_BYTES_MAX: usize = 64;

/// Why a name cannot be a guest's.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("guest name {name:?} is not 1 to {NAME_BYTES_MAX} letters, digits, '.', '_' or '-', or begins with '.'")]
pub struct NameFault {
    /// The name.
    pub name: String,
}

/// Refuses names that could leave their directory or confuse a reader.
pub fn check_name(name: &str) -> Result<(), NameFault> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len());
    if fits && name.bytes().all(plain) && !name.starts_with('.') {
        Ok(())
    } else {
        Err(NameFault { name: name.into() })
    }
}

/// One client's claim, or its wish to have one.
#[derive(Clone, Debug)]
pub(super) struct Holder {
    pub(super) peer: Peer,
    pub(super) session: Arc<Session>,
}

impl PartialEq for Holder {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.session, &other.session)
    }
}

/// What a client thread wants of a device.
#[derive(Debug)]
pub(super) enum DeviceCommand {
    Claim(Holder),
    Request(Holder, ToAgent),
    Release(Holder),
    Stop,
}

/// A device that does not get to its commands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Busy;

/// A guest, as all threads see it.
#[derive(Debug)]
pub struct GuestSlot {
    /// Its name.
    pub name: String,
    /// What its VMM, its agent and its clients cause in the log.
    pub(super) log: PeerLog,
    /// Its devices.
    pub(super) devices: Devices,
    pub(super) notifier: Arc<Notifier>,
    commands: Mutex<VecDeque<DeviceCommand>>,
    state: Mutex<GuestState>,
    /// Since when its agent owes an answer to whatever it was asked.
    asked: Mutex<Option<Instant>>,
}

impl GuestSlot {
    /// A guest that no VMM has connected for; each of its devices (one at least) carries `lanes` lanes.
    pub(super) fn new(name: &str, devices: Vec<DeviceParts>, lanes: usize) -> io::Result<Arc<Self>> {
        let state = GuestState {
            name: name.into(),
            socket: devices[0].socket.clone(),
            vmm_pid: None,
            driver: DriverState::Absent,
            agent: None,
            holder_pid: None,
            holder_uid: None,
            further: Vec::new(),
            lanes_per_device: u32::try_from(lanes).unwrap_or(u32::MAX),
            silent_s: 0,
        };
        Ok(Arc::new(Self {
            name: name.into(),
            log: PeerLog::new(name),
            devices: Devices::new(devices, lanes)?,
            notifier: Arc::new(Notifier::new()?),
            commands: Mutex::default(),
            state: Mutex::new(state),
            asked: Mutex::default(),
        }))
    }

    /// What `List` shows root.
    pub fn state(&self) -> GuestState {
        let further = self.devices.further();
        let silent = self.asked().map_or(0, |since| since.elapsed().as_secs());
        GuestState { further, silent_s: u32::try_from(silent).unwrap_or(u32::MAX), ..self.lock().clone() }
    }

    /// What `List` shows this client.
    pub(super) fn state_for(&self, client: Peer) -> GuestState {
        let mut state = self.state();
        if let (Some(pid), Some(uid)) = (state.holder_pid, state.holder_uid) {
            state.holder_pid = Some(client.told_pid(Peer { pid, uid }));
        }
        state
    }

    /// Asks something of the device's thread. Releases and the end always find room: each claim has one.
    pub(super) fn command(&self, command: DeviceCommand) -> Result<(), Busy> {
        let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        if commands.len() >= FRAMES_WAITING_MAX && !matches!(command, DeviceCommand::Release(_) | DeviceCommand::Stop) {
            return Err(Busy);
        }
        commands.push_back(command);
        drop(commands);
        self.notifier.notify();
        Ok(())
    }

    fn next_command(&self) -> Option<DeviceCommand> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn lock(&self) -> MutexGuard<'_, GuestState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self) -> MutexGuard<'_, Option<Instant>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A guest, as its device's thread sees it.
#[derive(Debug)]
pub(super) struct Guest {
    slot: Arc<GuestSlot>,
    claims: Claims<Holder>,
    stop_at: Option<Instant>,
}

impl Guest {
    pub(super) fn new(slot: Arc<GuestSlot>) -> Self {
        Self { slot, claims: Claims::new(), stop_at: None }
    }

    /// Whether a client has a session with the agent, armed at least: silence does not end it.
    pub(super) fn is_in_session(&self) -> bool {
        self.claims.is_in_session()
    }

    /// A request went to the agent, which has to answer.
    pub(super) fn asked(&self) {
        self.slot.asked().get_or_insert_with(Instant::now);
    }

    /// The agent has sent something: it is there.
    pub(super) fn heard(&self) {
        *self.slot.asked() = None;
    }

    fn obey(&mut self, command: DeviceCommand, port: &mut ControlPort) {
        match command {
            DeviceCommand::Claim(holder) => self.claim(holder),
            DeviceCommand::Request(holder, request) => self.pass(&holder, &request, port),
            DeviceCommand::Release(holder) => self.release(&holder, port),
            DeviceCommand::Stop => {
                self.stop_at = Some(Instant::now() + STOP_TIME_MAX);
                if let Some(holder) = self.claims.holder().cloned() {
                    self.release(&holder, port);
                }
            }
        }
    }

    fn claim(&mut self, claimant: Holder) {
        if let Err(refusal) = self.ready() {
            return claimant.session.post(&FromServer::Refused(refusal));
        }
        let guest = self.slot.name.clone();
        match self.claims.claim(claimant.clone()) {
            Claim::Granted => {
                let answer = self.claimed();
                self.slot.log.info(format_args!("claimed by pid {}, uid {}", claimant.peer.pid, claimant.peer.uid));
                claimant.session.post(&answer);
            }
            Claim::Waits => {}
            Claim::Refused(Holder { peer, .. }) => {
                let holder_pid = claimant.peer.told_pid(*peer);
                let refusal = Refusal::Held { guest, holder_pid, holder_uid: peer.uid };
                claimant.session.post(&FromServer::Refused(refusal));
            }
        }
        self.show_holder();
    }

    /// Whether the guest can be traced, or why not.
    fn ready(&self) -> Result<(), Refusal> {
        let state = self.slot.lock();
        let guest = state.name.clone();
        if state.vmm_pid.is_none() {
            return Err(Refusal::NotConnected { guest, socket: state.socket.clone() });
        }
        if state.driver != DriverState::Running {
            return Err(Refusal::Driver { guest, state: state.driver.clone() });
        }
        if let Some(state) = self.slot.devices.unfit() {
            return Err(Refusal::Driver { guest, state });
        }
        match &state.agent {
            None => Err(Refusal::NoAgent { guest }),
            Some(agent) if !agent.hello.speaks_ours() => {
                Err(Refusal::AgentVersion { guest, hello: agent.hello.clone() })
            }
            Some(AgentState { machine: None, .. }) => Err(Refusal::NoAgent { guest }),
            Some(_) => Ok(()),
        }
    }

    fn claimed(&self) -> FromServer {
        let state = self.slot.lock();
        let machine = state.agent.as_ref().and_then(|agent| agent.machine.clone()).unwrap_or_default();
        FromServer::Claimed(Claimed { guest: state.name.clone(), vmm_pid: state.vmm_pid.unwrap_or(0), machine })
    }

    /// Why the agent cannot be sent this request: its hello has no capability for it.
    fn unable(&self, request: &ToAgent) -> Option<String> {
        let state = self.slot.lock();
        let hello = &state.agent.as_ref()?.hello;
        let is_able = *request != ToAgent::Offer || hello.capabilities.contains(Capabilities::OFFER);
        (!is_able).then(|| {
            let software = &hello.software;
            format!("its agent ({software}) does not list events, clocks and tracers: copy this vtrace into the guest")
        })
    }

    fn pass(&mut self, holder: &Holder, request: &ToAgent, port: &mut ControlPort) {
        let guest = self.slot.name.clone();
        let refusal = if !self.claims.is_held_by(holder) {
            Refusal::State { guest, detail: "this client does not hold the guest".into() }
        } else if !port.is_open() {
            Refusal::NoAgent { guest }
        } else if let Some(detail) = self.unable(request) {
            Refusal::State { guest, detail }
        } else {
            match port.send(request) {
                Ok(()) => {
                    self.asked();
                    return self.claims.sends(request);
                }
                Err(full) => Refusal::State { guest, detail: full.to_string() },
            }
        };
        holder.session.post(&FromServer::Refused(refusal));
    }

    fn release(&mut self, holder: &Holder, port: &mut ControlPort) {
        match self.claims.release(holder, Instant::now()) {
            Release::NotHeld => return,
            Release::Close if port.is_open() => port.send(&ToAgent::Close).unwrap_or_else(|_| {
                // send() makes room for it.
                self.slot.log.error(format_args!("no room for a request that the agent closes its session"));
            }),
            Release::Close | Release::Done => {}
        }
        self.slot.log.info(format_args!("released by pid {}", holder.peer.pid));
        // First: whoever has read the answer finds the guest as it is then.
        self.claims_changed();
        holder.session.post(&FromServer::Released { guest: self.slot.name.clone() });
    }

    /// The next claimant may have the guest now.
    fn claims_changed(&mut self) {
        while let Some(claimant) = self.claims.next_claimant() {
            self.claim(claimant);
        }
        self.show_holder();
    }

    fn show_holder(&self) {
        let holder = self.claims.holder().map(|holder| holder.peer);
        let mut state = self.slot.lock();
        (state.holder_pid, state.holder_uid) = (holder.map(|peer| peer.pid), holder.map(|peer| peer.uid));
    }

    fn agent_gone(&mut self, what: Gone) {
        self.slot.lock().agent = None;
        if let Some(holder) = self.claims.holder().filter(|holder| self.claims.is_held_by(holder)) {
            holder.session.post(&FromServer::Gone { guest: self.slot.name.clone(), what });
        }
        self.claims.agent_gone();
        self.claims_changed();
    }

    /// A further device is gone, and with it its lanes; the agent is still there.
    fn notice_gone(&self) {
        if self.slot.devices.take_gone()
            && let Some(holder) = self.claims.holder().filter(|holder| self.claims.is_held_by(holder))
        {
            holder.session.post(&FromServer::Gone { guest: self.slot.name.clone(), what: Gone::Device });
        }
    }

    fn says(&mut self, mut answer: FromAgent) {
        if let FromAgent::Failed(failure) = &mut answer {
            self.slot.devices.explain(failure);
        }
        if let FromAgent::Machine(machine) = &answer {
            let machine = Machine {
                uname: printable(cut(&machine.uname, UNAME_BYTES_MAX)),
                boot_id: printable(cut(&machine.boot_id, UNAME_BYTES_MAX)),
                ..machine.clone()
            };
            if let Some(agent) = &mut self.slot.lock().agent {
                agent.machine = Some(machine);
            }
            return;
        }
        let listener = self.claims.listener().cloned();
        if self.claims.receives(&answer) {
            self.post(listener.as_ref(), |guest| FromServer::Agent { guest, answer });
        }
        self.claims_changed();
    }

    fn post(&self, listener: Option<&Holder>, message: impl FnOnce(String) -> FromServer) {
        if let Some(holder) = listener {
            holder.session.post(&message(self.slot.name.clone()));
        }
    }
}

impl Owner for Guest {
    fn wake(&self) -> BorrowedFd<'_> {
        self.slot.notifier.as_fd()
    }

    fn turn(&mut self, port: &mut ControlPort) -> Turn {
        self.notice_gone();
        while let Some(command) = self.slot.next_command() {
            // Whoever claims the guest now has lost nothing yet.
            self.notice_gone();
            self.obey(command, port);
        }
        if self.claims.deadline().is_some() {
            self.claims.expire(Instant::now());
            self.claims_changed();
        }
        match self.stop_at {
            Some(at) if self.claims.holder().is_none() || Instant::now() >= at => Turn::Stop,
            _ => Turn::Continue,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        // Without a holder to wait for, the end is due at once.
        let stop_at = self.stop_at.map(|at| if self.claims.holder().is_none() { Instant::now() } else { at });
        [self.claims.deadline(), stop_at].into_iter().flatten().min()
    }

    fn has_room(&mut self) -> bool {
        self.claims.listener().is_none_or(|holder| holder.session.has_room())
    }

    fn admit(&mut self, peer: Peer, socket: &UnixStream) -> Result<(), Foreign> {
        self.slot.devices.admit(0, peer, socket)
    }

    fn vmm(&mut self, peer: Option<Peer>) {
        self.slot.lock().vmm_pid = peer.map(|peer| peer.pid);
        if peer.is_none() {
            self.slot.devices.left(0);
            self.agent_gone(Gone::Device);
        }
    }

    fn driver(&mut self, state: DriverState, ports: usize) {
        self.slot.log.info(format_args!("driver {state:?}, {ports} ports"));
        self.slot.devices.driver(0, state.clone(), ports);
        self.slot.lock().driver = state;
    }

    fn agent(&mut self, event: AgentEvent, _port: &mut ControlPort) {
        self.heard();
        match event {
            AgentEvent::Opened => {}
            AgentEvent::Hello(hello) => {
                if self.slot.lock().agent.is_some() {
                    self.agent_gone(Gone::Agent); // the one before
                }
                let is_usable = if hello.speaks_ours() { "" } else { ": not usable, copy this vtrace into the guest" };
                self.slot.log.info(format_args!(
                    "agent {:?}, wire versions {} to {}, this server speaks {VERSION}{is_usable}",
                    hello.software, hello.version_min, hello.version_max
                ));
                let hello = Hello { software: printable(cut(&hello.software, SOFTWARE_BYTES_MAX)), ..hello };
                self.slot.lock().agent = Some(AgentState { hello, machine: None });
            }
            AgentEvent::Says(answer) => self.says(answer),
            AgentEvent::Echo { host_sent, echo, host_received } => {
                let message = |guest| FromServer::Echo { guest, host_sent, echo, host_received };
                self.post(self.claims.listener(), message);
            }
            AgentEvent::Garbled(fault) => {
                self.slot.log.info(format_args!("agent: what it sends is ignored from now on: {fault}"));
                self.agent_gone(Gone::Agent);
            }
            AgentEvent::Gone => {
                self.slot.log.info(format_args!("agent gone"));
                self.agent_gone(Gone::Agent);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for name in ["guest1", "a", "web-2.example_x", &"n".repeat(NAME_BYTES_MAX)] {
            assert_eq!(check_name(name), Ok(()));
        }
        for name in ["", ".", "..", ".hidden", "a/b", "a b", "a\0", "ä", &"n".repeat(NAME_BYTES_MAX + 1)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }
}
