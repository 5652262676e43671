//! A whole bundle in memory: manifest, state and the three graphs, ready for planning and cutting.

use std::collections::BTreeMap;
use std::ops::Range;

use sha2::{Digest, Sha256};

use super::error::GraphError;
use super::import::from_hlo;
use super::ir::Graph;
use super::manifest::{FileSpec, Manifest, ParamSpec, TensorSpec};
use super::passes::{Limits, normalise};
use super::region::Region;
use super::shape::{ArrayShape, DType};
use super::split::Split;
use super::verify::verify;

/// One tensor of the training state that has exactly one owner: a param, an optimizer slot, the slice of a stacked one
/// that belongs to one layer, or a part of one of these that was split.
#[derive(Clone, Debug, PartialEq)]
pub struct StateTensor {
    /// Unique: the manifest's name, with `[3]` behind it for the fourth slice of a stacked tensor and `[:,0:64]` for a
    /// part.
    pub name: String,
    /// Index in `manifest.params`, or `manifest.params.len()` + index in `manifest.slots`.
    pub tensor: usize,
    /// Slices of the leading axis this piece holds; `None` for the whole tensor. A piece keeps the leading axis.
    pub rows: Option<Range<u64>>,
    /// The part of those rows this piece holds; `None` for all of them.
    pub part: Option<Part>,
    pub shape: ArrayShape,
    /// For a slot: index in [`Model::state`] of the param it follows; `None` for params and for shared slots,
    /// which every shard keeps.
    pub param: Option<usize>,
}

/// A range along one axis of a tensor: one of the parts that a split makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Not the leading one of a stacked tensor.
    pub axis: usize,
    pub range: Range<u64>,
    /// This is the `index`-th of `of` parts.
    pub index: u32,
    pub of: u32,
}

impl StateTensor {
    /// Where this piece lies inside the manifest's tensor.
    pub fn region(&self, manifest: &Manifest) -> Region {
        let mut region = Region::whole(manifest.dims(self.tensor));
        if let (Some(rows), Some(leading)) = (&self.rows, region.0.first_mut()) {
            *leading = rows.clone();
        }
        if let Some(part) = &self.part
            && let Some(axis) = region.0.get_mut(part.axis)
        {
            *axis = part.range.clone();
        }
        region
    }

    /// Where this piece lies among the bytes of the manifest's tensor: ranges in ascending order.
    pub fn byte_runs(&self, manifest: &Manifest) -> impl Iterator<Item = Range<u64>> + use<> {
        let size = self.shape.dtype.size();
        self.region(manifest).runs(manifest.dims(self.tensor)).map(move |r| r.start * size..r.end * size)
    }
}

/// The gradient function of one microbatch shape.
#[derive(Clone, Debug)]
pub struct GradGraph {
    pub name: String,
    /// Rows of one microbatch.
    pub microbatch: u64,
    /// Batch tensors of one microbatch, in the manifest's order.
    pub batch: Vec<TensorSpec>,
    /// Parameters: params, batch, key `u32[2]`. Outputs: loss, metrics, one gradient per param.
    pub graph: Graph,
}

/// A model, imported, normalised and verified.
#[derive(Clone, Debug)]
pub struct Model {
    pub manifest: Manifest,
    /// Params first, then slots. "Params" and "slots" in the graphs below mean these pieces, in this order.
    pub state: Vec<StateTensor>,
    pub n_params: usize,
    /// Parameters: key `u32[2]`. Outputs: one per state tensor.
    pub init: Graph,
    pub grads: Vec<GradGraph>,
    /// Parameters: state, one summed gradient per param, number of microbatches `f32[]`. Outputs: state.
    pub update: Graph,
    /// Changes with every file of the bundle, with the passes and with what is split: plans made for another one do not
    /// fit.
    pub fingerprint: String,
    /// The fingerprint without splits: a checkpoint of this fits, whatever was split when it was written.
    pub origin: String,
    /// What is split.
    pub split: Vec<Split>,
}

/// Counts when the passes change what they yield: old plans index other ops.
const PASSES: &str = "passes/1";
/// Most times the graphs are run to find out which params are stacks; two or three are usual.
const MAX_ROUNDS: usize = 32;
/// Longest manifest read.
const MAX_MANIFEST: usize = 64 << 20;

impl Model {
    /// Reads a bundle. `fetch` returns the bytes of a file by its path inside the bundle.
    ///
    /// # Errors
    /// [`GraphError::File`] names the file and what is wrong with it; graphs are verified before they are returned.
    pub fn import(fetch: &mut dyn FnMut(&str) -> std::io::Result<Vec<u8>>) -> Result<Self, GraphError> {
        const MANIFEST: &str = "manifest.json";
        let problem = |problem: String| GraphError::File { file: MANIFEST.to_owned(), problem };
        let bytes = fetch(MANIFEST).map_err(|e| problem(format!("{e}; is this a bundle?")))?;
        if bytes.len() > MAX_MANIFEST {
            return Err(problem(format!("{} bytes, the limit is {MAX_MANIFEST}", bytes.len())));
        }
        let manifest = Manifest::parse(&bytes).map_err(problem)?;
        let mut hash = Sha256::new();
        hash.update(PASSES);
        hash.update(&bytes);
        let fingerprint = short_hex(hash);

        let sources = Sources::fetch(&manifest, fetch)?;
        let split = sources.split(&manifest)?;
        sources.build(manifest, &split, fingerprint)
    }

