//! Writes first inputs for every fuzz target: what the exporter and the runtime write themselves.
//!
//!     cargo run --example seeds -- CORPUS

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use foreshard_fuzz::graph::Model;
use foreshard_fuzz::plan::solve::even_topology;
use foreshard_fuzz::plan::{Problem, ScheduleKind, solve};
use foreshard_fuzz::topology::{LOOPBACK, nominal};
use foreshard_fuzz::wire::control::{FailureClass, Launch, Peer, ReadyReport, Span, StepDone, ToParent, ToWorker};
use foreshard_fuzz::wire::frame::{Header, Kind, write_message};

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
    for message in messages(&root)? {
        let header = Header {
            kind: Kind::Control,
            step: 1,
            revision: 2,
            incarnation: 0,
            microbatch: 0,
            channel: 0,
            total: 0,
            offset: 0,
            chunk: 0,
            checksum: 0,
        };
        let mut frame = Vec::new();
        write_message(&mut frame, header, &message)?;
        seed("wire", &frame)?;
    }
    println!("{n} seeds in {}", corpus.display());
    Ok(())
}

/// One of every control message.
fn messages(root: &Path) -> Result<Vec<Vec<u8>>, Box<dyn Error>> {
    let bundle = root.join("bundles/mlp_digits.bundle");
    let model = Model::import(&mut |file| fs::read(bundle.join(file)))?;
    let topology = even_topology(2, &nominal("cpu").ok_or("CPUs are known")?, LOOPBACK);
    let (microbatch, schedule) = (None, ScheduleKind::OneFOneB);
    let problem = Problem { model: &model, topology: &topology, n_shards: 2, n_replicas: 1, microbatch, schedule };
    let launch = Launch {
        bundle: "bundles/mlp_digits.bundle".into(),
        plan: solve(&problem, None)?,
        seed: 1,
        incarnation: 0,
        weights: None,
        traced_steps: 2,
        peers: vec!["127.0.0.1:4000".parse()?],
    };
    let span =
        Span { kind: "compute".to_owned(), name: "s".to_owned(), microbatch: Some(0), start_us: 1, duration_us: 2 };
    let done = StepDone { step: 1, scalars: vec![(0, 1.5)], spans: vec![span], ..StepDone::default() };
    let token = "t".repeat(64);
    let said = [
        ToParent::Hello { rank: 1, token: token.clone(), pid: 7, listen: "127.0.0.1:4000".parse()? },
        ToParent::Progress { compiled: 1, of: 2 },
        ToParent::Ready(ReadyReport::default()),
        ToParent::Report(done),
        ToParent::Done,
        ToParent::Failed { message: "no".to_owned(), class: FailureClass::Own },
    ];
    let orders =
        [ToWorker::Launch(Box::new(launch)), ToWorker::Step { step: 3, variant: "mb16".to_owned() }, ToWorker::Finish];
    let mut all = vec![serde_json::to_vec(&Peer { rank: 0, token })?];
    for message in &said {
        all.push(serde_json::to_vec(message)?);
    }
    for message in &orders {
        all.push(serde_json::to_vec(message)?);
    }
    Ok(all)
}
