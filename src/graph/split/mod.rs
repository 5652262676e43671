//! Splits: one matrix product as several smaller ones.
//!
//! A param becomes parts along one axis, its slots with it, and the graphs are rewritten to work on the parts: products
//! of slices whose results are concatenated or summed, and whatever stands between products part by part
//! ([`rewrite()`]). What comes out is a [`Model`] like any other, so every planner, device and runtime takes it, and
//! each part may live on a device of its own.
//!
//! Ops of a model may be split as well, by the rows of a microbatch, with their params whole ([`Rows`]): lanes are then
//! replicas of some layers, and the sums of their gradients what others call an all-reduce.
//!
//! # Source
//! Columns, rows and heads of a transformer: Megatron-LM (Shoeybi et al., arXiv 1909.08053). Layouts propagated through
//! a graph from a few annotations: GSPMD (Xu et al., arXiv 2105.04663). There a device runs all ops on its part; here
//! the parts are ops of their own, and who runs them is up to the plan. Some layers in parts of the batch, others of their
//! params: Krizhevsky, *One weird trick for parallelizing convolutional neural networks*, arXiv 1404.5997.

mod follow;
mod recipe;
mod rewrite;
mod rows;

use std::collections::BTreeSet;
use std::rc::Rc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::{GraphError, closest};
use super::ir::{Graph, Op, OpId};
use super::model::{GradGraph, Model, Part, StateTensor, short_hex};
use super::scope::{OTHER, block_of, means};
use super::verify::verify;

pub use follow::candidates;
pub use recipe::Cut;
pub use rewrite::rewrite;
pub use rows::Rows;

/// Most parts of one tensor.
pub const MAX_PARTS: u32 = 64;
/// Most splits of one model; a pattern names many params.
pub const MAX_SPLITS: usize = 64;
/// Counts when the pass changes what it yields: old plans index other ops.
const PASS: &str = "split/3";

/// A split that someone asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Split {
    /// Params are kept in parts.
    Params {
        /// Name of a param, or a pattern: `*` stands for any characters, as in `blocks.*.mlp.up`.
        tensor: String,
        /// Axis of the manifest's tensor.
        axis: usize,
        /// As equal as they can be.
        parts: u32,
    },
    /// Ops work on parts of the rows of a microbatch, each of which reads whole params.
    Rows {
        /// A pattern as [`means`] takes it: of named scopes, paths or names of ops.
        ops: String,
        /// As equal as they can be.
        parts: u32,
    },
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Params { tensor, axis, parts } => {
                write!(f, "{{tensor: \"{tensor}\", axis: {axis}, parts: {parts}}}")
            }
            Self::Rows { ops, parts } => write!(f, "{{ops: \"{ops}\", parts: {parts}}}"),
        }
    }
}

impl std::str::FromStr for Split {
    type Err = String;

    /// Reads `TENSOR:AXIS:PARTS` or `OPS:rows:PARTS`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut fields = text.rsplitn(3, ':');
        let parts = fields.next().and_then(|f| f.parse().ok());
        match (parts, fields.next(), fields.next().map(str::to_owned)) {
            (Some(parts), Some("rows"), Some(ops)) => return Ok(Self::Rows { ops, parts }),
            (Some(parts), Some(axis), Some(tensor)) => {
                if let Ok(axis) = axis.parse::<u32>() {
                    return Ok(Self::Params { tensor, axis: axis as usize, parts });
                }
            }
            _ => {}
        }
        Err(format!(
            "{text:?} is not TENSOR:AXIS:PARTS, such as blocks.*.mlp.up:1:2, or OPS:rows:PARTS, such as block3:rows:2"
        ))
    }
}

impl Split {
    pub fn parts(&self) -> u32 {
        match self {
            Self::Params { parts, .. } | Self::Rows { parts, .. } => *parts,
        }
    }

    /// The pattern of what is split.
    fn pattern(&self) -> &str {
        match self {
            Self::Params { tensor, .. } => tensor,
            Self::Rows { ops, .. } => ops,
        }
    }

    fn failed(&self, problem: String) -> GraphError {
        GraphError::Split { of: self.pattern().to_owned(), problem }
    }
}

/// A state tensor's cut; `None` for one that stays whole.
type Cuts = Vec<Option<Cut>>;

