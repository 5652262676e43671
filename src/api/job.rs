//! `TrainingJob`: one model, its data, and the devices it may use.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::feeder::Feeder;
use super::placement::{Placement, Pods};
use super::resources::Resources;
use super::split::Split;
use super::status::TrainingJobStatus;
use super::volume::Volume;
use crate::graph::error::explain;
use crate::plan::count::Wanted;
use crate::plan::{self, Aim, Fixed, ScheduleKind, To};
use crate::transition::{self, Settings};
use crate::units::Seconds;

/// Train a model: cut its graph over devices and run it.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "foreshard.dev",
    version = "v1alpha1",
    kind = "TrainingJob",
    namespaced,
    shortname = "tj",
    category = "foreshard",
    status = "TrainingJobStatus",
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$')")
        .message("metadata.name: services and pods are named after the job: at most 50 lower-case letters, digits and '-', beginning with a letter"),
    printcolumn = r#"{"name":"State","type":"string","jsonPath":".status.conditions[?(@.type==\"Training\")].reason"}"#,
    printcolumn = r#"{"name":"Plan","type":"string","jsonPath":".status.plan"}"#,
    printcolumn = r#"{"name":"Step","type":"integer","jsonPath":".status.step"}"#,
    printcolumn = r#"{"name":"Of","type":"integer","jsonPath":".status.steps"}"#,
    printcolumn = r#"{"name":"ETA","type":"string","jsonPath":".status.eta"}"#,
    printcolumn = r#"{"name":"Loss","type":"string","jsonPath":".status.loss"}"#,
    printcolumn = r#"{"name":"Shards","type":"integer","jsonPath":".status.shards"}"#,
    printcolumn = r#"{"name":"Restarts","type":"integer","jsonPath":".status.restarts"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Why","type":"string","priority":1,"jsonPath":".status.conditions[?(@.type==\"Training\")].message"}"#
)]
#[x_kube(
    validation = Rule::new("has(self.volumes) && self.volumes.exists(v, self.bundle.startsWith(v.name + '/'))")
        .message("bundle must lie on a volume: begin it with the name of one of spec.volumes, as in models/char_gpt.bundle"),
    validation = Rule::new("has(self.volumes) && (has(self.results) ? self.volumes.exists(v, v.name == self.results && has(v.persistentVolumeClaim)) : self.volumes.exists_one(v, has(v.persistentVolumeClaim)))")
        .message("results must name one of spec.volumes that is a persistentVolumeClaim: weights and checkpoints go there; it may be absent where there is only one"),
    validation = Rule::new("has(self.data.uri) != has(self.data.socket)")
        .message("data: give either uri or socket"),
    validation = Rule::new("has(self.data.socket) == has(self.data.feeder) && (!has(self.data.socket) || !self.data.socket.startsWith('/') && !self.data.socket.contains('..'))")
        .message("data: on a cluster, who writes to socket is a feeder, and the socket lies in the job's directory, as in feeder.sock; give both or neither"),
    validation = Rule::new("!has(self.epochs) || has(self.data.uri)")
        .message("epochs: how much data there is on data.socket is not known; give steps"),
    validation = Rule::new("!has(self.parallelism) || !has(self.parallelism.cuts) || size(self.parallelism.cuts) == 0 || (has(self.parallelism.shards) && size(self.parallelism.cuts) + 1 == self.parallelism.shards)")
        .message("parallelism.cuts: n cuts make n + 1 shards; give one cut fewer than shards"),
    validation = Rule::new("!has(self.parallelism) || !has(self.parallelism.cuts) || size(self.parallelism.cuts) == 0 || !has(self.partition) || !has(self.partition.granularity) || self.partition.granularity in ['auto', 'layer']")
        .message("partition.granularity: parallelism.cuts are made where layers begin; leave one of them out"),
    validation = Rule::new("!has(self.partition) || !has(self.partition.granularity) || self.partition.granularity != 'layer' || !has(self.partition.split) || size(self.partition.split) == 0")
        .message("partition.split: granularity layer keeps layers whole, and a split goes inside; leave one of them out"),
    validation = Rule::new("!has(self.partition) || !has(self.partition.split) || self.partition.split.all(s, has(s.ops) ? !has(s.tensor) && !has(s.axis) : has(s.tensor) && has(s.axis))")
        .message("partition.split: give each either tensor and axis, or ops"),
    validation = Rule::new("!has(self.partition) || !has(self.partition.split) || self.partition.split.all(s, self.partition.split.exists_one(t, has(s.ops) && has(t.ops) && s.ops == t.ops || has(s.tensor) && has(t.tensor) && s.tensor == t.tensor))")
        .message("partition.split: one of them is there twice; name each tensor and each pattern of ops once"),
    validation = Rule::new("!has(self.partition) || !has(self.partition.pins) || self.partition.pins.all(p, has(p.shard) && !has(p.device))")
        .message("partition.pins: on a cluster devices get their names later; give each pin a shard, and no device"),
    validation = Rule::new("!has(self.partition) || !has(self.partition.cheapest)")
        .message("partition.cheapest: on a cluster as many devices are taken as are free; leave it out"),
    validation = Rule::new("!has(self.parallelism) || !has(self.parallelism.shards) || !has(self.resources) || !has(self.resources.devices) || self.resources.devices.exists(d, d.min <= self.parallelism.shards * self.parallelism.replicas && self.parallelism.shards * self.parallelism.replicas <= d.max)")
        .message("parallelism.shards times replicas lies in no range of resources.devices; leave shards out, and it is chosen by what is free"),
    validation = Rule::new("!has(self.checkpoint) || !has(self.checkpoint.source) || (has(self.volumes) && self.volumes.exists(v, self.checkpoint.source == v.name || self.checkpoint.source.startsWith(v.name + '/')))")
        .message("checkpoint.source must lie on a volume: begin it with the name of one of spec.volumes, as in results/digits-6714b691"),
    validation = Rule::new("!has(self.weights) || !has(self.checkpoint) || !has(self.checkpoint.source)")
        .message("weights: checkpoint.source brings params and all other state; leave one of them out"),
    validation = Rule::new("(has(self.checkpoint) && has(self.checkpoint.source) ? self.checkpoint.source : '') == (has(oldSelf.checkpoint) && has(oldSelf.checkpoint.source) ? oldSelf.checkpoint.source : '')")
        .message("checkpoint.source cannot change once a job exists; make another job"),
    validation = Rule::new("self.bundle == oldSelf.bundle && self.seed == oldSelf.seed")
        .message("bundle and seed cannot change once a job exists; make another job"),
    validation = Rule::new("has(self.managedBy) == has(oldSelf.managedBy) && (!has(self.managedBy) || self.managedBy == oldSelf.managedBy)")
        .message("managedBy cannot change once a job exists; make another job"),
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainingJobSpec {
    /// Directory of the bundle that `foreshard-export` wrote.
    #[schemars(length(min = 1, max = 1024))]
    pub bundle: String,
    pub data: Data,
    /// Optimizer steps to take, where no `epochs` are given.
    #[serde(default = "steps")]
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Passes over the data to make, instead of `steps`. What is left of a pass after its last whole batch comes up in the
    /// next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub epochs: Option<u32>,
    /// Seeds initial params, dropout and the order of the data.
    #[serde(default)]
    pub seed: u32,
    /// Start weights (safetensors by the bundle's names) instead of freshly made ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub weights: Option<String>,
    #[serde(default)]
    pub parallelism: Parallelism,
    #[serde(default)]
    pub partition: Partition,
    #[serde(default)]
    pub resources: Resources,
    #[serde(default)]
    pub checkpoint: Checkpoint,
    #[serde(default)]
    pub failure_policy: FailurePolicy,
    #[serde(default)]
    pub adaptation: Adaptation,
    /// On a cluster: what stands beside each other in the job's directory, each under its name. The directory in which
    /// `foreshard local run` is started takes their place on one machine.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub volumes: Vec<Volume>,
    /// On a cluster: the volume on which weights, checkpoints and logs are written, in a directory of the job's own (it
    /// stands in status.results). All pods of the job must be able to write to it. May be absent where only one of the
    /// volumes is a claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub results: Option<String>,
    /// On a cluster: where shards may go.
    #[serde(default)]
    pub placement: Placement,
    #[serde(default)]
    pub pods: Pods,
    /// Another controller that looks after this job, such as `kueue.x-k8s.io/multikueue`; the operator then leaves it
    /// alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 3, max = 63), regex(pattern = "^[a-z0-9][-a-z0-9.]*/[A-Za-z0-9][-A-Za-z0-9_.]*$"))]
    pub managed_by: Option<String>,
    /// Stop after the steps in flight, keep a checkpoint, give all devices back; go on from it when false again.
    #[serde(default)]
    pub suspend: bool,
    /// A job that has not ended after so many seconds has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub active_deadline_seconds: Option<u32>,
    /// So many seconds after its end a job is deleted; kept when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds_after_finished: Option<u32>,
}

