//! Whatever the schedule, a model learns the same.
//!
//! Sums do not depend on the order of tasks: a segment takes microbatches in ascending order. A zero-bubble schedule cuts
//! backward work in two, and with it fusions, so results are equal within rounding (docs/decisions/0008-same-bits.md).

mod support;

use std::fs;
use std::path::Path;

use foreshard::plan::{Plan, ScheduleKind};

fn train(schedule: &str, scratch: &Path) -> (Vec<f64>, Plan) {
    let run = scratch.join(schedule);
    let job = scratch.join("job.yaml");
    let yaml = format!(
        "apiVersion: foreshard.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: schedules}}\nspec:\n  bundle: \
         bundles/char_gpt.bundle\n  data: {{uri: examples/data/tinyshakespeare.txt}}\n  steps: 4\n  adaptation: \
         {{mode: Off}}\n  parallelism: {{shards: 2, microbatch: 4, schedule: {schedule}}}\n"
    );
    fs::write(&job, yaml).unwrap();
    let output = support::foreshard().args(["local", "run", "-q", "--run-dir"]).arg(&run).arg(&job).output().unwrap();
    assert!(output.status.success(), "{schedule}: {}", String::from_utf8_lossy(&output.stderr));
    let log = fs::read_to_string(run.join("log.jsonl")).unwrap();
    let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap();
    let plan = serde_json::from_str(&fs::read_to_string(run.join("plan.json")).unwrap()).unwrap();
    (log.lines().map(loss).collect(), plan)
}

#[test]
fn a_gpt_learns_the_same_by_every_schedule() {
    let scratch = tempfile::tempdir().unwrap();
    let (expected, plain) = train("1F1B", scratch.path());
    assert_eq!((expected.len(), plain.schedule), (4, ScheduleKind::OneFOneB));
    let n_tasks = |plan: &Plan| plan.orders.values().flatten().map(Vec::len).sum::<usize>();
    for (name, kind) in [("ZeroBubble", ScheduleKind::ZeroBubble), ("Interleaved", ScheduleKind::Interleaved)] {
        let (losses, plan) = train(name, scratch.path());
        assert_eq!(plan.schedule, kind);
        assert!(n_tasks(&plan) > n_tasks(&plain), "{name}: something is cut that was not");
        let apart = losses.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(losses.len() == 4 && apart < 1e-5, "{name}: {losses:?} and {expected:?}");
    }
}
