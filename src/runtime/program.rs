//! Programs: the executables of one shard and what goes in and out of each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::RuntimeError;
use super::kept::{self, Compiled, Kept};
use super::wiring::{ChannelId, Cut, Mirror, Rank, Wiring};
use crate::device::cache::ExecutableCache;
use crate::device::{Device, ExecutableMemory};
use crate::graph::cut::{accumulate, cut, zeros};
use crate::graph::export::{Alias, to_hlo};
use crate::graph::verify::verify;
use crate::graph::{ArrayShape, DType, Graph, Model, OpId};
use crate::plan::segment::Segment;
use crate::plan::{Place, Plan, ShardId, Task};
use crate::units::Bytes;

/// Where an executable's argument comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// State tensor that this shard owns, mirrors, or that every shard keeps.
    State(usize),
    Batch(usize),
    Key,
    /// Sum of a param's gradients.
    Gradient(usize),
    /// Number of microbatches summed.
    Count,
    /// Value of another piece of the same program, or of another shard.
    Value(OpId),
}

/// One segment, compiled.
pub struct Piece<D: Device> {
    pub name: String,
    pub executable: Arc<D::Executable>,
    pub inputs: Vec<Input>,
    /// By input: nobody reads the state tensor after this piece, its memory becomes the new value.
    pub donated: Vec<bool>,
    /// First results of the executable.
    pub outputs: Vec<OpId>,
    /// The other ones: graph outputs by position. With `accumulates`, as many sums follow the inputs.
    pub results: Vec<usize>,
    pub sends: Vec<Send>,
    pub memory: ExecutableMemory,
}

/// Outputs that go to another shard together.
#[derive(Clone, Debug)]
pub struct Send {
    pub to: ShardId,
    /// (channel, position among the piece's outputs).
    pub values: Vec<(ChannelId, usize)>,
}

/// A graph's pieces on this shard.
pub struct Program<D: Device> {
    pub pieces: Vec<Piece<D>>,
    /// Position in the segmentation to position in `pieces`.
    pub of_segment: BTreeMap<u32, usize>,
    /// Channel of every value that comes from another shard.
    pub remote: BTreeMap<OpId, ChannelId>,
    /// Pieces that read a value.
    pub n_readers: BTreeMap<OpId, u32>,
}

/// The gradient function of one variant.
pub struct GradProgram<D: Device> {
    pub program: Program<D>,
    pub order: Vec<Task>,
    /// Graph outputs that this shard sums.
    pub results: Vec<usize>,
    /// Makes their zeros; `None` when each piece runs once per step and nothing is summed.
    pub zeros: Option<Arc<D::Executable>>,
}

/// Everything a shard executes.
pub struct Programs<D: Device> {
    /// `None` where the state comes from a checkpoint or from another plan.
    pub init: Option<Init<D>>,
    pub grads: BTreeMap<String, GradProgram<D>>,
    pub update: Program<D>,
    /// Adds the gradients of another replica: sums, gradients -> sums. On replica 0 only.
    pub add: Option<Arc<D::Executable>>,
    /// Params whose gradients this shard sums.
    pub owned: Vec<usize>,
    pub cache: CacheUse,
}

/// What the cache of executables was good for; equal modules of one shard count once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheUse {
    /// Read from disk, or loaded already.
    pub hits: u32,
    /// Compiled.
    pub misses: u32,
    /// For the log: entries that were damaged or could not be kept.
    pub troubles: Vec<String>,
}

/// Makes the state this shard keeps: the key goes in.
pub struct Init<D: Device> {
    pub executable: Arc<D::Executable>,
    /// State tensors that come from the start weights instead.
    pub from: Vec<usize>,
    /// State tensors it yields.
    pub yields: Vec<usize>,
}

/// Where a compiler stops: between two modules, for one cannot be interrupted.
#[derive(Clone, Copy, Default)]
pub struct Limits<'a> {
    /// Set when nobody wants the result any more.
    pub cancelled: Option<&'a AtomicBool>,
    /// No module is begun after this, but for the first one: each try comes further.
    pub until: Option<Instant>,
}

