//! Inputs of Piper: data- and tensor-parallel stages with recomputation under a memory limit, least time per sample.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Family, InputError, Known, Row, files, measured};
use crate::plan::stages::sharded::{Pipeline, Problem, Refusal, Way, solve};

pub const FAMILY: Family = Family {
    name: "piper",
    about: "Piper inputs (JSON): stages with data and tensor parallelism and recomputation, by memory and devices",
    run,
};

/// Most prefixes of a graph that are searched one and all.
const BUDGET: usize = 2_500;
const GIB: f64 = (1u64 << 30) as f64;
/// Bandwidth of Piper's experiments, bytes per second.
const BANDWIDTH: f64 = 25.0 * GIB;

fn run(directory: &Path, report: &mut dyn FnMut(Row)) -> Result<(), InputError> {
    let mut found = false;
    for path in files(directory, ".json")? {
        let malformed = |message: String| InputError::Malformed { path: PathBuf::from(&path), message };
        let text = std::fs::read_to_string(&path).map_err(|source| InputError::Read { path: path.clone(), source })?;
        // Other families have JSON files too; this one has these words.
        if !text.contains("\"TMPCs\"") {
            continue;
        }
        found = true;
        let input: Input = serde_json::from_str(&text).map_err(|e| malformed(e.to_string()))?;
        let problem = input.problem().map_err(malformed)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for setting in settings(&name, &input) {
            report(row(&name, &input, &problem, &setting).map_err(|e| malformed(e.to_string()))?);
        }
    }
    if found { Ok(()) } else { Err(InputError::Nothing { family: FAMILY.name, path: directory.to_owned() }) }
}

/// Devices and their memory.
struct Setting {
    n_devices: usize,
    memory: f64,
    bandwidth: f64,
    best_known: Option<Known>,
    /// What Piper says, where it says nothing but that.
    remark: &'static str,
}

fn row(name: &str, input: &Input, problem: &Problem, setting: &Setting) -> Result<Row, Refusal> {
    let &Setting { n_devices, memory, bandwidth, best_known, remark } = setting;
    let problem = Problem { n_devices, memory, bandwidth, ..problem.clone() };
    let (found, seconds, peak_memory) = measured(|| solve(&problem, BUDGET));
    let mut row = Row {
        instance: format!("{name}, {n_devices} x {:.4} GiB", memory / GIB),
        objective: "seconds per sample of the slowest stage",
        ours: None,
        best_known,
        bound: None,
        seconds,
        after_a_second: None,
        peak_memory,
        note: remark.to_owned(),
    };
    let note = match found {
        Ok(plan) => match verify(input, setting, &plan) {
            Ok(value) => {
                row.ours = Some(value);
                let least = |n: &Node| {
                    let each = n.ways.iter().flat_map(|(t, ways)| ways.iter().map(|w| *t as f64 * w.time));
                    each.fold(f64::INFINITY, f64::min)
                };
                let computing = input.nodes.iter().map(least).sum::<f64>() / n_devices as f64;
                row.bound = Some(if plan.optimal { plan.seconds } else { computing });
                let how = if plan.optimal { "optimal" } else { "too many prefixes; bound is computing alone" };
                format!("{}; {how}", describe(&plan))
            }
            Err(wrong) => wrong,
        },
        Err(e @ Refusal::Memory { all, .. }) => format!("{}: {e}", if all { "infeasible" } else { "nothing found" }),
        Err(e) => return Err(e),
    };
    row.note = if remark.is_empty() { note } else { format!("{note}; {remark}") };
    Ok(row)
}

/// Stages as data x tensor, with how often the same follow each other.
fn describe(plan: &Pipeline) -> String {
    let degrees: Vec<(usize, usize)> = plan.stages.iter().map(|s| (s.data, s.tensor)).collect();
    let runs = degrees.chunk_by(|a, b| a == b).map(|run| {
        let (d, t) = run[0];
        let stage = if t == 1 { d.to_string() } else { format!("{d}x{t}") };
        if run.len() == 1 { stage } else { format!("{stage} ({} times)", run.len()) }
    });
    format!("{} stages: {}", plan.stages.len(), runs.collect::<Vec<_>>().join("-"))
}

