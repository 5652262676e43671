//! Lines over steps or time as SVG. Colours are classes: the page's style knows what is light and what is dark.

use std::fmt::Write;

use super::page::escape;

const WIDTH: f64 = 760.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 22.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 26.0;
/// Points that are told apart side by side.
const COLUMNS: f64 = 640.0;

/// What an axis counts.
#[derive(Clone, Copy, PartialEq)]
pub enum Axis {
    Plain,
    /// Seconds that are read as moments of the run.
    Time,
    /// Seconds that something takes.
    Duration,
}

/// A chart under construction.
pub struct Chart {
    x: (f64, f64),
    y: (f64, f64),
    height: f64,
    body: String,
    axes: String,
}

impl Chart {
    /// Ranges that hold nothing are widened.
    pub fn new(x: (f64, f64), y: (f64, f64), height: f64, axes: (Axis, Axis)) -> Self {
        let wide = |(low, high): (f64, f64)| {
            let fine = low.is_finite() && high.is_finite() && high - low > 1e-12 * high.abs().max(low.abs());
            if fine {
                (low, high)
            } else if low.is_finite() {
                (low, low + low.abs().max(1.0))
            } else {
                (0.0, 1.0)
            }
        };
        let mut chart = Self { x: wide(x), y: wide(y), height, body: String::new(), axes: String::new() };
        let bottom = height - BOTTOM;
        for (at, label) in ticks(chart.y, 5.0, axes.1) {
            let y = TOP + chart.to_y(at);
            let _ = write!(
                chart.axes,
                "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                WIDTH - RIGHT,
                LEFT - 7.0,
                y + 4.0
            );
        }
        for (at, label) in ticks(chart.x, 8.0, axes.0) {
            let x = LEFT + chart.to_x(at);
            let _ = write!(
                chart.axes,
                "<path class=\"grid\" d=\"M{x:.1} {bottom:.1}v4\"/><text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
                bottom + 17.0
            );
        }
        chart
    }

    /// Far outside is as good as outside.
    fn to_x(&self, x: f64) -> f64 {
        ((x - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT)).clamp(-WIDTH, 2.0 * WIDTH)
    }

    fn to_y(&self, y: f64) -> f64 {
        let inner = self.height - TOP - BOTTOM;
        (inner - (y - self.y.0) / (self.y.1 - self.y.0) * inner).clamp(-inner, 2.0 * inner)
    }

    /// A line; it is interrupted where a value is none. Of many points in one place the outermost are drawn.
    pub fn line(&mut self, class: &str, points: &[(f64, f64)]) {
        let mut path = String::new();
        let mut pen = false;
        for (x, y) in thinned(points, self.x) {
            if !y.is_finite() || !x.is_finite() {
                pen = false;
                continue;
            }
            let _ = write!(path, "{}{:.1} {:.1}", if pen { 'L' } else { 'M' }, self.to_x(x), self.to_y(y));
            pen = true;
        }
        if !path.is_empty() {
            let _ = write!(self.body, "<path class=\"line {class}\" d=\"{path}\"/>");
        }
    }

    /// The area between two lines; `points` are (x, lower, upper).
    pub fn band(&mut self, class: &str, points: &[(f64, f64, f64)]) {
        if points.iter().any(|p| !(p.0.is_finite() && p.1.is_finite() && p.2.is_finite())) || points.is_empty() {
            return;
        }
        let there = points.iter().map(|p| (p.0, p.1));
        let back = points.iter().rev().map(|p| (p.0, p.2));
        let corners: Vec<String> =
            there.chain(back).map(|(x, y)| format!("{:.1} {:.1}", self.to_x(x), self.to_y(y))).collect();
        let _ = write!(self.body, "<path class=\"band {class}\" d=\"M{}Z\"/>", corners.join("L"));
    }

