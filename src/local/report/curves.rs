//! Loss, throughput, load and speed as curves.

use std::collections::BTreeMap;

use super::Run;
use super::chart::{Axis, Chart, range, smooth};
use super::decisions::{Quantity, Series};
use super::headline::clock;
use super::log::Step;
use super::page::Page;
use crate::forecast::Forecast;
use crate::forecast::robust::median;
use crate::plan::picture::COLOURS;
use crate::units::Seconds;

/// Charts of one kind.
const MAX_CHARTS: usize = 16;
/// Marks of one kind in a chart.
const MAX_MARKS: usize = 60;
/// Forecasts that are drawn beside the latest.
const N_EARLIER: usize = 4;

/// A little more on both sides.
fn padded((low, high): (f64, f64)) -> (f64, f64) {
    let pad = 0.06 * (high - low);
    (low - pad, high + pad)
}

pub fn loss(page: &mut Page, run: &Run) {
    page.section("Loss");
    let points: Vec<(f64, f64)> = run.log.counted().map(|s| (s.step as f64 + 1.0, s.loss)).collect();
    let (Some(y), Some(first), Some(last)) = (range(points.iter().map(|p| p.1)), points.first(), points.last()) else {
        return page.missing("No step has been written down.");
    };
    page.legend(&[("line thin c0", "every step"), ("line c0", "moving average")]);
    let mut chart = Chart::new((first.0, last.0), padded(y), 300.0, (Axis::Plain, Axis::Plain));
    chart.line("thin c0", &points);
    chart.line("c0", &smooth(&points));
    page.raw(&chart.finish("Loss over steps"));
    page.text("Over steps. Where steps were taken again after a restart, the last time counts.");
}

pub fn throughput(page: &mut Page, run: &Run) {
    page.section("Throughput");
    let steps = &run.log.steps;
    if steps.len() < 2 {
        return page.missing("Fewer than two steps have been written down.");
    }
    let (unit, each) = run.unit_per_step().unwrap_or(("steps", 1.0));
    let short = (steps.len() / 300).clamp(3, 1000).min(steps.len() - 1);
    let long = (steps.len() / 25).clamp(short, 20_000);
    // Over a few steps, and over many; between two incarnations nothing is trained.
    let lives: Vec<&[Step]> = steps.chunk_by(|a, b| a.incarnation == b.incarnation).collect();
    let over = |n: usize| -> Vec<(f64, f64)> {
        let mut points = Vec::new();
        for (i, life) in lives.iter().enumerate() {
            if i > 0 {
                let before = lives[i - 1];
                points.push((before[before.len() - 1].end, 0.0));
                points.push((life[0].begin(), 0.0));
            }
            for (i, step) in life.iter().enumerate().skip(short) {
                let n = n.min(i);
                points.push((step.end, each * n as f64 / (step.end - life[i - n].end)));
            }
        }
        points.retain(|p| p.1.is_finite() && p.1 >= 0.0);
        points
    };
    let (fine, coarse) = (over(short), over(long));
    let mut predicted: Vec<(f64, f64)> = Vec::new();
    for life in &lives {
        predicted.extend(life.iter().map(|s| (s.end, each / s.predicted)));
        predicted.push((life[life.len() - 1].end, f64::NAN));
    }
    let high = range(fine.iter().chain(&coarse).map(|p| p.1)).map_or(1.0, |r| r.1);
    let mut chart = Chart::new((steps[0].end, run.end()), (0.0, 1.08 * high), 300.0, (Axis::Time, Axis::Plain));
    marks(&mut chart, run);
    chart.line("thin c0", &fine);
    chart.line("dashed c1", &predicted);
    chart.line("c0", &coarse);
    page.legend(&[
        ("line thin c0", &format!("{unit}/s over {short} steps")),
        ("line c0", &format!("over {long} steps")),
        ("line dashed c1", "predicted"),
        ("mark cutover", "P new plan"),
        ("mark restart", "R restart"),
        ("mark checkpoint", "checkpoint"),
    ]);
    page.raw(&chart.finish("Throughput over time, with changes of plan, restarts and checkpoints"));
    page.text("Over the time of the run. Predicted: by what was known when each step ended.");
}

/// Cutovers, restarts and checkpoints.
fn marks(chart: &mut Chart, run: &Run) {
    for e in few(run.events.of("checkpoint").collect()) {
        let at = e.at.unwrap_or(e.step);
        chart.mark("checkpoint", e.seconds, "", &format!("checkpoint after step {at}, at {}", clock(e.seconds)));
    }
    for e in few(run.events.of("cutover").collect()) {
        let why = e.why.as_deref().unwrap_or("");
        chart.mark("cutover", e.seconds, "P", &format!("revision {} at {}: {why}", e.revision, clock(e.seconds)));
    }
    for e in few(run.events.of("restart").collect()) {
        let why = e.why.as_deref().unwrap_or("");
        chart.mark("restart", e.seconds, "R", &format!("restart at {}: {why}", clock(e.seconds)));
    }
}

