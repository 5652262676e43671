//! A job on a few workers, in virtual time.

use crate::forecast::{self, Gap, Series, forecast};
use crate::plan::ShardId;
use crate::transition::*;
use crate::units::{Bytes, Seconds};

/// Repeatable randomness.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    /// From 0 to 1.
    pub fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }
}

/// What disturbs the steps of a job.
#[derive(Clone, Copy)]
pub struct Noise {
    /// Of the logarithm of each worker's time.
    pub sigma: f64,
    /// Share of steps in which one worker takes several times as long.
    pub spikes: f64,
    /// Seconds between pauses, as garbage collection makes them.
    pub pause_every: f64,
    pub pause: f64,
}

pub const QUIET: Noise = Noise { sigma: 0.02, spikes: 0.0, pause_every: f64::INFINITY, pause: 0.0 };
pub const USUAL: Noise = Noise { sigma: 0.08, spikes: 0.01, pause_every: 45.0, pause: 0.6 };

pub struct World<'a> {
    pub settings: Settings,
    /// Speed of a worker's device at a time.
    pub speed: Box<dyn Fn(usize, f64) -> f64 + 'a>,
    pub noise: Noise,
    pub n_workers: usize,
    /// Computing time of a step on all workers together, at nominal speed.
    pub work: f64,
    pub steps: Option<u64>,
    /// What a cutover takes.
    pub pause: f64,
    pub prepare: f64,
    /// Every record that was written.
    pub records: Vec<Record>,
    /// Time and plan of every cutover.
    pub cutovers: Vec<(f64, Vec<f64>)>,
}

impl<'a> World<'a> {
    pub fn new(step: f64, n_workers: usize, speed: impl Fn(usize, f64) -> f64 + 'a) -> Self {
        Self {
            settings: Settings::default(),
            speed: Box::new(speed),
            noise: USUAL,
            n_workers,
            work: step * n_workers as f64,
            steps: None,
            pause: 1.0,
            prepare: 3.0,
            records: Vec::new(),
            cutovers: Vec::new(),
        }
    }

    /// Times of decisions to adopt.
    pub fn adopted(&self) -> Vec<f64> {
        let adopt = |r: &&Record| matches!(r.decision, Decision::Adopt { .. });
        self.records.iter().filter(adopt).map(|r| r.snapshot.time.0).collect()
    }

