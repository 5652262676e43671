//! The program as people meet it: what it prints, how it exits, what it leaves behind.

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// A small job that trains in seconds.
const JOB: &str = r#"
apiVersion: foreshard.dev/v1alpha1
kind: TrainingJob
metadata: {name: digits}
spec:
  bundle: bundles/mlp_digits.bundle
  data:
    uri: examples/data/digits.csv
    columns: {x: ["pixel*"], y: [label]}
  steps: 12
  parallelism: {shards: 2}
"#;

struct Job {
    directory: TempDir,
    manifest: PathBuf,
    run: PathBuf,
}

/// A manifest in a directory of its own; `changes` are (old text, new text).
fn job(changes: &[(&str, &str)]) -> Job {
    let yaml = changes.iter().fold(JOB.to_owned(), |yaml, (old, new)| {
        assert!(yaml.contains(old), "{old:?} is not in the manifest");
        yaml.replacen(old, new, 1)
    });
    let directory = tempfile::tempdir().unwrap();
    let (manifest, run) = (directory.path().join("job.yaml"), directory.path().join("run"));
    fs::write(&manifest, yaml).unwrap();
    Job { directory, manifest, run }
}

impl Job {
    /// `foreshard local run` of this job.
    fn command(&self) -> Command {
        let mut command = support::foreshard();
        command.args(["local", "run"]).arg(&self.manifest).arg("--run-dir").arg(&self.run);
        command
    }

    fn output(&self, more: &[&str]) -> Output {
        self.command().args(more).output().unwrap()
    }

    fn summary(&self) -> Value {
        serde_json::from_str(&fs::read_to_string(self.run.join("summary.json")).unwrap()).unwrap()
    }

    /// Starts the job, and returns once it has logged a few steps.
    fn training(&self) -> Running {
        let mut child = self.spawn();
        let log = self.run.join("log.jsonl");
        wait_until("the job logs steps", || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("ended early with {status}: {}", stderr_of(&mut child));
            }
            fs::read_to_string(&log).is_ok_and(|text| text.lines().count() >= 3)
        });
        child
    }

    fn spawn(&self) -> Running {
        let mut command = self.command();
        Running(command.stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0).spawn().unwrap())
    }

    /// Processes of workers 0, 1, …
    fn workers(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.run.join("pids.json")).unwrap();
        serde_json::from_str::<std::collections::BTreeMap<u32, u32>>(&text).unwrap().into_values().collect()
    }
}

/// A running job, ended with its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl std::ops::Deref for Running {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.0
    }
}

