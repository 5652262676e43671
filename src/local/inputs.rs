//! Everything that is known before anything is started: the job, its model, the cores it may use, its first plan.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};

use super::bundle;
use super::run::{Options, Problem, input};
use crate::api::{self, Granularity};
use crate::device::inventory::Cpu;
use crate::fetch;
use crate::graph::{self, Model};
use crate::plan::count::{self, Offer};
use crate::plan::split::choose;
use crate::plan::verify::{Fault, verify};
use crate::plan::{self, Aim, Fixed, Infeasible, Objective, Plan, Prepared};
use crate::runtime::checkpoint::{Checkpoint, Depth};
use crate::topology::{Device, LOOPBACK, Measured, Topology, nominal};
use crate::units::Bytes;
use crate::wire::Position;

/// A job as it will be run.
pub struct Inputs {
    pub job: api::TrainingJob,
    pub yaml: String,
    pub bundle: PathBuf,
    /// SHA-256 of the bundle and of what is split, and what earlier jobs have learned of its ops, by kind of device.
    pub digest: String,
    pub known: BTreeMap<String, Measured>,
    /// Start weights.
    pub weights: Option<PathBuf>,
    pub model: Arc<Model>,
    /// The model as the planner knows it.
    pub prepared: Arc<Prepared>,
    pub machine: Machine,
    pub plan: Plan,
    /// What the plan has to be faster than, once that can be measured.
    pub rival: Option<Rival>,
    /// What the planner has to say of it.
    pub note: Option<String>,
    /// Of the whole job; see [`Inputs::settle`].
    pub steps: u64,
    /// Where training goes on from; from the seed when absent.
    pub checkpoint: Option<Checkpoint>,
    /// Who says so.
    source: &'static str,
    /// Credentials and endpoints of object stores.
    pub storage: Vec<(String, String)>,
}

/// The same job with its model in other parts.
pub struct Rival {
    pub digest: String,
    pub model: Arc<Model>,
    pub prepared: Arc<Prepared>,
    pub plan: Plan,
}