    /// The variant called `name`.
    pub fn variant(&self, name: &str) -> Option<&GradGraph> {
        self.grads.iter().find(|g| g.name == name)
    }

    /// Outputs of a grad graph before the gradients: loss and metrics.
    pub fn n_scalars(&self) -> usize {
        1 + self.manifest.metrics.len()
    }
}

/// The graphs of a bundle as its exporter wrote them.
struct Sources {
    init: Graph,
    grads: Vec<Graph>,
    update: Graph,
}

impl Sources {
    fn fetch(manifest: &Manifest, fetch: &mut dyn FnMut(&str) -> std::io::Result<Vec<u8>>) -> Result<Self, GraphError> {
        let mut module = |spec: &FileSpec| -> Result<Graph, GraphError> {
            let problem = |problem: String| GraphError::File { file: spec.file.clone(), problem };
            let bytes = fetch(&spec.file).map_err(|e| problem(e.to_string()))?;
            let found: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
            if !found.eq_ignore_ascii_case(&spec.sha256) {
                let expected = &spec.sha256;
                return Err(problem(format!(
                    "sha256 is {found}, the manifest says {expected}; the file was cut short or changed, copy the bundle again"
                )));
            }
            let graph = from_hlo(&bytes).and_then(|graph| verify(&graph).map(|()| graph));
            graph.map_err(|e| e.in_file(&spec.file))
        };
        let key = ("key".to_owned(), ArrayShape::new(DType::Uint32, vec![2]));
        let params = || manifest.params.iter().map(|p| (p.name.clone(), ArrayShape::new(p.dtype, p.shape.clone())));
        let slots = || manifest.slots.iter().map(|s| (s.name.clone(), ArrayShape::new(s.dtype, s.shape.clone())));
        let gradients = || {
            let of =
                |p: &ParamSpec| (format!("gradient of {}", p.name), ArrayShape::new(p.grad_dtype, p.shape.clone()));
            manifest.params.iter().map(of)
        };
        let metrics = || manifest.metrics.iter().map(|m| (m.name.clone(), m.array()));
        let state: Vec<_> = params().chain(slots()).collect();

        let init = module(&manifest.init.hlo)?;
        check_signature(&manifest.init.hlo.file, &init, std::slice::from_ref(&key), &state)?;
        let mut grads = Vec::with_capacity(manifest.grad.len());
        for spec in &manifest.grad {
            let graph = module(&spec.hlo)?;
            let batch = manifest.microbatch_tensors(spec).into_iter().map(|t| (t.name.clone(), t.array()));
            let inputs: Vec<_> = params().chain(batch).chain([key.clone()]).collect();
            let loss = graph.outputs().first().and_then(|&o| graph.op(o).shape.as_array().cloned());
            let loss = loss.filter(|l| l.dims.is_empty()).unwrap_or(ArrayShape::scalar(DType::Float32));
            let outputs: Vec<_> = [("loss".to_owned(), loss)].into_iter().chain(metrics()).chain(gradients()).collect();
            check_signature(&spec.hlo.file, &graph, &inputs, &outputs)?;
            grads.push(graph);
        }
        let update = module(&manifest.update.hlo)?;
        let count = ("number of microbatches".to_owned(), ArrayShape::scalar(DType::Float32));
        let inputs: Vec<_> = state.iter().cloned().chain(gradients()).chain([count]).collect();
        check_signature(&manifest.update.hlo.file, &update, &inputs, &state)?;
        Ok(Self { init, grads, update })
    }

    /// Which params are stacks of layers: read and differentiated row by row in every variant.
    fn split(&self, manifest: &Manifest) -> Result<Vec<bool>, GraphError> {
        let n = manifest.params.len();
        let n_scalars = 1 + manifest.metrics.len();
        let mut split = vec![false; n];
        // Shrinks from all that could be stacks to those that are; taking one apart can only show that another is not.
        for round in 0..MAX_ROUNDS {
            let first = round == 0;
            let before = split.clone();
            for (spec, graph) in manifest.grad.iter().zip(&self.grads) {
                let outputs: Vec<bool> = std::iter::repeat_n(false, n_scalars).chain(split.iter().copied()).collect();
                let run =
                    normalise(graph, Limits::default(), &split, &outputs).map_err(|e| e.in_file(&spec.hlo.file))?;
                for (i, param) in manifest.params.iter().enumerate() {
                    let rows = param.shape.first().copied().unwrap_or(0);
                    if first && param.shape.len() > 1 && run.trips.contains(&rows) {
                        split[i] = true;
                    } else if !first && split[i] {
                        split[i] = run.row_wise.get(&i) == Some(&true) && run.stacked[n_scalars + i];
                    }
                }
            }
            if split == before && !first || !split.contains(&true) {
                return Ok(split);
            }
        }
        // A model whose stacks hang together in so long a chain is left whole.
        Ok(vec![false; n])
    }

