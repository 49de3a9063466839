//! Fuzz target `ring`: see `vtrace_fuzz::ring`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::ring::run(bytes));
