//! `manifest.json` of a bundle: what the graphs' inputs and outputs are called.
//!
//! Calling conventions, in order:
//!
//! | graph | inputs | outputs |
//! |---|---|---|
//! | init | key `uint32[2]` | params, slots |
//! | grad | params, batch (one microbatch), key `uint32[2]` | loss, metrics, gradients (one per param) |
//! | update | params, slots, gradients *summed* over microbatches, their number `float32[]` | params, slots |
//!
//! Loss and metrics are means over the rows of a microbatch; a step reports their mean over its microbatches.
//! The key of microbatch `m` of step `s` is `fold_in(fold_in(PRNGKey(seed), s), m)` (threefry), whatever the plan.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::{closest, explain};
use super::shape::{ArrayShape, DType};
use crate::units::Bytes;

/// The format this version reads and writes.
pub const FORMAT: &str = "foreshard.bundle/1";
/// No tensor is larger.
const LARGEST: Bytes = Bytes(1 << 46);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always [`FORMAT`].
    pub format: String,
    pub name: String,
    /// Rows of the global batch: the leading axis of every batch tensor.
    pub batch_size: u64,
    pub params: Vec<ParamSpec>,
    pub slots: Vec<SlotSpec>,
    /// Shapes of the global batch.
    pub batch: Vec<TensorSpec>,
    pub metrics: Vec<TensorSpec>,
    pub init: FunctionSpec,
    pub grad: Vec<GradSpec>,
    pub update: FunctionSpec,
    #[serde(default)]
    pub weights: Option<FileSpec>,
    /// Versions of the exporter and of what it ran on; read by people only.
    #[serde(default)]
    pub provenance: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
}

impl TensorSpec {
    pub fn array(&self) -> ArrayShape {
        ArrayShape::new(self.dtype, self.shape.clone())
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParamSpec {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    /// Type of the gradient and of its sum: at least `float32`, also for half-width params.
    pub grad_dtype: DType,
}

/// One leaf of the optimizer's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotSpec {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    /// The param this slot belongs to (a moment, a master copy); absent for shared state such as a step count.
    #[serde(default)]
    pub param: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// Path inside the bundle.
    pub file: String,
    /// Lower-case hex.
    pub sha256: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionSpec {
    /// `HloModuleProto`, what Foreshard runs.
    pub hlo: FileSpec,
    /// Portable StableHLO artifact, kept for the day HLO changes.
    #[serde(default)]
    pub stablehlo: Option<FileSpec>,
}

/// The gradient function for one microbatch shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GradSpec {
    /// Unique name of the variant, such as `mb2` or `mb2-t64`.
    pub name: String,
    /// Rows of the microbatch; divides the global batch.
    pub microbatch: u64,
    /// Shape of every batch tensor of one microbatch, by name.
    pub shapes: BTreeMap<String, Vec<u64>>,
    pub hlo: FileSpec,
    #[serde(default)]
    pub stablehlo: Option<FileSpec>,
}

impl Manifest {
    /// Reads and checks `manifest.json`. The error says what to change.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Format {
            #[serde(default)]
            format: String,
        }
        let format = serde_json::from_slice::<Format>(json).map_err(|e| format!("not a manifest: {e}"))?.format;
        if format != FORMAT {
            return Err(format!(
                "format is {format:?}, this build reads {FORMAT:?}; export the bundle with the exporter of this release"
            ));
        }
        let manifest: Self = serde_json::from_slice(json).map_err(|e| explain(&e.to_string()))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Dimensions of a tensor of the state: by position in `params`, then in `slots`.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn dims(&self, tensor: usize) -> &[u64] {
        match self.params.get(tensor) {
            Some(param) => &param.shape,
            None => &self.slots[tensor - self.params.len()].shape,
        }
    }

