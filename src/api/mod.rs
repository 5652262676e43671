//! The custom resources: what a user writes, and nothing that runs.

mod job;

pub use job::{
    Checkpoint, Data, FailurePolicy, Format, Parallelism, Resources, Schedule, Shuffle, TrainingJob, TrainingJobSpec,
    crd, parse,
};
