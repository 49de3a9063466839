//! What a virtual machine monitor sends over its vhost-user socket, to a whole server: requests as QEMU makes them, with
//! odd descriptors and changed bytes, memory of terabytes, rings whose words change while they are served, and an end
//! after any byte.
//!
//! Input: steps of 6 bytes: which request, which ring, how many descriptors of which kind, where the monitor dies, which
//! byte is changed, and how. With bit 5 of the first byte set the step writes to a ring and kicks instead.
//!
//! Afterwards the next monitor is served, and nothing of the first is left: no descriptor, no mapping of its memory.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        eventfd::{EfdFlags, EventFd},
        memfd::{MFdFlags, memfd_create},
    },
};
use vtrace_dp::{
    server::{GuestConfig, GuestSocket, Server, ServerConfig},
    sys::socket::{MESSAGE_DESCRIPTORS_MAX, receive, send_all},
};

use crate::random::Random;

const GUEST: &str = "guest1";
/// Steps of one input.
const STEPS_MAX: usize = 200;
/// A server that has not served the next monitor by then never will.
const WATCHDOG: Duration = Duration::from_secs(30);
/// Guest memory of the monitor.
const MEMORY_BYTES: u64 = 1 << 20;
/// Where its memory begins in the monitor.
const VMM_BASE: u64 = 1 << 30;
/// Entries of each ring.
const ENTRIES: u32 = 16;
/// Offsets in the page of a ring: of the index of its available ring, of its used ring, of a buffer.
const AVAILABLE: u64 = 256;
const BUFFER: u64 = 384;
const USED: u64 = 1024;
/// A step that writes two bytes to a ring and kicks.
const WRITE: u8 = 1 << 5;
/// Where a monitor dies that does not: its memory regions have [`HUGE_BYTES`].
const HUGE: u8 = 255;
const HUGE_BYTES: u64 = 1 << 46;

/// Requests that QEMU makes (docs/interop/vhost-user.rst, "Front-end message types").
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
const REQUESTS: [u32; 18] = [
    GET_FEATURES,
    SET_FEATURES,
    3,
    SET_MEM_TABLE,
    8,
    SET_VRING_ADDR,
    10,
    11,
    SET_VRING_KICK,
    SET_VRING_CALL,
    15,
    SET_PROTOCOL_FEATURES,
    17,
    18,
    24,
    36,
    ADD_MEM_REG,
    REM_MEM_REG,
];

/// The server of all inputs. It ends with the process.
static SERVER: OnceLock<(Server, PathBuf)> = OnceLock::new();
/// Tells the memory of one input from that of others.
static INPUTS: AtomicU64 = AtomicU64::new(0);

/// What a monitor may send along.
struct Objects {
    memory: File,
    event: EventFd,
    /// A pipe that is full and blocks.
    pipe: (OwnedFd, OwnedFd),
    socket: (UnixStream, UnixStream),
}

impl Objects {
    fn new() -> Self {
        let name = format!("vmm-{}-{}", std::process::id(), INPUTS.fetch_add(1, Ordering::Relaxed));
        let name = std::ffi::CString::new(name).expect("no zero");
        let memory = File::from(memfd_create(&*name, MFdFlags::MFD_CLOEXEC).expect("memfd"));
        memory.set_len(MEMORY_BYTES).expect("room for a sparse file");
        let pipe = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).expect("pipe");
        while nix::unistd::write(&pipe.1, &[0; 4096]).is_ok() {}
        fcntl(&pipe.1, FcntlArg::F_SETFL(OFlag::empty())).expect("a pipe blocks");
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).expect("eventfd");
        Self { memory, event, pipe, socket: UnixStream::pair().expect("socket pair") }
    }

    /// One of them, by a number.
    fn pick(&self, kind: u8) -> BorrowedFd<'_> {
        match kind % 4 {
            0 => self.event.as_fd(),
            1 => self.memory.as_fd(),
            2 => self.pipe.1.as_fd(),
            _ => self.socket.0.as_fd(),
        }
    }

    /// The objects as /proc names them. No other input has these.
    fn names(&self) -> Vec<String> {
        let descriptors = [self.memory.as_fd(), self.event.as_fd(), self.pipe.0.as_fd(), self.socket.0.as_fd()];
        descriptors.iter().map(|found| name_of(&found.as_raw_fd().to_string()).expect("it is open")).collect()
    }

    /// Writes two bytes to the page of a ring and wakes whoever serves it.
    fn write(&self, step: &Step) {
        let at = u64::from(step.ring) * 4096 + u64::from(step.changed_at) * 2;
        self.memory.write_at(&[step.dies_at, step.change], at).expect("memory can be written");
        let _ = self.event.write(1);
    }
}

/// One step of a monitor: a request, or a write to its memory.
struct Step {
    code: u32,
    is_write: bool,
    ring: u32,
    descriptors: u8,
    dies_at: u8,
    changed_at: u8,
    change: u8,
}

