//! Where `unsafe` may be, and whether it says why.

use super::{
    Finding,
    rust::{Rust, Word},
    tree::{File, Tree},
};

/// Product code that may be unsafe.
const PLACES: [&str; 4] = ["vtrace-dp/src/sys/", "vtrace-dp/src/sys.rs", "vtrace-dp/src/virtq/memory", "vtrace-ebpf/"];
/// eBPF programs are unsafe from end to end and no member of the workspace, whose lint asks for the attribute.
const WITHOUT_REASON: &str = "vtrace-ebpf/";
/// A comment may stand this many lines of one statement above its `unsafe`.
const STATEMENT_LINES_MAX: usize = 12;

/// Unsafe code outside its places, or not opened with a reason.
pub(super) fn places(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, rust) in tree.rust() {
        let uses = uses(rust);
        let allowed = PLACES.iter().any(|place| file.path.starts_with(place));
        let strays = uses.iter().filter(|(line, _)| !allowed && !rust.is_test(*line));
        findings.extend(strays.map(|(line, _)| {
            Finding::new(
                &file.path,
                *line,
                "unsafe code (allowed in sys/, virtq/memory and vtrace-ebpf/, and in tests)",
            )
        }));
        if let (Some((line, _)), false) = (uses.first(), file.path.starts_with(WITHOUT_REASON) || is_opened(rust)) {
            let what = "unsafe code (the file must open it with expect(unsafe_code, reason = \"…\"))";
            findings.push(Finding::new(&file.path, *line, what));
        }
    }
    findings
}

/// Unsafe code that does not say why it is sound, or what its caller has to see to.
pub(super) fn comments(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, rust) in tree.rust() {
        let explained_elsewhere = |line: usize, kind| match kind {
            Kind::Function => {
                rust.functions.iter().any(|function| function.named_elsewhere && *function.lines.start() == line)
            }
            Kind::Attribute => true, // `unsafe(no_mangle)` and the like: rustc wants no more than the word
            _ => false,
        };
        let own = uses(rust).into_iter().filter(|(line, kind)| !explained_elsewhere(*line, *kind));
        let silent = own.filter(|(line, kind)| !is_explained(file, *line, kind.comment()));
        findings.extend(silent.map(|(line, kind)| {
            Finding::new(&file.path, line, format!("{} without a comment (`{}`)", kind.name(), kind.comment()))
        }));
    }
    findings
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Block,
    Impl,
    Extern,
    Attribute,
    Function,
    Trait,
}

impl Kind {
    /// The unsafe thing that begins with the second of these words; `unsafe fn` as a type does not count.
    fn of(before: &str, after: &[Word]) -> Option<Self> {
        let word = |at: usize| after.get(at).map_or("", |word| word.text.as_str());
        let after_abi = if word(1).starts_with('"') { word(2) } else { word(1) };
        match word(0) {
            "{" => Some(Self::Block),
            "impl" => Some(Self::Impl),
            "trait" => Some(Self::Trait),
            "(" if before == "[" => Some(Self::Attribute),
            "fn" if word(1) != "(" => Some(Self::Function),
            "extern" if after_abi == "{" => Some(Self::Extern),
            "extern" if after_abi == "fn" && !after.iter().take(4).any(|word| word.text == "(") => Some(Self::Function),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Block => "unsafe block",
            Self::Impl => "unsafe impl",
            Self::Extern => "unsafe extern block",
            Self::Attribute => "unsafe attribute",
            Self::Function => "unsafe fn",
            Self::Trait => "unsafe trait",
        }
    }

    fn comment(self) -> &'static str {
        match self {
            Self::Block | Self::Impl | Self::Extern | Self::Attribute => "SAFETY:",
            Self::Function | Self::Trait => "# Safety",
        }
    }
}

fn uses(rust: &Rust) -> Vec<(usize, Kind)> {
    let words = &rust.words;
    let at = (0..words.len()).filter(|&at| words[at].text == "unsafe");
    let before = |at: usize| at.checked_sub(1).map_or("", |at| words[at].text.as_str());
    at.filter_map(|at| Some((words[at].line, Kind::of(before(at), &words[at + 1..])?))).collect()
}

/// `expect(unsafe_code, reason = …)` on the file or on an item of it.
fn is_opened(rust: &Rust) -> bool {
    let opening = ["(", "unsafe_code", ",", "reason", "="];
    rust.places(1..=usize::MAX, &opening).next().is_some()
}