/// All of them, or every second, third, ... one.
fn few<T>(all: Vec<T>) -> impl Iterator<Item = T> {
    let each = all.len().div_ceil(MAX_MARKS).max(1);
    all.into_iter().step_by(each)
}

pub fn loads(page: &mut Page, run: &Run) {
    page.section("Load, predicted and observed");
    let mut workers: BTreeMap<u32, (Vec<(f64, f64)>, Vec<(f64, f64)>)> = BTreeMap::new();
    let mut last: BTreeMap<u32, usize> = BTreeMap::new();
    for (i, step) in run.log.steps.iter().enumerate() {
        for load in &step.loads {
            let (busy, predicted) = workers.entry(load.worker).or_default();
            // Lines stop where a worker was not needed, and at restarts.
            let before = last.insert(load.worker, i);
            if before.is_some_and(|b| b + 1 < i || run.log.steps[b].incarnation != step.incarnation) {
                busy.push((step.end, f64::NAN));
                predicted.push((step.end, f64::NAN));
            }
            busy.push((step.end, f64::from(load.busy)));
            predicted.push((step.end, f64::from(load.predicted)));
        }
    }
    if workers.is_empty() {
        return page.missing("No step says what its workers computed.");
    }
    page.text("Computing time per step on each worker, without waiting. All charts have the same scale.");
    let all = workers.values().flat_map(|(busy, predicted)| busy.iter().chain(predicted)).map(|p| p.1);
    let high = range(all).map_or(1.0, |r| r.1);
    let x = (run.log.steps[0].end, run.log.end());
    for (worker, (busy, predicted)) in workers.iter().take(MAX_CHARTS) {
        let class = colour(*worker);
        page.heading(&format!("worker {worker}"));
        page.legend(&[
            (&format!("line thin {class}"), "every step"),
            (&format!("line {class}"), &format!("moving average, {}", off(busy, predicted))),
            ("line dashed ink", "predicted"),
        ]);
        let mut chart = Chart::new(x, (0.0, 1.05 * high), 190.0, (Axis::Time, Axis::Duration));
        for e in few(run.events.of("cutover").collect()) {
            chart.mark("cutover", e.seconds, "P", &format!("revision {} at {}", e.revision, clock(e.seconds)));
        }
        chart.line(&format!("thin {class}"), busy);
        chart.line(&class, &smooth(busy));
        chart.line("dashed ink", predicted);
        page.raw(&chart.finish(&format!("Computing time of worker {worker} per step, predicted and observed")));
    }
    more(page, workers.len(), "workers");
}

/// As a shard has it in the picture of a plan, as long as every worker runs the shard of its number.
fn colour(worker: u32) -> String {
    format!("c{}", worker as usize % COLOURS.len())
}

/// How far predictions were off, in the median.
fn off(busy: &[(f64, f64)], predicted: &[(f64, f64)]) -> String {
    let ratios = busy.iter().zip(predicted).map(|(b, p)| (p.1 / b.1 - 1.0).abs()).filter(|r| r.is_finite());
    let ratios: Vec<f64> = ratios.collect();
    if ratios.is_empty() {
        return "nothing predicted".to_owned();
    }
    format!("{:.1} % off the prediction in the median", 100.0 * median(&ratios))
}

fn more(page: &mut Page, n: usize, what: &str) {
    if n > MAX_CHARTS {
        page.missing(&format!("{} more {what} are not drawn.", n - MAX_CHARTS));
    }
}

pub fn speeds(page: &mut Page, run: &Run) {
    page.section("Speed of each device, and what was foreseen");
    let devices = &run.decisions.devices;
    if devices.is_empty() {
        return page.missing("Nothing was decided in this run, so no speeds and forecasts have been written down.");
    }
    page.text("1 is nominal. A forecast is drawn from the moment it was made; of all earlier ones a few are shown.");
    for (worker, device) in devices.iter().take(MAX_CHARTS) {
        page.heading(&format!("device of worker {worker}"));
        let kind = Kind { name: "speed", axis: Axis::Plain, unit: 1.0, always: Some((0.9, 1.1)) };
        foreseen(page, run, *worker, device, &kind);
    }
    more(page, devices.len(), "devices");
}

pub fn others(page: &mut Page, run: &Run) {
    let all = &run.decisions.others;
    if all.values().all(|s| s.latest.is_none()) {
        return;
    }
    page.section("Step time, CPU, memory and links, and what was foreseen");
    page.text(
        "Step times: of the plan in force. CPU: cores' worth of time that a worker's process got. Memory: beyond what the \
         process had before it made any tensor. Links: while a worker receives.",
    );
    for ((quantity, worker), series) in all.iter().take(2 * MAX_CHARTS) {
        let kind = |name, axis, unit| Kind { name, axis, unit, always: None };
        let (title, kind) = match quantity {
            Quantity::StepTime => ("step time".to_owned(), kind("step time", Axis::Duration, 1.0)),
            Quantity::Cpu => (format!("CPU of worker {worker}, cores"), kind("CPU", Axis::Plain, 1.0)),
            Quantity::Memory => (format!("memory of worker {worker}, MiB"), kind("memory", Axis::Plain, 1.0 / MIB)),
            Quantity::Link => (format!("link of worker {worker}, MB/s"), kind("bandwidth", Axis::Plain, 1e-6)),
        };
        page.heading(&title);
        foreseen(page, run, *worker, series, &kind);
    }
}

