//! Objects as the API server holds them, whose definition there may be newer than this program.
//!
//! A watch of plain types ends with the first object that they do not fit, and all others are seen no more. Files that
//! people write are read strictly instead ([`parse`](super::parse), [`lint`](super::lint)).

use std::borrow::Cow;
use std::sync::LazyLock;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::Condition;
use super::lint::{Finding, Linter};
use super::status::condition;

static DEFINITIONS: LazyLock<Linter> = LazyLock::new(Linter::default);

/// An object of the API server, read as far as this version knows its kind.
///
/// # Guarantees
/// Reading fails for no object that has Kubernetes' metadata. Fields that this version's definition lacks are left out,
/// as an API server with that definition would have pruned them. Where fields were left out, the rest is read only if
/// that definition lets it in: what a field of tomorrow means to others, nobody knows today.
#[derive(Clone, Debug)]
pub struct Stored<K> {
    pub object: Result<K, Unreadable>,
    /// Fields that were left out, such as `spec.volumes[].git`: no indices, so that there are not many different ones.
    pub left_out: Vec<String>,
}

/// An object that this version does not understand, and what is known of it nevertheless.
#[derive(Clone, Debug)]
pub struct Unreadable {
    pub metadata: ObjectMeta,
    /// Field, value, and what this version knows instead.
    pub why: String,
    pub managed_by: Option<String>,
    /// The condition `Training` of its status.
    pub training: Option<Condition>,
}

impl<'de, K> Deserialize<'de> for Stored<K>
where
    K: DeserializeOwned + Resource<DynamicType = ()>,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        let kind = K::kind(&());
        if let Value::Object(map) = &mut value {
            // Objects of a list leave out what is the same for all.
            map.insert("apiVersion".to_owned(), K::api_version(&()).into());
            map.insert("kind".to_owned(), kind.as_ref().into());
        }
        let mut left_out = Vec::new();
        if let Some(schema) = DEFINITIONS.schema(&kind) {
            for field in ["spec", "status"] {
                if let (Some(inner), Some(value)) = (schema["properties"].get(field), value.get_mut(field)) {
                    prune(field, inner, value, &mut left_out);
                }
            }
        }
        let read = K::deserialize(&value).map_err(|e| e.to_string());
        let sound = read.is_ok() && left_out.is_empty();
        let found = if sound { Vec::new() } else { DEFINITIONS.document(&value, &[]).findings };
        left_out.dedup();
        let object = match read {
            Ok(object) if found.is_empty() => Ok(object),
            read => Err(unreadable(&value, &found, read.err(), &left_out).map_err(D::Error::custom)?),
        };
        Ok(Self { object, left_out })
    }
}

/// `found` tells more than the parser's own `error`, which knows no field.
fn unreadable(
    value: &Value,
    found: &[Finding],
    error: Option<String>,
    left_out: &[String],
) -> Result<Unreadable, serde_json::Error> {
    let mut why = found.iter().take(3).map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if why.is_empty() {
        why = error.unwrap_or_default();
    }
    if !left_out.is_empty() {
        why.push_str(&format!(" (without {}, unknown here)", left_out.join(", ")));
    }
    let conditions = value["status"]["conditions"].as_array().into_iter().flatten();
    Ok(Unreadable {
        metadata: ObjectMeta::deserialize(&value["metadata"])?,
        why,
        managed_by: value["spec"]["managedBy"].as_str().map(str::to_owned),
        training: conditions.filter_map(|c| Condition::deserialize(c).ok()).find(|c| c.kind == condition::TRAINING),
    })
}

/// Takes out of `value` what `schema` has no word for, and tells what it was.
fn prune(at: &str, schema: &Value, value: &mut Value, left_out: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            if let Some(inner) = schema.get("additionalProperties") {
                map.values_mut().for_each(|value| prune(&format!("{at}.*"), inner, value, left_out));
            } else if let Some(known) = schema["properties"].as_object() {
                map.retain(|key, value| {
                    let field = format!("{at}.{key}");
                    match known.get(key) {
                        Some(inner) => prune(&field, inner, value, left_out),
                        None => left_out.push(field),
                    }
                    known.contains_key(key)
                });
            }
        }
        Value::Array(list) => {
            list.iter_mut().for_each(|value| prune(&format!("{at}[]"), &schema["items"], value, left_out));
        }
        _ => {}
    }
}

impl<K: Resource> Resource for Stored<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(of: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(of)
    }

    fn group(of: &Self::DynamicType) -> Cow<'_, str> {
        K::group(of)
    }

    fn version(of: &Self::DynamicType) -> Cow<'_, str> {
        K::version(of)
    }

    fn plural(of: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(of)
    }

    fn meta(&self) -> &ObjectMeta {
        self.object.as_ref().map_or_else(|e| &e.metadata, K::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.object.as_mut().map_or_else(|e| &mut e.metadata, K::meta_mut)
    }
}

#[cfg(test)]
mod tests {
    use kube::api::ObjectList;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::api::{ModelProfile, PartitionPlan, TrainingJob};

