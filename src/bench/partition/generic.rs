//! Undirected graphs in the text format of METIS: least edge cut at 3 % imbalance.

use std::path::{Path, PathBuf};

use super::{Family, InputError, Known, Row, files, measured};
use crate::plan::multilevel::{Wanted, Weighted, partition};

pub const FAMILY: Family = Family {
    name: "generic",
    about: "undirected graphs (METIS): edge cut at 3 % imbalance, into 2, 8 and 64 parts",
    run,
};

const PARTS: [usize; 3] = [2, 8, 64];
const IMBALANCE: f64 = 0.03;
const SEED: u64 = 1;

fn run(directory: &Path, report: &mut dyn FnMut(Row)) -> Result<(), InputError> {
    let paths = files(directory, ".graph")?;
    if paths.is_empty() {
        return Err(InputError::Nothing { family: FAMILY.name, path: directory.to_owned() });
    }
    for path in paths {
        let text = std::fs::read_to_string(&path).map_err(|source| InputError::Read { path: path.clone(), source })?;
        let rows = parse(&text).map_err(|message| malformed(&path, message))?;
        let graph = Weighted::new(rows.starts.clone(), rows.to.clone(), rows.edge.clone(), rows.vertex.clone())
            .map_err(|e| malformed(&path, format!("{e} (vertices counted from 0)")))?;
        drop(text);
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for n_parts in PARTS {
            report(row(&name, &rows, &graph, n_parts));
        }
    }
    Ok(())
}

fn malformed(path: &Path, message: String) -> InputError {
    InputError::Malformed { path: PathBuf::from(path), message }
}

fn row(name: &str, rows: &Rows, graph: &Weighted, n_parts: usize) -> Row {
    let wanted = Wanted { n_blocks: n_parts, imbalance: IMBALANCE, seed: SEED };
    let (found, seconds, peak_memory) = measured(|| partition(graph, &wanted));
    let published = PUBLISHED.iter().find(|p| {
        (p.name, p.n_vertices, p.n_edges, p.n_parts) == (name, rows.vertex.len(), rows.to.len() / 2, n_parts)
    });
    let (ours, note) = match found {
        Err(e) => (None, e.to_string()),
        Ok(found) => match verify(rows, &found.of, n_parts) {
            Err(wrong) => (None, wrong),
            Ok(checked) => {
                let metis = published.map_or(String::new(), |p| format!("; METIS {}", p.metis));
                let over = if checked.heaviest > wanted.limit(graph) { ": vertices too heavy for 3 %" } else { "" };
                (Some(checked.cut as f64), format!("imbalance {:.4}{over}{metis}", checked.imbalance))
            }
        },
    };
    let best_known = published.map(|p| p.best);
    let instance = format!("{name} into {n_parts}");
    let bound = ours.map(|_| bound(rows, n_parts) as f64);
    Row { instance, objective: "edge cut", ours, best_known, bound, seconds, after_a_second: None, peak_memory, note }
}

/// Cuts at 3 % imbalance, one seed each, all from one series of reruns (METIS 5.1 by pymetis, KaHIP 3.25,
/// Mt-KaHyPar 1.7).
struct Published {
    name: &'static str,
    n_vertices: usize,
    n_edges: usize,
    n_parts: usize,
    metis: u64,
    best: Known,
}

const PUBLISHED: &[Published] = &[
    Published {
        name: "4elt",
        n_vertices: 15_606,
        n_edges: 45_878,
        n_parts: 2,
        metis: 159,
        best: Known { value: 137.0, source: "Mt-KaHyPar 1.7, highest quality, rerun" },
    },
    Published {
        name: "4elt",
        n_vertices: 15_606,
        n_edges: 45_878,
        n_parts: 8,
        metis: 679,
        best: Known { value: 534.0, source: "KaHIP 3.25 kaffpa strong, rerun" },
    },
    Published {
        name: "4elt",
        n_vertices: 15_606,
        n_edges: 45_878,
        n_parts: 64,
        metis: 2_869,
        best: Known { value: 2_640.0, source: "KaHIP 3.25 kaffpa strong, rerun" },
    },
];

