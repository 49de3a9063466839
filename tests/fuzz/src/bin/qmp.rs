//! Fuzz target `qmp`: see `vtrace_fuzz::qmp`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::qmp::run(bytes));
