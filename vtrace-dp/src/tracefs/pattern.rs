//! Event patterns.
//!
//! In:    `system`, `system:event`, `event`, `all`; globs (`*`, `?`, `[a-z]`, `[!a]`) in either part
//! Out:   whether an event matches
//! Trust: nothing: any text is a pattern, and matching takes time in the product of both lengths at most

/// A pattern, in its parts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pattern<'a> {
    /// `all`
    All,
    /// One name: a whole system, or events of that name in any system.
    Either(&'a str),
    /// `system:event`; an empty part means all.
    Both { system: &'a str, event: &'a str },
}

impl<'a> Pattern<'a> {
    pub(super) fn parse(text: &'a str) -> Self {
        let or_all = |part: &'a str| if part.is_empty() { "*" } else { part };
        match text.trim().split_once(':') {
            Some((system, event)) => Self::Both { system: or_all(system), event: or_all(event) },
            None if text.trim() == "all" => Self::All,
            None => Self::Either(text.trim()),
        }
    }

    pub(super) fn matches(&self, system: &str, event: &str) -> bool {
        match self {
            Self::All => true,
            Self::Either(word) => glob_matches(word, system) || glob_matches(word, event),
            Self::Both { system: wanted, event: name } => glob_matches(wanted, system) && glob_matches(name, event),
        }
    }

    /// Whether it names one event, which then has to be there.
    pub(super) fn is_exact(&self) -> bool {
        let is_plain = |part: &str| !part.contains(['*', '?', '[']);
        matches!(self, Self::Both { system, event } if is_plain(system) && is_plain(event))
    }
}

/// Whether `glob` matches all of `text`. Backtracks to the last `*` only, which is enough and never exponential.
fn glob_matches(glob: &str, text: &str) -> bool {
    let (glob, text) = (glob.as_bytes(), text.as_bytes());
    let (mut at, mut done) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while done < text.len() {
        if glob.get(at) == Some(&b'*') {
            star = Some((at, done));
            at += 1;
        } else if let Some(width) = one_matches(&glob[at..], text[done]) {
            at += width;
            done += 1;
        } else if let Some((star_at, star_done)) = star {
            star = Some((star_at, star_done + 1));
            (at, done) = (star_at + 1, star_done + 1);
        } else {
            return false;
        }
    }
    glob[at..].iter().all(|byte| *byte == b'*')
}

/// The length of the first element of `glob`, if it matches `byte`.
fn one_matches(glob: &[u8], byte: u8) -> Option<usize> {
    match glob.first()? {
        b'?' => Some(1),
        b'[' => match set_matches(&glob[1..], byte) {
            Some((is_in, width)) => is_in.then_some(1 + width),
            None => (byte == b'[').then_some(1),
        },
        plain => (*plain == byte).then_some(1),
    }
}

/// Whether `byte` is in the set that follows a `[`, and the set's length with its `]`. A `]` that comes first is a member.
fn set_matches(set: &[u8], byte: u8) -> Option<(bool, usize)> {
    let negated = matches!(set.first(), Some(b'!' | b'^'));
    let start = usize::from(negated);
    let end = start + 1 + set.get(start + 1..)?.iter().position(|byte| *byte == b']')?;
    let mut at = start;
    let mut is_in = false;
    while at < end {
        let is_range = at + 2 < end && set[at + 1] == b'-';
        let last = if is_range { set[at + 2] } else { set[at] };
        is_in |= (set[at]..=last).contains(&byte);
        at += if is_range { 3 } else { 1 };
    }
    Some((is_in != negated, end + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The semantics of `*` and `?`, without regard to cost.
    fn oracle(glob: &[u8], text: &[u8]) -> bool {
        match (glob.split_first(), text.split_first()) {
            (None, None) => true,
            (Some((b'*', rest)), _) => oracle(rest, text) || (!text.is_empty() && oracle(glob, &text[1..])),
            (Some((b'?', rest)), Some((_, more))) => oracle(rest, more),
            (Some((plain, rest)), Some((byte, more))) => plain == byte && oracle(rest, more),
            _ => false,
        }
    }

    #[test]
    fn each_form_matches_as_in_trace_cmd() {
        for (pattern, system, event, wanted) in [
            ("sched", "sched", "sched_switch", true),
            ("sched", "sched_ext", "dump", false),
            ("sched:sched_switch", "sched", "sched_switch", true),
            ("sched:sched_switch", "sched", "sched_waking", false),
            ("sched_switch", "sched", "sched_switch", true),
            ("sched_w*", "sched", "sched_waking", true),
            ("*:*_entry", "irq", "softirq_entry", true),
            ("irq:", "irq", "softirq_entry", true),
            ("kvm*:kvm_e[nx]*", "kvm", "kvm_entry", true),
            ("kvm*:kvm_e[!n]*", "kvm", "kvm_entry", false),
            ("all", "irq", "softirq_entry", true),
            ("", "irq", "softirq_entry", false),
        ] {
            assert_eq!(Pattern::parse(pattern).matches(system, event), wanted, "{pattern} on {system}:{event}");
        }
    }

    #[test]
    fn only_a_pattern_without_globs_and_with_both_parts_is_exact() {
        assert!(Pattern::parse("sched:sched_switch").is_exact());
        for pattern in ["sched", "sched:", "sched:*", "sche?:x", "all", "s[c]:x"] {
            assert!(!Pattern::parse(pattern).is_exact(), "{pattern}");
        }
    }

    #[test]
    fn sets_follow_glob_7() {
        for (glob, text, wanted) in [
            ("[a-c]x", "bx", true),
            ("[a-c]x", "dx", false),
            ("[]a]x", "]x", true),
            ("[^a]", "b", true),
            ("[a-]", "-", true),
            ("[a", "[a", true),
            ("[", "[", true),
        ] {
            assert_eq!(glob_matches(glob, text), wanted, "{glob} on {text}");
        }
    }

    #[test]
    fn many_stars_do_not_take_long() {
        let glob = "*a".repeat(1000) + "b";
        assert!(!glob_matches(&glob, &"a".repeat(4000)));
    }

    proptest! {
        #[test]
        fn star_and_question_mark_match_as_the_oracle(glob in "[ab*?]{0,8}", text in "[ab]{0,10}") {
            prop_assert_eq!(glob_matches(&glob, &text), oracle(glob.as_bytes(), text.as_bytes()));
        }

        #[test]
        fn any_pattern_gives_an_answer(pattern: String, system: String, event: String) {
            let _ = Pattern::parse(&pattern).matches(&system, &event);
            prop_assert!(Pattern::All.matches(&system, &event));
        }

        #[test]
        fn plain_name_matches_itself_alone(name in "[a-z_0-9]{1,20}", other in "[a-z_0-9]{1,20}") {
            prop_assert_eq!(glob_matches(&name, &other), name == other);
        }
    }
}
