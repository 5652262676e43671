//! Shown correct: 50 steps of every sample model equal plain JAX's, for any number of shards, microbatches and
//! replicas.
//!
//! The reference is `python/reference.py`: the model's own Python, trained with `jax.grad` and optax, never the bundle.
//! It needs JAX, which the test set-up installs (`make venv`).

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use foreshard::graph::Manifest;

/// Steps compared.
const STEPS: usize = 50;

struct Case {
    model: &'static str,
    /// Largest difference of a loss, and of a param.
    ///
    /// Cutting a module changes what XLA fuses, and so the order of sums inside a fusion: one rounding of float32 is
    /// 6e-8, of bfloat16 4e-3. AdamW divides by the root of the second moment, which turns a rounding of a gradient
    /// near zero into a fraction of the learning rate; 50 steps at 1e-3 could move a param by 5e-2 in all.
    loss: f32,
    param: f32,
}

const CASES: [Case; 5] = [
    Case { model: "mlp_digits", loss: 2e-5, param: 2e-4 },
    Case { model: "convnet_digits", loss: 2e-5, param: 2e-4 },
    Case { model: "char_gpt", loss: 2e-4, param: 2e-3 },
    Case { model: "scan_gpt", loss: 2e-2, param: 3e-2 },
    Case { model: "torch_mlp", loss: 2e-5, param: 2e-4 },
];

/// (shards, replicas, microbatches per step over all replicas).
const SHAPES: [(u32, u32, u64); 8] =
    [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 1, 4), (2, 1, 4), (3, 1, 4), (1, 2, 4), (2, 2, 4)];

struct Trained {
    losses: Vec<f32>,
    params: Vec<(String, Vec<f32>)>,
}

fn equals_jax(case: &Case) {
    let scratch = tempfile::tempdir().unwrap();
    let bundle = PathBuf::from(format!("bundles/{}.bundle", case.model));
    let manifest = Manifest::parse(&std::fs::read(bundle.join("manifest.json")).unwrap()).unwrap();
    let data = scratch.path().join("batches.safetensors");
    support::write_batches(&manifest, STEPS, &data);
    for n_microbatches in [1, 4] {
        let microbatch = manifest.batch_size / n_microbatches;
        let expected = reference(case.model, &data, microbatch, scratch.path());
        assert!(expected.losses[STEPS - 1] < expected.losses[0], "the reference learns");
        for (shards, replicas, _) in SHAPES.iter().filter(|s| s.2 == n_microbatches) {
            let what = format!("{} on {shards} shards, {replicas} replicas, {n_microbatches} microbatches", case.model);
            let found = foreshard(&bundle, &data, *shards, *replicas, microbatch, scratch.path(), &what);
            let loss = largest(&expected.losses, &found.losses);
            let param = expected
                .params
                .iter()
                .zip(&found.params)
                .map(|((name, a), (other, b))| {
                    assert_eq!(name, other, "{what}");
                    largest(a, b)
                })
                .fold(0.0, f32::max);
            println!("{what}: losses differ by at most {loss:.1e}, params by {param:.1e}");
            assert!(loss <= case.loss, "{what}: losses differ by {loss:e}, allowed {:e}", case.loss);
            assert!(param <= case.param, "{what}: params differ by {param:e}, allowed {:e}", case.param);
        }
    }
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
}

fn reference(model: &str, data: &Path, microbatch: u64, scratch: &Path) -> Trained {
    let out = scratch.join(format!("reference-{microbatch}.safetensors"));
    let status = Command::new(support::python())
        .args(["reference.py", &format!("models/{model}.py")])
        .arg(data)
        .args(["--microbatch", &microbatch.to_string(), "-o"])
        .arg(&out)
        .current_dir("python")
        .env("JAX_PLATFORMS", "cpu")
        .status()
        .expect("the test set-up installs JAX: make venv");
    assert!(status.success(), "python/reference.py failed for {model}");
    let mut params = support::read_tensors(&out);
    let at = params.iter().position(|(name, _)| name == "losses").unwrap();
    let losses = params.remove(at).1;
    Trained { losses, params }
}

fn foreshard(
    bundle: &Path,
    data: &Path,
    shards: u32,
    replicas: u32,
    microbatch: u64,
    scratch: &Path,
    what: &str,
) -> Trained {
    let dir = scratch.join(format!("run-{shards}-{replicas}-{microbatch}"));
    let job = scratch.join("job.yaml");
    std::fs::write(
        &job,
        format!(
            "apiVersion: foreshard.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: test}}\nspec:\n  bundle: {}\n  data: {{uri: {}, shuffle: none}}\n  steps: {STEPS}\n  adaptation: {{mode: Off}}\n  checkpoint: {{everySteps: 0}}\n  parallelism: {{shards: {shards}, replicas: {replicas}, microbatch: {microbatch}}}\n",
            bundle.display(),
            data.display()
        ),
    )
    .unwrap();
    let out = support::foreshard().args(["local", "run", "--quiet", "--run-dir"]).arg(&dir).arg(&job).output().unwrap();
    assert!(out.status.success(), "{what}: {}", String::from_utf8_lossy(&out.stderr));
    let log = std::fs::read_to_string(dir.join("log.jsonl")).unwrap();
    let losses = log
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["loss"].as_f64().unwrap() as f32)
        .collect();
    Trained { losses, params: support::read_tensors(&dir.join("weights.safetensors")) }
}

#[test]
fn mlp_digits() {
    equals_jax(&CASES[0]);
}

#[test]
fn convnet_digits() {
    equals_jax(&CASES[1]);
}

#[test]
fn char_gpt() {
    equals_jax(&CASES[2]);
}

#[test]
fn scan_gpt() {
    equals_jax(&CASES[3]);
}

/// Its reference is the PyTorch module itself, run by torchax, with `jax.grad` and optax.
#[test]
fn torch_mlp() {
    equals_jax(&CASES[4]);
}
