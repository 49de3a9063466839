//! The binary `vtrace`: parse, run, say what went wrong, exit.

use std::process::ExitCode;

fn main() -> ExitCode {
    vtrace_dp::cli::main()
}
