//! See `tercet_fuzz::template`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tercet_fuzz::template(data);
});
