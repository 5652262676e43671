//! A job on a few workers, in virtual time: the loop around `decide`, with a planner that splits work by speed.

use crate::forecast::{self, Forecast, Gap, Series, robust};
use crate::plan::ShardId;
use crate::plan::foreseen::{CAUTIOUS, Outlook, View};
use crate::transition::*;
use crate::units::{Bytes, Seconds};

/// Intervals that are the near future.
const NEAR: usize = 4;

/// Repeatable randomness.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    /// From 0 to 1 (splitmix64).
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
    /// Standard deviation of the logarithm of each worker's time.
    pub sigma: f64,
    /// Share of steps in which one worker takes two to six times as long.
    pub spikes: f64,
    /// Seconds between pauses of the whole job, as garbage collection makes them, and how long they are at least.
    pub pauses: (f64, f64),
}

pub const USUAL: Noise = Noise { sigma: 0.08, spikes: 0.01, pauses: (45.0, 0.6) };

/// Steps of a real job that nothing disturbed.
pub struct Recording {
    /// Seconds of each step, and of each worker's own work in it.
    steps: Vec<(f64, Vec<f64>)>,
    /// Medians of both.
    usual: (f64, Vec<f64>),
}

impl Recording {
    /// Of lines with the microseconds of a step and of each worker; lines with `#` are remarks.
    pub fn parse(text: &str) -> Self {
        let row = |line: &str| -> (f64, Vec<f64>) {
            let mut numbers = line.split(',').map(|n| n.parse::<f64>().expect("a number") / 1e6);
            (numbers.next().expect("a step"), numbers.collect())
        };
        let steps: Vec<_> = text.lines().filter(|l| !l.starts_with('#')).map(row).collect();
        let median = |of: &dyn Fn(&(f64, Vec<f64>)) -> f64| robust::median(&steps.iter().map(of).collect::<Vec<_>>());
        let usual = (median(&|s| s.0), (0..steps[0].1.len()).map(|w| median(&|s| s.1[w])).collect());
        Self { steps, usual }
    }

    pub fn seconds(&self) -> f64 {
        self.steps.iter().map(|s| s.0).sum()
    }

    /// As it would have been with a worker at `speed` from a moment on.
    pub fn slowed(&self, worker: usize, from: f64, speed: f64) -> Self {
        let mut time = 0.0;
        let mut steps = self.steps.clone();
        for (seconds, busy) in &mut steps {
            if time >= from {
                let more = busy[worker] * (1.0 / speed - 1.0);
                (*seconds, busy[worker]) = (*seconds + more, busy[worker] + more);
            }
            time += *seconds;
        }
        Self { steps, usual: self.usual.clone() }
    }
}

/// What a scene sets up.
pub struct World<'a> {
    pub settings: Settings,
    /// Speed of a worker's device at a time.
    pub speed: Box<dyn Fn(usize, f64) -> f64 + 'a>,
    pub noise: Noise,
    /// What steps took instead, over and over; for a job that keeps its plan.
    pub recording: Option<&'a Recording>,
    pub n_workers: usize,
    /// Computing time of a step on all workers together, at nominal speed.
    pub work: f64,
    /// The job's end.
    pub steps: Option<u64>,
    /// What a cutover takes.
    pub pause: f64,
    pub prepare: f64,
    /// Keep every record, not only those in which the decision is another one.
    pub keep_all: bool,
}

/// What happened.
pub struct Story {
    pub records: Vec<Record>,
    /// Share of time saved against never moving, with all that moving cost.
    pub saved: f64,
    pub steps: u64,
}

impl Story {
    /// When plans were adopted.
    pub fn adopted(&self) -> Vec<f64> {
        let adopt = |r: &&Record| matches!(r.decision, Decision::Adopt { .. });
        self.records.iter().filter(adopt).map(|r| r.snapshot.time.0).collect()
    }

    /// The decisions, one line each time they changed.
    pub fn told(&self) -> String {
        let line = |r: &Record| format!("{:9.1} s  {}\n", r.snapshot.time.0, r.decision);
        self.records.iter().map(line).collect()
    }
}

impl<'a> World<'a> {
    /// Steps that take `step` seconds at nominal speed.
    pub fn new(step: f64, n_workers: usize, speed: impl Fn(usize, f64) -> f64 + 'a) -> Self {
        Self {
            settings: Settings::default(),
            speed: Box::new(speed),
            noise: USUAL,
            recording: None,
            n_workers,
            work: step * n_workers as f64,
            steps: None,
            pause: 1.0,
            prepare: 3.0,
            keep_all: false,
        }
    }

