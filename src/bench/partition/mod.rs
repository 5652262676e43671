//! `foreshard bench partition`: planning problems of other people, one family per format and objective.
//!
//! A family finds its inputs below the directory it is given, whatever their names: published figures are looked up by
//! name where there are any, and a row without them is still a row.

mod dnn;
mod generic;
pub mod iopddl;
mod pipedream;
mod piper;

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

/// One instance, solved.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub instance: String,
    /// What is minimised, with its unit.
    pub objective: &'static str,
    /// What our solver reached, computed by a verifier of its own; `None` when it found nothing feasible.
    pub ours: Option<f64>,
    /// Best published or rerun figure, with where it is from.
    pub best_known: Option<Known>,
    /// Lower bound proven by our solver; equal to `ours` where that is optimal.
    pub bound: Option<f64>,
    pub seconds: f64,
    /// What the solver had after a second, where the family asks for that.
    pub after_a_second: Option<f64>,
    /// Most resident memory of the process while it solved, in bytes.
    pub peak_memory: u64,
    /// What else is worth knowing: why nothing was found, what the plan looks like.
    pub note: String,
}

/// A figure of somebody else's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Known {
    pub value: f64,
    pub source: &'static str,
}

impl Row {
    /// Ours over the best known, or over the bound where nothing is published.
    pub fn ratio(&self) -> Option<f64> {
        let against = self.best_known.map(|k| k.value).or(self.bound)?;
        Some(self.ours? / against)
    }
}

/// An input that cannot be read or makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {message}")]
    Malformed { path: PathBuf, message: String },
    #[error("no input of family {family} below {path}")]
    Nothing { family: &'static str, path: PathBuf },
}

/// A kind of input.
pub struct Family {
    pub name: &'static str,
    pub about: &'static str,
    /// Solves every input of this kind below a directory; `report` gets each row as soon as it is there.
    pub run: fn(&Path, &mut dyn FnMut(Row)) -> Result<(), InputError>,
}

/// All families, in the order in which they run.
pub const FAMILIES: &[Family] = &[
    generic::FAMILY,
    pipedream::FAMILY,
    piper::FAMILY,
    Family {
        name: "dnn-max-load",
        about: "device placement of DNN graphs: load of the busiest device of a full pipeline",
        run: dnn::max_load,
    },
    Family {
        name: "dnn-latency",
        about: "device placement of DNN graphs: latency of one sample, one block for each accelerator",
        run: dnn::latency,
    },
    Family { name: iopddl::NAME, about: iopddl::ABOUT, run: iopddl::run },
];

/// Runs `solve` and tells how long it took and how much memory the process held meanwhile.
pub fn measured<T>(solve: impl FnOnce() -> T) -> (T, f64, u64) {
    // Linux: writing 5 resets the peak of resident memory.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    let began = Instant::now();
    let value = solve();
    let seconds = began.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    (value, seconds, peak.unwrap_or(0) * 1024)
}

/// Every file below `directory` whose name ends in `ending`, sorted by path.
pub fn files(directory: &Path, ending: &str) -> Result<Vec<PathBuf>, InputError> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(path) = open.pop() {
        let failed = |source| InputError::Read { path: path.clone(), source };
        for entry in std::fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?.path();
            if entry.is_dir() {
                open.push(entry);
            } else if entry.to_string_lossy().ends_with(ending) {
                found.push(entry);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// A table of a family's rows.
pub fn table(family: &str, rows: &[Row]) -> String {
    let number = |x: Option<f64>| x.map_or("-".to_owned(), significant);
    let early = rows.iter().any(|r| r.after_a_second.is_some());
    let mut head = vec!["instance", "ours", "best known", "bound", "ratio", "seconds", "memory", "note"];
    if early {
        head.insert(2, "after 1 s");
    }
    let note = head.len() - 1;
    let mut cells: Vec<Vec<String>> = vec![head.into_iter().map(str::to_owned).collect()];
    for row in rows {
        let mut of_row = vec![
            row.instance.clone(),
            number(row.ours),
            number(row.best_known.map(|k| k.value)),
            number(row.bound),
            row.ratio().map_or("-".to_owned(), |r| format!("{r:.4}")),
            format!("{:.2}", row.seconds),
            format!("{:.0} MiB", row.peak_memory as f64 / f64::from(1 << 20)),
            row.note.clone(),
        ];
        if early {
            of_row.insert(2, number(row.after_a_second));
        }
        cells.push(of_row);
    }
    let objective = rows.first().map_or("", |r| r.objective);
    let mut out = format!("{family}: {objective}, lower is better\n");
    let widths: Vec<usize> =
        (0..cells[0].len()).map(|c| cells.iter().map(|r| r[c].chars().count()).max().unwrap_or(0)).collect();
    for row in &cells {
        let line: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(c, (cell, &w))| if c == 0 || c == note { format!("{cell:<w$}") } else { format!("{cell:>w$}") })
            .collect();
        out.push_str(line.join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// Integers whole, everything else with six significant digits.
fn significant(x: f64) -> String {
    if x.fract() == 0.0 && x.abs() < 1e18 {
        return format!("{x:.0}");
    }
    let digits = (5 - x.abs().log10().floor() as i32).clamp(0, 12) as usize;
    format!("{x:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_is_against_the_best_known_then_the_bound() {
        let known = Known { value: 50.0, source: "a paper" };
        let mut row = Row {
            instance: "a".to_owned(),
            objective: "cost",
            ours: Some(55.0),
            best_known: Some(known),
            bound: Some(44.0),
            seconds: 0.5,
            after_a_second: None,
            peak_memory: 1 << 20,
            note: String::new(),
        };
        assert_eq!(row.ratio(), Some(1.1));
        row.best_known = None;
        assert_eq!(row.ratio(), Some(1.25));
        let text = table("family", &[row.clone()]);
        assert!(text.contains("1.2500") && !text.contains("after 1 s"), "{text}");
        row.after_a_second = Some(56.0);
        assert!(table("family", &[row]).contains("after 1 s"));
    }

    #[test]
    fn numbers_keep_six_digits() {
        for (x, text) in [(6_548_641_531.0, "6548641531"), (17.79012, "17.7901"), (0.05479123, "0.0547912")] {
            assert_eq!(significant(x), text);
        }
    }
}
