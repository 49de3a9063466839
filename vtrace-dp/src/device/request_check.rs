//! What has come over the vhost-user socket: looked at before the `vhost` crate reads it.
//!
//! In:    the socket
//! Out:   whether the next request is there whole, so that reading it cannot block; or what to do instead of reading it
//! Runs:  on the device's thread, without waiting
//! Full:  a request longer than the protocol's longest is taken out of the stream with all that has come
//! Trust: the VMM, but its mistakes must not stop the control queue: the crate would wait for the rest of half a request,
//!        and after a malformed header it would take the body for the next one
//!
//! Source: QEMU docs/interop/vhost-user.rst, "Message Specification": u32 request, u32 flags, u32 size of the payload.

use std::os::{fd::AsFd, unix::net::UnixStream};

use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};

use crate::sys::{
    SysError,
    socket::{peek, receive, send_all, waiting_bytes},
};

/// Bytes of a header.
const HEADER_BYTES: usize = 12;
/// Flags: version in the two lowest bits, then these.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// SET_MEM_TABLE's payload up to the first region: u32 regions, u32 padding.
const TABLE_BYTES: usize = 8;

/// The next request's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Request {
    code: u32,
    flags: u32,
    bytes: usize,
}

/// What is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arrival {
    /// Nothing, or not all of it yet.
    Nothing,
    /// The VMM has closed the socket.
    Closed,
    /// A request that the crate can read.
    Whole,
    /// A memory table without regions: nothing of the VMM's memory can be shared. The crate knows no such table.
    PrivateMemory(Request),
    /// A request that no crate knows, or that is none.
    Unknown(Request),
}

/// Looks at what has come.
pub(super) fn look(socket: &UnixStream) -> Result<Arrival, SysError> {
    let mut bytes = [0; HEADER_BYTES + TABLE_BYTES];
    let count = match peek(socket.as_fd(), &mut bytes) {
        Ok(0) => return Ok(Arrival::Closed),
        Ok(count) => count,
        Err(error) if error.would_block() => return Ok(Arrival::Nothing),
        Err(error) => return Err(error),
    };
    Ok(judge(&bytes[..count], waiting_bytes(socket.as_fd())?))
}

/// `first`: the first bytes of what waits; `waiting`: how many bytes that are.
fn judge(first: &[u8], waiting: usize) -> Arrival {
    let word = |at: usize| Some(u32::from_le_bytes(*first.get(at..)?.first_chunk()?));
    let (Some(code), Some(flags), Some(size)) = (word(0), word(4), word(8)) else { return Arrival::Nothing };
    let request = Request { code, flags, bytes: usize::try_from(size).unwrap_or(usize::MAX) };
    if request.bytes > MAX_MSG_SIZE {
        return Arrival::Unknown(request);
    }
    if waiting < HEADER_BYTES + request.bytes {
        return Arrival::Nothing;
    }
    let ours = flags & !NEED_REPLY == VERSION;
    match FrontendReq::try_from(code) {
        Ok(FrontendReq::SET_MEM_TABLE) if ours && request.bytes == TABLE_BYTES && word(HEADER_BYTES) == Some(0) => {
            Arrival::PrivateMemory(request)
        }
        Ok(_) if ours => Arrival::Whole,
        _ => Arrival::Unknown(request),
    }
}

/// Takes a request out of the stream, as far as it has come, and closes descriptors that came with it. Answers it with
/// `answer` if the VMM waits for one.
pub(super) fn skip(socket: &UnixStream, request: &Request, answer: u64) -> Result<(), SysError> {
    let mut left = HEADER_BYTES.saturating_add(request.bytes);
    let mut bytes = [0; 1024];
    while left > 0 {
        let room = left.min(bytes.len());
        match receive(socket.as_fd(), &mut bytes[..room]) {
            Ok((0, _)) => break,
            Ok((count, _)) => left -= count,
            Err(error) if error.would_block() => break,
            Err(error) => return Err(error),
        }
    }
    if request.flags & NEED_REPLY == 0 {
        return Ok(());
    }
    let words = [request.code, VERSION | REPLY, 8].map(u32::to_le_bytes).concat();
    send_all(socket.as_fd(), &[words, answer.to_le_bytes().to_vec()].concat(), None)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;

    use super::*;

    fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        let size = u32::try_from(body.len()).unwrap();
        [&[code, flags, size].map(u32::to_le_bytes).concat()[..], body].concat()
    }

    #[test]
    fn half_a_request_is_left_alone_until_the_rest_comes() {
        let (mut vmm, ours) = UnixStream::pair().unwrap();
        let bytes = message(2, VERSION, &[0; 8]);
        for (sent, byte) in bytes.iter().enumerate() {
            assert_eq!(look(&ours).unwrap(), Arrival::Nothing, "after {sent} bytes");
            vmm.write_all(&[*byte]).unwrap();
        }
        assert_eq!(look(&ours).unwrap(), Arrival::Whole);
        drop(vmm);
        receive(ours.as_fd(), &mut [0; 64]).unwrap();
        assert_eq!(look(&ours).unwrap(), Arrival::Closed);
    }

    #[test]
    fn unknown_request_is_skipped_and_refused_if_an_answer_is_awaited() {
        let (mut vmm, ours) = UnixStream::pair().unwrap();
        vmm.write_all(&message(999, VERSION | NEED_REPLY, &[7; 20])).unwrap();
        vmm.write_all(&message(1, VERSION, &[])).unwrap();
        let Arrival::Unknown(request) = look(&ours).unwrap() else { panic!("not unknown") };
        skip(&ours, &request, 1).unwrap();
        assert_eq!(look(&ours).unwrap(), Arrival::Whole);
        let mut answer = [0; 20];
        vmm.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..], message(999, VERSION | REPLY, &1u64.to_le_bytes()));
    }

    #[test]
    fn memory_table_without_regions_is_recognized() {
        let bytes = message(FrontendReq::SET_MEM_TABLE as u32, VERSION | NEED_REPLY, &[0; 8]);
        assert!(matches!(judge(&bytes, bytes.len()), Arrival::PrivateMemory(_)));
        let bytes = message(FrontendReq::SET_MEM_TABLE as u32, VERSION, &[1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(judge(&bytes, bytes.len()), Arrival::Whole);
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_and_can_be_skipped(bytes in proptest::collection::vec(any::<u8>(), 1..100)) {
            let (mut vmm, ours) = UnixStream::pair().unwrap();
            vmm.write_all(&bytes).unwrap();
            if let Arrival::Unknown(request) = look(&ours).unwrap() {
                skip(&ours, &request, 1).unwrap();
                prop_assert!(waiting_bytes(ours.as_fd()).unwrap() < bytes.len());
            }
        }
    }
}
