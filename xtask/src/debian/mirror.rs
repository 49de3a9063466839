//! Which Debian mirror this machine uses, and which keys it trusts for it.
//!
//! In: `/etc/apt/sources.list`, `/etc/apt/sources.list.d/*.{sources,list}`, or `VTRACE_DEBIAN_MIRROR` and
//! `VTRACE_DEBIAN_KEYRING`. Out: a deb822 source for the suites that a set wants.
//! Runs: before apt. Full: does not apply. Trust: the machine's own apt configuration; `Trusted: yes` is not taken over.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Names under which a Debian release can stand in a source.
const RELEASES: [&str; 9] =
    ["bullseye", "bookworm", "trixie", "forky", "sid", "stable", "oldstable", "testing", "unstable"];
/// Debian's own keyring where the package debian-archive-keyring is installed: it also has the keys of later releases.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

/// One mirror of Debian's main archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mirror {
    /// As apt takes it: `http:`, `https:`, `mirror+file:` …
    address: String,
    /// A keyring's path or a key in itself, as in `Signed-By`; `None`: the keys that apt trusts for everything.
    signed_by: Option<String>,
}

impl Mirror {
    /// The deb822 text for the given suites; `kind`: `deb` or `deb-src`.
    pub(super) fn sources(&self, kind: &str, suites: &[&str]) -> String {
        let signed_by = self.signed_by.as_ref().map_or_else(String::new, |keys| format!("Signed-By: {keys}\n"));
        format!("Types: {kind}\nURIs: {}\nSuites: {}\nComponents: main\n{signed_by}", self.address, suites.join(" "))
    }
}

/// The first mirror of a Debian release in this machine's apt sources.
pub(super) fn of_this_machine() -> Result<Mirror> {
    let keyring = std::env::var("VTRACE_DEBIAN_KEYRING").ok();
    let mirror = match std::env::var("VTRACE_DEBIAN_MIRROR") {
        Ok(address) => Mirror { address, signed_by: None },
        Err(_) => find(&source_files(Path::new("/etc/apt"))?).context(
            "this machine's apt sources name no Debian mirror; \
             name one in VTRACE_DEBIAN_MIRROR (and its keys in VTRACE_DEBIAN_KEYRING)",
        )?,
    };
    let installed = || KEYRINGS.iter().find(|path| Path::new(path).exists()).map(ToString::to_string);
    Ok(Mirror { signed_by: keyring.or(mirror.signed_by).or_else(installed), ..mirror })
}

/// Name and text of every source file under apt's configuration folder, in apt's order.
fn source_files(etc: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut paths = vec![etc.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc.join("sources.list.d")) {
        let mut parts: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        parts.sort();
        paths.append(&mut parts);
    }
    let mut files = Vec::new();
    for path in paths.into_iter().filter(|path| path.exists()) {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        files.push((path, text));
    }
    Ok(files)
}

fn find(files: &[(PathBuf, String)]) -> Option<Mirror> {
    files.iter().find_map(|(path, text)| match path.extension()?.to_str()? {
        "list" => text.lines().find_map(from_line),
        "sources" => stanzas(text).find_map(|stanza| from_stanza(&stanza)),
        _ => None,
    })
}

/// A one-line source: `deb [option=value …] address suite component…`.
fn from_line(line: &str) -> Option<Mirror> {
    let rest = line.split('#').next()?.trim().strip_prefix("deb")?;
    let rest = rest.strip_prefix(char::is_whitespace)?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inside) => inside.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (address, suite) = (words.next()?, words.next()?);
    let is_main = words.any(|component| component == "main");
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    (is_main && is_release(suite) && is_remote(address))
        .then(|| Mirror { address: address.to_owned(), signed_by: signed_by.map(ToOwned::to_owned) })
}

/// One stanza of a deb822 file: field name in lower case, value with its continuation lines as they stand.
type Stanza = Vec<(String, String)>;

fn stanzas(text: &str) -> impl Iterator<Item = Stanza> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let groups: Vec<Stanza> = lines.split(|line| line.trim().is_empty()).map(fields).collect();
    groups.into_iter()
}

