//! The pipeline's timeline in Chrome's trace event format, which Perfetto and `chrome://tracing` open.
//!
//! One process per worker; one track each for computing, updating, sending and receiving, and another of the same kind
//! where spans overlap: the format knows only nested spans on one track.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::runtime::StepReport;
use crate::wire::control::Span;

/// Kinds in the order of their tracks.
const KINDS: [&str; 4] = ["compute", "update", "send", "receive"];
/// Tracks of one kind.
const LANES: usize = 64;

/// Spans of the traced steps.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// (rank, step, span)
    spans: Vec<(u32, u64, Span)>,
}

impl Timeline {
    pub fn add(&mut self, report: &StepReport) {
        for w in &report.workers {
            self.spans.extend(w.spans.iter().map(|s| (w.rank, report.step, s.clone())));
        }
    }

    /// The whole file.
    pub fn json(&self) -> Value {
        let mut spans: Vec<_> = self.spans.iter().collect();
        spans.sort_by(|(a, _, x), (b, _, y)| (a, x.start_us, x.duration_us).cmp(&(b, y.start_us, y.duration_us)));
        let zero = self.spans.iter().map(|(_, _, s)| s.start_us).min().unwrap_or(0);
        let mut events = Vec::new();
        // End of the last span of every lane.
        let mut lanes: BTreeMap<(u32, usize), Vec<u64>> = BTreeMap::new();
        let mut tracks: BTreeSet<(u32, usize, usize)> = BTreeSet::new();
        for (rank, step, span) in spans {
            let kind = KINDS.iter().position(|k| *k == span.kind).unwrap_or(KINDS.len());
            let ends = lanes.entry((*rank, kind)).or_default();
            let free = ends.iter().position(|&end| end <= span.start_us);
            let lane = free.unwrap_or(ends.len()).min(LANES - 1);
            let end = span.start_us.saturating_add(span.duration_us);
            match ends.get_mut(lane) {
                Some(last) => *last = end,
                None => ends.push(end),
            }
            tracks.insert((*rank, kind, lane));
            let name = match span.microbatch {
                Some(m) => format!("{} · {m}", span.name),
                None => span.name.clone(),
            };
            events.push(json!({
                "ph": "X", "name": name, "cat": span.kind, "pid": rank, "tid": kind * LANES + lane,
                "ts": span.start_us - zero, "dur": span.duration_us.max(1),
                "args": {"step": step, "microbatch": span.microbatch},
            }));
        }
        let ranks: BTreeSet<u32> = tracks.iter().map(|t| t.0).collect();
        let meta = |what: &str, pid: u32, tid: usize, args: Value| json!({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args});
        for rank in ranks {
            events.push(meta("process_name", rank, 0, json!({"name": format!("worker {rank}")})));
            events.push(meta("process_sort_index", rank, 0, json!({"sort_index": rank})));
        }
        for (rank, kind, lane) in tracks {
            let tid = kind * LANES + lane;
            let title = KINDS.get(kind).unwrap_or(&"other");
            let title = if lane == 0 { (*title).to_owned() } else { format!("{title} {}", lane + 1) };
            events.push(meta("thread_name", rank, tid, json!({"name": title})));
            events.push(meta("thread_sort_index", rank, tid, json!({"sort_index": tid})));
        }
        json!({"displayTimeUnit": "ms", "traceEvents": events})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::WorkerReport;

    #[test]
    fn overlapping_spans_get_tracks_of_their_own() {
        let span = |kind: &str, start_us, duration_us| Span {
            kind: kind.to_owned(),
            name: "f0".to_owned(),
            microbatch: Some(3),
            start_us,
            duration_us,
        };
        let spans =
            vec![span("send", 1000, 10), span("send", 1005, 10), span("send", 1012, 1), span("compute", 1001, 5)];
        let worker = WorkerReport { rank: 1, spans, ..Default::default() };
        let mut timeline = Timeline::default();
        timeline.add(&StepReport {
            step: 7,
            switch: None,
            answer: None,
            variant: String::new(),
            revision: 1,
            loss: 0.0,
            metrics: Vec::new(),
            seconds: 0.0,
            workers: vec![worker],
        });
        let json = timeline.json();
        let events = json["traceEvents"].as_array().unwrap();
        let of = |ph: &str| events.iter().filter(move |e| e["ph"] == ph).collect::<Vec<_>>();
        let placed: Vec<(u64, u64)> =
            of("X").iter().map(|e| (e["ts"].as_u64().unwrap(), e["tid"].as_u64().unwrap())).collect();
        assert_eq!(placed, [(0, 128), (1, 0), (5, 129), (12, 128)]);
        assert_eq!(of("X")[0]["name"], "f0 · 3");
        assert_eq!(of("X")[0]["args"]["step"], 7);
        let names: Vec<&Value> =
            of("M").iter().filter(|e| e["name"] == "thread_name").map(|e| &e["args"]["name"]).collect();
        assert_eq!(names, ["compute", "send", "send 2"]);
    }
}