    /// The job whose steps were recorded.
    pub fn recorded(recording: &'a Recording) -> Self {
        let busy = &recording.usual.1;
        let world = Self::new(recording.usual.0, busy.len(), |_, _| 1.0);
        Self { recording: Some(recording), work: busy.iter().sum(), ..world }
    }

    pub fn run(&self, until: f64, seed: u64) -> Story {
        let mut job = Job::start(self, seed);
        while job.time < until && self.steps.is_none_or(|steps| job.step < steps) {
            job.step();
            job.look_ahead();
            job.answer();
            job.decide();
            job.cut_over();
        }
        Story { saved: 1.0 - job.time / job.unmoved, steps: job.step, records: job.records }
    }
}

/// Share of the work by worker.
type Split = Vec<f64>;

#[derive(Clone, Default)]
struct Watched {
    busy: Tracker,
    speed: Tracker,
    /// Times and speeds.
    samples: Vec<(Seconds, f64)>,
    forecast: Option<Forecast>,
    now: f64,
}

struct Job<'w, 'a> {
    world: &'w World<'a>,
    dice: Dice,
    time: f64,
    step: u64,
    /// Time that the same steps take without ever moving.
    unmoved: f64,
    split: Split,
    revision: u64,
    since: (u64, f64),
    predicted: f64,
    predicted_busy: Vec<f64>,
    step_times: Tracker,
    workers: Vec<Watched>,
    next_forecast: f64,
    next_pause: f64,
    solved_at: Option<f64>,
    proposal: Option<(Proposal, Vec<Split>)>,
    in_flight: Option<(f64, u64, Split, Balance)>,
    considered: Option<Considered>,
    left: Option<Split>,
    moves: Vec<Move>,
    /// How many times longer than its speeds explain a step of the left plan took.
    unexplained: f64,
    ledger: Ledger,
    records: Vec<Record>,
}

impl<'w, 'a> Job<'w, 'a> {
    fn start(world: &'w World<'a>, seed: u64) -> Self {
        let n = world.n_workers;
        let each = world.work / n as f64;
        let (predicted, predicted_busy) = world.recording.map_or((each, vec![each; n]), |r| r.usual.clone());
        Self {
            world,
            dice: Dice::new(seed),
            time: 0.0,
            step: 0,
            unmoved: 0.0,
            split: predicted_busy.iter().map(|busy| busy / world.work).collect(),
            revision: 1,
            since: (0, 0.0),
            predicted,
            predicted_busy,
            step_times: Tracker::default(),
            workers: vec![Watched { now: 1.0, ..Watched::default() }; n],
            next_forecast: 0.0,
            next_pause: world.noise.pauses.0,
            solved_at: None,
            proposal: None,
            in_flight: None,
            considered: None,
            left: None,
            moves: Vec::new(),
            unexplained: 1.0,
            ledger: Ledger::default(),
            records: Vec::new(),
        }
    }

    fn takes(&self, split: &[f64], speeds: &[f64]) -> f64 {
        split.iter().zip(speeds).map(|(share, speed)| share * self.world.work / speed).fold(0.0, f64::max)
    }

    fn speeds(&self) -> Vec<f64> {
        self.workers.iter().map(|w| w.now).collect()
    }

    /// What the next step takes, what it would have taken on the first plan, and how much longer than usual each
    /// worker's own part is.
    fn next_step(&mut self) -> (f64, f64, Vec<f64>) {
        if let Some(Recording { steps, usual }) = self.world.recording {
            let (seconds, busy) = &steps[self.step as usize % steps.len()];
            let slowness = busy.iter().zip(&usual.1).map(|(now, usual)| now / usual).collect();
            return (*seconds, *seconds, slowness);
        }
        let World { noise, n_workers, work, speed, .. } = self.world;
        let spiky = (self.dice.uniform() < noise.spikes).then(|| (self.dice.uniform() * *n_workers as f64) as usize);
        let (mut seconds, mut unmoved) = (0.0f64, 0.0f64);
        let mut slowness = Vec::new();
        for w in 0..*n_workers {
            let spike = if spiky == Some(w) { 2.0 + 4.0 * self.dice.uniform() } else { 1.0 };
            slowness.push((noise.sigma * self.dice.normal()).exp() * spike / speed(w, self.time));
            seconds = seconds.max(self.split[w] * work * slowness[w]);
            unmoved = unmoved.max(work * slowness[w] / *n_workers as f64);
        }
        if self.time >= self.next_pause {
            seconds += noise.pauses.1 * (1.0 + self.dice.uniform());
            self.next_pause += noise.pauses.0;
        }
        (seconds, unmoved, slowness)
    }