fn steps() -> u64 {
    1000
}

/// Who looks after a job that does not say.
pub const CONTROLLER: &str = "foreshard.dev/operator";

impl TrainingJobSpec {
    /// The volume that results are written to.
    pub fn results(&self) -> Option<&str> {
        let claim = || self.volumes.iter().find(|v| v.persistent_volume_claim.is_some()).map(|v| v.name.as_str());
        self.results.as_deref().or_else(claim)
    }

    /// Workers of the job, where their number is not chosen by what is free.
    pub fn pinned(&self) -> Option<u32> {
        let Parallelism { shards, replicas, .. } = self.parallelism;
        let one = self.resources.devices.is_empty().then_some(1);
        shards.or(one).map(|shards| shards.saturating_mul(replicas))
    }
}

/// When the plan changes while the job trains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.interval <= self.horizon",
    "message": "adaptation.interval must be at most adaptation.horizon: what was foreseen is past by then"
}]))]
pub struct Adaptation {
    pub mode: Mode,
    /// How often, in seconds, the running plan is weighed against others: forecasts are made and decisions are taken no more
    /// often. At most the horizon.
    #[schemars(range(min = 0.1, max = 3600.0))]
    pub interval: f64,
    /// What is observed or foreseen has to leave what was expected by this share of it.
    #[schemars(range(min = 0.01, max = 10.0))]
    pub threshold: f64,
    /// How far ahead gains are summed up and forecasts are believed, in seconds.
    #[schemars(range(min = 1.0, max = 86400.0))]
    pub horizon: f64,
    /// A new plan has to save this share of time.
    #[schemars(range(min = 0.0, max = 0.9))]
    pub min_gain: f64,
    /// What is observed has to stay away so many seconds.
    #[schemars(range(min = 0.0, max = 86400.0))]
    pub dwell: f64,
    /// Least seconds from one cutover to the next; more after moves that did not pay.
    #[schemars(range(min = 0.0, max = 86400.0))]
    pub cooldown: f64,
    /// A move has to save (1 + hysteresis) times what it costs.
    #[schemars(range(min = 0.0, max = 100.0))]
    pub hysteresis: f64,
    pub budget: Budget,
    /// Whether load is foreseen; if not, moves answer only what has happened.
    pub forecast: bool,
}

