//! See `tercet_fuzz::grammar`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tercet_fuzz::grammar(data);
});