/// Published settings, by number of nodes and edges, or a grid of the same kind.
fn settings(name: &str, input: &Input) -> Vec<Setting> {
    let published = |rows: &[(usize, f64, f64)], remark| {
        let setting = |&(n_devices, gib, value): &(usize, f64, f64)| Setting {
            n_devices,
            memory: gib * GIB,
            bandwidth: BANDWIDTH,
            best_known: (value > 0.0).then_some(Known { value, source: PIPER }),
            remark: if value > 0.0 { remark } else { "Piper finds nothing that fits either" },
        };
        rows.iter().map(setting).collect()
    };
    match (name, input.nodes.len(), input.edges.len(), input.n_microbatches) {
        ("bert32a100", 37, 67, 1920) => published(BERT, ""),
        ("resnet", 177, 193, 7680) => published(RESNET, "as published, times in ms are added to transfers in s"),
        _ => {
            let degrees = input.nodes.iter().flat_map(|n| n.ways.keys().copied());
            let useful = degrees.max().unwrap_or(1).saturating_mul(input.n_microbatches);
            let (bandwidth, best_known, remark) = (input.bandwidth, None, "");
            let own = Setting { n_devices: input.n_devices, memory: input.memory, bandwidth, best_known, remark };
            let grid = [2.0, 8.0, 80.0].into_iter().flat_map(|gib| [8, 32, 128, 512].map(|k| (k, gib)));
            // More devices than replicas of all microbatches could not all be used.
            let grid = grid.filter(|&(n_devices, _)| n_devices <= useful);
            let grid =
                grid.map(|(n_devices, gib)| Setting { n_devices, memory: gib * GIB, bandwidth, best_known, remark });
            std::iter::once(own).chain(grid).collect()
        }
    }
}

const PIPER: &str = "Piper (commit d7fc8cf), rerun";

/// Devices, GiB of each, seconds per sample; 0 where nothing fits.
const BERT: &[(usize, f64, f64)] = &[
    (8, 2.0, 0.0),
    (32, 2.0, 66.550e-3),
    (64, 2.0, 32.030e-3),
    (128, 2.0, 15.146e-3),
    (512, 2.0, 3.6675e-3),
    (8, 8.0, 165.856e-3),
    (32, 8.0, 41.515e-3),
    (128, 8.0, 10.121e-3),
    (512, 8.0, 2.5611e-3),
    (8, 80.0, 122.01e-3),
    (32, 80.0, 30.844e-3),
    (128, 80.0, 8.0532e-3),
    (512, 80.0, 2.2725e-3),
];

const RESNET: &[(usize, f64, f64)] = &[
    (8, 16.0, 58.558),
    (16, 8.0, 31.634),
    (32, 16.0, 14.639),
    (64, 8.0, 7.879),
    (128, 16.0, 3.660),
    (8, 4.0, 73.493),
    (16, 4.0, 35.333),
    (32, 4.0, 17.624),
    (64, 4.0, 8.667),
    (128, 4.0, 4.306),
];

