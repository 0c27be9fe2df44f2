//! See `tercet_fuzz::safetensors`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tercet_fuzz::safetensors(data);
});
