//! The model as a line of parts, and plans that cut it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::lanes::{self, Spread};
use super::orders::device_orders;
use super::outline::Outline;
use super::search::Start;
use super::{again, blank, check_memory, finish};
use crate::graph::passes::is_elementwise;
use crate::graph::{GradGraph, Graph, Lane, Model};
use crate::plan::coordinate::Coordinates;
use crate::plan::fixed::{Target, Wish};
use crate::plan::predict::{Costs, Cuts};
use crate::plan::problem::{Infeasible, Problem};
use crate::plan::{Assignment, Granularity, Place, Plan, ScheduleKind, ShardId};
use crate::profile::Terms;
use crate::topology::{Device, DeviceId, Rates, kinds};
use crate::units::{Bytes, Seconds};

/// Most parts the line is coarsened into.
const PARTS: usize = 384;
/// One of so many ops of lanes may stand elsewhere than its lane does.
const MOVED: usize = 20;

/// A wish, and by variant the first and the last coordinate of its ops.
type Placed = (Wish, Vec<Option<(u32, u32)>>);

/// The model as a line of parts.
pub(crate) struct Line<'a> {
    pub(super) costs: &'a Costs,
    /// The plan in force, cut: others have much in common with it.
    in_force: Option<Arc<Cuts>>,
    pub outline: &'a Outline,
    /// Coordinates where parts begin; the first is 0.
    pub(super) begins: Vec<u32>,
    /// Work before each border (begins, then the end), for each kind of device in the topology.
    pub(super) work: Vec<Vec<Seconds>>,
    /// Kind of each device.
    pub(super) kind: Vec<usize>,
    /// Bytes that cross each border, for one microbatch.
    pub(super) crossing: Vec<Bytes>,
    /// Params, slots and gradients before each border.
    pub(super) state: Vec<Bytes>,
    /// Residuals of one microbatch before each border.
    pub(super) residuals: Vec<Bytes>,
    has_lanes: bool,
    /// By variant, where parts are layers: coordinates at which they begin.
    layers: Option<Vec<Vec<u32>>>,
    /// What people have fixed, and by variant where that stands.
    pub(super) wishes: Vec<Placed>,
}

