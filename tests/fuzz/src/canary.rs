//! A lock that only a fuzzer with coverage feedback opens: the proof that the others look where they seem to look.
//!
//! `cargo xtask fuzz` runs it before all other targets and fails if it stays silent. Blind chance opens the lock once
//! in 2^64 inputs; a fuzzer that sees branches and comparisons, in seconds.

/// Panics if the input starts with the word that fits.
pub fn run(bytes: &[u8]) {
    let Some((word, rest)) = bytes.split_first_chunk::<4>() else { return };
    if u32::from_le_bytes(*word) == 0x7661_c3b9 && rest.first() == Some(&b'l') && rest.get(1..4) == Some(b"ane") {
        panic!("the canary sings");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    #[should_panic(expected = "the canary sings")]
    fn canary_sings_for_the_word_that_fits() {
        super::run(b"\xb9\xc3\x61\x76lane");
    }

    #[test]
    fn canary_is_silent_for_one_bit_less() {
        super::run(b"\xb8\xc3\x61\x76lane");
    }
}
