//! `cargo xtask TASK`: everything that is not `cargo build`.

#![expect(clippy::print_stdout, reason = "tasks talk to the person at the terminal")]

use clap::{Parser, Subcommand, ValueEnum};
use xtask::kernel::Kernel;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Everything that is not `cargo build`")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot a guest, run commands in it
    Boot(xtask::boot::Arguments),
    /// Boot a guest and record it together with this host
    Demo,
    /// Make the stripped static vtrace and the Debian packages
    Dist,
    /// Build the eBPF object from its source
    Ebpf {
        /// Only prove that the committed object is what its source gives
        #[arg(long)]
        check: bool,
    },
    /// Fuzz what reads bytes of others
    Fuzz(xtask::fuzz::Arguments),
    /// Fetch QEMU and kernels, build the static vtrace, make the guest images
    Image,
    /// Run tests that take long by nature: many sessions, many kills
    Soak(xtask::soak::Arguments),
    /// Run everything that CI runs: lints, tests, guests, fuzzing
    Test(xtask::test::Arguments),
    /// Check the rules that neither rustc nor clippy checks
    Tidy(xtask::tidy::Arguments),
    /// Judge the times of a guest's events: the host's file, recorded with `-e kvm`, and the guest's
    Judge {
        /// Of the host
        host: std::path::PathBuf,
        /// Of the guest
        guest: std::path::PathBuf,
        /// Its TSC was scaled: it is judged by its runs alone, and by `vtrace check`
        #[arg(long)]
        scaled: bool,
    },
    /// Run the clock's live tests on a KVM that this machine does not have
    Lab {
        /// Which
        lab: Lab,
        /// On these kernels only; `svm` has all of them if none is named, `nested` 6.12
        #[arg(long, value_delimiter = ',')]
        kernel: Vec<Kernel>,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Lab {
    /// QEMU's TCG with AMD virtualization and Debian's kvm-amd.ko
    Svm,
    /// In that, QEMU with KVM and a Linux guest whose TSC is moved: everything together
    Nested,
    /// Bochs with VMX and Debian's kvm-intel.ko: both of the above for guests whose TSC is scaled. Takes an hour or so
    Vmx,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Boot(arguments) => xtask::boot::run(&arguments),
        Task::Dist => xtask::dist::run(),
        Task::Demo => xtask::demo::run(),
        Task::Fuzz(arguments) => xtask::fuzz::run(&arguments),
        Task::Image => xtask::image::run(),
        Task::Soak(arguments) => xtask::soak::run(&arguments),
        Task::Test(arguments) => xtask::test::run(&arguments),
        Task::Tidy(arguments) => xtask::tidy::run(arguments),
        Task::Ebpf { check } => xtask::ebpf::run(check),
        Task::Judge { host, guest, scaled: true } => xtask::lab::vmx::judge_scaled(&host, &guest),
        Task::Judge { host, guest, scaled: false } => {
            let verdict = xtask::lab::judge::judge(&host, &guest)?;
            println!("{verdict}");
            verdict.ensure_right(1, None)
        }
        Task::Lab { lab: Lab::Svm, kernel } if kernel.is_empty() => xtask::lab::svm(Kernel::value_variants()),
        Task::Lab { lab: Lab::Svm, kernel } => xtask::lab::svm(&kernel),
        Task::Lab { lab: Lab::Vmx, kernel } if kernel.is_empty() => xtask::lab::vmx::run(Kernel::V6_1),
        Task::Lab { lab: Lab::Vmx, kernel } => kernel.into_iter().try_for_each(xtask::lab::vmx::run),
        Task::Lab { lab: Lab::Nested, kernel } if kernel.is_empty() => xtask::lab::nested::run(Kernel::V6_12),
        Task::Lab { lab: Lab::Nested, kernel } => kernel.into_iter().try_for_each(xtask::lab::nested::run),
    }
}
