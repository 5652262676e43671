//! Shown correct: a head whose workers come from elsewhere trains as `foreshard local run` does, whichever of them is
//! killed, as long as somebody starts it anew. Pods do the same on a cluster: e2e/run.py.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use foreshard::device::pjrt::CPU_KERNELS;
use foreshard::tls::{Authority, Certificate, FILES, Name};
use foreshard::topology::parse_devices;
use foreshard::wire::report::{JobReport, JobState};
use serde_json::Value;

const STEPS: u64 = 1500;
/// Devices of a head are nominal, those of this machine are not: cuts may differ, and with them the order of some sums.
const ROUNDING: f32 = 2e-4;
const TOKEN: &str = "a secret";

/// A job, and the processes that keep it going.
struct Gang {
    directory: PathBuf,
    ports: [u16; 2],
    head: Child,
    workers: [Child; 2],
}

impl Drop for Gang {
    fn drop(&mut self) {
        for child in self.workers.iter_mut().chain([&mut self.head]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn manifest(directory: &Path) -> PathBuf {
    let path = directory.join("job.yaml");
    let yaml = format!(
        "apiVersion: foreshard.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: gang}}\nspec:\n  \
         bundle: bundles/mlp_digits.bundle\n  \
         data: {{uri: examples/data/digits.csv, columns: {{x: ['pixel*'], y: [label]}}}}\n  \
         steps: {STEPS}\n  parallelism: {{shards: 2, microbatch: 16}}\n  checkpoint: {{everySteps: 100}}\n  \
         adaptation: {{mode: Off}}\n"
    );
    fs::write(&path, yaml).unwrap();
    path
}

fn head(directory: &Path, ports: [u16; 2]) -> Child {
    let mut command = support::foreshard();
    command.arg("head").arg(directory.join("job.yaml")).arg("--devices").arg(directory.join("devices.json"));
    command.args(["--listen", &format!("127.0.0.1:{}", ports[0]), "--status", &format!("127.0.0.1:{}", ports[1])]);
    command.arg("--results").arg(directory.join("results")).arg("--last-words").arg(directory.join("words"));
    let log = fs::File::options().create(true).append(true).open(directory.join("head.log")).unwrap();
    command.arg("--tls").arg(directory.join("head"));
    command.env("FORESHARD_TOKEN", TOKEN).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

fn worker(directory: &Path, port: u16, n: usize) -> Child {
    let mut command = support::foreshard();
    command.args(["worker", "--connect", &format!("localhost:{port}"), "--patience", "60", "--worker", &n.to_string()]);
    command.arg("--plugin").arg(support::plugin().find().unwrap().path());
    command.arg("--breadcrumb").arg(directory.join(format!("crumb-{n}")));
    command.arg("--tls").arg(directory.join(format!("worker-{n}")));
    command.env("FORESHARD_TOKEN", TOKEN).env("XLA_FLAGS", CPU_KERNELS);
    let log = fs::File::options().create(true).append(true).open(directory.join(format!("worker-{n}.log"))).unwrap();
    command.stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

/// A directory with a certificate for the head and for each worker.
fn certify(directory: &Path) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    let valid = now - 3600..now + 3600;
    let authority = Authority::new(&[7; 32], "gang", valid.clone()).unwrap();
    let write = |name: Name, issued: Certificate| {
        let own = directory.join(name.to_string());
        fs::create_dir(&own).unwrap();
        let texts = [issued.authority, issued.certificate, issued.key];
        FILES.iter().zip(texts).for_each(|(file, text)| fs::write(own.join(file), text).unwrap());
    };
    let issue = |authority: &Authority, name| authority.issue(name, valid.clone()).unwrap();
    for name in [Name::Head, Name::Worker(0), Name::Worker(1)] {
        write(name, issue(&authority, name));
    }
    // One that knows whom to trust, and has its own certificate from another job.
    let other = issue(&Authority::new(&[8; 32], "other", valid.clone()).unwrap(), Name::Worker(2));
    write(Name::Worker(2), Certificate { authority: issue(&authority, Name::Worker(2)).authority, ..other });
}

/// What a head and its workers find in a directory, and two free ports.
fn prepare(directory: &Path) -> [u16; 2] {
    manifest(directory);
    let devices = serde_json::to_string(&parse_devices("2xcpu").unwrap()).unwrap();
    fs::write(directory.join("devices.json"), devices).unwrap();
    certify(directory);
    let free = || TcpListener::bind("127.0.0.1:0").unwrap();
    [free(), free()].map(|s| s.local_addr().unwrap().port())
}

impl Gang {
    fn start(directory: &Path) -> Self {
        let ports = prepare(directory);
        // Workers may be there before their head.
        let workers = [0, 1].map(|n| worker(directory, ports[0], n));
        Self { directory: directory.to_owned(), ports, head: head(directory, ports), workers }
    }

    /// Starts anew what has ended badly, as a kubelet does. The head's code once it has ended well.
    fn tend(&mut self) -> Option<i32> {
        for (n, child) in self.workers.iter_mut().enumerate() {
            if child.try_wait().unwrap().is_some_and(|status| !status.success()) {
                *child = worker(&self.directory, self.ports[0], n);
            }
        }
        let status = self.head.try_wait().unwrap()?;
        if status.code() == Some(0) {
            return Some(0);
        }
        self.head = head(&self.directory, self.ports);
        None
    }

    fn until(&mut self, what: &str, seen: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !seen(self) {
            let ended = self.tend().is_some();
            let log = fs::read_to_string(self.directory.join("head.log")).unwrap_or_default();
            assert!(!ended, "the job ended before {what}: {log}");
            assert!(Instant::now() < deadline, "{what} did not happen: {log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn losses(&self) -> BTreeMap<u64, f32> {
        let runs = (1..10).map(|n| self.directory.join(format!("results/run-{n}/log.jsonl")));
        runs.filter_map(|log| fs::read_to_string(log).ok()).flat_map(|log| losses(&log)).collect()
    }

    /// Of the first run, in the order in which they were taken.
    fn steps(&self) -> Vec<u64> {
        let log = fs::read_to_string(self.directory.join("results/run-1/log.jsonl")).unwrap_or_default();
        log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok()?["step"].as_u64()).collect()
    }

    fn words(&self) -> JobReport {
        serde_json::from_str(&fs::read_to_string(self.directory.join("words")).unwrap()).unwrap()
    }
}

fn losses(log: &str) -> BTreeMap<u64, f32> {
    let lines = log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    lines.map(|l| (l["step"].as_u64().unwrap(), l["loss"].as_f64().unwrap() as f32)).collect()
}

#[test]
fn a_worker_that_is_told_to_go_takes_nothing_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let mut gang = Gang::start(directory.path());
    gang.until("130 steps", |g| g.losses().len() > 130);
    let pid = gang.workers[1].id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let ended = gang.workers[1].wait().unwrap();
    assert_eq!(ended.code(), Some(128 + 15), "it ends by itself");
    let steps = gang.steps();
    gang.until("50 more", |g| g.losses().len() > steps.len() + 50);
    let steps = gang.steps();
    assert!(steps.iter().copied().eq(0..steps.len() as u64), "steps were lost or taken twice: {steps:?}");
}

/// A node that is emptied tells all its workers at once. All but the first used to be forgotten, stayed until their time was
/// up (100 s), and then took the steps since the last checkpoint with them.
#[test]
fn workers_that_are_told_to_go_together_go_together_and_take_nothing_with_them() {
    let directory = tempfile::tempdir().unwrap();
    let mut gang = Gang::start(directory.path());
    gang.until("130 steps", |g| g.losses().len() > 130);
    let pids = [0, 1].map(|n: usize| gang.workers[n].id().to_string());
    assert!(Command::new("kill").arg("-TERM").args(pids).status().unwrap().success());
    let deadline = Instant::now() + Duration::from_secs(30);
    for worker in &mut gang.workers {
        let ended = loop {
            match worker.try_wait().unwrap() {
                Some(ended) => break ended,
                None => assert!(Instant::now() < deadline, "it stays although nothing keeps it"),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(ended.code(), Some(128 + 15), "it ends by itself");
    }
    let steps = gang.steps();
    gang.until("50 more", |g| g.losses().len() > steps.len() + 50);
    let steps = gang.steps();
    assert!(steps.iter().copied().eq(0..steps.len() as u64), "steps were lost or taken twice: {steps:?}");
}

#[test]
fn a_worker_of_another_job_is_turned_away_and_both_say_why() {
    let directory = tempfile::tempdir().unwrap();
    let ports = prepare(directory.path());
    let mut head = head(directory.path(), ports);
    let status = worker(directory.path(), ports[0], 2).wait().unwrap();
    let log = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
    // The worker may read its refusal, and end, before the head has written its own line.
    let deadline = Instant::now() + Duration::from_secs(60);
    while !log("head.log").contains("turned away") && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    head.kill().unwrap();
    head.wait().unwrap();
    assert_eq!(status.code(), Some(1));
    let said = log("worker-2.log");
    assert!(said.contains("it refuses this side's certificate: it is of another job"), "{said}");
    let said = log("head.log");
    assert!(said.contains("turned away") && said.contains("its certificate is not of this job"), "{said}");
}

#[test]
fn a_gang_survives_the_loss_of_a_worker_and_of_its_head() {
    let directory = tempfile::tempdir().unwrap();
    let mut gang = Gang::start(directory.path());
    gang.until("200 steps", |g| g.losses().len() > 200);
    gang.workers[1].kill().unwrap();
    gang.until("200 more", |g| g.losses().len() > 400);
    gang.head.kill().unwrap();
    gang.until("a second run", |g| g.directory.join("results/run-2/log.jsonl").exists());
    let deadline = Instant::now() + Duration::from_secs(120);
    while gang.tend().is_none() {
        assert!(Instant::now() < deadline, "the job does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
    let words = gang.words();
    assert_eq!((words.state, words.step, words.steps), (JobState::Done, STEPS, STEPS));
    assert!(gang.directory.join("results/run-2/weights.safetensors").is_file());

    let calm = gang.directory.join("calm");
    let mut command = support::foreshard();
    command.args(["local", "run", "--quiet"]).arg(gang.directory.join("job.yaml")).arg("--run-dir").arg(&calm);
    assert!(command.status().unwrap().success());
    let (found, expected) = (gang.losses(), losses(&fs::read_to_string(calm.join("log.jsonl")).unwrap()));
    assert_eq!(found.len(), expected.len());
    for (step, loss) in &expected {
        let off = (found[step] - loss).abs();
        assert!(off <= ROUNDING * loss.abs().max(1.0), "step {step}: {} instead of {loss}", found[step]);
    }

    // Nobody has heard that it is done: a head that is started again says so, without workers, and with its weights.
    let weights = gang.directory.join("results/run-2/weights.safetensors");
    let before = support::read_tensors(&weights);
    fs::remove_file(&weights).unwrap();
    gang.head = head(directory.path(), gang.ports);
    assert_eq!(gang.head.wait().unwrap().code(), Some(0));
    assert_eq!(gang.words().state, JobState::Done);
    assert_eq!(support::read_tensors(&weights), before);
}
