//! `foreshard lint`: what the API server would say. Every rule of every definition is run, once kept and once broken.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use foreshard::api::crds;
use foreshard::api::lint::{Linter, documents};
use serde_json::Value;

const JOB: &str = "\
apiVersion: foreshard.dev/v1alpha1
kind: TrainingJob
metadata: {name: a}
spec:
  bundle: work/m.bundle
  steps: 3
  data: {uri: work/x.txt}
  parallelism: {shards: 2, cuts: [block1]}
  resources: {memory: 2Gi, devices: [{name: cpu, min: 1, max: 2}]}
  placement: {tolerations: [{key: team, value: a}]}
  volumes:
  - {name: work, persistentVolumeClaim: {claimName: w}}
  - {name: maps, configMap: {name: m}}
  - name: models
    archive:
      url: https://example.com/m.tgz?signature=x
      sha256: 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
      sizeLimit: 1Gi
  results: work
  checkpoint: {source: work/b-1}
";
const PLAN: &str = "\
apiVersion: foreshard.dev/v1alpha1
kind: PartitionPlan
metadata: {name: a-plan-1}
spec:
  job: a
  revision: 1
  reason: the first plan
  inputs: \"00\"
  nodes: [n1]
  shards:
  - {worker: 0, node: n1, device: cpu, cores: 1, memory: 1073741824}
";

const PROFILE: &str = "\
apiVersion: foreshard.dev/v1alpha1
kind: ModelProfile
metadata: {name: bundle-0}
spec:
  bundle: 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
  job: a
  devices: [{kind: cpu, product: 2.5, memory: 1, other: 1, launch: 1}]
";

/// A document, what is changed in it, whether the document before is what the cluster holds, and what is said of it.
const BROKEN: &[(&str, &str, &str, bool, &str)] = &[
    (JOB, "name: a}", "name: 9.a}", false, "named after the job"),
    (JOB, "bundle: work", "bundle: elsewhere", false, "bundle must lie on a volume"),
    (JOB, "results: work", "results: maps", false, "results must name"),
    (JOB, "uri: work/x.txt", "uri: a, socket: b", false, "give either uri or socket"),
    (JOB, "uri: work/x.txt", "socket: a", false, "who writes to socket is a feeder"),
    (JOB, "steps: 3\n  data: {uri: work/x.txt}", "epochs: 3\n  data: {socket: b}", false, "how much data there is"),
    (JOB, "cuts: [block1]", "cuts: [block1, block2]", false, "one cut fewer than shards"),
    (
        JOB,
        "  resources: {memory",
        "  partition: {granularity: op}\n  resources: {memory",
        false,
        "cuts are made where layers begin",
    ),
    (
        JOB,
        "  resources: {memory",
        "  partition: {cheapest: {}}\n  resources: {memory",
        false,
        "on a cluster as many devices are taken as are free",
    ),
    (
        JOB,
        "  resources: {memory",
        "  partition: {granularity: layer, split: [{tensor: a, axis: 0, parts: 2}]}\n  resources: {memory",
        false,
        "keeps layers whole",
    ),
    (
        JOB,
        "  resources: {memory",
        "  partition: {split: [{ops: a, axis: 0, parts: 2}]}\n  resources: {memory",
        false,
        "give each either tensor and axis, or ops",
    ),
    (
        JOB,
        "  resources: {memory",
        "  partition: {split: [{ops: a, parts: 2}, {ops: a, parts: 3}]}\n  resources: {memory",
        false,
        "name each tensor and each pattern of ops once",
    ),
    (
        JOB,
        "  resources: {memory",
        "  partition: {pins: [{ops: a, device: cpu0}]}\n  resources: {memory",
        false,
        "devices get their names later",
    ),
    (JOB, "source: work/b-1", "source: elsewhere/b-1", false, "checkpoint.source must lie on a volume"),
    (JOB, "source: work/b-1", "source: work/b-2", true, "checkpoint.source cannot change once a job exists"),
    (JOB, "  results: work", "  weights: work/w\n  results: work", false, "checkpoint.source brings params"),
    (
        JOB,
        "  results: work",
        "  adaptation: {interval: 60, horizon: 30}\n  results: work",
        false,
        "adaptation.interval must be at most adaptation.horizon",
    ),
    (JOB, "bundle: work/m", "bundle: work/n", true, "bundle and seed cannot change"),
    (JOB, "min: 1, max: 2", "min: 3, max: 4", false, "lies in no range of resources.devices"),
    (JOB, "min: 1, max: 2", "min: 2, max: 1", false, "min is more than max"),
    (JOB, "memory: 2Gi", "memory: 2 GB", false, "memory is a quantity"),
    (JOB, "{key: team,", "{operator: Exists,", false, "a toleration has a key"),
    (JOB, "  results: work", "  managedBy: a/b\n  results: work", true, "managedBy cannot change"),
    (JOB, "claimName: w}", "claimName: w}, configMap: {name: m}", false, "exactly one of"),
    (JOB, "sizeLimit: 1Gi", "sizeLimit: 1 GB", false, "sizeLimit is a quantity above 0"),
    (JOB, "sizeLimit: 1Gi", "credentials: store", false, "credentials are for an s3:// url"),
    (JOB, "sha256: 0123", "sha256: 1123", true, "sha256 cannot change once a job exists"),
    (PLAN, "memory: 1073741824", "memory: 2147483648", true, "a plan does not change"),
];

