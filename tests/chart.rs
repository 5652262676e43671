//! The Helm chart, as far as it can be looked at without Helm: its values, and the plain install that was made from it.
//! `e2e/chart.py` renders it with other values.

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use foreshard::api::lint::documents;
use serde_json::{Value, json};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// Objects of the plain install.
fn install() -> Vec<Value> {
    documents(&read_to_string(root().join("manifests/install/foreshard.yaml")).unwrap()).unwrap()
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|o| o["kind"] == kind).collect()
}

/// (group/resource, verb, name it is limited to) of the rules of a role.
fn rights(role: &Value) -> BTreeSet<(String, String, String)> {
    let texts = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().map(|v| v.as_str().unwrap().to_owned()).collect()
    };
    let mut all = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        let mut names = texts(&rule["resourceNames"]);
        if names.is_empty() {
            names.push(String::new());
        }
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    let resource = format!("{group}/{resource}");
                    all.extend(names.iter().map(|name| (resource.clone(), verb.clone(), name.clone())));
                }
            }
        }
    }
    all
}

#[test]
fn the_operator_may_do_what_it_does_and_nothing_else() {
    let objects = install();
    let roles = of_kind(&objects, "ClusterRole");
    assert_eq!(roles.len(), 1);
    let found = rights(roles[0]);
    let of = |resource: &str| -> Vec<&str> {
        found.iter().filter(|(r, ..)| r == resource).map(|(_, verb, _)| verb.as_str()).collect()
    };
    let expected: [(&str, &[&str]); 13] = [
        ("/nodes", &["get", "list", "watch"]),
        ("/secrets", &["create"]),
        ("/pods", &["create", "delete", "get", "list", "patch", "watch"]),
        ("/services", &["create", "patch"]),
        ("/configmaps", &["create", "patch"]),
        ("networking.k8s.io/networkpolicies", &["create", "patch"]),
        ("events.k8s.io/events", &["create", "patch"]),
        ("foreshard.dev/trainingjobs", &["delete", "get", "list", "watch"]),
        ("foreshard.dev/trainingjobs/finalizers", &["update"]),
        ("foreshard.dev/trainingjobs/status", &["patch"]),
        ("foreshard.dev/partitionplans", &["create", "get", "list", "watch"]),
        ("foreshard.dev/partitionplans/status", &["patch"]),
        ("foreshard.dev/modelprofiles", &["create", "get", "list", "patch", "watch"]),
    ];
    for (resource, verbs) in expected {
        assert_eq!(of(resource), verbs, "{resource}");
    }
    let known: BTreeSet<&str> = expected.iter().map(|(resource, _)| *resource).collect();
    let more: Vec<_> = found.iter().filter(|(resource, ..)| !known.contains(resource.as_str())).collect();
    assert!(more.is_empty(), "rights that nobody spoke of: {more:?}");

    // In its own namespace: the lease, and its own key by name.
    let own = of_kind(&objects, "Role");
    assert_eq!(own.len(), 1);
    let all = rights(own[0]);
    let unnamed: Vec<_> = all.iter().filter(|(_, verb, name)| verb != "create" && name.is_empty()).collect();
    assert!(unnamed.is_empty(), "{unnamed:?}");
    for binding in of_kind(&objects, "ClusterRoleBinding").into_iter().chain(of_kind(&objects, "RoleBinding")) {
        assert_eq!(
            binding["subjects"],
            json!([{
                "kind": "ServiceAccount", "name": "foreshard", "namespace": "foreshard-system",
            }])
        );
    }
}

#[test]
fn the_operators_pod_passes_the_restricted_standard() {
    let objects = install();
    let pod = &of_kind(&objects, "Deployment")[0]["spec"]["template"]["spec"];
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    for container in pod["containers"].as_array().unwrap() {
        let context = &container["securityContext"];
        assert_eq!(context["allowPrivilegeEscalation"], false);
        assert_eq!(context["readOnlyRootFilesystem"], true);
        assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
        assert!(container["resources"]["limits"]["memory"].is_string());
        assert!(container["livenessProbe"].is_object() && container["readinessProbe"].is_object());
    }
    assert_eq!(of_kind(&objects, "NetworkPolicy").len(), 1);
}

#[test]
fn the_plain_install_holds_the_definitions_of_today_and_keeps_them() {
    let objects = install();
    let mut found = of_kind(&objects, "CustomResourceDefinition").into_iter().cloned().collect::<Vec<_>>();
    found.sort_by_key(|crd| crd["metadata"]["name"].to_string());
    let mut made: Vec<Value> =
        foreshard::api::crds().iter().map(|(_, yaml)| documents(yaml).unwrap().remove(0)).collect();
    made.sort_by_key(|crd| crd["metadata"]["name"].to_string());
    for crd in &mut made {
        crd["metadata"]["annotations"] = json!({"helm.sh/resource-policy": "keep"});
    }
    found.iter_mut().chain(&mut made).for_each(floats);
    assert!(found == made, "run make manifests");
}

/// Helm writes 1.0 as 1.
fn floats(value: &mut Value) {
    match value {
        Value::Number(n) => *value = json!(n.as_f64()),
        Value::Array(list) => list.iter_mut().for_each(floats),
        Value::Object(map) => map.values_mut().for_each(floats),
        _ => {}
    }
}

/// Names of the leaves of values, and of the maps that a user fills.
fn leaves(at: &str, value: &Value, out: &mut BTreeSet<String>) {
    match value.as_object().filter(|map| !map.is_empty()) {
        Some(map) => {
            for (key, inner) in map {
                leaves(&format!("{at}.{key}"), inner, out);
            }
        }
        None => drop(out.insert(at.to_owned())),
    }
}

/// The schema of a value, where it has one.
fn schema_of<'a>(schema: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').skip(1).try_fold(schema, |schema, key| {
        let open = (schema["type"] == "object" && schema["additionalProperties"] != false).then_some(schema);
        schema["properties"].get(key).or(open)
    })
}

#[test]
fn every_value_has_a_schema_and_every_schema_a_value() {
    let chart = root().join("charts/foreshard");
    let values = documents(&read_to_string(chart.join("values.yaml")).unwrap()).unwrap().remove(0);
    let schema: Value = serde_json::from_str(&read_to_string(chart.join("values.schema.json")).unwrap()).unwrap();
    let mut all = BTreeSet::new();
    leaves("", &values, &mut all);
    for path in &all {
        assert!(schema_of(&schema, path).is_some(), "values.schema.json does not know {path}");
    }
    fn named(at: &str, schema: &Value, values: &Value) {
        for (key, inner) in schema["properties"].as_object().into_iter().flatten().filter(|(k, _)| *k != "global") {
            assert!(values.get(key).is_some(), "values.yaml lacks {at}.{key}");
            named(&format!("{at}.{key}"), inner, &values[key]);
        }
    }
    named("", &schema, &values);
    assert_eq!(schema["additionalProperties"], false, "a slip of the pen is found");
}
