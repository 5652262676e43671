//! The JSON format of msr-fiddle/dnn-partitioning (README.md there).

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::plan::place::problem::{Devices, Malformed, Op, Problem};

/// A problem with the names of its ops.
#[derive(Clone, Debug)]
pub struct Input {
    pub problem: Problem,
    /// Id of every op in the file.
    pub ids: Vec<i64>,
}

/// A file of this format that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum Bad {
    #[error("not JSON of this format: {0}")]
    Json(#[from] serde_json::Error),
    #[error("{field} is {value}; it must be a whole number that is not negative")]
    Count { field: &'static str, value: f64 },
    #[error("node {id}: {field} is {value}; it must be true, false, 0 or 1")]
    Flag { id: i64, field: &'static str, value: f64 },
    #[error("node {id} is listed more than once")]
    DuplicateId { id: i64 },
    #[error("edge {edge} names node {id}, which is not listed")]
    MissingId { edge: usize, id: i64 },
    #[error(
        "edge {edge} costs {cost}, but another edge from node {id} costs {other}: the whole output is carried once"
    )]
    Costs { edge: usize, id: i64, cost: f64, other: f64 },
    #[error("node {id}: {cause}")]
    Op { id: i64, cause: Malformed },
    #[error(transparent)]
    Problem(Malformed),
}

#[derive(Deserialize)]
struct File {
    #[serde(rename = "maxSizePerFPGA")]
    memory: f64,
    #[serde(rename = "maxFPGAs")]
    n_accelerators: f64,
    #[serde(rename = "maxCPUs")]
    n_hosts: f64,
    nodes: Vec<Node>,
    edges: Vec<Edge>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    id: i64,
    supported_on_fpga: Flag,
    cpu_latency: f64,
    fpga_latency: f64,
    is_backward_node: Option<Flag>,
    color_class: Option<i64>,
    size: Option<f64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Edge {
    source_id: i64,
    dest_id: i64,
    cost: f64,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Flag {
    Bool(bool),
    Number(f64),
}

impl Flag {
    fn of(self, id: i64, field: &'static str) -> Result<bool, Bad> {
        match self {
            Self::Bool(b) => Ok(b),
            Self::Number(0.0) => Ok(false),
            Self::Number(1.0) => Ok(true),
            Self::Number(value) => Err(Bad::Flag { id, field, value }),
        }
    }
}

/// Whether a text is of this format at all, right or wrong.
pub fn looks_like(text: &str) -> bool {
    ["\"maxFPGAs\"", "\"nodes\"", "\"edges\""].iter().all(|key| text.contains(key))
}

/// Reads a file's text.
///
/// # Errors
/// [`Bad`], naming the node or edge.
pub fn read(text: &str) -> Result<Input, Bad> {
    let file: File = serde_json::from_str(text)?;
    let mut position = BTreeMap::new();
    let mut ops = Vec::with_capacity(file.nodes.len());
    for node in &file.nodes {
        let id = node.id;
        if position.insert(id, ops.len()).is_some() {
            return Err(Bad::DuplicateId { id });
        }
        // A time is checked even where it is not used.
        let supported = node.supported_on_fpga.of(id, "supportedOnFpga")?;
        if !supported && (node.fpga_latency.is_nan() || node.fpga_latency < 0.0) {
            let cause =
                Malformed::Number { op: ops.len(), field: "the time on an accelerator", value: node.fpga_latency };
            return Err(Bad::Op { id, cause });
        }
        ops.push(Op {
            accelerator: supported.then_some(node.fpga_latency),
            host: node.cpu_latency,
            transfer: 0.0,
            bytes: node.size.unwrap_or(0.0),
            colour: node.color_class,
            backward: node.is_backward_node.map_or(Ok(false), |f| f.of(id, "isBackwardNode"))?,
        });
    }
    let mut costs: Vec<Option<f64>> = vec![None; ops.len()];
    let mut edges = Vec::with_capacity(file.edges.len());
    for (i, edge) in file.edges.iter().enumerate() {
        let find = |id| position.get(&id).copied().ok_or(Bad::MissingId { edge: i, id });
        let (from, to) = (find(edge.source_id)?, find(edge.dest_id)?);
        match costs[from] {
            Some(other) if (edge.cost - other).abs() > 1e-6 * other.abs().max(1.0) => {
                return Err(Bad::Costs { edge: i, id: edge.source_id, cost: edge.cost, other });
            }
            Some(_) => {}
            None => costs[from] = Some(edge.cost),
        }
        edges.push((from, to));
    }
    for (op, cost) in ops.iter_mut().zip(costs) {
        op.transfer = cost.unwrap_or(0.0);
    }
    let devices = Devices {
        n_accelerators: count("maxFPGAs", file.n_accelerators)?,
        n_hosts: count("maxCPUs", file.n_hosts)?,
        memory: file.memory,
    };
    let ids: Vec<i64> = file.nodes.iter().map(|n| n.id).collect();
    let problem = Problem::new(ops, edges, devices).map_err(|cause| match cause {
        Malformed::Number { op, .. } | Malformed::Cycle { op } => Bad::Op { id: ids[op], cause },
        cause => Bad::Problem(cause),
    })?;
    Ok(Input { problem, ids })
}

fn count(field: &'static str, value: f64) -> Result<usize, Bad> {
    if value.fract() == 0.0 && (0.0..=1e9).contains(&value) {
        Ok(value as usize)
    } else {
        Err(Bad::Count { field, value })
    }
}
