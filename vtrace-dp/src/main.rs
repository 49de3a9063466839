//! The program `vtrace`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vtrace_dp::cli::main()
}
