//! What must hold for any bytes. Shared by the fuzz targets and by `tests/fuzz.rs`, which replays what they found.

use std::sync::OnceLock;

use foreshard::cost;
use foreshard::graph::export::to_hlo;
use foreshard::graph::import::from_hlo;
use foreshard::graph::passes::{Limits, normalise};
use foreshard::graph::verify::verify;
use foreshard::graph::{Manifest, Model};
use foreshard::plan::check::check;
use foreshard::plan::solve::even_topology;
use foreshard::plan::{Aim, Plan, Problem, ScheduleKind, solve};
use foreshard::topology::{LOOPBACK, Topology, nominal, parse_devices};
use foreshard::wire::control::{MAX_HELLO, Peer, ToParent, ToWorker};
use foreshard::wire::frame::{Header, read_header, read_message, write_message};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Small enough that a loop which grows without bound is noticed soon.
const LIMITS: Limits = Limits { trips: 64, ops: 20_000 };

/// A module is refused, or survives verification, passes and writing, and can be read again.
pub fn import(module: &[u8]) {
    let Ok(graph) = from_hlo(module) else { return };
    if verify(&graph).is_err() {
        return;
    }
    let Ok(flat) = normalise(&graph, LIMITS, &[], &[]) else { return };
    let _ = cost::of_graph(&flat.graph);
    if verify(&flat.graph).is_err() {
        return;
    }
    let written = to_hlo(&flat.graph, &[]);
    let again = from_hlo(&written).expect("what was written can be read");
    assert_eq!(again.n_ops(), flat.graph.n_ops(), "what was written is what is read");
    assert_eq!(again.outputs().len(), flat.graph.outputs().len());
}

/// A bundle whose manifest vouches for a hostile module is refused, or imported and planned.
pub fn bundle(module: &[u8]) {
    const MANIFEST: &[u8] = include_bytes!("../../tests/data/stack.bundle/manifest.json");
    const INIT: &[u8] = include_bytes!("../../tests/data/stack.bundle/init.hlo.pb");
    const GRAD: &[u8] = include_bytes!("../../tests/data/stack.bundle/grad/mb2.hlo.pb");
    const UPDATE: &[u8] = include_bytes!("../../tests/data/stack.bundle/update.hlo.pb");
    for [init, grad, update] in [[module, GRAD, UPDATE], [INIT, module, UPDATE], [INIT, GRAD, module]] {
        let mut manifest = Manifest::parse(MANIFEST).expect("a good bundle");
        let sha256 = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        manifest.init.hlo.sha256 = sha256(init);
        manifest.grad[0].hlo.sha256 = sha256(grad);
        manifest.update.hlo.sha256 = sha256(update);
        let json = serde_json::to_vec(&manifest).expect("a manifest is plain data");
        let imported = Model::import(&mut |file| {
            Ok(match file {
                "manifest.json" => json.clone(),
                "init.hlo.pb" => init.to_vec(),
                "update.hlo.pb" => update.to_vec(),
                _ => grad.to_vec(),
            })
        });
        if let Ok(model) = imported {
            plan(&model);
        }
    }
}

fn plan(model: &Model) {
    let topology = even_topology(2, &nominal("cpu").expect("CPUs are known"), LOOPBACK);
    for schedule in ScheduleKind::ALL.map(Some) {
        let problem = Problem { schedule, ..Problem::new(model, &topology, 2) };
        let _ = solve(&problem, None);
    }
}

/// A problem as it may come from outside: devices from a config map or another machine, a plan from a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Asked {
    pub topology: Topology,
    pub n_shards: u32,
    pub n_replicas: u32,
    pub microbatch: Option<u64>,
    pub schedule: Option<ScheduleKind>,
    pub aim: Aim,
    /// In force.
    pub previous: Option<Plan>,
}

