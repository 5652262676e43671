//! Modules as JAX writes them, and the same modules damaged.

use std::path::{Path, PathBuf};

use foreshard::graph::export::to_hlo;
use foreshard::graph::import::from_hlo;
use foreshard::graph::passes::{Limits, normalise};
use foreshard::graph::verify::verify;
use proptest::prelude::*;

/// Every HLO module under version control.
fn modules() -> Vec<PathBuf> {
    fn walk(directory: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "pb") {
                out.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new("bundles"), &mut found);
    walk(Path::new("tests/data/hlo"), &mut found);
    found.sort();
    found
}

#[test]
fn accepts_everything_jax_writes_before_and_after_the_passes() {
    let all = modules();
    assert!(all.len() > 10);
    for path in all {
        let graph = from_hlo(&std::fs::read(&path).unwrap()).unwrap();
        verify(&graph).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let flat = normalise(&graph, Limits::default(), &[], &[]).unwrap().graph;
        verify(&flat).unwrap_or_else(|e| panic!("{} after the passes: {e}", path.display()));
        let again = from_hlo(&to_hlo(&flat, &[])).unwrap();
        assert_eq!(again.n_ops(), flat.n_ops(), "{}", path.display());
    }
}

#[test]
fn sees_an_op_whose_result_has_another_shape() {
    let bytes = std::fs::read("tests/data/hlo/mix.hlo.pb").unwrap();
    let good = from_hlo(&bytes).unwrap();
    let mut seen = 0;
    for (id, op) in
        good.ops().filter(|(_, o)| matches!(&*o.opcode, "dot" | "reduce" | "broadcast" | "select" | "slice"))
    {
        let mut bad = foreshard::graph::Graph::new("bad");
        for c in good.computations() {
            bad.push_computation(c.clone());
        }
        for (other, copy) in good.ops() {
            let mut copy = copy.clone();
            if other == id
                && let foreshard::graph::Shape::Array(a) = &mut copy.shape
            {
                a.dims.push(3);
            }
            bad.push(copy);
        }
        let e = verify(&bad).expect_err(&op.name).to_string();
        assert!(e.contains(&op.name) || e.contains("op "), "{e}");
        seen += 1;
    }
    assert!(seen >= 4, "{seen}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever a damaged file holds, reading it ends in a graph or an error, and what is accepted can be written.
    #[test]
    fn damaged_modules_never_panic(at in 0usize..30_000, byte: u8, cut in 0usize..30_000) {
        for name in ["scan", "mix"] {
            let mut bytes = std::fs::read(format!("tests/data/hlo/{name}.hlo.pb")).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            for bytes in [&bytes[..], &bytes[..cut.min(bytes.len())]] {
                if let Ok(graph) = from_hlo(bytes)
                    && verify(&graph).is_ok()
                    && let Ok(flat) = normalise(&graph, Limits { ops: 100_000, ..Limits::default() }, &[], &[])
                {
                    let _ = to_hlo(&flat.graph, &[]);
                }
            }
        }
    }
}
