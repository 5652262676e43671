//! A training step as a picture, before any plan: the model's blocks from left to right, forward, backward and update
//! below each other, every op as wide as it is slow.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::block::Blocks;
use super::coordinate::{Coordinates, coordinates};
use super::picture::{COLOURS, escape, text};
use super::segment::follow_parameters;
use super::{Place, ShardId};
use crate::cost::{self, OpCost};
use crate::graph::{ArrayShape, GradGraph, Graph, Model};
use crate::topology::Device;
use crate::units::{Bytes, Flops, Seconds};

const WIDTH: f64 = 1400.0;
const MARGIN: f64 = 28.0;
/// Room for the names of the lanes.
const LEFT: f64 = 116.0;
/// Height of a lane; a bar of the largest result fills it.
const LANE: f64 = 150.0;
/// Between two lanes, where the tensors go that one makes for the other.
const GAP: f64 = 64.0;
/// More blocks than this cannot be told apart in the width there is.
const MAX_COLUMNS: usize = 40;
/// Narrower bars are drawn together.
const NARROW: f64 = 0.6;
/// Arrows of less than this share of the thickest are left out.
const FAINT: f64 = 0.01;
/// Largest tensors that are listed.
const LISTED: usize = 8;

/// One half of the step. Its number is its lane, from the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Lane {
    Forward,
    Backward,
    Update,
}

const LANES: [(Lane, &str, &str); 3] = [
    (Lane::Forward, "forward", COLOURS[0]),
    (Lane::Backward, "backward", COLOURS[5]),
    (Lane::Update, "optimizer", COLOURS[2]),
];

/// A block's part of a lane: (lane, column).
type Cell = (Lane, usize);

/// Draws one variant of a model and its update as SVG. Widths are times on `device`.
pub fn svg(model: &Model, grad: &GradGraph, device: &Device) -> String {
    let picture = Picture::new(model, grad, device);
    let mut body = String::new();
    picture.head(&mut body, model, grad, device);
    let x = picture.columns();
    picture.arrows(&mut body, &x);
    picture.lanes(&mut body, &x);
    let bottom = picture.lists(&mut body, top(Lane::Update) + LANE + 46.0);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {bottom}\" width=\"{WIDTH}\" height=\"{bottom}\" font-family=\"system-ui, sans-serif\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>{body}</svg>\n"
    )
}

/// Where a lane begins.
fn top(lane: Lane) -> f64 {
    136.0 + lane as usize as f64 * (LANE + GAP)
}

/// One op, as it is drawn.
struct Bar {
    time: Seconds,
    bytes: Bytes,
    /// A matrix product or convolution.
    heavy: bool,
    title: String,
}

struct Picture {
    names: Vec<String>,
    bars: BTreeMap<Cell, Vec<Bar>>,
    /// Bytes and number of the tensors between two cells.
    arrows: BTreeMap<(Cell, Cell), (Bytes, usize)>,
    /// By shape and lane: how often, and what makes the first.
    results: BTreeMap<(ArrayShape, Lane), (usize, String)>,
    /// By time: opcode, share.
    slowest: Vec<(String, Seconds)>,
    everywhere: usize,
    flops: Flops,
}