    fn build(self, manifest: Manifest, split: &[bool], fingerprint: String) -> Result<Model, GraphError> {
        let n_manifest = manifest.params.len();
        let mut state = Vec::new();
        let mut first_piece = Vec::with_capacity(n_manifest);
        for (i, param) in manifest.params.iter().enumerate() {
            first_piece.push(state.len());
            let shape = ArrayShape::new(param.dtype, param.shape.clone());
            pieces(&mut state, &param.name, i, shape, split[i], |_| None);
        }
        let n_params = state.len();
        let by_name: BTreeMap<&str, usize> =
            manifest.params.iter().enumerate().map(|(i, p)| (p.name.as_str(), i)).collect();
        let mut split_slots = Vec::with_capacity(manifest.slots.len());
        for (i, slot) in manifest.slots.iter().enumerate() {
            let param = slot.param.as_ref().and_then(|name| by_name.get(name.as_str()).copied());
            let apart = param.is_some_and(|p| split[p] && manifest.params[p].shape == slot.shape);
            let shape = ArrayShape::new(slot.dtype, slot.shape.clone());
            pieces(&mut state, &slot.name, n_manifest + i, shape, apart, |row| {
                param.map(|p| first_piece[p] + if apart { row } else { 0 })
            });
            split_slots.push(apart);
        }
        let of_state: Vec<bool> = split.iter().chain(&split_slots).copied().collect();
        let run = |file: &str, graph: &Graph, inputs: &[bool], outputs: &[bool]| -> Result<Graph, GraphError> {
            let done = normalise(graph, Limits::default(), inputs, outputs).map_err(|e| e.in_file(file))?;
            verify(&done.graph).map_err(|e| e.in_file(file))?;
            Ok(done.graph)
        };
        let init = run(&manifest.init.hlo.file, &self.init, &[false], &of_state)?;
        let scalars = std::iter::repeat_n(false, 1 + manifest.metrics.len());
        let outputs: Vec<bool> = scalars.chain(split.iter().copied()).collect();
        let mut grads = Vec::with_capacity(self.grads.len());
        for (spec, graph) in manifest.grad.iter().zip(&self.grads) {
            let mut graph = run(&spec.hlo.file, graph, split, &outputs)?;
            graph.name = format!("grad_{}", spec.name);
            grads.push(GradGraph {
                name: spec.name.clone(),
                microbatch: spec.microbatch,
                batch: manifest.microbatch_tensors(spec),
                graph,
            });
        }
        let inputs: Vec<bool> = of_state.iter().chain(split).copied().chain([false]).collect();
        let update = run(&manifest.update.hlo.file, &self.update, &inputs, &of_state)?;
        let origin = fingerprint.clone();
        Ok(Model { manifest, state, n_params, init, grads, update, fingerprint, origin, split: Vec::new() })
    }
}

/// The first half of a digest, in hex.
pub(super) fn short_hex(hash: Sha256) -> String {
    hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// Appends a tensor of the manifest, or its rows.
fn pieces(
    state: &mut Vec<StateTensor>,
    name: &str,
    tensor: usize,
    shape: ArrayShape,
    split: bool,
    param: impl Fn(usize) -> Option<usize>,
) {
    if !split {
        state.push(StateTensor { name: name.to_owned(), tensor, rows: None, part: None, shape, param: param(0) });
        return;
    }
    for row in 0..shape.dims[0] {
        let mut piece = shape.clone();
        piece.dims[0] = 1;
        state.push(StateTensor {
            name: format!("{name}[{row}]"),
            tensor,
            rows: Some(row..row + 1),
            part: None,
            shape: piece,
            param: param(row as usize),
        });
    }
}

fn check_signature(
    file: &str,
    graph: &Graph,
    inputs: &[(String, ArrayShape)],
    outputs: &[(String, ArrayShape)],
) -> Result<(), GraphError> {
    let problem = |problem: String| Err(GraphError::File { file: file.to_owned(), problem });
    for (what, expected, found) in [("input", inputs, graph.parameters()), ("output", outputs, graph.outputs())] {
        if expected.len() != found.len() {
            let (e, f) = (expected.len(), found.len());
            return problem(format!("it has {f} {what}s, the manifest describes {e}; export the bundle again"));
        }
        for (i, ((name, shape), &id)) in expected.iter().zip(found).enumerate() {
            let op = graph.op(id);
            if op.shape.as_array() != Some(shape) {
                return problem(format!(
                    "{what} {i} ({name}) is {}, the manifest says {shape}; export the bundle again",
                    op.shape
                ));
            }
        }
    }
    Ok(())
}