impl<'a> Line<'a> {
    /// # Complexity
    /// O(ops · devices that differ in their rates + parts · kinds of devices).
    pub(super) fn new(
        problem: &Problem<'_>,
        variants: &[&GradGraph],
        outline: &'a Outline,
        known: &'a Costs,
        in_force: Option<Arc<Cuts>>,
    ) -> Result<Self, Infeasible> {
        let costs = &known.grads[&variants[outline.main].name];
        let (kinds, kind) = kinds(&problem.topology.devices);
        // Devices of the same rates take what one of them takes at speed 1, each by its own speed and figures.
        let mut rates: Vec<Rates> = Vec::new();
        let mut of_kind = Vec::with_capacity(kinds.len());
        for found in kinds.iter().map(|d| d.rates()) {
            of_kind.push(rates.iter().position(|r| *r == found).unwrap_or(rates.len()));
            if of_kind.last() == Some(&rates.len()) {
                rates.push(found);
            }
        }
        let at_full_speed: Vec<Vec<Terms>> = rates.iter().map(|r| outline.work(costs, r)).collect();
        let on = |device: &Device, terms: &Terms| terms.time(&device.measured.unwrap_or_default()) / device.speed;
        let of_first: Vec<f64> = at_full_speed[of_kind[kind[0]]].iter().map(|t| on(kinds[kind[0]], t).0).collect();
        let n_shards = problem.n_shards;
        let mut layers = (problem.aim.granularity == Granularity::Layer).then(|| outline.layers(variants).to_vec());
        let mut begins = match &layers {
            Some(layers) => layers[outline.main].clone(),
            None => coarsen(&of_first, &outline.crossing, n_shards as usize),
        };
        if begins.len() < n_shards as usize {
            let n = begins.len();
            return Err(match &layers {
                Some(_) => Infeasible::TooFewLayers { n_shards, n_layers: n },
                None => Infeasible::TooFewOps { n_shards, n_parts: n },
            });
        }
        let wishes = wishes(problem, variants, outline)?;
        for (wish, ranges) in &wishes {
            let Some((first, last)) = ranges[outline.main] else { continue };
            // Nothing begins inside.
            let keep: Vec<bool> = begins.iter().map(|&b| b <= first || b > last).collect();
            for begins in layers.iter_mut().flatten().chain([&mut begins]) {
                let mut keep = keep.iter();
                begins.retain(|_| keep.next().copied().unwrap_or(true));
            }
            if begins.len() < n_shards as usize {
                let n = begins.len();
                return Err(wish.cannot(format!("it leaves fewer parts of the model, {n}, than shards, {n_shards}")));
            }
        }
        let at_borders: Vec<Vec<Terms>> = at_full_speed.iter().map(|work| sums(work, &begins)).collect();
        let of = |(device, rates): (&&Device, &usize)| at_borders[*rates].iter().map(|t| on(device, t)).collect();
        let work = kinds.iter().zip(&of_kind).map(of).collect();
        let bytes = |v: &[f64]| sums(v, &begins).into_iter().map(|b| Bytes(b as u64)).collect();
        let (state, residuals) = (bytes(&outline.state), bytes(&outline.residuals));
        let crossing = begins.iter().map(|&b| outline.crossing[b as usize]).collect();
        // Lanes run through layers.
        let has_lanes = !outline.lanes.is_empty() && n_shards > 1 && layers.is_none();
        let line = Self {
            costs: known,
            in_force,
            outline,
            begins,
            work,
            kind,
            crossing,
            state,
            residuals,
            has_lanes,
            layers,
            wishes,
        };
        line.check_wishes(problem).map(|()| line)
    }

    /// Where people want parts to be, in the order of the line.
    pub(in crate::plan) fn targets(&self) -> Vec<(usize, Target)> {
        self.targets_of(&self.wishes)
    }

    fn targets_of(&self, wishes: &[Placed]) -> Vec<(usize, Target)> {
        let of = |(wish, ranges): &Placed| {
            let (first, _) = ranges[self.outline.main]?;
            Some((self.begins.partition_point(|&b| b <= first).saturating_sub(1), wish.target?))
        };
        let mut targets: Vec<(usize, Target)> = wishes.iter().filter_map(of).collect();
        targets.sort_by_key(|(part, _)| *part);
        targets
    }

    /// Names the first wish that no order of devices can meet beside those before it.
    fn check_wishes(&self, problem: &Problem<'_>) -> Result<(), Infeasible> {
        let n = problem.n_shards as usize;
        if self.wishes.iter().all(|(wish, _)| wish.target.is_none()) {
            return Ok(());
        }
        for n_wishes in 1..=self.wishes.len() {
            let targets = self.targets_of(&self.wishes[..n_wishes]);
            let fits = |order: &[usize]| {
                let stage = |target: &Target| match target {
                    Target::Shard(shard) => Some(*shard),
                    Target::Device(device) => order.iter().position(|d| d == device),
                };
                // Shards follow each other, and none of them is empty.
                let mut last: Option<(usize, usize)> = None;
                let mut follows = |(part, target): &(usize, Target)| {
                    let Some(stage) = stage(target) else { return false };
                    let (before, from) = last.replace((*part, stage)).unwrap_or((0, 0));
                    stage >= from && part - before >= stage - from
                };
                targets.iter().all(&mut follows)
                    && last.is_none_or(|(part, stage)| self.begins.len() - part >= n - stage)
            };
            if !device_orders(problem, &targets).iter().any(|order| fits(order)) {
                return Err(self.wishes[n_wishes - 1].0.cannot(
                    "shards follow each other along the model, none of them empty, and with what is fixed beside it they would not"
                        .to_owned(),
                ));
            }
        }
        Ok(())
    }

