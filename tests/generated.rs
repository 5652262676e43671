//! Committed files that are made from the code: they must be what the code would make now. `UPDATE=1 cargo test --test
//! generated` writes them anew.

use std::path::Path;

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

#[test]
fn command_reference_is_up_to_date() {
    same("docs/cli.md", &foreshard::cli::reference());
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
