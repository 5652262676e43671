//! Logs, metrics and answers to probes.

mod health;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::AtomicU64;

pub use self::health::Health;

/// What a job reports, under the names Prometheus sees.
pub struct JobMetrics {
    registry: Registry,
    pub steps: Counter,
    pub loss: Gauge<f64, AtomicU64>,
    pub step_time: Gauge<f64, AtomicU64>,
}

impl Default for JobMetrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("foreshard_job");
        let (steps, loss, step_time) = (Counter::default(), Gauge::default(), Gauge::default());
        registry.register("steps", "Steps finished", steps.clone());
        registry.register("loss", "Loss of the last step", loss.clone());
        registry.register_with_unit("step", "Wall time of the last step", Unit::Seconds, step_time.clone());
        Self { registry, steps, loss, step_time }
    }
}

impl JobMetrics {
    /// The metrics in the text format.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        if !text.contains(&e.to_string()) {
            text = format!("{text}: {e}");
        }
        cause = e.source();
    }
    text
}
