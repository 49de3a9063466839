//! An empty Debian root with a few packages: a machine on which nothing else happens to be installed.
//!
//! In: package names, this machine's own apt sources and release. Out: a root in the cache, and commands that run in a
//! throw-away copy of it. Runs: mmdebstrap once per list of packages, then unshare, mount, chroot. Full: disk errors go
//! up. Trust: as [`super`].

use super::{mirror, remove, run};
use crate::cache;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Set in a bare root: packages that are missing there are not installed.
pub const MARK: &str = "VTRACE_BARE_ROOT";
/// How long one process waits while another makes the root.
const PATIENCE: Duration = Duration::from_secs(900);
/// Mounts a copy of `$1` (writes go to `$2`, a tmpfs) with the folders up to `--`, and runs the rest in it.
const ENTER: &str = "\
    root=$1; room=$2; shift 2
    mount -t tmpfs none \"$room\"
    mkdir \"$room/upper\" \"$room/work\" \"$room/root\"
    mount -t overlay -o \"lowerdir=$root,upperdir=$room/upper,workdir=$room/work\" overlay \"$room/root\"
    while [ \"$1\" != -- ]; do
        mkdir -p \"$room/root$1\"
        mount --rbind \"$1\" \"$room/root$1\"
        shift
    done
    shift
    dir=$1; shift
    exec chroot \"$room/root\" sh -c 'cd \"$0\" && exec \"$@\"' \"$dir\" \"$@\"";

/// A root with nothing but minbase and its packages.
#[derive(Debug)]
pub struct BareRoot {
    dir: PathBuf,
}

impl BareRoot {
    /// Finds the root in the cache, or makes it.
    ///
    /// # Errors
    /// When this machine's release or mirror is unknown, or a package cannot be installed.
    pub fn with(name: &str, packages: &[&str]) -> Result<Self> {
        crate::packages::ensure(&["mmdebstrap"])?;
        let release = release(&fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?)?;
        let sources = mirror::of_this_machine()?.sources("deb", &[&release]);
        let dir = cache::dir("roots")?.join(name);
        let _turn = cache::lock(&cache::dir("roots")?.join(".lock"), "another Debian root", PATIENCE)?;
        let settings = acquire_settings()?;
        let stamp = format!("{release} {}\n{settings}", packages.join(" "));
        if fs::read_to_string(dir.join("stamp")).ok().as_deref() != Some(&stamp) {
            eprintln!("making an empty Debian {release} with {} packages", packages.len());
            make(&dir, &release, &sources, packages)?;
            fs::write(dir.join("root/etc/apt/apt.conf.d/90machine"), settings)?;
            fs::write(dir.join("stamp"), stamp)?;
        }
        Ok(Self { dir })
    }

    /// Where it lies.
    pub fn path(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// A program, run as root in `dir` in a copy of this root that is gone with it. It sees the kernel's file systems
    /// and these folders of this machine; `room` is an empty folder that lives as long as the command.
    pub fn command(&self, room: &Path, folders: &[&Path], dir: &Path, program: &str) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-ec", ENTER, "sh"]);
        command.arg(self.path()).arg(room).args(["/proc", "/sys", "/dev"]).args(folders);
        command.arg("--").arg(dir).arg(program).env(MARK, "1");
        command
    }
}

/// How this machine's apt reaches its mirrors: proxies, limits, checks. apt in the root needs the same.
fn acquire_settings() -> Result<String> {
    let all = run(Command::new("apt-config").arg("dump"))?;
    let is_wanted = |line: &&str| {
        let name = line.strip_prefix("Acquire::").unwrap_or_default();
        ["Check-", "Force", "http", "socks"].iter().any(|start| name.starts_with(start))
    };
    Ok(all.lines().filter(is_wanted).map(|line| format!("{line}\n")).collect())
}

fn make(dir: &Path, release: &str, sources: &str, packages: &[&str]) -> Result<()> {
    let fresh = dir.with_extension("new");
    remove(&fresh)?;
    fs::create_dir_all(&fresh)?;
    let list = fresh.join("debian.sources");
    fs::write(&list, sources)?;
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--quiet", "--variant=minbase", "--format=directory"]);
    if !packages.is_empty() {
        mmdebstrap.arg(format!("--include={}", packages.join(",")));
    }
    mmdebstrap.arg(release).arg(fresh.join("root")).arg(&list);
    run(&mut mmdebstrap)?;
    remove(dir)?;
    fs::rename(&fresh, dir)?;
    Ok(())
}

/// `VERSION_CODENAME` of os-release(5), for Debian.
fn release(text: &str) -> Result<String> {
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.map(|value| value.trim_matches('"').to_owned())
    };
    ensure!(field("ID").as_deref() == Some("debian"), "this machine is not Debian");
    field("VERSION_CODENAME").context("os-release names no release")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_is_read_on_debian_only() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 12\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(release(debian).unwrap(), "bookworm");
        assert!(release(&debian.replace("ID=debian", "ID=fedora")).is_err());
        assert!(release("ID=debian\n").is_err());
    }
}
