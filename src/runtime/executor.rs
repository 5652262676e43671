//! The executor: runs a shard's static order, step after step.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::RuntimeError;
use super::key;
use super::link::{Link, Outgoing, Shared, Traffic, now_us};
use super::mailbox::Source;
use super::program::{GradProgram, Input, Piece, Program, Programs, mirrors_of, scalar};
use super::wiring::Rank;
use crate::device::heap::Ceiling;
use crate::device::{Arg, Device};
use crate::graph::{ArrayShape, DType, OpId};
use crate::plan::{Place, ShardId};
use crate::wire::control::{Span, StepDone, WorkerId};
use crate::wire::frame::Kind;

/// One shard's state and everything it runs on it.
pub struct Executor<D: Device> {
    pub shared: Arc<Shared<D>>,
    pub programs: Programs<D>,
    ceiling: Option<Ceiling>,
    pub links: Links<D::Buffer>,
    pub seed: u32,
    pub(super) me: Rank,
    /// By `Model::state`: what this shard owns or every shard keeps.
    pub(super) state: State<D::Buffer>,
    /// Others' params, with the step they are for.
    mirrors: BTreeMap<usize, (u64, Arc<D::Buffer>)>,
}

/// By worker.
pub type Links<B> = BTreeMap<WorkerId, Link<B>>;
/// By `Model::state`.
pub type State<B> = Vec<Option<Arc<B>>>;

/// A step whose gradients are summed and whose update is still to come.
pub struct Half<B> {
    pub step: u64,
    /// By param.
    pub sums: BTreeMap<usize, Arc<B>>,
    /// Microbatches in the sums.
    pub count: u32,
    pub scalars: Vec<(u32, f32)>,
    pub clock: Clock,
    pub start_us: u64,
}

/// Where a running piece finds its inputs.
struct Scope<'a, D: Device> {
    step: u64,
    microbatch: u32,
    program: &'a Program<D>,
    gradients: &'a BTreeMap<usize, Arc<D::Buffer>>,
    /// Microbatches summed up in `gradients`.
    count: u32,
    /// Batch slices, the key and the count, uploaded once per microbatch.
    given: BTreeMap<Given, Arc<D::Buffer>>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Given {
    Batch(usize),
    Key,
    Count,
}

/// Values of one program in flight: (microbatch, op) to buffer and readers left.
type Values<B> = BTreeMap<(u32, OpId), (Arc<B>, u32)>;

/// Time spent since the step began.
#[derive(Default)]
pub struct Clock {
    pub busy: Duration,
    pub wait: Duration,
    /// By segment: those of the gradients, then those of the update.
    segments: Vec<Duration>,
}

impl<D: Device> Executor<D> {
    /// A shard without state. The seat is `me`, which `shared` knows too.
    pub fn new(
        shared: Arc<Shared<D>>,
        me: Rank,
        programs: Programs<D>,
        ceiling: Option<Ceiling>,
        links: Links<D::Buffer>,
        seed: u32,
    ) -> Self {
        let state = (0..shared.model.state.len()).map(|_| None).collect();
        Self { shared, programs, ceiling, links, seed, me, state, mirrors: BTreeMap::new() }
    }

    /// Makes the state: from the seed, and from start weights by `given(state tensor)`.
    pub fn init(&mut self, given: &mut dyn FnMut(usize) -> Result<Vec<u8>, RuntimeError>) -> Result<(), RuntimeError> {
        let Some(init) = &self.programs.init else {
            return Err(RuntimeError::Stopped("this plan was prepared to take its state from elsewhere".to_owned()));
        };
        for &i in &init.from {
            self.state[i] = Some(Arc::new(self.upload(&self.shared.model.state[i].shape, &given(i)?)?));
        }
        let at = |source| RuntimeError::Device { at: "running init".to_owned(), source };
        let key = self.upload_key(key::from_seed(self.seed))?;
        let results = self.shared.device.execute(&init.executable, vec![Arg::Keep(&key)]).map_err(at)?;
        for (&i, buffer) in init.yields.iter().zip(results) {
            self.shared.device.wait(&buffer).map_err(at)?;
            self.state[i] = Some(Arc::new(buffer));
        }
        self.send_mirrors(0);
        Ok(())
    }

