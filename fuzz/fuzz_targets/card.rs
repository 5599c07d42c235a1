#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovchat_fuzz::targets::config(bytes));