/// Whether plans change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// Better plans are adopted.
    #[default]
    Auto,
    /// Better plans are shown and wait for approval.
    Recommend,
    /// The first plan stays.
    Off,
}

/// What moving may cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Budget {
    /// Share of all time in which training may stand still for moves.
    #[schemars(range(min = 0.001, max = 1.0))]
    pub share: f64,
    /// Moves of the whole job; as many as pay when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moves: Option<u32>,
}

impl Default for Adaptation {
    fn default() -> Self {
        let Settings { interval, threshold, horizon, min_gain, dwell, cooldown, hysteresis, forecast, .. } =
            Settings::default();
        Self {
            mode: Mode::default(),
            interval: interval.0,
            threshold,
            horizon: horizon.0,
            min_gain,
            dwell: dwell.0,
            cooldown: cooldown.0,
            hysteresis,
            budget: Budget::default(),
            forecast,
        }
    }
}

impl Default for Budget {
    fn default() -> Self {
        let transition::Budget { share, moves } = transition::Budget::default();
        Self { share, moves }
    }
}

impl From<Adaptation> for Settings {
    fn from(a: Adaptation) -> Self {
        Self {
            mode: match a.mode {
                Mode::Auto => transition::Mode::Auto,
                Mode::Recommend => transition::Mode::Recommend,
                Mode::Off => transition::Mode::Off,
            },
            interval: Seconds(a.interval),
            threshold: a.threshold,
            horizon: Seconds(a.horizon),
            min_gain: a.min_gain,
            dwell: Seconds(a.dwell),
            cooldown: Seconds(a.cooldown),
            hysteresis: a.hysteresis,
            budget: transition::Budget { share: a.budget.share, moves: a.budget.moves },
            forecast: a.forecast,
        }
    }
}

