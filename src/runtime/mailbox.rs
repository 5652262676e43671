//! Where tensors wait between the threads that receive them and the executor.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::RuntimeError;
use super::wiring::ChannelId;

/// What a value is to the step it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Batch tensor by its position in the manifest.
    Batch(u32),
    Channel(ChannelId),
    /// State tensor from its owner before a cutover.
    State(u32),
    /// Summed gradient of a param from the param's owner before a cutover.
    Gradient(u32),
}

/// (step, source, microbatch).
pub type Address = (u64, Source, u32);

/// Values by address, and the first fault of any thread of this worker.
pub struct Mailbox<B> {
    state: Mutex<State<B>>,
    changed: Condvar,
}

struct State<B> {
    values: BTreeMap<Address, Arc<B>>,
    /// Taken by the first waiter that sees it; later ones see `faulty`.
    fault: Option<RuntimeError>,
    faulty: bool,
    /// Step the executor works on: frames are fenced by it. `None` before the first one: a peer may begin earlier.
    step: Option<u64>,
    /// Somebody waits in [`Mailbox::take`].
    awaited: bool,
}

impl<B> Mailbox<B> {
    pub fn new() -> Self {
        let state = State { values: BTreeMap::new(), fault: None, faulty: false, step: None, awaited: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// False when the address is taken already.
    pub fn put(&self, address: Address, value: Arc<B>) -> bool {
        let fresh = self.lock().values.insert(address, value).is_none();
        self.changed.notify_all();
        fresh
    }

    /// Waits for a value and takes it out. Returns how long it waited.
    pub fn take(&self, address: Address) -> Result<(Arc<B>, Duration), RuntimeError> {
        let began = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(value) = state.values.remove(&address) {
                return Ok((value, began.elapsed()));
            }
            if state.faulty {
                return Err(state.take_fault());
            }
            state.awaited = true;
            state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
            state.awaited = false;
        }
    }

    /// The executor goes on to `step`; what was sent to earlier steps and not needed is dropped.
    pub fn advance(&self, step: u64) -> Result<(), RuntimeError> {
        let mut state = self.lock();
        state.step = Some(step);
        state.values = state.values.split_off(&(step, Source::Batch(0), 0));
        if state.faulty { Err(state.take_fault()) } else { Ok(()) }
    }

    pub fn step(&self) -> Option<u64> {
        self.lock().step
    }

    pub fn is_awaited(&self) -> bool {
        self.lock().awaited
    }

    /// Wakes everyone who waits. The first fault counts.
    pub fn fail(&self, fault: RuntimeError) {
        let mut state = self.lock();
        if !state.faulty {
            state.faulty = true;
            state.fault = Some(fault);
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl<B> State<B> {
    fn take_fault(&mut self) -> RuntimeError {
        self.fault.take().unwrap_or_else(|| RuntimeError::Stopped("stopped after an earlier fault".to_owned()))
    }
}
