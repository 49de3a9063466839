//! Fuzz target `console`: see `vtrace_fuzz::console`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::console::run(bytes));