fn findings(yaml: &str, was: &str) -> Vec<String> {
    let was = documents(was).unwrap();
    let checked = Linter::default().file(yaml, &was).unwrap();
    checked.iter().flat_map(|c| &c.findings).map(ToString::to_string).collect()
}

/// Messages of all rules of a schema.
fn rules(schema: &Value, out: &mut BTreeSet<String>) {
    let own = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    out.extend(own.map(|rule| rule["message"].as_str().unwrap_or_default().to_owned()));
    match schema {
        Value::Object(map) => map.values().for_each(|s| rules(s, out)),
        Value::Array(list) => list.iter().for_each(|s| rules(s, out)),
        _ => {}
    }
}

#[test]
fn every_rule_is_run_once_kept_and_once_broken() {
    let mut untried = BTreeSet::new();
    for (_, yaml) in crds() {
        rules(&documents(&yaml).unwrap()[0], &mut untried);
    }
    assert!(untried.len() >= BROKEN.len(), "{untried:?}");
    for (good, from, to, changed, says) in BROKEN {
        assert_eq!(findings(good, good), [""; 0], "{good}");
        assert!(good.contains(from), "{from}");
        let broken = good.replacen(from, to, 1);
        let said = findings(&broken, if *changed { good } else { "" });
        assert!(said.iter().any(|s| s.contains(says)), "{says:?} is not in {said:?}");
        untried.retain(|message| !message.contains(says));
    }
    assert!(untried.is_empty(), "no document breaks these rules: {untried:#?}");
}

/// Calls `check` with every schema in a schema, and where it is.
fn walk(at: &str, schema: &Value, check: &mut impl FnMut(&str, &Value)) {
    check(at, schema);
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        walk(&format!("{at}.{name}"), inner, check);
    }
    for inner in ["items", "additionalProperties"] {
        if schema[inner].is_object() {
            walk(&format!("{at}[]"), &schema[inner], check);
        }
    }
}

#[test]
fn everything_is_bounded() {
    let mut n = 0;
    for (_, yaml) in crds() {
        let crd = &documents(&yaml).unwrap()[0];
        walk("", &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"], &mut |at, schema| {
            let needs: &[&str] = match schema["type"].as_str().unwrap() {
                "string" if schema.get("enum").is_none() => &["maxLength"],
                "integer" => &["maximum"],
                "array" => &["maxItems"],
                "object" if schema.get("additionalProperties").is_some() => &["maxProperties"],
                _ => &[],
            };
            assert!(needs.iter().all(|key| schema.get(*key).is_some()), "{at} has no {needs:?}");
            n += needs.len();
        });
    }
    assert!(n > 50);
}

#[test]
fn the_shortest_manifest_has_a_model_data_and_a_range_of_devices() {
    let shortest = "\
apiVersion: foreshard.dev/v1alpha1
kind: TrainingJob
metadata: {name: a}
spec:
  bundle: work/m.bundle
  data: {uri: work/x.txt}
  resources: {devices: [{name: cpu, max: 4}]}
  volumes: [{name: work, persistentVolumeClaim: {claimName: w}}]
";
    assert_eq!(findings(shortest, ""), [""; 0]);
    let job = foreshard::api::parse(shortest).unwrap();
    assert_eq!((job.spec.results(), job.spec.steps), (Some("work"), 1000));
    for (part, says) in [
        ("  bundle: work/m.bundle\n", "bundle is missing"),
        ("  data: {uri: work/x.txt}\n", "data is missing"),
        ("  volumes: [{name: work, persistentVolumeClaim: {claimName: w}}]\n", "bundle must lie on a volume"),
    ] {
        let said = findings(&shortest.replace(part, ""), "");
        assert!(said.iter().any(|s| s.contains(says)), "{says:?} is not in {said:?}");
    }
}