/// When the state of training is written to disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Checkpoint {
    /// Where a job begins that has no checkpoint of its own yet: with the state, and at the step and the place in the data, of
    /// this checkpoint of another job with the same model. A checkpoint, or the directory of a run or of all runs of a job,
    /// for the newest one there. It is only read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub source: Option<String>,
    /// Steps between two checkpoints; 0 for none.
    #[serde(default = "every_steps")]
    pub every_steps: u64,
    /// So many of the newest are kept.
    #[serde(default = "keep_last")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub keep_last: u32,
    /// Also kept: those whose step is a multiple of this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub keep_every: Option<u64>,
}

fn every_steps() -> u64 {
    100
}

fn keep_last() -> u32 {
    2
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { source: None, every_steps: every_steps(), keep_last: keep_last(), keep_every: None }
    }
}

/// What happens when a worker is killed, hangs or loses its connections: it is restarted, and all go back to the last
/// checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FailurePolicy {
    /// Restarts before the job fails; 0 for none.
    #[serde(default = "max_restarts")]
    #[schemars(range(max = 1000))]
    pub max_restarts: u32,
    /// A worker that neither answers nor finishes a step for so long hangs.
    #[serde(default = "hang_seconds")]
    #[schemars(range(min = 1, max = 86400))]
    pub hang_seconds: u32,
}

fn max_restarts() -> u32 {
    3
}

fn hang_seconds() -> u32 {
    120
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self { max_restarts: max_restarts(), hang_seconds: hang_seconds() }
    }
}

/// Where training data comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Data {
    /// A file, a directory, or a URL of an object store (`s3://`, `gs://`, `az://`, `https://`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 4096))]
    pub uri: Option<String>,
    /// On a cluster: a secret of the job's namespace whose entries are environment variables of the container that fetches
    /// data, the head or the feeder: what an object store wants to see, such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and
    /// AWS_ENDPOINT. `foreshard local run` takes them from its own environment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub credentials: Option<String>,
    /// Told from the file's extension when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Batch tensor to columns of the data; a tensor of the same name as a column needs no entry. Several columns
    /// become one tensor, in order; `pixel*` stands for all columns that begin so.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub columns: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    pub shuffle: Shuffle,
    /// Unix socket on which a program of yours writes batches as an Arrow IPC stream, instead of `uri`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 107))]
    pub socket: Option<String>,
    /// On a cluster: that program. `foreshard local run` leaves it to you to start one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feeder: Option<Feeder>,
    /// Batches read ahead of the training loop.
    #[serde(default = "read_ahead")]
    #[schemars(range(min = 1, max = 64))]
    pub read_ahead: u32,
}

fn read_ahead() -> u32 {
    4
}

/// Format of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Bytes are tokens; `targets` are the tokens one place later.
    Text,
    Csv,
    /// One JSON object per line.
    Jsonl,
    Parquet,
    /// One array, for a single batch tensor.
    Npy,
    Safetensors,
}

/// Order of samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Shuffle {
    /// Another order in each pass over the data, fixed by the seed.
    #[default]
    Epoch,
    /// As stored.
    None,
}

