//! Profiles of PipeDream: stages with replicas, least time of the slowest stage or transfer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Family, InputError, Known, Row, files, measured};
use crate::plan::stages::dag::Dag;
use crate::plan::stages::replicated::{Costs, Network, Pipeline, solve};

pub const FAMILY: Family = Family {
    name: "pipedream",
    about: "PipeDream profiles (graph.txt): replicated stages on 4, 16 and 4 x 4 devices",
    run,
};

/// Networks of the rows: PipeDream's own experiments use 1.25 GB/s between machines and 15.75 GB/s in them.
const NETWORKS: [(&str, Network); 3] = [
    ("4", Network { n_machines: 1, per_machine: 4, within: 1.25e9, between: 1.25e9 }),
    ("16", Network { n_machines: 1, per_machine: 16, within: 1.25e9, between: 1.25e9 }),
    ("4x4", Network { n_machines: 4, per_machine: 4, within: 15.75e9, between: 1.25e9 }),
];

/// Most prefixes of a graph that are searched one and all.
const BUDGET: usize = 300_000;

fn run(directory: &Path, report: &mut dyn FnMut(Row)) -> Result<(), InputError> {
    let paths = files(directory, "graph.txt")?;
    if paths.is_empty() {
        return Err(InputError::Nothing { family: FAMILY.name, path: directory.to_owned() });
    }
    for path in paths {
        let malformed = |message: String| InputError::Malformed { path: PathBuf::from(&path), message };
        let text = std::fs::read_to_string(&path).map_err(|source| InputError::Read { path: path.clone(), source })?;
        let profile = parse(&text).map_err(malformed)?;
        let dag = Dag::new(profile.compute.len(), &profile.edges).map_err(|e| malformed(e.to_string()))?;
        let folder = path.parent().and_then(Path::file_name).unwrap_or_default();
        let name = folder.to_string_lossy().into_owned();
        for (devices, network) in NETWORKS {
            report(row(&name, devices, &profile, &dag, &network));
        }
    }
    Ok(())
}

fn row(name: &str, devices: &'static str, profile: &Profile, dag: &Dag, network: &Network) -> Row {
    let costs = Costs { compute: &profile.compute, params: &profile.params, output: &profile.output };
    let (found, seconds, peak_memory) = measured(|| solve(dag, &costs, network, BUDGET));
    let n_nodes = profile.compute.len();
    let best_known = PUBLISHED.iter().find(|p| (p.0, p.1, p.2) == (name, n_nodes, devices)).map(|p| p.3);
    let mut row = Row {
        instance: format!("{name} on {devices}"),
        objective: "seconds per minibatch of the slowest stage or transfer",
        ours: None,
        best_known,
        bound: None,
        seconds,
        after_a_second: None,
        peak_memory,
        note: String::new(),
    };
    let plan = match found {
        Ok(plan) => plan,
        Err(e) => return Row { note: e.to_string(), ..row },
    };
    match verify(profile, network, &plan) {
        Ok(value) => row.ours = Some(value),
        Err(wrong) => return Row { note: wrong, ..row },
    }
    let computing = profile.compute.iter().sum::<f64>() / (network.n_machines * network.per_machine) as f64;
    let (bound, how) = if !plan.optimal {
        (computing, format!("too many prefixes, not all of {BUDGET}+ searched; bound is computing alone"))
    } else if network.n_machines == 1 {
        (plan.seconds, "optimal".to_owned())
    } else {
        // With fast links everywhere no placement can be slower.
        let n_devices = network.n_machines * network.per_machine;
        let flat = Network { n_machines: 1, per_machine: n_devices, ..*network };
        let bound = solve(dag, &costs, &flat, BUDGET).map_or(computing, |p| p.seconds);
        (bound, "optimal among consecutive places; bound has fast links everywhere".to_owned())
    };
    row.bound = Some(bound);
    row.note = format!("{}; {how}", describe(&plan, network));
    row
}

/// Replicas of each stage, as in PipeDream's own plans; 3x2 are three on each of two machines.
fn describe(plan: &Pipeline, network: &Network) -> String {
    let stage = |devices: &[usize]| {
        let machines: std::collections::BTreeSet<usize> = devices.iter().map(|d| d / network.per_machine).collect();
        match machines.len() {
            1 => devices.len().to_string(),
            n if devices.len().is_multiple_of(n) => format!("{}x{n}", devices.len() / n),
            _ => format!("{} over machines", devices.len()),
        }
    };
    plan.stages.iter().map(|s| stage(&s.devices)).collect::<Vec<_>>().join("-")
}

const OPTIMIZER: &str = "PipeDream's own optimizer (commit 7db6a1c), rerun with compression ratio 1";
const FLAT: &str = "PipeDream's own optimizer (commit 7db6a1c), rerun: flat plan for 16 devices on slow links";

