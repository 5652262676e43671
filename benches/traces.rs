//! Forecasts and decisions on series that others recorded, against what they have to reach at least:
//!
//!     cargo bench --profile dev --bench traces -- DIR
//!
//! DIR holds one folder per origin (M4 hourly, Crane's CPU usage, Azure's long-lived machines, Alibaba PAI's mini-batch
//! times), as CSV or gzipped. Panics where less is reached.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;

use foreshard::{forecast, plan, transition, units};
use world::{Noise, Story, World};

#[path = "../src/transition/tests/world.rs"]
#[allow(dead_code)]
mod world;

/// The text of a file below the directory of traces.
fn trace(path: &str) -> String {
    let directory = std::env::args().nth(1).filter(|a| !a.starts_with('-'));
    let path = PathBuf::from(directory.expect("give the directory of traces")).join(path);
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut text = String::new();
    match path.extension().is_some_and(|e| e == "gz") {
        true => flate2::read::GzDecoder::new(&bytes[..]).read_to_string(&mut text).unwrap(),
        false => (&bytes[..]).read_to_string(&mut text).unwrap(),
    };
    text
}

/// Values of a column by the text of another.
fn columns(text: &str, key: usize, value: usize) -> BTreeMap<String, Vec<f64>> {
    let mut out: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for line in text.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        if let Some(v) = cells[value].parse::<f64>().ok().filter(|v| *v > 0.0) {
            out.entry(cells[key].to_owned()).or_default().push(v);
        }
    }
    out
}

/// Plays series as the speeds of workers, one value for `hold` seconds, and lets the loop run.
fn play(speeds: &[Vec<f64>], hold: f64, until: f64) -> Story {
    let speed = |w: usize, t: f64| speeds[w][((t / hold) as usize).min(speeds[w].len() - 1)];
    let noise = Noise { sigma: 0.03, spikes: 0.0, pauses: (f64::INFINITY, 0.0) };
    World { noise, ..World::new(0.5, speeds.len(), speed) }.run(until, 1)
}

fn forecasts_of_m4_hourly_are_better_than_the_season_before() {
    let (train, test) = (trace("m4_hourly/Hourly-train.csv.gz"), trace("m4_hourly/Hourly-test.csv.gz"));
    let values = |line: &str| -> Vec<f64> { line.split(',').skip(1).map(|v| v.parse().unwrap()).collect() };
    let (mut ours, mut naive, mut held, mut n) = (0.0, 0.0, 0, 0);
    for (past, future) in train.lines().zip(test.lines()).step_by(4) {
        let (past, future) = (values(past), values(future));
        let scale = past[24..].iter().zip(&past).map(|(a, b)| (a - b).abs()).sum::<f64>() / (past.len() - 24) as f64;
        let series = forecast::Series::new(units::Seconds(0.0), units::Seconds(3600.0), past.clone()).unwrap();
        let f = forecast::forecast(&series, future.len(), &forecast::Settings::default()).unwrap();
        for (i, v) in future.iter().enumerate() {
            ours += (v - f.mean[i]).abs() / scale;
            naive += (v - past[past.len() - 24 + i % 24]).abs() / scale;
            held += usize::from((f.lower[i]..=f.upper[i]).contains(v));
            n += 1;
        }
    }
    let (ours, naive, held) = (ours / n as f64, naive / n as f64, held as f64 / n as f64);
    println!("MASE {ours:.3}, of the season before {naive:.3}; {held:.3} of the values held, 0.9 asked for");
    assert!(ours < 0.9 * naive, "MASE {ours}, of the season before {naive}");
    assert!((0.8..0.97).contains(&held), "{held} of the values held");
}

fn machines_as_they_drift_by_themselves_move_nothing() {
    for what in ["mlc_read_bandwidth_mib_per_s", "sysbench_cpu_events_per_s"] {
        let text = trace(&format!("azure_vmnoise2024/{what}_westus2.csv.gz"));
        let relative = |v: &Vec<f64>| v.iter().map(|x| x / forecast::robust::median(v)).collect();
        let speeds: Vec<Vec<f64>> = columns(&text, 3, 0).values().take(3).map(relative).collect();
        let story = play(&speeds, 30.0, 3600.0);
        assert!(story.adopted().is_empty(), "{what}: {}", story.told());
    }
}

