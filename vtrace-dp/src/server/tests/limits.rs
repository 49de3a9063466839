//! Servers that run out of descriptors, of addresses. Each is in a process of its own: limits are the process's.

use std::{process::Command, sync::atomic::Ordering, thread::sleep};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};

use super::*;
use crate::{device::testing::vmm::code, sys::accept::ATTEMPTS, virtq::testing::memory_file};

/// Set for the process that is limited.
const LIMITED: &str = "VTRACE_TEST_IS_LIMITED";

/// Runs the test `name` again in a process of its own; false in that process.
fn passes_in_own_process(name: &str) -> bool {
    if std::env::var_os(LIMITED).is_some() {
        return false;
    }
    let mut own = Command::new(std::env::current_exe().unwrap());
    own.args(["--exact", &format!("server::tests::limits::{name}"), "--nocapture"]).env(LIMITED, "1");
    let output = own.output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.contains("1 passed"), "{}: {said}", output.status);
    true
}

/// The lowest number that no descriptor has: with it as the limit, one descriptor less than are open may be had again.
fn lowest_free_number() -> u64 {
    let file = File::open("/dev/null").unwrap();
    std::os::fd::AsRawFd::as_raw_fd(&file).try_into().unwrap()
}

/// What has come before a socket ends, or does not: what waits is `None`.
fn ended(mut socket: &UnixStream) -> Option<bool> {
    match socket.read(&mut [0; 4096]) {
        Ok(count) => Some(count == 0),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn server_without_descriptors_turns_away_without_spinning_and_serves_again() {
    if passes_in_own_process("server_without_descriptors_turns_away_without_spinning_and_serves_again") {
        return;
    }
    let house = House::new();
    let paths = ["guest1.sock", CONTROL_SOCKET].map(|name| house.path().join(name));
    // A descriptor for each that connects later.
    let client =
        || UnixStream::from(socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap());
    let connect_to = |client: &UnixStream, path: &Path| {
        connect(std::os::fd::AsRawFd::as_raw_fd(client), &UnixAddr::new(path).unwrap()).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
    };
    let clients: Vec<(UnixStream, &Path)> = (0..6).map(|at| (client(), &*paths[at % 2])).collect();
    let (turned_away, rest) = clients.split_at(2);
    let (waiting, later) = rest.split_at(2);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();

    // The reserve is left: whoever connects learns that it is not served.
    setrlimit(Resource::RLIMIT_NOFILE, lowest_free_number(), hard).unwrap();
    for (client, path) in turned_away {
        connect_to(client, path);
        assert_eq!(ended(client), Some(true), "{} is closed at once", path.display());
    }
    // Nothing is left: who connects waits, and the server does not try without end.
    setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
    waiting.iter().for_each(|(client, path)| connect_to(client, path));
    let before = ATTEMPTS.load(Ordering::Relaxed);
    sleep(10 * ACCEPT_PAUSE);
    let attempts = ATTEMPTS.load(Ordering::Relaxed) - before;
    // Each attempt is two calls: with the reserve and without.
    assert!((1..=60).contains(&attempts), "{attempts} attempts of two sockets in ten pauses");

    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let (vmm, client) = (&waiting[0].0, &waiting[1].0);
    send_all(vmm.as_fd(), &[code::GET_FEATURES, 1, 0].map(u32::to_le_bytes).concat(), &[]).unwrap();
    assert_eq!((ended(vmm), ended(client)), (Some(false), Some(false)), "both are served now");
    // The reserve is there again.
    setrlimit(Resource::RLIMIT_NOFILE, lowest_free_number(), hard).unwrap();
    for (client, path) in later {
        connect_to(client, path);
        assert_eq!(ended(client), Some(true), "{} is closed at once", path.display());
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// Addresses that this process may use beside those it uses now.
const ADDRESSES: u64 = 8 << 30;
const REGION_BYTES: u64 = 512 << 20;
/// More than there are addresses for.
const REGIONS: u64 = 48;

#[test]
fn guest_that_takes_all_addresses_is_refused_and_the_other_is_served() {
    if passes_in_own_process("guest_that_takes_all_addresses_is_refused_and_the_other_is_served") {
        return;
    }
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().next().unwrap().parse().unwrap();
    let limit = pages * 4096 + ADDRESSES;
    setrlimit(Resource::RLIMIT_AS, limit, limit).unwrap();
    let house = House::new();
    let greedy = house.boot("guest1");
    for at in 1..=REGIONS {
        let file = OwnedFd::from(memory_file(REGION_BYTES).unwrap());
        let (gpa, vmm) = (at * REGION_BYTES, (1 << 40) + at * REGION_BYTES);
        let body = [0, gpa, REGION_BYTES, vmm, 0].map(u64::to_le_bytes).concat();
        greedy.vmm.ask_ack(code::ADD_MEM_REG, &body, Some(&file));
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapped: u64 = maps.lines().filter(|line| line.contains("memfd:guest")).map(bytes_of).sum();
    assert!((REGION_BYTES..limit / 2).contains(&mapped), "{mapped} bytes of {limit}");
    // The other one, a client and its thread.
    let _other = house.guest("guest2");
    assert!(matches!(ask(&mut house.link(), &ToServer::List), FromServer::Guests(guests) if guests.len() == 2));
}

/// Bytes of a line of /proc/self/maps.
fn bytes_of(line: &str) -> u64 {
    let (range, _) = line.split_once(' ').unwrap();
    let (from, to) = range.split_once('-').unwrap();
    let [from, to] = [from, to].map(|address| u64::from_str_radix(address, 16).unwrap());
    to - from
}