impl Limits<'_> {
    fn reached(&self, compiled: u32) -> bool {
        self.cancelled.is_some_and(|c| c.load(Ordering::SeqCst))
            || compiled > 0 && self.until.is_some_and(|until| Instant::now() > until)
    }
}

/// Compiles what one rank needs.
pub struct Compiler<'a, D: Device> {
    pub device: &'a D,
    pub model: &'a Model,
    pub plan: &'a Plan,
    pub wiring: &'a Wiring,
    pub rank: Rank,
    /// Called with (compiled, of) after each module.
    pub progress: &'a mut dyn FnMut(u32, u32),
    /// Executables that are loaded instead of compiled.
    cache: Option<&'a ExecutableCache>,
    /// Those of the process that are loaded already.
    kept: Option<&'a Kept<D>>,
    limits: Limits<'a>,
    cache_use: CacheUse,
    /// Equal modules are compiled once.
    compiled: BTreeMap<kept::Key, Compiled<D>>,
    n_compiled: u32,
    n_modules: u32,
}

impl<'a, D: Device> Compiler<'a, D> {
    pub fn new(
        device: &'a D,
        model: &'a Model,
        plan: &'a Plan,
        wiring: &'a Wiring,
        rank: Rank,
        progress: &'a mut dyn FnMut(u32, u32),
    ) -> Self {
        let of_shard = |cut: &Cut| cut.segmentation.of_shard(rank.shard).count() as u32;
        let sums = plan.n_microbatches > 1;
        let n_modules = of_shard(&wiring.update)
            + wiring.grads.values().map(|c| of_shard(c) + u32::from(sums)).sum::<u32>()
            + u32::from(plan.n_replicas > 1 && rank.replica == 0);
        Self {
            device,
            model,
            plan,
            wiring,
            rank,
            progress,
            cache: None,
            kept: None,
            limits: Limits::default(),
            cache_use: CacheUse::default(),
            compiled: BTreeMap::new(),
            n_compiled: 0,
            n_modules,
        }
    }

    /// With a cache of executables on disk.
    pub fn with_cache(self, cache: Option<&'a ExecutableCache>) -> Self {
        Self { cache, ..self }
    }

    /// With the executables that this process has loaded for other plans.
    pub fn with_kept(self, kept: &'a Kept<D>) -> Self {
        Self { kept: Some(kept), ..self }
    }

    /// Stops where it is no longer wanted.
    pub fn with_limits(self, limits: Limits<'a>) -> Self {
        Self { limits, ..self }
    }

    /// `given`: state tensors that start weights hold; `None` when the state is not made from the seed.
    ///
    /// # Errors
    /// [`RuntimeError::Unfinished`] at the limits; what has been compiled lies in the caches.
    pub fn compile(mut self, given: Option<&BTreeSet<usize>>) -> Result<Programs<D>, RuntimeError> {
        self.n_modules += u32::from(given.is_some());
        let owned: Vec<usize> =
            (0..self.model.n_params).filter(|&p| self.plan.owners[p] == Place::Shard(self.rank.shard)).collect();
        let init = given.map(|given| self.init(given)).transpose()?;
        let wiring = self.wiring;
        let mut grads = BTreeMap::new();
        for (variant, cut) in &wiring.grads {
            grads.insert(variant.clone(), self.grad(variant, cut)?);
        }
        let update = self.update()?;
        let add = match grads.values().next() {
            Some(_) if self.plan.n_replicas > 1 && self.rank.replica == 0 => Some(self.add(&owned)?),
            _ => None,
        };
        Ok(Programs { init, grads, update, add, owned, cache: self.cache_use })
    }

    fn module(&mut self, name: &str, graph: &Graph, aliases: &[Alias]) -> Result<Compiled<D>, RuntimeError> {
        verify(graph).map_err(|source| RuntimeError::Module { module: name.to_owned(), source })?;
        let hlo = to_hlo(graph, aliases);
        let key = kept::key(&hlo);
        let compiled = match self.compiled.get(&key) {
            Some(known) => known.clone(),
            None => {
                let compiled = self.loaded(&key, name, &hlo, aliases)?;
                self.compiled.insert(key, compiled.clone());
                compiled
            }
        };
        self.n_compiled += 1;
        (self.progress)(self.n_compiled, self.n_modules);
        Ok(compiled)
    }

