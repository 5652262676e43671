//! Writes first inputs for every fuzz target: what the exporter and the runtime write themselves.
//!
//!     cargo run --example seeds -- CORPUS

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use foreshard_fuzz::checks::Asked;
use foreshard_fuzz::graph::Model;
use foreshard_fuzz::messages;
use foreshard_fuzz::plan::{Aim, Problem, solve};
use foreshard_fuzz::topology::parse_devices;

/// Larger modules make a run slow and show nothing new.
const LARGEST: u64 = 32 << 10;

fn main() -> Result<(), Box<dyn Error>> {
    let corpus = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: seeds CORPUS")?);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut n = 0;
    let mut seed = |target: &str, content: &[u8]| -> Result<(), Box<dyn Error>> {
        let directory = corpus.join(target);
        fs::create_dir_all(&directory)?;
        n += 1;
        Ok(fs::write(directory.join(format!("seed-{n}")), content)?)
    };
    let mut open = vec![root.join("bundles"), root.join("tests/data")];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            let mut entries = fs::read_dir(path)?.map(|e| Ok(e?.path())).collect::<Result<Vec<_>, std::io::Error>>()?;
            entries.sort();
            open.extend(entries);
            continue;
        }
        let name = path.to_string_lossy();
        if name.ends_with(".hlo.pb") && path.metadata()?.len() <= LARGEST {
            seed("import", &fs::read(&path)?)?;
        }
        if name.ends_with(".hlo.pb") && name.contains("stack.bundle") {
            seed("bundle", &fs::read(&path)?)?;
        }
        if name.ends_with("manifest.json") {
            seed("manifest", &fs::read(&path)?)?;
        }
    }
    let bundle = root.join("tests/data/stack.bundle");
    let model = Model::import(&mut |file| fs::read(bundle.join(file)))?;
    for frame in messages::frames(&model) {
        seed("wire", &frame)?;
    }
    const DEVICES: &str = "cpu:memory=4Gi:speed=0.5,cpu:flops=50G:bandwidth=10G:node=b";
    seed("problem", DEVICES.as_bytes())?;
    let topology = parse_devices(DEVICES)?;
    let (n_shards, n_replicas, microbatch, schedule) = (2, 1, None, None);
    let aim = Aim::default();
    let problem = Problem { n_replicas, microbatch, schedule, aim, ..Problem::new(&model, &topology, n_shards) };
    let previous = Some(solve(&problem, None)?);
    let asked = Asked { topology, n_shards, n_replicas, microbatch, schedule, aim, previous };
    seed("problem", &serde_json::to_vec(&asked)?)?;
    println!("{n} seeds in {}", corpus.display());
    Ok(())
}
