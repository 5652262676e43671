//! What the API server would say of a manifest, said without one: types and bounds of the schemas, and their CEL rules.

mod schema;

use std::collections::BTreeMap;
use std::fmt;

use kube_cel::{CompiledSchema, Validator, compile_schema};
use serde::Deserialize;
use serde_json::Value;

use super::{GROUP, definitions};
use crate::graph::error::closest;

/// One thing that is wrong with a document.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// Where in the document, such as `spec.parallelism.shards`; empty for all of it.
    pub field: String,
    /// The value found and the way out.
    pub problem: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field.as_str() {
            "" => write!(f, "{}", self.problem),
            field => write!(f, "{field}: {}", self.problem),
        }
    }
}

/// What became of one document of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    /// Kind and name, as far as it has them.
    pub what: String,
    /// Whether it is a resource of ours at all.
    pub ours: bool,
    pub findings: Vec<Finding>,
}

/// Schemas of one kind.
struct Kind {
    version: String,
    schema: Value,
    rules: CompiledSchema,
}

/// All kinds of ours, with rules compiled.
pub struct Linter {
    kinds: BTreeMap<String, Kind>,
    validator: Validator,
}

impl Default for Linter {
    fn default() -> Self {
        let kinds = definitions().into_iter().filter_map(|crd| {
            let spec = &crd["spec"];
            let version = spec["versions"].get(0)?;
            let schema = version["schema"]["openAPIV3Schema"].clone();
            let rules = compile_schema(&schema);
            let version = format!("{GROUP}/{}", version["name"].as_str()?);
            Some((spec["names"]["kind"].as_str()?.to_owned(), Kind { version, schema, rules }))
        });
        Self { kinds: kinds.collect(), validator: Validator::new() }
    }
}

impl Linter {
    /// Checks every document of a file. `was`: what a cluster holds now; rules on changes are run against the object of
    /// the same kind and name.
    ///
    /// # Errors
    /// Where the text is no YAML.
    pub fn file(&self, yaml: &str, was: &[Value]) -> Result<Vec<Checked>, String> {
        Ok(documents(yaml)?.iter().map(|document| self.document(document, was)).collect())
    }

    /// The schema of a kind.
    pub fn schema(&self, kind: &str) -> Option<&Value> {
        self.kinds.get(kind).map(|known| &known.schema)
    }

    /// Checks one document.
    pub fn document(&self, document: &Value, was: &[Value]) -> Checked {
        let text = |field: &str| document[field].as_str().unwrap_or_default();
        let (version, kind) = (text("apiVersion"), text("kind"));
        let what = format!("{kind} {}", name(document)).trim().to_owned();
        let group = version.split('/').next().unwrap_or_default();
        let mut findings = Vec::new();
        let mut found = |field: &str, problem: String| findings.push(Finding { field: field.to_owned(), problem });
        if version.is_empty() || kind.is_empty() {
            found("", "no manifest: apiVersion and kind are missing".to_owned());
            return Checked { what: "document".to_owned(), ours: true, findings };
        }
        if group != GROUP && !self.kinds.contains_key(kind) {
            return Checked { what, ours: false, findings };
        }
        let Some(known) = self.kinds.get(kind) else {
            let kinds = self.kinds.keys().map(String::as_str);
            found("kind", format!("{kind:?} is no kind of {GROUP}{}", closest(kind, kinds)));
            return Checked { what, ours: true, findings };
        };
        if version != known.version {
            found("apiVersion", format!("{version:?}, write {:?}", known.version));
            return Checked { what, ours: true, findings };
        }
        if name(document).is_empty() {
            found("metadata.name", "is missing; give the object a name".to_owned());
            return Checked { what, ours: true, findings };
        }
        schema::check(&known.schema, document, &mut findings);
        // Rules count on types: the API server does not run them on what the schema refuses either.
        if findings.is_empty() {
            let before = was.iter().find(|w| w["kind"] == document["kind"] && name(w) == name(document));
            if let Err(errors) = self.validator.validate_compiled(&known.rules, document, before) {
                let one = |e: &kube_cel::ValidationError| Finding {
                    field: e.field_path.trim_start_matches('.').to_owned(),
                    problem: e.message.clone(),
                };
                findings.extend(errors.iter().map(one));
            }
        }
        if findings.is_empty() && kind == "TrainingJob" {
            let job = serde_json::from_value::<super::TrainingJob>(document.clone());
            let checked = job.map_err(|e| e.to_string()).and_then(|job| super::check(&job.spec));
            if let Err(text) = checked {
                let (field, problem) = text.split_once(": ").unwrap_or(("", &text));
                findings.push(Finding { field: field.to_owned(), problem: problem.to_owned() });
            }
        }
        Checked { what, ours: true, findings }
    }
}

/// The documents of a YAML file; empty ones, as between two `---`, are left out.
///
/// # Errors
/// Where the text is no YAML.
pub fn documents(yaml: &str) -> Result<Vec<Value>, String> {
    let mut all = Vec::new();
    for document in serde_yaml::Deserializer::from_str(yaml) {
        let value = Value::deserialize(document).map_err(|e| format!("not YAML: {e}"))?;
        if !value.is_null() {
            all.push(value);
        }
    }
    Ok(all)
}

fn name(document: &Value) -> &str {
    document["metadata"]["name"].as_str().unwrap_or_default()
}