fn neighbours_with_a_daily_rhythm_are_worked_around() {
    for i in [0, 8, 14] {
        let text = trace(&format!("crane_dsp/input{i}.csv.gz"));
        let usage: Vec<f64> = text.lines().skip(1).map(|l| l.split(',').nth(1).unwrap().parse().unwrap()).collect();
        let most = usage.iter().copied().fold(0.0, f64::max);
        // A neighbour takes up to 60 % of one worker; a day lasts 12 minutes.
        let slowed: Vec<f64> = usage.iter().map(|u| 1.0 - 0.6 * u / most).collect();
        let free = vec![1.0; slowed.len()];
        let story = play(&[free.clone(), slowed, free], 0.5, 3600.0);
        println!("input{i}: {} moves saved {:.3}", story.adopted().len(), story.saved);
        assert!(story.saved > 0.03, "input{i}: saved {}: {}", story.saved, story.told());
    }
}

fn stragglers_of_real_jobs_cost_little() {
    for job in [1, 2, 4] {
        let text = trace(&format!("alibaba_pai_minibatch2020/job_{job}_norm.csv.gz"));
        let speeds = |v: &Vec<f64>| v.iter().map(|x| forecast::robust::median(v) / x).collect();
        let speeds: Vec<Vec<f64>> = columns(&text, 0, 3).values().take(3).map(speeds).collect();
        let story = play(&speeds, 0.5, 600.0);
        println!("job {job}: {} moves saved {:.3}", story.adopted().len(), story.saved);
        // Job 4 is slow for its first seconds: the loop answers that, and is careful from then on.
        assert!(story.saved > -0.06, "job {job}: saved {}: {}", story.saved, story.told());
    }
}

/// Two workers, each beside a neighbour of its own that takes up to 60 % of its core; a move takes 0.6 s and costs 0.1 s,
/// as between plans that have run before.
fn foresight_is_no_worse_than_hindsight() {
    let usage = |i: usize, first: usize| -> Vec<f64> {
        let text = trace(&format!("crane_dsp/input{i}.csv.gz"));
        let values: Vec<f64> = text.lines().skip(1).map(|l| l.split(',').nth(1).unwrap().parse().unwrap()).collect();
        let means: Vec<f64> = values.chunks_exact(15).map(|c| c.iter().sum::<f64>() / 15.0).collect();
        let most = forecast::robust::quantile(&means, 0.99);
        let share = |i: usize| 1.0 - 0.6 * (means[(first + i) % means.len()] / most).min(1.0);
        (0..4 * 96).map(share).collect()
    };
    for day in [60.0, 300.0] {
        let mut gains = [Vec::new(), Vec::new()];
        let pairs = [(14, 0, 48, 0), (0, 1, 0, 96), (11, 12, 0, 48), (3, 6, 30, 0), (7, 8, 0, 0), (4, 8, 100, 0)];
        for (a, b, from_a, from_b) in pairs {
            let speeds = [usage(a, from_a), usage(b, from_b)];
            // Full speed for half a minute, to compare with.
            let at =
                |w: usize, t: f64| if t < 30.0 { 1.0 } else { speeds[w][((t - 30.0) / day * 96.0) as usize % 384] };
            let noise = Noise { sigma: 0.05, spikes: 0.01, pauses: (f64::INFINITY, 0.0) };
            for (forecast, gains) in [false, true].into_iter().zip(&mut gains) {
                let mut world = World { noise, pause: 0.1, prepare: 0.6, ..World::new(0.19, 2, at) };
                let (horizon, dwell, cooldown) = (units::Seconds(day), units::Seconds(1.0), units::Seconds(2.0));
                let given = std::mem::take(&mut world.settings);
                let (threshold, min_gain) = (0.1, 0.05);
                world.settings =
                    transition::Settings { horizon, dwell, cooldown, threshold, min_gain, forecast, ..given };
                world.settings.budget.share = 0.2;
                gains.push(1.0 / (1.0 - world.run(30.0 + 4.0 * day, 1).saved));
            }
        }
        let [hindsight, foresight] = gains.map(|all: Vec<f64>| all.iter().sum::<f64>() / all.len() as f64);
        println!("days of {day} s: {hindsight:.3} of a static plan without forecasts, {foresight:.3} with them");
        assert!(foresight > hindsight - 0.01, "{foresight} with forecasts, {hindsight} without");
    }
}

fn main() {
    forecasts_of_m4_hourly_are_better_than_the_season_before();
    machines_as_they_drift_by_themselves_move_nothing();
    neighbours_with_a_daily_rhythm_are_worked_around();
    stragglers_of_real_jobs_cost_little();
    foresight_is_no_worse_than_hindsight();
}