impl Step {
    fn of(bytes: &[u8; 6]) -> Self {
        let [which, ring, descriptors, dies_at, changed_at, change] = *bytes;
        // A few codes are not known.
        let code = REQUESTS.get(usize::from(which & 31)).copied().unwrap_or(u32::from(which));
        let is_write = which & WRITE != 0;
        Self { code, is_write, ring: u32::from(ring & 15), descriptors, dies_at, changed_at, change }
    }

    fn body(&self) -> Vec<u8> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let longs = |longs: &[u64]| longs.iter().flat_map(|long| long.to_le_bytes()).collect::<Vec<u8>>();
        let ring = u64::from(self.ring);
        let at = VMM_BASE + ring * 4096;
        let region = match self.dies_at {
            HUGE => [ring * HUGE_BYTES, HUGE_BYTES, VMM_BASE, 0],
            _ => [0, MEMORY_BYTES, VMM_BASE, 0],
        };
        match self.code {
            SET_FEATURES => longs(&[1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 2]),
            SET_PROTOCOL_FEATURES => longs(&[1 | 1 << 3 | 1 << 9 | 1 << 15]),
            SET_MEM_TABLE => [words(&[1, 0]), longs(&region)].concat(),
            ADD_MEM_REG | REM_MEM_REG => [longs(&[0]), longs(&region)].concat(),
            8 => words(&[self.ring, ENTRIES]),
            SET_VRING_ADDR => [words(&[self.ring, 0]), longs(&[at, at + USED, at + AVAILABLE, 0])].concat(),
            10 | 11 => words(&[self.ring, 0]),
            SET_VRING_KICK | SET_VRING_CALL => longs(&[ring]),
            18 => words(&[self.ring, 1]),
            24 => [words(&[0, 12, 0]), vec![0; 12]].concat(),
            _ => Vec::new(),
        }
    }

    /// Descriptors as QEMU sends them, or others: up to as many as a message can have.
    fn descriptors<'a>(&self, objects: &'a Objects) -> Vec<BorrowedFd<'a>> {
        match (self.descriptors, self.code) {
            (0, SET_MEM_TABLE | ADD_MEM_REG) => vec![objects.memory.as_fd()],
            (0, SET_VRING_KICK | SET_VRING_CALL) => vec![objects.event.as_fd()],
            (0, _) => Vec::new(),
            (255, _) => vec![objects.pick(self.ring.to_le_bytes()[0]); MESSAGE_DESCRIPTORS_MAX],
            (other, _) => (0..other >> 2).map(|at| objects.pick(at.wrapping_add(other))).collect(),
        }
    }

    /// The request, and whether the monitor dies in the middle of it.
    fn bytes(&self) -> (Vec<u8>, bool) {
        let body = self.body();
        let flags = if self.change & 1 == 1 { 9u32 } else { 1 };
        let size = u32::try_from(body.len()).expect("short");
        let header = [self.code, flags, size].map(u32::to_le_bytes).concat();
        let mut bytes = [header, body].concat();
        let at = usize::from(self.changed_at) % bytes.len();
        bytes[at] ^= self.change & !1;
        let dies_at = usize::from(self.dies_at);
        let dies = dies_at != 0 && dies_at < bytes.len();
        bytes.truncate(if dies { dies_at } else { bytes.len() });
        (bytes, dies)
    }
}

/// What a descriptor of this process leads to. All eventfds have one link: their number is among the other facts.
fn name_of(number: &str) -> Option<String> {
    let link = fs::read_link(format!("/proc/self/fd/{number}")).ok()?.to_string_lossy().into_owned();
    let facts = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    let event = facts.lines().find(|line| line.starts_with("eventfd-id")).unwrap_or_default();
    Some(format!("{link}{event}"))
}

/// Descriptors of this process that lead to one of these, and mappings.
fn held(names: &[String]) -> usize {
    let entries = fs::read_dir("/proc/self/fd").expect("/proc");
    let found = entries.flatten().filter_map(|entry| name_of(entry.file_name().to_str()?));
    let maps = fs::read_to_string("/proc/self/maps").expect("/proc");
    let mapped = maps.lines().filter(|line| names.iter().any(|name| line.ends_with(&**name)));
    found.filter(|name| names.contains(name)).count() + mapped.count()
}

/// Plays a monitor that connects at `path`, takes the steps of `bytes` and dies.
pub fn attack(path: &Path, bytes: &[u8]) {
    play(path, bytes, &Objects::new());
}

fn play(path: &Path, bytes: &[u8], objects: &Objects) {
    let Ok(socket) = UnixStream::connect(path) else { return };
    socket.set_write_timeout(Some(Duration::from_millis(100))).expect("a time");
    for step in bytes.as_chunks().0.iter().take(STEPS_MAX) {
        let step = Step::of(step);
        if step.is_write {
            objects.write(&step);
            continue;
        }
        if step.dies_at == HUGE {
            let _ = objects.memory.set_len(HUGE_BYTES);
        }
        let (bytes, dies) = step.bytes();
        if send_all(socket.as_fd(), &bytes, &step.descriptors(objects)).is_err() || dies {
            return;
        }
        if step.change & 2 == 0 {
            // What is not read stays for the server to keep.
            let _ = receive(socket.as_fd(), &mut [0; 4096]);
        }
    }
}

