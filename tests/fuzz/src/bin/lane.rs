//! Fuzz target `lane`: see `vtrace_fuzz::lane`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::lane::run(bytes));
