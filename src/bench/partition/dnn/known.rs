//! Figures of others for the inputs of msr-fiddle/dnn-partitioning.
//!
//! Inputs are told by the letters and digits of their name and by how many nodes they have: layer and operator graphs of
//! one network share a name.

use super::super::Known;

/// What is minimised, and under which rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    Contiguous,
    Free,
    Latency,
}

const DP: &str = "optimum, dp.exe of msr-fiddle/dnn-partitioning at b207b6a or another exact program, rerun";
const PROVEN: &str = "CP-SAT 9.15, proven optimal";
const SOLVER: &str = "CP-SAT 9.15 or annealing, 240-600 s";
const ROUNDED: &str = "CP-SAT 9.15 or annealing, times rounded to 0.0001; 130.038 exactly for the same split";
const ROUNDED_TRAINING: &str = "CP-SAT 9.15 or annealing, times rounded to 0.0001; 373.424 exactly for the same split";
const GREEDY: &str = "greedy.cpp of msr-fiddle/dnn-partitioning at b207b6a, rerun";
const SPLIT: &str =
    "max-load split of dp.exe in greedy.cpp, msr-fiddle/dnn-partitioning at b207b6a, rerun; fits the memory";
const LATENCY_SOLVER: &str = "CP-SAT 9.15, 300 s";

/// Letters and digits of the name, nodes, goal, figure.
const FIGURES: &[(&str, usize, Goal, f64, &str)] = &[
    ("bert24inference", 32, Goal::Contiguous, 17.790, DP),
    ("bert24training", 64, Goal::Contiguous, 41.746, DP),
    ("resnet50inference", 177, Goal::Contiguous, 33.775, DP),
    ("resnet50training", 354, Goal::Contiguous, 78.632, DP),
    ("inceptionv3inference", 326, Goal::Contiguous, 51.552, DP),
    ("inceptionv3training", 652, Goal::Contiguous, 122.762, DP),
    ("bertl3inference", 235, Goal::Contiguous, 27.919, DP),
    ("bertl3training", 600, Goal::Contiguous, 65.303, DP),
    ("bertl12inference", 783, Goal::Contiguous, 147.478, DP),
    ("bertl12training", 2012, Goal::Contiguous, 437.998, DP),
    ("bert24inference", 32, Goal::Free, 17.715, PROVEN),
    ("bert24training", 64, Goal::Free, 39.790, PROVEN),
    ("resnet50inference", 177, Goal::Free, 33.423, SOLVER),
    ("resnet50training", 354, Goal::Free, 76.728, SOLVER),
    ("inceptionv3inference", 326, Goal::Free, 51.326, SOLVER),
    ("inceptionv3training", 652, Goal::Free, 117.416, SOLVER),
    ("bertl3inference", 235, Goal::Free, 21.908, PROVEN),
    ("bertl3training", 600, Goal::Free, 54.207, PROVEN),
    ("bertl12inference", 783, Goal::Free, 130.037, ROUNDED),
    ("bertl12training", 2012, Goal::Free, 373.420, ROUNDED_TRAINING),
    ("bert24inference", 32, Goal::Latency, 100.22, GREEDY),
    ("resnet50inference", 177, Goal::Latency, 1443.8, SPLIT),
    ("inceptionv3inference", 326, Goal::Latency, 1851.1, SPLIT),
    ("bertl3inference", 235, Goal::Latency, 408.47, LATENCY_SOLVER),
    ("bertl12inference", 783, Goal::Latency, 867.8, GREEDY),
];

/// The best figure for an input, if there is any.
pub fn known(stem: &str, n_nodes: usize, goal: Goal) -> Option<Known> {
    let name: String = stem.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect();
    let figure = FIGURES.iter().find(|f| f.0 == name && f.1 == n_nodes && f.2 == goal)?;
    Some(Known { value: figure.3, source: figure.4 })
}
