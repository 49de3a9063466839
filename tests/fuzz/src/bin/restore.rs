//! Fuzz target `restore`: see `vtrace_fuzz::restore`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::restore::run(bytes));
