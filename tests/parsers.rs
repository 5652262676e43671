//! Parsers against every small damage there is: each value of a manifest replaced by each kind of value, each field of a
//! module left out, doubled or changed, each file cut short anywhere.

#[path = "../fuzz/src/checks.rs"]
#[allow(dead_code)]
mod checks;

use foreshard::api;
use foreshard::graph::proto::{Fields, Value as Field, Writer};
use foreshard::plan::{Aim, Problem, ScheduleKind, solve};
use foreshard::topology::parse_devices;
use serde_json::{Value, json};

const MANIFEST: &[u8] = include_bytes!("data/manifest.json");
const JOB: &str = include_str!("../manifests/charlm.yaml");

/// What may stand where something else was meant.
fn strangers() -> Vec<Value> {
    let long = "x".repeat(300);
    vec![
        json!(null),
        json!(true),
        json!(0),
        json!(1),
        json!(-1),
        json!(0.5),
        json!(u64::MAX),
        json!(1e300),
        json!(""),
        json!("../x"),
        json!(long),
        json!([]),
        json!([u64::MAX, u64::MAX]),
        json!({}),
    ]
}

/// The document with each value in turn replaced by each stranger, left out, or doubled.
fn damaged(document: &Value) -> Vec<Value> {
    fn paths(value: &Value, at: String, out: &mut Vec<String>) {
        out.push(at.clone());
        match value {
            Value::Object(map) => map.iter().for_each(|(k, v)| paths(v, format!("{at}/{}", k.replace('/', "~1")), out)),
            Value::Array(list) => list.iter().enumerate().for_each(|(i, v)| paths(v, format!("{at}/{i}"), out)),
            _ => {}
        }
    }
    let mut all = Vec::new();
    paths(document, String::new(), &mut all);
    let mut out = Vec::new();
    for path in &all {
        for stranger in strangers() {
            let mut copy = document.clone();
            *copy.pointer_mut(path).unwrap() = stranger;
            out.push(copy);
        }
        let Some((parent, key)) = path.rsplit_once('/') else { continue };
        let mut copy = document.clone();
        match copy.pointer_mut(parent).unwrap() {
            Value::Object(map) => drop(map.remove(&key.replace("~1", "/"))),
            Value::Array(list) => {
                let at: usize = key.parse().unwrap();
                let mut doubled = document.clone();
                let again = list[at].clone();
                doubled.pointer_mut(parent).unwrap().as_array_mut().unwrap().push(again);
                out.push(doubled);
                list.remove(at);
            }
            _ => {}
        }
        out.push(copy);
    }
    out
}

#[test]
fn every_value_of_a_bundle_manifest_may_be_wrong() {
    let document: Value = serde_json::from_slice(MANIFEST).unwrap();
    let all = damaged(&document);
    assert!(all.len() > 500);
    all.iter().for_each(|damaged| checks::manifest(damaged.to_string().as_bytes()));
    (0..MANIFEST.len()).for_each(|end| checks::manifest(&MANIFEST[..end]));
}

#[test]
fn every_value_of_a_job_may_be_wrong() {
    let check = |yaml: &str| match api::parse(yaml) {
        Ok(job) => {
            let written = serde_yaml::to_string(&job).unwrap();
            assert_eq!(api::parse(&written).unwrap().spec, job.spec, "what was written is what is read:\n{written}");
            let memory = job.spec.resources.memory_bytes().expect("checked by the parser");
            assert!(memory.is_none_or(|m| m > 0));
        }
        Err(e) => assert!(!e.is_empty() && e.len() < 2000, "an error people can read: {e}"),
    };
    let mut document: Value = serde_yaml::from_str(JOB).unwrap();
    document["spec"]["resources"] = json!({"cores": 1, "memory": "4Gi"});
    document["spec"]["data"]["columns"] = json!({"tokens": ["a", "b*"]});
    let all = damaged(&document);
    assert!(all.len() > 300);
    all.iter().for_each(|damaged| check(&damaged.to_string()));
    JOB.char_indices().for_each(|(end, _)| check(&JOB[..end]));
}

