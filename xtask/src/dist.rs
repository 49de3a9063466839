//! `cargo xtask dist`: what users install. A stripped static `vtrace`, and two Debian packages with it.
//!
//! In: the static release build, vtrace-dp/dist, and what the program prints itself (man pages, completions). Out: files
//! in `target/dist`. Runs: cargo, strip, dpkg-deb.
//!
//! `vtrace` is for hosts. `vtrace-agent` is for guests: the same program as /usr/bin/vtrace-agent, so that a guest that is
//! a host itself can have both.

use crate::{build, cache, packages};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Where units and rules lie in the repository.
const SOURCES: &str = "vtrace-dp/dist";

/// What `cargo xtask dist` makes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Files {
    /// The stripped program.
    pub program: PathBuf,
    /// The package for hosts.
    pub host: PathBuf,
    /// The package for guests.
    pub guest: PathBuf,
}

/// A Debian package: its name, its files, its control data.
struct Package {
    name: &'static str,
    /// Path in [`SOURCES`], and path in the root.
    files: &'static [(&'static str, &'static str)],
    program: &'static str,
    has_manual: bool,
    summary: &'static str,
    description: &'static str,
    scripts: [(&'static str, &'static str); 3],
}

const HOST: Package = Package {
    name: "vtrace",
    files: &[
        ("vtrace-server.service", "usr/lib/systemd/system/vtrace-server.service"),
        ("vtrace-server.socket", "usr/lib/systemd/system/vtrace-server.socket"),
        ("vtrace-server@.service", "usr/lib/systemd/system/vtrace-server@.service"),
        ("vtrace.sysusers.conf", "usr/lib/sysusers.d/vtrace.conf"),
        ("vtrace.tmpfiles.conf", "usr/lib/tmpfiles.d/vtrace.conf"),
        ("server.conf", "etc/vtrace/server.conf"),
    ],
    program: "usr/bin/vtrace",
    has_manual: true,
    summary: "trace a host and its virtual machines together",
    description: "Records ftrace events of a KVM host and of its guests into trace.dat files with\n \
        one clock, which trace-cmd and KernelShark read.",
    scripts: [
        ("postinst", include_str!("dist/host.postinst.sh")),
        ("prerm", include_str!("dist/host.prerm.sh")),
        ("postrm", include_str!("dist/postrm.sh")),
    ],
};

const GUEST: Package = Package {
    name: "vtrace-agent",
    files: &[
        ("vtrace-agent.service", "usr/lib/systemd/system/vtrace-agent.service"),
        ("70-vtrace.rules", "usr/lib/udev/rules.d/70-vtrace.rules"),
    ],
    program: "usr/bin/vtrace-agent",
    has_manual: false,
    summary: "guest agent of vtrace",
    description: "Sends ftrace events of a virtual machine to its host, on request of the host's\n \
        vtrace. Starts when the host's virtio-serial port is there.",
    scripts: [
        ("postinst", include_str!("dist/guest.postinst.sh")),
        ("prerm", include_str!("dist/guest.prerm.sh")),
        ("postrm", include_str!("dist/postrm.sh")),
    ],
};

/// Makes everything, and prints sizes.
///
/// # Errors
/// When vtrace does not build, or a tool fails.
pub fn run() -> Result<()> {
    let Files { program, host, guest } = make()?;
    for path in [program, host, guest] {
        println!("{:>10} bytes  {}", fs::metadata(&path)?.len(), path.display());
    }
    Ok(())
}

/// Makes everything.
///
/// # Errors
/// When vtrace does not build, or a tool fails.
pub fn make() -> Result<Files> {
    packages::ensure(&["binutils"])?;
    let built = build::vtrace()?;
    let dir = cache::target().join("dist");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let program = dir.join("vtrace");
    call(Command::new("strip").arg("-o").arg(&program).arg(&built))?;
    let host = package(&HOST, &program, &dir)?;
    let guest = package(&GUEST, &program, &dir)?;
    Ok(Files { program, host, guest })
}

fn package(package: &Package, program: &Path, dir: &Path) -> Result<PathBuf> {
    let scratch = tempfile::tempdir_in(dir)?;
    let root = scratch.path().join("root");
    install(program, &root.join(package.program), 0o755)?;
    let sources = cache::repository().join(SOURCES);
    for (file, place) in package.files {
        let target =
            if Path::new(place).extension().is_some() { root.join(place) } else { root.join(place).join(file) };
        install(&sources.join(file), &target, 0o644)?;
    }
    let license = root.join("usr/share/doc").join(package.name).join("copyright");
    install(&cache::repository().join("LICENSE"), &license, 0o644)?;
    if package.has_manual {
        manual(program, &root)?;
    }
    control(package, &root)?;
    // dpkg refuses folders that others may write.
    call(Command::new("chmod").args(["-R", "u=rwX,go=rX"]).arg(&root))?;
    let deb = dir.join(format!("{}_{VERSION}_amd64.deb", package.name));
    call(Command::new("dpkg-deb").args(["--root-owner-group", "--build"]).arg(&root).arg(&deb))?;
    Ok(deb)
}

/// Man pages and completions, as the program prints them.
fn manual(program: &Path, root: &Path) -> Result<()> {
    let pages = root.join("usr/share/man/man1");
    fs::create_dir_all(&pages)?;
    call(Command::new(program).arg("man").arg(&pages))?;
    for page in fs::read_dir(&pages)? {
        // -n: no time of day in a package.
        call(Command::new("gzip").args(["-9", "-n"]).arg(page?.path()))?;
    }
    let places = [
        ("bash", "usr/share/bash-completion/completions/vtrace"),
        ("zsh", "usr/share/zsh/vendor-completions/_vtrace"),
        ("fish", "usr/share/fish/vendor_completions.d/vtrace.fish"),
    ];
    for (shell, place) in places {
        let script = call(Command::new(program).args(["completions", shell]))?;
        write(&root.join(place), &script, 0o644)?;
    }
    Ok(())
}

fn control(package: &Package, root: &Path) -> Result<()> {
    let mut bytes = 0;
    for file in files(root)? {
        bytes += fs::metadata(&file)?.len();
    }
    let Package { name, summary, description, .. } = package;
    let text = format!(
        "Package: {name}\nVersion: {VERSION}\nArchitecture: amd64\nMaintainer: vtrace developers\nSection: utils\n\
         Priority: optional\nInstalled-Size: {}\nRecommends: systemd\nDescription: {summary}\n {description}\n",
        bytes.div_ceil(1024)
    );
    let folder = root.join("DEBIAN");
    write(&folder.join("control"), &text, 0o644)?;
    for (script, text) in package.scripts {
        write(&folder.join(script), text, 0o755)?;
    }
    let settings: Vec<&str> =
        package.files.iter().map(|(_, place)| *place).filter(|place| place.starts_with("etc/")).collect();
    if !settings.is_empty() {
        let list: String = settings.iter().map(|place| format!("/{place}\n")).collect();
        write(&folder.join("conffiles"), &list, 0o644)?;
    }
    Ok(())
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { found.extend(files(&path)?) } else { found.push(path) }
    }
    Ok(found)
}

fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let folder = to.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    fs::create_dir_all(path.parent().context("a file lies in a folder")?)?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn call(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8(output.stdout)?;
    ensure!(!text.contains('\0'), "{name} printed no text");
    Ok(text)
}