    /// Takes the state from a checkpoint, by `stored(state tensor)`; the next step is `step`.
    pub fn restore(
        &mut self,
        step: u64,
        stored: &mut dyn FnMut(usize) -> Result<Vec<u8>, RuntimeError>,
    ) -> Result<(), RuntimeError> {
        for i in self.kept() {
            self.state[i] = Some(Arc::new(self.upload(&self.shared.model.state[i].shape, &stored(i)?)?));
        }
        self.send_mirrors(step);
        Ok(())
    }

    /// State tensors this shard owns or every shard keeps.
    pub fn kept(&self) -> Vec<usize> {
        let owners = &self.shared.plan.owners;
        let mine = |owner: &Place| matches!(owner, Place::Everywhere) || *owner == Place::Shard(self.me.shard);
        (0..owners.len()).filter(|&i| mine(&owners[i])).collect()
    }

    /// Takes the state a plan before this one left, and what peers sent: see [`super::switch`].
    pub(super) fn adopt(&mut self, state: State<D::Buffer>) {
        self.state = state;
    }

    /// Runs one step of a variant.
    pub fn step(&mut self, step: u64, variant: &str) -> Result<StepDone, RuntimeError> {
        let half = self.first_half(step, variant)?;
        self.second_half(half)
    }

    /// Sums the gradients of a step over its microbatches and all replicas.
    pub fn first_half(&mut self, step: u64, variant: &str) -> Result<Half<D::Buffer>, RuntimeError> {
        self.shared.mailbox.advance(step)?;
        if let Some(ceiling) = &mut self.ceiling {
            ceiling.settle();
        }
        let start_us = now_us();
        let mut clock = Clock::default();
        // Taken out so that the programs can be borrowed while the state changes.
        let Some(grad) = self.programs.grads.remove(variant) else {
            let known = self.programs.grads.keys().cloned().collect::<Vec<_>>().join(", ");
            return Err(RuntimeError::UnknownVariant { found: variant.to_owned(), known });
        };
        let done = self.gradients(step, &grad, &mut clock);
        self.programs.grads.insert(variant.to_owned(), grad);
        let (mut sums, scalars) = done?;
        let plan = &self.shared.plan;
        let count = plan.n_microbatches * plan.n_replicas;
        if plan.n_replicas > 1 {
            self.average(step, &mut sums, &mut clock)?;
        }
        Ok(Half { step, sums, count, scalars, clock, start_us })
    }

    /// Updates the state.
    pub fn second_half(&mut self, mut half: Half<D::Buffer>) -> Result<StepDone, RuntimeError> {
        let step = half.step;
        self.update(&half.sums, step, half.count, &mut half.clock)?;
        self.send_mirrors(step + 1);
        Ok(half.done(&self.shared.traffic))
    }

