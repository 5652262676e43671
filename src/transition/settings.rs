//! How eager the loop is.

use serde::{Deserialize, Serialize};

use crate::graph::error::closest;
use crate::units::Seconds;

/// Whether plans change while a job trains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// Better plans are adopted.
    #[default]
    Auto,
    /// Better plans are shown and wait for approval.
    Recommend,
    /// The first plan stays.
    Off,
}

/// When to look for a better plan, and when to move to it. Sane for steps of 50 ms to 10 s.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Settings {
    pub mode: Mode,
    /// Least time from one decision to the next.
    pub interval: Seconds,
    /// What was observed or is foreseen has to leave what was expected by this share of it.
    pub threshold: f64,
    /// How far ahead gains are summed up and forecasts are believed.
    pub horizon: Seconds,
    /// A new plan has to save this share of time; half as much again for each of the last three moves that did not pay, if
    /// that was in the last twelve horizons.
    pub min_gain: f64,
    /// What was observed has to stay away this long.
    pub dwell: Seconds,
    /// Least time from one cutover to the next; twice that when one of those three did not pay.
    pub cooldown: Seconds,
    /// A move has to save (1 + hysteresis) times what it costs.
    pub hysteresis: f64,
    pub budget: Budget,
    /// Whether anything is foreseen; if not, all is taken to stay as it is.
    pub forecast: bool,
}

/// What moving may cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Budget {
    /// Of all time, in which training may stand still for moves.
    pub share: f64,
    /// Moves of a whole job; as many as pay when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moves: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            interval: Seconds(1.0),
            threshold: 0.15,
            horizon: Seconds(300.0),
            min_gain: 0.08,
            dwell: Seconds(5.0),
            cooldown: Seconds(60.0),
            hysteresis: 0.5,
            budget: Budget::default(),
            forecast: true,
        }
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self { share: 0.05, moves: None }
    }
}

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SettingsError {
    #[error("adaptation.{field}: {value}, must be {range}")]
    Range { field: &'static str, value: f64, range: &'static str },
    #[error(
        "adaptation.interval: {interval}, must be at most adaptation.horizon, {horizon}: what was foreseen is past by then"
    )]
    Blind { interval: f64, horizon: f64 },
    #[error("adaptation.{field}: no such setting{hint}")]
    Unknown { field: String, hint: String },
    #[error("adaptation.{field}: {value:?} is no value for it: {problem}")]
    Value { field: String, value: String, problem: String },
}

impl Settings {
    /// Checks every number against its range.
    pub fn check(&self) -> Result<(), SettingsError> {
        let numbers = [
            ("threshold", self.threshold, 0.01..=10.0, "0.01 to 10"),
            ("interval", self.interval.0, 0.1..=3600.0, "0.1 to 3600 seconds"),
            ("horizon", self.horizon.0, 1.0..=86_400.0, "1 to 86400 seconds"),
            ("minGain", self.min_gain, 0.0..=0.9, "0 to 0.9"),
            ("dwell", self.dwell.0, 0.0..=86_400.0, "0 to 86400 seconds"),
            ("cooldown", self.cooldown.0, 0.0..=86_400.0, "0 to 86400 seconds"),
            ("hysteresis", self.hysteresis, 0.0..=100.0, "0 to 100"),
            ("budget.share", self.budget.share, 0.001..=1.0, "0.001 to 1"),
        ];
        match numbers.into_iter().find(|(_, value, range, _)| !range.contains(value)) {
            Some((field, value, _, range)) => Err(SettingsError::Range { field, value, range }),
            None if self.interval > self.horizon => {
                Err(SettingsError::Blind { interval: self.interval.0, horizon: self.horizon.0 })
            }
            None => Ok(()),
        }
    }

    /// Changes one setting, named as in a manifest: `threshold`, `budget.share`.
    pub fn set(&mut self, field: &str, value: &str) -> Result<(), SettingsError> {
        let wrong =
            |problem: String| SettingsError::Value { field: field.to_owned(), value: value.to_owned(), problem };
        let mut all = serde_json::to_value(&*self).map_err(|e| wrong(e.to_string()))?;
        // Words need no quotes.
        let parsed = serde_json::from_str(value).unwrap_or_else(|_| value.into());
        let (parent, name) = field.rsplit_once('.').map_or((None, field), |(parent, name)| (Some(parent), name));
        let table = match parent {
            Some(parent) => all.get_mut(parent),
            None => Some(&mut all),
        };
        let known = |name: &str| FIELDS.contains(&field) && !name.is_empty();
        match table.and_then(|t| t.as_object_mut()).filter(|_| known(name)) {
            Some(table) => table.insert(name.to_owned(), parsed),
            None => {
                let hint = closest(field, FIELDS.iter().copied());
                return Err(SettingsError::Unknown { field: field.to_owned(), hint });
            }
        };
        let changed: Self = serde_json::from_value(all).map_err(|e| wrong(e.to_string()))?;
        changed.check()?;
        *self = changed;
        Ok(())
    }
}

/// What [`Settings::set`] knows: all but `interval`, for the moments of a recording are what they are.
const FIELDS: &[&str] = &[
    "mode",
    "threshold",
    "horizon",
    "minGain",
    "dwell",
    "cooldown",
    "hysteresis",
    "budget.share",
    "budget.moves",
    "forecast",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_every_field_by_its_name() {
        let mut s = Settings::default();
        let values = ["recommend", "0.3", "60", "0.1", "2", "0", "1.5", "0.2", "7", "false"];
        for (field, value) in FIELDS.iter().zip(values) {
            s.set(field, value).unwrap();
        }
        let expected = Settings {
            mode: Mode::Recommend,
            interval: Seconds(1.0),
            threshold: 0.3,
            horizon: Seconds(60.0),
            min_gain: 0.1,
            dwell: Seconds(2.0),
            cooldown: Seconds(0.0),
            hysteresis: 1.5,
            budget: Budget { share: 0.2, moves: Some(7) },
            forecast: false,
        };
        assert_eq!(s, expected);
    }

    #[test]
    fn a_wrong_setting_is_named_with_its_range() {
        let mut s = Settings::default();
        let mut of = |field: &str, value: &str| s.set(field, value).unwrap_err().to_string();
        assert_eq!(of("threshold", "0"), "adaptation.threshold: 0, must be 0.01 to 10");
        assert_eq!(of("horizon", "1e9"), "adaptation.horizon: 1000000000, must be 1 to 86400 seconds");
        assert!(of("budget.share", "2").contains("budget.share: 2, must be 0.001 to 1"));
        assert!(of("treshold", "0.1").contains("did you mean \"threshold\"?"));
        assert!(of("budget", "1").contains("no such setting"));
        assert!(of("mode", "on").contains("unknown variant `on`"));
        assert!(of("dwell", "soon").starts_with("adaptation.dwell: \"soon\" is no value"));
        assert!(Settings { min_gain: f64::NAN, ..Settings::default() }.check().is_err());
        assert_eq!(s, Settings::default());
        let of = |interval| Settings { interval: Seconds(interval), ..Settings::default() }.check();
        assert_eq!(of(0.0).unwrap_err().to_string(), "adaptation.interval: 0, must be 0.1 to 3600 seconds");
        assert!(of(301.0).unwrap_err().to_string().contains("interval: 301, must be at most adaptation.horizon, 300"));
        assert_eq!(of(300.0), Ok(()));
    }
}