    /// Whether the model can be cut across.
    pub(super) fn has_lanes(&self) -> bool {
        self.has_lanes
    }

    /// Coordinates at which shards begin, by variant; those of other variants than the main one by layer, or by fraction.
    pub(super) fn cuts(&self, borders: &[usize]) -> Vec<Vec<u32>> {
        let Outline { coordinates, main, .. } = self.outline;
        if let Some(layers) = &self.layers {
            let begin = |(begins, line): (&Vec<u32>, &Coordinates)| {
                borders.iter().map(|b| begins.get(*b).copied().unwrap_or(line.n)).collect()
            };
            return layers.iter().zip(coordinates).map(begin).collect();
        }
        let n_main = f64::from(coordinates[*main].n);
        let of = |line: &Coordinates| {
            let scale = f64::from(line.n) / n_main;
            // Behind the last part nothing begins.
            let begin = |b: &usize| self.begins.get(*b).map_or(n_main, |&at| f64::from(at));
            borders.iter().map(|b| (begin(b) * scale).round() as u32).collect()
        };
        let mut cuts: Vec<Vec<u32>> = coordinates.iter().map(of).collect();
        for (_, ranges) in &self.wishes {
            let Some((_, last)) = ranges[*main] else { continue };
            let is_left: Vec<bool> = cuts[*main].iter().map(|&cut| last < cut).collect();
            // What stands on one side of a border stands there in all variants.
            for (cuts, range) in cuts.iter_mut().zip(ranges) {
                let Some((first, last)) = *range else { continue };
                for (cut, is_left) in cuts.iter_mut().zip(&is_left) {
                    *cut = if *is_left { (*cut).max(last + 1) } else { (*cut).min(first) };
                }
            }
        }
        cuts
    }