/// The format, with numbers checked by the solver.
#[derive(Debug, Deserialize)]
struct Input {
    #[serde(rename = "maxMemoryPerDevice")]
    memory: f64,
    #[serde(rename = "maxDevices")]
    n_devices: usize,
    bandwidth: f64,
    #[serde(rename = "mbsInBatch", alias = "maxBatchSize")]
    n_microbatches: usize,
    nodes: Vec<Node>,
    edges: Vec<Edge>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: i64,
    /// By tensor-parallel degree.
    #[serde(rename = "TMPCs")]
    ways: BTreeMap<usize, Vec<Tmpc>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Tmpc {
    #[serde(rename = "timePerSample")]
    time: f64,
    parameter_size: f64,
    memory_usage_a: f64,
    memory_usage_b: f64,
    /// Bytes, in spite of the names; by the node at the other end.
    sync_time_fw: BTreeMap<i64, f64>,
    sync_time_bw: BTreeMap<i64, f64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Edge {
    source_id: i64,
    dest_id: i64,
    communication_cost: f64,
}

impl Input {
    fn problem(&self) -> Result<Problem, String> {
        let mut place = BTreeMap::new();
        for (i, node) in self.nodes.iter().enumerate() {
            if place.insert(node.id, i).is_some() {
                return Err(format!("node {} is there twice", node.id));
            }
        }
        let find =
            |id: i64| place.get(&id).copied().ok_or_else(|| format!("an edge names node {id}, which is not there"));
        let mut edges = Vec::with_capacity(self.edges.len());
        let mut seen = std::collections::BTreeSet::new();
        for e in &self.edges {
            if !seen.insert((e.source_id, e.dest_id)) {
                return Err(format!("edge {} -> {} is there twice", e.source_id, e.dest_id));
            }
            edges.push((find(e.source_id)?, find(e.dest_id)?, e.communication_cost));
        }
        let way = |node: i64, w: &Tmpc| {
            let sync = |list: &BTreeMap<i64, f64>, other: i64| {
                list.get(&other).copied().ok_or_else(|| format!("node {node}: no sync time for its edge with {other}"))
            };
            let incoming = self.edges.iter().filter(|e| e.dest_id == node);
            let outgoing = self.edges.iter().filter(|e| e.source_id == node);
            Ok::<Way, String>(Way {
                time: w.time,
                params: w.parameter_size,
                memory_each: w.memory_usage_a,
                memory_fixed: w.memory_usage_b,
                sync_in: incoming.map(|e| sync(&w.sync_time_fw, e.source_id)).collect::<Result<_, _>>()?,
                sync_out: outgoing.map(|e| sync(&w.sync_time_bw, e.dest_id)).collect::<Result<_, _>>()?,
            })
        };
        let mut nodes = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let mut degrees = Vec::with_capacity(node.ways.len());
            for (&t, ways) in &node.ways {
                degrees.push((t, ways.iter().map(|w| way(node.id, w)).collect::<Result<Vec<_>, _>>()?));
            }
            nodes.push(degrees);
        }
        let &Self { n_devices, memory, bandwidth, n_microbatches, .. } = self;
        Ok(Problem { nodes, edges, n_devices, memory, bandwidth, n_microbatches })
    }
}

/// Seconds per sample of the slowest stage, from the input alone.
fn verify(input: &Input, setting: &Setting, plan: &Pipeline) -> Result<f64, String> {
    let mut stage_of: BTreeMap<i64, usize> = BTreeMap::new();
    for (s, stage) in plan.stages.iter().enumerate() {
        for &v in &stage.nodes {
            if stage_of.insert(input.nodes[v].id, s).is_some() {
                return Err(format!("node {} is in two stages", input.nodes[v].id));
            }
        }
    }
    if stage_of.len() != input.nodes.len() {
        return Err("a node has no stage".to_owned());
    }
    if let Some(e) = input.edges.iter().find(|e| stage_of[&e.source_id] > stage_of[&e.dest_id]) {
        return Err(format!("node {} runs before node {}, which it needs", e.dest_id, e.source_id));
    }
    let devices: usize = plan.stages.iter().map(|s| s.data * s.tensor).sum();
    let mut replicas: usize = plan.stages.iter().map(|s| s.data).sum();
    if devices > setting.n_devices || replicas > input.n_microbatches {
        return Err(format!("{devices} devices and {replicas} replicas are too many"));
    }
    let batch = input.n_microbatches as f64;
    let mut worst: f64 = 0.0;
    for (s, stage) in plan.stages.iter().enumerate() {
        if stage.data == 0 || !input.n_microbatches.is_multiple_of(stage.data) || stage.ways.len() != stage.nodes.len()
        {
            return Err(format!("stage {s}: {} replicas do not divide the batch, or ways are missing", stage.data));
        }
        let in_flight = replicas.div_ceil(stage.data) as f64;
        replicas -= stage.data;
        let (mut computing, mut border, mut params, mut memory) = (0.0, 0.0, 0.0, 0.0);
        for (&v, &way) in stage.nodes.iter().zip(&stage.ways) {
            let node = &input.nodes[v];
            let way = node.ways.get(&stage.tensor).and_then(|w| w.get(way));
            let way = way.ok_or_else(|| format!("node {} has no such way at degree {}", node.id, stage.tensor))?;
            computing += way.time;
            params += way.parameter_size;
            memory += way.memory_usage_a * in_flight + way.memory_usage_b;
            for e in &input.edges {
                if e.dest_id == node.id && stage_of[&e.source_id] != s {
                    border += 2.0 * (e.communication_cost + way.sync_time_fw[&e.source_id]);
                }
                if e.source_id == node.id && stage_of[&e.dest_id] != s {
                    border += 2.0 * (e.communication_cost + way.sync_time_bw[&e.dest_id]);
                }
            }
        }
        if memory > setting.memory {
            return Err(format!("stage {s} needs {memory} B of {}", setting.memory));
        }
        let d = stage.data as f64;
        let bytes = border / d + 4.0 * (d - 1.0) * params / d / batch;
        worst = worst.max(bytes / setting.bandwidth + computing / d);
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::stages::sharded::Stage;
    use serde_json::{Value, json};

    /// Two nodes; the second can recompute, or run on two devices.
    fn input() -> Value {
        let way = |time: f64, a: f64, fw: Value, bw: Value| {
            json!({"id": "vanilla", "timePerSample": time, "parameterSize": 8.0, "memoryUsageA": a,
                   "memoryUsageB": 1.0, "syncTimeFw": fw, "syncTimeBw": bw})
        };
        json!({
            "maxMemoryPerDevice": 100.0, "maxDevices": 3, "bandwidth": 2.0, "mbsInBatch": 4,
            "nodes": [
                {"id": 7, "name": "a", "TMPCs": {"1": [way(6.0, 10.0, json!({}), json!({"5": 0.0}))]}},
                {"id": 5, "TMPCs": {
                    "1": [way(4.0, 20.0, json!({"7": 1.0}), json!({})), way(9.0, 5.0, json!({"7": 1.0}), json!({}))],
                    "2": [way(3.0, 5.0, json!({"7": 2.0}), json!({}))]}}
            ],
            "edges": [{"sourceId": 7, "destId": 5, "communicationCost": 1.0}]
        })
    }

    fn read(value: &Value) -> Result<Input, String> {
        serde_json::from_value(value.clone()).map_err(|e| e.to_string())
    }

    #[test]
    fn the_verifier_adds_up_by_the_formula_and_sees_bad_plans() {
        let input = read(&input()).unwrap();
        let setting = |memory| Setting { n_devices: 3, memory, bandwidth: 2.0, best_known: None, remark: "" };
        let stage = |nodes: &[usize], data, tensor, ways: &[usize]| Stage {
            nodes: nodes.to_vec(),
            data,
            tensor,
            ways: ways.to_vec(),
        };
        let check = |memory: f64, stages: &[Stage]| {
            verify(&input, &setting(memory), &Pipeline { stages: stages.to_vec(), seconds: 0.0, optimal: false })
        };
        // Two microbatches in flight in the first stage: 2 * 10 + 1 bytes.
        let two = [stage(&[0], 1, 1, &[0]), stage(&[1], 1, 2, &[0])];
        // The border counts twice, with the sync of the receiver: 2 * (1 + 2) / 2 + 3, against 2 * 1 / 2 + 6.
        assert_eq!(check(21.0, &two), Ok(7.0));
        assert!(check(20.9, &two).unwrap_err().contains("stage 0 needs 21"));
        // Two replicas of all: all-reduce 4 * 16 / (2 * 4 * 2).
        assert_eq!(check(100.0, &[stage(&[0, 1], 2, 1, &[0, 1])]), Ok(4.0 + 15.0 / 2.0));
        for bad in [
            &[stage(&[1], 1, 1, &[0]), stage(&[0], 1, 1, &[0])][..],
            &[stage(&[0], 1, 1, &[0])],
            &[stage(&[0, 1], 1, 2, &[0, 0])],
            &[stage(&[0, 1], 3, 1, &[0, 0])],
            &[stage(&[0, 1], 4, 1, &[0, 0])],
            &[stage(&[0, 1], 1, 1, &[0, 2])],
        ] {
            assert!(check(100.0, bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn damaged_inputs_say_what_is_wrong() {
        let with = |pointer: &str, value: Value| {
            let mut all = input();
            *all.pointer_mut(pointer).unwrap() = value;
            let problem = read(&all)?.problem()?;
            solve(&problem, BUDGET).map(|p| p.seconds).map_err(|e| e.to_string())
        };
        assert!(with("/maxDevices", json!(3)).is_ok());
        for (pointer, value, words) in [
            ("/maxDevices", json!(0), "n_devices is 0"),
            ("/maxDevices", json!(-1), "invalid value"),
            ("/bandwidth", json!(0.0), "bandwidth is 0"),
            ("/mbsInBatch", json!(0), "n_microbatches is 0"),
            ("/nodes", json!([]), "node 7, which is not there"),
            ("/nodes/1/id", json!(7), "node 7 is there twice"),
            ("/nodes/0/TMPCs/1/0/timePerSample", json!(-1.0), "time of node 0 is -1"),
            ("/nodes/0/TMPCs/1/0/timePerSample", json!("NaN"), "invalid type"),
            ("/nodes/0/TMPCs/1/0/syncTimeBw", json!({}), "node 7: no sync time for its edge with 5"),
            ("/nodes/0/TMPCs", json!({}), "node 0 has no way"),
            ("/edges/0/destId", json!(6), "node 6, which is not there"),
            ("/edges/0/destId", json!(7), "sync"),
            ("/edges/0/communicationCost", json!(1e200), "1"),
        ] {
            let message = with(pointer, value.clone()).unwrap_err();
            assert!(message.contains(words), "{pointer} = {value}: {message}");
        }
        let mut twice = input();
        twice["edges"] = json!([twice["edges"][0], twice["edges"][0]]);
        assert!(read(&twice).unwrap().problem().unwrap_err().contains("twice"));
    }

    #[test]
    fn inputs_of_any_name_get_rows_and_what_does_not_fit_is_said_to_be_infeasible() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("other.json"), "{}").unwrap();
        let nothing = run(directory.path(), &mut |_| {}).unwrap_err();
        assert!(matches!(nothing, InputError::Nothing { .. }));
        let mut tight = input();
        tight["maxMemoryPerDevice"] = json!(5.0);
        std::fs::write(directory.path().join("tight.json"), tight.to_string()).unwrap();
        let mut rows = Vec::new();
        run(directory.path(), &mut |row| rows.push(row)).unwrap();
        // Its own setting, then 8 devices, all that two ways of four microbatches can use, at three sizes.
        assert_eq!(rows.len(), 4);
        assert!(rows[0].ours.is_none() && rows[0].note.contains("infeasible"), "{:?}", rows[0]);
        assert!(rows[1..].iter().all(|r| r.ours.is_some() && r.note.contains("optimal")), "{rows:?}");
        std::fs::write(directory.path().join("cut.json"), &tight.to_string()[..200]).unwrap();
        assert!(matches!(run(directory.path(), &mut |_| {}).unwrap_err(), InputError::Malformed { .. }));
    }
}
