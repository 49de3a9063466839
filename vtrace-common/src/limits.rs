//! Every bound of the system, checked against the others at compile time.
//!
//! A count or length that comes from a guest, an agent or a client is compared with one of these before it is used.

/// Smallest ftrace sub-buffer (the host's and the guest's page size on x86-64).
pub const PAGE_BYTES_MIN: usize = 4096;
/// Largest ftrace sub-buffer (`buffer_subbuf_size_kb` refuses more than 512 KiB pages' worth).
pub const PAGE_BYTES_MAX: usize = 512 << 10;

/// Ports of one vhost-user device: kick and call messages carry a ring index of 8 bits, each port has two rings,
/// and two more rings are the control queue (virtio 1.3, 5.3.2).
pub const PORTS_MAX: usize = 127;
/// Rings of one device.
pub const RINGS_MAX: usize = 2 * (PORTS_MAX + 1);
/// Descriptors of one ring; QEMU's vhost-user-base refuses more.
pub const RING_ENTRIES_MAX: u16 = 1024;
/// Descriptors of one chain, indirect tables included: a 1 MiB pipe is 256 pages; one more pipe's worth of room.
pub const CHAIN_SEGMENTS_MAX: usize = 512;
/// Bytes of one chain.
pub const CHAIN_BYTES_MAX: usize = CHAIN_SEGMENTS_MAX * (64 << 10);
/// Memory regions of one guest (vhost-user: 8 without CONFIGURE_MEM_SLOTS).
pub const MEMORY_REGIONS_MAX: usize = 64;
/// Bytes of one port name (virtio-console PORT_NAME).
pub const PORT_NAME_BYTES_MAX: usize = 64;

/// Guests of one server.
pub const GUESTS_MAX: usize = 256;
/// Devices of one guest.
pub const DEVICES_MAX: usize = 8;
/// Lanes of one device: its data ports. Port 0 never is one.
pub const DEVICE_LANES_MAX: usize = PORTS_MAX - 1;
/// Lanes of one guest.
pub const LANES_MAX: usize = DEVICES_MAX * DEVICE_LANES_MAX;
/// CPUs of a machine as a trace.dat may name them.
pub const CPUS_MAX: usize = 4096;
/// Clients of one server at a time.
pub const CLIENTS_MAX: usize = 64;
/// Clients of one user who is not root: the others find room.
pub const USER_CLIENTS_MAX: usize = 16;

/// Payload of one wire frame.
pub const FRAME_BYTES_MAX: usize = 96 << 10;
/// Bytes of text in one describe piece; leaves room for the rest of the frame.
pub const PIECE_BYTES_MAX: usize = 48 << 10;
/// Bytes of a guest's name.
pub const NAME_BYTES_MAX: usize = 64;
/// Bytes of any one text in a message (event name, filter, path, reason).
pub const TEXT_BYTES_MAX: usize = 4096;
/// Event patterns in one request.
pub const EVENTS_MAX: usize = 4096;
/// Triggers of one event request.
pub const TRIGGERS_MAX: usize = 64;
/// Function patterns of one kind in one request.
pub const FUNCTIONS_MAX: usize = 4096;
/// Trace options in one request.
pub const OPTIONS_MAX: usize = 256;
/// Processes a recording is bound to.
pub const PIDS_MAX: usize = 4096;
/// Commands of one machine in one session.
pub const COMMANDS_MAX: usize = 16;
/// Words of one command.
pub const WORDS_MAX: usize = 1024;
/// Bytes of a command's output in one message.
pub const OUTPUT_BYTES_MAX: usize = 4096;
/// Bytes of one command's output in one session; what it writes beyond is counted and thrown away.
pub const OUTPUT_TOTAL_BYTES_MAX: u64 = 1 << 20;
/// Changed settings that an agent reports of one recording.
pub const CHANGES_MAX: usize = 32;
/// Near matches named for an event that does not exist.
pub const NEAR_MAX: usize = 5;
/// Bytes of everything a machine tells about itself in one session (formats, symbols, command lines).
pub const METADATA_BYTES_MAX: usize = 128 << 20;
/// Event formats of one machine: the kernel's event ids have 16 bits.
pub const FORMATS_MAX: usize = 1 << 16;
/// Bytes of saved command lines in a file.
pub const CMDLINES_BYTES_MAX: usize = 1 << 20;
/// Frames waiting between a device and its client; beyond it the agent's ring is left alone.
pub const FRAMES_WAITING_MAX: usize = 256;
/// Bytes of one chain on the control port: Linux's write(2) makes chains of 32 KiB at most.
pub const CONTROL_CHAIN_BYTES_MAX: usize = 1 << 20;
/// Probes of one agent that wait for their echo; the oldest is forgotten.
pub const PROBES_WAITING_MAX: usize = 64;
/// Round trips of one clock measurement.
pub const CLOCK_ROUNDS_MAX: usize = 1024;

const _: () = assert!(PIECE_BYTES_MAX + TEXT_BYTES_MAX < FRAME_BYTES_MAX);
/// Bytes of one lane's ledger in a message: two varints of 32 and seven of 64 bits at their longest, two of them after
/// the byte of an `Option`.
const LEDGER_BYTES_MAX: usize = 2 * 5 + 7 * 10 + 2;

const _: () = assert!(LANES_MAX * LEDGER_BYTES_MAX + NAME_BYTES_MAX < FRAME_BYTES_MAX, "all ledgers are one message");
const _: () = assert!(RINGS_MAX <= 256);
const _: () = assert!(USER_CLIENTS_MAX < CLIENTS_MAX);
const _: () = assert!(CHAIN_SEGMENTS_MAX <= 1024, "one chain must fit one vectored write (IOV_MAX)");
const _: () = assert!(NAME_BYTES_MAX <= TEXT_BYTES_MAX);
