//! Completions and man pages, checked by the shells and by man(1).

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};

fn vtrace(words: &[&str]) -> Result<String> {
    let output = Command::new(xtask::build::vtrace()?).args(words).output()?;
    ensure!(output.status.success(), "vtrace {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// What bash offers after these words.
fn offered(script: &str, words: &[&str]) -> Result<Vec<String>> {
    let last = words.len() - 1;
    let quoted = words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    let (word, before) = (words[last], words[last - 1]);
    let asked = format!(
        "{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={last}; COMPREPLY=()\n\
         _vtrace vtrace '{word}' '{before}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    );
    let output = Command::new("bash").args(["--norc", "-c", &asked]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

#[test]
fn bash_completes_verbs_options_and_values() -> Result<()> {
    let script = vtrace(&["completions", "bash"])?;
    let checked = Command::new("bash").args(["-n", "-c", &script]).output()?;
    ensure!(checked.status.success() && checked.stderr.is_empty(), "{}", String::from_utf8_lossy(&checked.stderr));
    assert_eq!(offered(&script, &["vtrace", "rec"])?, ["record"]);
    assert_eq!(offered(&script, &["vtrace", "record", "--file-v"])?, ["--file-version"]);
    assert_eq!(offered(&script, &["vtrace", "record", "--compression", ""])?, ["none", "zstd", "zlib"]);
    let verbs = offered(&script, &["vtrace", ""])?;
    assert!(!verbs.contains(&"launch".to_owned()), "what is not for people is not offered: {verbs:?}");
    Ok(())
}

#[test]
fn zsh_and_fish_get_scripts_of_their_own() -> Result<()> {
    assert!(vtrace(&["completions", "zsh"])?.starts_with("#compdef vtrace"));
    let fish = vtrace(&["completions", "fish"])?;
    assert!(fish.contains("complete -c vtrace") && fish.contains("-l keep-going"), "{fish}");
    for (shell, script) in [("zsh", vtrace(&["completions", "zsh"])?), ("fish", fish)] {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("script");
        fs::write(&path, script)?;
        match Command::new(shell).arg("-n").arg(&path).output() {
            Ok(checked) => ensure!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr)),
            Err(_) => println!("{shell} is not here: its script is not parsed"),
        }
    }
    Ok(())
}

#[test]
fn man_has_nothing_to_warn_of_and_shows_what_help_shows() -> Result<()> {
    xtask::packages::ensure(&["man-db"])?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().to_str().context("a path is text")?;
    vtrace(&["man", path])?;
    let mut pages = Vec::new();
    for entry in fs::read_dir(folder.path())? {
        let page = entry?.path();
        let shown =
            Command::new("man").args(["--warnings", "-E", "UTF-8", "-l"]).arg(&page).env("MANWIDTH", "100").output()?;
        let warned = String::from_utf8_lossy(&shown.stderr);
        ensure!(shown.status.success() && warned.is_empty(), "{}: {warned}", page.display());
        pages.push((page.file_name().context("a page has a name")?.to_owned(), String::from_utf8(shown.stdout)?));
    }
    // Lines are filled: a blank may be several, or the end of one.
    let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let page = |name: &str| pages.iter().find(|(page, _)| page == name).map(|(_, text)| plain(text));
    let record = page("vtrace-record.1").context("a page for record")?;
    for word in ["--keep-going", "--no-clobber", "--file-version", "0 recorded (also if"] {
        assert!(record.contains(word), "{word} is not in {record}");
    }
    for (name, _) in &pages {
        let text = page(name.to_str().context("a name is text")?).unwrap_or_default();
        assert!(!text.contains("EXTRA"), "{name:?}");
        assert!(name == "vtrace.1" || text.contains(" EXAMPLES vtrace "), "{name:?}: {text}");
    }
    assert!(record.contains(" EXIT STATUS 0 recorded"), "{record}");
    assert!(page("vtrace.1").is_some() && page("vtrace-launch.1").is_none());
    Ok(())
}

#[test]
fn folder_that_is_not_there_is_said() -> Result<()> {
    let output = Command::new(xtask::build::vtrace()?).args(["man", "/nowhere/at/all"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said.contains("cannot write man pages to /nowhere/at/all: No such file")
            && said.contains("create the directory")
    );
    Ok(())
}