    /// The share of time saved against never moving, cutovers included.
    pub fn run(&mut self, until: f64, seed: u64) -> f64 {
        let n = self.n_workers;
        let even = vec![1.0 / n as f64; n];
        let mut dice = Dice::new(seed);
        let mut plan = even.clone();
        let mut left: Option<Vec<f64>> = None;
        let (mut time, mut step, mut revision, mut unmoved) = (0.0, 0u64, 1u64, 0.0);
        let mut since = (0u64, 0.0, self.work / n as f64);
        let mut step_times = Tracker::default();
        let mut busy = vec![Tracker::default(); n];
        let mut speeds_seen = vec![Tracker::default(); n];
        let mut samples: Vec<Vec<(Seconds, f64)>> = vec![Vec::new(); n];
        let mut forecasts: Vec<Option<forecast::Forecast>> = vec![None; n];
        let (mut next_forecast, mut next_pause) = (0.0, self.noise.pause_every);
        let mut solving: Option<f64> = None;
        let mut proposal: Option<(Proposal, Vec<Vec<f64>>)> = None;
        let mut in_flight: Option<(f64, u64, Vec<f64>)> = None;
        let mut considered = None;
        let mut moves: Vec<Move> = Vec::new();
        let mut ledger = Ledger::default();
        let mut predicted_busy: Vec<f64> = plan.iter().map(|x| x * self.work).collect();
        while time < until && self.steps.is_none_or(|s| step < s) {
            // One step.
            let speeds: Vec<f64> = (0..n).map(|w| (self.speed)(w, time)).collect();
            let spiky = (dice.uniform() < self.noise.spikes).then(|| (dice.uniform() * n as f64) as usize);
            let mut seconds = 0.0f64;
            let mut pure = 0.0f64;
            for w in 0..n {
                let noise = (self.noise.sigma * dice.normal()).exp();
                let spike = if spiky == Some(w) { 2.0 + 4.0 * dice.uniform() } else { 1.0 };
                let mine = plan[w] * self.work / speeds[w] * noise * spike;
                seconds = seconds.max(mine);
                pure = pure.max(self.work * even[w] / speeds[w] * noise * spike);
                busy[w].push(Seconds(mine), mine);
                samples[w].push((Seconds(time), plan[w] * self.work / mine));
                speeds_seen[w].push(Seconds(mine), plan[w] * self.work / mine);
            }
            if time >= next_pause {
                seconds += self.noise.pause * (1.0 + dice.uniform());
                next_pause += self.noise.pause_every;
            }
            time += seconds;
            unmoved += pure;
            step += 1;
            step_times.push(Seconds(seconds), seconds);

            // Observe and forecast.
            let interval =
                forecast::interval(self.settings.horizon, Seconds(step_times.observed().now().unwrap_or(seconds)));
            let ahead_steps = (self.settings.horizon / interval).ceil() as usize;
            if time >= next_forecast {
                next_forecast = time + interval.0;
                for w in 0..n {
                    let kept = samples[w].partition_point(|s| s.0.0 < time - 5.0 * self.settings.horizon.0);
                    samples[w].drain(..kept);
                    let series = Series::resample(&samples[w], interval, Gap::Bridge(64)).unwrap();
                    let settings = forecast::Settings { least: Some(0.01), ..Default::default() };
                    forecasts[w] = Some(forecast(&series, ahead_steps, &settings).unwrap());
                }
            }
            let now: Vec<f64> = (0..n)
                .map(|w| {
                    let latest = &samples[w][samples[w].len().saturating_sub(9)..];
                    forecast::robust::median(&latest.iter().map(|s| s.1).collect::<Vec<_>>())
                })
                .collect();
            for (f, speeds) in forecasts.iter_mut().zip(&speeds_seen) {
                if let (Some(f), Some(level)) = (f, speeds.observed().levels(self.settings.dwell).next()) {
                    f.anchor(&level, 0.1);
                }
            }
            let takes = |plan: &[f64], speeds: &[f64]| -> f64 {
                (0..n).map(|w| plan[w] * self.work / speeds[w]).fold(0.0, f64::max)
            };
            if let Some(left) = &left {
                ledger.note(Seconds(seconds), Seconds(takes(left, &now)), Seconds(takes(&plan, &now)));
                moves.last_mut().unwrap().gain.measured = ledger.gain();
            }

            // The planner answers.
            if solving.is_some_and(|done| time >= done) {
                solving = None;
                let ahead = |i: usize| -> Vec<f64> {
                    (0..n).map(|w| forecasts[w].as_ref().map_or(now[w], |f| f.mean[i.min(f.horizon() - 1)])).collect()
                };
                let of = |per_worker: &dyn Fn(usize) -> f64| -> Vec<f64> { (0..n).map(per_worker).collect() };
                let futures = [
                    now.clone(),
                    of(&|w| forecasts[w].as_ref().map_or(now[w], |f| f.min().band.mean)),
                    of(&|w| forecasts[w].as_ref().map_or(now[w], |f| f.average().mean)),
                    of(&|w| forecasts[w].as_ref().map_or(now[w], |f| f.max().band.mean)),
                ];
                let plans: Vec<Vec<f64>> = futures
                    .iter()
                    .map(|speeds| speeds.iter().map(|s| s / speeds.iter().sum::<f64>()).collect::<Vec<f64>>())
                    .filter(|p: &Vec<f64>| p.iter().zip(&plan).any(|(a, b)| (a - b).abs() > 0.01))
                    .collect();
                let candidates = plans.iter().enumerate().map(|(i, p)| Candidate {
                    revision: revision + 1 + i as u64,
                    made: Seconds(time),
                    interval,
                    running: (0..ahead_steps).map(|i| Seconds(takes(&plan, &ahead(i)))).collect(),
                    step_times: (0..ahead_steps).map(|i| Seconds(takes(p, &ahead(i)))).collect(),
                    memory: vec![Bytes(1 << 30); n],
                    bytes_to_move: Bytes(1 << 20),
                    pause: Seconds(0.8 * self.pause),
                    prepare: Seconds(self.prepare),
                });
                let candidates: Vec<Candidate> = candidates.collect();
                let answer = if candidates.is_empty() { Proposal::Same } else { Proposal::Plans(candidates) };
                proposal = Some((answer, plans));
            }

            // Decide.
            let snapshot = Snapshot {
                step,
                time: Seconds(time),
                steps_left: self.steps.map(|s| s - step),
                settings: self.settings.clone(),
                running: Running {
                    revision,
                    since_step: since.0,
                    since: Seconds(since.1),
                    predicted: Seconds(since.2),
                    observed: step_times.observed(),
                },
                workers: (0..n)
                    .map(|w| Worker {
                        rank: w as u32,
                        shard: ShardId(w as u32),
                        predicted_busy: Seconds(predicted_busy[w]),
                        busy: busy[w].observed(),
                        speed: now[w],
                        speed_forecast: forecasts[w].clone(),
                        memory: Memory {
                            planned: Bytes(1 << 30),
                            used: Bytes(1 << 30),
                            limit: Bytes(4 << 30),
                            forecast: None,
                        },
                    })
                    .collect(),
                proposal: proposal.as_ref().map(|p| p.0.clone()),
                moves: moves.clone(),
                in_flight: in_flight.as_ref().map(|f| f.1),
                considered: considered.clone(),
                approved: None,
            };
            let decision = decide(&snapshot);
            match &decision {
                Decision::Wait { reason: Wait::Unsolved, .. } if solving.is_none() => solving = Some(time + 0.5),
                Decision::Adopt { revision: chosen, balance, .. } => {
                    let (answer, plans) = proposal.take().expect("adopted what was proposed");
                    let Proposal::Plans(candidates) = answer else { panic!("adopted no plan") };
                    let i = candidates.iter().position(|c| c.revision == *chosen).unwrap();
                    in_flight = Some((time + self.prepare, *chosen, plans[i].clone()));
                    moves.push(Move {
                        revision: *chosen,
                        step,
                        time: Seconds(time),
                        pause: Measured { expected: candidates[i].pause, measured: None },
                        prepare: Measured { expected: candidates[i].prepare, measured: Some(Seconds(self.prepare)) },
                        gain: Measured { expected: balance.share, measured: None },
                    });
                }
                _ => {}
            }
            if let Some(settled) = snapshot.settled(&decision) {
                considered = Some(settled);
                proposal = None;
            }
            self.records.push(Record { snapshot, decision });

            // Cut over.
            if let Some((_, chosen, new)) = in_flight.take_if(|f| time >= f.0) {
                time += self.pause;
                let cut = moves.last_mut().unwrap();
                (cut.step, cut.time, cut.pause.measured) = (step, Seconds(time), Some(Seconds(self.pause)));
                self.cutovers.push((time, new.clone()));
                left = Some(std::mem::replace(&mut plan, new));
                revision = chosen;
                since = (step, time, takes(&plan, &now));
                predicted_busy = (0..n).map(|w| plan[w] * self.work / now[w]).collect();
                (considered, proposal, ledger) = (None, None, Ledger::default());
                step_times.reset();
                busy.iter_mut().for_each(Tracker::reset);
            }
        }
        1.0 - time / unmoved
    }
}
