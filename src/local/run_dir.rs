//! The run directory: everything a run leaves behind.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use super::timeline::Timeline;
use crate::graph::Manifest;
use crate::runtime::StepReport;

/// A directory for one run.
pub struct RunDir {
    path: PathBuf,
    log: BufWriter<File>,
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
        Ok(Self { path, log: BufWriter::new(log), timeline: Timeline::default() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn weights(&self) -> PathBuf {
        self.path.join("weights.safetensors")
    }

    /// Writes a file beside its place and moves it there.
    pub fn write(&self, name: &str, content: &str) -> anyhow::Result<()> {
        let (path, part) = (self.path.join(name), self.path.join(format!(".{name}.part")));
        let written = std::fs::write(&part, content).and_then(|()| std::fs::rename(&part, &path));
        written.with_context(|| format!("cannot write {}; is the disk full?", path.display()))
    }

    /// Appends a step to the log, and its spans to the timeline.
    pub fn record(&mut self, report: &StepReport, manifest: &Manifest) -> anyhow::Result<()> {
        let metrics: serde_json::Map<String, Value> =
            manifest.metrics.iter().zip(&report.metrics).map(|(m, v)| (m.name.clone(), json!(v))).collect();
        let workers: Vec<Value> = report
            .workers
            .iter()
            .map(|w| {
                json!({
                    "rank": w.rank, "busy_s": w.busy_s, "wait_s": w.wait_s, "sent_bytes": w.sent_bytes,
                    "received_bytes": w.received_bytes, "peak_rss": w.peak_rss,
                })
            })
            .collect();
        let line = json!({
            "step": report.step, "revision": report.revision, "loss": report.loss, "metrics": metrics,
            "seconds": report.seconds, "workers": workers,
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