/// A graph as the file lists it. The neighbours of vertex v are at `starts[v]..starts[v + 1]`.
#[derive(Debug, PartialEq)]
struct Rows {
    starts: Vec<usize>,
    to: Vec<u32>,
    edge: Vec<i64>,
    vertex: Vec<i64>,
}

/// Reads the format of the METIS manual (version 5.1, section 4.1.1).
///
/// The header is `n m [fmt [ncon]]`; the digits of fmt say whether rows begin with a size, with weights of the vertex,
/// and whether neighbours are followed by weights. Lines that begin with % are comments; an empty line is a vertex
/// without neighbours. Sizes matter for the volume of communication only and are skipped.
fn parse(text: &str) -> Result<Rows, String> {
    let mut lines = text.lines().enumerate().filter(|(_, l)| !l.trim_start().starts_with('%'));
    let (_, header) = lines.find(|(_, l)| !l.trim().is_empty()).ok_or("the header `n m [fmt [ncon]]` is missing")?;
    let fields: Vec<&str> = header.split_whitespace().collect();
    let count = |at: usize, what: &str| {
        let field = fields.get(at).ok_or_else(|| format!("the header has no {what}"))?;
        field.parse::<usize>().map_err(|_| format!("{what} in the header is {field:?}, not a number"))
    };
    let (n, m) = (count(0, "number of vertices")?, count(1, "number of edges")?);
    let fmt = *fields.get(2).unwrap_or(&"0");
    if fmt.len() > 3 || fmt.bytes().any(|b| b != b'0' && b != b'1') || fields.len() > 4 {
        return Err(format!("header {header:?}: fmt is up to three digits of 0 and 1, after it only ncon"));
    }
    let flag = |place: usize| fmt.bytes().rev().nth(place) == Some(b'1');
    let (has_edge, has_vertex, has_size) = (flag(0), flag(1), flag(2));
    let n_weights = if fields.len() == 4 { count(3, "ncon")? } else { usize::from(has_vertex) };
    if n_weights > 1 {
        return Err(format!("ncon is {n_weights}: only one weight per vertex can be balanced"));
    }
    // Every vertex takes a line, so a header that promises more than the file holds is known before memory is taken.
    if n > text.len() || m > text.len() {
        return Err(format!("the header promises {n} vertices and {m} edges, more than fit in {} bytes", text.len()));
    }
    let mut rows = Rows {
        starts: Vec::with_capacity(n + 1),
        to: Vec::with_capacity(2 * m),
        edge: Vec::with_capacity(2 * m),
        vertex: Vec::with_capacity(n),
    };
    rows.starts.push(0);
    for v in 0..n {
        let (at, line) = lines.next().ok_or_else(|| format!("{v} rows instead of {n}: the file is cut short"))?;
        let mut numbers = line
            .split_whitespace()
            .map(|field| field.parse::<i64>().map_err(|_| format!("line {}: {field:?} is not a whole number", at + 1)));
        let mut expect = |what: &str| numbers.next().unwrap_or_else(|| Err(format!("line {}: no {what}", at + 1)));
        if has_size {
            expect("vertex size")?;
        }
        rows.vertex.push(if has_vertex && n_weights == 1 { expect("vertex weight")? } else { 1 });
        while let Some(neighbour) = numbers.next() {
            let neighbour = neighbour?;
            if neighbour < 1 || neighbour > n as i64 {
                return Err(format!("line {}: neighbour {neighbour} is not between 1 and {n}", at + 1));
            }
            rows.to.push((neighbour - 1) as u32);
            let weight = if has_edge { numbers.next() } else { Some(Ok(1)) };
            rows.edge.push(weight.ok_or_else(|| format!("line {}: the last edge has no weight", at + 1))??);
        }
        rows.starts.push(rows.to.len());
    }
    if let Some((at, _)) = lines.find(|(_, l)| !l.trim().is_empty()) {
        return Err(format!("line {}: more rows than the {n} vertices of the header", at + 1));
    }
    if rows.to.len() != 2 * m {
        let found = rows.to.len();
        return Err(format!("the header promises {m} edges, but rows list {found} neighbours instead of {}", 2 * m));
    }
    Ok(rows)
}

