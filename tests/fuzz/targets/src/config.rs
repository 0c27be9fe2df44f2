//! See `tercet_fuzz::config`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tercet_fuzz::config(data);
});