/// The model that problems are asked of.
pub fn stack() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    let import = || {
        Model::import(&mut |file| {
            Ok(match file {
                "manifest.json" => include_bytes!("../../tests/data/stack.bundle/manifest.json").to_vec(),
                "init.hlo.pb" => include_bytes!("../../tests/data/stack.bundle/init.hlo.pb").to_vec(),
                "update.hlo.pb" => include_bytes!("../../tests/data/stack.bundle/update.hlo.pb").to_vec(),
                _ => include_bytes!("../../tests/data/stack.bundle/grad/mb2.hlo.pb").to_vec(),
            })
        })
    };
    MODEL.get_or_init(|| import().expect("a good bundle"))
}

/// Devices and plans of any kind are refused with a reason, or there is a plan for them that fits the model.
pub fn problem(text: &[u8]) {
    let model = stack();
    const MOST_DEVICES: usize = 16;
    let devices = std::str::from_utf8(text).ok().and_then(|text| parse_devices(text).ok());
    let asked = match devices {
        Some(topology) => Asked {
            n_shards: topology.devices.len() as u32,
            topology,
            n_replicas: 1,
            microbatch: None,
            schedule: None,
            aim: Aim::default(),
            previous: None,
        },
        None => match serde_json::from_slice(text) {
            Ok(asked) => asked,
            Err(_) => return,
        },
    };
    let Asked { topology, n_shards, n_replicas, microbatch, schedule, aim, previous } = &asked;
    if topology.devices.len() > MOST_DEVICES {
        return;
    }
    let problem = Problem {
        n_replicas: *n_replicas,
        microbatch: *microbatch,
        schedule: *schedule,
        aim: *aim,
        ..Problem::new(model, topology, *n_shards)
    };
    let previous = previous.as_ref().filter(|plan| check(plan, model).is_ok());
    match solve(&problem, previous) {
        Ok(plan) => {
            check(&plan, model).expect("a plan that was made fits");
            assert!(plan.step_time.0 > 0.0 && plan.bound.0 >= 0.0, "{} and {}", plan.step_time, plan.bound);
        }
        Err(e) => assert!(!e.to_string().is_empty()),
    }
}

/// A manifest is refused, or can be written, read again and used.
pub fn manifest(json: &[u8]) {
    let Ok(manifest) = Manifest::parse(json) else { return };
    let written = serde_json::to_vec(&manifest).expect("a manifest is plain data");
    assert_eq!(Manifest::parse(&written).as_ref(), Ok(&manifest), "what was written is what is read");
    for grad in &manifest.grad {
        let tensors = manifest.microbatch_tensors(grad);
        assert!(tensors.iter().all(|t| t.array().bytes().0 <= 1 << 46), "no tensor is larger than any device");
    }
}

/// A connection yields whole messages, then one error; what it yields can be sent again.
pub fn wire(mut stream: &[u8]) {
    loop {
        let before = stream;
        match read_message(&mut stream, MAX_HELLO) {
            Ok((header, message)) => {
                assert_eq!(header.total, message.len() as u64);
                let mut written = Vec::new();
                write_message(&mut written, header, &message).expect("memory takes everything");
                let (again, same) = read_message(&mut &written[..], MAX_HELLO).expect("what was written can be read");
                assert!(Header { checksum: 0, chunk: 0, ..again } == Header { checksum: 0, chunk: 0, ..header });
                assert!(same == message);
                control(&message);
            }
            Err(_) => {
                // Frames of interleaving messages, as links between workers carry them.
                let _ = read_header(&mut &before[..]);
                return;
            }
        }
    }
}

/// A control message is refused, or is plain data.
fn control(message: &[u8]) {
    if let Ok(said) = serde_json::from_slice::<ToParent>(message) {
        serde_json::to_vec(&said).expect("control messages are plain data");
    }
    if let Ok(order) = serde_json::from_slice::<ToWorker>(message) {
        serde_json::to_vec(&order).expect("control messages are plain data");
    }
    let _ = serde_json::from_slice::<Peer>(message);
}
