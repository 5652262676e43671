//! Random keys of microbatches: the part of JAX's counter-based generator that must not depend on the plan.

/// A key of JAX's default generator.
pub type Key = [u32; 2];

/// `jax.random.PRNGKey(seed)` for 32-bit seeds.
pub fn from_seed(seed: u32) -> Key {
    [0, seed]
}

/// `jax.random.fold_in(key, data)`.
pub fn fold_in(key: Key, data: u32) -> Key {
    threefry2x32(key, [0, data])
}

/// Key of microbatch `m` (counted over all replicas) of step `step`.
pub fn of_microbatch(seed: u32, step: u64, m: u32) -> Key {
    fold_in(fold_in(from_seed(seed), step as u32), m)
}

/// Threefry-2x32, 20 rounds.
///
/// # Source
/// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
fn threefry2x32(key: Key, counter: [u32; 2]) -> [u32; 2] {
    const ROTATIONS: [[u32; 4]; 2] = [[13, 15, 26, 6], [17, 29, 16, 24]];
    let keys = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD1_1BDA];
    let mut x = [counter[0].wrapping_add(keys[0]), counter[1].wrapping_add(keys[1])];
    for group in 0..5u32 {
        for r in ROTATIONS[group as usize % 2] {
            x[0] = x[0].wrapping_add(x[1]);
            x[1] = x[1].rotate_left(r) ^ x[0];
        }
        let g = group as usize + 1;
        x[0] = x[0].wrapping_add(keys[g % 3]);
        x[1] = x[1].wrapping_add(keys[(g + 1) % 3]).wrapping_add(group + 1);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123's test suite (`kat_vectors`, threefry2x32 with 20 rounds).
    #[test]
    fn agrees_with_the_published_vectors() {
        assert_eq!(threefry2x32([0, 0], [0, 0]), [0x6b20_0159, 0x99ba_4efe]);
        assert_eq!(threefry2x32([!0, !0], [!0, !0]), [0x1cb9_96fc, 0xbb00_2be7]);
        assert_eq!(threefry2x32([0x1319_8a2e, 0x0370_7344], [0x243f_6a88, 0x85a3_08d3]), [0xc492_3a9c, 0x483d_f7a0]);
    }

    /// `jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(seed), step), m)`, printed by jax 0.10.2.
    #[test]
    fn agrees_with_jax() {
        assert_eq!(of_microbatch(0, 0, 0), [4165894930, 804218099]);
        assert_eq!(of_microbatch(42, 7, 3), [1418444265, 3390618313]);
        assert_eq!(of_microbatch(4294967295, 1000, 1), [1680129602, 401494972]);
    }
}
