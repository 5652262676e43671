//! Device placement of DNN graphs: the problems of Tarnawski et al., "Efficient Algorithms for Device Placement of DNN
//! Graph Operators" (NeurIPS 2020), in the format of msr-fiddle/dnn-partitioning.

mod known;
mod read;
mod verify;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use self::known::{Goal, known};
use self::read::Input;
use self::verify::{Hosts, verify};
use super::{InputError, Row, files, measured};
use crate::plan::place::{Infeasible, Placement, blocks, contiguous, free};

/// Time for one instance where the search could go on.
const BUDGET: Duration = Duration::from_secs(10);
/// Good plans are wanted so soon.
const EARLY: Duration = Duration::from_secs(1);

/// A file of this format.
struct Instance {
    name: String,
    stem: String,
    text: String,
    input: Input,
}

/// Two rows for each input: contiguous stages, and any device for any op.
pub fn max_load(directory: &Path, report: &mut dyn FnMut(Row)) -> Result<(), InputError> {
    let found = instances("dnn-max-load", directory, "latency")?;
    for instance in &found {
        let problem = &instance.input.problem;
        let mut stages = None;
        report(instance.row(Goal::Contiguous, &mut |stop| {
            let result = contiguous::contiguous(problem, stop);
            stages = result.as_ref().ok().map(|p| p.device.clone());
            result
        }));
        report(instance.row(Goal::Free, &mut |stop| {
            let seeds: Vec<_> = stages.iter().map(|device| &device[..]).collect();
            free::free(problem, &seeds, stop)
        }));
    }
    Ok(())
}

/// One row for each input: the latency of one sample.
pub fn latency(directory: &Path, report: &mut dyn FnMut(Row)) -> Result<(), InputError> {
    let found = instances("dnn-latency", directory, "throughput")?;
    for instance in &found {
        report(instance.row(Goal::Latency, &mut |stop| blocks::latency(&instance.input.problem, stop)));
    }
    Ok(())
}

/// All inputs below a directory, but those below one that is named for the other family, as in the origin.
///
/// Latency is defined for inference only.
fn instances(family: &'static str, directory: &Path, others: &str) -> Result<Vec<Instance>, InputError> {
    let mut found = Vec::new();
    for path in files(directory, ".json")? {
        let named = |name: &std::ffi::OsStr| name.to_string_lossy().to_lowercase().contains(others);
        if path.parent().is_some_and(|p| p.iter().any(named)) {
            continue;
        }
        let text = std::fs::read_to_string(&path).map_err(|source| InputError::Read { path: path.clone(), source })?;
        if !read::looks_like(&text) {
            continue;
        }
        let input =
            read::read(&text).map_err(|e| InputError::Malformed { path: path.clone(), message: e.to_string() })?;
        if family == "dnn-latency" && input.problem.ops().iter().any(|op| op.backward) {
            continue;
        }
        let name = path.strip_prefix(directory).unwrap_or(&path).with_extension("");
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        found.push(Instance { name: name.to_string_lossy().into_owned(), stem, text, input });
    }
    if found.is_empty() {
        return Err(InputError::Nothing { family, path: PathBuf::from(directory) });
    }
    Ok(found)
}

type Solve<'a> = dyn FnMut(&mut dyn FnMut() -> bool) -> Result<Placement, Infeasible> + 'a;

impl Instance {
    /// Solves, checks and compares.
    fn row(&self, goal: Goal, solve: &mut Solve<'_>) -> Row {
        let mut within = |budget: Duration| {
            let began = Instant::now();
            measured(|| solve(&mut || began.elapsed() >= budget))
        };
        let mut found = within(EARLY);
        let early = found.0.as_ref().ok().map(|placement| placement.cost);
        // A search that ended by itself would end there again.
        if found.1 >= EARLY.as_secs_f64() {
            found = within(BUDGET);
        }
        let (result, seconds, peak_memory) = found;
        let (rules, objective, hosts) = match goal {
            Goal::Contiguous => (" (contiguous)", "load of the busiest device, ms", Hosts::Counted),
            Goal::Free => (" (any)", "load of the busiest device, ms", Hosts::Counted),
            Goal::Latency => ("", "latency of one sample, ms", Hosts::Unlimited),
        };
        let mut row = Row {
            instance: format!("{}{rules}", self.name),
            objective,
            ours: None,
            best_known: known(&self.stem, self.input.ids.len(), goal),
            bound: None,
            seconds,
            after_a_second: early,
            peak_memory,
            note: String::new(),
        };
        let placement = match result {
            Ok(placement) => placement,
            Err(e) => {
                row.note = e.to_string();
                return row;
            }
        };
        let placed: Vec<_> = self.input.ids.iter().copied().zip(placement.device.iter().copied()).collect();
        let checked = match verify(&self.text, &placed, hosts) {
            Ok(checked) => checked,
            Err(e) => {
                row.note = format!("wrong: {e}");
                return row;
            }
        };
        let value = match goal {
            Goal::Contiguous => Some(checked.max_load).filter(|_| checked.contiguous),
            Goal::Free => Some(checked.max_load),
            Goal::Latency => checked.latency,
        };
        let Some(value) = value else {
            row.note = "wrong: devices wait for each other".to_owned();
            return row;
        };
        if (value - placement.cost).abs() > 1e-6 * value.abs().max(1e-6) {
            row.note = format!("wrong: the solver counted {}; ", placement.cost);
        }
        // Sums in another order differ in the last digits.
        let optimal = placement.bound >= value * (1.0 - 1e-9);
        row.ours = Some(value);
        row.bound = Some(if optimal { value } else { placement.bound });
        row.note += &self.shape(&placement);
        if optimal {
            row.note += ", optimal";
        }
        row
    }

    /// Ops on each device.
    fn shape(&self, placement: &Placement) -> String {
        let mut counts = std::collections::BTreeMap::new();
        placement.device.iter().for_each(|d| *counts.entry(*d).or_insert(0_usize) += 1);
        use crate::plan::place::Device;
        let list = |host: bool| {
            let of_kind = counts.iter().filter(|(d, _)| matches!(d, Device::Host(_)) == host);
            of_kind.map(|(_, n)| n.to_string()).collect::<Vec<_>>().join("+")
        };
        let (accelerators, hosts) = (list(false), list(true));
        match (accelerators.is_empty(), hosts.is_empty()) {
            (false, true) => format!("ops {accelerators}"),
            (true, _) => format!("ops on hosts {hosts}"),
            (false, false) => format!("ops {accelerators}, on hosts {hosts}"),
        }
    }
}

#[cfg(test)]
mod tests;
