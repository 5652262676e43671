//! The part of OpenAPI v3 that structural schemas of Kubernetes are made of.

use std::collections::BTreeSet;

use regex::Regex;
use serde_json::Value;

use super::Finding;
use crate::graph::error::closest;

/// Adds to `findings` what a schema has against a value.
pub fn check(schema: &Value, value: &Value, findings: &mut Vec<Finding>) {
    at("", schema, value, findings);
}

fn at(field: &str, schema: &Value, value: &Value, findings: &mut Vec<Finding>) {
    let mut found = |problem: String| findings.push(Finding { field: field.to_owned(), problem });
    if value.is_null() {
        if schema["nullable"] != true {
            found("has no value; write one or leave the field out".to_owned());
        }
        return;
    }
    if schema["x-kubernetes-int-or-string"] == true {
        if !value.is_string() && !value.is_i64() {
            found(format!("{}, must be a whole number or text", shown(value)));
        }
        return;
    }
    let kind = schema["type"].as_str().unwrap_or("object");
    let fits = match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|x| x.fract() == 0.0),
        _ => true,
    };
    if !fits {
        let quoted = kind == "string" && !value.is_object() && !value.is_array();
        let hint = if quoted { "; quote it" } else { "" };
        return found(format!("{}, must be {}{hint}", shown(value), spoken(kind)));
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        let texts: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
        let near = closest(value.as_str().unwrap_or_default(), texts.iter().copied());
        return found(format!("{}, must be one of {}{near}", shown(value), texts.join(", ")));
    }
    match value {
        Value::Number(n) => {
            let n = n.as_f64().unwrap_or(f64::NAN);
            let limit = |name: &str| schema[name].as_f64();
            if let Some(least) = limit("minimum").filter(|&least| n < least) {
                found(format!("{}, must be at least {}", shown(value), plain(least)));
            }
            if let Some(most) = limit("maximum").filter(|&most| n > most) {
                found(format!("{}, must be at most {}", shown(value), plain(most)));
            }
        }
        Value::String(text) => {
            sized(schema, "Length", text.chars().count(), "characters", &mut found);
            if let Some(pattern) = schema["pattern"].as_str()
                && Regex::new(pattern).is_ok_and(|pattern| !pattern.is_match(text))
            {
                found(format!("{}, must look like {pattern}", shown(value)));
            }
        }
        Value::Array(list) => {
            sized(schema, "Items", list.len(), "entries", &mut found);
            keys(schema, list, &mut found);
            for (i, item) in list.iter().enumerate() {
                at(&format!("{field}[{i}]"), &schema["items"], item, findings);
            }
        }
        Value::Object(map) => {
            sized(schema, "Properties", map.len(), "entries", &mut found);
            let properties = schema["properties"].as_object();
            for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                if !map.contains_key(required) {
                    found(format!("{required} is missing{}", meaning(&schema["properties"][required])));
                }
            }
            for (key, item) in map {
                let inner = if field.is_empty() { key.clone() } else { format!("{field}.{key}") };
                let known = properties.and_then(|p| p.get(key));
                match known.or(schema.get("additionalProperties")) {
                    Some(schema) => at(&inner, schema, item, findings),
                    // Object metadata stands in no schema of ours.
                    None if field.is_empty() && ["apiVersion", "kind", "metadata"].contains(&key.as_str()) => {}
                    None if properties.is_none() => {}
                    None => {
                        let near = closest(key, properties.into_iter().flatten().map(|(k, _)| k.as_str()));
                        findings.push(Finding { field: inner, problem: format!("there is no such field{near}") });
                    }
                }
            }
        }
        Value::Bool(_) | Value::Null => {}
    }
}

/// `minLength`, `maxItems` and their like.
fn sized(schema: &Value, of: &str, n: usize, what: &str, found: &mut impl FnMut(String)) {
    let limit = |end: &str| schema[format!("{end}{of}")].as_u64();
    if let Some(least) = limit("min").filter(|&least| (n as u64) < least) {
        found(format!("{n} {what}, must have at least {least}"));
    }
    if let Some(most) = limit("max").filter(|&most| n as u64 > most) {
        found(format!("{n} {what}, may have at most {most}"));
    }
}

/// Entries of a list map differ in their keys.
fn keys(schema: &Value, list: &[Value], found: &mut impl FnMut(String)) {
    let names: Vec<&str> =
        schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if schema["x-kubernetes-list-type"] != "map" || names.is_empty() {
        return;
    }
    let mut seen = BTreeSet::new();
    for item in list {
        let key: Vec<String> = names.iter().map(|n| shown(&item[*n])).collect();
        if !seen.insert(key.clone()) {
            found(format!("two entries have the {} {}; keep one", names.join(", "), key.join(", ")));
        }
    }
}

/// What a missing field is for: the first sentence of its description.
fn meaning(schema: &Value) -> String {
    let text = schema["description"].as_str().unwrap_or_default();
    let first = text.split(['\n', '.']).next().unwrap_or_default();
    if first.is_empty() { String::new() } else { format!(": {first}") }
}

/// A value as it was written, cut short.
fn shown(value: &Value) -> String {
    const MOST: usize = 80;
    let text = value.to_string();
    if text.chars().count() <= MOST { text } else { text.chars().take(MOST).chain("...".chars()).collect() }
}

fn plain(limit: f64) -> String {
    if limit.fract() == 0.0 && limit.abs() < 1e15 { format!("{limit:.0}") } else { limit.to_string() }
}

fn spoken(kind: &str) -> &str {
    match kind {
        "integer" => "a whole number",
        "number" => "a number",
        "string" => "text",
        "boolean" => "true or false",
        "array" => "a list",
        _ => "a map of fields",
    }
}
