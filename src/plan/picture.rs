//! A plan as a picture: the model's blocks on their shards, what crosses between them, and the predicted step.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::block::block_of;
use super::predict::{Costs, Timed, devices, timed};
use super::schedule::Slot;
use super::{Place, Plan, ShardId};
use crate::cost::OpCost;
use crate::graph::{Graph, Model};
use crate::topology::Topology;
use crate::units::{Bytes, Seconds};

/// Told apart with and without colour vision (Okabe and Ito).
pub const COLOURS: [&str; 8] = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8A8A8A"];

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 28.0;
/// Between columns.
const GAP: f64 = 40.0;

/// Width of a column.
fn column(n: usize) -> f64 {
    ((WIDTH - 2.0 * MARGIN - GAP * (n as f64 - 1.0)) / n as f64).min(300.0)
}

pub fn colour(shard: usize) -> &'static str {
    COLOURS[shard % COLOURS.len()]
}

/// Draws the first variant of a plan as SVG.
pub fn svg(plan: &Plan, model: &Model, topology: &Topology) -> String {
    let n = plan.shards.len();
    let mut body = String::new();
    let title = format!(
        "{} · {n} shards × {} replicas · {} microbatches of {} rows · {}",
        model.manifest.name, plan.n_replicas, plan.n_microbatches, plan.microbatch, plan.schedule
    );
    text(&mut body, MARGIN, 34.0, 17.0, "start", "#111", &title);
    let subtitle = format!(
        "step {} predicted, bound {}, {} cross between shards per step",
        plan.step_time, plan.bound, plan.bytes_cut
    );
    text(&mut body, MARGIN, 56.0, 13.0, "start", "#555", &subtitle);
    let mut y = 78.0;
    if let Some((variant, assignment)) = plan.grads.iter().next()
        && let Some(grad) = model.variant(variant)
    {
        let graph = &grad.graph;
        let known = Costs::of(model);
        y = shards(&mut body, plan, graph, assignment, topology, &known.grads[variant], y);
        if let Ok(Some(cut)) = timed(model, topology, plan, &known, variant) {
            y = traffic(&mut body, &cut, plan, y + 22.0);
            y = timeline(&mut body, plan, &cut, variant, y + 30.0);
        }
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {h}\" width=\"{WIDTH}\" height=\"{h}\" font-family=\"system-ui, sans-serif\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>{body}</svg>\n",
        h = y + 20.0
    )
}

/// One column per shard: its device, its memory, and its blocks by the time they take there.
fn shards(
    out: &mut String,
    plan: &Plan,
    graph: &Graph,
    assignment: &super::Assignment,
    topology: &Topology,
    costs: &[OpCost],
    top: f64,
) -> f64 {
    let n = plan.shards.len();
    let width = column(n);
    let devices = devices(topology, plan);
    let mut blocks: Vec<BTreeMap<(usize, String), f64>> = vec![BTreeMap::new(); n];
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for (id, op) in graph.ops() {
        let Place::Shard(shard) = assignment.place(id) else { continue };
        let block = block_of(op.scope().unwrap_or(""));
        let next = seen.len();
        let order = *seen.entry(block.clone()).or_insert(next);
        *blocks[shard.index()].entry((order, block)).or_default() +=
            costs[id.index()].time(devices[shard.index()][0]).0;
    }
    let most: f64 = blocks.iter().map(|b| b.values().sum::<f64>()).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let height = 210.0;
    for (i, shard) in plan.shards.iter().enumerate() {
        let x = MARGIN + i as f64 * (width + GAP);
        let names: Vec<&str> = shard.devices.iter().map(|d| topology.devices[d.index()].name.as_str()).collect();
        text(out, x, top + 14.0, 14.0, "start", "#111", &format!("shard {i} on {}", names.join(", ")));
        let facts = format!("{} busy, {}", shard.busy, shard.memory);
        text(out, x, top + 32.0, 12.0, "start", "#555", &facts);
        let mut y = top + 42.0;
        let total: f64 = blocks[i].values().sum::<f64>().max(f64::MIN_POSITIVE);
        let column = (height * total / most).max(24.0);
        for ((_, name), work) in &blocks[i] {
            let h = column * work / total;
            let _ = write!(
                out,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" rx=\"3\" fill=\"{}\" fill-opacity=\"0.85\"/>",
                (h - 2.0).max(0.6),
                colour(i)
            );
            if h > 15.0 {
                text(
                    out,
                    x + 8.0,
                    y + h / 2.0 + 4.0,
                    12.0,
                    "start",
                    "#fff",
                    &format!("{name}  {:.0} %", 100.0 * work / total),
                );
            }
            y += h;
        }
    }
    top + 42.0 + height
}

