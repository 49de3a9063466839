//! What a virtual machine monitor sends over its vhost-user socket, to a whole server: requests as QEMU makes them, with
//! odd descriptors and changed bytes, and an end after any of their bytes.
//!
//! Input: steps of 6 bytes: which request, which ring, how many descriptors of which kind, where the monitor dies, which
//! byte is changed, and how.
//!
//! Afterwards the next monitor is served, and no descriptor is left but that of the memory: a lane's drain keeps the last
//! memory until its ring starts again.

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
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

    /// Those that lead to objects only this input has, as /proc names them: eventfds all have one name.
    fn names(&self) -> Vec<PathBuf> {
        let numbers = [self.pipe.0.as_raw_fd(), self.socket.0.as_raw_fd()];
        numbers.iter().map(|number| link(&number.to_string()).expect("it is open")).collect()
    }
}

/// One request of a monitor.
struct Step {
    code: u32,
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
        Self { code, ring: u32::from(ring & 15), descriptors, dies_at, changed_at, change }
    }

    fn body(&self) -> Vec<u8> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let longs = |longs: &[u64]| longs.iter().flat_map(|long| long.to_le_bytes()).collect::<Vec<u8>>();
        let ring = u64::from(self.ring);
        let at = VMM_BASE + ring * 4096;
        let region = [0, MEMORY_BYTES, VMM_BASE, 0];
        match self.code {
            SET_FEATURES => longs(&[1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 2]),
            SET_PROTOCOL_FEATURES => longs(&[1 | 1 << 3 | 1 << 9 | 1 << 15]),
            SET_MEM_TABLE => [words(&[1, 0]), longs(&region)].concat(),
            ADD_MEM_REG | REM_MEM_REG => [longs(&[0]), longs(&region)].concat(),
            8 => words(&[self.ring, ENTRIES]),
            SET_VRING_ADDR => [words(&[self.ring, 0]), longs(&[at, at + 1024, at + 512, 0])].concat(),
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

fn link(number: &str) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{number}")).ok()
}

/// Descriptors of this process that lead to one of these.
fn descriptors_of(names: &[PathBuf]) -> usize {
    let entries = std::fs::read_dir("/proc/self/fd").expect("/proc");
    let links = entries.flatten().filter_map(|entry| link(entry.file_name().to_str()?));
    links.filter(|link| names.contains(link)).count()
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

/// Plays a monitor; the next is served, and no descriptor of the first is left but that of its memory.
pub fn run(bytes: &[u8]) {
    let path = socket_path();
    let objects = Objects::new();
    let names = objects.names();
    let before = descriptors_of(&names);
    play(path, bytes, &objects);
    within_watchdog("the next monitor is served", || serves(path));
    within_watchdog("descriptors of a monitor that is gone are closed", || descriptors_of(&names) <= before);
}

/// A monitor that starts a device as QEMU does, one that sends too many descriptors, one that dies in the middle, and one
/// whose eventfds are full pipes.
pub fn seeds() -> Vec<Vec<u8>> {
    let request = |code: u32| {
        let at = REQUESTS.iter().position(|known| *known == code).expect("it is in the table");
        u8::try_from(at).expect("few")
    };
    let step = |code: u32, ring: u8| [request(code), ring, 0, 0, 0, 0];
    let begin = [GET_FEATURES, 15, SET_PROTOCOL_FEATURES, SET_FEATURES, 3, ADD_MEM_REG].map(|code| step(code, 0));
    let ring = |ring: u8| [8, 10, SET_VRING_ADDR, SET_VRING_KICK, SET_VRING_CALL, 18].map(|code| step(code, ring));
    let rings: Vec<[u8; 6]> = (0..6).flat_map(ring).collect();
    let device = [&begin[..], &rings, &[step(11, 5), step(REM_MEM_REG, 0)]].concat();
    let mut pipes = device.clone();
    for step in &mut pipes {
        if [request(SET_VRING_KICK), request(SET_VRING_CALL)].contains(&step[0]) {
            step[2] = 4 | 2;
        }
    }
    let flood: Vec<[u8; 6]> = (0..18).map(|code| [code, 1, 255, 0, 0, 0]).collect();
    let dies = [&begin[..], &[[request(SET_VRING_ADDR), 2, 0, 17, 0, 0]]].concat();
    [device, pipes, flood, dies].map(|steps| steps.concat()).to_vec()
}
