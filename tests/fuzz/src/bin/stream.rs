//! Fuzz target `stream`: see `vtrace_fuzz::stream`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::stream::run(bytes));
