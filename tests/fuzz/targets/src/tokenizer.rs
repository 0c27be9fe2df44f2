//! See `tercet_fuzz::tokenizer`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tercet_fuzz::tokenizer(data);
});