impl Picture {
    fn new(model: &Model, grad: &GradGraph, device: &Device) -> Self {
        let graph = &grad.graph;
        let costs = cost::of_graph(graph);
        let line = coordinates(graph, model.n_params, model.n_scalars(), &costs);
        let (names, column) = columns(graph, &line, &costs, device);
        let cells: Vec<Option<Cell>> = graph
            .ops()
            .map(|(id, _)| {
                let lane = if line.forward[id.index()] { Lane::Forward } else { Lane::Backward };
                line.of[id.index()].map(|at| (lane, column[at as usize]))
            })
            .collect();
        let param_column: Vec<usize> =
            graph.parameters()[..model.n_params].iter().map(|p| cells[p.index()].map_or(0, |c| c.1)).collect();
        let mut picture = Self {
            names,
            bars: BTreeMap::new(),
            arrows: BTreeMap::new(),
            results: BTreeMap::new(),
            slowest: Vec::new(),
            everywhere: 0,
            flops: Flops(0.0),
        };
        picture.add(graph, &costs, &cells, device);
        let update = &model.update;
        let cells = update_cells(model, &param_column);
        picture.add(update, &cost::of_graph(update), &cells, device);
        for (param, &output) in graph.outputs()[model.n_scalars()..].iter().enumerate() {
            let from = line.of[output.index()].map(|at| (Lane::Backward, column[at as usize]));
            if let Some(from) = from {
                picture.arrow(from, (Lane::Update, param_column[param]), graph.op(output).shape.bytes());
            }
        }
        picture.slowest.sort_by(|a, b| b.1.0.total_cmp(&a.1.0));
        picture
    }

    fn add(&mut self, graph: &Graph, costs: &[OpCost], cells: &[Option<Cell>], device: &Device) {
        for (id, op) in graph.ops() {
            if &*op.opcode == "parameter" {
                continue;
            }
            let Some(cell) = cells[id.index()] else {
                self.everywhere += 1;
                continue;
            };
            let (cost, bytes) = (costs[id.index()], op.shape.bytes());
            let time = cost.time(device);
            self.flops += cost.flops;
            match self.slowest.iter_mut().find(|(opcode, _)| **opcode == *op.opcode) {
                Some((_, sum)) => *sum += time,
                None => self.slowest.push((op.opcode.to_string(), time)),
            }
            let scope = op.scope().unwrap_or_default();
            let title = format!("{} {} {} {time} {scope}", op.name, op.opcode, op.shape);
            let heavy = matches!(&*op.opcode, "dot" | "convolution" | "ragged-dot");
            self.bars.entry(cell).or_default().push(Bar { time, bytes, heavy, title });
            // One arrow for each cell that reads the value.
            let mut readers: Vec<Cell> = graph.users(id).iter().filter_map(|u| cells[u.index()]).collect();
            readers.sort_unstable();
            readers.dedup();
            for reader in readers.iter().filter(|r| **r != cell) {
                self.arrow(cell, *reader, bytes);
            }
            if let Some(shape) = op.shape.as_array().filter(|_| time > Seconds(0.0)) {
                let scope = || (0, scope.to_owned());
                self.results.entry((shape.clone(), cell.0)).or_insert_with(scope).0 += 1;
            }
        }
    }

    fn arrow(&mut self, from: Cell, to: Cell, bytes: Bytes) {
        let (sum, n) = self.arrows.entry((from, to)).or_default();
        *sum += bytes;
        *n += 1;
    }

    fn time(&self, cell: Cell) -> f64 {
        self.bars.get(&cell).into_iter().flatten().map(|b| b.time.0).sum()
    }

    /// Begin of each column, and pixels per second: a column is as wide as its slowest lane.
    fn columns(&self) -> (Vec<(f64, f64)>, f64) {
        let n = self.names.len();
        let gap = self.gap();
        let slowest = |c: usize| LANES.iter().map(|(lane, ..)| self.time((*lane, c))).fold(0.0, f64::max);
        let total: f64 = (0..n).map(slowest).sum::<f64>().max(f64::MIN_POSITIVE);
        // Even a block without work has a place.
        let least = 3.0;
        let room = WIDTH - LEFT - MARGIN - gap * (n as f64 - 1.0) - least * n as f64;
        let scale = room / total;
        let mut x = LEFT;
        let columns = (0..n)
            .map(|c| {
                let begin = x;
                x += least + slowest(c) * scale + gap;
                (begin, x - gap)
            })
            .collect();
        (columns, scale)
    }

    fn gap(&self) -> f64 {
        if self.names.len() <= 12 { 30.0 } else { 6.0 }
    }

