#![no_main]

use foreshard_fuzz::{checks, mutate};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate::run(data, size, max_size, seed, mutate::json)
});

fuzz_target!(|text: &[u8]| checks::problem(text));