impl std::ops::DerefMut for Running {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn stderr_of(child: &mut Child) -> String {
    let lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    lines.collect::<Vec<_>>().join("\n")
}

fn kill(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

/// A process that has ended and waits for its parent counts as gone.
fn is_gone(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(") ").next().is_some_and(|s| s.starts_with('Z')),
        Err(_) => true,
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Exit code 2, one clear error with all of `says`, and nothing written.
fn refused(job: &Job, more: &[&str], says: &[&str]) {
    let output = job.output(more);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    for part in says {
        assert!(stderr.contains(part), "{part:?} is not in {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(!job.run.exists() || job.run.is_file(), "a refused job left a run directory: {stderr}");
}

#[test]
fn refuses_manifests_with_wrong_fields() {
    for (old, new, says) in [
        ("shards: 2", "shard: 2", vec!["job.yaml", "spec.parallelism", "shard", "did you mean \"shards\"?"]),
        ("shards: 2", "shards: two", vec!["job.yaml", "spec.parallelism.shards", "two"]),
        ("shards: 2", "shards: 0", vec!["spec.parallelism.shards", "0"]),
        ("steps: 12", "steps: -1", vec!["spec.steps", "-1"]),
        ("steps: 12", "stepz: 12", vec!["stepz", "did you mean \"steps\"?"]),
        ("TrainingJob", "TrainingJobs", vec!["kind", "TrainingJobs"]),
        ("foreshard.dev/v1alpha1", "foreshard.dev/v9", vec!["foreshard.dev/v9", "foreshard.dev/v1alpha1"]),
        ("x: [\"pixel*\"]", "z: [\"pixel*\"]", vec!["\"z\"", "batch tensor"]),
        ("pixel*", "pixle*", vec!["pixle*"]),
        ("spec:", "spec: [", vec!["job.yaml"]),
    ] {
        refused(&job(&[(old, new)]), &[], &says);
    }
}

#[test]
fn refuses_what_is_not_there() {
    refused(&job(&[("mlp_digits.bundle", "none.bundle")]), &[], &["bundles/none.bundle"]);
    refused(&job(&[("digits.csv", "none.csv")]), &[], &["none.csv"]);
    refused(&job(&[("  steps", "  weights: none.safetensors\n  steps")]), &[], &["spec.weights", "none.safetensors"]);
    refused(&job(&[]), &["--plugin", "/none.so"], &["/none.so"]);
    let mut missing = job(&[]);
    missing.manifest = missing.directory.path().join("none.yaml");
    refused(&missing, &[], &["none.yaml"]);
}

#[test]
fn refuses_plug_ins_that_are_none() {
    let job = job(&[]);
    refused(&job, &["--plugin-sha256", &"0".repeat(64)], &["sha256", &"0".repeat(64)]);
    let text = job.directory.path().join("text.so");
    fs::write(&text, "not a library").unwrap();
    refused(&job, &["--plugin", text.to_str().unwrap()], &["text.so", "not a PJRT plug-in"]);
    // A library of somebody else's.
    let libc = ["/lib/x86_64-linux-gnu/libm.so.6", "/lib/aarch64-linux-gnu/libm.so.6", "/lib64/libm.so.6"];
    if let Some(foreign) = libc.iter().find(|p| Path::new(p).exists()) {
        refused(&job, &["--plugin", foreign], &["libm.so.6", "not a PJRT plug-in"]);
    }
}

#[test]
fn refuses_jobs_that_cannot_be_planned() {
    refused(&job(&[("shards: 2", "shards: 2000000")]), &[], &["2000000"]);
    refused(&job(&[("shards: 2", "shards: 2, microbatch: 7")]), &[], &["microbatch", "7"]);
    refused(&job(&[("  steps", "  resources: {cores: 9999}\n  steps")]), &[], &["spec.resources.cores", "9999"]);
    refused(&job(&[("  steps", "  resources: {memory: 2 GB}\n  steps")]), &[], &["spec.resources.memory", "2 GB"]);
    refused(&job(&[("  steps", "  resources: {memory: 1Ki}\n  steps")]), &[], &["1.00 KiB"]);
}

#[test]
fn refuses_run_directories_it_must_not_use() {
    let occupied = job(&[]);
    fs::create_dir(&occupied.run).unwrap();
    fs::write(occupied.run.join("log.jsonl"), "somebody's\n").unwrap();
    let output = occupied.output(&[]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("--run-dir"), "{}", text(&output.stderr));
    assert_eq!(fs::read_to_string(occupied.run.join("log.jsonl")).unwrap(), "somebody's\n");
    let blocked = job(&[]);
    fs::write(&blocked.run, "a file").unwrap();
    refused(&blocked, &[], &["run"]);
    let mut nowhere = job(&[]);
    // Not even root can make directories there.
    nowhere.run = PathBuf::from("/proc/foreshard/run");
    refused(&nowhere, &[], &["/proc/foreshard/run"]);
}

#[test]
fn refuses_damaged_bundles() {
    let damaged = |change: &dyn Fn(&Path)| {
        let job = job(&[]);
        let copy = job.directory.path().join("b.bundle");
        copy_tree(Path::new("bundles/mlp_digits.bundle"), &copy);
        change(&copy);
        let yaml = fs::read_to_string(&job.manifest).unwrap();
        fs::write(&job.manifest, yaml.replace("bundles/mlp_digits.bundle", copy.to_str().unwrap())).unwrap();
        job
    };
    let cut = |file: &'static str| {
        move |bundle: &Path| {
            let bytes = fs::read(bundle.join(file)).unwrap();
            fs::write(bundle.join(file), &bytes[..bytes.len() / 2]).unwrap();
        }
    };
    refused(&damaged(&cut("update.hlo.pb")), &[], &["update.hlo.pb"]);
    refused(&damaged(&cut("manifest.json")), &[], &["manifest.json"]);
    refused(&damaged(&|b| fs::remove_file(b.join("init.hlo.pb")).unwrap()), &[], &["init.hlo.pb"]);
    let renamed = |b: &Path| {
        let text = fs::read_to_string(b.join("manifest.json")).unwrap();
        fs::write(b.join("manifest.json"), text.replacen("\"batch_size\"", "\"batchsize\"", 1)).unwrap();
    };
    refused(&damaged(&renamed), &[], &["manifest.json", "did you mean \"batch_size\"?"]);
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_tree(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

#[test]
fn flags_that_do_not_exist_are_explained() {
    let output = support::foreshard().args(["local", "run", "x.yaml", "--step", "3"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("--steps"), "{}", text(&output.stderr));
}

#[test]
fn a_training_step_can_be_looked_at() {
    let directory = tempfile::tempdir().unwrap();
    let picture = directory.path().join("graph.svg");
    let command = || {
        let mut command = support::foreshard();
        command.args(["graph", "bundles/scan_gpt.bundle"]);
        command
    };
    let output = command().arg("--picture").arg(&picture).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let svg = fs::read_to_string(&picture).unwrap();
    for part in ["scan_gpt", "embed", "layer 0", "layer 3", "head", "forward", "backward", "optimizer", "dot  "] {
        assert!(svg.contains(part), "the picture lacks {part:?}");
    }
    for tag in ["text", "title", "marker"] {
        let (opened, closed) = (svg.matches(&format!("<{tag}")).count(), svg.matches(&format!("</{tag}>")).count());
        assert!(opened == closed && opened > 0, "{opened} <{tag}> and {closed} </{tag}>");
    }
    let ops = command().args(["--ops", "grad"]).output().unwrap();
    // Ops of an unrolled layer are named from the outermost function on.
    assert!(text(&ops.stdout).contains("jit(grad)/jvp()/while/body[2]/closed_call/dot_general"));
}

#[test]
fn a_job_fills_its_run_directory() {
    let job = job(&[]);
    let output = job.output(&[]);
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("step 12/12"), "{stderr}");

    let log = fs::read_to_string(job.run.join("log.jsonl")).unwrap();
    let steps: Vec<Value> = log.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(steps.iter().map(|s| s["step"].as_u64().unwrap()).collect::<Vec<_>>(), (0..12).collect::<Vec<_>>());
    for s in &steps {
        assert!(s["loss"].as_f64().unwrap().is_finite());
        assert_eq!(s["workers"].as_array().unwrap().len(), 2);
        assert!(s["revision"].is_u64() && s["metrics"]["accuracy"].is_f64());
    }
    let summary = job.summary();
    assert_eq!((summary["steps"].as_u64(), summary["model"].as_str()), (Some(12), Some("mlp_digits")));

    let weights = fs::read(job.run.join("weights.safetensors")).unwrap();
    let weights = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let mut names = weights.names();
    names.sort_unstable();
    assert_eq!(names, ["layer0.b", "layer0.w", "layer1.b", "layer1.w", "layer2.b", "layer2.w"]);

    let timeline: Value = serde_json::from_str(&fs::read_to_string(job.run.join("timeline.json")).unwrap()).unwrap();
    nests(&timeline);
    for picture in ["loss.svg", "plan.svg"] {
        let svg = fs::read_to_string(job.run.join(picture)).unwrap();
        assert!(svg.trim_end().ends_with("</svg>"), "{picture} is cut short");
    }
    assert!(fs::read_to_string(job.run.join("metrics.prom")).unwrap().contains("steps_total"));
    let plan: Value = serde_json::from_str(&fs::read_to_string(job.run.join("plan.json")).unwrap()).unwrap();
    assert_eq!(plan["shards"].as_array().unwrap().len(), 2);
    let left: Vec<_> = fs::read_dir(&job.run).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|f| !f.to_str().unwrap().starts_with('.')), "temporary files are left: {left:?}");
    assert!(job.workers().into_iter().all(is_gone));
}

#[test]
fn epochs_are_passes_over_the_data() {
    let epochs = job(&[("steps: 12", "epochs: 2")]);
    let output = epochs.output(&["--quiet"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    // 1797 rows are 28 whole batches of 64.
    assert_eq!(epochs.summary()["steps"].as_u64(), Some(56));

    let one = job(&[("steps: 12", "epochs: 1")]);
    let output = one.output(&["--resume", epochs.run.to_str().unwrap()]);
    let stderr = text(&output.stderr);
    assert!(!output.status.success() && stderr.contains("is at step 56, the job ends after 28"), "{stderr}");
    let socket = job(&[
        ("steps: 12", "epochs: 2"),
        ("uri: examples/data/digits.csv", "socket: /tmp/none.sock"),
        ("\n    columns: {x: [\"pixel*\"], y: [label]}", ""),
    ]);
    refused(&socket, &[], &["epochs", "steps"]);
}

/// Viewers show spans of one track only when they nest.
fn nests(timeline: &Value) {
    let mut spans: Vec<(u64, u64, u64, u64)> = timeline["traceEvents"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|e| e["ph"] == "X")
        .map(|e| {
            let n = |k: &str| e[k].as_u64().unwrap();
            (n("pid"), n("tid"), n("ts"), n("ts") + n("dur"))
        })
        .collect();
    assert!(!spans.is_empty(), "the timeline is empty");
    spans.sort_by_key(|&(pid, tid, begin, end)| (pid, tid, begin, std::cmp::Reverse(end)));
    let mut open: Vec<(u64, u64, u64)> = Vec::new();
    for (pid, tid, begin, end) in spans {
        open.retain(|&(p, t, e)| (p, t) == (pid, tid) && e > begin);
        if let Some((_, _, outer)) = open.last() {
            assert!(end <= *outer, "spans of worker {pid}, track {tid} overlap at {begin}");
        }
        open.push((pid, tid, end));
    }
}

#[test]
fn a_timeline_of_three_workers_nests() {
    // A worker in the middle receives from both sides at once.
    let job = job(&[("shards: 2", "shards: 3"), ("steps: 12", "steps: 40"), ("mlp_digits", "convnet_digits")]);
    let output = job.output(&[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    nests(&serde_json::from_str(&fs::read_to_string(job.run.join("timeline.json")).unwrap()).unwrap());
}

#[test]
fn data_that_ends_early_leaves_weights_and_an_error() {
    use arrow::array::{ArrayRef, FixedSizeListArray, Float32Array, Int32Array};
    use std::sync::Arc;
    let socket = tempfile::tempdir().unwrap();
    let socket = socket.path().join("feeder");
    let job = job(&[
        ("uri: examples/data/digits.csv", &format!("socket: {}", socket.display())),
        ("    columns: {x: [\"pixel*\"], y: [label]}\n", ""),
    ]);
    let mut child = job.spawn();
    // Rows for two batches of 64, and a rest.
    let rows = 150;
    let item = Arc::new(arrow::datatypes::Field::new_list_field(arrow::datatypes::DataType::Float32, false));
    let pixels: ArrayRef = Arc::new(Float32Array::from(vec![0.5; rows * 64]));
    let x: ArrayRef = Arc::new(FixedSizeListArray::new(item, 64, pixels, None));
    let y: ArrayRef = Arc::new(Int32Array::from_iter_values((0..rows).map(|r| (r % 10) as i32)));
    let batch = arrow::array::RecordBatch::try_from_iter([("x", x), ("y", y)]).unwrap();
    let mut stream = None;
    wait_until("the job listens", || {
        stream = std::os::unix::net::UnixStream::connect(&socket).ok();
        stream.is_some()
    });
    let mut writer = arrow::ipc::writer::StreamWriter::try_new(stream.unwrap(), &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    drop(writer);
    let status = child.wait().unwrap();
    let stderr = stderr_of(&mut child);
    assert_eq!(status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("the data ended after 2 of 12 steps"), "{stderr}");
    assert!(job.run.join("weights.safetensors").exists());
    assert_eq!(job.summary()["ending"], "data ended");
}

#[test]
fn ctrl_c_writes_the_weights() {
    let job = job(&[("steps: 12", "steps: 1000000")]);
    let mut child = job.training();
    kill(child.id(), "-INT");
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130), "{}", stderr_of(&mut child));
    let weights = fs::read(job.run.join("weights.safetensors")).unwrap();
    assert_eq!(safetensors::SafeTensors::deserialize(&weights).unwrap().len(), 6);
    let logged = fs::read_to_string(job.run.join("log.jsonl")).unwrap().lines().count() as u64;
    assert_eq!(job.summary()["steps"].as_u64(), Some(logged));
    assert!(job.workers().into_iter().all(is_gone));
}

#[test]
fn a_killed_worker_ends_a_job_that_may_not_restart() {
    let job = job(&[("steps: 12", "steps: 1000000\n  failurePolicy: {maxRestarts: 0}")]);
    let mut child = job.training();
    let workers = job.workers();
    kill(workers[1], "-KILL");
    let status = child.wait().unwrap();
    let stderr = stderr_of(&mut child);
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("worker 1") && stderr.contains("SIGKILL"), "{stderr}");
    assert!(workers.into_iter().all(is_gone), "a worker is left");
    assert!(!job.run.join("weights.safetensors").exists(), "weights of a failed job");
    let summary = job.summary();
    assert_eq!(summary["ending"], "failed", "{summary}");
    assert!(summary["error"].as_str().unwrap().contains("worker 1"), "{summary}");
}

#[test]
fn no_worker_survives_a_killed_parent() {
    let job = job(&[("steps: 12", "steps: 1000000")]);
    let mut child = job.training();
    let workers = job.workers();
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("the workers end", || workers.iter().all(|&w| is_gone(w)));
    assert!(!job.run.join("weights.safetensors").exists());
}

#[test]
fn ctrl_c_is_heard_while_data_is_awaited() {
    // A feeder that never comes.
    let socket = tempfile::tempdir().unwrap();
    let socket = socket.path().join("feeder");
    let job = job(&[
        ("uri: examples/data/digits.csv", &format!("socket: {}", socket.display())),
        ("    columns: {x: [\"pixel*\"], y: [label]}\n", ""),
    ]);
    let mut child = job.spawn();
    wait_until("workers run", || {
        assert_eq!(child.try_wait().unwrap(), None, "ended early");
        job.run.join("pids.json").exists()
    });
    // Compiling takes a while; Ctrl-C is heard there too.
    std::thread::sleep(Duration::from_secs(6));
    kill(child.id(), "-INT");
    wait_until("the job ends", || child.try_wait().unwrap().is_some());
    assert_eq!(child.wait().unwrap().code(), Some(130), "{}", stderr_of(&mut child));
    assert!(job.workers().into_iter().all(is_gone));
}

#[test]
fn explains_a_plan_and_refuses_what_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let plan = directory.path().join("plan.json");
    let run = |args: &[&str]| support::foreshard().args(args).output().unwrap();
    let (bundle, path) = ("bundles/mlp_digits.bundle", plan.to_str().unwrap());
    let made = run(&["plan", bundle, "--devices", "2xcpu", "-o", path]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let said = run(&["explain", path, "--bundle", bundle]);
    assert!(said.status.success(), "{}", text(&said.stderr));
    for part in ["What limits the step", "Which constraint binds", "The next best plan", "one more device", "Verified"]
    {
        assert!(text(&said.stdout).contains(part), "{part}: {}", text(&said.stdout));
    }
    let json = run(&["explain", path, "--bundle", bundle, "-o", "json"]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["more"].as_array().unwrap().len(), 3);
    let again = run(&["plan", bundle, "--devices", "2xcpu", "--previous", path]);
    assert!(text(&again.stdout).contains("the plan in force stays"), "{}", text(&again.stdout));

    let refused = |args: &[&str], says: &str| {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains(says), "{says}: {}", text(&output.stderr));
    };
    refused(&["explain", path], "--bundle");
    refused(&["explain", path, "--bundle", bundle, "--devices", "cpu"], "the plan uses device 1");
    refused(&["explain", path, "--bundle", "bundles/char_gpt.bundle"], "made for a model");
    fs::write(&plan, "{}").unwrap();
    refused(&["explain", path, "--bundle", bundle], "not a plan");
    refused(&["explain", directory.path().to_str().unwrap()], "job.yaml");
}
