//! Reader, verifier and rows on inputs small enough to count by hand.

use super::read::{Bad, read};
use super::verify::{Checked, Hosts, Wrong, verify};
use super::*;
use crate::plan::place::Device::{self, Accelerator, Host};

/// Three nodes in a row, and a reader of the first.
const SMALL: &str = r#"{"maxSizePerFPGA": 10.0, "maxFPGAs": 2, "maxCPUs": 1, "nodes": [
    {"id": 7, "supportedOnFpga": 1, "cpuLatency": 8, "fpgaLatency": 2.0, "isBackwardNode": 0, "size": 4},
    {"id": 3, "supportedOnFpga": true, "cpuLatency": 9, "fpgaLatency": 3.0, "isBackwardNode": false, "colorClass": null},
    {"id": 5, "supportedOnFpga": 1, "cpuLatency": 7, "fpgaLatency": 1.0, "isBackwardNode": 0, "size": 7},
    {"id": 4, "supportedOnFpga": 0, "cpuLatency": 0.5, "fpgaLatency": 9, "isBackwardNode": 0}
  ], "edges": [
    {"sourceId": 7, "destId": 3, "cost": 0.25}, {"sourceId": 3, "destId": 5, "cost": 0.5},
    {"sourceId": 7, "destId": 4, "cost": 0.25}
  ]}"#;

fn check(devices: [Device; 4]) -> Result<Checked, Wrong> {
    verify(SMALL, &[7, 3, 5, 4].into_iter().zip(devices).collect::<Vec<_>>(), Hosts::Counted)
}

#[test]
fn a_tensor_is_paid_once_by_each_accelerator_it_leaves_or_enters() {
    let checked = check([Accelerator(0), Accelerator(1), Accelerator(1), Host(0)]).expect("allowed");
    // 2 + 0.25 on one, 0.25 + 3 + 1 on the other, 0.5 on the host; in time 2.25 + 4.25.
    assert_eq!(checked, Checked { max_load: 4.25, contiguous: true, latency: Some(6.5) });
}

#[test]
fn devices_that_wait_for_each_other_are_not_contiguous() {
    let checked = check([Accelerator(0), Host(0), Accelerator(0), Host(0)]);
    assert_eq!(checked, Err(Wrong::Memory(0, 11.0, 10.0)));
    let roomy = SMALL.replace("10.0", "11.0");
    let placed = [(7, Accelerator(0)), (3, Host(0)), (5, Accelerator(0)), (4, Host(0))];
    let checked = verify(&roomy, &placed, Hosts::Counted).expect("allowed");
    assert_eq!(checked, Checked { max_load: 9.5, contiguous: false, latency: None });
}

#[test]
fn placements_that_break_a_rule_are_refused() {
    let [a, b, h] = [Accelerator(0), Accelerator(1), Host(0)];
    assert_eq!(check([a, a, b, a]), Err(Wrong::Unsupported(4)));
    assert_eq!(check([Accelerator(2), a, b, h]), Err(Wrong::NoSuchDevice(7, Accelerator(2))));
    assert_eq!(check([a, a, b, Host(1)]), Err(Wrong::NoSuchDevice(4, Host(1))));
    let placed = [(7, a), (3, a), (4, h)];
    assert_eq!(verify(SMALL, &placed, Hosts::Counted), Err(Wrong::Missing(5)));
    let coloured =
        SMALL.replace("\"size\": 4", "\"colorClass\": 1").replace("\"colorClass\": null", "\"colorClass\": 1");
    let placed = [(7, a), (3, b), (5, a), (4, h)];
    assert_eq!(verify(&coloured, &placed, Hosts::Counted), Err(Wrong::Apart(7, 3)));
}

#[test]
fn bad_files_name_the_node_or_edge() {
    assert!(read(SMALL).is_ok());
    let of = |from: &str, to: &str| {
        assert!(SMALL.contains(from), "{from}");
        read(&SMALL.replacen(from, to, 1)).expect_err(to)
    };
    assert!(matches!(of("\"id\": 5", "\"id\": 7"), Bad::DuplicateId { id: 7 }));
    assert!(matches!(of("\"destId\": 5", "\"destId\": 6"), Bad::MissingId { edge: 1, id: 6 }));
    assert!(matches!(of("\"destId\": 3", "\"destId\": 7"), Bad::Op { id: 7, .. }), "its own reader");
    assert!(matches!(of("\"destId\": 5", "\"destId\": 7"), Bad::Op { id: 7 | 3, .. }), "a cycle");
    assert!(matches!(of("4, \"cost\": 0.25", "4, \"cost\": 0.75"), Bad::Costs { edge: 2, id: 7, .. }));
    assert!(matches!(of("\"cost\": 0.5", "\"cost\": -1"), Bad::Op { id: 3, .. }));
    assert!(matches!(of("\"fpgaLatency\": 2.0", "\"fpgaLatency\": -2.0"), Bad::Op { id: 7, .. }));
    assert!(matches!(of("\"fpgaLatency\": 9", "\"fpgaLatency\": -9"), Bad::Op { id: 4, .. }), "though not used");
    assert!(matches!(of("\"cpuLatency\": 8", "\"cpuLatency\": 1e308"), Bad::Op { id: 7, .. }), "sums overflow");
    assert!(matches!(of("\"cpuLatency\": 8", "\"cpuLatency\": 1e999"), Bad::Json(_)));
    assert!(matches!(of("\"supportedOnFpga\": 0", "\"supportedOnFpga\": 2"), Bad::Flag { id: 4, .. }));
    assert!(matches!(of("\"maxFPGAs\": 2", "\"maxFPGAs\": 2.5"), Bad::Count { field: "maxFPGAs", .. }));
    assert!(matches!(of("\"maxCPUs\": 1", "\"maxCPUs\": -1"), Bad::Count { field: "maxCPUs", .. }));
    assert!(matches!(of("10.0", "-1"), Bad::Problem(_)));
    assert!(matches!(of("{\"id\": 4", "{\"no\": 4"), Bad::Json(_)));
    assert!(matches!(read(&SMALL[..SMALL.len() / 2]), Err(Bad::Json(_))));
}

#[test]
fn a_directory_gives_rows_for_both_goals_and_for_latency() {
    let directory = tempfile::tempdir().expect("a directory");
    let write = |text: &str| std::fs::write(directory.path().join("small.json"), text).expect("written");
    let mut rows = Vec::new();
    write(SMALL);
    latency(directory.path(), &mut |row| rows.push(row)).expect("runs");
    // With room for 7 and 5 together.
    write(&SMALL.replace("10.0", "11.0"));
    max_load(directory.path(), &mut |row| rows.push(row)).expect("runs");
    let found: Vec<_> = rows.iter().map(|row| (row.ours, row.bound)).collect();
    // 7 before 3 and 5; the same; 3 apart from 7 and 5: each optimal.
    assert_eq!(found, [6.5, 4.25, 3.75].map(|x| (Some(x), Some(x))), "{rows:?}");
    write(&SMALL.replace("10.0", "-1"));
    assert!(matches!(max_load(directory.path(), &mut |_| ()), Err(InputError::Malformed { .. })));
}