impl Inputs {
    pub fn read(options: &Options) -> Result<Self, Problem> {
        let path = options.job.display();
        let yaml = std::fs::read_to_string(&options.job).with_context(|| format!("{path}")).map_err(input)?;
        let job = api::parse(&yaml).map_err(|e| input(anyhow!("{path}: {e}")))?;
        let spec = &job.spec;
        for got in fetch::missing(&spec.volumes, Path::new("."), &options.storage).map_err(input)? {
            if !options.quiet {
                eprintln!("fetched {}: {} in {} files", got.volume, Bytes(got.bytes), got.files);
            }
        }
        let bundle = PathBuf::from(&spec.bundle);
        let loaded = bundle::load_named(&bundle).with_context(|| format!("bundle {}", spec.bundle));
        let (model, digest) = loaded.map_err(input)?;
        let splits: Vec<graph::Split> = spec.partition.split.iter().map(Into::into).collect();
        let model = model.split(&splits).context("spec.partition.split").map_err(input)?;
        // Other ops than the bundle's: what was learned of those does not hold.
        let of_ops = |model: &Model| match model.split.is_empty() {
            true => digest.clone(),
            false => bundle::digest_of_split(&digest, model),
        };
        let known = options.remote.as_ref().and_then(|r| r.profiles.get(&of_ops(&model))).cloned().unwrap_or_default();
        let weights = match &spec.weights {
            Some(path) => Some(PathBuf::from(path)),
            // A bundle may bring its own start.
            None => model.manifest.weights.as_ref().map(|w| bundle.join(&w.file)),
        };
        if let Some(path) = weights.as_deref().filter(|p| !p.is_file()) {
            return Err(input(anyhow!("spec.weights: {} does not exist", path.display())));
        }
        let (source, path) = match (&options.resume, &spec.checkpoint.source) {
            (Some(path), _) => ("--resume", Some(path.clone())),
            (None, path) => ("spec.checkpoint.source", path.as_ref().map(PathBuf::from)),
        };
        let checkpoint = match &path {
            Some(path) => {
                let found = Checkpoint::open(path, Depth::Checksums).context(source).map_err(input)?;
                for skipped in &found.skipped {
                    eprintln!("warning: passed over {:#}", anyhow::Error::msg(skipped.to_string()));
                }
                found.checkpoint.fits(&model).context(source).map_err(input)?;
                Some(found.checkpoint)
            }
            None => None,
        };
        let given = options.remote.as_ref().map(|r| r.devices.clone());
        let machine = Machine::of(spec, given).map_err(|e| input(anyhow!(e)))?;
        let counts = options.shards.map_or_else(|| machine.shards(spec), |n| n..=n);
        // The most is refused first, if any.
        let mut topologies: BTreeMap<u32, Topology> = BTreeMap::new();
        for n_shards in counts.clone().rev() {
            let n_workers = n_shards.saturating_mul(spec.parallelism.replicas) as usize;
            let mut topology = machine.topology(n_workers, &|_| 1.0).map_err(|e| input(anyhow!(e)))?;
            for device in &mut topology.devices {
                device.measured = known.get(&device.kind).copied();
            }
            topologies.insert(n_shards, topology);
        }
        let prepared = Prepared::new(&model);
        let may_split = splits.is_empty() && spec.parallelism.cuts.is_empty();
        let (aim, fixed) = (Aim::from(&spec.partition), Fixed::from(&spec.partition));
        // The plan, and where the planner splits ops the model and the plan without that; and why.
        type Solved = (Plan, Option<(Model, Option<Plan>)>, Option<String>);
        let best = |microbatch, splits: bool| -> Result<Solved, Infeasible> {
            let counted = count::best(counts.clone(), spec.partition.wanted(), |n_shards| {
                let (ask, topology) = (Ask { n_shards, microbatch }, &topologies[&n_shards]);
                let found = if splits {
                    let chosen = choose(&ask.problem(spec, &fixed, &model, topology))?;
                    holds(chosen.model.as_ref().unwrap_or(&model), topology, &chosen.plan)?;
                    let why = chosen.why();
                    // Where room is what it is for, a split need not be faster.
                    let without = chosen.without.ok().filter(|_| aim.objective == Objective::Throughput);
                    let without = without.filter(|plan| holds(&model, topology, plan).is_ok());
                    (chosen.plan, chosen.model.map(|split| (split, without)), why)
                } else {
                    (ask.solve(spec, &model, &prepared, topology, None)?, None, None)
                };
                let offer = Offer::of(aim.objective, topology, &found.0);
                Ok((found, offer))
            })?;
            let why = counted.why();
            let (plan, split, note) = counted.found;
            let notes: Vec<String> = [why, note].into_iter().flatten().collect();
            Ok((plan, split, (!notes.is_empty()).then(|| notes.join("; "))))
        };
        let solve = |microbatch| match spec.partition.granularity {
            Granularity::Op if may_split => best(microbatch, true),
            Granularity::Auto if may_split => match best(microbatch, false) {
                Err(Infeasible::Memory { .. } | Infeasible::Indivisible { .. }) => best(microbatch, true),
                found => found,
            },
            _ => best(microbatch, false),
        };
        // Other microbatches are other dropout masks: a job goes on with those it had.
        let before = checkpoint.as_ref().and_then(|c| c.index().microbatch);
        let solved = match (spec.parallelism.microbatch, before) {
            (None, Some(before)) => solve(Some(before)).or_else(|e| {
                let solved = solve(None)?;
                eprintln!(
                    "warning: microbatches have {} rows from here on, they had {before} and losses will differ where \
                     there is dropout: {e}",
                    solved.0.microbatch
                );
                Ok(solved)
            }),
            (asked, _) => solve(asked),
        };
        let (plan, split, note) = solved.map_err(|e: Infeasible| input(e))?;
        let whole = |plan| Rival { digest: of_ops(&model), model: Arc::new(model), prepared: Arc::new(prepared), plan };
        let (Rival { digest, model, prepared, plan }, rival) = match split {
            Some((split, without)) => {
                let (digest, prepared) = (of_ops(&split), Arc::new(Prepared::new(&split)));
                (Rival { digest, model: Arc::new(split), prepared, plan }, without.map(whole))
            }
            None => (whole(plan), None),
        };
        let steps = options.steps.unwrap_or(spec.steps);
        let storage = options.storage.clone();
        Ok(Self {
            yaml,
            bundle,
            digest,
            known,
            weights,
            model,
            prepared,
            machine,
            plan,
            rival,
            note,
            steps,
            checkpoint,
            source,
            storage,
            job,
        })
    }