/// What a partition is worth.
#[derive(Debug, PartialEq)]
struct Checked {
    cut: i64,
    heaviest: i64,
    /// Heaviest part over an even one.
    imbalance: f64,
}

/// Counts again, from the rows of the file alone.
fn verify(rows: &Rows, part: &[u32], n_parts: usize) -> Result<Checked, String> {
    if part.len() != rows.vertex.len() {
        return Err(format!("{} of {} vertices have a part", part.len(), rows.vertex.len()));
    }
    let mut weight = vec![0i64; n_parts];
    let mut size = vec![0usize; n_parts];
    let mut ends = 0;
    for v in 0..part.len() {
        let mine = part[v] as usize;
        if mine >= n_parts {
            return Err(format!("vertex {v} is in part {mine} of {n_parts}"));
        }
        weight[mine] += rows.vertex[v];
        size[mine] += 1;
        for e in rows.starts[v]..rows.starts[v + 1] {
            if part[rows.to[e] as usize] != part[v] {
                ends += rows.edge[e];
            }
        }
    }
    if let Some(empty) = size.iter().position(|&n| n == 0) {
        return Err(format!("part {empty} is empty"));
    }
    let heaviest = weight.iter().copied().max().unwrap_or(0);
    let total: i64 = weight.iter().sum();
    let imbalance = if total == 0 { 1.0 } else { heaviest as f64 * n_parts as f64 / total as f64 };
    Ok(Checked { cut: ends / 2, heaviest, imbalance })
}

