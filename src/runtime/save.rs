//! A worker's part of a checkpoint: what it owns at one moment, written while training goes on.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use super::RuntimeError;
use super::checkpoint::{states_of, write_shard};
use super::executor::Executor;
use crate::device::Device;
use crate::graph::Model;

/// State tensors as they were at one moment. Holding them costs memory: an update writes beside what is held.
pub struct Snapshot<D: Device> {
    device: Arc<D>,
    model: Arc<Model>,
    /// (state tensor, value).
    values: Vec<(usize, Arc<D::Buffer>)>,
}

impl<D: Device> Executor<D> {
    /// What this shard writes of a checkpoint, as it is now.
    pub fn snapshot(&self) -> Snapshot<D> {
        let mine = states_of(&self.shared.plan.owners, self.me.shard);
        let values = mine.into_iter().filter_map(|i| Some((i, self.state[i].clone()?))).collect();
        Snapshot { device: self.shared.device.clone(), model: self.shared.model.clone(), values }
    }
}

impl<D: Device> Snapshot<D> {
    /// Brings all values into host memory, lets go of the device's, then writes: the update of the next step finds its
    /// memory free again as early as possible. Returns the file's entry for the index.
    pub fn write(self, path: &Path) -> Result<serde_json::Value, RuntimeError> {
        let Self { device, model, values } = self;
        let states: Vec<usize> = values.iter().map(|v| v.0).collect();
        let mut host = Vec::with_capacity(values.len());
        for (i, buffer) in values {
            let tensor = &model.state[i];
            let mut data = vec![0; tensor.shape.bytes().0 as usize];
            let at = |source| RuntimeError::Device { at: format!("downloading {}", tensor.name), source };
            device.download(&buffer, &mut data).map_err(at)?;
            host.push(data);
        }
        let mut bytes = |i: usize| -> Result<Cow<'_, [u8]>, RuntimeError> {
            let at = states.iter().position(|&s| s == i).expect("only what was asked for is written");
            Ok(Cow::Borrowed(&host[at]))
        };
        let entry = write_shard(&model, path, &states, &mut bytes)?;
        Ok(serde_json::to_value(entry).expect("an entry is plain data"))
    }
}
