//! Whatever arrives on a socket of the server, with whatever descriptors, the process has as many afterwards as before.

#![expect(clippy::unwrap_used, reason = "all of it is a test")]

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use nix::sys::{
    epoll::{Epoll, EpollCreateFlags},
    eventfd::EventFd,
    memfd::{MFdFlags, memfd_create},
};
use proptest::prelude::*;
use vtrace_common::wire::{Hello, client::ToServer, encode};
use vtrace_dp::{
    server::{CONTROL_SOCKET, GuestConfig, GuestSocket, Server, ServerConfig, stream::Streams},
    sys::socket::{MESSAGE_DESCRIPTORS_MAX, send_all},
    vmm::setup::{Folder, Setup, Transport},
};

/// A server that has not closed what came by then never will.
const PATIENCE: Duration = Duration::from_secs(30);

/// One of each kind that a process can send.
struct Objects(Vec<OwnedFd>);

impl Objects {
    fn new(folder: &Path) -> Self {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let memory = memfd_create(c"memory", MFdFlags::MFD_CLOEXEC).unwrap();
        let objects = vec![
            reader,
            writer,
            one.into(),
            other.into(),
            memory,
            EventFd::new().unwrap().into(),
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap().0,
            File::open("/dev/null").unwrap().into(),
            File::open("/proc/self/status").unwrap().into(),
            File::open(folder).unwrap().into(),
            UnixListener::bind(folder.join("listener")).unwrap().into(),
            tempfile::tempfile().unwrap().into(),
        ];
        Self(objects)
    }

    fn many(&self, first: usize, count: usize) -> Vec<BorrowedFd<'_>> {
        (first..first + count).map(|at| self.0[at % self.0.len()].as_fd()).collect()
    }
}

/// A server of a guest with a device and one with streams; its sockets.
fn server(root: &Path) -> (Server, Vec<PathBuf>) {
    let (folder, setup) = (Folder::of(root, "guest2"), Setup { transport: Transport::Socket, cpus: 2 });
    folder.make(setup, None).unwrap();
    let streams = Streams { folder: folder.clone(), setup };
    let guests = vec![
        GuestConfig::new("guest1", GuestSocket::InDirectory),
        GuestConfig::new("guest2", GuestSocket::Streams(streams)),
    ];
    let directory = root.join("run");
    let config = ServerConfig { directory: directory.clone(), guests, ..ServerConfig::default() };
    let mut sockets = vec![directory.join(CONTROL_SOCKET), directory.join("guest1.sock")];
    sockets.extend(setup.ports().map(|port| folder.socket(&port)));
    (Server::start(&config).unwrap(), sockets)
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Waits until as many descriptors are open as `wanted`. The server may not have seen the last connection yet; what it
/// loses there is missing for good, and found by a later look.
fn settles_at(wanted: usize) -> bool {
    let begun = Instant::now();
    loop {
        if open_descriptors() == wanted {
            return true;
        }
        if begun.elapsed() > PATIENCE {
            return false;
        }
        sleep(Duration::from_millis(1));
    }
}

/// Bytes of a message: random, or the beginning of sense.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let hello = encode(&Hello::ours("any")).unwrap();
    let asked = [hello.clone(), encode(&ToServer::List).unwrap()].concat();
    let claim = [hello, encode(&ToServer::Claim { guest: "guest1".into() }).unwrap()].concat();
    let request =
        (0u32..50, prop_oneof![Just(1u32), Just(9), any::<u32>()], 0u32..64).prop_map(|(code, flags, size)| {
            [[code, flags, size].map(u32::to_le_bytes).concat(), vec![0; usize::try_from(size).unwrap()]].concat()
        });
    prop_oneof![
        4 => request,
        1 => Just(asked),
        1 => Just(claim),
        2 => proptest::collection::vec(any::<u8>(), 1..200),
    ]
}

fn count() -> impl Strategy<Value = usize> {
    prop_oneof![0usize..6, 30usize..36, Just(MESSAGE_DESCRIPTORS_MAX)]
}

#[test]
fn whatever_arrives_on_any_socket_leaves_as_many_descriptors_as_before() {
    let root = tempfile::tempdir().unwrap();
    let objects = Objects::new(root.path());
    let (server, sockets) = server(root.path());
    sleep(Duration::from_millis(100));
    let before = open_descriptors();
    let messages = proptest::collection::vec((message(), 0usize..12, count(), any::<bool>()), 1..8);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(400));
    let result = runner.run(&(0..sockets.len(), messages), |(socket, messages)| {
        let mut socket = UnixStream::connect(&sockets[socket]).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
        for (bytes, first, count, reads) in messages {
            // The server may have closed the connection by now.
            let _ = send_all(socket.as_fd(), &bytes, &objects.many(first, count));
            if reads {
                let _ = socket.read(&mut [0; 4096]);
            }
        }
        drop(socket);
        prop_assert!(settles_at(before), "{} descriptors, {before} before", open_descriptors());
        Ok(())
    });
    result.unwrap();
    sleep(Duration::from_millis(500));
    assert!(settles_at(before), "{} descriptors, {before} before", open_descriptors());
    for socket in &sockets {
        // Each still accepts.
        UnixStream::connect(socket).unwrap().write_all(&[1]).unwrap();
    }
    server.stop();
}
