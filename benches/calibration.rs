//! Predicted against measured: what calibration makes of the log of a run, and what it tells about other plans.
//!
//! `cargo bench --profile dev --bench calibration -- BUNDLE RUN_DIR@DEVICES [RUN_DIR@DEVICES ...]`
//!
//! Calibrates on the first half of the first run, then compares with the second half of every run. Where a run changed its
//! plan, what was predicted of each new plan before it ran is compared with what it took. DEVICES as in `foreshard plan
//! --devices`, one per worker. Runs of variants of one shape only.

use std::path::Path;
use std::time::Instant;

use foreshard::graph::{ArrayShape, DType, Model};
use foreshard::plan::{Plan, Priced};
use foreshard::profile::{Calibration, Report, TensorView, Timed, profile};
use foreshard::topology::{DeviceId, Measured, parse_devices};
use foreshard::units::Seconds;
use serde_json::Value;

/// A run under one plan, as its directory tells it.
#[derive(Clone)]
struct Run {
    name: String,
    revision: u64,
    variant: String,
    priced: Priced,
    /// By step and rank.
    steps: Vec<Vec<Vec<f32>>>,
    /// By step and rank: beside executing and waiting, and between steps.
    beside: Vec<Vec<(Seconds, Option<Seconds>)>>,
    /// By step, from the end of the one before.
    seconds: Vec<f64>,
    planned: f64,
}

/// By plan, in the order in which they ran.
fn read(model: &Model, argument: &str) -> Vec<Run> {
    let (directory, devices) = argument.split_once('@').expect("RUN_DIR@DEVICES");
    let text = |name: &str| std::fs::read_to_string(Path::new(directory).join(name)).expect("a run directory");
    let topology = parse_devices(devices).expect("devices");
    let lines: Vec<Value> = text("log.jsonl").lines().map(|l| serde_json::from_str(l).expect("a log")).collect();
    let revision = |l: &Value| l["revision"].as_u64().expect("a log");
    let floats = |v: &Value| v.as_array().unwrap().iter().map(|s| s.as_f64().unwrap() as f32).collect();
    let workers = |l: &Value| l["workers"].as_array().unwrap().iter().map(|w| floats(&w["segments_s"])).collect();
    let duration = |v: &Value| v.as_f64().map(Seconds);
    let beside = |w: &Value| (duration(&w["other_s"]).unwrap_or_default(), duration(&w["turn_s"]));
    let run = |lines: &[Value]| {
        let plan = text(&format!("plans/plan-{}.json", revision(&lines[0])));
        let plan: Plan = serde_json::from_str(&plan).expect("a plan");
        Run {
            name: directory.to_owned(),
            revision: plan.revision,
            variant: plan.grads.keys().next().expect("a variant").clone(),
            priced: Priced::new(model, &topology, &plan).expect("a plan of this bundle"),
            steps: lines.iter().map(workers).collect(),
            beside: lines.iter().map(|l| l["workers"].as_array().unwrap().iter().map(beside).collect()).collect(),
            seconds: lines.iter().map(|l| l["interval_s"].as_f64().expect("a log of this release")).collect(),
            planned: plan.step_time.0,
        }
    };
    lines.chunk_by(|a, b| revision(a) == revision(b)).map(run).collect()
}

impl Run {
    fn segments(&self) -> Vec<Vec<Timed>> {
        (0..self.priced.seats().count()).map(|rank| self.priced.segments(&self.variant, rank)).collect()
    }

    /// By step and rank, the speeds seen.
    fn learn(&self, calibration: &mut Calibration, steps: std::ops::Range<usize>) -> Vec<Vec<f64>> {
        let segments = self.segments();
        let mut speeds = Vec::with_capacity(steps.len());
        for at in steps {
            let (step, beside, seconds) = (&self.steps[at], &self.beside[at], &self.seconds[at]);
            let reports: Vec<Report<'_>> = self
                .priced
                .seats()
                .zip(&segments)
                .zip(step)
                .zip(beside)
                .map(|((((device, kind), segments), seconds), &(other, turn))| Report {
                    device,
                    kind,
                    segments,
                    seconds: seconds.as_slice(),
                    other,
                    turn,
                })
                .collect();
            let seen = calibration.observe(&reports).expect("a log of this plan");
            self.priced.learn(calibration, &self.variant, self.revision, &seen, Seconds(*seconds));
            speeds.push(seen.iter().map(|o| o.speed.unwrap_or_else(|| calibration.speed(o.device))).collect());
        }
        speeds
    }

