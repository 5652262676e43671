//! How the next plan comes in: prepared while the running one goes on, then begun, committed or called off.

use std::collections::BTreeMap;
use std::path::Path;

use super::crew::Crew;
use super::{Coming, Phase, Session, union};
use crate::plan::Plan;
use crate::runtime::RuntimeError;
use crate::units::Seconds;
use crate::wire::control::{Move, Prepare, Seat, ToWorker, WorkerId};

impl Session {
    /// Lets workers get ready for a plan, each on a seat (by rank), while what runs goes on. [`Notice::Ready`] or
    /// [`Notice::Refused`] follows. `fresh`: its state will be made from the seed. `spell`: it is for later, and compiled no
    /// longer than that in one go.
    ///
    /// # Errors
    /// [`RuntimeError::Busy`] while another plan is on its way; nothing has been sent then.
    pub fn prepare(
        &mut self,
        plan: Plan,
        seats: Vec<WorkerId>,
        fresh: bool,
        spell: Option<Seconds>,
    ) -> Result<(), RuntimeError> {
        if let Some(coming) = &self.coming {
            return Err(RuntimeError::Busy { revision: coming.crew.plan.revision });
        }
        let crew = Crew::new(&self.job.model, plan, seats)?;
        let moves = self.current.as_ref().map(|now| now.moves(&crew)).unwrap_or_default();
        let summed = self.current.as_ref().map_or(0, Crew::summed);
        let everyone = union(self.current.as_ref(), &crew);
        let seat = |&worker: &WorkerId| -> Result<Seat, RuntimeError> {
            let outbox = self.workers.get(&worker).filter(|o| !o.closed);
            let address = outbox.ok_or(RuntimeError::NoShow { rank: worker, seconds: 0 })?.listen;
            Ok(Seat { worker, address })
        };
        let seats: Vec<Seat> = crew.seats.iter().map(seat).collect::<Result<_, _>>()?;
        let leaving: Vec<Seat> =
            everyone.iter().filter(|w| !crew.seats.contains(w)).map(seat).collect::<Result<_, _>>()?;
        for &worker in &everyone {
            let mine = |m: &&Move| m.from == worker || m.to == worker;
            self.tell(
                worker,
                &ToWorker::Prepare(Box::new(Prepare {
                    bundle: self.job.bundle.clone(),
                    plan: crew.plan.clone(),
                    seed: self.job.seed,
                    incarnation: self.incarnation,
                    weights: self.job.weights.clone(),
                    traced_steps: self.job.traced_steps,
                    seats: seats.clone(),
                    leaving: leaving.clone(),
                    moves: moves.iter().filter(mine).copied().collect(),
                    summed,
                    fresh,
                    spell_s: spell.map(|s| s.0),
                })),
            );
        }
        let (progress, reports) = (BTreeMap::new(), BTreeMap::new());
        self.coming = Some(Coming { crew, phase: Phase::Preparing, progress, reports });
        Ok(())
    }

    /// Makes the prepared plan the running one where none runs: its state comes from the seed or from a checkpoint, and
    /// the next step is `step`. [`Notice::Begun`] follows.
    pub fn begin(&mut self, step: u64, checkpoint: Option<&Path>) {
        let Some(Coming { crew, .. }) = self.coming.take() else { return };
        let revision = crew.plan.revision;
        self.begun = crew.seats.iter().copied().collect();
        self.current = Some(crew);
        let checkpoint = checkpoint.map(Path::to_owned);
        self.tell_all(&self.begun.clone(), &ToWorker::Begin { revision, step, checkpoint });
    }

    /// Lets the prepared plan take over in the step that is fed next.
    pub fn commit(&mut self, step: u64) {
        let Some(coming) = self.coming.as_mut().filter(|c| c.phase == Phase::Ready) else { return };
        coming.phase = Phase::Committed(step);
        let revision = coming.crew.plan.revision;
        let everyone = union(self.current.as_ref(), &coming.crew);
        self.tell_all(&everyone, &ToWorker::Commit { revision, step });
    }

    /// Calls a plan off that has not been committed. Returns whether there was one.
    pub fn abort(&mut self) -> bool {
        let Some(coming) = self.coming.take_if(|c| !matches!(c.phase, Phase::Committed(_))) else { return false };
        let everyone = union(self.current.as_ref(), &coming.crew);
        self.tell_all(&everyone, &ToWorker::Abort { revision: coming.crew.plan.revision });
        true
    }
}