    fn head(&self, out: &mut String, model: &Model, grad: &GradGraph, device: &Device) {
        let state = |range: std::ops::Range<usize>| model.state[range].iter().map(|s| s.shape.bytes()).sum::<Bytes>();
        let title = format!(
            "{} · {} · {} ops forward and backward, {} in the optimizer · {} · {} of params, {} of slots",
            model.manifest.name,
            grad.name,
            grad.graph.n_ops(),
            model.update.n_ops(),
            self.flops,
            state(0..model.n_params),
            state(model.n_params..model.state.len())
        );
        text(out, MARGIN, 34.0, 17.0, "start", "#111", &title);
        let all: Seconds = self.bars.values().flatten().map(|b| b.time).sum();
        let subtitle = format!(
            "width: time on {} ({all} in all) · height: size of the result, by its logarithm · dark: matrix products and convolutions · arrows: what one block makes for another · {} cheap ops that every shard can compute are not drawn",
            device.name, self.everywhere
        );
        text(out, MARGIN, 56.0, 12.0, "start", "#555", &subtitle);
    }

    fn lanes(&self, out: &mut String, (columns, scale): &(Vec<(f64, f64)>, f64)) {
        let largest = self.bars.values().flatten().map(|b| b.bytes.0).max().unwrap_or(1).max(2) as f64;
        let height = |bytes: Bytes| (LANE * (bytes.0 as f64 + 1.0).log2() / (largest + 1.0).log2()).max(2.0);
        let all: f64 = self.bars.values().flatten().map(|b| b.time.0).sum::<f64>().max(f64::MIN_POSITIVE);
        for (c, name) in self.names.iter().enumerate() {
            let (begin, end) = columns[c];
            let share: f64 = LANES.iter().map(|(lane, ..)| self.time((*lane, c))).sum::<f64>() / all;
            let middle = (begin + end) / 2.0;
            if end - begin + self.gap() > 8.0 * name.chars().count() as f64 {
                text(out, middle, 90.0, 13.0, "middle", "#111", name);
                if end - begin > 34.0 {
                    text(out, middle, 106.0, 11.0, "middle", "#777", &format!("{:.0} %", 100.0 * share));
                }
            } else if end - begin + self.gap() > 9.0 {
                let short: String = name.chars().rev().take(10).collect::<Vec<_>>().into_iter().rev().collect();
                let _ = write!(out, "<g transform=\"translate({:.1} 130) rotate(-90)\">", middle + 4.0);
                text(out, 0.0, 0.0, 10.0, "start", "#111", &short);
                out.push_str("</g>");
            }
        }
        for (lane, name, colour) in LANES {
            let floor = top(lane) + LANE;
            let time: f64 = (0..self.names.len()).map(|c| self.time((lane, c))).sum();
            text(out, MARGIN, floor - LANE / 2.0, 14.0, "start", colour, name);
            text(
                out,
                MARGIN,
                floor - LANE / 2.0 + 18.0,
                11.0,
                "start",
                "#777",
                &format!("{:.0} %", 100.0 * time / all),
            );
            for (c, &(begin, end)) in columns.iter().enumerate() {
                let _ = write!(
                    out,
                    "<rect x=\"{begin:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{LANE}\" fill=\"{colour}\" fill-opacity=\"0.07\"/>",
                    floor - LANE,
                    end - begin
                );
                let bars = self.bars.get(&(lane, c)).map_or(&[][..], Vec::as_slice);
                bars_of(out, bars, begin, floor, *scale, colour, &height);
            }
        }
    }