    /// Where an earlier plan of this schedule cuts this line; `None` for one that does not.
    pub(super) fn start_of(&self, plan: &Plan, variants: &[&GradGraph]) -> Option<Start> {
        let order: Vec<usize> = plan.shards.iter().filter_map(|s| Some(s.devices.first()?.index())).collect();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..plan.shards.len()) {
            return None;
        }
        let Outline { coordinates, main, lanes, .. } = self.outline;
        // By shard: the first coordinate of the forward half that is there. Gradients may lie with their params.
        let line = &coordinates[*main];
        let assignment = plan.grads.get(&variants[*main].name)?;
        let border = |&at: &u32| match &self.layers {
            // What a layer begins with may be computed everywhere.
            Some(_) => self.begins.partition_point(|&begin| begin <= at).saturating_sub(1),
            None => self.begins.partition_point(|&begin| begin < at),
        };
        if plan.schedule == ScheduleKind::Interleaved {
            let borders = self.rounds(plan.shards.len(), &assignment.0)?.iter().map(border).collect();
            let spread = Spread::along(plan.shards.len());
            let start = Start { borders, order, rule: None, spread };
            return start.is_valid(self.begins.len()).then_some(start);
        }
        let start_by = |spread: Spread| {
            let mut first = vec![u32::MAX; plan.shards.len()];
            let is_shared = !spread.is_along();
            for (op, ((at, forward), place)) in line.of.iter().zip(&line.forward).zip(&assignment.0).enumerate() {
                let (Some(at), true, Place::Shard(s)) = (at, *forward, place) else { continue };
                first.get(s.index())?;
                // What is in a lane tells where its stage begins.
                let in_lane = is_shared && lanes[*main][op].is_some();
                let shard = if in_lane { spread.stage(s.index()).start } else { s.index() };
                first[shard] = first[shard].min(*at);
            }
            // A shard that has lanes alone is given the end of what is before it.
            for shard in (1..first.len()).rev().filter(|s| !spread.is_along() && spread.seams[s - 1].is_some()) {
                first[shard] = first[shard].min(first.get(shard + 1).copied().unwrap_or(u32::MAX));
            }
            let borders: Vec<usize> = first[1..].iter().map(border).collect();
            let start = Start { borders, order: order.clone(), rule: None, spread };
            (start.is_valid(self.begins.len()) && self.has_lanes_of(&start, &assignment.0)).then_some(start)
        };
        self.spreads_of(plan.shards.len(), &assignment.0).into_iter().find_map(start_by)
    }

    /// What shards may share out of the lanes, by where a plan has them.
    fn spreads_of(&self, n: usize, places: &[Place]) -> Vec<Spread> {
        if !self.has_lanes() {
            return vec![Spread::along(n)];
        }
        let Outline { coordinates, main, lanes, n_lanes, .. } = self.outline;
        // By shard: its first and last lane, and where on the line it has any.
        let mut has: Vec<Option<[u32; 4]>> = vec![None; n];
        for ((place, lane), at) in places.iter().zip(&lanes[*main]).zip(&coordinates[*main].of) {
            let (Place::Shard(shard), Some(lane), Some(at)) = (place, lane, at) else { continue };
            let lane = (u64::from(lane.index) * u64::from(*n_lanes) / u64::from(lane.of.max(1))) as u32;
            let Some(has) = has.get_mut(shard.index()) else { return Vec::new() };
            let [least, most, from, to] = has.unwrap_or([lane, lane, *at, *at]);
            *has = Some([least.min(lane), most.max(lane), from.min(*at), to.max(*at)]);
        }
        let seam = |pair: &[Option<[u32; 4]>]| match (pair[0], pair[1]) {
            (Some([_, most, _, to]), Some([least, _, from, _])) if most < least && from < to => Some(least),
            _ => None,
        };
        let stages = Spread::with(has.windows(2).map(seam).collect(), *n_lanes);
        let first = |has: &Option<[u32; 4]>| Some(has.map_or(*n_lanes, |[least, ..]| least));
        let across = Spread::with(has[1..].iter().map(first).collect(), *n_lanes);
        vec![stages, across, Spread::along(n)]
    }

    /// Whether a start puts lanes where these places have them; a few go with their tuple or with their param.
    fn has_lanes_of(&self, start: &Start, places: &[Place]) -> bool {
        let Outline { coordinates, main, lanes, .. } = self.outline;
        let Some(lanes) = lanes.get(*main).filter(|_| !start.spread.is_along()) else { return true };
        let cuts = &self.cuts(&start.borders)[*main];
        let (mut n, mut n_elsewhere) = (0, 0);
        for ((place, lane), at) in places.iter().zip(lanes).zip(&coordinates[*main].of) {
            let (Place::Shard(shard), Some(lane), Some(at)) = (place, lane, at) else { continue };
            n += 1;
            let here = start.spread.shard(cuts.partition_point(|c| c <= at), *lane);
            n_elsewhere += usize::from(here != shard.index());
        }
        n_elsewhere * MOVED <= n
    }

    /// Coordinates at which the forward half goes from shard to shard, in turn; `None` where it goes otherwise.
    fn rounds(&self, n_shards: usize, places: &[Place]) -> Option<Vec<u32>> {
        let line = &self.outline.coordinates[self.outline.main];
        let mut shards: Vec<Option<ShardId>> = vec![None; line.n as usize];
        for ((at, forward), place) in line.of.iter().zip(&line.forward).zip(places) {
            if let (Some(at), true, Place::Shard(s)) = (at, *forward, place) {
                shards[*at as usize].get_or_insert(*s);
            }
        }
        let mut begins = Vec::new();
        let mut last = None;
        for (at, &shard) in shards.iter().enumerate().filter(|(_, s)| s.is_some()) {
            if shard != last {
                if shard != Some(ShardId((begins.len() % n_shards) as u32)) {
                    return None;
                }
                begins.push(at as u32);
                last = shard;
            }
        }
        (begins.len() > 1 && begins.len() % n_shards == 0).then(|| begins.split_off(1))
    }

    /// The plan whose shards begin at `cuts`, by variant, in as many rounds as there are; lanes are shared out by `spread`.
    pub(crate) fn plan(
        &self,
        problem: &Problem<'_>,
        microbatch: u64,
        variants: &[&GradGraph],
        cuts: &[Vec<u32>],
        order: &[usize],
        spread: &Spread,
    ) -> Result<Plan, Infeasible> {
        let is_shared = self.has_lanes() && !spread.is_along();
        let Outline { coordinates, main, lanes, .. } = self.outline;
        let main = *main;
        // Owners by the main variant; the others use the same owners.
        let model = problem.model;
        let n = problem.n_shards as usize;
        let shard_of = |cuts: &[u32], at: u32, lane: Option<Lane>| {
            let on_line = cuts.partition_point(|&c| c <= at) % n;
            ShardId(lane.filter(|_| is_shared).map_or(on_line, |lane| spread.shard(on_line, lane)) as u32)
        };
        let main_graph = &variants[main].graph;
        let param_owner = |p: usize| {
            let at = coordinates[main].of[main_graph.parameters()[p].index()].unwrap_or(0);
            shard_of(&cuts[main], at, lanes::of_state(model, p))
        };
        let owners: Vec<Place> = (0..model.state.len())
            .map(|i| match model.state[i].param {
                _ if i < model.n_params => Place::Shard(param_owner(i)),
                Some(p) => Place::Shard(param_owner(p)),
                None => Place::Everywhere,
            })
            .collect();
        let mut grads = BTreeMap::new();
        for (v, ((variant, coordinates), cuts)) in variants.iter().zip(coordinates).zip(cuts).enumerate() {
            let lane = |op: usize| lanes.get(v).and_then(|lanes| lanes[op]);
            let place = |(op, at): (usize, &Option<u32>)| match at {
                None => Place::Everywhere,
                Some(at) => Place::Shard(shard_of(cuts, *at, lane(op))),
            };
            let mut places: Vec<Place> = coordinates.of.iter().enumerate().map(place).collect();
            if is_shared {
                sum_up(&variant.graph, &mut places);
            }
            settle(model, &variant.graph, &owners, &mut places);
            if is_shared && !has_all(&variant.graph, &places, n) {
                return Err(Infeasible::TooFewOps { n_shards: problem.n_shards, n_parts: self.begins.len() });
            }
            grads.insert(variant.name.clone(), Assignment(places));
        }
        let devices: Vec<Vec<DeviceId>> = (0..n)
            .map(|s| (0..problem.n_replicas as usize).map(|r| DeviceId((r * n + order[s]) as u32)).collect())
            .collect();
        let with = |recomputes: &[bool]| {
            let predict = |plan: &Plan| {
                let cuts = Cuts::new(model, problem.topology, plan, self.costs, self.in_force.as_deref()).ok()?;
                Some(cuts.predict(model, problem.topology, plan, self.costs))
            };
            finish(problem, microbatch, grads.clone(), owners.clone(), blank(&devices, recomputes), predict)
        };
        let plan = again::choose(problem, &with)
            .ok_or(Infeasible::TooFewOps { n_shards: problem.n_shards, n_parts: self.begins.len() })?;
        check_memory(problem, &plan)?;
        // Lanes, and what goes with its param, do not follow the line.
        self.wishes.iter().try_for_each(|(wish, _)| wish.check(variants, &plan))?;
        Ok(plan)
    }
}