    fn job() -> Value {
        json!({
            "apiVersion": "foreshard.dev/v1alpha1", "kind": "TrainingJob",
            "metadata": {"name": "a", "namespace": "ns", "uid": "u-1", "generation": 3},
            "spec": {
                "bundle": "work/m.bundle", "steps": 30, "data": {"uri": "work/x.txt", "columns": {"x": ["a"]}},
                "parallelism": {"shards": 2},
                "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": "w"}}],
            },
            "status": {"restarts": 1, "conditions": [{
                "type": "Training", "status": "True", "reason": "Running", "message": "steps go on",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }]},
        })
    }

    /// With `value` at `pointer`, of which the last part may be new.
    fn with(mut object: Value, pointer: &str, value: Value) -> Value {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        match object.pointer_mut(parent).unwrap() {
            Value::Array(list) => list[key.parse::<usize>().unwrap()] = value,
            parent => parent[key] = value,
        }
        object
    }

    fn read(object: Value) -> Stored<TrainingJob> {
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn fields_of_a_newer_version_are_left_out_and_told() {
        let known = read(job());
        assert!(known.left_out.is_empty());
        let known = known.object.unwrap();
        for (pointer, field) in [
            ("/spec/telemetry", "spec.telemetry"),
            ("/spec/data/sampler", "spec.data.sampler"),
            ("/spec/volumes/0/readOnly", "spec.volumes[].readOnly"),
            ("/status/energy", "status.energy"),
            ("/status/conditions/0/severity", "status.conditions[].severity"),
        ] {
            let stored = read(with(job(), pointer, json!({"deep": [1, null]})));
            assert_eq!(stored.left_out, [field]);
            let found = stored.object.unwrap();
            assert_eq!((&found.spec, &found.status), (&known.spec, &known.status), "{field}");
        }
    }

    #[test]
    fn what_cannot_be_understood_is_told_with_field_and_value_and_keeps_its_metadata() {
        for (pointer, value, says) in [
            ("/spec/adaptation", json!({"mode": "Turbo"}), "spec.adaptation.mode: \"Turbo\", must be one of Auto"),
            ("/spec/steps", json!("until it is good"), "spec.steps: \"until it is good\", must be a whole number"),
            ("/spec/data/columns/x", json!({"from": "a"}), "spec.data.columns.x: "),
            ("/spec/parallelism", json!(null), "spec.parallelism: has no value"),
            ("/spec", json!([]), "spec: [], must be a map"),
            ("/status/restarts", json!({"head": 1}), "status.restarts: "),
            ("/status/conditions/0/status", json!("Perhaps"), "status.conditions[0].status: \"Perhaps\""),
        ] {
            let stored = read(with(job(), pointer, value));
            assert_eq!(stored.meta().uid.as_deref(), Some("u-1"));
            let e = stored.object.unwrap_err();
            assert!(e.why.starts_with(says), "{:?}", e.why);
            let known = pointer != "/status/conditions/0/status";
            assert_eq!(e.training.map(|c| c.reason), known.then(|| "Running".to_owned()));
        }
        let mut object = job();
        object.as_object_mut().unwrap().remove("spec");
        assert!(read(object).object.unwrap_err().why.starts_with("spec is missing"));
        let other = read(with(with(job(), "/spec/managedBy", json!("a.b/c")), "/spec/seed", json!("x")));
        assert_eq!(other.object.unwrap_err().managed_by.as_deref(), Some("a.b/c"));
    }

    /// A volume of a new kind, or data from a new source, would be a job without them: it must not fail for that.
    #[test]
    fn what_says_too_little_without_its_new_fields_is_not_read() {
        let without_uri = with(job(), "/spec/data", json!({"stream": "kafka://a"}));
        let e = read(without_uri).object.unwrap_err();
        assert!(e.why.contains("either uri or socket") && e.why.contains("without spec.data.stream"), "{}", e.why);
        let volume = with(job(), "/spec/volumes/0", json!({"name": "work", "git": {"url": "a"}}));
        let e = read(volume).object.unwrap_err();
        assert!(e.why.contains("spec.volumes[].git, unknown here"), "{}", e.why);
    }

    #[test]
    fn one_that_cannot_be_read_hides_no_other_of_its_list() {
        let (broken, bare) = (with(job(), "/spec/steps", json!(-1)), {
            let mut bare = job();
            bare.as_object_mut().unwrap().retain(|key, _| key != "kind" && key != "apiVersion");
            with(bare, "/spec/new", json!(1))
        });
        let list = json!({
            "apiVersion": "foreshard.dev/v1alpha1", "kind": "TrainingJobList", "metadata": {}, "items": [broken, bare],
        });
        let list: ObjectList<Stored<TrainingJob>> = serde_json::from_value(list).unwrap();
        assert!(list.items[0].object.is_err());
        assert_eq!(list.items[1].object.as_ref().unwrap().spec.steps, 30);
        for value in [json!({"revision": "two"}), json!({})] {
            let object = json!({"metadata": {"name": "p"}, "spec": value});
            assert!(serde_json::from_value::<Stored<PartitionPlan>>(object.clone()).unwrap().object.is_err());
            assert!(serde_json::from_value::<Stored<ModelProfile>>(object).unwrap().object.is_err());
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(json!(null)),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "\\PC{0,9}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z]{1,9}", inner, 0..4).prop_map(|m| json!(m)),
            ]
        })
    }

    proptest! {
        #[test]
        fn every_object_is_read(value in any_value(), at in 0usize..14) {
            const AT: [&str; 14] = [
                "/spec", "/status", "/spec/data", "/spec/data/uri", "/spec/steps", "/spec/seed", "/spec/volumes",
                "/spec/volumes/0", "/spec/parallelism", "/spec/parallelism/cuts", "/spec/resources", "/spec/partition",
                "/status/conditions", "/status/conditions/0",
            ];
            prop_assert!(serde_json::from_value::<Stored<TrainingJob>>(with(job(), AT[at], value)).is_ok());
        }
    }
}