fn fields(lines: &[&str]) -> Stanza {
    let mut fields: Stanza = Vec::new();
    for line in lines {
        if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    fields
}

fn from_stanza(stanza: &Stanza) -> Option<Mirror> {
    let field = |name: &str| stanza.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str());
    let has = |name: &str, test: &dyn Fn(&str) -> bool| field(name).is_some_and(|v| v.split_whitespace().any(test));
    if field("enabled").is_some_and(|value| value.eq_ignore_ascii_case("no")) {
        return None;
    }
    let is_ours = has("types", &|t| t == "deb") && has("suites", &is_release) && has("components", &|c| c == "main");
    let address = field("uris")?.split_whitespace().find(|address| is_remote(address))?;
    is_ours.then(|| Mirror { address: address.to_owned(), signed_by: field("signed-by").map(ToOwned::to_owned) })
}

fn is_release(suite: &str) -> bool {
    RELEASES.contains(&suite)
}

/// A CD in the drive holds one release only.
fn is_remote(address: &str) -> bool {
    !address.starts_with("cdrom:")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found_in(name: &str, text: &str) -> Option<(String, Option<String>)> {
        find(&[(PathBuf::from(name), text.to_owned())]).map(|mirror| (mirror.address, mirror.signed_by))
    }

    #[test]
    fn deb822_source_gives_address_and_keyring() {
        let text = "# made by hand\nTypes: deb\nURIs: http://security.example/debian-security\n\
            Suites: bookworm-security\nComponents: main\n\nTypes: deb deb-src\nURIs: https://mirror.example/debian\n\
            Suites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: /keys/debian.gpg\n";
        let expected = ("https://mirror.example/debian".to_owned(), Some("/keys/debian.gpg".to_owned()));
        assert_eq!(found_in("debian.sources", text), Some(expected));
    }

    #[test]
    fn key_inside_a_source_is_taken_with_all_its_lines() {
        let text =
            "Types: deb\nURIs: http://m.example/\nSuites: trixie\nComponents: main\nSigned-By:\n -----BEGIN\n .\n mQ\n";
        let (_, key) = found_in("a.sources", text).unwrap();
        assert_eq!(key.as_deref(), Some("\n -----BEGIN\n .\n mQ"));
    }

    #[test]
    fn one_line_source_gives_address_and_keyring() {
        let text = "deb-src http://m.example/debian bookworm main\n\
            deb cdrom:[Debian 12]/ bookworm main\n\
            deb http://security.example/debian-security bookworm-security main\n\
            deb [arch=amd64 signed-by=/k.gpg] https://m.example/debian bookworm main contrib # ours\n";
        let expected = ("https://m.example/debian".to_owned(), Some("/k.gpg".to_owned()));
        assert_eq!(found_in("sources.list", text), Some(expected));
        let plain = "deb http://m.example/debian/ bookworm main";
        assert_eq!(found_in("sources.list", plain), Some(("http://m.example/debian/".to_owned(), None)));
    }

    #[test]
    fn other_vendors_and_disabled_sources_are_passed_over() {
        assert_eq!(found_in("a.list", "deb https://m.example/node nodistro main"), None);
        let disabled = "Enabled: no\nTypes: deb\nURIs: http://m.example/\nSuites: trixie\nComponents: main\n";
        assert_eq!(found_in("a.sources", disabled), None);
        assert_eq!(found_in("a.sources.disabled", "deb http://m.example/ trixie main"), None);
    }

    #[test]
    fn sources_text_names_the_wanted_suites() {
        let mirror = Mirror { address: "http://m.example/debian".to_owned(), signed_by: Some("/k.gpg".to_owned()) };
        let expected = "Types: deb\nURIs: http://m.example/debian\nSuites: trixie trixie-backports\n\
            Components: main\nSigned-By: /k.gpg\n";
        assert_eq!(mirror.sources("deb", &["trixie", "trixie-backports"]), expected);
    }
}
