//! Sharding strategies of the ASPLOS 2025 / EuroSys 2025 contest on intra-operator parallelism (IOPDDL).
//!
//! Production graphs: one strategy per op, costs of ops and of pairs, memory at every moment
//! (github.com/google/iopddl, github.com/asplos-contest/2025).

mod format;
mod verify;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{InputError, Known, Row, files, measured};
use crate::plan::strategy::{Outcome, Refusal, solve};
use format::Instance;

pub const NAME: &str = "iopddl";
pub const ABOUT: &str = "a sharding strategy per op under a memory timeline (ASPLOS 2025 contest)";

/// Where [`BEST`] is from.
const SOURCE: &str = "best of 20 teams, github.com/asplos-contest/2025, misc/iopddl_final_results.csv";

/// Names of the contest's instances end in a letter after this.
const PREFIX: &str = "asplos-2025-iopddl-";

/// Lowest cost any team reached in the contest, by letter from A: within [`limit`], on 8 cores.
const BEST: [i64; 25] = [
    6_548_641_531,
    532_843,
    84_102_445_260,
    313_613_524_736,
    338_965_335_230,
    364_364_563_561,
    217_039,
    527_715_404_257,
    583_706_456_444,
    1_360_981_630_371,
    2_274_276_676,
    1_970_993_742,
    49_928_460_991,
    202_739_586_553,
    222_880_199_765,
    662_197_407_330,
    526_776_842_042,
    371_899_551_572,
    1_534_613_444,
    682_895_254_913,
    2_569_342_178,
    1_632_051,
    11_818_845_467_155,
    280_461_191_177,
    621_176_568_278,
];

/// Time for an instance that is not of the contest.
const USUAL: Duration = Duration::from_secs(60);
/// Share of the time after which the search ends, so that checking and writing are within it, too.
const SEARCHING: f64 = 0.95;
/// The search is random; its seed is not.
const SEED: u64 = 1;

/// Position of a contest instance in the alphabet.
fn letter(name: &str) -> Option<usize> {
    match name.strip_prefix(PREFIX)?.as_bytes() {
        [letter @ b'A'..=b'Y'] => Some(usize::from(letter - b'A')),
        _ => None,
    }
}

/// The contest's time limit: 1 minute for A to E, one more for every five letters (IOPDDL.md, "Benchmarks").
fn limit(name: &str) -> Duration {
    letter(name).map_or(USUAL, |l| Duration::from_secs(60 * (1 + l as u64 / 5)))
}

/// Solves every instance below a directory, each within the contest's time limit.
pub fn run(directory: &Path, report: &mut dyn FnMut(Row)) -> Result<(), InputError> {
    run_within(directory, None, report)
}

/// Solves every instance below a directory, each within `budget` or the contest's time limit.
pub fn run_within(directory: &Path, budget: Option<Duration>, report: &mut dyn FnMut(Row)) -> Result<(), InputError> {
    let mut paths: Vec<PathBuf> = files(directory, ".json.gz")?;
    paths.extend(files(directory, ".json")?);
    paths.retain(|p| format::looks_like_one(p));
    paths.sort();
    if paths.is_empty() {
        return Err(InputError::Nothing { family: NAME, path: directory.to_owned() });
    }
    for path in paths {
        let (row, seconds, peak_memory) = measured(|| row(&path, budget));
        report(Row { seconds, peak_memory, ..row? });
    }
    Ok(())
}

/// Solves one file; the time includes reading it.
fn row(path: &Path, budget: Option<Duration>) -> Result<Row, InputError> {
    let began = Instant::now();
    let instance = Instance::read(path)?;
    let budget = budget.unwrap_or_else(|| limit(&instance.name)).mul_f64(SEARCHING);
    let outcome = solve(&instance.problem(), SEED, &mut || began.elapsed() >= budget);
    let best = letter(&instance.name).map(|l| Known { value: BEST[l] as f64, source: SOURCE });
    let mut row = Row {
        objective: "cost of strategies",
        ours: None,
        best_known: best,
        bound: None,
        seconds: 0.0,
        after_a_second: None,
        peak_memory: 0,
        note: String::new(),
        instance: instance.name.clone(),
    };
    match outcome {
        Ok(outcome) => fill(&mut row, &instance, &outcome),
        Err(Refusal::Malformed(e)) => {
            return Err(InputError::Malformed { path: path.to_owned(), message: e.to_string() });
        }
        Err(refusal) => row.note = format!("infeasible: {refusal}"),
    }
    Ok(row)
}