/// The message with each field at any depth in turn left out, doubled, or changed.
fn variations(message: &[u8]) -> Vec<Vec<u8>> {
    let fields: Vec<_> = Fields::new(message, "any").map_while(Result::ok).collect();
    let mut out = Vec::new();
    for (at, &(number, value, raw)) in fields.iter().enumerate() {
        let mut replacements = vec![Vec::new(), [raw, raw].concat()];
        let mut replace = |write: &dyn Fn(&mut Writer)| {
            let mut new = Writer::default();
            write(&mut new);
            replacements.push(new.0);
        };
        match value {
            Field::Varint(n) => {
                for other in [0, n + 1, u64::MAX] {
                    replace(&|w| w.number(number, other));
                }
                replace(&|w| w.bytes(number, b"a"));
            }
            Field::Bytes(inner) => {
                replace(&|w| w.bytes(number, &[]));
                replace(&|w| w.bytes(number, &inner[..inner.len() / 2]));
                replace(&|w| w.number(number, 7));
                let is_message = !inner.is_empty() && Fields::new(inner, "any").all(|f| f.is_ok());
                for varied in if is_message { variations(inner) } else { Vec::new() } {
                    replace(&|w| w.bytes(number, &varied));
                }
            }
            _ => {}
        }
        for new in replacements {
            let others =
                |range: &[(u32, Field<'_>, &[u8])]| range.iter().flat_map(|f| f.2).copied().collect::<Vec<u8>>();
            out.push([others(&fields[..at]), new, others(&fields[at + 1..])].concat());
        }
    }
    out
}

#[test]
fn every_field_of_a_module_may_be_wrong() {
    let module = include_bytes!("data/hlo/scan.hlo.pb");
    let all = variations(module);
    assert!(all.len() > 3000, "{}", all.len());
    all.iter().for_each(|varied| checks::import(varied));
    (0..module.len()).for_each(|end| checks::import(&module[..end]));
}

#[test]
fn every_field_of_a_bundle_may_be_wrong() {
    let all = variations(include_bytes!("data/stack.bundle/update.hlo.pb"));
    assert!(all.len() > 1000, "{}", all.len());
    all.iter().for_each(|varied| checks::bundle(varied));
}

/// Devices come from a config map, plans from files and other versions of this program.
#[test]
fn every_value_of_a_problem_may_be_wrong() {
    const DEVICES: &str = "cpu:memory=4Gi:speed=0.5,cpu:flops=50G:bandwidth=10G:node=b";
    DEVICES.char_indices().for_each(|(end, _)| checks::problem(&DEVICES.as_bytes()[..end]));
    let topology = parse_devices(DEVICES).unwrap();
    let (n_shards, n_replicas, microbatch, schedule) = (2, 1, None, Some(ScheduleKind::ZeroBubble));
    let aim = Aim::default();
    let problem =
        Problem { n_replicas, microbatch, schedule, aim, ..Problem::new(checks::stack(), &topology, n_shards) };
    let previous = Some(solve(&problem, None).unwrap());
    let asked = checks::Asked { topology, n_shards, n_replicas, microbatch, schedule, aim, previous };
    let mut document = serde_json::to_value(&asked).unwrap();
    let all = damaged(&document);
    assert!(all.len() > 1000, "{}", all.len());
    all.iter().for_each(|damaged| checks::problem(damaged.to_string().as_bytes()));
    // Figures that JSON can say and no device has.
    for at in ["/topology/devices/0/speed", "/topology/devices/1/flops", "/topology/remote/bandwidth"] {
        for figure in [-1.0, 0.0, 1e-308, 1e308] {
            let before = std::mem::replace(document.pointer_mut(at).unwrap(), json!(figure));
            checks::problem(document.to_string().as_bytes());
            *document.pointer_mut(at).unwrap() = before;
        }
    }
}
