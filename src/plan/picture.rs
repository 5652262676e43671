//! A plan as a picture: the model's blocks on their shards, what crosses between them, and the predicted step.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::coordinate::{Coordinates, coordinates};
use super::predict::{Costs, Timed, devices, timed};
use super::schedule::Slot;
use super::segment::Segment;
use super::table::computing_again;
use super::{Place, Plan};
use crate::cost::OpCost;
use crate::graph::scope::block_of;
use crate::graph::{Graph, Model, OpId};
use crate::topology::{Device, Topology};
use crate::units::{Bytes, Seconds};

/// Told apart with and without colour vision (Okabe and Ito).
pub const COLOURS: [&str; 8] = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8A8A8A"];

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 28.0;
/// Between columns.
const GAP: f64 = 40.0;
/// A column that is narrower has no room for its words: the picture grows instead.
const NARROWEST: f64 = 116.0;
/// More shards than this are not drawn.
const MOST_SHARDS: usize = 32;

/// Where columns stand.
#[derive(Clone, Copy)]
struct Frame {
    /// Shards that are drawn.
    n: usize,
    /// Of the picture.
    width: f64,
    column: f64,
}

impl Frame {
    fn of(n_shards: usize) -> Self {
        let n = n_shards.clamp(1, MOST_SHARDS);
        let gaps = GAP * (n as f64 - 1.0);
        let column = ((WIDTH - 2.0 * MARGIN - gaps) / n as f64).clamp(NARROWEST, 300.0);
        Self { n, width: WIDTH.max(2.0 * MARGIN + gaps + column * n as f64), column }
    }

    fn left(&self, shard: usize) -> f64 {
        MARGIN + shard as f64 * (self.column + GAP)
    }
}

/// What is read on a colour.
fn ink(colour: &str) -> &'static str {
    if matches!(colour, "#0072B2" | "#009E73" | "#D55E00") { "#fff" } else { "#111" }
}

/// As much of a text as a width has room for.
fn fit(content: &str, width: f64, size: f64) -> String {
    let room = (width / (0.56 * size)).max(0.0) as usize;
    if content.chars().count() <= room {
        return content.to_owned();
    }
    content.chars().take(room.saturating_sub(1)).chain(['…']).collect()
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
    let frame = Frame::of(n);
    let mut y = 78.0;
    if n > frame.n {
        let note = format!("the first {} shards; {} more are left out", frame.n, n - frame.n);
        text(&mut body, MARGIN, 74.0, 12.0, "start", "#777", &note);
        y += 18.0;
    }
    if let Some((variant, assignment)) = plan.grads.iter().next()
        && let Some(grad) = model.variant(variant)
    {
        let graph = &grad.graph;
        let known = Costs::of(model);
        let work = work(plan, graph, assignment, topology, &known.grads[variant]);
        y = shards(&mut body, plan, topology, &work, frame, y);
        if let Ok(Some(cut)) = timed(model, topology, plan, &known, variant) {
            y = traffic(&mut body, &cut, plan, frame, y + 22.0);
            let costs = &known.grads[variant];
            let line = coordinates(graph, model.n_params, model.n_scalars(), costs);
            let backward = backward(&cut, &line, costs, devices(topology, plan)[0][0]);
            y = timeline(&mut body, plan, &cut, (variant, &backward), frame, y + 30.0);
        }
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {w} {h}\" width=\"{w}\" height=\"{h}\" font-family=\"system-ui, sans-serif\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>{body}</svg>\n",
        w = frame.width,
        h = y + 20.0
    )
}

/// By shard: seconds of its blocks, in the order of the model.
type Work = Vec<BTreeMap<(usize, String), f64>>;

fn work(plan: &Plan, graph: &Graph, assignment: &super::Assignment, topology: &Topology, costs: &[OpCost]) -> Work {
    let devices = devices(topology, plan);
    let mut blocks: Work = vec![BTreeMap::new(); plan.shards.len()];
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for (id, op) in graph.ops() {
        let Place::Shard(shard) = assignment.place(id) else { continue };
        let block = block_of(op.scope().unwrap_or(""));
        let next = seen.len();
        let order = *seen.entry(block.clone()).or_insert(next);
        *blocks[shard.index()].entry((order, block)).or_default() +=
            costs[id.index()].time(devices[shard.index()][0]).0;
    }
    blocks
}

/// One column per shard: its device, its memory, and its blocks by the time they take there.
fn shards(out: &mut String, plan: &Plan, topology: &Topology, blocks: &Work, frame: Frame, top: f64) -> f64 {
    let width = frame.column;
    let most: f64 = blocks.iter().map(|b| b.values().sum::<f64>()).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let height = 210.0;
    const HEAD: f64 = 56.0;
    for (i, shard) in plan.shards.iter().enumerate().take(frame.n) {
        let x = frame.left(i);
        let names: Vec<&str> = shard.devices.iter().map(|d| topology.devices[d.index()].name.as_str()).collect();
        let title = fit(&format!("shard {i} on {}", names.join(", ")), width + GAP / 2.0, 14.0);
        text(out, x, top + 14.0, 14.0, "start", "#111", &title);
        text(out, x, top + 31.0, 12.0, "start", "#555", &fit(&format!("{} busy", shard.busy), width, 12.0));
        let again = if shard.recompute { " · computes again" } else { "" };
        text(out, x, top + 46.0, 12.0, "start", "#555", &fit(&format!("{}{again}", shard.memory), width, 12.0));
        let mut y = top + HEAD;
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
                // The name may be cut short, the share may not.
                let share = format!("  {:.0} %", 100.0 * work / total);
                let name = fit(name, width - 16.0 - 0.56 * 12.0 * share.len() as f64, 12.0);
                text(out, x + 8.0, y + h / 2.0 + 4.0, 12.0, "start", ink(colour(i)), &format!("{name}{share}"));
            }
            y += h;
        }
    }
    top + HEAD + height
}