    /// From what is loaded, from disk, or from the compiler.
    fn loaded(
        &mut self,
        key: &kept::Key,
        name: &str,
        hlo: &[u8],
        aliases: &[Alias],
    ) -> Result<Compiled<D>, RuntimeError> {
        if let Some(kept) = self.kept.and_then(|kept| kept.get(key)) {
            self.cache_use.hits += 1;
            return Ok(kept);
        }
        if self.limits.reached(self.cache_use.misses) {
            let left = self.n_modules.saturating_sub(self.n_compiled).max(1);
            let compiled = self.cache_use.misses;
            return Err(RuntimeError::Unfinished { compiled, left });
        }
        let at = |source| RuntimeError::Device { at: format!("compiling {name}"), source };
        let executable = match self.cache {
            None => {
                self.cache_use.misses += 1;
                self.device.compile(name, hlo, aliases).map_err(at)?
            }
            Some(cache) => {
                let cached = cache.compile(self.device, name, hlo, aliases).map_err(at)?;
                self.cache_use.hits += u32::from(cached.hit);
                self.cache_use.misses += u32::from(!cached.hit);
                self.cache_use.troubles.extend(cached.trouble.map(|t| t.to_string()));
                cached.executable
            }
        };
        let memory = self.device.memory(&executable).map_err(at)?;
        let compiled = (Arc::new(executable), memory);
        if let Some(kept) = self.kept {
            kept.put(*key, compiled.clone());
        }
        Ok(compiled)
    }

    /// The part of `init` that makes what this shard keeps and the start weights do not hold.
    fn init(&mut self, given: &BTreeSet<usize>) -> Result<Init<D>, RuntimeError> {
        let graph = &self.model.init;
        let mine: Vec<usize> = (0..self.model.state.len())
            .filter(|&i| {
                matches!(self.plan.owners[i], Place::Everywhere) || self.plan.owners[i] == Place::Shard(self.rank.shard)
            })
            .collect();
        let (from, yields): (Vec<usize>, Vec<usize>) = mine.into_iter().partition(|i| given.contains(i));
        let outputs: Vec<OpId> = yields.iter().map(|&i| graph.outputs()[i]).collect();
        let mut ops: BTreeSet<OpId> = BTreeSet::new();
        let mut queue = outputs.clone();
        while let Some(v) = queue.pop() {
            if !graph.parameters().contains(&v) && ops.insert(v) {
                queue.extend_from_slice(&graph.op(v).operands);
            }
        }
        let ops: Vec<OpId> = ops.into_iter().collect();
        let (executable, _) = self.module("init", &cut(graph, "init", &ops, graph.parameters(), &outputs), &[])?;
        Ok(Init { executable, from, yields })
    }

    fn grad(&mut self, variant: &str, grad_cut: &Cut) -> Result<GradProgram<D>, RuntimeError> {
        let model = self.model;
        let graph = &model.variant(variant).expect("the wiring is made from the model").graph;
        let n_batch = graph.parameters().len() - model.n_params - 1;
        let input = |position: usize| match position {
            p if p < model.n_params => Input::State(p),
            p if p < model.n_params + n_batch => Input::Batch(p - model.n_params),
            _ => Input::Key,
        };
        let sums = self.plan.n_microbatches > 1;
        let program = self.program(&format!("grad/{variant}"), graph, grad_cut, &input, Kind::Grad { sums })?;
        let results: Vec<usize> = program.pieces.iter().flat_map(|p| p.results.iter().copied()).collect();
        let zeros = if sums && !results.is_empty() {
            let shapes: Vec<ArrayShape> = results.iter().map(|&r| array(graph, graph.outputs()[r])).collect();
            Some(self.module(&format!("grad/{variant}/zeros"), &zeros("zeros", &shapes), &[])?.0)
        } else {
            None
        };
        let orders = self.plan.orders.get(variant).and_then(|o| o.get(self.rank.shard.index()));
        Ok(GradProgram { program, order: orders.cloned().unwrap_or_default(), results, zeros })
    }