    fn arrows(&self, out: &mut String, (columns, _): &(Vec<(f64, f64)>, f64)) {
        for (_, name, colour) in LANES {
            let _ = write!(
                out,
                "<marker id=\"{name}\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"8\" markerHeight=\"8\" markerUnits=\"userSpaceOnUse\" orient=\"auto\"><path d=\"M0 0 L8 4 L0 8 z\" fill=\"{colour}\"/></marker>"
            );
        }
        let most = self.arrows.values().map(|(b, _)| b.0).max().unwrap_or(1).max(1) as f64;
        let middle = |c: usize| (columns[c].0 + columns[c].1) / 2.0;
        for (&(from, to), &(bytes, n)) in &self.arrows {
            let share = bytes.0 as f64 / most;
            if share < FAINT {
                continue;
            }
            let thickness = 1.0 + 9.0 * share.sqrt();
            let (_, name, colour) = LANES[from.0 as usize];
            let (a, b) = (middle(from.1), middle(to.1));
            let floor = top(from.0) + LANE;
            let size = bytes.to_string();
            let path = if from.0 != to.0 {
                let down = from.0 < to.0;
                let (y0, y1) = if down { (floor, top(to.0)) } else { (top(from.0), top(to.0) + LANE) };
                let half = (y0 + y1) / 2.0;
                if from.1 == to.1 && columns[to.1].1 - columns[to.1].0 > 30.0 {
                    let beside = thickness / 2.0 + 4.0;
                    let (x, anchor) = if a > WIDTH - 90.0 { (a - beside, "end") } else { (a + beside, "start") };
                    text(out, x, half + 4.0, 10.0, anchor, colour, &size);
                }
                format!("M{a:.1} {y0:.1} C{a:.1} {half:.1} {b:.1} {half:.1} {b:.1} {y1:.1}")
            } else if from.1.abs_diff(to.1) == 1 {
                // Through the gap to a neighbour; what comes back is a line lower.
                let right = from.1 < to.1;
                let lower = f64::from(u8::from(right == (from.0 == Lane::Backward)));
                let y = floor - 24.0 + 14.0 * lower;
                let (x0, x1) =
                    if right { (columns[from.1].1, columns[to.1].0) } else { (columns[from.1].0, columns[to.1].1) };
                if self.gap() > 20.0 {
                    text(out, (x0 + x1) / 2.0, floor + 12.0 + 11.0 * lower, 10.0, "middle", colour, &size);
                }
                format!("M{x0:.1} {y:.1} L{x1:.1} {y:.1}")
            } else {
                let over = floor + 26.0 + (3.0 * from.1.abs_diff(to.1) as f64).min(24.0);
                format!("M{a:.1} {floor:.1} C{a:.1} {over:.1} {b:.1} {over:.1} {b:.1} {floor:.1}")
            };
            let title = format!("{n} tensors, {bytes}, {} to {}", self.names[from.1], self.names[to.1]);
            let _ = write!(
                out,
                "<path d=\"{path}\" stroke=\"{colour}\" stroke-opacity=\"0.45\" stroke-width=\"{thickness:.1}\" fill=\"none\" marker-end=\"url(#{name})\"><title>{}</title></path>",
                escape(&title)
            );
        }
    }

    /// What is large and what is slow, in words. Returns where it ends.
    fn lists(&self, out: &mut String, top: f64) -> f64 {
        text(out, LEFT, top, 13.0, "start", "#111", "largest results");
        let mut results: Vec<_> = self.results.iter().collect();
        results.sort_by_key(|((shape, _), _)| std::cmp::Reverse(shape.bytes()));
        for (i, ((shape, lane), (n, scope))) in results.into_iter().take(LISTED).enumerate() {
            let y = top + 20.0 + 17.0 * i as f64;
            let (_, lane, colour) = LANES[*lane as usize];
            text(out, LEFT + 70.0, y, 12.0, "end", "#111", &shape.bytes().to_string());
            text(out, LEFT + 82.0, y, 12.0, "start", colour, &format!("{shape} · {lane} · {n} times"));
            let scope: String = scope.chars().take(90).collect();
            text(out, LEFT + 400.0, y, 11.0, "start", "#777", &scope);
        }
        let all: f64 = self.slowest.iter().map(|(_, t)| t.0).sum::<f64>().max(f64::MIN_POSITIVE);
        let right = WIDTH - 300.0;
        text(out, right, top, 13.0, "start", "#111", "time by kind of op");
        for (i, (opcode, time)) in self.slowest.iter().take(LISTED).enumerate() {
            let y = top + 20.0 + 17.0 * i as f64;
            let share = time.0 / all;
            let _ = write!(
                out,
                "<rect x=\"{right}\" y=\"{:.1}\" width=\"{:.1}\" height=\"12\" fill=\"#8A8A8A\" fill-opacity=\"0.35\"/>",
                y - 10.0,
                260.0 * share
            );
            text(out, right + 4.0, y, 12.0, "start", "#111", &format!("{opcode}  {:.1} %", 100.0 * share));
        }
        top + 20.0 + 17.0 * LISTED as f64 + 8.0
    }
}

