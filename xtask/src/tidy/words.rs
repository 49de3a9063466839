//! Words that this project does not use, and doc comments that say nothing.

use super::{Finding, tree::Tree};

/// Retired words and phrases, each in two parts so that they do not stand here.
const RETIRED: [(&str, &str); 10] = [
    ("ro", "ad"),
    ("ro", "ads"),
    ("se", "at"),
    ("inq", "uest"),
    ("pap", "ers"),
    ("beh", "ind"),
    ("nob", "ody"),
    ("someb", "ody"),
    ("is n", "one"),
    ("a mistake o", "f ours"),
];
/// A doc comment of one of these alone.
const EMPTY: [&str; 14] = [
    "Whose",
    "Why",
    "Which",
    "How many",
    "How much",
    "How long",
    "What",
    "Where",
    "When",
    "Who",
    "Its",
    "How",
    "How often",
    "Whom",
];

/// Lines of Rust and Markdown with a retired word, in names, texts or comments.
pub(super) fn retired(tree: &Tree) -> Vec<Finding> {
    let (phrases, words): (Vec<String>, Vec<String>) =
        RETIRED.iter().map(|(start, end)| format!(" {start}{end} ")).partition(|word| word.trim().contains(' '));
    let mut findings = Vec::new();
    for file in tree.files.iter().filter(|file| file.path.ends_with(".rs") || file.path.ends_with(".md")) {
        for (line, text) in file.lines() {
            // The account of that name is one of every Unix.
            let text = text.replace(concat!("\"nob", "ody\""), "").replace(concat!("nob", "ody:"), "");
            let (names, prose) = (separated(&text), text.replace('_', "-").to_lowercase());
            let in_prose = phrases
                .iter()
                .filter(|phrase| prose.contains(phrase.as_str()) || prose.contains(&format!("{}.", phrase.trim_end())));
            let found = words.iter().filter(|word| names.contains(*word)).chain(in_prose);
            findings.extend(found.map(|word| Finding::new(&file.path, line, format!("`{}` is retired", word.trim()))));
        }
    }
    findings
}

/// The words of a line in lower case, one blank around each; `WriteBack` and `write_back` are two words.
fn separated(text: &str) -> String {
    let mut words = String::from(" ");
    let mut was_lower = false;
    for letter in text.chars() {
        if letter.is_uppercase() && was_lower || !letter.is_alphanumeric() && !words.ends_with(' ') {
            words.push(' ');
        }
        if letter.is_alphanumeric() {
            words.extend(letter.to_lowercase());
        }
        was_lower = letter.is_lowercase();
    }
    words.push(' ');
    words
}

/// Doc comments that are one question word.
pub(super) fn empty_docs(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, _) in tree.rust() {
        for (line, text) in file.lines() {
            let Some(doc) = text.trim().strip_prefix("///").and_then(|doc| doc.trim().strip_suffix('.')) else {
                continue;
            };
            if EMPTY.contains(&doc) {
                findings.push(Finding::new(&file.path, line, format!("doc comment `{doc}.` (say what it is)")));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::{super::found, *};

    #[test]
    fn retired_word_is_found_in_names_texts_and_comments() {
        let [way, place] = [format!("{}{}", "Ro", "ad"), format!("{}{}", "beh", "ind")];
        let text = format!("struct {way};\n// stays {place}\nfn write_{place}() {{ a(\"{place}\") }}\n");
        let said: Vec<String> = [1, 2, 3]
            .into_iter()
            .zip([way.to_lowercase(), place.clone(), place])
            .map(|(line, word)| format!("a.rs:{line}: `{word}` is retired"))
            .collect();
        assert_eq!(found(retired, "a.rs", &text), said);
        assert!(found(retired, "docs/a.md", "a broad abroad seated\n").is_empty());
        assert_eq!(found(retired, "docs/a.md", &format!("There {}{}.\n", "is n", "one")).len(), 1);
        assert!(found(retired, "a.rs", "assert!(a.is_none());\n").is_empty());
        assert!(found(retired, "a.rs", concat!("// user = \"nob", "ody\"\n")).is_empty());
    }

    #[test]
    fn doc_comment_of_one_question_word_is_found() {
        let text = "struct A {\n    /// Whose.\n    b: u8,\n    /// Whose it is.\n    c: u8,\n}\n";
        assert_eq!(found(empty_docs, "a.rs", text), ["a.rs:2: doc comment `Whose.` (say what it is)"]);
    }
}