    /// A moment: a line from top to bottom, a letter above it or a word right of it, and a text for whoever points at it.
    pub fn mark(&mut self, class: &str, x: f64, letter: &str, text: &str) {
        if !(self.x.0..=self.x.1).contains(&x) {
            return;
        }
        let at = LEFT + self.to_x(x);
        let anchor = if letter.len() > 1 { "start" } else { "middle" };
        let _ = write!(
            self.axes,
            "<g class=\"mark {class}\"><title>{}</title><path d=\"M{at:.1} {TOP}V{:.1}\"/><text x=\"{at:.1}\" y=\"13\" text-anchor=\"{anchor}\">{}</text></g>",
            escape(text),
            self.height - BOTTOM,
            escape(letter)
        );
    }

    /// `label`: what is shown, for those who do not see it.
    pub fn finish(self, label: &str) -> String {
        let (w, h) = (WIDTH - LEFT - RIGHT, self.height - TOP - BOTTOM);
        format!(
            "<div class=\"wide\"><svg class=\"chart\" viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{}\">{}<svg x=\"{LEFT}\" y=\"{TOP}\" width=\"{w}\" height=\"{h}\">{}</svg></svg></div>\n",
            self.height,
            escape(label),
            self.axes,
            self.body
        )
    }
}

/// First, lowest, highest and last point of every column that holds more. Order stays.
fn thinned(points: &[(f64, f64)], x: (f64, f64)) -> Vec<(f64, f64)> {
    if points.len() as f64 <= 3.0 * COLUMNS {
        return points.to_vec();
    }
    let column = |p: &(f64, f64)| ((p.0 - x.0) / (x.1 - x.0) * COLUMNS) as i64;
    let mut out = Vec::new();
    for same in points.chunk_by(|a, b| column(a) == column(b) && a.1.is_finite() == b.1.is_finite()) {
        let by_y = |a: &usize, b: &usize| same[*a].1.total_cmp(&same[*b].1);
        let lowest = (0..same.len()).min_by(by_y).unwrap_or(0);
        let highest = (0..same.len()).max_by(by_y).unwrap_or(0);
        let mut kept = vec![0, lowest, highest, same.len() - 1];
        kept.sort_unstable();
        kept.dedup();
        out.extend(kept.into_iter().map(|i| same[i]));
    }
    out
}

/// About `n` round numbers within a range, with their labels.
fn ticks((low, high): (f64, f64), n: f64, axis: Axis) -> Vec<(f64, String)> {
    let span = high - low;
    let (unit, name) = match axis {
        Axis::Plain => (1.0, ""),
        Axis::Time if span > 3.0 * 3600.0 => (3600.0, " h"),
        Axis::Time if span > 300.0 => (60.0, " min"),
        Axis::Time => (1.0, " s"),
        Axis::Duration if high >= 1.0 => (1.0, " s"),
        Axis::Duration if high >= 1e-3 => (1e-3, " ms"),
        Axis::Duration => (1e-6, " µs"),
    };
    let rough = span / n / unit;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(10.0 * power);
    if !(step.is_finite() && step > 0.0) {
        return Vec::new();
    }
    let digits = (0..6).find(|&d| (step * 10f64.powi(d)).fract().abs() < 1e-9).unwrap_or(6) as usize;
    let first = (low / unit / step - 1e-9).ceil();
    (0..=(2.0 * n) as usize)
        .map(|i| (first + i as f64) * step)
        .take_while(|&v| v * unit <= high + 1e-9 * span)
        .map(|v| (v * unit, label(v, digits, name)))
        .collect()
}

fn label(value: f64, digits: usize, name: &str) -> String {
    let short = |value: f64| (value * 1e3).round() / 1e3;
    match value.abs() {
        v if v >= 1e9 => format!("{value:.1e}{name}"),
        v if v >= 1e6 => format!("{} M{name}", short(value / 1e6)),
        v if v >= 1e4 => format!("{} k{name}", short(value / 1e3)),
        // Not the negative one.
        0.0 => format!("{:.digits$}{name}", 0.0),
        _ => format!("{value:.digits$}{name}"),
    }
}