/// Whether the server answers a monitor that connects now.
pub fn serves(path: &Path) -> bool {
    let Ok(mut socket) = UnixStream::connect(path) else { return false };
    socket.set_read_timeout(Some(WATCHDOG)).expect("a time");
    let request = [GET_FEATURES, 1, 0].map(u32::to_le_bytes).concat();
    socket.write_all(&request).and_then(|()| socket.read_exact(&mut [0; 20])).is_ok()
}

fn socket_path() -> &'static Path {
    let (_, path) = SERVER.get_or_init(|| {
        let directory = std::env::temp_dir().join(format!("vtrace-fuzz-vmm-{}", std::process::id()));
        let guests = vec![GuestConfig::new(GUEST, GuestSocket::InDirectory)];
        let config = ServerConfig { directory: directory.clone(), guests, ..ServerConfig::default() };
        let server = Server::start(&config).expect("a server");
        (server, directory.join(format!("{GUEST}.sock")))
    });
    path
}

/// Waits until `is_so`.
fn within_watchdog(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < WATCHDOG, "{what}");
        sleep(Duration::from_millis(1));
    }
}

/// Plays a monitor; the next is served, and nothing of the first is left.
pub fn run(bytes: &[u8]) {
    let path = socket_path();
    let objects = Objects::new();
    let names = objects.names();
    let before = held(&names);
    play(path, bytes, &objects);
    within_watchdog("the next monitor is served", || serves(path));
    within_watchdog("nothing of a monitor that is gone is kept", || held(&names) <= before);
}

/// Input number `number`: a seed with some bytes changed, its end perhaps twice, or any bytes.
pub fn random_input(number: u64) -> Vec<u8> {
    let mut random = Random::new(number);
    if random.below(8) == 0 {
        let steps = 1 + random.below(60);
        return random.bytes(6 * steps);
    }
    let input = random.mutated(&seeds());
    let from = 6 * random.below(input.len() / 6);
    if random.below(2) == 0 { [&input[..], &input[from..]].concat() } else { input }
}

/// Monitors that start a device as QEMU does and send a page; that send too many descriptors; that die in the middle;
/// whose eventfds are full pipes; whose memory is larger than any; whose rings change under the server.
pub fn seeds() -> Vec<Vec<u8>> {
    let request = |code: u32| {
        let at = REQUESTS.iter().position(|known| *known == code).expect("it is in the table");
        u8::try_from(at).expect("few")
    };
    let step = |code: u32, ring: u8| [request(code), ring, 0, 0, 0, 0];
    let begin = [GET_FEATURES, 15, SET_PROTOCOL_FEATURES, SET_FEATURES, 3, ADD_MEM_REG].map(|code| step(code, 0));
    let ring = |ring: u8| [8, 10, SET_VRING_ADDR, SET_VRING_KICK, SET_VRING_CALL, 18].map(|code| step(code, ring));
    let rings: Vec<[u8; 6]> = (0..6).flat_map(ring).collect();
    // A descriptor of 8 bytes that lie in the ring's own page; value 1 in them: a control message "device ready".
    let write = |ring: u8, at: u64, value: u16| {
        let [low, high] = value.to_le_bytes();
        [WRITE, ring, 0, low, u8::try_from(at / 2).expect("the first half of a KiB"), high]
    };
    let chain = |ring: u8| {
        let buffer = u16::from(ring) * 4096 + u16::try_from(BUFFER).expect("an offset in a page");
        [write(ring, 0, buffer), write(ring, 8, 8), write(ring, BUFFER + 6, 1), write(ring, AVAILABLE + 2, 1)]
    };
    let chains: Vec<[u8; 6]> = (0..6).flat_map(chain).collect();
    let device = [&begin[..], &rings, &chains, &[step(11, 5), step(REM_MEM_REG, 0)]].concat();
    let broken = (0..120u8).map(|at| write(at % 6, u64::from(at) * 4, u16::from(at) << 9 | 1));
    let broken: Vec<[u8; 6]> = [&begin[..], &rings].concat().into_iter().chain(broken).collect();
    let huge = (0..16).map(|ring| [request(ADD_MEM_REG), ring, 0, HUGE, 0, 0]);
    let huge: Vec<[u8; 6]> = begin.into_iter().chain(huge).collect();
    let mut pipes = device.clone();
    for step in &mut pipes {
        if [request(SET_VRING_KICK), request(SET_VRING_CALL)].contains(&step[0]) {
            step[2] = 4 | 2;
        }
    }
    let flood: Vec<[u8; 6]> = (0..18).map(|code| [code, 1, 255, 0, 0, 0]).collect();
    let dies = [&begin[..], &[[request(SET_VRING_ADDR), 2, 0, 17, 0, 0]]].concat();
    [device, pipes, flood, dies, broken, huge].map(|steps| steps.concat()).to_vec()
}
