//! What several tests need.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use foreshard::device::pjrt::{Pjrt, PluginSpec};
use foreshard::graph::{Manifest, Model};

/// Where the test set-up puts the CPU plug-in (`make plugin`), or `FORESHARD_PLUGIN`.
pub fn plugin() -> PluginSpec {
    let path = std::env::var_os("FORESHARD_PLUGIN").map(PathBuf::from);
    PluginSpec { path, sha256: None, search: vec![PathBuf::from(".foreshard/plugins")] }
}

/// The CPU plug-in: one client per test process.
pub fn cpu() -> &'static Pjrt {
    static CPU: OnceLock<Pjrt> = OnceLock::new();
    CPU.get_or_init(|| {
        let plugin = plugin().find().expect("the test set-up installs the plug-in");
        Pjrt::new(&plugin, None).expect("the plug-in starts")
    })
}

/// The model of a bundle.
pub fn load(bundle: impl AsRef<Path>) -> Model {
    Model::import(&mut |file| std::fs::read(bundle.as_ref().join(file))).expect("a bundle")
}

/// The binary, with the plug-in of the test set-up.
pub fn foreshard() -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_foreshard"));
    let plugin = plugin().find().expect("the test set-up installs the plug-in");
    command.env("FORESHARD_PLUGIN", plugin.path());
    command.env("FORESHARD_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/executables"));
    command
}

/// Python with JAX: `FORESHARD_PYTHON`, or the environment that `make venv` makes.
pub fn python() -> PathBuf {
    let made = std::env::current_dir().expect("a working directory").join(".venv/bin/python");
    std::env::var_os("FORESHARD_PYTHON").map_or(made, PathBuf::from)
}

/// Rows for `steps` batches, drawn from the data of the quick start, as one safetensors file: what both Foreshard and
/// the reference read.
pub fn write_batches(manifest: &Manifest, steps: usize, path: &Path) {
    let rows = steps * manifest.batch_size as usize;
    let mut tensors: Vec<(String, Vec<u8>)> = Vec::new();
    if manifest.batch.iter().any(|b| b.name == "tokens") {
        let text = std::fs::read("examples/data/tinyshakespeare.txt").expect("examples/data");
        let length = manifest.batch[0].shape[1] as usize;
        for (name, shift) in [("tokens", 0), ("targets", 1)] {
            let windows = (0..rows).flat_map(|r| &text[r * length + shift..][..length]);
            tensors.push((name.to_owned(), windows.flat_map(|&b| i32::from(b).to_le_bytes()).collect()));
        }
    } else {
        let csv = std::fs::read_to_string("examples/data/digits.csv").expect("examples/data");
        let lines: Vec<Vec<f32>> =
            csv.lines().skip(1).map(|l| l.split(',').map(|v| v.parse().expect("a number")).collect()).collect();
        let of = |r: usize| &lines[r % lines.len()];
        let x = (0..rows).flat_map(|r| of(r)[..64].iter().flat_map(|v| (v / 16.0).to_le_bytes()));
        let y = (0..rows).flat_map(|r| (of(r)[64] as i32).to_le_bytes());
        tensors.push(("x".to_owned(), x.collect()));
        tensors.push(("y".to_owned(), y.collect()));
    }
    let views = tensors.iter().map(|(name, data)| {
        let spec = manifest.batch.iter().find(|b| b.name == *name).expect("a batch tensor");
        let shape = [&[rows], &spec.shape[1..].iter().map(|&d| d as usize).collect::<Vec<_>>()[..]].concat();
        let dtype = spec.dtype.to_safetensors().expect("a common type");
        (name, safetensors::tensor::TensorView::new(dtype, shape, data).expect("dense rows"))
    });
    safetensors::serialize_to_file(views, None, path).expect("a temporary directory");
}

/// All tensors of a file, by name, as float32.
pub fn read_tensors(path: &Path) -> Vec<(String, Vec<f32>)> {
    let bytes = std::fs::read(path).expect("a file of tensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut params: Vec<(String, Vec<f32>)> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let values = match view.dtype() {
                safetensors::Dtype::F32 => {
                    view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
                }
                safetensors::Dtype::BF16 => {
                    view.data().chunks_exact(2).map(|b| f32::from_le_bytes([0, 0, b[0], b[1]])).collect()
                }
                other => panic!("{name} is {other:?}"),
            };
            (name, values)
        })
        .collect();
    params.sort_by(|a, b| a.0.cmp(&b.0));
    params
}
