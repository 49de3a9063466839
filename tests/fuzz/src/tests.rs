//! The targets without a fuzzer: seeds, regressions and random bytes.

use std::{fs, path::Path};

use proptest::prelude::*;

use super::{TARGETS, Target};

#[test]
fn every_target_has_seeds_and_keeps_its_promises_on_them() {
    for target in TARGETS {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{} has no seeds", target.name);
        seeds.iter().for_each(|seed| (target.run)(seed));
    }
}

#[test]
fn inputs_that_once_broke_a_target_do_so_no_more() {
    let regressions = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    for target in TARGETS {
        for entry in fs::read_dir(regressions.join(target.name)).into_iter().flatten() {
            (target.run)(&fs::read(entry.unwrap().path()).unwrap());
        }
    }
}

#[test]
fn every_target_has_a_bin_of_its_name() {
    for target in TARGETS {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/bin/{}.rs", target.name));
        assert!(path.exists(), "{} is missing", path.display());
    }
}

/// Targets of which each input takes a moment: a whole server has to get over it.
const SLOW: [&str; 1] = ["vhost_user"];

fn quick() -> impl Iterator<Item = &'static Target> {
    TARGETS.iter().filter(|target| !SLOW.contains(&target.name))
}

fn slow() -> impl Iterator<Item = &'static Target> {
    TARGETS.iter().filter(|target| SLOW.contains(&target.name))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn seed_with_a_changed_byte_keeps_the_promises_of_slow_targets(
        pick: prop::sample::Index,
        at: prop::sample::Index,
        byte: u8,
    ) {
        for target in slow() {
            let mut seed = pick.get(&(target.seeds)()).clone();
            let at = at.index(seed.len());
            seed[at] = byte;
            (target.run)(&seed);
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_keep_every_promise(bytes: Vec<u8>) {
        quick().for_each(|target| (target.run)(&bytes));
    }

    #[test]
    fn seed_with_a_changed_byte_keeps_every_promise(pick: prop::sample::Index, at: prop::sample::Index, byte: u8) {
        for target in quick() {
            let mut seed = pick.get(&(target.seeds)()).clone();
            if !seed.is_empty() {
                let at = at.index(seed.len());
                seed[at] = byte;
            }
            (target.run)(&seed);
        }
    }
}
