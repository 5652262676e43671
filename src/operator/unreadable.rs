//! What is said of an object that this version does not understand. Training goes on meanwhile: its pods are left alone.

use k8s_openapi::jiff::Timestamp;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

use crate::api::{Condition, ConditionStatus, condition};

/// Owns the condition alone: applied by the operator's own manager, it would take all other fields of the status away.
pub const MANAGER: &str = "foreshard-operator-unreadable";
const REASON: &str = "Unreadable";

/// Why, and the way out.
pub fn text(why: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut text: String = why.chars().take(900).collect();
    text.push_str(&format!(
        "; this is not known to the operator, version {version}, which leaves the object and its pods as they are: upgrade the operator, or change the object"
    ));
    text
}

/// The status to apply, or `None` where the condition `Training` says it already.
pub fn status(generation: Option<i64>, said: Option<&Condition>, text: &str, now: Timestamp) -> Option<Value> {
    if said.is_some_and(|c| c.reason == REASON && c.message == text && c.observed_generation == generation) {
        return None;
    }
    let same = said.filter(|c| c.status == ConditionStatus::Unknown);
    let now = Timestamp::from_second(now.as_second()).unwrap_or_default();
    let condition = Condition {
        kind: condition::TRAINING.to_owned(),
        status: ConditionStatus::Unknown,
        reason: REASON.to_owned(),
        message: text.to_owned(),
        last_transition_time: same.map_or_else(|| now.to_string(), |c| c.last_transition_time.clone()),
        observed_generation: generation,
    };
    Some(json!({"conditions": [condition]}))
}

/// An event of the object, and a line of the log.
pub async fn tell<K: Resource<DynamicType = ()>>(recorder: &Recorder, object: &K, text: &str) {
    let (kind, name, namespace) = (K::kind(&()), object.name_any(), object.namespace());
    tracing::warn!(%kind, name, namespace, why = text, "an object is not understood");
    let event = Event {
        type_: EventType::Warning,
        reason: REASON.to_owned(),
        note: Some(text.chars().take(1000).collect()),
        action: "Read".to_owned(),
        secondary: None,
    };
    if let Err(e) = recorder.publish(&event, &object.object_ref(&())).await {
        tracing::debug!(error = %e, "an event was lost");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_said_once_in_the_condition_of_the_state() {
        let at = |s: i64| Timestamp::from_second(s).unwrap();
        let first = status(Some(2), None, "a", at(10)).unwrap();
        let said: Condition = serde_json::from_value(first["conditions"][0].clone()).unwrap();
        assert_eq!((said.kind.as_str(), said.reason.as_str(), said.message.as_str()), ("Training", "Unreadable", "a"));
        assert_eq!(status(Some(2), Some(&said), "a", at(20)), None, "an object at rest costs no writes");
        let other = status(Some(3), Some(&said), "b", at(30)).unwrap();
        assert_eq!(other["conditions"][0]["lastTransitionTime"], said.last_transition_time, "its status is the same");
        assert_eq!(first.as_object().unwrap().len(), 1, "other fields are not ours");
        assert!(text("spec.a: \"b\"").starts_with("spec.a: \"b\"; ") && text(&"é".repeat(5000)).len() < 4096);
    }
}