/// How the model is spread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Parallelism {
    /// Parts the graph is cut into. When absent: 1 without a range of resources.devices; with one as many as devices are
    /// free, or, on one machine with resources.cores, as many as make the plan best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub shards: Option<u32>,
    /// Copies of the whole pipeline; each takes its share of every batch.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 4096))]
    pub replicas: u32,
    /// Rows of a microbatch; the planner chooses among those of the bundle when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub microbatch: Option<u64>,
    #[serde(default)]
    pub schedule: Schedule,
    /// Blocks of the model at which the second and later shards begin, such as `[block4]` for two shards; where the
    /// planner finds best when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4095), inner(length(max = 256)))]
    pub cuts: Vec<String>,
}

fn one() -> u32 {
    1
}

impl Default for Parallelism {
    fn default() -> Self {
        Self { shards: None, replicas: 1, microbatch: None, schedule: Schedule::default(), cuts: Vec::new() }
    }
}

/// How the graph is cut, where `parallelism.cuts` does not say it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Partition {
    /// How finely the planner may cut.
    pub granularity: Granularity,
    /// What the planner is after.
    pub objective: Objective,
    /// Whether workers may compute forward values again for the backward half, instead of keeping them.
    pub recompute: Recompute,
    /// Params that are kept in parts, with their gradients and optimizer slots; products that read them become as many
    /// smaller ones, whose results are concatenated or summed. Or ops that work on parts of the rows of a microbatch, each
    /// of which reads whole params: replicas of some layers. Parts can be on different shards.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub split: Vec<Split>,
    /// Ops that run on a certain worker, whatever that costs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub pins: Vec<Pin>,
    /// Sets of ops that stay on one shard, each a list of patterns as in `pins`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 16), inner(length(min = 1, max = 256))))]
    pub together: Vec<Vec<String>>,
    /// On one machine with resources.cores, of a range of devices: so many that a step takes the least time of all devices
    /// together, instead of so many that the plan is best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cheapest: Option<Cheapest>,
}

/// How slow a cheap plan may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Cheapest {
    /// Steps that the planner must predict for every second.
    #[schemars(range(min = 0.0, max = 1e9))]
    pub min_steps_per_second: f64,
}

impl Partition {
    /// How many devices plans are chosen to take.
    pub fn wanted(&self) -> Wanted {
        self.cheapest.map_or(Wanted::Best, |c| Wanted::Cheapest { floor: c.min_steps_per_second })
    }
}

/// How finely the planner may cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// Between any two ops; where no plan fits the devices, inside ops as well.
    #[default]
    Auto,
    /// Where layers begin: the named scopes of the model, as `foreshard graph` lists them, stay whole.
    Layer,
    /// Between any two ops: those that `split` does not name stay whole.
    Sublayer,
    /// Inside ops as well: where `split` is empty, a few splits are tried, and one is taken that makes the job fit its devices
    /// or the plan better by a twentieth. The log says which, and `plan.json` holds it.
    Op,
}

/// What the planner is after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// Short steps. All steps have equally many samples: this is also most samples per second.
    #[default]
    Throughput,
    /// The fullest worker needs as small a share of its memory as can be; steps may take longer.
    Memory,
}

/// Whether workers may compute forward values again for the backward half, instead of keeping them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Those do that have too little memory otherwise; where the objective is memory, those that are fullest otherwise.
    #[default]
    Auto,
    /// A plan has to fit without that.
    Never,
    /// All workers do that have something to compute again: least memory between segments, and more time.
    Always,
}

impl From<&Partition> for Aim {
    /// Whether ops are split is not the planner's question but that of whoever asks it.
    fn from(partition: &Partition) -> Self {
        Self {
            granularity: match partition.granularity {
                Granularity::Layer => plan::Granularity::Layer,
                Granularity::Auto | Granularity::Sublayer | Granularity::Op => plan::Granularity::Sublayer,
            },
            objective: match partition.objective {
                Objective::Throughput => plan::Objective::Throughput,
                Objective::Memory => plan::Objective::Memory,
            },
            recompute: match partition.recompute {
                Recompute::Auto => plan::Recompute::Auto,
                Recompute::Never => plan::Recompute::Never,
                Recompute::Always => plan::Recompute::Always,
            },
        }
    }
}