/// Least and greatest of what is there; a few wild values do not count, they are cut off. `None` when nothing is there.
pub fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let mut all: Vec<f64> = values.filter(|v| v.is_finite()).collect();
    if all.is_empty() {
        return None;
    }
    all.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| all[((all.len() - 1) as f64 * share).round() as usize];
    let (low, high) = (at(0.02), at(0.98));
    let far = 6.0 * (high - low).max(1e-3 * high.abs());
    Some((all[0].max(low - far), all[all.len() - 1].min(high + far)))
}

/// Means over neighbours on both sides, enough of them for a line that can be read. Where there is nothing, they stop.
pub fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = (points.len() / 80).clamp(2, 5000);
    let mut out = Vec::new();
    for part in points.chunk_by(|a, b| a.1.is_finite() == b.1.is_finite()) {
        if !part[0].1.is_finite() {
            out.push(part[0]);
            continue;
        }
        let mut sums = vec![0.0];
        part.iter().for_each(|p| sums.push(sums[sums.len() - 1] + p.1));
        out.extend((0..part.len()).map(|i| {
            let (from, to) = (i.saturating_sub(reach), (i + reach + 1).min(part.len()));
            (part[i].0, (sums[to] - sums[from]) / (to - from) as f64)
        }));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(range: (f64, f64), axis: Axis) -> Vec<String> {
        ticks(range, 5.0, axis).into_iter().map(|t| t.1).collect()
    }

    #[test]
    fn ticks_are_round_and_have_units() {
        assert_eq!(labels((0.0, 1.0), Axis::Plain), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels((31.0, 149.0), Axis::Time), ["50 s", "75 s", "100 s", "125 s"]);
        assert_eq!(labels((0.0, 1200.0), Axis::Time), ["0 min", "5 min", "10 min", "15 min", "20 min"]);
        assert_eq!(labels((0.0, 0.3), Axis::Duration), ["0 ms", "100 ms", "200 ms", "300 ms"]);
        assert_eq!(labels((-0.1, 12_000.0), Axis::Plain), ["0", "2500", "5000", "7500", "10 k"]);
        assert_eq!(labels((5e5, 2.6e6), Axis::Plain), ["500 k", "1 M", "1.5 M", "2 M", "2.5 M"]);
    }

    #[test]
    fn thinning_keeps_what_stands_out() {
        let spike = |i: usize| if i == 54_321 { 9.0 } else { (i % 7) as f64 };
        let points: Vec<(f64, f64)> = (0..100_000).map(|i| (i as f64, spike(i))).collect();
        let thin = thinned(&points, (0.0, 99_999.0));
        assert!(thin.len() <= 4 * (COLUMNS as usize + 1), "{}", thin.len());
        assert!(thin.contains(&(54_321.0, 9.0)) && thin.first() == points.first() && thin.last() == points.last());
        assert!(thin.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn means_neither_cross_gaps_nor_move_a_level() {
        let points = [(0.0, 2.0), (1.0, 2.0), (2.0, f64::NAN), (3.0, 8.0), (4.0, 8.0)];
        let means: Vec<f64> = smooth(&points).iter().map(|p| p.1).collect();
        assert_eq!((&means[..2], means[2].is_nan(), &means[3..]), (&[2.0, 2.0][..], true, &[8.0, 8.0][..]));
    }

    #[test]
    fn nothing_to_show_is_no_reason_to_fail() {
        for range in [(0.0, 0.0), (f64::NAN, 1.0), (5.0, f64::INFINITY), (1e300, 1e300), (3.0, 2.0)] {
            let mut chart = Chart::new(range, range, 200.0, (Axis::Time, Axis::Duration));
            chart.line("c0", &[(f64::NAN, 1.0), (1.0, f64::INFINITY), (0.0, 0.0), (f64::MAX, f64::MIN)]);
            chart.band("c0", &[(0.0, f64::NAN, 1.0)]);
            let svg = chart.finish("nothing");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{range:?}: {svg}");
        }
    }
}
