//! What a step took, as its workers say.

use super::Fed;
use crate::wire::control::{Span, StepDone, Switched, WorkerId};

/// One step, as measured by the workers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    pub step: u64,
    /// That computed its gradients.
    pub revision: u64,
    /// Of the gradients.
    pub variant: String,
    /// Mean over the step's microbatches and replicas.
    pub loss: f32,
    /// In the manifest's order, means like the loss.
    pub metrics: Vec<f32>,
    /// Wall time from this step's first work to its last.
    pub seconds: f64,
    /// The step ended under another plan: bytes of all workers, the longest pause.
    pub switch: Option<Switched>,
    /// `None` for the first two steps.
    pub answer: Option<Answer>,
    /// By rank.
    pub workers: Vec<WorkerReport>,
}

/// What the parent took from the end of the step before the last, which then was reported, until this one began.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    pub seconds: f64,
    /// All workers waited for it; else it was there before they could begin, and took at most as long.
    pub waited: bool,
}

/// One worker's part of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkerReport {
    pub rank: u32,
    pub worker: WorkerId,
    /// Executing segments.
    pub busy_s: f64,
    /// Waiting for tensors of others.
    pub wait_s: f64,
    /// Waiting for the order to take this step.
    pub idle_s: f64,
    /// From the end of the step before to the beginning of this one, without waiting; `None` for a first step.
    pub turn_s: Option<f64>,
    /// The rest of the step: getting arguments and results to and from executables.
    pub other_s: f64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// What receiving took, from the head of each message to its end.
    pub received_s: f64,
    /// Highest resident memory of the process so far.
    pub peak_rss: u64,
    /// What each executable took: gradients, then update.
    pub segments_s: Vec<f32>,
    pub spans: Vec<Span>,
}

/// `n_scalars`: the loss, then metrics.
pub(super) fn combine(step: u64, fed: &Fed, n_scalars: usize) -> StepReport {
    let mut sums = vec![0f32; n_scalars];
    // By rank: the order of additions must not depend on which worker sits where.
    let by_rank = fed.seats.iter().enumerate().filter_map(|(r, w)| Some((r as u32, *w, fed.reports.get(w)?)));
    for (_, _, report) in by_rank.clone() {
        for &(output, value) in &report.scalars {
            if let Some(sum) = sums.get_mut(output as usize) {
                *sum += value;
            }
        }
    }
    let n = fed.microbatches as f32;
    let mut means = sums.into_iter().map(|s| s / n);
    let start = fed.reports.values().map(|d| d.start_us).min().unwrap_or(0);
    let end = fed.reports.values().map(|d| d.end_us).max().unwrap_or(0);
    StepReport {
        step,
        revision: fed.revision,
        variant: fed.variant.clone(),
        loss: means.next().unwrap_or(f32::NAN),
        metrics: means.collect(),
        seconds: end.saturating_sub(start) as f64 / 1e6,
        switch: None,
        answer: None,
        workers: by_rank
            .map(|(rank, worker, d)| WorkerReport {
                rank,
                worker,
                busy_s: d.busy_s,
                wait_s: d.wait_s,
                idle_s: d.idle_s,
                turn_s: None,
                other_s: (d.end_us.saturating_sub(d.start_us) as f64 / 1e6 - executing(d) - d.wait_s).max(0.0),
                sent_bytes: d.sent_bytes,
                received_bytes: d.received_bytes,
                received_s: d.received_s,
                peak_rss: d.peak_rss,
                segments_s: d.segments_s.clone(),
                spans: d.spans.clone(),
            })
            .collect(),
    }
}

fn executing(done: &StepDone) -> f64 {
    done.segments_s.iter().map(|s| f64::from(*s)).sum()
}