/// Profile, nodes, devices, figure.
const PUBLISHED: &[(&str, usize, &str, Known)] = &[
    ("vgg16", 40, "4", Known { value: 0.17635, source: OPTIMIZER }),
    ("vgg16", 40, "16", Known { value: 0.05479, source: OPTIMIZER }),
    // Its plan in two levels takes 0.06660.
    ("vgg16", 40, "4x4", Known { value: 0.05479, source: FLAT }),
    ("alexnet", 22, "4", Known { value: 0.03246, source: OPTIMIZER }),
    ("alexnet", 22, "16", Known { value: 0.01510, source: OPTIMIZER }),
    ("alexnet", 22, "4x4", Known { value: 0.01510, source: OPTIMIZER }),
    ("resnet50", 176, "4", Known { value: 0.15199, source: OPTIMIZER }),
    ("resnet50", 176, "16", Known { value: 0.04385, source: OPTIMIZER }),
    ("resnet50", 176, "4x4", Known { value: 0.04321, source: OPTIMIZER }),
    ("resnet101", 346, "4", Known { value: 0.11418, source: OPTIMIZER }),
    ("resnet101", 346, "16", Known { value: 0.04182, source: OPTIMIZER }),
    // Its plan in two levels takes 0.05271.
    ("resnet101", 346, "4x4", Known { value: 0.04182, source: FLAT }),
];

/// A profile without its inputs and without tuple elements that nobody reads, as PipeDream's optimizer has it.
#[derive(Debug, PartialEq)]
struct Profile {
    /// Seconds per minibatch, forward and backward.
    compute: Vec<f64>,
    params: Vec<f64>,
    output: Vec<f64>,
    edges: Vec<(usize, usize)>,
}

/// Reads `node<ID> -- <description> -- forward_compute_time=.., backward_compute_time=.., activation_size=..,
/// parameter_size=..[ -- stage_id=..]` and, after a tab, `node<ID> -- node<ID>`.
///
/// Times are milliseconds per minibatch; activations may be a list `[a; b]`, which is added up.
fn parse(text: &str) -> Result<Profile, String> {
    let mut number: BTreeMap<&str, usize> = BTreeMap::new();
    let mut about = Vec::new();
    let mut values: Vec<[f64; 4]> = Vec::new();
    let mut pairs = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let at = at + 1;
        if line.trim().is_empty() {
            continue;
        }
        let fields: Vec<&str> = line.trim().split(" -- ").map(str::trim).collect();
        if line.starts_with('\t') {
            let &[from, to] = &fields[..] else { return Err(format!("line {at}: an edge is `node1 -- node2`")) };
            pairs.push((at, from, to));
            continue;
        }
        // Descriptions hold about anything.
        let costs = fields.iter().position(|f| f.starts_with("forward_compute_time=")).filter(|&i| i >= 2);
        let costs = costs.ok_or_else(|| format!("line {at}: no node with forward_compute_time"))?;
        if number.insert(fields[0], values.len()).is_some() {
            return Err(format!("line {at}: {} is there already", fields[0]));
        }
        about.push(fields[1]);
        values.push(read_costs(fields[costs]).map_err(|e| format!("line {at}: {e}"))?);
    }
    let find = |at: usize, name: &str| number.get(name).copied().ok_or(format!("line {at}: {name} is no node"));
    let edges = pairs.iter().map(|&(at, a, b)| Ok((find(at, a)?, find(at, b)?))).collect::<Result<Vec<_>, String>>()?;
    let n = values.len();
    let (mut is_read, mut reads) = (vec![false; n], vec![false; n]);
    for &(from, to) in &edges {
        (is_read[from], reads[to]) = (true, true);
    }
    let dropped =
        |v: usize| about[v].starts_with("Input") && !reads[v] || about[v].starts_with("__getitem__") && !is_read[v];
    let kept: Vec<usize> = (0..n).filter(|&v| !dropped(v)).collect();
    let mut place = vec![None; n];
    kept.iter().enumerate().for_each(|(i, &v)| place[v] = Some(i));
    let column = |c: &dyn Fn(&[f64; 4]) -> f64| kept.iter().map(|&v| c(&values[v])).collect::<Vec<f64>>();
    Ok(Profile {
        compute: column(&|x| (x[0] + x[1]) / 1000.0),
        params: column(&|x| x[3]),
        output: column(&|x| x[2]),
        edges: edges.iter().filter_map(|&(a, b)| Some((place[a]?, place[b]?))).collect(),
    })
}