    fn update(&mut self) -> Result<Program<D>, RuntimeError> {
        let model = self.model;
        let input = |position: usize| match position {
            p if p < model.state.len() => Input::State(p),
            p if p < model.state.len() + model.n_params => Input::Gradient(p - model.state.len()),
            _ => Input::Count,
        };
        let wiring = self.wiring;
        self.program("update", &model.update, &wiring.update, &input, Kind::Update)
    }

    /// Sums of this shard's gradients and those of another replica.
    fn add(&mut self, owned: &[usize]) -> Result<Arc<D::Executable>, RuntimeError> {
        let graph = &self.model.grads[0].graph;
        let n_scalars = graph.outputs().len() - self.model.n_params;
        let shapes: Vec<ArrayShape> = owned.iter().map(|&p| array(graph, graph.outputs()[n_scalars + p])).collect();
        // Gradients come in as parameters and go out as results; the sums are added to them.
        let source = zeros("add", &shapes);
        let values: Vec<OpId> = source.outputs().to_vec();
        let mut sum = identity(&source, &values);
        let all: Vec<usize> = (0..values.len()).collect();
        accumulate(&mut sum, &all);
        let aliases: Vec<Alias> = all.iter().map(|&i| Alias { output: i, parameter: values.len() + i }).collect();
        Ok(self.module("add", &sum, &aliases)?.0)
    }

    /// Cuts and compiles this shard's segments of a graph.
    fn program(
        &mut self,
        name: &str,
        graph: &Graph,
        graph_cut: &Cut,
        input: &dyn Fn(usize) -> Input,
        kind: Kind,
    ) -> Result<Program<D>, RuntimeError> {
        let segmentation = &graph_cut.segmentation;
        let parameter_at: BTreeMap<OpId, usize> =
            graph.parameters().iter().enumerate().map(|(i, &op)| (op, i)).collect();
        let mut remote = BTreeMap::new();
        for (message, channels) in segmentation.messages.iter().zip(&graph_cut.channels) {
            if message.to == self.rank.shard {
                remote.extend(message.values.iter().copied().zip(channels.iter().copied()));
            }
        }
        let mine: Vec<(usize, &Segment)> = segmentation.of_shard(self.rank.shard).collect();
        let mut pieces: Vec<Piece<D>> = Vec::with_capacity(mine.len());
        let mut of_segment = BTreeMap::new();
        for (at, &(segment_at, segment)) in mine.iter().enumerate() {
            let inputs: Vec<Input> = segment
                .inputs
                .iter()
                .map(|v| match parameter_at.get(v) {
                    Some(&position) if !remote.contains_key(v) => input(position),
                    _ => Input::Value(*v),
                })
                .collect();
            let mut outputs = segment.outputs.clone();
            outputs.extend(segment.results.iter().map(|&r| graph.outputs()[r]));
            let piece_name = format!("{name}/level{}", segment.level);
            let mut module = cut(graph, &piece_name, &segment.ops, &segment.inputs, &outputs);
            let n_values = segment.outputs.len();
            let mut donated = vec![false; inputs.len()];
            let mut aliases = Vec::new();
            match kind {
                Kind::Grad { sums: true } => {
                    accumulate(&mut module, &(n_values..outputs.len()).collect::<Vec<_>>());
                    aliases.extend(
                        (0..segment.results.len()).map(|i| Alias { output: n_values + i, parameter: inputs.len() + i }),
                    );
                }
                Kind::Grad { sums: false } => {}
                Kind::Update => {
                    for (i, &state) in segment.results.iter().enumerate() {
                        let Some(parameter) = inputs.iter().position(|&x| x == Input::State(state)) else { continue };
                        let read_later =
                            mine[at + 1..].iter().any(|(_, s)| s.inputs.contains(&segment.inputs[parameter]));
                        if !read_later {
                            donated[parameter] = true;
                            aliases.push(Alias { output: n_values + i, parameter });
                        }
                    }
                }
            }
            let (executable, memory) = self.module(&piece_name, &module, &aliases)?;
            let sends = segmentation
                .messages
                .iter()
                .zip(&graph_cut.channels)
                .filter(|(m, _)| m.from == segment_at)
                .map(|(m, channels)| Send {
                    to: m.to,
                    values: m
                        .values
                        .iter()
                        .zip(channels)
                        .map(|(v, &c)| (c, segment.outputs.binary_search(v).expect("a segment yields what it sends")))
                        .collect(),
                })
                .collect();
            of_segment.insert(segment_at as u32, at);
            pieces.push(Piece {
                name: piece_name,
                executable,
                inputs,
                donated,
                outputs: segment.outputs.clone(),
                results: segment.results.clone(),
                sends,
                memory,
            });
        }
        let mut n_readers = BTreeMap::new();
        for input in pieces.iter().flat_map(|p| &p.inputs) {
            if let Input::Value(v) = input {
                *n_readers.entry(*v).or_insert(0) += 1;
            }
        }
        Ok(Program { pieces, of_segment, remote, n_readers })
    }
}