    /// Runs the order; returns the summed gradients by param, and the summed scalars by graph output.
    fn gradients(
        &mut self,
        step: u64,
        grad: &GradProgram<D>,
        clock: &mut Clock,
    ) -> Result<(BTreeMap<usize, Arc<D::Buffer>>, Vec<(u32, f32)>), RuntimeError> {
        let mut sums: BTreeMap<usize, Arc<D::Buffer>> = BTreeMap::new();
        if let Some(zeros) = &grad.zeros {
            let at = |source| RuntimeError::Device { at: "making zeros".to_owned(), source };
            let made = self.shared.device.execute(zeros, Vec::new()).map_err(at)?;
            sums.extend(grad.results.iter().copied().zip(made.into_iter().map(Arc::new)));
        }
        clock.segments.resize(grad.program.pieces.len(), Duration::ZERO);
        let mut values = Values::new();
        let none = BTreeMap::new();
        let mut scopes: BTreeMap<u32, (Scope<'_, D>, usize)> = BTreeMap::new();
        for task in &grad.order {
            let piece = &grad.program.pieces[grad.program.of_segment[&task.segment]];
            let (scope, n_run) = scopes.entry(task.microbatch).or_insert_with(|| {
                let microbatch = task.microbatch;
                let program = &grad.program;
                let scope = Scope { step, microbatch, program, gradients: &none, count: 0, given: BTreeMap::new() };
                (scope, 0)
            });
            let before = clock.busy;
            let results = self.run(piece, scope, &mut values, &mut sums, grad.zeros.is_some(), clock)?;
            clock.segments[grad.program.of_segment[&task.segment]] += clock.busy - before;
            sums.extend(results);
            *n_run += 1;
            if *n_run == grad.program.pieces.len() {
                scopes.remove(&task.microbatch);
            }
        }
        let n_scalars = 1 + self.shared.model.manifest.metrics.len();
        let mut scalars = Vec::new();
        for (&output, buffer) in sums.range(..n_scalars) {
            scalars.push((output as u32, self.scalar(output, buffer)?));
        }
        let gradients = sums.into_iter().filter(|(o, _)| *o >= n_scalars).map(|(o, b)| (o - n_scalars, b)).collect();
        Ok((gradients, scalars))
    }

    fn scalar(&self, output: usize, buffer: &D::Buffer) -> Result<f32, RuntimeError> {
        let graph = &self.shared.model.grads[0].graph;
        let shape = graph.op(graph.outputs()[output]).shape.as_array().cloned();
        let shape = shape.unwrap_or_else(|| ArrayShape::scalar(DType::Float32));
        let mut data = vec![0; shape.bytes().0 as usize];
        let what = || match output {
            0 => "the loss".to_owned(),
            m => format!("metric {}", self.shared.model.manifest.metrics[m - 1].name),
        };
        let at = |source| RuntimeError::Device { at: format!("downloading {}", what()), source };
        self.shared.device.download(buffer, &mut data).map_err(at)?;
        let value = (shape.n_elements() == 1).then(|| scalar(shape.dtype, &data)).flatten();
        value.ok_or_else(|| RuntimeError::NotAScalar { what: what(), found: shape.to_string() })
    }

    /// Adds the gradients of all replicas on replica 0, in the order of replicas, and hands the sums back.
    fn average(
        &mut self,
        step: u64,
        sums: &mut BTreeMap<usize, Arc<D::Buffer>>,
        clock: &mut Clock,
    ) -> Result<(), RuntimeError> {
        let shared = self.shared.clone();
        let wiring = &shared.wiring;
        let me = self.me;
        let owned = self.programs.owned.clone();
        let length = |c: u32| wiring.channels[c as usize].shape.bytes().0 as usize;
        let outgoing = |sums: &BTreeMap<usize, Arc<D::Buffer>>, back: bool, microbatch| Outgoing {
            kind: Kind::Tensor,
            name: Arc::from("gradients"),
            step,
            microbatch,
            tensors: owned
                .iter()
                .map(|&p| {
                    let (gather, scatter) = wiring.averages[p];
                    let channel = if back { scatter } else { gather };
                    (channel, length(channel), sums[&p].clone())
                })
                .collect(),
        };
        let replica = |replica| Rank { replica, ..me };
        if owned.is_empty() {
            return Ok(());
        }
        if me.replica != 0 {
            self.link(replica(0)).send(outgoing(sums, false, me.replica));
            for &p in &owned {
                let (sum, waited) = self.shared.mailbox.take((step, Source::Channel(wiring.averages[p].1), 0))?;
                clock.wait += waited;
                sums.insert(p, sum);
            }
            return Ok(());
        }
        for other in 1..wiring.n_replicas {
            let mut theirs = Vec::with_capacity(owned.len());
            for &p in &owned {
                let address = (step, Source::Channel(wiring.averages[p].0), other);
                let (gradient, waited) = self.shared.mailbox.take(address)?;
                clock.wait += waited;
                theirs.push(gradient);
            }
            let ours = owned.iter().map(|p| sums.remove(p).expect("a sum for every owned param")).collect();
            let add = self.programs.add.clone().expect("replica 0 adds");
            let added = self.execute("add", &add, theirs, ours, clock)?;
            sums.extend(owned.iter().copied().zip(added.into_iter().map(Arc::new)));
        }
        for other in 1..wiring.n_replicas {
            self.link(replica(other)).send(outgoing(sums, true, 0));
        }
        Ok(())
    }

    fn update(
        &mut self,
        sums: &BTreeMap<usize, Arc<D::Buffer>>,
        step: u64,
        count: u32,
        clock: &mut Clock,
    ) -> Result<(), RuntimeError> {
        let empty = Program {
            pieces: Vec::new(),
            of_segment: BTreeMap::new(),
            remote: BTreeMap::new(),
            n_readers: BTreeMap::new(),
        };
        let program = std::mem::replace(&mut self.programs.update, empty);
        let mut scope =
            Scope { step, microbatch: 0, program: &program, gradients: sums, count, given: BTreeMap::new() };
        let mut values = Values::new();
        let mut fresh = BTreeMap::new();
        let mut failed = None;
        for piece in &program.pieces {
            let before = clock.busy;
            match self.run(piece, &mut scope, &mut values, &mut BTreeMap::new(), false, clock) {
                Ok(results) => {
                    clock.segments.push(clock.busy - before);
                    fresh.extend(results);
                }
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
        }
        drop(scope);
        self.programs.update = program;
        for (i, buffer) in fresh {
            self.state[i] = Some(buffer);
        }
        failed.map_or(Ok(()), Err)
    }

    /// Runs one piece: its values go to `values` and to other shards, its results are returned.
    fn run(
        &mut self,
        piece: &Piece<D>,
        scope: &mut Scope<'_, D>,
        values: &mut Values<D::Buffer>,
        sums: &mut BTreeMap<usize, Arc<D::Buffer>>,
        accumulate: bool,
        clock: &mut Clock,
    ) -> Result<Vec<(usize, Arc<D::Buffer>)>, RuntimeError> {
        let mut keep = Vec::with_capacity(piece.inputs.len());
        let mut consumed = Vec::new();
        let microbatch = scope.microbatch;
        for (&input, &donated) in piece.inputs.iter().zip(&piece.donated) {
            match input {
                Input::State(i) if donated => {
                    // Keeps the order of arguments: taken out of the table, so that nobody else holds it.
                    keep.push(self.state[i].take().expect("state is there before it is updated"));
                }
                input => keep.push(self.fetch(input, scope, values, clock)?),
            }
        }
        if accumulate {
            consumed.extend(piece.results.iter().map(|r| sums.remove(r).expect("zeros were made for every result")));
        }
        if let Some(ceiling) = &mut self.ceiling {
            let needs = piece.memory.temporaries + (piece.memory.outputs - piece.memory.aliased);
            ceiling.make_room(needs.0);
        }
        let start_us = now_us();
        let began = clock.busy;
        let outputs = self.execute_donating(&piece.name, &piece.executable, keep, &piece.donated, consumed, clock)?;
        let is_update = !scope.gradients.is_empty() || piece.name.starts_with("update");
        self.shared.traffic.span(scope.step, || Span {
            kind: if is_update { "update" } else { "compute" }.to_owned(),
            name: piece.name.clone(),
            microbatch: (!is_update).then_some(microbatch),
            start_us,
            duration_us: (clock.busy - began).as_micros() as u64,
        });
        let mut outputs = outputs.into_iter().map(Arc::new);
        let made: Vec<Arc<D::Buffer>> = outputs.by_ref().take(piece.outputs.len()).collect();
        for send in &piece.sends {
            let to = Rank { shard: send.to, ..self.me };
            let tensors = send
                .values
                .iter()
                .map(|&(channel, at)| {
                    let bytes = self.shared.wiring.channels[channel as usize].shape.bytes().0 as usize;
                    (channel, bytes, made[at].clone())
                })
                .collect();
            let name = Arc::from(piece.name.as_str());
            self.link(to).send(Outgoing { kind: Kind::Tensor, name, step: scope.step, microbatch, tensors });
        }
        for (&op, buffer) in piece.outputs.iter().zip(made) {
            if let Some(&readers) = scope.program.n_readers.get(&op) {
                values.insert((microbatch, op), (buffer, readers));
            }
        }
        // Residuals are freed by their last reader.
        for input in &piece.inputs {
            if let Input::Value(op) = input
                && let Some((_, readers)) = values.get_mut(&(microbatch, *op))
            {
                *readers -= 1;
                if *readers == 0 {
                    values.remove(&(microbatch, *op));
                }
            }
        }
        Ok(piece.results.iter().copied().zip(outputs).collect())
    }

    fn fetch(
        &mut self,
        input: Input,
        scope: &mut Scope<'_, D>,
        values: &mut Values<D::Buffer>,
        clock: &mut Clock,
    ) -> Result<Arc<D::Buffer>, RuntimeError> {
        match input {
            Input::State(i) => match &self.state[i] {
                Some(buffer) => Ok(buffer.clone()),
                None => self.mirror(i, scope.step, clock),
            },
            Input::Gradient(p) => Ok(scope.gradients[&p].clone()),
            Input::Value(op) => {
                if let Some((buffer, _)) = values.get(&(scope.microbatch, op)) {
                    return Ok(buffer.clone());
                }
                let channel = scope.program.remote[&op];
                let address = (scope.step, Source::Channel(channel), scope.microbatch);
                let (buffer, waited) = self.shared.mailbox.take(address)?;
                clock.wait += waited;
                values.insert((scope.microbatch, op), (buffer.clone(), scope.program.n_readers[&op]));
                Ok(buffer)
            }
            Input::Batch(t) => self.given(Given::Batch(t), scope, clock),
            Input::Key => self.given(Given::Key, scope, clock),
            Input::Count => self.given(Given::Count, scope, clock),
        }
    }

    fn given(
        &mut self,
        what: Given,
        scope: &mut Scope<'_, D>,
        clock: &mut Clock,
    ) -> Result<Arc<D::Buffer>, RuntimeError> {
        if let Some(buffer) = scope.given.get(&what) {
            return Ok(buffer.clone());
        }
        let buffer = match what {
            Given::Batch(t) => {
                let (buffer, waited) =
                    self.shared.mailbox.take((scope.step, Source::Batch(t as u32), scope.microbatch))?;
                clock.wait += waited;
                buffer
            }
            Given::Key => {
                let m = self.me.replica * self.shared.plan.n_microbatches + scope.microbatch;
                Arc::new(self.upload_key(key::of_microbatch(self.seed, scope.step, m))?)
            }
            Given::Count => {
                let n = (scope.count as f32).to_le_bytes();
                Arc::new(self.upload(&ArrayShape::scalar(DType::Float32), &n)?)
            }
        };
        scope.given.insert(what, buffer.clone());
        Ok(buffer)
    }

    /// Another shard's param as of this step.
    fn mirror(&mut self, state: usize, step: u64, clock: &mut Clock) -> Result<Arc<D::Buffer>, RuntimeError> {
        if let Some((at, buffer)) = self.mirrors.get(&state)
            && *at == step
        {
            return Ok(buffer.clone());
        }
        let mirror = mirrors_of(&self.shared.wiring, self.me.shard).find(|m| m.state == state);
        let channel = mirror.expect("a param of another shard has a mirror").channel;
        let (buffer, waited) = self.shared.mailbox.take((step, Source::Channel(channel), 0))?;
        clock.wait += waited;
        self.mirrors.insert(state, (step, buffer.clone()));
        Ok(buffer)
    }

    /// Sends owned params to the shards that read them in `step`.
    fn send_mirrors(&self, step: u64) {
        let me = self.me;
        let mut by_reader: BTreeMap<ShardId, Vec<(u32, usize, Arc<D::Buffer>)>> = BTreeMap::new();
        for mirror in self.shared.wiring.mirrors.iter().filter(|m| m.owner == me.shard) {
            if let Some(buffer) = &self.state[mirror.state] {
                let bytes = self.shared.model.state[mirror.state].shape.bytes().0 as usize;
                by_reader.entry(mirror.reader).or_default().push((mirror.channel, bytes, buffer.clone()));
            }
        }
        for (shard, tensors) in by_reader {
            let (kind, name) = (Kind::Tensor, Arc::from("params"));
            self.link(Rank { shard, ..me }).send(Outgoing { kind, name, step, microbatch: 0, tensors });
        }
    }

    /// The link to whoever sits there.
    fn link(&self, rank: Rank) -> &Link<D::Buffer> {
        &self.links[&self.shared.seats[self.shared.wiring.number(rank) as usize]]
    }

    fn execute(
        &self,
        name: &str,
        executable: &D::Executable,
        keep: Vec<Arc<D::Buffer>>,
        donate: Vec<Arc<D::Buffer>>,
        clock: &mut Clock,
    ) -> Result<Vec<D::Buffer>, RuntimeError> {
        let kept = vec![false; keep.len()];
        self.execute_donating(name, executable, keep, &kept, donate, clock)
    }

    /// Runs and waits. `donate` follows `args`; what someone else still reads (a sender) is not donated.
    fn execute_donating(
        &self,
        name: &str,
        executable: &D::Executable,
        args: Vec<Arc<D::Buffer>>,
        donated: &[bool],
        donate: Vec<Arc<D::Buffer>>,
        clock: &mut Clock,
    ) -> Result<Vec<D::Buffer>, RuntimeError> {
        let began = Instant::now();
        let at = |source| RuntimeError::Device { at: format!("running {name}"), source };
        let flags = donated.iter().copied().chain(std::iter::repeat_n(true, donate.len()));
        let mut kept: Vec<Option<Arc<D::Buffer>>> = Vec::with_capacity(args.len() + donate.len());
        let mut given: Vec<Option<D::Buffer>> = Vec::with_capacity(args.len() + donate.len());
        for (buffer, donate) in args.into_iter().chain(donate).zip(flags) {
            let (k, g) = match if donate { Arc::try_unwrap(buffer) } else { Err(buffer) } {
                Ok(buffer) => (None, Some(buffer)),
                Err(shared) => (Some(shared), None),
            };
            kept.push(k);
            given.push(g);
        }
        let args = kept
            .iter()
            .zip(given)
            .map(|(k, g)| match (g, k) {
                (Some(buffer), _) => Arg::Donate(buffer),
                (None, Some(shared)) => Arg::Keep(&**shared),
                (None, None) => unreachable!("an argument is kept or given"),
            })
            .collect();
        let outputs = self.shared.device.execute(executable, args).map_err(at)?;
        for output in &outputs {
            self.shared.device.wait(output).map_err(at)?;
        }
        clock.busy += began.elapsed();
        Ok(outputs)
    }

    fn upload(&self, shape: &ArrayShape, data: &[u8]) -> Result<D::Buffer, RuntimeError> {
        let at = |source| RuntimeError::Device { at: format!("uploading {shape}"), source };
        self.shared.device.upload(shape, data).map_err(at)
    }
    fn upload_key(&self, key: key::Key) -> Result<D::Buffer, RuntimeError> {
        let data = [key[0].to_le_bytes(), key[1].to_le_bytes()].concat();
        self.upload(&ArrayShape::new(DType::Uint32, vec![2]), &data)
    }

    /// Owned params of replica 0, one after the other.
    pub fn weights(&self, out: &mut dyn FnMut(usize, &[u8]) -> Result<(), RuntimeError>) -> Result<(), RuntimeError> {
        if self.me.replica != 0 {
            return Ok(());
        }
        for param in 0..self.shared.model.n_params {
            if self.shared.plan.owners[param] != Place::Shard(self.me.shard) {
                continue;
            }
            let tensor = &self.shared.model.state[param];
            let mut data = vec![0; tensor.shape.bytes().0 as usize];
            let at = |source| RuntimeError::Device { at: format!("downloading {}", tensor.name), source };
            let buffer = self.state[param].as_ref().expect("owned state is there between steps");
            self.shared.device.download(buffer, &mut data).map_err(at)?;
            out(param, &data)?;
        }
        Ok(())
    }
}

impl<B> Half<B> {
    /// A step to which this worker has added nothing so far: it enters with the update.
    pub fn entering(step: u64, count: u32) -> Self {
        let (sums, scalars) = (BTreeMap::new(), Vec::new());
        Self { step, sums, count, scalars, clock: Clock::default(), start_us: now_us() }
    }

    /// What is reported of the step, now that it is over here.
    pub fn done(self, traffic: &Traffic) -> StepDone {
        StepDone {
            step: self.step,
            scalars: self.scalars,
            start_us: self.start_us,
            end_us: now_us(),
            busy_s: self.clock.busy.as_secs_f64(),
            wait_s: self.clock.wait.as_secs_f64(),
            idle_s: 0.0,
            sent_bytes: traffic.sent.swap(0, Ordering::Relaxed),
            received_bytes: traffic.received.swap(0, Ordering::Relaxed),
            received_s: traffic.receiving.swap(0, Ordering::Relaxed) as f64 / 1e9,
            peak_rss: peak_rss(),
            spans: std::mem::take(&mut *traffic.spans.lock().unwrap_or_else(|p| p.into_inner())),
            segments_s: self.clock.segments.iter().map(Duration::as_secs_f32).collect(),
            switch: None,
        }
    }
}

/// Forgets the peak of resident memory so far: compiling takes more than training does. Returns what is resident now.
pub fn reset_peak_rss() -> u64 {
    const RESET_PEAK: &str = "5";
    // Where the kernel refuses, the peak includes the compiler's.
    let _ = std::fs::write("/proc/self/clear_refs", RESET_PEAK);
    peak_rss()
}

/// Highest resident memory of this process, in bytes; 0 where the kernel does not say.
pub fn peak_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
