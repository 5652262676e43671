//! Rows of variable length, padded to buckets, train as in plain JAX: every step runs the variant of its batch.

mod support;

use std::fs;
use std::process::Command;

use serde_json::Value;

/// Microbatches and XLA's choice of kernels change the order of sums: some units of the last place of losses below 1.
const TOLERANCE: f64 = 1e-5;
const STEPS: usize = 30;

#[test]
fn every_step_trains_the_shape_of_its_batch() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let made = Command::new(support::python())
        .arg("tests/support/buckets.py")
        .arg(at)
        .env("PYTHONPATH", "python")
        .env("JAX_PLATFORMS", "cpu")
        .status()
        .expect("the test set-up installs JAX: make venv");
    assert!(made.success());
    let expected: Vec<(u64, f64)> = serde_json::from_str(&fs::read_to_string(at.join("losses.json")).unwrap()).unwrap();
    let mut lengths: Vec<u64> = expected[..STEPS].iter().map(|e| e.0).collect();
    lengths.sort_unstable();
    lengths.dedup();
    assert_eq!(lengths, [8, 16, 32], "all buckets come up");
    for (shards, split) in [(1, ""), (2, ""), (2, "{ops: '*', parts: 2}")] {
        let run = at.join(format!("run-{shards}-{}", split.len()));
        let job = at.join("job.yaml");
        let yaml = format!(
            "apiVersion: foreshard.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: bag}}\nspec:\n  \
             bundle: {0}/bag.bundle\n  data: {{uri: {0}/rows.jsonl, shuffle: none}}\n  steps: {STEPS}\n  \
             parallelism: {{shards: {shards}}}\n  partition: {{split: [{split}]}}\n",
            at.display()
        );
        fs::write(&job, yaml).unwrap();
        let output = support::foreshard().args(["local", "run"]).arg(&job).arg("--run-dir").arg(&run).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let log = fs::read_to_string(run.join("log.jsonl")).unwrap();
        let losses: Vec<f64> =
            log.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["loss"].as_f64().unwrap()).collect();
        assert_eq!(losses.len(), STEPS);
        for (step, (found, (length, expected))) in losses.iter().zip(&expected).enumerate() {
            let off = (found - expected).abs();
            assert!(
                off < TOLERANCE,
                "{shards} shards {split}, step {step}, length {length}: {found}, JAX has {expected}"
            );
        }
    }
}
