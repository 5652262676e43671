//! What has been measured: batches before they are trained on, and segments as they run.
//!
//! ```text
//! feed queue --BatchProfile--> Window       what comes next, by variant
//! step reports --Calibration--> Measured    how far each device's nominal figures are off (goes to `cost` and `plan`)
//!                          \--> Speed       how much slower a device has become since (goes to `forecast`)
//! ```
//! `profile` knows nothing of plans, queues or clocks: it is handed values and answers with values.

mod batch;
mod calibration;
mod fit;
mod level;
mod terms;
mod window;

pub use batch::{BatchProfile, Content, Lengths, ProfileError, SAMPLE, TensorProfile, TensorView, profile};
pub use calibration::{Calibration, CalibrationError, Observed, Overhead, Report, Speed, WorkerSummary};
pub use terms::{Terms, Timed};
pub use window::{Ahead, VariantAhead, Window};