/// What people have fixed, where it stands on the lines of the variants.
fn wishes(problem: &Problem<'_>, variants: &[&GradGraph], outline: &Outline) -> Result<Vec<Placed>, Infeasible> {
    if problem.fixed.is_none() {
        return Ok(Vec::new());
    }
    let placed = |wish: Wish| {
        let ranges = outline.coordinates.iter().enumerate().map(|(v, line)| wish.range(v, line)).collect();
        (wish, ranges)
    };
    Ok(problem.fixed.wishes(problem, variants)?.into_iter().map(placed).collect())
}

/// Whether every shard has an op: in a stage that several share, one may have neither lanes nor a range.
fn has_all(graph: &Graph, places: &[Place], n_shards: usize) -> bool {
    let mut has = vec![false; n_shards];
    for ((_, op), place) in graph.ops().zip(places) {
        if let (Place::Shard(shard), false) = (place, &*op.opcode == "parameter") {
            has[shard.index()] = true;
        }
    }
    has.iter().all(|has| *has)
}

/// Sums of terms that one shard makes are made there: one value leaves it, not several.
fn sum_up(graph: &Graph, places: &mut [Place]) {
    let mut is_term: Vec<bool> = graph.ops().map(|(_, op)| op.lane.is_some()).collect();
    for (id, op) in graph.ops() {
        let Some(&first) = op.operands.first() else { continue };
        let here = places[first.index()];
        let is_sum = op.lane.is_none() && op.operands.len() == 2 && is_elementwise(&op.opcode);
        if is_sum && op.operands.iter().all(|o| is_term[o.index()] && places[o.index()] == here) {
            is_term[id.index()] = true;
            places[id.index()] = here;
        }
    }
}

