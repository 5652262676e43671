//! Cutover: from one plan to the next inside a step.
//!
//! # Expected flow
//! ```text
//!   parent                       every worker of both plans
//!   Prepare (new)   ->           connects and compiles beside the training; Ready
//!   Commit (step S) ->           sends the state that changes hands: it is constant until the update of S
//!   Step S          ->           gradients of S by the old plan, beside the copies
//!                                sends the summed gradients of params that change hands
//!                                update of S by the new plan; Report
//!   Release (old)   ->           closes the old connections
//! ```
//! # Guarantees
//! No step is lost or run twice, and its gradients are summed in the old plan's order: the loss of step S is the old
//! plan's, that of S + 1 the new plan's. Only what changes hands travels, and only gradients travel while nothing else
//! is going on. Until `Commit`, whatever happens to the new plan leaves the old one running.
//! # Assumptions
//! The parent sends `Commit` to everyone of both plans, and only after all of them were ready; it releases the old plan
//! only after all have reported step S.
//! # Errors
//! A worker that dies after `Commit` takes the step with it: all go back to the last checkpoint.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::RuntimeError;
use super::executor::{Executor, Half, Links};
use super::link::{Outgoing, Shared};
use super::mailbox::Source;
use super::prepare::Prepared;
use super::wiring::gradient_shape;
use crate::device::Device;
use crate::wire::control::{StepDone, Switched, WorkerId};
use crate::wire::frame::Kind;

/// A cutover under way: the state is travelling.
pub struct Switch<D: Device> {
    next: Prepared<D>,
    /// The step whose update is the new plan's.
    pub step: u64,
}

/// Connections of a plan that nobody runs any more. Peers may still read from them.
pub struct Retired<D: Device> {
    pub shared: Arc<Shared<D>>,
    pub links: Links<D::Buffer>,
}

/// How a worker comes out of a cutover.
pub struct Outcome<D: Device> {
    /// `None`: this worker has left.
    pub executor: Option<Executor<D>>,
    pub retired: Vec<Retired<D>>,
    pub done: StepDone,
}

impl<D: Device> Switch<D> {
    /// Sends the state that changes hands. `running` is the plan that still runs; a worker that joins has none.
    pub fn begin(next: Prepared<D>, running: Option<&Executor<D>>, step: u64) -> Self {
        let state = running.map(|e| &e.state[..]).unwrap_or_default();
        send(&next, Kind::State, "state", step, &|i| {
            let bytes = next.shared.model.state[i].shape.bytes().0 as usize;
            state.get(i).cloned().flatten().map(|buffer| (bytes, buffer))
        });
        Self { next, step }
    }

    /// Microbatches that the plan before sums in a step.
    pub fn summed(&self) -> u32 {
        self.next.summed
    }

    /// Ends the step: hands over gradients, takes over what comes in, updates under the new plan.
    pub fn complete(self, running: Option<Executor<D>>, mut half: Half<D::Buffer>) -> Result<Outcome<D>, RuntimeError> {
        let began = Instant::now();
        let Self { next, step } = self;
        let shared = next.shared.clone();
        let model = shared.model.clone();
        let sums = std::mem::take(&mut half.sums);
        send(&next, Kind::Gradient, "gradients", step, &|i| {
            let bytes = || gradient_shape(&model, i).bytes().0 as usize;
            sums.get(&i).map(|buffer| (bytes(), buffer.clone()))
        });
        let mut retired = Vec::new();
        let mut state = Vec::new();
        let mut traffic = (0, 0);
        if let Some(Executor { shared, links, state: old, .. }) = running {
            traffic = (shared.traffic.sent.load(Ordering::Relaxed), shared.traffic.received.load(Ordering::Relaxed));
            retired.push(Retired { shared, links });
            state = old;
        }
        let (Some(programs), Some(me)) = (next.programs, shared.me) else {
            let mut done = half.done(&shared.traffic);
            done.switch = Some(switched(&shared, 0, began));
            done.sent_bytes += traffic.0;
            done.received_bytes += traffic.1;
            retired.push(Retired { shared, links: next.links });
            return Ok(Outcome { executor: None, retired, done });
        };
        let mut executor = Executor::new(shared.clone(), me, programs, next.ceiling, next.links, next.seed);
        let mut moved = 0;
        let mut kept: Vec<Option<Arc<D::Buffer>>> = (0..model.state.len()).map(|_| None).collect();
        for i in executor.kept() {
            let coming = shared.incoming.contains_key(&(i as u32));
            let mut arrive = |source| -> Result<Arc<D::Buffer>, RuntimeError> {
                let (buffer, waited) = shared.mailbox.take((step, source, 0))?;
                half.clock.wait += waited;
                Ok(buffer)
            };
            kept[i] = if coming {
                moved += model.state[i].shape.bytes().0;
                Some(arrive(Source::State(i as u32))?)
            } else {
                state.get_mut(i).and_then(Option::take)
            };
            if kept[i].is_none() {
                let message = format!("state tensor {} is neither here nor on its way", model.state[i].name);
                return Err(RuntimeError::Protocol { whom: "the parent".to_owned(), message });
            }
            if i < model.n_params && executor.programs.owned.contains(&i) {
                let sum = if coming {
                    moved += gradient_shape(&model, i).bytes().0;
                    Some(arrive(Source::Gradient(i as u32))?)
                } else {
                    sums.get(&i).cloned()
                };
                let missing = || {
                    let message = format!("the gradient of {} is neither here nor on its way", model.state[i].name);
                    RuntimeError::Protocol { whom: "the parent".to_owned(), message }
                };
                half.sums.insert(i, sum.ok_or_else(missing)?);
            }
        }
        drop((state, sums));
        executor.adopt(kept);
        let switched = switched(&shared, moved, began);
        let mut done = executor.second_half(half)?;
        done.switch = Some(switched);
        done.sent_bytes += traffic.0;
        done.received_bytes += traffic.1;
        Ok(Outcome { executor: Some(executor), retired, done })
    }
}

fn switched<D: Device>(shared: &Shared<D>, moved_bytes: u64, began: Instant) -> Switched {
    Switched { revision: shared.stamp.revision, moved_bytes, pause_s: began.elapsed().as_secs_f64() }
}

/// Queues what goes to each new owner; `of(state tensor)` is its length and buffer, where there is one to send.
fn send<D: Device>(
    next: &Prepared<D>,
    kind: Kind,
    name: &str,
    step: u64,
    of: &dyn Fn(usize) -> Option<(usize, Arc<D::Buffer>)>,
) {
    let mut by_owner: BTreeMap<WorkerId, Vec<(u32, usize, Arc<D::Buffer>)>> = BTreeMap::new();
    for m in &next.outgoing {
        if let Some((bytes, buffer)) = of(m.state as usize) {
            by_owner.entry(m.to).or_default().push((m.state, bytes, buffer));
        }
    }
    for (to, tensors) in by_owner {
        // A link for every move was made while preparing.
        if let Some(link) = next.links.get(&to) {
            link.send(Outgoing { kind, name: Arc::from(name), step, microbatch: 0, tensors });
        }
    }
}
