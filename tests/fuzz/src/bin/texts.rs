//! Fuzz target `texts`: see `vtrace_fuzz::texts`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::texts::run(bytes));