impl Model {
    /// The same model with params or ops split: results are equal but for the order of sums.
    ///
    /// A slot of its param's shape is split with it, whatever the update does with it: what needs the whole of a tensor
    /// joins the parts. Other slots stay whole and follow the first part. Where ops work on parts of rows, variants whose
    /// microbatches have fewer rows than that are left out.
    ///
    /// # Errors
    /// [`GraphError::Split`] names the split and what does not fit; `Invalid` for a model that is split already.
    /// # Complexity
    /// O(ops · parts).
    pub fn split(&self, splits: &[Split]) -> Result<Model, GraphError> {
        if !self.split.is_empty() {
            return Err(GraphError::Invalid("the model is split already; begin with the bundle".to_owned()));
        }
        if splits.is_empty() {
            return Ok(self.clone());
        }
        let cuts = self.cuts(splits)?;
        let (state, n_params) = self.parts(&cuts);
        let none = |n: usize| std::iter::repeat_n(None, n);
        let of_params = || cuts[..self.n_params].iter().cloned();
        let rows = self.rows(splits, &cuts)?;
        let pass = |graph: &Graph, inputs: Cuts, outputs: Cuts, rows: &Rows| -> Result<Graph, GraphError> {
            let rewritten = rewrite(graph, &inputs, &outputs, rows)?;
            verify(&rewritten)?;
            Ok(rewritten)
        };
        let init = pass(&self.init, vec![None], cuts.clone(), &Rows::default())?;
        let mut grads = Vec::with_capacity(rows.len());
        for (grad, rows) in &rows {
            let inputs = of_params().chain(none(grad.graph.parameters().len() - self.n_params)).collect();
            let outputs = none(self.n_scalars()).chain(of_params()).collect();
            grads.push(GradGraph { graph: pass(&grad.graph, inputs, outputs, rows)?, ..(*grad).clone() });
        }
        let inputs = cuts.iter().cloned().chain(of_params()).chain(none(1)).collect();
        let update = pass(&self.update, inputs, cuts.clone(), &Rows::default())?;
        let mut hash = Sha256::new();
        hash.update(format!("{PASS} {}", self.origin));
        for (tensor, cut) in self.state.iter().zip(&cuts) {
            if let Some(cut) = cut {
                hash.update(format!("\n{} {} {:?}", tensor.name, cut.axis, cut.bounds));
            }
        }
        for split in splits {
            if let Split::Rows { ops, parts } = split {
                hash.update(format!("\nrows of {ops:?} {parts}"));
            }
        }
        let (fingerprint, origin) = (short_hex(hash), self.origin.clone());
        let (manifest, split) = (self.manifest.clone(), splits.to_vec());
        Ok(Model { manifest, state, n_params, init, grads, update, fingerprint, origin, split })
    }

    /// By state tensor: how it is cut.
    fn cuts(&self, splits: &[Split]) -> Result<Cuts, GraphError> {
        if splits.len() > MAX_SPLITS {
            return Err(GraphError::Invalid(format!("{} splits, the limit is {MAX_SPLITS}", splits.len())));
        }
        let params = &self.manifest.params;
        // By param: the split, its axis and its parts.
        let mut by: Vec<Option<(&Split, usize, u32)>> = vec![None; params.len()];
        for split in splits {
            let failed = |problem: String| split.failed(problem);
            let n_parts = split.parts();
            if !(2..=MAX_PARTS).contains(&n_parts) {
                return Err(failed(format!("{n_parts} parts, must be 2 to {MAX_PARTS}")));
            }
            let Split::Params { tensor, axis, parts } = split else { continue };
            let named: Vec<usize> = (0..params.len()).filter(|&i| fits(tensor, &params[i].name)).collect();
            if named.is_empty() {
                let hint = closest(tensor, params.iter().map(|p| p.name.as_str()));
                return Err(failed(format!("no param of the model has such a name{hint}")));
            }
            for i in named {
                let (name, shape) = (&params[i].name, &params[i].shape);
                let rows = self.state.iter().any(|t| t.tensor == i && t.rows.is_some());
                let Some(&n) = shape.get(*axis) else {
                    return Err(failed(format!("axis {axis}, {name:?} of shape {shape:?} has {}", shape.len())));
                };
                if *axis == 0 && rows {
                    return Err(failed(format!(
                        "axis 0 of {name:?} is its layers, which are apart already; name another"
                    )));
                }
                if n < u64::from(*parts) {
                    return Err(failed(format!("{parts} parts, axis {axis} of {name:?} of shape {shape:?} has {n}")));
                }
                if let Some((first, ..)) = by[i].replace((split, *axis, *parts)) {
                    return Err(failed(format!("{name:?} is split already, by {:?}", first.pattern())));
                }
            }
        }
        let of_param = |tensor: &StateTensor| {
            let (_, axis, parts) = by.get(tensor.tensor).copied().flatten()?;
            Some(Cut { axis, bounds: even(tensor.shape.dims[axis], parts) })
        };
        let mut cuts: Cuts = self.state[..self.n_params].iter().map(of_param).collect();
        for slot in &self.state[self.n_params..] {
            let same = slot.param.filter(|&p| self.state[p].shape.dims == slot.shape.dims);
            cuts.push(same.and_then(|p| cuts[p].clone()));
        }
        Ok(cuts)
    }

