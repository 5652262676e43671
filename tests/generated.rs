//! Committed files that are made from the code: they must be what the code would make now. `UPDATE=1 cargo test --test
//! generated` writes them anew.

use std::path::Path;

use sha2::{Digest, Sha256};

/// Compares, or rewrites when asked to.
fn same(file: &str, made: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, made).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == made,
        "{file} is not what the code makes now; run UPDATE=1 cargo test --test generated, and look at the difference"
    );
}

#[test]
fn resource_definitions_are_up_to_date() {
    for (name, yaml) in foreshard::api::crds() {
        same(&format!("crds/{name}.yaml"), &yaml);
        same(&format!("charts/foreshard/files/crds/{name}.yaml"), &yaml);
    }
}

/// The chart makes the plain install (`make manifests`), which takes Helm; this much is seen without.
#[test]
fn the_plain_install_has_todays_resource_definitions() {
    use serde::Deserialize;
    use serde_yaml::Value;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests/install/foreshard.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let installed: Vec<Value> =
        serde_yaml::Deserializer::from_str(&text).map(|object| Value::deserialize(object).unwrap()).collect();
    for (name, yaml) in foreshard::api::crds() {
        let crd: Value = serde_yaml::from_str(&yaml).unwrap();
        let is_there = installed
            .iter()
            .any(|o| o["metadata"]["name"] == crd["metadata"]["name"] && alike(&o["spec"], &crd["spec"]));
        assert!(is_there, "manifests/install/foreshard.yaml has another {name} than the code; run make manifests");
    }
}

/// Whether two documents say the same: Helm writes 1.0 as 1.
fn alike(a: &serde_yaml::Value, b: &serde_yaml::Value) -> bool {
    use serde_yaml::Value::{Mapping, Number, Sequence};
    match (a, b) {
        (Number(a), Number(b)) => a.as_f64() == b.as_f64(),
        (Sequence(a), Sequence(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| alike(a, b)),
        (Mapping(a), Mapping(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| alike(a, b)))
        }
        _ => a == b,
    }
}

/// Code of the service between operator and head. It is not made anew here: that takes a compiler, for which all builds of
/// tests would wait.
#[test]
fn rpc_code_is_that_of_its_proto() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("src/rpc/foreshard.v1.rs")).unwrap();
    let (of, rest) = text.strip_prefix("// sha256 of the .proto: ").unwrap().split_once('\n').unwrap();
    let (what, code) = rest.strip_prefix("// sha256 of what follows: ").unwrap().split_once('\n').unwrap();
    let digest = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let proto = std::fs::read(root.join("proto/foreshard/v1/head.proto")).unwrap();
    assert_eq!(of, digest(&proto), "the .proto has changed; run make proto, and look at the difference");
    assert_eq!(what, digest(code.as_bytes()), "made code was changed by hand; run make proto");
}

#[test]
fn command_reference_is_up_to_date() {
    same("docs/cli.md", &foreshard::cli::reference());
}

/// A table of the chart's values: name, default, and the comment above it.
fn values(yaml: &str) -> String {
    let mut out =
        String::from("# Values of the chart\n\nMade from values.yaml.\n\n| value | default | |\n|---|---|---|\n");
    let (mut comment, mut path) = (Vec::new(), Vec::<(usize, &str)>::new());
    let mut lines = yaml.lines().peekable();
    while let Some(line) = lines.next() {
        let text = line.trim_start();
        let depth = line.len() - text.len();
        if let Some(said) = text.strip_prefix("# ") {
            comment.push(said);
        } else if let Some((key, default)) = text.split_once(':') {
            path.retain(|(d, _)| *d < depth);
            path.push((depth, key));
            let deeper = |l: &&str| l.len() - l.trim_start().len() > depth && !l.trim().is_empty();
            // A map that has a comment of its own is one value.
            let inner: Vec<&str> =
                if comment.is_empty() { vec![] } else { std::iter::from_fn(|| lines.next_if(deeper)).collect() };
            if !default.trim().is_empty() || !inner.is_empty() {
                let name = path.iter().map(|(_, key)| *key).collect::<Vec<_>>().join(".");
                let inner = inner.iter().map(|l| l.trim()).collect::<Vec<_>>().join(" ");
                let default = if inner.is_empty() { default.trim() } else { &inner };
                out.push_str(&format!("| `{name}` | `{default}` | {} |\n", comment.join(" ")));
            }
            comment.clear();
        }
    }
    out
}

#[test]
fn values_of_the_chart_are_documented() {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("charts/foreshard");
    same("charts/foreshard/README.md", &values(&std::fs::read_to_string(chart.join("values.yaml")).unwrap()));
}

#[test]
fn sample_manifests_are_valid() {
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests");
    let mut n = 0;
    let samples = std::fs::read_dir(manifests.join("samples")).unwrap();
    for entry in std::fs::read_dir(&manifests).unwrap().chain(samples) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        let yaml = std::fs::read_to_string(&path).unwrap();
        if !yaml.contains("kind: TrainingJob") {
            continue;
        }
        if let Err(e) = foreshard::api::parse(&yaml) {
            panic!("{}: {e}", path.display());
        }
        n += 1;
    }
    assert!(n > 0, "no manifest in {}", manifests.display());
}