const MIB: f64 = 1048576.0;

/// How a quantity is drawn.
struct Kind {
    name: &'static str,
    axis: Axis,
    /// Of the axis, per unit of the values.
    unit: f64,
    /// The chart reaches from below to above these.
    always: Option<(f64, f64)>,
}

fn foreseen(page: &mut Page, run: &Run, worker: u32, series: &Series, kind: &Kind) {
    let Kind { name, axis, unit, always } = *kind;
    let earlier = earlier(series);
    let shown = || earlier.iter().copied().chain(&series.latest);
    let values: Vec<(f64, f64)> = series.values.iter().map(|&(t, v)| (t, v * unit)).collect();
    let seen = values.iter().map(|s| s.1);
    // Intervals of forecasts from a few values are wide: they are cut off where they would dwarf everything else.
    let surest = series.latest.iter().flat_map(|f| f.lower.iter().chain(&f.upper));
    let foreseen = shown().flat_map(|f| &f.mean).chain(surest).map(|v| v * unit);
    let Some((low, high)) = range(seen.chain(foreseen)) else {
        return page.missing(&format!("Its {name} is not known."));
    };
    let (low, high) = padded((low, high));
    let y = always.map_or((low.max(0.0), high), |(a, b)| (low.clamp(0.0, a), high.max(b)));
    let ends = shown().map(|f| f.time(f.horizon()).0).filter(|t| t.is_finite());
    let end = ends.fold(run.end(), f64::max);
    let begin = values.first().map_or(0.0, |s| s.0);
    let mut chart = Chart::new((begin, end), y, 220.0, (Axis::Time, axis));
    let class = colour(worker);
    for forecast in &earlier {
        fan(&mut chart, forecast, unit, &format!("early {class}"));
    }
    if let Some(forecast) = &series.latest {
        fan(&mut chart, forecast, unit, &format!("dashed {class}"));
    }
    for e in few(run.events.of("cutover").collect()) {
        chart.mark("cutover", e.seconds, "P", &format!("revision {} at {}", e.revision, clock(e.seconds)));
    }
    if let Some(&(last, _)) = values.last().filter(|_| series.latest.is_some()) {
        chart.mark("now", last, "last seen", "what lies to the right was only foreseen");
    }
    chart.line("ink", &values);
    let level = series.latest.as_ref().map_or(0.0, |f| f.level);
    page.legend(&[
        ("line ink", name),
        (&format!("line dashed {class}"), "latest forecast"),
        (&format!("line early {class}"), "earlier ones"),
        (&format!("line band {class}"), &format!("interval for {:.0} % of values", 100.0 * level)),
    ]);
    page.raw(&chart.finish(&format!("{name} of worker {worker}, with forecasts")));
    let Some(f) = &series.latest else { return page.text("No forecast was made.") };
    let mean = f.average();
    let held = series.held().map_or(String::new(), |(n, share)| {
        format!(" Of {n} values that came after a forecast, {:.0} % lay in its interval.", 100.0 * share)
    });
    page.text(&format!(
        "Latest: {} from {} values, {} on average over the next {}; in the backtest it erred by {:.2} times the usual change from one value to the next.{held}",
        f.method,
        f.n_values,
        number(mean.mean * unit),
        Seconds(f.interval.0 * f.horizon() as f64),
        f.mase
    ));
}

/// Three digits that count.
fn number(value: f64) -> String {
    let digits = (2.0 - value.abs().max(1e-9).log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{value:.digits$}")
}

/// Some of the earlier forecasts, evenly over the run.
fn earlier(series: &Series) -> Vec<&Forecast> {
    let latest = series.latest.as_ref().map(|f| f.start);
    let all: Vec<&Forecast> = series.forecasts.iter().filter(|f| Some(f.start) != latest).collect();
    let n = all.len().min(N_EARLIER);
    (0..n).map(|i| all[(2 * i + 1) * all.len() / (2 * n)]).collect()
}

fn fan(chart: &mut Chart, f: &Forecast, unit: f64, class: &str) {
    let time = |i: usize| f.time(i).0 + 0.5 * f.interval.0;
    let band: Vec<(f64, f64, f64)> =
        (0..f.horizon()).map(|i| (time(i), f.lower[i] * unit, f.upper[i] * unit)).collect();
    chart.band(class, &band);
    chart.line(class, &(0..f.horizon()).map(|i| (time(i), f.mean[i] * unit)).collect::<Vec<_>>());
}