#[test]
fn says_field_value_and_way_out() {
    for (from, to, says) in [
        ("shards: 2", "shard: 2", "spec.parallelism.shard: there is no such field; did you mean \"shards\"?"),
        ("shards: 2", "shards: two", "spec.parallelism.shards: \"two\", must be a whole number"),
        ("shards: 2", "shards: 0", "spec.parallelism.shards: 0, must be at least 1"),
        (
            "shards: 2",
            "schedule: 1f1b, shards: 2",
            "\"1f1b\", must be one of 1F1B, GPipe, Interleaved, ZeroBubble, Auto; did you mean \"1F1B\"?",
        ),
        ("steps: 3", "steps: 1.5", "spec.steps: 1.5, must be a whole number"),
        ("cuts: [block1]", "cuts: [7]", "spec.parallelism.cuts[0]: 7, must be text; quote it"),
        ("  data: {uri: work/x.txt}\n", "", "spec: data is missing: Where training data comes from"),
        ("name: work,", "name: Work,", "spec.volumes[0].name: \"Work\", must look like ^[a-z0-9]"),
        (
            "https://example",
            "ftp://example",
            "spec.volumes[2].archive.url: \"ftp://example.com/m.tgz?signature=x\", must look like",
        ),
        ("sha256: 0123", "sha256: sha256:0123", "spec.volumes[2].archive.sha256: \"sha256:0123"),
        ("name: maps", "name: work", "spec.volumes: two entries have the name \"work\""),
        ("shards: 2,", "shards: 2, replicas: 4097,", "spec.parallelism.replicas: 4097, must be at most 4096"),
        (
            "results: work",
            "results: work\n  pods: {labels: {foreshard.dev/job: a}}",
            "spec.pods.labels: foreshard.dev/job is set by",
        ),
        ("kind: TrainingJob", "kind: TrainingJobs", "\"TrainingJobs\" is no kind of foreshard.dev"),
        ("v1alpha1", "v1", "apiVersion: \"foreshard.dev/v1\", write \"foreshard.dev/v1alpha1\""),
        ("metadata: {name: a}", "metadata: {}", "metadata.name: is missing"),
        ("apiVersion: foreshard.dev/v1alpha1\n", "", "apiVersion and kind are missing"),
    ] {
        assert!(JOB.contains(from), "{from}");
        let said = findings(&JOB.replacen(from, to, 1), "");
        assert!(said.iter().any(|s| s.contains(says)), "{says:?} is not in {said:?}");
    }
}

#[test]
fn all_problems_of_all_documents_are_told_at_once_and_other_kinds_are_passed_over() {
    let yaml = format!("{JOB}---\napiVersion: v1\nkind: Secret\nmetadata: {{name: s}}\n---\n{PLAN}")
        .replace("steps: 3", "steps: 0")
        .replace("shards: 2", "shards: -1")
        .replace("revision: 1", "revision: x");
    assert_eq!(findings(&yaml, "").len(), 3);
    assert!(Linter::default().file("a: [", &[]).unwrap_err().contains("not YAML"));
    assert_eq!(findings("", ""), [""; 0]);
    assert_eq!(findings(PROFILE, ""), [""; 0]);
    let said = findings(&PROFILE.replace("2.5", "0"), "");
    assert_eq!(said, ["spec.devices[0].product: 0, must be at least 0.001"]);
}

#[test]
fn all_committed_manifests_are_clean() {
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests");
    let mut n = 0;
    for entry in std::fs::read_dir(manifests.join("samples")).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(findings(&std::fs::read_to_string(&path).unwrap(), ""), [""; 0], "{}", path.display());
        n += 1;
    }
    assert!(n > 0);
}

#[test]
fn the_command_prints_problems_and_answers_with_its_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let lint = |yaml: &str| {
        let file = dir.path().join("job.yaml");
        std::fs::write(&file, yaml).unwrap();
        let done = Command::new(env!("CARGO_BIN_EXE_foreshard")).arg("lint").arg(&file).output().unwrap();
        (done.status.code().unwrap(), String::from_utf8(done.stdout).unwrap())
    };
    let (code, said) = lint(JOB);
    assert!(code == 0 && said.ends_with("job.yaml: TrainingJob a: ok\n"), "{said}");
    let (code, said) = lint(&JOB.replace("[block1]", "[block1, block2]"));
    assert!(code == 1 && said.contains("TrainingJob a: spec: parallelism.cuts: n cuts make"), "{said}");
    assert_eq!(lint("a: [").0, 2);
}
