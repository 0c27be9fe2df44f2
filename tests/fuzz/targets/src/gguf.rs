//! See `tercet_fuzz::gguf`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tercet_fuzz::gguf(data);
});
