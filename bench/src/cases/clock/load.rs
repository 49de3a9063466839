//! What the clock's eBPF program costs under load: a guest that KVM emulates, one kernel event for each instruction.
//!
//! In:    a guest of four instructions in real mode; the program attached to kvm_emulate_insn
//! Out:   CPU time of the vCPU's thread an exit, as fast as it goes; its share of a CPU at 100 000 exits/s; ns a run of the
//!        program by the kernel's statistics, under the same load. Each beside no program at all, or a program that does
//!        nothing. kvm_emulate_insn stands in for kvm_entry, which not every KVM calls: it comes once for each emulated
//!        instruction, from the same thread, with the vCPU as its first argument, and the program attached to it differs in
//!        which counter it raises, and in nothing else
//! Runs:  on this thread, which is the vCPU's; as root, with /dev/kvm
//! Full:  a program that missed one of the guest's instructions is an error
//! Trust: the kernel's CPU time of threads, and its statistics of eBPF programs

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use kvm_ioctls::VcpuExit;
use vtrace_dp::{
    bpf::cost::{Cost, count_times},
    clock::{
        btf::{Fields, find_here},
        feed::{Feed, Hook, Watched},
    },
    sys::page_guest::PageGuest,
};

use crate::{
    measure::{self, real},
    row::Row,
};

const TRACEPOINT: &str = "kvm_emulate_insn";
const EXITS_PER_S: u32 = 100_000;
/// How often a paced guest runs.
const TICKS_PER_S: u32 = 100;
/// Instructions between two exits to this program: many, and so few that all that lies between is cold again.
const FAR: u16 = 1000;
const NEAR: u16 = 10;
/// Turns before a slice begins to count.
const WARM_TURNS: u32 = 20;

/// How much is run.
#[derive(Clone, Copy)]
pub(crate) struct Amount {
    /// Slices of each listener in a round; the cheapest one counts.
    pub(crate) slices: u32,
    /// Exits of a slice as fast as it goes.
    pub(crate) exits: u32,
    /// Ticks of a paced slice.
    pub(crate) ticks: u32,
}

/// Who listens at the tracepoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Listener {
    NoProgram,
    Empty,
    Ours,
}

use Listener::{Empty, NoProgram, Ours};

/// The guest: it counts down, and leaves.
struct Guest {
    machine: PageGuest,
    /// Emulated from one `out` to the next.
    instructions: u16,
}

impl Guest {
    fn new(instructions: u16) -> Result<Self> {
        let [low, high] = (instructions - 3).to_le_bytes();
        // mov cx, instructions - 3; loop here; out 0x10, al; again
        let code = [0xb9, low, high, 0xe2, 0xfe, 0xe6, 0x10, 0xeb, 0xf7];
        let mut guest = Self { machine: PageGuest::new(0, &code)?, instructions };
        guest.turn(1)?; // which has no jump before it
        Ok(guest)
    }

    /// How many turns these exits are.
    fn turns_of(&self, exits: u32) -> u32 {
        exits / u32::from(self.instructions)
    }

    /// Runs it until its next `out`, so often.
    fn turn(&mut self, count: u32) -> Result<()> {
        for _ in 0..count {
            match self.machine.vcpu.run()? {
                VcpuExit::IoOut(0x10, _) => {}
                other => bail!("the guest left with {other:?}"),
            }
        }
        Ok(())
    }
}

/// What a slice took.
#[derive(Clone, Copy)]
struct Slice {
    exits: f64,
    cpu_s: f64,
    wall_s: f64,
}

impl Slice {
    fn cpu_ns_each(&self) -> f64 {
        self.cpu_s * 1e9 / self.exits
    }

    fn exits_per_s(&self) -> f64 {
        self.exits / self.wall_s
    }

    fn cpu_percent(&self) -> f64 {
        self.cpu_s / self.wall_s * 100.0
    }
}

/// Measures one round.
pub(in crate::cases) fn measure(round: u32, extent: Amount) -> Result<Vec<Row>> {
    let fields = find_here()?;
    let mut far = Guest::new(FAR)?;
    let fast = Slices::take(round, extent.slices, &[NoProgram, Empty, Ours], |listener| {
        let turns = far.turns_of(extent.exits);
        slice(&mut far, listening(&fields, listener)?, turns, Guest::turn)
    })?;
    let mut near = Guest::new(NEAR)?;
    let paced = Slices::take(round, extent.slices, &[NoProgram, Ours], |listener| {
        let turns = near.turns_of(EXITS_PER_S / TICKS_PER_S) * extent.ticks;
        slice(&mut near, listening(&fields, listener)?, turns, pace)
    })?;
    let ours = counted_ns(&mut far, listening(&fields, Ours)?, extent.exits)?;
    let empty = counted_ns(&mut far, listening(&fields, Empty)?, extent.exits)?;
    let row =
        |what: &str, unit, pair, beside| Row::new("clock", format!("load, {what}"), round, unit, pair).beside(beside);
    let none = "no program";
    Ok(vec![
        row("CPU an exit beside no program", "ns", fast.of([Ours, NoProgram], Slice::cpu_ns_each), none),
        row(
            "CPU an exit beside an empty program",
            "ns",
            fast.of([Ours, Empty], Slice::cpu_ns_each),
            "an empty program",
        ),
        row("exits a second", "1/s", fast.of([Ours, NoProgram], Slice::exits_per_s), none),
        row("statistics", "ns", [ours, empty], "an empty program"),
        row("share of a CPU at 100 000 exits/s", "%", paced.of([Ours, NoProgram], Slice::cpu_percent), none),
        row("exits a second, paced", "1/s", paced.of([Ours, NoProgram], Slice::exits_per_s), none),
    ])
}

