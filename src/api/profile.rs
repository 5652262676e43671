//! `ModelProfile`: what steps of one bundle have taught of kinds of devices. Later jobs of the same bundle start from it.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::topology::Measured;

/// Measured costs of the ops of one bundle, by kind of device. Made by the operator from what jobs have learned; it
/// belongs to no job and stays. Deleted, it is learned anew.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "foreshard.dev",
    version = "v1alpha1",
    kind = "ModelProfile",
    namespaced,
    shortname = "mp",
    category = "foreshard",
    printcolumn = r#"{"name":"Bundle","type":"string","jsonPath":".spec.bundle"}"#,
    printcolumn = r#"{"name":"Devices","type":"string","jsonPath":".spec.devices[*].kind"}"#,
    printcolumn = r#"{"name":"Job","type":"string","jsonPath":".spec.job"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct ModelProfileSpec {
    /// SHA-256 of the bundle's manifest and graphs.
    #[schemars(length(min = 64, max = 64), regex(pattern = "^[0-9a-f]{64}$"))]
    pub bundle: String,
    /// The job that taught this last.
    #[schemars(length(min = 1, max = 253))]
    pub job: String,
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["kind"]))]
    pub devices: Vec<Costs>,
}

/// How many times its nominal time each class of op takes on one kind of device; 1 is nominal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Costs {
    /// `cpu`, or an extended resource, with the product where nodes name it.
    #[schemars(length(min = 1, max = 253))]
    pub kind: String,
    /// Matrix products and convolutions.
    #[schemars(range(min = 0.001, max = 1000.0))]
    pub product: f64,
    /// Ops that stream through memory.
    #[schemars(range(min = 0.001, max = 1000.0))]
    pub memory: f64,
    /// Gathers, scatters, sorts, loops.
    #[schemars(range(min = 0.001, max = 1000.0))]
    pub other: f64,
    /// The fixed cost of starting an op.
    #[schemars(range(min = 0.001, max = 1000.0))]
    pub launch: f64,
}

impl Costs {
    /// Rounded to three digits and kept within the bounds of the schema.
    pub fn new(kind: &str, of: &Measured) -> Self {
        let round = |x: f64| {
            let x = if x.is_finite() { x.clamp(1e-3, 1e3) } else { 1.0 };
            let unit = 10f64.powi(2 - x.log10().floor() as i32);
            (x * unit).round() / unit
        };
        Self {
            kind: kind.to_owned(),
            product: round(of.product),
            memory: round(of.memory),
            other: round(of.other),
            launch: round(of.launch),
        }
    }

    pub fn measured(&self) -> Measured {
        let Self { product, memory, other, launch, .. } = *self;
        Measured { product, memory, other, launch }
    }

    /// Whether all factors are within a tenth of another's.
    pub fn is_near(&self, other: &Self) -> bool {
        let near = |a: f64, b: f64| (a - b).abs() <= 0.1 * a.abs().max(b.abs());
        let (a, b) = (self.measured(), other.measured());
        [(a.product, b.product), (a.memory, b.memory), (a.other, b.other), (a.launch, b.launch)]
            .into_iter()
            .all(|(a, b)| near(a, b))
    }
}

impl ModelProfileSpec {
    /// Factors by kind of device. Those that the schema would not let in are left out.
    pub fn kinds(&self) -> BTreeMap<String, Measured> {
        let sound = |m: &Measured| [m.product, m.memory, m.other, m.launch].iter().all(|x| (1e-3..=1e3).contains(x));
        let all = self.devices.iter().map(|c| (c.kind.clone(), c.measured()));
        all.filter(|(_, m)| sound(m)).collect()
    }
}
