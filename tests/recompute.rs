//! Forward values computed again instead of being kept: a model learns the same in less memory.

mod support;

use std::fs;
use std::path::Path;

use foreshard::plan::{Aim, Infeasible, Plan, Problem, Recompute, ScheduleKind, solve};
use foreshard::topology::{Device, LOOPBACK, Topology, nominal};
use foreshard::units::Bytes;
use serde_json::Value;

/// As far as losses may be apart where plans cut fusions at other ops: tests/split.rs allows the same.
const TOLERANCE: f64 = 2e-5;

struct Run {
    losses: Vec<f64>,
    plan: Plan,
    /// By worker: what it grew by beyond its executables.
    grown: Vec<u64>,
}

/// Four steps of a GPT on two workers, in eight microbatches of which all are under way at once.
fn train(directory: &Path, partition: &str, more: &str) -> Result<Run, String> {
    let job = directory.with_extension("yaml");
    let yaml = format!(
        "apiVersion: foreshard.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: recompute}}\nspec:\n  bundle: \
         bundles/char_gpt.bundle\n  data: {{uri: examples/data/tinyshakespeare.txt}}\n  steps: 4\n  adaptation: \
         {{mode: Off}}\n  partition: {partition}\n  {more}\n"
    );
    fs::write(&job, yaml).unwrap();
    let output =
        support::foreshard().args(["local", "run", "-q", "--run-dir"]).arg(directory).arg(&job).output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
    let loss = |line: &str| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap();
    let summary: Value = serde_json::from_str(&read("summary.json")).unwrap();
    let grown = |worker: &Value| {
        let of = |field: &str| worker["memory"][field].as_u64().unwrap();
        of("peak_rss").saturating_sub(of("baseline_rss"))
    };
    Ok(Run {
        losses: read("log.jsonl").lines().map(loss).collect(),
        plan: serde_json::from_str(&read("plan.json")).unwrap(),
        grown: summary["workers"].as_array().unwrap().iter().map(grown).collect(),
    })
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!((a.len(), b.len()), (4, 4));
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) })
}

#[test]
fn a_gpt_learns_the_same_in_less_memory() {
    let scratch = tempfile::tempdir().unwrap();
    let run = |recompute: &str| {
        let parallelism = "parallelism: {shards: 2, microbatch: 2, schedule: GPipe, cuts: [block3]}";
        train(&scratch.path().join(recompute), &format!("{{recompute: {recompute}}}"), parallelism).unwrap()
    };
    let (kept, again) = (run("never"), run("always"));
    assert_eq!((kept.plan.recomputes(), again.plan.recomputes()), (vec![false, false], vec![true, false]));
    let apart = apart(&kept.losses, &again.losses);
    assert!(apart <= TOLERANCE, "losses differ by {apart:e}");
    let planned = |run: &Run| run.plan.shards[0].memory.0;
    assert!(planned(&again) * 2 < planned(&kept), "planned {} and {}", planned(&again), planned(&kept));
    assert!(again.grown[0] * 3 < kept.grown[0] * 2, "seen {} and {}", again.grown[0], kept.grown[0]);
    for run in [&kept, &again] {
        for (grown, shard) in run.grown.iter().zip(&run.plan.shards) {
            assert!(*grown <= shard.memory.0, "{grown} seen, {} planned", shard.memory);
        }
    }
}

/// The least memory of two equal workers that some plan of these schedules and microbatches fits.
fn enough(recompute: Recompute) -> Bytes {
    let model = support::load("bundles/char_gpt.bundle");
    let device = Device { memory: Bytes(1 << 20), ..nominal("cpu").unwrap() };
    let topology = Topology::new(vec![device; 2], LOOPBACK, LOOPBACK);
    let problem = Problem {
        schedule: Some(ScheduleKind::GPipe),
        aim: Aim { recompute, ..Aim::default() },
        ..Problem::new(&model, &topology, 2)
    };
    match solve(&problem, None) {
        Err(Infeasible::Memory { enough: Some(enough), .. }) => enough,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_job_that_does_not_fit_computes_again() {
    let (never, auto) = (enough(Recompute::Never), enough(Recompute::Auto));
    assert!(auto.0 * 10 < never.0 * 9, "{auto} and {never}");
    let limit = Bytes((auto.0 * 2 + never.0) / 3);
    let scratch = tempfile::tempdir().unwrap();
    let run = |recompute: &str| {
        let more =
            format!("resources: {{memory: {}Ki}}\n  parallelism: {{shards: 2, schedule: GPipe}}", limit.0 / 1024);
        // Nor is anything split.
        let partition = format!("{{recompute: {recompute}, granularity: sublayer}}");
        train(&scratch.path().join(recompute), &partition, &more)
    };
    let refused = run("never").map(|_| ()).unwrap_err();
    assert!(refused.contains("compute forward values again: spec.partition.recompute: auto"), "{refused}");
    let found = run("auto").unwrap();
    assert!(found.plan.recomputes().contains(&true), "{:?}", found.plan.shards);
    for shard in &found.plan.shards {
        assert!(shard.memory <= limit, "{} of {limit}", shard.memory);
    }
    let microbatch = found.plan.microbatch;
    let roomy = format!("parallelism: {{shards: 2, microbatch: {microbatch}}}");
    let roomy = train(&scratch.path().join("roomy"), "{recompute: auto}", &roomy).unwrap();
    assert!(!roomy.plan.recomputes().contains(&true), "{:?}", roomy.plan.shards);
    let apart = apart(&found.losses, &roomy.losses);
    assert!(apart <= TOLERANCE, "losses differ by {apart:e}");
}
