//! Workers that are lost, or may be, and the way back to where all begin again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::Session;
use super::hall::Event;
use crate::wire::control::{ToParent, ToWorker, WorkerId};

impl Session {
    /// A worker's process has ended or is about to be ended: nothing is expected of it any more.
    pub fn lose(&mut self, worker: WorkerId) {
        self.leaving.remove(&worker);
        self.workers.remove(&worker);
    }

    /// Workers whose connections have closed.
    pub fn lost(&self) -> Vec<WorkerId> {
        self.workers.iter().filter(|(w, o)| o.closed && !self.done.contains(w)).map(|(&w, _)| w).collect()
    }

    /// Takes all workers that are left back to the state before their first plan, in a new incarnation: what the old one
    /// still sends is refused. Returns those that did not answer in time.
    pub fn reset(&mut self, patience: Duration) -> Vec<WorkerId> {
        self.incarnation += 1;
        (self.current, self.coming, self.saving) = (None, None, None);
        self.fed.clear();
        self.pauses.clear();
        self.begun.clear();
        let incarnation = self.incarnation;
        let mut missing: BTreeSet<WorkerId> = self.workers.keys().copied().collect();
        self.tell_all(&missing, &ToWorker::Reset { incarnation });
        let deadline = Instant::now() + patience;
        while !missing.is_empty() {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((worker, connection, event)) => match event {
                    Event::Joined { stream, listen } => drop(self.admit(worker, *stream, listen)),
                    Event::Said(ToParent::Idle { incarnation: i }) if i == incarnation => {
                        missing.remove(&worker);
                    }
                    Event::Closed(_) if self.is_current(worker, connection) => self.mark_closed(worker),
                    event if self.is_current(worker, connection) => self.hear(worker, &event),
                    _ => {}
                },
                Err(_) => break,
            }
        }
        missing.into_iter().collect()
    }

    /// Workers that do not answer although they should, or compute without end: asked one by one.
    ///
    /// To be called when no step has finished for far longer than one takes. Empty when all wait for each other.
    pub fn hung(&mut self, patience: Duration) -> Vec<WorkerId> {
        let asked: BTreeSet<WorkerId> = self.workers.keys().copied().filter(|w| !self.done.contains(w)).collect();
        self.tell_all(&asked, &ToWorker::Ping);
        let mut suspects = asked;
        let deadline = Instant::now() + patience;
        while !suspects.is_empty() {
            let Ok((worker, connection, event)) =
                self.events.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            else {
                break;
            };
            match event {
                Event::Said(ToParent::Pong { waiting: true }) => drop(suspects.remove(&worker)),
                Event::Closed(_) if self.is_current(worker, connection) => self.mark_closed(worker),
                Event::Said(said) => drop(self.take(worker, Event::Said(said))),
                _ => {}
            }
        }
        suspects.into_iter().collect()
    }
}
