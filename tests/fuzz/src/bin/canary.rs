//! Fuzz target `canary`: see `vtrace_fuzz::canary`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::canary::run(bytes));