    /// What was expected of this plan before it ran, at the speeds that its workers then had, and what it took: means over
    /// its first steps, without those that compiled, moved or warmed up.
    fn foretold(&self, calibration: &mut Calibration) -> Option<(Seconds, Seconds)> {
        const WARMING: usize = 3;
        const STEPS: usize = 60;
        let before = calibration.clone();
        let speeds = self.learn(calibration, 0..self.steps.len());
        let steps = WARMING..speeds.len().min(STEPS);
        let n = steps.len() as f64;
        let expected = |speeds: &Vec<f64>| {
            let speed = |device: DeviceId| speeds[device.index()];
            self.priced.estimate(&self.variant, &before, &speed, None).expect("known").step
        };
        let measured: f64 = self.seconds.get(steps.clone())?.iter().sum();
        let expected: Seconds = speeds.get(steps)?.iter().map(expected).sum();
        (n > 0.0).then(|| (expected / n, Seconds(measured / n)))
    }

    /// As in the loop: every step of the second half is predicted by what was learned up to then.
    fn online(&self, mut calibration: Calibration) {
        let (half, nominal) = (self.steps.len() / 2, Calibration::default());
        let mut errors = [const { Vec::new() }; 4];
        for step in half..self.steps.len() {
            let speed = |device| calibration.speed(device);
            let online = self.priced.estimate(&self.variant, &calibration, &speed, None).expect("known");
            let before = self.priced.estimate(&self.variant, &nominal, &|_| 1.0, None).expect("known");
            let off = |predicted: f64, measured: f64| (predicted / measured - 1.0).abs();
            errors[0].push(off(before.step.0, self.seconds[step]));
            errors[1].push(off(online.step.0, self.seconds[step]));
            for (rank, seconds) in self.steps[step].iter().enumerate() {
                let busy = seconds.iter().map(|s| f64::from(*s)).sum();
                errors[2].push(off(before.workers[rank].busy.0, busy));
                errors[3].push(off(online.workers[rank].busy.0, busy));
            }
            self.learn(&mut calibration, step..step + 1);
        }
        let [a, b, c, d] = errors.map(|e| median(e) * 100.0);
        println!(
            "{}: median error of steps {a:.0} % nominal, {b:.0} % online; of workers' busy time {c:.0} %, {d:.0} %",
            self.name
        );
    }

    /// One line per segment, then the step.
    fn compare(&self, calibration: &Calibration) {
        let half = self.steps.len() / 2;
        println!("{} · variant {}", self.name, self.variant);
        println!(
            "  {:<16} {:>10} {:>10} {:>7} {:>10} {:>7}",
            "segment", "measured", "nominal", "off", "calibrated", "off"
        );
        let line = |what: &str, measured: f64, nominal: f64, calibrated: f64| {
            let off = |p: f64| format!("{:+.0} %", (p / measured - 1.0) * 100.0);
            let ms = |s: f64| format!("{:.3} ms", s * 1e3);
            let (a, b) = (off(nominal), off(calibrated));
            println!("  {what:<16} {:>10} {:>10} {a:>7} {:>10} {b:>7}", ms(measured), ms(nominal), ms(calibrated));
        };
        for (rank, segments) in self.segments().iter().enumerate() {
            let (device, kind) = self.priced.seats().nth(rank).expect("a seat");
            let measured = calibration.measured(device, kind);
            let mut sums = [0.0; 3];
            for (i, timed) in segments.iter().enumerate() {
                let seen = median(self.steps[half..].iter().map(|s| f64::from(s[rank][i])).collect());
                let (nominal, by) = (timed.time(&Measured::NOMINAL).0, timed.time(&measured).0);
                line(&format!("{rank}.{i} x{}", timed.runs), seen, nominal, by);
                for (sum, new) in sums.iter_mut().zip([seen, nominal, by]) {
                    *sum += new;
                }
            }
            line(&format!("worker {rank}"), sums[0], sums[1], sums[2]);
        }
        let estimate =
            |c: &Calibration| self.priced.estimate(&self.variant, c, &|_: DeviceId| 1.0, None).expect("known");
        let seen = median(self.seconds[half..].to_vec());
        line("step", seen, estimate(&Calibration::default()).step.0, estimate(calibration).step.0);
        println!(
            "  (the planner said {:.3} ms; a step takes {:.2} times what explains it)",
            self.planned * 1e3,
            calibration.stretch()
        );
    }
}