    fn step(&mut self) {
        let (seconds, unmoved, slowness) = self.next_step();
        let work = self.world.work;
        self.time += seconds;
        self.unmoved += unmoved;
        self.step += 1;
        let seconds = Seconds(seconds);
        self.step_times.push(seconds, seconds.0);
        for (w, slowness) in slowness.into_iter().enumerate() {
            let worker = &mut self.workers[w];
            worker.busy.push(seconds, self.split[w] * work * slowness);
            worker.speed.push(seconds, 1.0 / slowness);
            worker.samples.push((Seconds(self.time), 1.0 / slowness));
            let latest: Vec<f64> = worker.samples.iter().rev().take(9).map(|s| s.1).collect();
            worker.now = robust::median(&latest);
        }
        if let Some(left) = &self.left {
            let speeds = self.speeds();
            let before = self.takes(left, &speeds) * self.unexplained;
            self.ledger.note(Seconds(self.time), Seconds(before), seconds);
            if let Some(last) = self.moves.last_mut().filter(|m| m.pause.measured.is_some()) {
                last.gain.measured = self.ledger.gain();
            }
        }
    }

    /// Interval of the forecasts, and how many make up the horizon.
    fn spacing(&self) -> (Seconds, usize) {
        let horizon = self.world.settings.horizon;
        let step = self.step_times.observed().now().unwrap_or(self.predicted);
        let interval = forecast::interval(horizon, Seconds(step));
        (interval, (horizon / interval).ceil() as usize)
    }

    fn look_ahead(&mut self) {
        if !self.world.settings.forecast {
            return;
        }
        let (interval, steps) = self.spacing();
        let Settings { horizon, dwell, .. } = self.world.settings;
        let due = self.time >= self.next_forecast;
        if due {
            self.next_forecast = self.time + 2.0 * interval.0;
        }
        for worker in &mut self.workers {
            if due {
                let old = worker.samples.partition_point(|s| s.0.0 < self.time - 4.0 * horizon.0);
                worker.samples.drain(..old);
                let series = Series::resample(&worker.samples, interval, Gap::Hold(64)).unwrap();
                let settings = forecast::Settings { least: Some(0.01), ..Default::default() };
                worker.forecast = Some(forecast::forecast(&series, steps, &settings).unwrap());
            }
            let latest = worker.speed.observed();
            if let (Some(forecast), Some(level)) = (&mut worker.forecast, latest.levels(dwell).next()) {
                forecast.anchor(&level, 0.1);
            }
        }
    }

    /// The planner has plans for the present, the next few intervals, the slowest, the fastest and the mean speeds foreseen, and
    /// with caution where little is certain.
    fn answer(&mut self) {
        if !self.solved_at.is_some_and(|done| self.time >= done) {
            return;
        }
        self.solved_at = None;
        let (interval, steps) = self.spacing();
        let ahead = |of: &dyn Fn(&Forecast) -> f64| -> Vec<f64> {
            self.workers.iter().map(|w| w.forecast.as_ref().map_or(w.now, of)).collect()
        };
        let now = Seconds(self.time);
        let expected = |w: &Watched, i: usize| w.forecast.as_ref().map_or(w.now, |f| f.expect(now, w.now, i).max(0.01));
        let near = |w: &Watched| (0..NEAR).map(|i| expected(w, i)).sum::<f64>() / NEAR as f64;
        let mut futures = vec![
            self.speeds(),
            self.workers.iter().map(near).collect(),
            ahead(&|f| f.min().band.mean),
            ahead(&|f| f.max().band.mean),
            ahead(&|f| f.average().mean),
        ];
        let outlook = |w: &Watched| Outlook { now: w.now, forecast: w.forecast.clone(), one: 1.0 };
        let outlooks: Vec<Outlook> = self.workers.iter().map(outlook).collect();
        if outlooks.iter().any(Outlook::is_wide) {
            let cautious = View::Mean { quantile: CAUTIOUS };
            futures.push(outlooks.iter().map(|o| o.view(now, cautious).max(0.01)).collect());
        }
        let split = |speeds: &Vec<f64>| -> Split { speeds.iter().map(|s| s / speeds.iter().sum::<f64>()).collect() };
        let differs = |split: &Split| split.iter().zip(&self.split).any(|(a, b)| (a - b).abs() > 0.01);
        let splits: Vec<Split> = futures.iter().map(split).filter(differs).collect();
        // Without a forecast the present is all that is known.
        let steps = if self.world.settings.forecast { steps } else { 1 };
        let path: Vec<Vec<f64>> = (0..steps).map(|i| self.workers.iter().map(|w| expected(w, i)).collect()).collect();
        let times = |split: &Split| path.iter().map(|speeds| Seconds(self.takes(split, speeds))).collect();
        let candidate = |(i, split): (usize, &Split)| Candidate {
            revision: self.revision + 1 + i as u64,
            made: Seconds(self.time),
            interval,
            running: times(&self.split),
            step_times: times(split),
            memory: vec![Bytes(1 << 30); self.workers.len()],
            bytes_to_move: Bytes(1 << 20),
            pause: Seconds(0.8 * self.world.pause),
            prepare: Seconds(self.world.prepare),
        };
        let candidates: Vec<Candidate> = splits.iter().enumerate().map(candidate).collect();
        let answer = if candidates.is_empty() { Proposal::Same } else { Proposal::Plans(candidates) };
        self.proposal = Some((answer, splits));
    }

