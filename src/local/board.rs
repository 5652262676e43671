//! What a running job shows: the head of a job answers questions with it.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::watch;

use super::control::Asked;
use super::desk::Desk;
use crate::plan::explain::Short;
use crate::plan::{Place, Plan, ShardId};
use crate::rpc;
use crate::runtime::StepReport;
use crate::telemetry::Health;
use crate::tls::Identity;
use crate::units::Seconds;
use crate::wire::report::{JobReport, JobState, PlanReport, Recommended, ShardReport};

/// The report of a job, as far as it has come. What is written on it is logged, too: a line per event, and one for steps
/// now and then.
#[derive(Default)]
pub struct Board {
    /// Name of the job, for the log.
    job: String,
    report: watch::Sender<JobReport>,
    /// When a step was last logged.
    logged: Mutex<Option<Instant>>,
    health: Arc<Health>,
    /// Takes requests, once the job trains.
    control: Mutex<Option<Sender<Asked>>>,
}

/// How often a step is logged.
const EVERY: Duration = Duration::from_secs(5);

impl Board {
    /// `health`: ready while steps go on.
    pub fn new(job: String, health: Arc<Health>) -> Self {
        Self { job, health, ..Self::default() }
    }

    pub fn read(&self) -> JobReport {
        self.report.borrow().clone()
    }

    pub fn write(&self, change: impl FnOnce(&mut JobReport)) {
        self.report.send_modify(change);
    }

    /// The report, and whether it has changed since.
    pub fn follow(&self) -> watch::Receiver<JobReport> {
        self.report.subscribe()
    }

    /// Takes requests, once the job trains.
    pub fn control(&self) -> Option<Sender<Asked>> {
        self.control.lock().unwrap_or_else(|p| p.into_inner()).clone()
    }

    /// Hands requests on from now on.
    pub fn hand_on(&self, to: Sender<Asked>) {
        *self.control.lock().unwrap_or_else(|p| p.into_inner()) = Some(to);
    }

    /// A plan waits for approval, or none does.
    pub fn recommend(&self, plan: Option<&(u64, String)>) {
        let recommended = plan.map(|(revision, why)| Recommended { revision: *revision, why: why.clone() });
        self.write(|r| r.recommended = recommended);
    }

    /// Something that a person would want to hear.
    pub fn say(&self, line: &str) {
        self.write(|r| line.clone_into(&mut r.message));
        let (plan, step) = self.at();
        tracing::info!(job = self.job, plan, step, "{line}");
    }

    /// The plan in force and the steps done.
    fn at(&self) -> (Option<u64>, u64) {
        let report = self.report.borrow();
        (report.plan.as_ref().map(|p| p.revision), report.step)
    }

    /// A step is done. `eta`: time to the end of the job, where something can be said of it; `rate`: of so many units per
    /// second.
    pub fn step(&self, report: &StepReport, eta: Option<Seconds>, (rate, unit): (f64, &str)) {
        self.health.set_ready(true);
        let mut logged = self.logged.lock().unwrap_or_else(|p| p.into_inner());
        if logged.is_none_or(|at| at.elapsed() > EVERY) {
            *logged = Some(Instant::now());
            let (plan, step, loss) = (report.revision, report.step + 1, report.loss);
            tracing::info!(job = self.job, plan, step, loss, rate, unit, seconds = report.seconds, "trains");
        }
        self.write(|r| {
            r.rate = Some(rate);
            unit.clone_into(&mut r.unit);
            r.state = JobState::Training;
            r.step = report.step + 1;
            r.first_loss.get_or_insert(report.loss.into());
            r.loss = Some(report.loss.into());
            r.step_seconds = Some(report.seconds);
            r.eta_seconds = eta.map(|eta| eta.0);
            r.busy = report.workers.iter().map(|w| w.busy_s / report.seconds.max(1e-9)).collect();
        });
    }

