//! Fuzz target `btf`: see `vtrace_fuzz::btf`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::btf::run(bytes));