    fn snapshot(&self) -> Snapshot {
        let memory = Memory { planned: Bytes(1 << 30), used: Bytes(1 << 30), limit: Bytes(4 << 30), forecast: None };
        let worker = |(rank, w): (usize, &Watched)| Worker {
            rank: rank as u32,
            shard: ShardId(rank as u32),
            predicted_busy: Seconds(self.predicted_busy[rank]),
            busy: w.busy.observed(),
            speed: w.now,
            speed_forecast: w.forecast.clone(),
            memory: memory.clone(),
            cpu: crate::transition::Watched::default(),
            link: Link::default(),
        };
        Snapshot {
            step: self.step,
            time: Seconds(self.time),
            steps_left: self.world.steps.map(|steps| steps - self.step),
            settings: self.world.settings.clone(),
            running: Running {
                revision: self.revision,
                since_step: self.since.0,
                since: Seconds(self.since.1),
                predicted: Seconds(self.predicted),
                observed: self.step_times.observed(),
                forecast: None,
            },
            workers: self.workers.iter().enumerate().map(worker).collect(),
            proposal: self.proposal.as_ref().map(|p| p.0.clone()),
            moves: self.moves.clone(),
            in_flight: self.in_flight.as_ref().map(|f| f.1),
            considered: self.considered.clone(),
            approved: None,
        }
    }

    fn decide(&mut self) {
        let snapshot = self.snapshot();
        let decision = decide(&snapshot);
        match &decision {
            Decision::Wait { reason: Wait::Unsolved, .. } if self.solved_at.is_none() => {
                self.solved_at = Some(self.time + 0.5);
            }
            Decision::Adopt { revision, balance, .. } => self.prepare(*revision, *balance),
            _ => {}
        }
        if let Some(settled) = snapshot.settled(&decision) {
            self.considered = Some(settled);
            self.proposal = None;
        }
        let changed = self.records.last().is_none_or(|r| r.decision.label() != decision.label());
        if self.world.keep_all || changed {
            self.records.push(Record::new(snapshot, decision));
        }
    }

    fn prepare(&mut self, revision: u64, balance: Balance) {
        let (answer, splits) = self.proposal.take().expect("what is adopted was proposed");
        let Proposal::Plans(candidates) = answer else { panic!("adopted no plan") };
        let i = candidates.iter().position(|c| c.revision == revision).expect("what is adopted was proposed");
        self.in_flight = Some((self.time + self.world.prepare, revision, splits[i].clone(), balance));
        let expected = |expected| Measured { expected, measured: None };
        self.moves.push(Move {
            revision,
            step: self.step,
            time: Seconds(self.time),
            pause: expected(candidates[i].pause),
            prepare: expected(candidates[i].prepare),
            gain: Measured { expected: balance.share, measured: None },
        });
    }

    fn cut_over(&mut self) {
        let Some((_, revision, split, balance)) = self.in_flight.take_if(|f| self.time >= f.0) else { return };
        self.time += self.world.pause;
        let last = self.moves.last_mut().expect("what is in flight is a move");
        (last.step, last.time) = (self.step, Seconds(self.time));
        last.pause.measured = Some(Seconds(self.world.pause));
        last.prepare.measured = Some(Seconds(self.world.prepare));
        let usual = self.takes(&self.split, &self.speeds());
        self.unexplained = self.step_times.observed().now().map_or(1.0, |seen| seen / usual);
        self.left = Some(std::mem::replace(&mut self.split, split));
        self.revision = revision;
        self.since = (self.step, self.time);
        self.predicted = self.takes(&self.split, &self.speeds());
        self.predicted_busy =
            (0..self.split.len()).map(|w| self.split[w] * self.world.work / self.workers[w].now).collect();
        (self.considered, self.proposal, self.ledger) = (None, None, Ledger::new(balance.end));
        self.step_times.reset();
        self.workers.iter_mut().for_each(|w| w.busy.reset());
    }
}
