//! Fuzz target `vhost_user`: see `vtrace_fuzz::vhost_user`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vtrace_fuzz::vhost_user::run(bytes));
