//! The run directory: everything a run leaves behind.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use super::timeline::Timeline;
use crate::graph::Manifest;
use crate::plan::estimate::BatchEstimate;
use crate::profile::{Ahead, BatchProfile};
use crate::runtime::StepReport;

/// What is known of a step besides its report.
pub struct Traits {
    pub predicted: Option<BatchEstimate>,
    /// From one report to the next: what is predicted.
    pub interval: f64,
    pub batch: Option<BatchProfile>,
    /// Batches that waited when it ended.
    pub ahead: Ahead,
}

/// A directory for one run.
pub struct RunDir {
    path: PathBuf,
    log: BufWriter<File>,
    events: File,
    timeline: Timeline,
}

impl RunDir {
    /// Makes the directory; `runs/NAME-N` with the next free number when none is given. One that holds a run already
    /// is refused: nothing is overwritten.
    pub fn create(given: Option<&Path>, name: &str) -> anyhow::Result<Self> {
        let path = match given {
            Some(path) => path.to_owned(),
            None => (1..100_000)
                .map(|n| PathBuf::from("runs").join(format!("{name}-{n}")))
                .find(|p| !p.exists())
                .context("runs/ is full; remove old runs")?,
        };
        if path.join("log.jsonl").exists() {
            anyhow::bail!("{} holds a run already; choose another --run-dir", path.display());
        }
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let log = path.join("log.jsonl");
        let log = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let events = path.join("events.jsonl");
        let events = File::create(&events).with_context(|| format!("cannot write {}", events.display()))?;
        Ok(Self { path, log: BufWriter::new(log), events, timeline: Timeline::default() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn weights(&self) -> PathBuf {
        self.path.join("weights.safetensors")
    }

    /// Writes a file beside its place and moves it there.
    pub fn write(&self, name: &str, content: &str) -> anyhow::Result<()> {
        write_beside(&self.path, name, content)
    }

    /// Keeps every plan that was in force: `plans/plan-N.json` and its picture.
    pub fn write_plan(&self, revision: u64, json: &str, svg: &str) -> anyhow::Result<()> {
        let plans = self.path.join("plans");
        std::fs::create_dir_all(&plans).with_context(|| format!("cannot make {}", plans.display()))?;
        write_beside(&plans, &format!("plan-{revision}.json"), json)?;
        write_beside(&plans, &format!("plan-{revision}.svg"), svg)
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// Appends a line to `events.jsonl`: what happened besides steps, and when.
    pub fn event(&mut self, event: &Value) -> anyhow::Result<()> {
        let written = writeln!(self.events, "{event}");
        written.with_context(|| format!("cannot write {}/events.jsonl; is the disk full?", self.path.display()))
    }

    /// Appends a step to the log, and its spans to the timeline. After a rewind steps come again, with a higher
    /// incarnation: the last line of a step counts.
    pub fn record(
        &mut self,
        report: &StepReport,
        incarnation: u32,
        manifest: &Manifest,
        traits: &Traits,
    ) -> anyhow::Result<()> {
        let metrics: serde_json::Map<String, Value> =
            manifest.metrics.iter().zip(&report.metrics).map(|(m, v)| (m.name.clone(), json!(v))).collect();
        let workers: Vec<Value> = report
            .workers
            .iter()
            .enumerate()
            .map(|(rank, w)| {
                let predicted = traits.predicted.as_ref().and_then(|p| p.workers.get(rank)).map(|p| p.busy);
                json!({
                    "predicted_busy_s": predicted,
                    "rank": w.rank, "worker": w.worker, "busy_s": w.busy_s, "wait_s": w.wait_s, "idle_s": w.idle_s,
                    "turn_s": w.turn_s, "other_s": w.other_s, "sent_bytes": w.sent_bytes,
                    "received_bytes": w.received_bytes, "received_s": w.received_s, "peak_rss": w.peak_rss, "segments_s": w.segments_s,
                })
            })
            .collect();
        let line = json!({
            "step": report.step, "revision": report.revision, "incarnation": incarnation, "loss": report.loss, "metrics": metrics,
            "seconds": report.seconds, "interval_s": traits.interval, "predicted_s": traits.predicted.as_ref().map(|p| p.step),
            "explained_s": traits.predicted.as_ref().map(|p| p.explained), "late_s": traits.predicted.as_ref().map(|p| p.late),
            "answer_s": report.answer.filter(|a| a.waited).map(|a| a.seconds), "workers": workers,
            "batch": traits.batch.as_ref().map(|b| json!({"bytes": b.bytes, "padding": b.padding(), "lengths": b.lengths()})),
            "ahead": traits.ahead,
        });
        let written = writeln!(self.log, "{line}").and_then(|()| self.log.flush());
        written.with_context(|| format!("cannot write {}/log.jsonl; is the disk full?", self.path.display()))?;
        self.timeline.add(report);
        Ok(())
    }

    /// Writes the timeline in the trace event format, which ui.perfetto.dev opens.
    pub fn write_timeline(&self) -> anyhow::Result<()> {
        self.write("timeline.json", &self.timeline.json().to_string())
    }
}

/// Writes a file beside its place and moves it there.
pub fn write_beside(directory: &Path, name: &str, content: &str) -> anyhow::Result<()> {
    let (path, part) = (directory.join(name), directory.join(format!(".{name}.part")));
    let written = std::fs::write(&part, content).and_then(|()| std::fs::rename(&part, &path));
    written.with_context(|| format!("cannot write {}; is the disk full?", path.display()))
}