    fn check(&self) -> Result<(), String> {
        let tensors = self
            .params
            .iter()
            .map(|p| ("params", &p.name, p.dtype, &p.shape))
            .chain(self.slots.iter().map(|s| ("slots", &s.name, s.dtype, &s.shape)))
            .chain(self.batch.iter().map(|b| ("batch", &b.name, b.dtype, &b.shape)))
            .chain(self.metrics.iter().map(|m| ("metrics", &m.name, m.dtype, &m.shape)));
        let mut seen = std::collections::BTreeSet::new();
        for (list, name, dtype, shape) in tensors {
            if name.is_empty() || !seen.insert((list, name)) {
                return Err(format!("{list}: the name {name:?} is empty or taken twice"));
            }
            if ArrayShape::new(dtype, shape.clone()).bytes() > LARGEST {
                return Err(format!("{list}: {name:?} of shape {shape:?} is larger than any device"));
            }
        }
        if self.params.is_empty() {
            return Err("params: the model has none, there is nothing to train".to_owned());
        }
        for slot in &self.slots {
            if let Some(param) = &slot.param
                && !seen.contains(&("params", param))
            {
                let hint = closest(param, self.params.iter().map(|p| p.name.as_str()));
                return Err(format!("slots: {:?} belongs to param {param:?}, which does not exist{hint}", slot.name));
            }
        }
        if self.batch_size == 0 || self.batch.is_empty() {
            return Err("batch: it has no rows or no tensors".to_owned());
        }
        for tensor in &self.batch {
            if tensor.shape.contains(&0) {
                return Err(format!("batch: {:?} of shape {:?} holds nothing", tensor.name, tensor.shape));
            }
            if tensor.shape.first() != Some(&self.batch_size) {
                let (name, shape, rows) = (&tensor.name, &tensor.shape, self.batch_size);
                return Err(format!(
                    "batch: {name:?} has shape {shape:?}, its leading axis must be batch_size = {rows}"
                ));
            }
        }
        if self.grad.is_empty() {
            return Err(
                "grad: the bundle has no gradient function; export with at least one of microbatches".to_owned()
            );
        }
        let mut variants = std::collections::BTreeSet::new();
        for grad in &self.grad {
            let name = &grad.name;
            if !variants.insert(name) {
                return Err(format!("grad: variant {name:?} is there twice"));
            }
            if grad.microbatch == 0 || !self.batch_size.is_multiple_of(grad.microbatch) {
                let (m, b) = (grad.microbatch, self.batch_size);
                return Err(format!("grad: microbatch {m} of variant {name:?} does not divide batch_size {b}"));
            }
            for tensor in &self.batch {
                match grad.shapes.get(&tensor.name) {
                    Some(shape)
                        if shape.first() == Some(&grad.microbatch)
                            && shape.len() == tensor.shape.len()
                            && !shape.contains(&0)
                            && ArrayShape::new(tensor.dtype, shape.clone()).bytes() <= LARGEST => {}
                    Some(shape) => {
                        return Err(format!(
                            "grad: variant {name:?} gives {:?} the shape {shape:?}, expected {} rows of {:?}",
                            tensor.name,
                            grad.microbatch,
                            &tensor.shape[1..]
                        ));
                    }
                    None => {
                        return Err(format!("grad: variant {name:?} has no shape for batch tensor {:?}", tensor.name));
                    }
                }
            }
            if let Some(unknown) = grad.shapes.keys().find(|&k| !seen.contains(&("batch", k))) {
                let hint = closest(unknown, self.batch.iter().map(|b| b.name.as_str()));
                return Err(format!("grad: variant {name:?} has a shape for {unknown:?}, which is not in batch{hint}"));
            }
        }
        let functions = [&self.init, &self.update].into_iter();
        let files = functions
            .flat_map(|f| [Some(&f.hlo), f.stablehlo.as_ref()])
            .chain(self.grad.iter().flat_map(|g| [Some(&g.hlo), g.stablehlo.as_ref()]))
            .chain([self.weights.as_ref()]);
        for file in files.flatten() {
            let inside = !file.file.is_empty()
                && std::path::Path::new(&file.file).components().all(|c| matches!(c, std::path::Component::Normal(_)));
            if !inside {
                return Err(format!("file {:?} is not a path inside the bundle", file.file));
            }
        }
        Ok(())
    }

    /// Batch tensors of one microbatch of a variant, in the order of the batch.
    pub fn microbatch_tensors(&self, grad: &GradSpec) -> Vec<TensorSpec> {
        self.batch.iter().map(|b| TensorSpec { shape: grad.shapes[&b.name].clone(), ..b.clone() }).collect()
    }

    /// By batch tensor: the variants of this microbatch size differ in the first axis of a row and in nothing else, so
    /// that rows can be padded along it.
    pub fn padded(&self, microbatch: u64) -> Vec<bool> {
        let variants = || self.grad.iter().filter(|g| g.microbatch == microbatch);
        let of_tensor = |tensor: &TensorSpec| {
            let rows: Vec<&[u64]> = variants().map(|g| &g.shapes[&tensor.name][1..]).collect();
            let same = |of: fn(&[u64]) -> Option<&[u64]>| rows.windows(2).all(|w| of(w[0]) == of(w[1]));
            same(|r| r.get(1..)) && !same(|r| r.get(..1))
        };
        self.batch.iter().map(of_tensor).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SMALL: &str = include_str!("../../tests/data/manifest.json");

    #[test]
    fn suggests_the_field_that_was_meant() {
        let wrong = SMALL.replacen("batch_size", "batchsize", 1);
        let e = Manifest::parse(wrong.as_bytes()).unwrap_err();
        assert!(e.contains("unknown field `batchsize`") && e.contains("did you mean \"batch_size\"?"), "{e}");
    }

    #[test]
    fn refuses_what_cannot_be_trained() {
        for (from, to, problem) in [
            ("bundle/1", "bundle/9", "this build reads"),
            ("\"microbatch\": 2", "\"microbatch\": 3", "does not divide"),
            ("grad/mb2.hlo.pb", "../etc/passwd", "not a path inside"),
            ("\"param\": \"w\"", "\"param\": \"W\"", "did you mean \"w\"?"),
        ] {
            assert!(SMALL.contains(from), "{from}");
            let e = Manifest::parse(SMALL.replacen(from, to, 1).as_bytes()).unwrap_err();
            assert!(e.contains(problem), "{e}");
        }
        Manifest::parse(SMALL.as_bytes()).unwrap();
    }

    proptest! {
        #[test]
        fn never_panics(at in 0usize..2000, byte in any::<u8>(), cut in 0usize..2000) {
            let mut json = SMALL.as_bytes().to_vec();
            let at = at % json.len();
            json[at] = byte;
            let _ = Manifest::parse(&json);
            let _ = Manifest::parse(&json[..cut.min(json.len())]);
        }
    }
}
