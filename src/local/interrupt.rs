//! Ctrl-C: the first one asks for a clean stop, the second one ends everything.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};

/// Exit code of a process that SIGINT ended, by the shells' custom.
pub const EXIT_INTERRUPTED: i32 = 130;

/// Whether the user wants to stop.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    asked: Arc<AtomicBool>,
}

impl Interrupt {
    /// Watches SIGINT and SIGTERM on a thread of its own. The second one ends this process, and the kernel then ends
    /// its workers.
    pub fn watch() -> io::Result<Self> {
        let interrupt = Self::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (mut int, mut term) = {
            let _inside = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let asked = interrupt.asked.clone();
        let watch = move || {
            runtime.block_on(async move {
                loop {
                    tokio::select! {
                        _ = int.recv() => {}
                        _ = term.recv() => {}
                    }
                    if asked.swap(true, Ordering::SeqCst) {
                        std::process::exit(EXIT_INTERRUPTED);
                    }
                }
            });
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(watch)?;
        Ok(interrupt)
    }

    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }
}