impl From<&Partition> for Fixed {
    fn from(partition: &Partition) -> Self {
        let pin = |pin: &Pin| {
            let to = match (&pin.shard, &pin.device) {
                (Some(shard), _) => To::Shard(*shard),
                // Neither is refused when a manifest is read.
                (None, device) => To::Device(device.clone().unwrap_or_default()),
            };
            plan::Pin { ops: pin.ops.clone(), to }
        };
        Self { pins: partition.pins.iter().map(pin).collect(), together: partition.together.clone() }
    }
}

/// Ops, and the shard or the device that runs them: one of both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pin {
    /// A named scope of the model, as the columns of `foreshard graph --picture` have it, a param, or an op by its name or
    /// path; `*` stands for any characters, as in `block*`. What computes a derivative goes with what it is the derivative of.
    #[schemars(length(min = 1, max = 256))]
    pub ops: String,
    /// Position of the shard, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 4095))]
    pub shard: Option<u32>,
    /// On one machine: name of the device, such as `cpu1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub device: Option<String>,
}

/// Order of microbatches through the pipeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Schedule {
    /// One forward, one backward: least memory.
    #[default]
    #[serde(rename = "1F1B")]
    OneFOneB,
    /// All forward, then all backward.
    GPipe,
    /// 1F1B with several ranges of the model on each shard: fills sooner, sends more.
    Interleaved,
    /// 1F1B where gradients that other shards wait for come first, and those of params fill what would be waiting.
    ZeroBubble,
    /// The one that makes the first plan best; plans after it keep it.
    Auto,
}

impl Schedule {
    /// `None` leaves it to the planner.
    pub fn kind(self) -> Option<ScheduleKind> {
        match self {
            Self::OneFOneB => Some(ScheduleKind::OneFOneB),
            Self::GPipe => Some(ScheduleKind::GPipe),
            Self::Interleaved => Some(ScheduleKind::Interleaved),
            Self::ZeroBubble => Some(ScheduleKind::ZeroBubble),
            Self::Auto => None,
        }
    }
}

/// Reads a manifest. The error names line and field, and suggests what was meant.
pub fn parse(yaml: &str) -> Result<TrainingJob, String> {
    const VERSION: &str = "foreshard.dev/v1alpha1";
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Kind {
        #[serde(default)]
        api_version: String,
        #[serde(default)]
        kind: String,
    }
    let kind: Kind = serde_yaml::from_str(yaml).map_err(|e| format!("not a manifest: {e}"))?;
    if kind.api_version != VERSION || kind.kind != "TrainingJob" {
        return Err(format!(
            "apiVersion {:?} and kind {:?}, expected {VERSION:?} and \"TrainingJob\"",
            kind.api_version, kind.kind
        ));
    }
    let job: TrainingJob = serde_yaml::from_str(yaml).map_err(|e| explain(&e.to_string()))?;
    check(&job.spec)?;
    Ok(job)
}