/// Checks what the solver claims and writes it down.
fn fill(row: &mut Row, instance: &Instance, outcome: &Outcome) {
    // Costs are whole.
    row.bound = outcome.bound.is_finite().then(|| outcome.bound.ceil());
    let left = outcome.turns.last().map_or(0, |t| t.n_variables);
    let size = format!("{} ops, {left} left to choose", instance.n_ops());
    let Some(strategies) = &outcome.strategies else {
        row.note = format!("nothing found that fits; {size}");
        return;
    };
    match verify::cost(instance, strategies) {
        Ok(cost) => {
            row.ours = Some(cost as f64);
            let proven = if row.bound == row.ours { "optimal; " } else { "" };
            row.note = format!("{proven}{size}");
        }
        Err(wrong) => row.note = format!("the solver's choice is wrong: {wrong}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The contest's example.json, whose best choice costs 445 (IOPDDL.md, "Submission").
    pub(super) const EXAMPLE: &str = r#"{"problem": {"name": "example",
        "nodes": {"intervals": [[30, 70], [40, 70], [50, 120], [110, 140], [110, 150]],
                  "costs": [[15], [55, 65], [25, 45, 35], [85, 75], [95]],
                  "usages": [[10], [25, 25], [15, 20, 15], [10, 10], [15]]},
        "edges": {"nodes": [[0, 1], [0, 2], [1, 3], [2, 4], [3, 4]],
                  "costs": [[30, 40], [50, 10, 40], [90, 10, 20, 80], [60, 20, 30], [70, 60]]},
        "usage_limit": 50}}"#;

    #[test]
    fn the_example_is_solved_and_proven() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("deep")).unwrap();
        std::fs::write(directory.path().join("deep/example.json"), EXAMPLE).unwrap();
        std::fs::write(directory.path().join("other.json"), r#"{"maxFPGAs": 4, "problem": 1}"#).unwrap();
        let mut rows = Vec::new();
        run(directory.path(), &mut |row| rows.push(row)).unwrap();
        let [row] = &rows[..] else { panic!("{rows:?}") };
        assert_eq!((row.instance.as_str(), row.ours, row.bound), ("example", Some(445.0), Some(445.0)));
        assert!(row.note.starts_with("optimal; 5 ops"), "{}", row.note);
    }

    #[test]
    fn an_infeasible_instance_is_a_row_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.json"), EXAMPLE.replace("\"usage_limit\": 50", "\"usage_limit\": 49"))
            .unwrap();
        let mut rows = Vec::new();
        run(directory.path(), &mut |row| rows.push(row)).unwrap();
        assert_eq!(rows[0].ours, None);
        assert_eq!(rows[0].note, "infeasible: at moment 50 the leanest strategies use 50, the limit is 49");
    }

    #[test]
    fn a_directory_without_instances_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let error = run(directory.path(), &mut |_| {}).unwrap_err();
        assert!(matches!(error, InputError::Nothing { family: "iopddl", .. }), "{error}");
    }

    #[test]
    fn limits_and_best_costs_go_by_letter() {
        let known = |name: &str| (limit(name).as_secs(), letter(name).map(|l| BEST[l]));
        assert_eq!(known("asplos-2025-iopddl-B"), (60, Some(532_843)));
        assert_eq!(known("asplos-2025-iopddl-G"), (120, Some(217_039)));
        assert_eq!(known("asplos-2025-iopddl-Y"), (300, Some(621_176_568_278)));
        for other in ["example", "asplos-2025-iopddl-Z", "asplos-2025-iopddl-AA"] {
            assert_eq!(known(other), (60, None));
        }
    }
}