/// Below the columns an arrow from shard to shard for what travels between them in a step; the thickest carries most.
fn traffic(out: &mut String, cut: &Timed<'_>, plan: &Plan, frame: Frame, top: f64) -> f64 {
    const MOST_ARROWS: usize = 12;
    const LANE: f64 = 20.0;
    let mut sent: BTreeMap<(usize, usize), Bytes> = BTreeMap::new();
    for (i, message) in cut.cut.messages.iter().enumerate() {
        let from = cut.cut.segments[message.from].shard.index();
        let bytes = cut.cut.bytes(cut.graph, i) * u64::from(plan.n_microbatches);
        *sent.entry((from, message.to.index())).or_default() += bytes;
    }
    let drawn = |&((from, to), _): &((usize, usize), Bytes)| from < frame.n && to < frame.n;
    let mut arrows: Vec<((usize, usize), Bytes)> = sent.into_iter().filter(drawn).collect();
    arrows.sort_by_key(|&(ends, bytes)| (std::cmp::Reverse(bytes), ends));
    let most = arrows.first().map_or(1.0, |a| a.1.0.max(1) as f64);
    let left_out = arrows.len().saturating_sub(MOST_ARROWS);
    arrows.truncate(MOST_ARROWS);
    arrows.sort_unstable();
    let middle = |shard: usize| frame.left(shard) + frame.column / 2.0;
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

/// By segment: whether it computes more of the backward half than of the forward one.
fn backward(timed: &Timed<'_>, line: &Coordinates, costs: &[OpCost], device: &Device) -> Vec<bool> {
    let of = |segment: &Segment| {
        let time = |op: &OpId| costs[op.index()].time(device).0 * if line.forward[op.index()] { -1.0 } else { 1.0 };
        segment.ops.iter().filter(|op| segment.again.binary_search(op).is_err()).map(time).sum::<f64>() > 0.0
    };
    timed.cut.segments.iter().map(of).collect()
}

/// The simulated step: a lane per shard. `backward`: segments that are drawn in full colour.
fn timeline(
    out: &mut String,
    plan: &Plan,
    timed: &Timed<'_>,
    (variant, backward): (&str, &[bool]),
    frame: Frame,
    top: f64,
) -> f64 {
    let Timed { tasks, .. } = timed;
    let Some(orders) = plan.orders.get(variant) else { return top };
    let Ok(lanes) = tasks.replay(orders, plan.n_microbatches) else { return top };
    let end = lanes.iter().flatten().map(|s| s.end.0).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    text(out, MARGIN, top, 14.0, "start", "#111", "predicted order of microbatches");
    let mut legend = "pale: mostly forward; full: mostly backward; numbers: microbatches; gaps: waiting".to_owned();
    if let Some(shards) = computing_again(plan) {
        legend.push_str(&format!("; {shards} goes forward once more before it goes back"));
    }
    text(out, MARGIN, top + 16.0, 11.0, "start", "#555", &fit(&legend, frame.width - 2.0 * MARGIN, 11.0));
    let top = top + 16.0;
    let (left, lane) = (MARGIN + 60.0, 26.0);
    let scale = (frame.width - MARGIN - left) / end;
    for (i, slots) in lanes.iter().enumerate().take(frame.n) {
        let y = top + 12.0 + i as f64 * (lane + 4.0);
        text(out, MARGIN, y + 17.0, 12.0, "start", "#333", &format!("shard {i}"));
        for Slot { task, start, end, .. } in slots {
            let (x, w) = (left + start.0 * scale, (end.0 - start.0) * scale);
            let (opacity, ink) = if backward[task.segment as usize] { (0.95, ink(colour(i))) } else { (0.45, "#111") };
            let _ = write!(
                out,
                "<rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{lane}\" rx=\"2\" fill=\"{}\" fill-opacity=\"{opacity}\"/>",
                (w - 0.7).max(0.3),
                colour(i)
            );
            if w > 12.0 {
                text(out, x + w / 2.0, y + 17.0, 11.0, "middle", ink, &task.microbatch.to_string());
            }
        }
    }
    let bottom = top + 12.0 + frame.n as f64 * (lane + 4.0);
    text(out, left, bottom + 14.0, 11.0, "start", "#555", "0");
    text(out, frame.width - MARGIN, bottom + 14.0, 11.0, "end", "#555", &Seconds(end).to_string());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_keep_room_for_words_however_many_shards_there_are() {
        for n in [1, 2, 8, 24, 512] {
            let frame = Frame::of(n);
            assert!(frame.column >= NARROWEST && frame.n <= MOST_SHARDS);
            assert!(frame.left(frame.n - 1) + frame.column + MARGIN <= frame.width + 1e-6, "{n} shards");
        }
        assert_eq!(fit("a long name", 30.0, 10.0), "a lo…");
        assert_eq!(fit("a", 30.0, 10.0), "a");
    }
}
