//! What happened besides steps.

use std::path::Path;

use serde::Deserialize;

use crate::local::json_lines::{Reading, each};

/// A line of `events.jsonl`; facts that an event has none of are absent.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    pub event: String,
    #[serde(default)]
    pub seconds: f64,
    #[serde(default)]
    pub step: u64,
    #[serde(default)]
    pub revision: u64,
    pub at: Option<u64>,
    pub why: Option<String>,
    pub moved_bytes: Option<u64>,
    pub pause_seconds: Option<f64>,
    pub prepare_seconds: Option<f64>,
    pub predicted_step_seconds: Option<f64>,
    pub from: Option<u64>,
    pub lost_steps: Option<u64>,
    pub seconds_lost: Option<f64>,
    pub incarnation: Option<u32>,
}

pub struct Events(pub Vec<Event>);

impl Events {
    pub fn read(path: &Path) -> (Self, Reading) {
        let mut events = Vec::new();
        let reading = each(path, |event| {
            events.push(event);
            Ok(())
        });
        (Self(events), reading)
    }

    pub fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Event> {
        self.0.iter().filter(move |e| e.event == kind)
    }
}