/// Puts params and the ops that make their gradients on the owner, and elements with their tuples.
fn settle(model: &Model, graph: &Graph, owners: &[Place], places: &mut [Place]) {
    for (p, &op) in graph.parameters()[..model.n_params].iter().enumerate() {
        places[op.index()] = owners[p];
    }
    let n_scalars = graph.outputs().len() - model.n_params;
    for (p, &op) in graph.outputs()[n_scalars..].iter().enumerate() {
        let array_op = !matches!(&*graph.op(op).opcode, "parameter" | "get-tuple-element");
        if array_op && places[op.index()] != Place::Everywhere && graph.users(op).is_empty() {
            places[op.index()] = owners[p];
        }
    }
    for (id, op) in graph.ops() {
        if &*op.opcode == "get-tuple-element" {
            places[id.index()] = places[op.operands[0].index()];
        }
    }
    // Values that cannot travel stay where they are made.
    for (id, op) in graph.ops() {
        for &o in &op.operands {
            let stuck = graph.op(o).shape.as_array().is_none() && places[o.index()] != Place::Everywhere;
            if stuck && !matches!(&*op.opcode, "get-tuple-element") {
                places[id.index()] = places[o.index()];
            }
        }
    }
}

/// Sums before each border (`begins`, then the end).
fn sums<T: Copy + Default + std::ops::Add<Output = T>>(by_coordinate: &[T], begins: &[u32]) -> Vec<T> {
    let mut sums = Vec::with_capacity(begins.len() + 1);
    let (mut sum, mut next) = (T::default(), 0);
    for (i, &w) in by_coordinate.iter().enumerate() {
        if begins.get(next) == Some(&(i as u32)) {
            sums.push(sum);
            next += 1;
        }
        sum = sum + w;
    }
    sums.push(sum);
    sums
}

/// Parts of about equal work, each beginning where the fewest bytes cross.
fn coarsen(work: &[f64], crossing: &[Bytes], n_shards: usize) -> Vec<u32> {
    let n_parts = PARTS.max(4 * n_shards);
    if work.len() <= n_parts {
        return (0..work.len() as u32).collect();
    }
    let total: f64 = work.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let mut begins = vec![0u32];
    let mut sum = 0.0;
    let mut best: Option<(Bytes, u32)> = None;
    let mut bucket = 0;
    for (i, w) in work.iter().enumerate() {
        let in_bucket = (sum / total * n_parts as f64) as usize;
        if in_bucket > bucket {
            if let Some((_, at)) = best.take() {
                begins.push(at);
            }
            bucket = in_bucket;
        }
        if i > 0 && best.is_none_or(|(b, _)| crossing[i] < b) {
            best = Some((crossing[i], i as u32));
        }
        sum += w;
    }
    begins.extend(best.map(|(_, at)| at));
    begins.dedup();
    begins
}
