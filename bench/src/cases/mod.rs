//! One file for each case; a case is named after a stage of the page path.
//!
//! In:    rounds
//! Out:   rows
//! Full:  a case that fails ends the run; nothing is left out silently
//!
//! To add a case: a file with `run`, its line in [`CASES`], what it must reach in `target`, a line in the tests below.

mod ceilings;
mod clock;
mod drain;
mod finish;
mod guest;
mod hostlanes;
mod idle;
mod pump;
mod ring;
mod sink;

use anyhow::Result;

use crate::row::Row;

/// A case.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// For `--help`.
    pub(crate) about: &'static str,
    pub(crate) run: fn(u32) -> Result<Vec<Row>>,
}

/// All cases, in the order of `run all`: first the limits of this machine, then the page path from the file back to the guest.
pub(crate) const CASES: &[Case] = &[
    Case { name: "ceilings", about: "memcpy, pwrite, O_DIRECT and splice on this machine", run: ceilings::run },
    Case { name: "sink", about: "each sink against the plain write of the same bytes", run: sink::run },
    Case { name: "drain", about: "1 to 256 lanes of 1 to 8 guests, without a VMM", run: drain::run },
    Case { name: "ring", about: "the whole backend with a vhost-user frontend in this process", run: ring::run },
    Case {
        name: "pump",
        about: "the agent's pump on this machine's tracefs against splice(2) of 64 KiB",
        run: pump::run,
    },
    Case {
        name: "guest",
        about: "a booted guest: vhost-user against virtserialport over FIFO and socket",
        run: guest::run,
    },
    Case {
        name: "clock",
        about: "reading a guest's clock, converting guest times to host times one by one and in pages",
        run: clock::run,
    },
    Case { name: "hostlanes", about: "vtrace record against trace-cmd record, on this host", run: hostlanes::run },
    Case { name: "finish", about: "from stop to a usable file, against trace-cmd's copy at its end", run: finish::run },
    Case { name: "idle", about: "wake-ups with 64 idle lanes", run: idle::run },
];

/// Emitted once a round: ours beside the plain way, throughput and CPU.
fn pair(case: &str, what: &str, round: u32, [ours, plain]: [crate::measure::Cost; 2], plain_name: &str) -> [Row; 2] {
    let throughput = [ours.gb_per_s, plain.gb_per_s];
    let cpu = [ours.cpu_s_per_gib, plain.cpu_s_per_gib];
    [
        Row::new(case, format!("throughput, {what}"), round, "GB/s", throughput).beside(plain_name),
        Row::new(case, format!("cpu, {what}"), round, "s/GiB", cpu).beside(plain_name),
    ]
}

/// Two measurements in an order that changes with the round, so that neither always comes first.
fn alternately<T>(round: u32, ours: impl FnOnce() -> Result<T>, plain: impl FnOnce() -> Result<T>) -> Result<[T; 2]> {
    if round.is_multiple_of(2) {
        let ours = ours()?;
        return Ok([ours, plain()?]);
    }
    let plain = plain()?;
    Ok([ours()?, plain])
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Mutex, PoisonError},
        time::Duration,
    };

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Rows are of the case, each metric once, with figures that something was measured for.
    fn sane(case: &str, rows: &[Row], metrics: usize) {
        assert_eq!(rows.len(), metrics, "{rows:#?}");
        for (index, row) in rows.iter().enumerate() {
            assert_eq!((row.case.as_str(), row.round), (case, 0));
            assert!(row.value.is_finite() && row.value >= 0.0 && row.baseline.is_finite(), "{row:?}");
            assert!(row.unit == "1/s" || row.unit.starts_with("s/") || row.value > 0.0, "{row:?}");
            assert!(!row.baseline_name.is_empty() && !row.uname.is_empty() && !row.cpu.is_empty(), "{row:?}");
            assert!(rows[..index].iter().all(|other| other.metric != row.metric), "{} twice", row.metric);
            let text = serde_json::to_string(row).unwrap();
            assert_eq!(serde_json::from_str::<Row>(&text).unwrap().metric, row.metric);
        }
    }

    #[test]
    fn ceilings_of_a_few_megabytes_have_figures() {
        sane("ceilings", &ceilings::measure(1, 16 * MIB).unwrap(), 6);
    }

    #[test]
    fn sinks_of_a_few_megabytes_have_figures() {
        sane("sink", &sink::measure(1, 16 * MIB).unwrap(), 2 * sink::WAYS.len());
    }

    #[test]
    fn lanes_of_two_guests_have_figures_and_lose_nothing() {
        let shapes = [drain::Shape { guests: 1, lanes: 1 }, drain::Shape { guests: 2, lanes: 3 }];
        sane("drain", &drain::measure(1, 16 * MIB, &shapes).unwrap(), 5);
    }

    #[test]
    fn backend_with_a_frontend_has_figures_and_loses_nothing() {
        sane("ring", &ring::measure(1, 16 * MIB).unwrap(), 2 * ring::WAYS.len());
    }

    #[test]
    fn pump_of_a_few_megabytes_has_figures() {
        if !nix::unistd::geteuid().is_root() {
            return println!("skipped: tracefs is not writable here");
        }
        sane("pump", &pump::measure(1, 4 * MIB).unwrap(), 3);
    }

    /// Programs that come and go change kallsyms, and stock trace-cmd fails where that happens while it reads them.
    static KALLSYMS: Mutex<()> = Mutex::new(());

    #[test]
    fn clock_of_some_conversions_and_pages_has_figures() {
        let _still = KALLSYMS.lock().unwrap_or_else(PoisonError::into_inner);
        sane("clock", &clock::measure(1, 10_000, 4 * MIB).unwrap(), 2);
        if !std::path::Path::new("/dev/kvm").exists() {
            return println!("skipped: no /dev/kvm");
        }
        sane("clock", &clock::hits(0, 10_000).unwrap(), 2);
        let little = clock::load::Amount { slices: 1, exits: 10_000, ticks: 2 };
        sane("clock", &clock::load::measure(0, little).unwrap(), 6);
    }

    #[test]
    fn end_of_a_few_megabytes_has_figures() {
        let _still = KALLSYMS.lock().unwrap_or_else(PoisonError::into_inner);
        sane("finish", &finish::measure(1, MIB).unwrap(), 2);
    }

    #[test]
    fn idle_lanes_are_counted_for_a_moment() {
        if !nix::unistd::geteuid().is_root() {
            return println!("skipped: tracefs is not writable here");
        }
        sane("idle", &idle::measure(1, 4, Duration::from_millis(100)).unwrap(), 2);
    }

    #[test]
    fn order_of_a_pair_changes_with_the_round() {
        let order = std::cell::RefCell::new(Vec::new());
        for round in 0..2 {
            let note = |what| {
                order.borrow_mut().push(what);
                Ok(what)
            };
            assert_eq!(alternately(round, || note("ours"), || note("plain")).unwrap(), ["ours", "plain"]);
        }
        assert_eq!(*order.borrow(), ["ours", "plain", "plain", "ours"]);
    }
}