/// What a graph's results are.
#[derive(Clone, Copy)]
enum Kind {
    /// `sums`: added up over microbatches.
    Grad { sums: bool },
    /// New values of the state.
    Update,
}

/// A graph that hands its parameters, shaped like `values`, through.
fn identity(graph: &Graph, values: &[OpId]) -> Graph {
    cut(graph, &graph.name, &[], values, values)
}

fn array(graph: &Graph, op: OpId) -> ArrayShape {
    graph.op(op).shape.as_array().expect("results are arrays").clone()
}

impl<D: Device> GradProgram<D> {
    /// Most bytes of residuals alive at one time, by the static order.
    pub fn residual_peak(&self, graph: &Graph) -> Bytes {
        let mut readers: BTreeMap<(u32, OpId), u32> = BTreeMap::new();
        let (mut alive, mut peak) = (0u64, 0u64);
        for task in &self.order {
            let Some(&at) = self.program.of_segment.get(&task.segment) else { continue };
            let piece = &self.program.pieces[at];
            let size = |v: OpId| graph.op(v).shape.bytes().0;
            for input in &piece.inputs {
                if let Input::Value(v) = input
                    && self.program.remote.contains_key(v)
                    && !readers.contains_key(&(task.microbatch, *v))
                {
                    readers.insert((task.microbatch, *v), self.program.n_readers[v]);
                    alive += size(*v);
                }
            }
            for &v in &piece.outputs {
                alive += size(v);
                readers.insert((task.microbatch, v), self.program.n_readers.get(&v).copied().unwrap_or(0));
            }
            peak = peak.max(alive);
            let read = piece.inputs.iter().filter_map(|i| if let Input::Value(v) = i { Some(*v) } else { None });
            for v in read {
                if let Some(left) = readers.get_mut(&(task.microbatch, v)) {
                    *left -= 1;
                    if *left == 0 {
                        alive -= size(v);
                    }
                }
            }
            for &v in &piece.outputs {
                if readers.get(&(task.microbatch, v)) == Some(&0) {
                    alive -= size(v);
                }
            }
        }
        Bytes(peak)
    }
}

/// Mirrors that `shard` reads.
pub fn mirrors_of(wiring: &Wiring, shard: ShardId) -> impl Iterator<Item = &Mirror> {
    wiring.mirrors.iter().filter(move |m| m.reader == shard)
}

/// A scalar as `f32`, where its type allows.
pub fn scalar(dtype: DType, data: &[u8]) -> Option<f32> {
    match (dtype, data) {
        (DType::Float32, &[a, b, c, d]) => Some(f32::from_le_bytes([a, b, c, d])),
        (DType::Float64, data) => Some(f64::from_le_bytes(data.try_into().ok()?) as f32),
        (DType::Bfloat16, &[a, b]) => Some(f32::from_le_bytes([0, 0, a, b])),
        _ => None,
    }
}
