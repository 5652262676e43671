//! How a worker leaves when somebody other than its parent tells it to, as a kubelet does.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::control::Control;
use crate::wire::control::ToParent;

/// What another thread has to know of a worker to let it go.
#[derive(Default)]
pub struct Departure {
    /// Once the worker has dialled in.
    control: Mutex<Option<Arc<Control>>>,
    /// It holds state that would be lost with it.
    holds: AtomicBool,
    /// It has been told to go.
    told: AtomicBool,
}

impl Departure {
    pub(super) fn dialled(&self, control: &Arc<Control>) {
        *self.control.lock().unwrap_or_else(|p| p.into_inner()) = Some(control.clone());
    }

    pub(super) fn holds(&self, state: bool) {
        self.holds.store(state, Ordering::SeqCst);
    }

    /// Whether the worker has been told to go.
    pub(super) fn is_told(&self) -> bool {
        self.told.load(Ordering::SeqCst)
    }

    /// Tells the parent that this worker has to go. False when it may go at once: nothing would be lost with it, or nobody
    /// would save it.
    pub fn announce(&self) -> bool {
        self.told.store(true, Ordering::SeqCst);
        let control = self.control.lock().unwrap_or_else(|p| p.into_inner()).clone();
        let told = control.filter(|_| self.holds.load(Ordering::SeqCst)).map(|c| c.send(&ToParent::Leaving));
        matches!(told, Some(Ok(())))
    }
}
