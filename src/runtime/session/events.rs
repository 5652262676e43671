//! What workers say, and what follows from it.

use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use super::hall::Event;
use super::report::combine;
use super::{Notice, Phase, Saving, Session, StepReport, union};
use crate::runtime::RuntimeError;
use crate::wire::control::{FailureClass, Switched, ToParent, ToWorker, WorkerId};

/// How long a worker that lost a peer is doubted: the peer's own story is better.
const DOUBT: Duration = Duration::from_secs(2);

impl Session {
    /// The next thing that happens, or `None` after `timeout`.
    ///
    /// # Errors
    /// A worker that failed or was lost: nothing more will come of the steps under way until [`Session::reset`].
    pub fn poll(&mut self, timeout: Duration) -> Result<Option<Notice>, RuntimeError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(report) = self.finished_step() {
                return Ok(Some(Notice::Step(report)));
            }
            let Some((worker, event)) = self.next_event(deadline.saturating_duration_since(Instant::now()))? else {
                return Ok(None);
            };
            if let Some(notice) = self.take(worker, event)? {
                return Ok(Some(notice));
            }
        }
    }

    pub(super) fn take(&mut self, worker: WorkerId, event: Event) -> Result<Option<Notice>, RuntimeError> {
        self.hear(worker, &event);
        let said = match event {
            Event::Said(said) => said,
            Event::Joined { .. } => return Err(unexpected(worker)),
            // A worker that is done leaves, perhaps before the others are; one that was to join is missed.
            Event::Closed(e) => return Ok(self.missed(worker, e.to_string())),
            Event::State(..) => return Err(unexpected(worker)),
        };
        let coming = self.coming.as_mut();
        Ok(match said {
            ToParent::Progress { revision, compiled, of } => {
                coming.filter(|c| c.crew.plan.revision == revision).map(|coming| {
                    coming.progress.insert(worker, (compiled, of));
                    let sum =
                        coming.progress.values().fold((0, 0), |s, c| (s.0 + u64::from(c.0), s.1 + u64::from(c.1)));
                    Notice::Progress { compiled: sum.0, of: sum.1 }
                })
            }
            ToParent::Ready { revision, report } => {
                let Some(coming) = coming.filter(|c| c.crew.plan.revision == revision) else { return Ok(None) };
                coming.reports.insert(worker, report);
                let everyone = union(self.current.as_ref(), &coming.crew);
                if coming.reports.len() < everyone.len() {
                    return Ok(None);
                }
                coming.phase = Phase::Ready;
                let report = |w: &WorkerId| (*w, coming.reports[w].clone());
                Some(Notice::Ready(coming.crew.seats.iter().map(report).collect()))
            }
            ToParent::Refused { revision, message, class } => {
                if coming.is_some_and(|c| c.crew.plan.revision == revision) && self.abort() {
                    return Ok(Some(Notice::Refused { worker, message, class }));
                }
                None
            }
            ToParent::Begun { .. } => (self.begun.remove(&worker) && self.begun.is_empty()).then_some(Notice::Begun),
            ToParent::Report(done) => {
                if let Some(fed) = self.fed.get_mut(&done.step) {
                    fed.reports.insert(worker, done);
                }
                None
            }
            ToParent::Saved { step, entry, seconds } => {
                let Some(saving) = self.saving.as_mut().filter(|s| s.step == step) else { return Ok(None) };
                saving.missing.remove(&worker);
                saving.entries.push(entry);
                saving.seconds = saving.seconds.max(seconds);
                if !saving.missing.is_empty() {
                    return Ok(None);
                }
                let Some(Saving { entries, seconds, .. }) = self.saving.take() else { return Ok(None) };
                Some(Notice::Saved { step, entries, seconds })
            }
            ToParent::NotSaved { step, message } => {
                self.saving.take_if(|s| s.step == step).map(|_| Notice::NotSaved { step, message })
            }
            // Already heard.
            ToParent::Leaving => None,
            // The answer to a reset that was given up.
            ToParent::Idle { .. } => None,
            ToParent::Done => {
                self.done.insert(worker);
                None
            }
            ToParent::Failed { message, .. } => self.missed(worker, message),
            // The answer to a question that was given up.
            ToParent::Pong { .. } => None,
            ToParent::Hello { .. } => return Err(unexpected(worker)),
        })
    }

    /// A worker that nothing that runs depends on has failed: the plan it was to join is called off.
    fn missed(&mut self, worker: WorkerId, message: String) -> Option<Notice> {
        let joins = self.coming.as_ref().is_some_and(|c| c.crew.seats.contains(&worker));
        (joins && self.abort()).then_some(Notice::Refused { worker, message, class: FailureClass::Peer })
    }

    /// Whether training stands or falls with a worker.
    fn is_needed(&self, worker: WorkerId) -> bool {
        let committed = self.coming.as_ref().is_some_and(|c| matches!(c.phase, Phase::Committed(_)));
        !self.done.contains(&worker) && (committed || self.current.is_none() || self.seats().contains(&worker))
    }

    /// The oldest step, if everyone has reported it; after a cutover, the plan that follows takes over here too.
    fn finished_step(&mut self) -> Option<StepReport> {
        let fed = self.fed.first_entry()?;
        if fed.get().reports.len() < fed.get().expected.len() {
            return None;
        }
        let (step, fed) = fed.remove_entry();
        let mut report = combine(step, &fed, 1 + self.job.model.manifest.metrics.len());
        self.pauses.add(&mut report, &fed.reports);
        if let Some(coming) = self.coming.take_if(|c| c.phase == Phase::Committed(step)) {
            let switches = fed.reports.values().filter_map(|r| r.switch);
            report.switch = switches.reduce(|a, b| Switched {
                revision: a.revision,
                moved_bytes: a.moved_bytes + b.moved_bytes,
                pause_s: a.pause_s.max(b.pause_s),
            });
            let everyone = union(self.current.as_ref(), &coming.crew);
            if let Some(old) = self.current.replace(coming.crew) {
                self.tell_all(&everyone, &ToWorker::Release { revision: old.plan.revision });
            }
            let seats = self.seats().to_vec();
            for worker in everyone.into_iter().filter(|w| !seats.contains(w)) {
                // It has nothing left: it goes when it likes.
                self.tell(worker, &ToWorker::Finish);
                self.done.insert(worker);
            }
        }
        Some(report)
    }

    /// The next event that counts, or `None` after `timeout`; failures and lost connections are errors.
    pub(super) fn next_event(&mut self, timeout: Duration) -> Result<Option<(WorkerId, Event)>, RuntimeError> {
        let deadline = Instant::now() + timeout;
        let mut suspicion: Option<(RuntimeError, Instant)> = None;
        loop {
            let until = suspicion.as_ref().map_or(deadline, |(_, until)| *until);
            let (worker, connection, event) =
                match self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(event) => event,
                    Err(RecvTimeoutError::Timeout) => return suspicion.map_or(Ok(None), |(fault, _)| Err(fault)),
                    Err(RecvTimeoutError::Disconnected) => {
                        return Err(RuntimeError::Stopped("all connections to workers are closed".to_owned()));
                    }
                };
            if let Event::Joined { stream, listen } = event {
                if self.finishing {
                    continue;
                }
                // One that was there has lost all it knew, whether or not the end of its connection was noticed.
                let anew = self.workers.contains_key(&worker) && self.is_needed(worker);
                self.admit(worker, *stream, listen)?;
                if anew {
                    let message = "it was started anew".to_owned();
                    let fault = RuntimeError::WorkerLost { rank: worker, message };
                    return Err(suspicion.map_or(fault, |(fault, _)| fault));
                }
                continue;
            }
            if !self.is_current(worker, connection) {
                continue;
            }
            if matches!(event, Event::Closed(_)) {
                self.mark_closed(worker);
            }
            let fault = fault(worker, &event).filter(|_| self.is_needed(worker));
            match (fault, &mut suspicion) {
                (None, None) => return Ok(Some((worker, event))),
                // Reports of the others mean nothing any more.
                (None, Some(_)) => {}
                (Some(certain @ RuntimeError::WorkerFailed { .. }), _) => return Err(certain),
                // A worker that merely lost a peer is not the cause; give the cause a moment to show.
                (Some(fault), None) => suspicion = Some((fault, Instant::now() + DOUBT)),
                (Some(_), Some((RuntimeError::WorkerLost { rank, message }, _)))
                    if matches!(event, Event::Closed(_)) && message.starts_with(PEER_LOST) =>
                {
                    (*rank, *message) = (worker, "its connection closed".to_owned());
                }
                (Some(_), Some(_)) => {}
            }
        }
    }
}

const PEER_LOST: &str = "lost a peer";

/// The error in what a worker says, if there is one.
pub(super) fn fault(rank: WorkerId, event: &Event) -> Option<RuntimeError> {
    match event {
        Event::Said(ToParent::Failed { message, class: FailureClass::Own }) => {
            Some(RuntimeError::WorkerFailed { rank, message: message.clone() })
        }
        Event::Said(ToParent::Failed { message, class: FailureClass::Peer }) => {
            Some(RuntimeError::WorkerLost { rank, message: format!("{PEER_LOST}: {message}") })
        }
        Event::Closed(e) => Some(RuntimeError::WorkerLost { rank, message: e.to_string() }),
        _ => None,
    }
}

fn unexpected(worker: WorkerId) -> RuntimeError {
    let message = "said something out of turn".to_owned();
    RuntimeError::Protocol { whom: format!("worker {worker}"), message }
}
