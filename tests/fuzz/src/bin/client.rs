//! Fuzz target `client`: see `vtrace_fuzz::client`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::client::run(bytes));
