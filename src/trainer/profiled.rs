//! Batches as the profile room sees them.

use crate::graph::Manifest;
use crate::profile::{BatchProfile, ProfileError, TensorView, profile};
use crate::wire::Batch;

/// Profiles a batch where it waits, before it is trained on.
///
/// # Errors
/// [`ProfileError`] for a batch of another model.
pub fn profiled(manifest: &Manifest, batch: &Batch) -> Result<BatchProfile, ProfileError> {
    let variant = manifest.grad.iter().find(|g| g.name == batch.variant);
    let padded = variant.map_or(Vec::new(), |g| manifest.padded(g.microbatch));
    let views: Vec<TensorView<'_>> = manifest
        .batch
        .iter()
        .zip(&batch.tensors)
        .enumerate()
        .map(|(i, (spec, tensor))| TensorView {
            name: &spec.name,
            shape: &tensor.shape,
            data: &tensor.data,
            padded: padded.get(i).copied().unwrap_or(false),
        })
        .collect();
    profile(&batch.variant, &views)
}