/// Slices of one round, each with who listened.
struct Slices(Vec<(Listener, Slice)>);

impl Slices {
    /// Takes them in turn; who comes first changes from one to the next.
    fn take(
        round: u32,
        count: u32,
        listeners: &[Listener],
        mut slice: impl FnMut(Listener) -> Result<Slice>,
    ) -> Result<Self> {
        let mut taken = Vec::new();
        for first in (0..count).map(|index| usize::try_from(round + index)) {
            let first = first? % listeners.len();
            for &listener in listeners[first..].iter().chain(&listeners[..first]) {
                taken.push((listener, slice(listener)?));
            }
        }
        Ok(Self(taken))
    }

    /// What the cheapest slice of each listener says: other programs make slices dearer, and none cheaper.
    fn of(&self, listeners: [Listener; 2], figure: fn(&Slice) -> f64) -> [f64; 2] {
        listeners.map(|wanted| {
            let slices = self.0.iter().filter(|(listener, _)| *listener == wanted).map(|(_, slice)| slice);
            let cheapest = slices.min_by(|one, other| one.cpu_ns_each().total_cmp(&other.cpu_ns_each()));
            cheapest.map_or(f64::NAN, figure)
        })
    }
}

/// The programs, and which of them listens.
fn listening(fields: &Fields, listener: Listener) -> Result<Option<(Feed, Listener)>> {
    if listener == NoProgram {
        return Ok(None);
    }
    let mut feed = Feed::load(fields, false)?;
    feed.watch(Watched::Process(std::process::id()))?;
    match listener {
        Ours => feed.attach(Hook::Emulate)?,
        _ => feed.attach_empty(TRACEPOINT)?,
    }
    Ok(Some((feed, listener)))
}

/// Runs the guest for so many turns.
fn slice(
    guest: &mut Guest,
    mut listening: Option<(Feed, Listener)>,
    turns: u32,
    run: fn(&mut Guest, u32) -> Result<()>,
) -> Result<Slice> {
    guest.turn(WARM_TURNS)?;
    let (begun, cpu_begun) = (Instant::now(), measure::thread()?);
    run(guest, turns)?;
    let (wall, cpu) = (begun.elapsed(), measure::thread()?.saturating_sub(cpu_begun));
    let exits = |turns: u32| u64::from(turns) * u64::from(guest.instructions);
    if let Some((feed, Ours)) = &mut listening {
        let (hits, mut told) = (feed.hits()?, 0);
        while feed.next_change()?.is_some() {
            told += 1;
        }
        let ran = exits(turns + WARM_TURNS);
        ensure!(hits.emulate >= ran && hits.unread == 0 && told == 1, "{hits:?} of {ran}, {told} changes");
    }
    Ok(Slice { exits: real(exits(turns)), cpu_s: cpu.as_secs_f64(), wall_s: wall.as_secs_f64() })
}

/// Runs the guest at its pace: for each tick as many turns as make 100 000 exits a second.
fn pace(guest: &mut Guest, turns: u32) -> Result<()> {
    let each = guest.turns_of(EXITS_PER_S / TICKS_PER_S);
    let begun = Instant::now();
    for tick in 1..=turns / each {
        guest.turn(each)?;
        let due = Duration::from_secs(1) / TICKS_PER_S * tick;
        sleep(due.saturating_sub(begun.elapsed()));
    }
    Ok(())
}

/// ns a run of the program that listens, as the kernel counts them while the guest runs; that counting is in it.
fn counted_ns(guest: &mut Guest, listening: Option<(Feed, Listener)>, exits: u32) -> Result<f64> {
    let Some((feed, listener)) = listening else { bail!("no program listens") };
    let statistics = count_times()?;
    guest.turn(guest.turns_of(exits))?;
    drop(statistics);
    let Cost { runs, busy_ns } = if listener == Ours { feed.cost(Hook::Emulate)? } else { feed.cost_of_empty()? };
    ensure!(runs >= u64::from(exits) / 2, "{runs} runs of {exits}");
    Ok(real(u64::try_from(busy_ns)?) / real(runs))
}