/// Plans of a run, each predicted before it ran.
fn moves(run: &[Run]) {
    let mut calibration = Calibration::default();
    let mut errors = Vec::new();
    for (i, plan) in run.iter().enumerate() {
        let foretold = plan.foretold(&mut calibration);
        let Some((expected, measured)) = foretold.filter(|_| i > 0) else { continue };
        let (off, late) = (expected / measured - 1.0, calibration.lateness());
        let (name, revision) = (&plan.name, plan.revision);
        println!(
            "{name}: plan {revision} expected {expected}, took {measured}, off by {:+.0} %; messages are late by {late} after it",
            off * 100.0
        );
        errors.push(off.abs());
    }
    if !errors.is_empty() {
        println!("plans that had not run: median error {:.0} %", median(errors) * 100.0);
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What looking at a batch costs.
fn batches() {
    println!("  {:>10} {:>12} {:>10} {:>12}", "elements", "bytes", "touched", "time");
    for elements in [1u64 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 24] {
        let rows = elements / 256;
        let shape = |dtype| ArrayShape::new(dtype, vec![rows, 256]);
        let (ids, values) = (shape(DType::Int32), shape(DType::Float32));
        let mut tokens = vec![1u8; ids.bytes().0 as usize];
        tokens.chunks_mut(1024).enumerate().for_each(|(i, row)| row[(i * 37) % 1024..].fill(0));
        let floats = vec![1u8; values.bytes().0 as usize];
        let views = [
            TensorView { name: "tokens", shape: &ids, data: &tokens, padded: true },
            TensorView { name: "values", shape: &values, data: &floats, padded: false },
        ];
        let mut times = Vec::new();
        let mut touched = 0;
        for _ in 0..21 {
            let began = Instant::now();
            touched = std::hint::black_box(profile("mb", &views).expect("a batch")).touched;
            times.push(began.elapsed().as_secs_f64());
        }
        let bytes = ids.bytes() + values.bytes();
        println!("  {:>10} {:>12} {touched:>10} {:>9.1} us", 2 * elements, bytes.to_string(), median(times) * 1e6);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    batches();
    let Some((bundle, runs)) = arguments.split_first() else { return };
    let mut fetch = |file: &str| std::fs::read(Path::new(bundle).join(file));
    let model = Model::import(&mut fetch).expect("a bundle");
    let plans: Vec<Vec<Run>> = runs.iter().map(|r| read(&model, r)).collect();
    // Each by the plan that it ended with.
    let runs: Vec<Run> = plans.iter().filter_map(|plans| plans.last().cloned()).collect();
    let mut calibration = Calibration::default();
    let Some(first) = runs.first() else { return };
    let began = Instant::now();
    for _ in 0..100 {
        std::hint::black_box(first.priced.estimate(&first.variant, &calibration, &|_| 1.0, None));
    }
    println!("a batch is predicted in {:.1} us", began.elapsed().as_secs_f64() * 1e4);
    first.learn(&mut calibration, 0..first.steps.len() / 2);
    for run in &runs {
        run.compare(&calibration);
    }
    for run in &runs {
        run.online(calibration.clone());
    }
    for run in &plans {
        moves(run);
    }
    first.learn(&mut calibration, first.steps.len() / 2..first.steps.len());
    for w in calibration.summary() {
        let (m, s) = (w.measured, w.speed);
        println!(
            "{:?}: products x{:.2}, memory x{:.2}, other x{:.2}, launches x{:.2}; speed {:.2} ± {:.2}; error {:.0} %, nominal {:.0} %",
            w.device,
            m.product,
            m.memory,
            m.other,
            m.launch,
            s.value,
            s.spread,
            w.error * 100.0,
            w.nominal_error * 100.0
        );
    }
}
