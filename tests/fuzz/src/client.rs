//! What a client says over the control socket, to a whole server with one guest that is not there.
//!
//! Input: u8 (bit 0: our hello is sent first), then what is sent; the client then closes its sending side.

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::OnceLock,
    time::Duration,
};

use vtrace_common::{
    ids::Cpu,
    wire::{
        Capabilities, Decoder, Family, Hello,
        agent::ToAgent,
        client::{Area, FromServer, LaneSent, Lanes, ToServer},
        encode,
    },
};
use vtrace_dp::server::{CONTROL_SOCKET, GuestConfig, GuestSocket, Server, ServerConfig};

const GUEST: &str = "guest1";
/// A socket takes so much at once; the server may have closed its end by then.
const BYTES_MAX: usize = 64 << 10;
/// An answer that has not come by then never will.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// The server of all inputs. It ends with the process.
static SERVER: OnceLock<(Server, PathBuf)> = OnceLock::new();

fn socket() -> UnixStream {
    let (_, path) = SERVER.get_or_init(|| {
        let directory = std::env::temp_dir().join(format!("vtrace-fuzz-{}", std::process::id()));
        let guests = vec![GuestConfig::new(GUEST, GuestSocket::InDirectory)];
        let config = ServerConfig { directory: directory.clone(), guests, ..ServerConfig::default() };
        let server = Server::start(&config).expect("a server");
        (server, directory.join(CONTROL_SOCKET))
    });
    let socket = UnixStream::connect(path).expect("a server that lives");
    socket.set_read_timeout(Some(WAIT_MAX)).expect("a time");
    socket
}

/// Sends the input and reads all answers; then another client must be served.
pub fn run(bytes: &[u8]) {
    let Some((&setup, said)) = bytes.split_first() else { return };
    let hello = encode(&Hello::ours("seed")).expect("a hello is within its bounds");
    let hello = if setup & 1 == 1 { hello } else { Vec::new() };
    answers(&[&hello[..], &said[..said.len().min(BYTES_MAX)]].concat());
    let listed = answers(
        &[&encode(&Hello::ours("judge")).expect("bounds"), &encode(&ToServer::List).expect("bounds")[..]].concat(),
    );
    assert!(matches!(&listed[..], [FromServer::Guests(guests)] if guests.len() == 1), "{listed:?}");
}

/// What the server answers until it closes its end; its hello is left out.
fn answers(said: &[u8]) -> Vec<FromServer> {
    let mut socket = socket();
    // The server hangs up on nonsense, possibly in the middle of it.
    let _ = socket.write_all(said).and_then(|()| socket.shutdown(Shutdown::Write));
    let (mut decoder, mut piece, mut found) = (Decoder::default(), vec![0; 64 << 10], Vec::new());
    loop {
        match socket.read(&mut piece) {
            Ok(0) => return found,
            Ok(count) => decoder.push(&piece[..count]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return found,
            // libFuzzer's clock.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("no answer and no end: {error}"),
        }
        while let Some(frame) = decoder.next_frame().expect("the server sends frames") {
            if frame.family != Family::Hello {
                found.push(frame.open().expect("the server sends messages of its own"));
            }
        }
    }
}

/// Sessions as a recorder has them, requests out of order, and requests for an unknown guest.
pub fn seeds() -> Vec<Vec<u8>> {
    let guest = || GUEST.to_owned();
    let areas = vec![Area { cpu: Cpu(0), offset: 8192, bytes_max: 1 << 20, begins_again: false }];
    let sent = vec![LaneSent { cpu: Cpu(0), bytes_out: 4096 }];
    let session = [
        ToServer::List,
        ToServer::Claim { guest: guest() },
        ToServer::Agent { guest: guest(), request: ToAgent::Ping { id: 3 } },
        ToServer::Lanes(Lanes { guest: guest(), page_bytes: 4096, areas }),
        ToServer::Ledger { guest: guest() },
        ToServer::Finish { guest: guest(), sent, wait_ms_max: 1 },
        ToServer::Release { guest: guest() },
    ];
    let sent = |messages: &[ToServer]| {
        let frames = messages.iter().map(|message| encode(message).expect("seeds keep to the bounds"));
        [vec![1], frames.collect::<Vec<_>>().concat()].concat()
    };
    let mut reversed = session.clone();
    reversed.reverse();
    let stranger = ToServer::Claim { guest: "../guest1".into() };
    let hello = encode(&Hello {
        version_min: 2,
        version_max: 9,
        software: String::new(),
        capabilities: Capabilities::default(),
    })
    .expect("bounds");
    vec![
        sent(&session),
        sent(&reversed),
        sent(&[stranger]),
        [&[0], &hello[..]].concat(),
        b"\x00GET / HTTP/1.1\r\n".to_vec(),
    ]
}