fn read_costs(text: &str) -> Result<[f64; 4], String> {
    const NAMES: [&str; 4] = ["forward_compute_time", "backward_compute_time", "activation_size", "parameter_size"];
    let mut values = [f64::NAN; 4];
    for field in text.split(", ") {
        let (name, value) = field.split_once('=').ok_or_else(|| format!("{field:?} is not name=value"))?;
        let Some(i) = NAMES.iter().position(|&n| n == name) else { continue };
        let list = value.trim().trim_start_matches('[').trim_end_matches(']');
        let parts = list.split(';').map(|x| x.trim().parse::<f64>());
        values[i] = parts.sum::<Result<f64, _>>().map_err(|_| format!("{name} is {value:?}, not a number"))?;
        if !(values[i] >= 0.0 && values[i].is_finite()) {
            return Err(format!("{name} is {value}; it must be a finite number, at least 0"));
        }
    }
    match NAMES.iter().zip(values).find(|(_, v)| v.is_nan()) {
        Some((name, _)) => Err(format!("{name} is missing")),
        None => Ok(values),
    }
}

/// Seconds of the slowest stage or transfer, from the profile and the devices of each stage alone.
fn verify(profile: &Profile, network: &Network, plan: &Pipeline) -> Result<f64, String> {
    let n_devices = network.n_machines * network.per_machine;
    let mut stage_of = vec![None; profile.compute.len()];
    let mut taken = vec![false; n_devices];
    for (s, stage) in plan.stages.iter().enumerate() {
        for &v in &stage.nodes {
            if stage_of[v].replace(s).is_some() {
                return Err(format!("node {v} is in two stages"));
            }
        }
        for &d in &stage.devices {
            if d >= n_devices || std::mem::replace(&mut taken[d], true) {
                return Err(format!("device {d} is not there or taken twice"));
            }
        }
        if stage.nodes.is_empty() || stage.devices.is_empty() {
            return Err(format!("stage {s} is empty"));
        }
    }
    let stage_of = stage_of.into_iter().collect::<Option<Vec<usize>>>().ok_or("a node has no stage")?;
    if let Some(&(a, b)) = profile.edges.iter().find(|&&(a, b)| stage_of[a] > stage_of[b]) {
        return Err(format!("node {b} runs before node {a}, which it needs"));
    }
    let on_machines: Vec<Vec<usize>> = plan
        .stages
        .iter()
        .map(|s| {
            let on = |m| s.devices.iter().filter(|&&d| d / network.per_machine == m).count();
            (0..network.n_machines).map(on).collect()
        })
        .collect();
    // The same number of devices on each machine that has any.
    let even = |counts: &[usize]| {
        let used: Vec<usize> = counts.iter().copied().filter(|&c| c > 0).collect();
        used.windows(2).all(|w| w[0] == w[1])
    };
    let mut worst: f64 = 0.0;
    for (s, stage) in plan.stages.iter().enumerate() {
        let compute: f64 = stage.nodes.iter().map(|&v| profile.compute[v]).sum();
        let params: f64 = stage.nodes.iter().map(|&v| profile.params[v]).sum();
        let share = |time: f64, m: usize, bandwidth: f64, links: usize| {
            let m = m as f64;
            (time + 4.0 * (m - 1.0) * params / (m * bandwidth) / links as f64) / m
        };
        let m = stage.devices.len();
        let machines = on_machines[s].iter().filter(|&&c| c > 0).count();
        let time = if machines == 1 {
            share(compute, m, network.within, 1)
        } else {
            let ring = share(compute, m, network.between, 1);
            let each = m / machines;
            let levels = share(share(compute, each, network.within, 1), machines, network.between, each);
            if even(&on_machines[s]) { ring.min(levels) } else { ring }
        };
        worst = worst.max(time);
        let Some(next) = plan.stages.get(s + 1) else { continue };
        // Whatever is made up to here and read later crosses, once.
        let mut crosses = vec![false; stage_of.len()];
        for &(a, b) in &profile.edges {
            crosses[a] |= stage_of[a] <= s && stage_of[b] > s;
        }
        let bytes: f64 = (0..crosses.len()).filter(|&v| crosses[v]).map(|v| profile.output[v]).sum();
        let (here, there) = (&on_machines[s], &on_machines[s + 1]);
        let same = here.iter().zip(there).all(|(x, y)| (*x > 0) == (*y > 0));
        let bandwidth = if same && even(here) && even(there) { network.within } else { network.between };
        worst = worst.max(2.0 * bytes / (bandwidth * m.min(next.devices.len()) as f64));
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::stages::replicated::Stage;

    const PROFILE: &str = "node1 -- Input -- forward_compute_time=9.0, backward_compute_time=0.0, activation_size=9.0, parameter_size=0.0
node3 -- Split(a=1,  b=(2, 3)) -- forward_compute_time=1000.0, backward_compute_time=0.0, activation_size=[2.0; 3.0], parameter_size=0.0
node2 -- Conv2d(3, 64) -- forward_compute_time=1000.0, backward_compute_time=3000.0, activation_size=6.0, parameter_size=8.0 -- stage_id=0
node4 -- __getitem__ -- forward_compute_time=0.0, backward_compute_time=0.0, activation_size=9.0, parameter_size=0.0
\tnode1 -- node2
\tnode2 -- node3
\tnode3 -- node4";

    #[test]
    fn profiles_are_read_without_inputs_and_unread_elements() {
        let profile = parse(PROFILE).unwrap();
        assert_eq!((profile.compute, profile.params), (vec![1.0, 4.0], vec![0.0, 8.0]));
        assert_eq!((profile.output, profile.edges), (vec![5.0, 6.0], vec![(1, 0)]));
    }

    #[test]
    fn damaged_profiles_say_what_is_wrong_where() {
        let costs = "forward_compute_time=1, backward_compute_time=1, activation_size=1, parameter_size=1";
        for (text, words) in [
            ("node1 -- a".to_owned(), "line 1: no node"),
            (format!("node1 -- a -- {costs}\nnode1 -- b -- {costs}"), "line 2: node1 is there already"),
            (format!("node1 -- a -- {costs}\n\tnode1 -- node2"), "line 2: node2 is no node"),
            (format!("node1 -- a -- {costs}\n\tnode1"), "line 2: an edge"),
            (format!("node1 -- a -- {}", costs.replace("size=1", "size=NaN")), "activation_size is NaN"),
            (
                format!("node1 -- a -- {}", costs.replace("backward_compute_time=1", "backward_compute_time=-1")),
                "is -1",
            ),
            (format!("node1 -- a -- {}", costs.replace("parameter_size=1", "parameter_size=")), "not a number"),
            (format!("node1 -- a -- {}", costs.replace(", parameter_size=1", "")), "parameter_size is missing"),
        ] {
            let message = parse(&text).unwrap_err();
            assert!(message.contains(words), "{text}: {message}");
        }
    }

    #[test]
    fn the_verifier_adds_up_by_the_formula_and_sees_bad_plans() {
        let profile = parse(PROFILE).unwrap();
        let stage = |nodes: &[usize], devices: &[usize]| Stage { nodes: nodes.to_vec(), devices: devices.to_vec() };
        let plan = |stages: &[Stage]| Pipeline { stages: stages.to_vec(), seconds: 0.0, optimal: false };
        let network = Network { n_machines: 2, per_machine: 2, within: 4.0, between: 1.0 };
        let check = |stages: &[Stage]| verify(&profile, &network, &plan(stages));
        // All-reduce of 8 B on 2 devices: 4 * 8 / (2 * 4 B/s) = 4 s; halves of 4 s + 4 s.
        assert_eq!(check(&[stage(&[0, 1], &[0, 1])]), Ok((5.0 + 4.0) / 2.0));
        // The border of 6 B between machines: 2 * 6 / 1 s.
        assert_eq!(check(&[stage(&[1], &[0, 1]), stage(&[0], &[2])]), Ok(12.0));
        assert_eq!(check(&[stage(&[1], &[0]), stage(&[0], &[1])]), Ok(4.0));
        // Both machines run both stages: all-reduce between them 4 * 8 / (2 * 1) = 16 s.
        assert_eq!(check(&[stage(&[1], &[0, 2]), stage(&[0], &[1, 3])]), Ok((4.0 + 16.0) / 2.0));
        for bad in [
            &[stage(&[0], &[0]), stage(&[1], &[1])][..],
            &[stage(&[1], &[0]), stage(&[0], &[0])],
            &[stage(&[1], &[0]), stage(&[0, 1], &[1])],
            &[stage(&[1], &[0])],
            &[stage(&[0, 1], &[4])],
            &[stage(&[0, 1], &[])],
        ] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn profiles_get_a_row_for_each_network() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("toy");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("graph.txt"), PROFILE).unwrap();
        let mut rows = Vec::new();
        run(directory.path(), &mut |row| rows.push(row)).unwrap();
        let names: Vec<&str> = rows.iter().map(|r| &*r.instance).collect();
        assert_eq!(names, ["toy on 4", "toy on 16", "toy on 4x4"]);
        for row in &rows {
            assert!(row.ours.unwrap() >= row.bound.unwrap() * (1.0 - 1e-9), "{row:?}");
        }
        assert_eq!(rows[0].ours, rows[0].bound);
        std::fs::write(folder.join("graph.txt"), format!("{PROFILE}\n\tnode3 -- node2")).unwrap();
        let refused = run(directory.path(), &mut |_| {}).unwrap_err();
        assert!(refused.to_string().contains("cycle"), "{refused}");
    }
}
