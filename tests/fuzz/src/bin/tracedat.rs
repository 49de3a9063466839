//! Fuzz target `tracedat`: see `vtrace_fuzz::tracedat`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::tracedat::run(bytes));