/// Below the columns an arrow from shard to shard for what travels between them in a step; the thickest carries most.
fn traffic(out: &mut String, cut: &Timed<'_>, plan: &Plan, top: f64) -> f64 {
    const MOST_ARROWS: usize = 12;
    const LANE: f64 = 20.0;
    let width = column(plan.shards.len());
    let mut sent: BTreeMap<(usize, usize), Bytes> = BTreeMap::new();
    for (i, message) in cut.cut.messages.iter().enumerate() {
        let from = cut.cut.segments[message.from].shard.index();
        let bytes = cut.cut.bytes(cut.graph, i) * u64::from(plan.n_microbatches);
        *sent.entry((from, message.to.index())).or_default() += bytes;
    }
    let mut arrows: Vec<((usize, usize), Bytes)> = sent.into_iter().collect();
    arrows.sort_by_key(|&(ends, bytes)| (std::cmp::Reverse(bytes), ends));
    let most = arrows.first().map_or(1.0, |a| a.1.0.max(1) as f64);
    let left_out = arrows.len().saturating_sub(MOST_ARROWS);
    arrows.truncate(MOST_ARROWS);
    arrows.sort_unstable();
    let middle = |shard: usize| MARGIN + shard as f64 * (width + GAP) + width / 2.0;
    let mut y = top;
    for ((from, to), bytes) in arrows {
        let (a, b) = (middle(from), middle(to));
        let head = if b > a { -6.0 } else { 6.0 };
        let thick = 1.0 + 3.0 * bytes.0 as f64 / most;
        let _ = write!(
            out,
            "<path d=\"M{a:.1} {y:.1} H{b:.1} m{head} -4 L{b:.1} {y:.1} l{head} 4\" stroke=\"{}\" fill=\"none\" stroke-width=\"{thick:.1}\"/>",
            colour(from)
        );
        text(out, (a + b) / 2.0, y - 4.0, 11.0, "middle", "#444", &bytes.to_string());
        y += LANE;
    }
    if left_out > 0 {
        text(out, MARGIN, y + 4.0, 11.0, "start", "#777", &format!("{left_out} smaller ones are left out"));
        y += LANE;
    }
    y
}

/// The simulated step: a lane per shard, forward work light, work that ends a microbatch dark.
fn timeline(out: &mut String, plan: &Plan, timed: &Timed<'_>, variant: &str, top: f64) -> f64 {
    let n = plan.shards.len();
    let Timed { cut, tasks, .. } = timed;
    let Some(orders) = plan.orders.get(variant) else { return top };
    let Ok(lanes) = tasks.replay(orders, plan.n_microbatches) else { return top };
    let end = lanes.iter().flatten().map(|s| s.end.0).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    text(out, MARGIN, top, 14.0, "start", "#111", "predicted order of microbatches");
    let (left, lane) = (MARGIN + 60.0, 26.0);
    let scale = (WIDTH - MARGIN - left) / end;
    for (i, slots) in lanes.iter().enumerate() {
        let y = top + 12.0 + i as f64 * (lane + 4.0);
        text(out, MARGIN, y + 17.0, 12.0, "start", "#333", &format!("shard {i}"));
        let last = cut.of_shard(ShardId(i as u32)).map(|(_, s)| s.level).max().unwrap_or(0);
        for Slot { task, start, end } in slots {
            let (x, w) = (left + start.0 * scale, (end.0 - start.0) * scale);
            let opacity = if cut.segments[task.segment as usize].level == last { 0.95 } else { 0.5 };
            let _ = write!(
                out,
                "<rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{lane}\" rx=\"2\" fill=\"{}\" fill-opacity=\"{opacity}\"/>",
                (w - 0.7).max(0.3),
                colour(i)
            );
            if w > 12.0 {
                text(out, x + w / 2.0, y + 17.0, 11.0, "middle", "#fff", &task.microbatch.to_string());
            }
        }
    }
    let bottom = top + 12.0 + n as f64 * (lane + 4.0);
    text(out, left, bottom + 14.0, 11.0, "start", "#555", "0");
    text(out, WIDTH - MARGIN, bottom + 14.0, 11.0, "end", "#555", &Seconds(end).to_string());
    bottom + 16.0
}

pub(super) fn text(out: &mut String, x: f64, y: f64, size: f64, anchor: &str, fill: &str, content: &str) {
    let content = escape(content);
    let _ = write!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\" fill=\"{fill}\">{content}</text>"
    );
}

pub(super) fn escape(content: &str) -> String {
    let printable: String = content.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    printable.replace('&', "&amp;").replace('<', "&lt;")
}