    /// Settles how many steps the job has: as many as were `asked` for, else by its manifest; where that has epochs, by the
    /// batches of a pass over the data.
    pub fn settle(&mut self, asked: Option<u64>, n_batches: Option<u64>) -> Result<(), Problem> {
        if let (None, Some(epochs), Some(n_batches)) = (asked, self.job.spec.epochs, n_batches) {
            self.steps = n_batches.saturating_mul(epochs.into());
        }
        let steps = self.steps;
        if let Some(done) = self.checkpoint.as_ref().map(|c| c.index().step).filter(|&done| done >= steps) {
            let source = self.source;
            return Err(input(anyhow!("{source}: the checkpoint is at step {done}, the job ends after {steps}")));
        }
        Ok(())
    }

    /// Goes on with the rival's model and plan; the rival has those of before.
    pub fn change_places(&mut self) {
        if let Some(Rival { digest, model, prepared, plan }) = &mut self.rival {
            std::mem::swap(digest, &mut self.digest);
            std::mem::swap(model, &mut self.model);
            std::mem::swap(prepared, &mut self.prepared);
            std::mem::swap(plan, &mut self.plan);
        }
    }

    /// Step and data position at which training starts.
    pub fn start(&self) -> (u64, Position) {
        self.checkpoint.as_ref().map_or((0, Position::default()), |c| (c.index().step, c.index().position))
    }
}

/// What a plan should look like.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    pub n_shards: u32,
    pub microbatch: Option<u64>,
}

impl Ask {
    fn problem<'a>(
        &self,
        spec: &api::TrainingJobSpec,
        fixed: &'a Fixed,
        model: &'a Model,
        topology: &'a Topology,
    ) -> plan::Problem<'a> {
        plan::Problem {
            model,
            topology,
            n_shards: self.n_shards,
            n_replicas: spec.parallelism.replicas,
            microbatch: self.microbatch,
            schedule: spec.parallelism.schedule.kind(),
            aim: (&spec.partition).into(),
            fixed,
        }
    }

    /// A plan that holds: found by the planner, and verified without it.
    pub fn solve(
        &self,
        spec: &api::TrainingJobSpec,
        model: &Model,
        prepared: &Prepared,
        topology: &Topology,
        previous: Option<&Plan>,
    ) -> Result<Plan, Infeasible> {
        let fixed = Fixed::from(&spec.partition);
        let problem = self.problem(spec, &fixed, model, topology);
        // Other shards than the job's were asked for by hand, and take other cuts.
        let plan = match Some(self.n_shards) == spec.parallelism.shards && !spec.parallelism.cuts.is_empty() {
            true => prepared.pinned(&problem, &spec.parallelism.cuts)?,
            false => prepared.solve(&problem, previous)?,
        };
        holds(model, topology, &plan).map(|()| plan)
    }

    /// An earlier plan with what is to be expected of it on these devices; `None` when it does not fit them.
    pub fn repriced(
        &self,
        spec: &api::TrainingJobSpec,
        model: &Model,
        prepared: &Prepared,
        topology: &Topology,
        earlier: &Plan,
    ) -> Option<Plan> {
        let fixed = Fixed::from(&spec.partition);
        prepared.repriced(&self.problem(spec, &fixed, model, topology), earlier)
    }
}

/// No plan is run in which only its planner believes: the verifier shares no code with it.
fn holds(model: &Model, topology: &Topology, plan: &Plan) -> Result<(), Infeasible> {
    let why = |fault: Fault| format!("{:#}", anyhow!(fault));
    verify(model, topology, plan).map(drop).map_err(|fault| Infeasible::Unsound { why: why(fault) })
}