/// Ops side by side on a floor; what is too narrow to be seen is drawn together with its neighbours.
fn bars_of(
    out: &mut String,
    bars: &[Bar],
    begin: f64,
    floor: f64,
    scale: f64,
    colour: &str,
    height: &dyn Fn(Bytes) -> f64,
) {
    let mut x = begin;
    let mut group: Option<(f64, usize, &Bar)> = None;
    let mut draw = |x: f64, width: f64, n: usize, bar: &Bar| {
        let h = height(bar.bytes);
        let opacity = if bar.heavy { 0.95 } else { 0.5 };
        let title = if n == 1 { bar.title.clone() } else { format!("{n} ops, the largest: {}", bar.title) };
        let _ = write!(
            out,
            "<rect x=\"{x:.2}\" y=\"{:.1}\" width=\"{:.2}\" height=\"{h:.1}\" fill=\"{colour}\" fill-opacity=\"{opacity}\"><title>{}</title></rect>",
            floor - h,
            (width - 0.2).max(0.2),
            escape(&title)
        );
    };
    for bar in bars {
        let width = bar.time.0 * scale;
        let (sum, n, largest) = group.map_or((width, 1, bar), |(sum, n, largest)| {
            (sum + width, n + 1, if bar.bytes > largest.bytes { bar } else { largest })
        });
        if sum >= NARROW {
            draw(x, sum, n, largest);
            x += sum;
            group = None;
        } else {
            group = Some((sum, n, largest));
        }
    }
    if let Some((width, n, largest)) = group {
        draw(x, width, n, largest);
    }
}

/// Columns from left to right: their names, and the column of every coordinate. A model without blocks, or with too many,
/// is drawn as parts of equal work.
fn columns(graph: &Graph, line: &Coordinates, costs: &[OpCost], device: &Device) -> (Vec<String>, Vec<usize>) {
    let blocks = Blocks::new(graph, line);
    if !blocks.names.is_empty() && blocks.names.len() <= MAX_COLUMNS {
        return (blocks.names, blocks.of);
    }
    let n = line.n as usize;
    let mut work = vec![0.0; n];
    for (id, _) in graph.ops() {
        if let Some(at) = line.of[id.index()] {
            work[at as usize] += costs[id.index()].time(device).0;
        }
    }
    let parts = n.clamp(1, 16);
    let total: f64 = work.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let mut sum = 0.0;
    let part = |w: &f64| {
        let at = ((sum / total * parts as f64) as usize).min(parts - 1);
        sum += w;
        at
    };
    ((1..=parts).map(|p| format!("part {p}")).collect(), work.iter().map(part).collect())
}

/// The column of every op of the update: with the params it works on, as if every column were a shard.
fn update_cells(model: &Model, param_column: &[usize]) -> Vec<Option<Cell>> {
    let place = |param: usize| Place::Shard(ShardId(param_column[param] as u32));
    let state = model.state.iter().enumerate().map(|(i, tensor)| match tensor.param {
        _ if i < model.n_params => place(i),
        Some(param) => place(param),
        None => Place::Everywhere,
    });
    let places: Vec<Place> = state.chain((0..model.n_params).map(place)).chain([Place::Everywhere]).collect();
    let cell = |place: &Place| match place {
        Place::Shard(column) => Some((Lane::Update, column.index())),
        Place::Everywhere => None,
    };
    follow_parameters(&model.update, &places).0.iter().map(cell).collect()
}
