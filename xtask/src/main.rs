//! `cargo xtask TASK`: everything that is not `cargo build`.

use clap::{Parser, Subcommand};
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
    /// Run everything that CI runs: lints, tests, guests, fuzzing
    Test(xtask::test::Arguments),
    /// Check the rules that neither rustc nor clippy checks
    Tidy,
    /// Run the clock's live tests on a KVM that this machine does not have
    Lab {
        /// Which
        lab: Lab,
        /// On these kernels only
        #[arg(long, value_delimiter = ',', default_values = ["5.10", "6.1", "6.12", "6.18", "newest"])]
        kernel: Vec<Kernel>,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Lab {
    /// QEMU's TCG with AMD virtualization and Debian's kvm-amd.ko
    Svm,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Boot(arguments) => xtask::boot::run(&arguments),
        Task::Demo => xtask::demo::run(),
        Task::Fuzz(arguments) => xtask::fuzz::run(&arguments),
        Task::Image => xtask::image::run(),
        Task::Test(arguments) => xtask::test::run(&arguments),
        Task::Tidy => xtask::tidy::run(),
        Task::Ebpf { check } => xtask::ebpf::run(check),
        Task::Lab { lab: Lab::Svm, kernel } => xtask::lab::svm(&kernel),
    }
}
