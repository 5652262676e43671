//! Reports, as messages and back. Every field is named in both directions: none is forgotten.

use super::v1;
use crate::plan::explain::Short;
use crate::topology::Measured;
use crate::wire::report::{JobReport, JobState, Learned, PlanReport, Recommended, ShardReport};

impl From<JobReport> for v1::Report {
    fn from(report: JobReport) -> Self {
        let JobReport {
            state,
            step,
            steps,
            first_loss,
            loss,
            step_seconds,
            rate,
            unit,
            eta_seconds,
            restarts,
            plan,
            recommended,
            learned,
            busy,
            message,
            results,
        } = report;
        let state = match state {
            JobState::Starting => v1::State::Starting,
            JobState::Training => v1::State::Training,
            JobState::Done => v1::State::Done,
            JobState::Interrupted => v1::State::Interrupted,
            JobState::Refused => v1::State::Refused,
            JobState::Failed => v1::State::Failed,
        };
        Self {
            state: state.into(),
            step,
            steps,
            first_loss,
            loss,
            step_seconds,
            rate,
            unit,
            eta_seconds,
            restarts,
            plan: plan.map(Into::into),
            recommended: recommended.map(|Recommended { revision, why }| v1::Recommended { revision, why }),
            learned: learned.map(Into::into),
            busy,
            message,
            results,
        }
    }
}

impl From<v1::Report> for JobReport {
    fn from(report: v1::Report) -> Self {
        let state = match report.state() {
            v1::State::Unspecified | v1::State::Starting => JobState::Starting,
            v1::State::Training => JobState::Training,
            v1::State::Done => JobState::Done,
            v1::State::Interrupted => JobState::Interrupted,
            v1::State::Refused => JobState::Refused,
            v1::State::Failed => JobState::Failed,
        };
        let v1::Report {
            state: _,
            step,
            steps,
            first_loss,
            loss,
            step_seconds,
            rate,
            unit,
            eta_seconds,
            restarts,
            plan,
            recommended,
            learned,
            busy,
            message,
            results,
        } = report;
        // A loss may be anything; last words, which are JSON, leave out what is no number, and so does this.
        let number = |x: Option<f64>| x.filter(|x| x.is_finite());
        Self {
            state,
            step,
            steps,
            first_loss: number(first_loss),
            loss: number(loss),
            step_seconds: number(step_seconds),
            rate: number(rate),
            unit,
            eta_seconds: number(eta_seconds),
            restarts,
            plan: plan.map(Into::into),
            recommended: recommended.map(|v1::Recommended { revision, why }| Recommended { revision, why }),
            learned: learned.map(Into::into),
            busy,
            message,
            results,
        }
    }
}

impl From<PlanReport> for v1::Plan {
    fn from(plan: PlanReport) -> Self {
        let PlanReport {
            revision,
            why,
            step_seconds,
            bound_seconds,
            microbatch,
            microbatches,
            bytes_cut,
            shards,
            explanation,
        } = plan;
        let shards = shards.into_iter().map(|shard| {
            let ShardReport { workers, ops, busy_seconds, memory, sent, recompute } = shard;
            v1::Shard { workers, ops, busy_seconds, memory, sent, recompute }
        });
        let explanation =
            explanation.map(|Short { limit, binds, next, more }| v1::Explanation { limit, binds, next, more });
        Self {
            revision,
            why,
            step_seconds,
            bound_seconds,
            microbatch,
            microbatches,
            bytes_cut,
            shards: shards.collect(),
            explanation,
        }
    }
}

impl From<v1::Plan> for PlanReport {
    fn from(plan: v1::Plan) -> Self {
        let v1::Plan {
            revision,
            why,
            step_seconds,
            bound_seconds,
            microbatch,
            microbatches,
            bytes_cut,
            shards,
            explanation,
        } = plan;
        let shards = shards.into_iter().map(|shard| {
            let v1::Shard { workers, ops, busy_seconds, memory, sent, recompute } = shard;
            ShardReport { workers, ops, busy_seconds, memory, sent, recompute }
        });
        let explanation =
            explanation.map(|v1::Explanation { limit, binds, next, more }| Short { limit, binds, next, more });
        Self {
            revision,
            why,
            step_seconds,
            bound_seconds,
            microbatch,
            microbatches,
            bytes_cut,
            shards: shards.collect(),
            explanation,
        }
    }
}

impl From<Learned> for v1::Learned {
    fn from(Learned { bundle, kinds }: Learned) -> Self {
        let factors = |Measured { product, memory, other, launch }| {
            let [product, memory, other, launch] = [product, memory, other, launch].map(Some);
            v1::Factors { product, memory, other, launch }
        };
        Self { bundle, kinds: kinds.into_iter().map(|(kind, measured)| (kind, factors(measured))).collect() }
    }
}

impl From<v1::Learned> for Learned {
    fn from(v1::Learned { bundle, kinds }: v1::Learned) -> Self {
        let measured = |v1::Factors { product, memory, other, launch }| {
            let [product, memory, other, launch] = [product, memory, other, launch].map(|factor| factor.unwrap_or(1.0));
            Measured { product, memory, other, launch }
        };
        Self { bundle, kinds: kinds.into_iter().map(|(kind, factors)| (kind, measured(factors))).collect() }
    }
}