    /// The variants that can be split, and which of their ops work on parts of rows. `cuts`: of the state.
    fn rows(&self, splits: &[Split], cuts: &Cuts) -> Result<Vec<(&GradGraph, Rows)>, GraphError> {
        let of_rows: Vec<&Split> = splits.iter().filter(|s| matches!(s, Split::Rows { .. })).collect();
        let patterns: Vec<(&str, u32)> = of_rows.iter().map(|s| (s.pattern(), s.parts())).collect();
        let most = self.grads.iter().map(|g| g.microbatch).max().unwrap_or(0);
        if let Some(split) = of_rows.iter().find(|s| u64::from(s.parts()) > most) {
            return Err(split.failed(format!(
                "{} parts, the largest microbatch of the bundle has {most} rows; ask for fewer, or export it with larger ones",
                split.parts()
            )));
        }
        let fits = |grad: &&GradGraph| patterns.iter().all(|(_, parts)| u64::from(*parts) <= grad.microbatch);
        let of_variant = |grad| (grad, Rows::new(self.n_params, grad, &patterns));
        let rows: Vec<(&GradGraph, Rows)> = self.grads.iter().filter(fits).map(of_variant).collect();
        for (i, split) in of_rows.iter().enumerate() {
            let ops = rows.iter().flat_map(|(grad, _)| grad.graph.ops().map(|(_, op)| op));
            let meant: Vec<&Op> = ops.filter(|op| &*op.opcode != "parameter" && means(split.pattern(), op)).collect();
            if meant.is_empty() {
                let scopes: BTreeSet<String> = self
                    .grads
                    .iter()
                    .flat_map(|g| g.graph.ops())
                    .filter_map(|(_, op)| op.scope().map(block_of))
                    .collect();
                let known = scopes.iter().map(String::as_str).filter(|scope| *scope != OTHER);
                let hint = closest(split.pattern(), known);
                return Err(split.failed(format!("no op of the model has such a name, path or named scope{hint}")));
            }
            let twice = |other: &&&Split| meant.iter().any(|op| means(other.pattern(), op));
            if let Some(other) = of_rows[..i].iter().find(twice) {
                return Err(split.failed(format!(
                    "some of its ops are split already, by {:?}; name each layer once",
                    other.pattern()
                )));
            }
            if rows.iter().all(|(_, rows)| rows.of_split(i).next().is_none()) {
                return Err(split.failed(format!(
                    "none of its {} ops can work on parts of the rows of a microbatch; name a layer that reads activations",
                    meant.len()
                )));
            }
            for (grad, rows) in &rows {
                for (p, &op) in grad.graph.parameters().iter().enumerate().take(self.n_params) {
                    let reads = |id: OpId| grad.graph.op(id).operands.contains(&op);
                    if let (Some(_), Some(id)) = (&cuts[p], rows.of_split(i).find(|id| reads(*id))) {
                        return Err(split.failed(format!(
                            "its op {} reads {}, which is split itself; leave one of them out",
                            grad.graph.op(id).name,
                            self.state[p].name
                        )));
                    }
                }
            }
        }
        Ok(rows)
    }

    /// The state in parts, and how many of them are params.
    fn parts(&self, cuts: &[Option<Cut>]) -> (Vec<StateTensor>, usize) {
        let mut state: Vec<StateTensor> = Vec::new();
        // By state tensor: where its first part is.
        let mut first = Vec::with_capacity(cuts.len());
        for (tensor, cut) in self.state.iter().zip(cuts) {
            first.push(state.len());
            let param = |part: usize| tensor.param.map(|p| first[p] + part);
            let Some(cut) = cut else {
                state.push(StateTensor { param: param(0), ..tensor.clone() });
                continue;
            };
            for (index, range) in cut.ranges().enumerate() {
                let mut shape = tensor.shape.clone();
                shape.dims[cut.axis] = range.end - range.start;
                let before = ":,".repeat(cut.axis);
                let name = format!("{}[{before}{}:{}]", tensor.name, range.start, range.end);
                let part = Some(Part { axis: cut.axis, range, index: index as u32, of: cut.n_parts() as u32 });
                state.push(StateTensor { name, part, shape, param: param(index), ..tensor.clone() });
            }
        }
        let n_params = first.get(self.n_params).copied().unwrap_or(state.len());
        (state, n_params)
    }
}

/// Bounds of parts as equal as they can be.
fn even(n: u64, parts: u32) -> Rc<[u64]> {
    let parts = u64::from(parts);
    (0..=parts).map(|i| (u128::from(n) * u128::from(i) / u128::from(parts)) as u64).collect()
}

/// Whether a name fits a pattern in which `*` stands for any characters.
///
/// # Complexity
/// O(pattern + name) for each `*`.
pub fn fits(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut left) = name.strip_prefix(head) else { return false };
    let Some((middle, tail)) = rest.rsplit_once('*') else {
        return left.ends_with(rest);
    };
    // The first place for each is as good as any other.
    for part in middle.split('*') {
        let Some(at) = left.find(part) else { return false };
        left = &left[at + part.len()..];
    }
    left.ends_with(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_characters() {
        for (pattern, name, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("a.*", "a.", true),
            ("*", "", true),
            ("*.up", "blocks.0.up", true),
            ("*.up", "blocks.0.up_bias", false),
            ("a*a", "a", false),
            ("a*b*c", "a.b.b.c", true),
            ("a*b*c", "a.c.b", false),
            ("**", "x", true),
            ("a**b*", "a1b2", true),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
    }
}
