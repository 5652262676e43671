//! This machine as a topology: one device per worker, made of cores.

use super::LocalError;
use crate::topology::{Device, Link, Topology};
use crate::units::{Bytes, BytesPerSec, FlopsPerSec, Seconds};

/// What one core of this machine does, as nominal figures until they are measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CoreSpeed {
    pub flops: FlopsPerSec,
    pub bandwidth: BytesPerSec,
    pub overhead: Seconds,
}

impl Default for CoreSpeed {
    /// A server core of about 2020 with AVX2, through XLA.
    fn default() -> Self {
        Self { flops: FlopsPerSec(3e10), bandwidth: BytesPerSec(8e9), overhead: Seconds(2e-6) }
    }
}

/// Loopback TCP within one machine.
const LOOPBACK: Link = Link { bandwidth: BytesPerSec(2e9), latency: Seconds(50e-6) };

/// Cores of every worker: disjoint sets of `asked` cores, or of an even share when absent. Where there are more
/// workers than cores, neighbours share.
pub fn divide(cores: &[usize], n_workers: usize, asked: Option<u32>) -> Result<Vec<Vec<usize>>, LocalError> {
    let share = (cores.len() / n_workers.max(1)).max(1);
    let each = asked.map_or(share, |a| a as usize);
    if each > cores.len() {
        return Err(LocalError::TooFewCores { asked: each as u32, has: cores.len() });
    }
    let of = |worker: usize| (0..each).map(|i| cores[(worker * each + i) % cores.len()]).collect();
    Ok((0..n_workers).map(of).collect())
}

/// One device per worker. `memory`: what each may use.
pub fn topology(workers: &[Vec<usize>], core: CoreSpeed, memory: Bytes) -> Topology {
    let sharing = |c: usize| workers.iter().filter(|w| w.contains(&c)).count().max(1) as f64;
    let devices = workers.iter().map(|cores| {
        let n = cores.len() as f64;
        Device {
            name: format!("cpu {}", ranges(cores)),
            kind: "cpu".to_owned(),
            node: "local".to_owned(),
            flops: core.flops * n,
            bandwidth: core.bandwidth * n,
            overhead: core.overhead,
            memory,
            speed: cores.iter().map(|&c| 1.0 / sharing(c)).sum::<f64>() / n,
        }
    });
    Topology { devices: devices.collect(), local: LOOPBACK, remote: LOOPBACK }
}

/// `0-3,6` for cores 0, 1, 2, 3 and 6.
pub fn ranges(cores: &[usize]) -> String {
    let mut sorted = cores.to_vec();
    sorted.sort_unstable();
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for c in sorted {
        match runs.last_mut() {
            Some((_, end)) if *end + 1 == c => *end = c,
            _ => runs.push((c, c)),
        }
    }
    let text = runs.iter().map(|&(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") });
    text.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divides_cores_evenly_and_shares_when_there_are_too_few() {
        let check = |n_cores: usize, workers, asked, expected: &[&[usize]]| {
            let cores: Vec<usize> = (0..n_cores).collect();
            assert_eq!(divide(&cores, workers, asked).unwrap(), expected);
        };
        check(4, 2, None, &[&[0, 1], &[2, 3]]);
        check(4, 2, Some(1), &[&[0], &[1]]);
        check(5, 2, None, &[&[0, 1], &[2, 3]]);
        check(2, 3, None, &[&[0], &[1], &[0]]);
        check(3, 2, Some(2), &[&[0, 1], &[2, 0]]);
        let e = divide(&[0, 1], 1, Some(3)).unwrap_err().to_string();
        assert!(e.contains("3 cores") && e.contains("offers 2"), "{e}");
    }

    #[test]
    fn workers_that_share_a_core_count_as_slower() {
        let workers = divide(&[0, 1], 3, None).unwrap();
        let t = topology(&workers, CoreSpeed::default(), Bytes(1));
        let speeds: Vec<f64> = t.devices.iter().map(|d| d.speed).collect();
        assert_eq!(speeds, [0.5, 1.0, 0.5]);
        assert_eq!(t.devices[1].name, "cpu 1");
    }

    #[test]
    fn prints_cores_as_ranges() {
        assert_eq!(ranges(&[6, 0, 1, 2, 3]), "0-3,6");
        assert_eq!(ranges(&[]), "");
    }
}
