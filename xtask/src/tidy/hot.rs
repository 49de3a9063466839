//! Functions whose doc says `Hot.`: no allocation, lock, format, log or clock read.
//!
//! What is seen is what is written in the function itself; what it calls has to say `Hot.` too.

use super::{Finding, rust::Function, tree::Tree};

/// Words that such a function does not contain.
const BANNED: [(&[&str], &str); 24] = [
    (&["format", "!"], "format!"),
    (&["write", "!"], "write!"),
    (&["vec", "!"], "vec!"),
    (&["print", "!"], "print!"),
    (&["println", "!"], "println!"),
    (&["eprintln", "!"], "eprintln!"),
    (&["error", "!"], "error!"),
    (&["warn", "!"], "warn!"),
    (&["info", "!"], "info!"),
    (&["debug", "!"], "debug!"),
    (&["trace", "!"], "trace!"),
    (&["log", "!"], "log!"),
    (&[".", "lock", "("], "lock()"),
    (&[".", "to_string", "("], "to_string()"),
    (&[".", "to_owned", "("], "to_owned()"),
    (&[".", "to_vec", "("], "to_vec()"),
    (&[".", "collect"], "collect()"),
    (&["Box", "::", "new"], "Box::new"),
    (&["Arc", "::", "new"], "Arc::new"),
    (&["String", "::"], "String::"),
    (&["Vec", "::", "new"], "Vec::new"),
    (&["Vec", "::", "with_capacity"], "Vec::with_capacity"),
    (&["Instant", "::", "now"], "Instant::now"),
    (&["SystemTime", "::", "now"], "SystemTime::now"),
];

/// Hot functions that are not.
pub(super) fn functions(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, rust) in tree.rust() {
        for function in rust.functions.iter().filter(|function| is_hot(function)) {
            for (sequence, name) in BANNED {
                let what = format!("{name} in hot fn {} (no allocation, lock, format, log, clock)", function.name);
                let places = rust.places(function.lines.clone(), sequence);
                findings.extend(places.map(|line| Finding::new(&file.path, line, what.clone())));
            }
        }
    }
    findings
}

fn is_hot(function: &Function) -> bool {
    function.doc.split_whitespace().any(|word| word == "Hot.")
}

#[cfg(test)]
mod tests {
    use super::{super::found, *};

    #[test]
    fn hot_function_that_formats_or_reads_a_clock_is_found() {
        let text = "/// Moves a page. Hot.\nfn a() {\n    b(format!(\"\"));\n    Instant::now();\n}\n";
        assert_eq!(
            found(functions, "a.rs", text),
            [
                "a.rs:3: format! in hot fn a (no allocation, lock, format, log, clock)",
                "a.rs:4: Instant::now in hot fn a (no allocation, lock, format, log, clock)"
            ]
        );
    }

    #[test]
    fn function_that_is_not_hot_may_lock() {
        assert!(found(functions, "a.rs", "/// Hot? No.\nfn a() { b.lock(); }\n").is_empty());
        assert_eq!(found(functions, "a.rs", "/// Hot.\nfn a() { b.lock(); }\n").len(), 1);
    }
}
