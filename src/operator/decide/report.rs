//! What the head of a job says, and what follows from it.

use super::{Desired, Snapshot, adopt, set};
use crate::api::{ConditionStatus, Explanation, Observed, PartitionPlanStatus, Predicted, PredictedShard, condition};
use crate::operator::profiles;
use crate::units::Seconds;
use crate::wire::report::JobState;

/// What the head says goes into the status of the job and of its plan.
pub(super) fn take_report(s: &Snapshot<'_>, d: &mut Desired) {
    let words = s.pods.iter().find_map(|p| p.head.as_ref()?.last_words.as_ref()?.as_ref().ok());
    let Some(report) = s.report.or(words) else { return };
    d.profile = profiles::learned(s.job, report, s.profiles);
    let status = &mut d.status;
    let number = |x: f64| format!("{x:.4}");
    if report.loss.is_some() || report.state == JobState::Done {
        status.step = Some(report.step);
    }
    if report.steps > 0 {
        status.steps = Some(report.steps);
    }
    if let Some(first) = report.first_loss {
        status.first_loss.get_or_insert_with(|| number(first));
    }
    status.loss = report.loss.map(number).or(status.loss.take());
    status.step_seconds = report.step_seconds.map(|s| Seconds(s).to_string()).or(status.step_seconds.take());
    let rate = report.rate.map(|rate| format!("{} {}/s", three_digits(rate), report.unit));
    status.throughput = rate.or(status.throughput.take());
    status.eta = report.eta_seconds.filter(|_| report.state == JobState::Training).map(eta);
    let heads = s.pods.iter().filter_map(|p| p.head.as_ref()).map(|h| h.restarts).max().unwrap_or(0);
    status.restarts = status.restarts.max(report.restarts + heads);
    if !report.results.is_empty() {
        status.results = Some(report.results.clone());
    }
    let (Some(plan), Some(cut)) = (s.plans.last(), &report.plan) else { return };
    let seconds = |x: f64| Seconds(x).to_string();
    let predicted = Predicted {
        cut: cut.revision,
        step: seconds(cut.step_seconds),
        bound: seconds(cut.bound_seconds),
        microbatch: cut.microbatch,
        microbatches: cut.microbatches,
        bytes_cut: cut.bytes_cut,
        shards: cut
            .shards
            .iter()
            .enumerate()
            .map(|(i, shard)| PredictedShard {
                shard: i as u32,
                workers: shard.workers.clone(),
                ops: shard.ops,
                busy: seconds(shard.busy_seconds),
                memory: shard.memory,
                sent: shard.sent,
                recompute: shard.recompute,
            })
            .collect(),
    };
    let observed = report.step_seconds.map(|step| Observed {
        step: seconds(step),
        busy: report.busy.iter().map(|b| format!("{:.0}%", b * 100.0)).collect(),
    });
    let known = plan.status.clone().unwrap_or_default();
    // Another cut over the same nodes is another revision.
    if known.predicted.as_ref().is_some_and(|p| p.cut < cut.revision) && s.report.is_some() {
        let spec = adopt(s, plan.spec.shards.clone(), format!("recut while training: {}", cut.why), Some(cut));
        d.events.push(("Recut", format!("revision {}: {}", spec.revision, spec.reason), false));
        d.plan = Some(spec);
        return;
    }
    // A head that begins anew takes a while to explain its plan again.
    let explanation = cut.explanation.as_ref().map(|e| Explanation::new(&e.limit, &e.binds, &e.next, &e.more));
    let next = PartitionPlanStatus {
        predicted: Some(predicted),
        observed: observed.or(known.observed.clone()),
        explanation: explanation.or(known.explanation.clone()),
    };
    if next != known {
        let urgent = (&next.predicted, &next.explanation) != (&known.predicted, &known.explanation);
        d.plan_status = plan.metadata.name.clone().map(|name| (name, next, urgent));
    }
}

/// Annotation by which a person agrees to a plan.
const APPROVE: &str = "foreshard.dev/approve";

/// Tells of a plan that waits for approval, and hands on the approval.
pub(super) fn recommend(s: &Snapshot<'_>, d: &mut Desired) {
    let Some(report) = s.report else { return };
    let Some(plan) = &report.recommended else {
        if d.status.is_true(condition::RECOMMENDED) {
            set(
                s,
                &mut d.status,
                condition::RECOMMENDED,
                ConditionStatus::False,
                "Settled",
                "no plan waits for approval",
            );
        }
        return;
    };
    // Another run of the head counts its plans anew.
    let run = report.results.rsplit('/').next().unwrap_or_default();
    let id = format!("{run}.{}", plan.revision);
    let annotations = s.job.metadata.annotations.as_ref();
    if annotations.and_then(|a| a.get(APPROVE)).is_some_and(|a| *a == id) {
        d.approve = Some(plan.revision);
    }
    // Its figures change with every look; what was said first stays.
    let known = d.status.condition(condition::RECOMMENDED).filter(|c| c.status == ConditionStatus::True);
    if known.is_none_or(|c| !c.message.starts_with(&format!("{id}: "))) {
        let name = s.job.metadata.name.as_deref().unwrap_or_default();
        let how = format!("kubectl annotate trainingjob {name} --overwrite {APPROVE}={id}");
        let text = format!("{id}: {}. To agree: {how}", plan.why);
        d.events.push(("Recommended", text.clone(), false));
        set(s, &mut d.status, condition::RECOMMENDED, ConditionStatus::True, "Better", &text);
    }
}

/// Coarse, so that it does not change with every look.
fn eta(seconds: f64) -> String {
    match seconds.max(0.0) {
        s if s < 60.0 => format!("{:.0}s", (s / 10.0).ceil() * 10.0),
        s if s < 5400.0 => format!("{:.0}m", (s / 60.0).ceil()),
        s if s < 172_800.0 => format!("{:.1}h", s / 3600.0),
        s => format!("{:.1}d", s / 86_400.0),
    }
}

/// Rounded, so that it does not change with every look.
fn three_digits(rate: f64) -> String {
    let digits = rate.abs().max(1e-9).log10().floor() as i32 - 2;
    let unit = 10f64.powi(digits);
    format!("{:.*}", digits.min(0).unsigned_abs().min(6) as usize, (rate / unit).round() * unit)
}
