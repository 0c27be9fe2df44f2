//! See `tercet_fuzz::request`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tercet_fuzz::request(data);
});
