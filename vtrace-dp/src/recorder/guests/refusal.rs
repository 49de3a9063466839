//! The server's refusals, and who holds a guest, as text.

use vtrace_common::wire::client::{GuestState, Refusal};

use crate::printable::printable;

/// Who records a guest. `pid` 0: a process of another user, whose pid is not shown.
pub fn held_by(pid: u32, uid: u32) -> String {
    match pid {
        0 => format!("user {uid} is recording it"),
        pid => format!("process {pid} of user {uid} is recording it"),
    }
}

/// Who records a guest; `None` if it is free.
pub fn holder(guest: &GuestState) -> Option<String> {
    Some(held_by(guest.holder_pid?, guest.holder_uid.unwrap_or(0)))
}

/// A refusal as text that follows "the server refused: ".
pub(super) fn reason(refusal: &Refusal) -> String {
    match refusal {
        Refusal::NoSuchGuest { .. } => "it has no guest of this name".into(),
        Refusal::NotConnected { socket, .. } => format!("no virtual machine is connected to {socket}"),
        Refusal::Driver { .. } => "no driver of the guest serves its device".into(),
        Refusal::NoAgent { .. } => "no agent runs in the guest".into(),
        Refusal::AgentVersion { hello, .. } => {
            format!("the agent is of another version ({})", printable(&hello.software))
        }
        Refusal::Held { holder_pid, holder_uid, .. } => held_by(*holder_pid, *holder_uid),
        Refusal::State { detail, .. } | Refusal::Request { detail } => detail.clone(),
        Refusal::Full => "it has reached its limit of clients".into(),
    }
}