/// No cut weighs less: the parts hang together by edges wherever the graph does, so that all but one of each component
/// need an edge that is cut.
fn bound(rows: &Rows, n_parts: usize) -> i64 {
    let mut root: Vec<u32> = (0..rows.vertex.len() as u32).collect();
    let find = |root: &mut [u32], mut v: u32| {
        while root[v as usize] != v {
            root[v as usize] = root[root[v as usize] as usize];
            v = root[v as usize];
        }
        v
    };
    let mut n_components = root.len();
    for v in 0..rows.vertex.len() {
        for &to in &rows.to[rows.starts[v]..rows.starts[v + 1]] {
            let (a, b) = (find(&mut root, v as u32), find(&mut root, to));
            if a != b {
                root[a as usize] = b;
                n_components -= 1;
            }
        }
    }
    // Every edge is listed at both of its ends.
    let mut weights = rows.edge.clone();
    weights.sort_unstable();
    weights.iter().step_by(2).take(n_parts.saturating_sub(n_components)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_below_every_partition_and_met_on_trees() {
        // Two paths with edges of weight 1, 2, 3 and 1.
        let paths = parse("6 4 1\n2 1\n1 1 3 2\n2 2 4 3\n3 3\n6 1\n5 1\n").unwrap();
        for n_parts in 2..=6usize {
            let all = (0..n_parts.pow(6)).map(|code| (0..6).map(move |v| (code / n_parts.pow(v) % n_parts) as u32));
            let least = all.filter_map(|p| verify(&paths, &p.collect::<Vec<u32>>(), n_parts).ok()).map(|c| c.cut).min();
            assert_eq!(Some(bound(&paths, n_parts)), least, "{n_parts} parts");
        }
    }

    #[test]
    fn every_format_of_the_manual_is_read() {
        // A triangle with a tail and a vertex of its own, in all flavours.
        let plain = parse("% a comment\n5 4\n2 3\n1 3\n1 2 4\n% another\n3\n\n").unwrap();
        assert_eq!(plain.starts, [0, 2, 4, 7, 8, 8]);
        assert_eq!(plain.to, [1, 2, 0, 2, 0, 1, 3, 2]);
        assert_eq!((plain.edge, plain.vertex), (vec![1; 8], vec![1; 5]));
        let weighted = parse("2 1 011\n7 2 9\n8 1 9\n").unwrap();
        assert_eq!((weighted.vertex, weighted.edge), (vec![7, 8], vec![9, 9]));
        assert_eq!(parse("2 1 1\n2 9\n1 9").unwrap().edge, [9, 9]);
        assert_eq!(parse("2 1 10 1\n5 2\n6 1").unwrap().vertex, [5, 6]);
        let sized = parse("2 1 110\n3 5 2\n3 6 1").unwrap();
        assert_eq!((sized.vertex, sized.to), (vec![5, 6], vec![1, 0]));
    }

    #[test]
    fn damaged_files_say_what_is_wrong_where() {
        for (text, words) in [
            ("", "header"),
            ("3\n", "number of edges"),
            ("3 x\n", "number of edges in the header is \"x\""),
            ("2 1 2\n2\n1\n", "fmt"),
            ("2 1 010 2\n1 1 2\n1 1 1\n", "ncon is 2"),
            ("3 2\n2\n1 3\n", "2 rows instead of 3"),
            ("2 1\n2\n1\n1\n", "line 4: more rows"),
            ("2 1\n3\n1\n", "line 2: neighbour 3"),
            ("2 1\n0\n1\n", "neighbour 0"),
            ("2 1\nx\n1\n", "\"x\" is not a whole number"),
            ("2 1\nNaN\n1\n", "not a whole number"),
            ("2 1 1\n2\n1 1\n", "no weight"),
            ("2 1 10\n\n1 1\n", "no vertex weight"),
            ("2 2\n2\n1\n", "promises 2 edges"),
            ("99999999999 1\n2\n1\n", "more than fit"),
            ("99999999999999999999 1\n2\n1\n", "not a number"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(words), "{text:?}: {message}");
        }
    }

    #[test]
    fn the_verifier_counts_cut_and_balance_and_sees_empty_parts() {
        let path = parse("4 3 011\n1 2 5\n1 1 5 3 7\n1 2 7 4 1\n3 3 1\n").unwrap();
        let checked = verify(&path, &[0, 0, 1, 1], 2).unwrap();
        assert_eq!(checked, Checked { cut: 7, heaviest: 4, imbalance: 4.0 / 3.0 });
        assert!(verify(&path, &[0, 0, 0, 0], 2).unwrap_err().contains("part 1 is empty"));
        assert!(verify(&path, &[0, 0, 2, 1], 2).is_err());
        assert!(verify(&path, &[0, 1], 2).is_err());
    }

    #[test]
    fn graphs_of_any_name_get_a_row_for_each_number_of_parts() {
        let directory = tempfile::tempdir().unwrap();
        let ring: String = (0..12).map(|v| format!("{} {}\n", (v + 11) % 12 + 1, (v + 1) % 12 + 1)).collect();
        std::fs::write(directory.path().join("ring.graph"), format!("12 12\n{ring}")).unwrap();
        let mut rows = Vec::new();
        run(directory.path(), &mut |row| rows.push(row)).unwrap();
        let ours: Vec<Option<f64>> = rows.iter().map(|r| r.ours).collect();
        assert_eq!(ours, [Some(2.0), Some(8.0), None]);
        assert!(rows[2].note.contains("ask for at most 12"), "{}", rows[2].note);
        std::fs::write(directory.path().join("lame.graph"), "2 1\n2\n\n").unwrap();
        let refused = run(directory.path(), &mut |_| {}).unwrap_err();
        assert!(matches!(refused, InputError::Malformed { .. }), "{refused}");
        let nothing = run(tempfile::tempdir().unwrap().path(), &mut |_| {}).unwrap_err();
        assert!(matches!(nothing, InputError::Nothing { .. }));
    }
}
