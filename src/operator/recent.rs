//! What was written for a job a moment ago: watches tell of it later, and meanwhile it is not written again.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::time::{Duration, Instant};

use serde_json::Value;

/// After so long it is written again, if it still seems to be missing. Watches are rarely late by more than a second.
const FRESH: Duration = Duration::from_secs(10);

/// Objects of one job, with the content that was written.
///
/// # Guarantees
/// Nothing is held back for longer than [`FRESH`], other content never, and nothing of an earlier job of the same name.
#[derive(Debug, Default)]
pub struct Recent(BTreeMap<String, (u64, Instant)>);

impl Recent {
    /// Whether `object`, of the job `uid`, was written with this content a moment before `now`.
    pub fn holds(&self, uid: &str, object: &Value, content: &Value, now: Instant) -> bool {
        let found = self.0.get(&name(object));
        found.is_some_and(|(hash, at)| *hash == hashed(uid, content) && now.duration_since(*at) < FRESH)
    }

    pub fn put(&mut self, uid: &str, object: &Value, content: &Value, now: Instant) {
        self.0.retain(|_, (_, at)| now.duration_since(*at) < FRESH);
        self.0.insert(name(object), (hashed(uid, content), now));
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }
}

fn name(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!("{}/{}", text(&object["kind"]), text(&object["metadata"]["name"]))
}

fn hashed(uid: &str, content: &Value) -> u64 {
    let mut hasher = DefaultHasher::new();
    (uid, content.to_string()).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn holds_back_the_same_content_of_the_same_job_for_a_moment_only() {
        let (object, now) = (json!({"kind": "Pod", "metadata": {"name": "a"}}), Instant::now());
        let other = json!({"kind": "Pod", "metadata": {"name": "b"}});
        let mut recent = Recent::default();
        recent.put("u-1", &object, &json!(1), now);
        assert!(recent.holds("u-1", &object, &json!(1), now));
        assert!(!recent.holds("u-1", &object, &json!(2), now), "other content");
        assert!(!recent.holds("u-1", &other, &json!(1), now), "another object");
        assert!(!recent.holds("u-2", &object, &json!(1), now), "another job");
        assert!(!recent.holds("u-1", &object, &json!(1), now + FRESH), "too long ago");
        recent.put("u-1", &other, &json!(1), now + FRESH);
        assert_eq!(recent.0.len(), 1, "what is old is dropped");
        recent.clear();
        assert!(!recent.holds("u-1", &other, &json!(1), now + FRESH));
    }
}
