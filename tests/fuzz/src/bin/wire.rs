//! Fuzz target `wire`: see `vtrace_fuzz::wire`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::wire::run(bytes));
