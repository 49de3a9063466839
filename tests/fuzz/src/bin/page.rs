//! Fuzz target `page`: see `vtrace_fuzz::page`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::page::run(bytes));
