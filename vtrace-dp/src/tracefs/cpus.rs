//! The CPUs of this machine, as sysfs lists them.

use std::fs;

use vtrace_common::ids::Cpu;

/// CPUs that are online as sysfs lists them; `None` where it does not say.
pub fn online_cpus() -> Option<Vec<Cpu>> {
    parse_cpus(&fs::read_to_string("/sys/devices/system/cpu/online").ok()?)
}

/// CPUs that may ever be online as sysfs lists them; `None` where it does not say.
pub fn possible_cpus() -> Option<Vec<Cpu>> {
    parse_cpus(&fs::read_to_string("/sys/devices/system/cpu/possible").ok()?)
}

/// Parses a list of CPUs such as `0-3,8`; `None` where it is not one.
pub fn parse_cpus(text: &str) -> Option<Vec<Cpu>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || usize::try_from(last).ok()? >= vtrace_common::limits::CPUS_MAX {
            return None;
        }
        cpus.extend((first..=last).map(Cpu));
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_of_cpus_are_understood_or_refused() {
        assert_eq!(parse_cpus("0-2,5\n"), Some(vec![Cpu(0), Cpu(1), Cpu(2), Cpu(5)]));
        for odd in ["", "2-1", "0-4294967295", "a", "1,,2"] {
            assert_eq!(parse_cpus(odd), None, "{odd}");
        }
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(text: String) {
            let _ = parse_cpus(&text);
        }

        #[test]
        fn list_of_single_cpus_comes_back(mut cpus in proptest::collection::vec(0u32..4096, 1..20)) {
            cpus.sort_unstable();
            let text = cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            prop_assert_eq!(parse_cpus(&text), Some(cpus.into_iter().map(Cpu).collect()));
        }
    }
}