/// This machine, shared out among workers, or the devices that were given to the job.
#[derive(Clone, Debug)]
pub struct Machine {
    cpu: Cpu,
    /// Cores of each worker, if the job says so.
    cores: Option<u32>,
    /// Bytes of each worker, if the job says so.
    memory: Option<u64>,
    /// Workers run there instead of on this machine; each has its cores for itself.
    given: Option<Topology>,
}

impl Machine {
    /// What a job may use; `given`: devices elsewhere.
    pub fn of(spec: &api::TrainingJobSpec, given: Option<Topology>) -> Result<Self, String> {
        let memory = spec.resources.memory_bytes()?;
        Ok(Self { cpu: Cpu::probe(), cores: spec.resources.cores, memory, given })
    }

    /// Shards that a job may have here: the number it says, or as many as its range of devices allows. Devices that were
    /// given are all used; and so is the machine where workers share it evenly: what a worker gains by another core is not
    /// known before it is measured.
    pub fn shards(&self, spec: &api::TrainingJobSpec) -> RangeInclusive<u32> {
        let parallelism = &spec.parallelism;
        let each = self.cores.unwrap_or(1).max(1) as usize;
        let free = self.given.as_ref().map_or(self.cpu.cores.len() / each, |given| given.devices.len());
        let most = parallelism.shards.unwrap_or_else(|| spec.resources.shards(free, parallelism.replicas));
        let fixed = parallelism.shards.is_some() || self.given.is_some() || self.cores.is_none();
        let least = if fixed { most } else { spec.resources.least_shards(parallelism.replicas).clamp(1, most) };
        least..=most
    }

    /// Cores of each of `n` workers: disjoint as long as there are enough, else shared in turn.
    pub fn share_cores(&self, n: usize) -> Result<Vec<Vec<usize>>, String> {
        const MAX_WORKERS: usize = 4096;
        if n > MAX_WORKERS {
            return Err(format!("spec.parallelism: {n} workers on one machine, the limit is {MAX_WORKERS}"));
        }
        if let Some(given) = &self.given {
            let has = given.devices.len();
            return if n <= has {
                Ok(vec![Vec::new(); n])
            } else {
                Err(format!("spec.parallelism: {n} workers, the job was given {has} devices"))
            };
        }
        let all = &self.cpu.cores;
        let each = self.cores.map_or((all.len() / n.max(1)).max(1), |c| c as usize);
        if each > all.len() {
            return Err(format!("spec.resources.cores: {each}, this machine has {}", all.len()));
        }
        Ok((0..n).map(|r| (0..each).map(|i| all[(r * each + i) % all.len()]).collect()).collect())
    }

    /// One device for each of `n` workers, with nominal figures scaled by its cores and by `speed(worker)`.
    pub fn topology(&self, n: usize, speed: &dyn Fn(usize) -> f64) -> Result<Topology, String> {
        let cores = self.share_cores(n)?;
        if let Some(given) = &self.given {
            let mut topology = given.clone();
            topology.devices.truncate(n);
            for (i, device) in topology.devices.iter_mut().enumerate() {
                device.speed *= speed(i);
            }
            return Ok(topology);
        }
        let one = nominal("cpu").expect("CPUs are known");
        let share = Bytes(self.cpu.memory.0 / n.max(1) as u64);
        // Workers that share cores share their speed.
        let used: usize = cores.iter().map(Vec::len).sum();
        let crowding = (self.cpu.cores.len() as f64 / used.max(1) as f64).min(1.0);
        let devices = cores
            .iter()
            .enumerate()
            .map(|(i, c)| Device {
                name: format!("cpu{i}"),
                flops: one.flops * c.len() as f64,
                bandwidth: one.bandwidth * c.len() as f64,
                memory: self.memory.map_or(share, Bytes),
                speed: crowding * speed(i),
                ..one.clone()
            })
            .collect();
        Ok(Topology::new(devices, LOOPBACK, LOOPBACK))
    }
}