/// Whether the comment stands in the same line, or above the statement or item that the line belongs to.
fn is_explained(file: &File, line: usize, comment: &str) -> bool {
    let lines: Vec<&str> = file.text.lines().take(line).map(str::trim).collect();
    let Some((own, above)) = lines.split_last() else { return false };
    if own.contains(comment) {
        return true;
    }
    let above = above.iter().rev();
    let statement = above.clone().take_while(|text| continues(text)).count().min(STATEMENT_LINES_MAX);
    let comments = above.skip(statement).take_while(|text| text.starts_with("//") || text.starts_with("#["));
    comments.into_iter().any(|text| text.starts_with("//") && text.contains(comment))
}

/// Whether the statement that this line belongs to goes on in the next one.
fn continues(text: &str) -> bool {
    let ends = text.is_empty() || text.starts_with("//") || text.starts_with("#[");
    !ends && !text.ends_with([';', '{', '}'])
}

#[cfg(test)]
mod tests {
    use super::{super::found, *};

    const SYS: &str = "vtrace-dp/src/sys/mmap.rs";

    #[test]
    fn block_without_a_comment_is_found() {
        assert_eq!(
            found(comments, SYS, "fn a() {\n    unsafe { b() };\n}\n"),
            ["vtrace-dp/src/sys/mmap.rs:2: unsafe block without a comment (`SAFETY:`)"]
        );
    }

    #[test]
    fn comment_above_the_statement_or_in_the_line_is_enough() {
        let above = "fn a() {\n    // SAFETY: no other has it,\n    // as b says.\n    #[rustfmt::skip]\n    let c =\n        unsafe { b() };\n}\n";
        let inline = "fn a() {\n    b(/* SAFETY: ours */ unsafe { c() });\n}\n";
        assert!(found(comments, SYS, above).is_empty());
        assert!(found(comments, SYS, inline).is_empty());
    }

    #[test]
    fn comment_of_the_statement_before_does_not_count() {
        let text = "fn a() {\n    // SAFETY: ours\n    unsafe { b() };\n    unsafe { c() };\n}\n";
        assert_eq!(found(comments, SYS, text).len(), 1);
    }

    #[test]
    fn function_says_what_its_caller_sees_to_and_a_pointer_to_it_does_not() {
        assert_eq!(found(comments, SYS, "/// Reads.\nunsafe fn a() {}\n").len(), 1);
        assert!(found(comments, SYS, "/// Reads.\n///\n/// # Safety\n/// Mapped.\nunsafe fn a() {}\n").is_empty());
        assert!(found(comments, SYS, "type A = unsafe extern \"C\" fn(u8);\ntype B = unsafe fn(u8);\n").is_empty());
    }

    #[test]
    fn impl_says_why_and_its_methods_are_explained_by_the_trait() {
        assert_eq!(found(comments, SYS, "unsafe impl Send for A {}\n").len(), 1);
        let text = "// SAFETY: the system's.\nunsafe impl GlobalAlloc for A {\n    unsafe fn alloc(&self) {}\n}\n";
        assert!(found(comments, SYS, text).is_empty());
        assert!(found(comments, SYS, "#[unsafe(no_mangle)]\nfn a() {}\n").is_empty());
    }

    #[test]
    fn unsafe_code_has_its_places() {
        let text = "#![expect(unsafe_code, reason = \"maps\")]\nfn a() { unsafe { b() } }\n";
        assert!(found(places, SYS, text).is_empty());
        assert_eq!(found(places, "vtrace-dp/src/drain/lane.rs", text).len(), 1);
        assert!(found(places, "vtrace-dp/src/virtq/memory.rs", text).is_empty());
        assert!(found(places, "tests/src/peer.rs", text).is_empty());
    }

    #[test]
    fn unsafe_code_is_opened_with_a_reason() {
        assert_eq!(found(places, SYS, "fn a() { unsafe { b() } }\n").len(), 1);
        assert_eq!(found(places, SYS, "#![allow(unsafe_code)]\nfn a() { unsafe { b() } }\n").len(), 1);
        assert!(found(places, "vtrace-ebpf/src/main.rs", "fn a() { unsafe { b() } }\n").is_empty());
    }
}
