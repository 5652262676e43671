//! Where a model is cut does not change what it learns: plans with cuts at other block borders give the same bits.
//!
//! A segment is compiled by itself, and XLA's fusions end where it does. What decides about bits is which ops share a
//! fusion; blocks meet in few values, so cutting between them takes no fusion apart. docs/decisions/0008-same-bits.md
//! says what holds beyond that and what does not.

mod support;

use std::fs;
use std::path::Path;

/// Losses as bits, and the file of trained weights.
#[derive(PartialEq)]
struct Trained {
    losses: Vec<u32>,
    weights: Vec<u8>,
}

fn train(spec: &str, cuts: &[&str], scratch: &Path) -> Trained {
    let run = scratch.join(format!("run-{}", cuts.join("-")));
    let job = scratch.join("job.yaml");
    let n_shards = cuts.len() + 1;
    let yaml = format!(
        "apiVersion: foreshard.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: bits}}\nspec:\n  {spec}\n  \
         parallelism: {{shards: {n_shards}, microbatch: 16, cuts: {cuts:?}}}\n"
    );
    fs::write(&job, yaml).unwrap();
    let output = support::foreshard().args(["local", "run", "-q", "--run-dir"]).arg(&run).arg(&job).output().unwrap();
    assert!(output.status.success(), "{cuts:?}: {}", String::from_utf8_lossy(&output.stderr));
    let log = fs::read_to_string(run.join("log.jsonl")).unwrap();
    let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap() as f32;
    let losses = log.lines().map(|l| loss(l).to_bits()).collect();
    Trained { losses, weights: fs::read(run.join("weights.safetensors")).unwrap() }
}

fn same(expected: &Trained, found: &Trained, what: &str) {
    assert_eq!(found.losses, expected.losses, "{what}: losses, as bits");
    assert!(found.weights == expected.weights, "{what}: weights");
}

#[test]
fn a_gpt_cut_between_any_two_blocks_learns_the_same_bits() {
    let scratch = tempfile::tempdir().unwrap();
    let spec = "bundle: bundles/char_gpt.bundle\n  data: {uri: examples/data/tinyshakespeare.txt}\n  steps: 4";
    let train = |cuts: &[&str]| train(spec, cuts, scratch.path());
    let expected = train(&["block2"]);
    assert_eq!(expected.losses.len(), 4);
    same(&expected, &train(&["block1", "block3"]), "cut at block1 and block3");
    // Uncut, gradients are the same; the update, which then needs no exchange, is fused otherwise.
    let uncut = train(&[]);
    let apart = |(a, b): (&u32, &u32)| (f32::from_bits(*a) - f32::from_bits(*b)).abs();
    let apart = expected.losses.iter().zip(&uncut.losses).map(apart).fold(0.0, f32::max);
    assert!(expected.losses[..2] == uncut.losses[..2] && apart < 1e-5, "uncut: losses differ by {apart:e}");
}

#[test]
fn a_perceptron_learns_the_same_bits_on_one_two_and_three_shards() {
    let scratch = tempfile::tempdir().unwrap();
    let spec = "bundle: bundles/mlp_digits.bundle\n  data: {uri: examples/data/digits.csv, columns: {x: [\"pixel*\"], \
                y: [label]}}\n  steps: 12";
    let train = |cuts: &[&str]| train(spec, cuts, scratch.path());
    let expected = train(&[]);
    for cuts in [&["layer2"][..], &["layer1", "layer2"]] {
        same(&expected, &train(cuts), &format!("cut at {cuts:?}"));
    }
}