    /// A plan has come into force.
    pub fn plan(&self, plan: &Plan, why: &str) {
        let ops = |shard: usize| {
            let here = Place::Shard(ShardId(shard as u32));
            let grad = plan.grads.values().next();
            grad.map_or(0, |a| a.0.iter().filter(|&&p| p == here).count() as u64)
        };
        let shards = plan.shards.iter().enumerate().map(|(i, s)| ShardReport {
            workers: s.devices.iter().map(|d| d.0).collect(),
            ops: ops(i),
            busy_seconds: s.busy.0,
            memory: s.memory.0,
            sent: s.sent.0,
            recompute: s.recompute,
        });
        let report = PlanReport {
            revision: plan.revision,
            why: why.to_owned(),
            step_seconds: plan.step_time.0,
            bound_seconds: plan.bound.0,
            microbatch: plan.microbatch,
            microbatches: plan.n_microbatches,
            bytes_cut: plan.bytes_cut.0,
            shards: shards.collect(),
            explanation: None,
        };
        for (stage, shard) in report.shards.iter().enumerate() {
            for (rank, worker) in shard.workers.iter().enumerate() {
                let (job, plan, ops) = (&self.job, report.revision, shard.ops);
                tracing::info!(job, plan, stage, rank, worker, ops, "planned");
            }
        }
        self.write(|r| r.plan = Some(report));
    }

    /// The plan of this revision is explained; nobody asks about one that is in force no more.
    pub fn explained(&self, revision: u64, explanation: Short) {
        self.write(|r| {
            if let Some(plan) = r.plan.as_mut().filter(|p| p.revision == revision) {
                plan.explanation = Some(explanation);
            }
        });
    }

    /// Answers those who know the token, with an identity the operator alone, from a thread that does nothing else.
    ///
    /// # Errors
    /// It cannot listen there, or have a thread.
    pub fn serve(self: &Arc<Self>, at: SocketAddr, token: String, identity: Option<Identity>) -> anyhow::Result<()> {
        let listener = TcpListener::bind(at).with_context(|| format!("cannot listen on {at}"))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot wait for connections")?;
        let board = self.clone();
        let serve = move || {
            if let Err(e) = runtime.block_on(rpc::serve(listener, token, identity, Desk(board.clone()))) {
                tracing::error!(job = board.job, error = %e, "nobody can ask how far the job is");
            }
        };
        std::thread::Builder::new().name("status".to_owned()).spawn(serve).context("cannot start a thread")?;
        Ok(())
    }

    /// Leaves the report behind, cut short where the place is small: Kubernetes keeps 4 KiB of a container's last words.
    pub fn last_words(&self, path: &Path) -> anyhow::Result<()> {
        const MAX: usize = 4000;
        const MAX_MESSAGE: usize = 1500;
        let mut report = self.read();
        report.message = report.message.chars().take(MAX_MESSAGE).collect();
        report.recommended = None;
        let mut text = serde_json::to_string(&report)?;
        if let (true, Some(plan)) = (text.len() > MAX, &mut report.plan) {
            plan.explanation = None;
            text = serde_json::to_string(&report)?;
        }
        if text.len() > MAX {
            (report.plan, report.busy) = (None, Vec::new());
            text = serde_json::to_string(&report)?;
        }
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_stay_short() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let board = Board::default();
        board.write(|r| {
            r.message = "é".repeat(5000);
            r.busy = vec![0.123_456_789; 4096];
        });
        board.last_words(file.path()).unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(text.len() <= 4096, "{}", text.len());
        assert!(serde_json::from_str::<JobReport>(&text).is_ok());
    }

    #[test]
    fn last_words_leave_out_the_explanation_before_the_plan() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let board = Board::default();
        board.write(|r| r.plan = Some(PlanReport { revision: 3, ..PlanReport::default() }));
        board.explained(2, Short { limit: "of the plan before".to_owned(), ..Short::default() });
        assert_eq!(board.read().plan.unwrap().explanation, None);
        board.explained(3, Short { limit: "x".repeat(4000), ..Short::default() });
        assert!(board.read().plan.unwrap().explanation.is_some());
        board.last_words(file.path()).unwrap();
        let words: JobReport = serde_json::from_str(&std::fs::read_to_string(file.path()).unwrap()).unwrap();
        assert_eq!(words.plan.map(|p| (p.revision, p.explanation)), Some((3, None)));
    }
}