/// What no schema tells. The error names the field.
pub fn check(spec: &TrainingJobSpec) -> Result<(), String> {
    let positive = [
        ("spec.steps", spec.steps),
        ("spec.epochs", spec.epochs.unwrap_or(1).into()),
        ("spec.parallelism.shards", spec.parallelism.shards.unwrap_or(1).into()),
        ("spec.parallelism.replicas", spec.parallelism.replicas.into()),
        ("spec.parallelism.microbatch", spec.parallelism.microbatch.unwrap_or(1)),
        ("spec.resources.cores", spec.resources.cores.unwrap_or(1).into()),
        ("spec.data.readAhead", spec.data.read_ahead.into()),
        ("spec.checkpoint.keepLast", spec.checkpoint.keep_last.into()),
        ("spec.checkpoint.keepEvery", spec.checkpoint.keep_every.unwrap_or(1)),
        ("spec.failurePolicy.hangSeconds", spec.failure_policy.hang_seconds.into()),
        ("spec.placement.maxPerNode", spec.placement.max_per_node.unwrap_or(1).into()),
    ];
    if let Some((field, _)) = positive.iter().find(|(_, n)| *n == 0) {
        return Err(format!("{field}: 0, must be at least 1"));
    }
    if spec.weights.is_some() && spec.checkpoint.source.is_some() {
        let both = "spec.weights: spec.checkpoint.source brings params and all other state; leave one of them out";
        return Err(both.to_owned());
    }
    let (n_cuts, n_shards) = (spec.parallelism.cuts.len(), spec.parallelism.shards.unwrap_or(1));
    if n_cuts > 0 && n_cuts + 1 != n_shards as usize {
        return Err(format!("spec.parallelism.cuts: {n_cuts} cuts make {} shards, shards is {n_shards}", n_cuts + 1));
    }
    let granularity = spec.partition.granularity;
    if n_cuts > 0 && !matches!(granularity, Granularity::Auto | Granularity::Layer) {
        return Err(format!(
            "spec.partition.granularity: {}, but spec.parallelism.cuts are made where layers begin; leave one of them out",
            format!("{granularity:?}").to_lowercase()
        ));
    }
    if granularity == Granularity::Layer && !spec.partition.split.is_empty() {
        return Err(
            "spec.partition.split goes inside layers, granularity layer keeps them whole; leave one of them out"
                .to_owned(),
        );
    }
    if spec.partition.cheapest.is_some() {
        let missing = match () {
            () if spec.parallelism.shards.is_some() => {
                Some("spec.parallelism.shards says how many; leave one of them out")
            }
            () if spec.resources.devices.is_empty() => {
                Some("there is no range of devices; give spec.resources.devices")
            }
            () if spec.resources.cores.is_none() => {
                Some("what a worker gets is not said, and all cores are shared out; give spec.resources.cores")
            }
            () => None,
        };
        if let Some(missing) = missing {
            return Err(format!("spec.partition.cheapest takes as few devices as it can, but {missing}"));
        }
    }
    super::split::check(&spec.partition.split)?;
    for (i, Pin { ops, shard, device }) in spec.partition.pins.iter().enumerate() {
        if ops.is_empty() || shard.is_some() == device.is_some() {
            return Err(format!(
                "spec.partition.pins[{i}]: ops is {ops:?}; give a pattern, and either shard or device"
            ));
        }
    }
    if let Some(i) = spec.partition.together.iter().position(|set| set.is_empty() || set.iter().any(String::is_empty)) {
        return Err(format!(
            "spec.partition.together[{i}]: it or one of its patterns is empty; name ops, or leave it out"
        ));
    }
    if spec.data.uri.is_some() == spec.data.socket.is_some() {
        return Err("spec.data: give either uri or socket".to_owned());
    }
    if spec.epochs.is_some() && spec.data.uri.is_none() {
        return Err("spec.epochs: how much data there is on spec.data.socket is not known; give spec.steps".to_owned());
    }
    spec.resources.check(spec.pinned(), spec.parallelism.replicas)?;
    spec.pods.check()?;
    spec.volumes.iter().try_for_each(Volume::check)?;
    Settings::from(spec.adaptation.clone()).check().map_err(|e| format!("spec.{e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "apiVersion: foreshard.dev/v1alpha1\nkind: TrainingJob\nmetadata: {name: a}\nspec:\n  bundle: b\n  steps: 3\n  data: {uri: x.txt}\n  parallelism: {shards: 2}\n";

    #[test]
    fn says_which_field_is_wrong_and_what_was_meant() {
        assert_eq!(parse(JOB).unwrap().spec.parallelism.shards, Some(2));
        for (from, to, says) in [
            ("shards", "shard", vec!["spec.parallelism", "unknown field `shard`", "did you mean \"shards\"?"]),
            ("shards: 2", "shards: two", vec!["spec.parallelism.shards", "two"]),
            ("shards: 2", "shards: 0", vec!["spec.parallelism.shards: 0, must be at least 1"]),
            ("shards: 2", "schedule: 1f1b", vec!["unknown variant `1f1b`", "did you mean \"1F1B\"?"]),
            (
                "shards: 2",
                "shards: 2, cuts: [a, b]",
                vec!["spec.parallelism.cuts", "2 cuts make 3 shards, shards is 2"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {split: [{tensor: a, axis: 0, parts: 1}]}",
                vec!["spec.partition.split[0].parts: 1, must be 2 to 64"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {split: [{tensor: a, axis: 0, parts: 2}, {tensor: a, axis: 1, parts: 2}]}",
                vec!["spec.partition.split[1].tensor: \"a\" is empty or there twice"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {split: [{ops: \"*\", parts: 2}, {ops: \"*\", parts: 3}]}",
                vec!["spec.partition.split[1].ops: \"*\" is empty or there twice"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {split: [{ops: a, axis: 0, parts: 2}]}",
                vec!["spec.partition.split[0]: give either tensor and axis, or ops"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {split: [{tensor: a, axes: 0, parts: 2}]}",
                vec!["unknown field `axes`", "did you mean \"axis\"?"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {pins: [{ops: a, shard: 0}, {ops: b}]}",
                vec!["spec.partition.pins[1]", "ops is \"b\"", "either shard or device"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {together: [[a, \"\"]]}",
                vec!["spec.partition.together[0]", "is empty"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {recompute: sometimes}",
                vec!["spec.partition.recompute", "unknown variant `sometimes`", "auto", "never", "always"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {granularity: block}",
                vec!["spec.partition.granularity", "unknown variant `block`", "layer", "sublayer"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {objective: latency}",
                vec!["spec.partition.objective", "unknown variant `latency`", "throughput"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {granularity: layer, split: [{tensor: a, axis: 0, parts: 2}]}",
                vec!["spec.partition.split goes inside layers", "leave one of them out"],
            ),
            (
                "shards: 2",
                "shards: 2, cuts: [a]}\n  partition: {granularity: op",
                vec!["spec.partition.granularity: op", "spec.parallelism.cuts", "leave one of them out"],
            ),
            (
                "steps: 3",
                "steps: 3\n  partition: {cheapest: {}}",
                vec!["spec.partition.cheapest", "spec.parallelism.shards", "leave one of them out"],
            ),
            (
                "steps: 3",
                "steps: 3\n  weights: w\n  checkpoint: {source: runs/a-1}",
                vec!["spec.weights", "spec.checkpoint.source", "leave one of them out"],
            ),
            (
                "steps: 3",
                "steps: 3\n  adaptation: {interval: 60, horizon: 30}",
                vec!["spec.adaptation.interval: 60", "adaptation.horizon, 30"],
            ),
            ("steps: 3", "steps: -3", vec!["spec.steps", "-3"]),
            ("v1alpha1", "v2", vec!["apiVersion", "v2"]),
            ("uri: x.txt", "uri: x.txt, socket: s", vec!["either uri or socket"]),
            ("steps: 3", "epochs: 0", vec!["spec.epochs", "0"]),
            (
                "steps: 3",
                "volumes: [{name: m, archive: {url: ftp://a/b, sha256: 00}}]",
                vec!["spec.volumes[m].archive.url", "\"ftp://a/b\"", "https://"],
            ),
            (
                "steps: 3",
                "volumes: [{name: m, archive: {url: http://a/b, sha256: 0F}}]",
                vec!["spec.volumes[m].archive.sha256", "sha256sum"],
            ),
            (
                "steps: 3",
                "volumes: [{name: m, archive: {url: http://a/b, sha256: 00, credentials: s}}]",
                vec!["spec.volumes[m].archive.credentials", "s3://BUCKET/KEY"],
            ),
            ("steps: 3", "volumes: [{name: m, archive: {url: http://a/b}}]", vec!["missing field `sha256`"]),
        ] {
            let e = parse(&JOB.replacen(from, to, 1)).unwrap_err();
            for part in says {
                assert!(e.contains(part), "{e:?} lacks {part:?}");
            }
        }
    }

    #[test]
    fn reads_quantities() {
        let of = |m: &str| Resources { memory: Some(m.to_owned()), ..Resources::default() }.memory_bytes();
        assert_eq!(of("2Gi"), Ok(Some(2 << 30)));
        assert_eq!(of("1.5M"), Ok(Some(1_500_000)));
        assert!(of("2 GB").unwrap_err().contains("4Gi"));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(at in 0usize..300, byte in 0u8..128) {
            let mut yaml = JOB.as_bytes().to_vec();
            let at = at % yaml.len();
            yaml[at] = byte;
            let _ = parse(std::str::from_utf8(&yaml).unwrap());
        }
    }
}
