//! Imports run one way: a room uses only rooms of the layers above it, in the order of `src/lib.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Rooms by layer. Rooms of one layer do not know each other.
const LAYERS: &[&[&str]] = &[
    &["units"],
    &["forecast", "graph", "topology"],
    &["profile"],
    &["cost"],
    &["plan"],
    &["transition"],
    &["api", "wire"],
    &["telemetry", "device", "tls"],
    &["rpc"],
    &["fetch", "operator", "runtime", "trainer"],
    &["bench", "local"],
    &["cli"],
];

/// Rooms without clock, environment, files, threads or `unsafe`.
const CORE: &[&str] = &["units", "forecast", "graph", "topology", "profile", "cost", "plan", "transition"];

/// Words that no core room has a use for.
const OUTSIDE: &[&str] = &[
    "std::fs",
    "std::env",
    "std::net",
    "std::process",
    "std::thread",
    "std::time",
    "HashMap",
    "HashSet",
    "tokio",
    "kube",
    "println!",
    "unsafe",
];

/// Edge rooms that may hold `unsafe` code.
const UNSAFE: &[&str] = &["device"];

fn layer(room: &str) -> Option<usize> {
    LAYERS.iter().position(|rooms| rooms.contains(&room))
}

/// Every source file with its room.
fn sources() -> Vec<(String, PathBuf)> {
    fn walk(directory: &Path, out: &mut Vec<PathBuf>) {
        let mut entries: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push(path);
            }
        }
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&src, &mut files);
    let room = |path: &Path| {
        let first = path.strip_prefix(&src).unwrap().components().next().unwrap();
        first.as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
    };
    let all = files.into_iter().map(|f| (room(&f), f));
    all.filter(|(room, _)| room != "lib" && room != "main").collect()
}

/// The text without comments and without tests: those may use what they like.
fn code(text: &str) -> String {
    let production = text.split("#[cfg(test)]").next().unwrap_or("");
    production.lines().map(|l| l.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

/// Rooms a text names in `crate::room` paths, also in groups such as `crate::{a, b::c}`.
fn rooms_used(text: &str) -> BTreeSet<String> {
    let word = |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut used = BTreeSet::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => drop(used.insert(word(rest))),
            Some(group) => {
                let mut depth = 0;
                let mut fresh = true;
                for (i, c) in group.char_indices() {
                    match c {
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        '{' => depth += 1,
                        ',' if depth == 0 => fresh = true,
                        c if fresh && !c.is_whitespace() => {
                            used.insert(word(&group[i..]));
                            fresh = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    used.retain(|w| layer(w).is_some());
    used
}

#[test]
fn every_room_is_in_the_table_and_in_order() {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let declared: Vec<&str> = lib.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let layers: Vec<Option<usize>> = declared.iter().map(|r| layer(r)).collect();
    assert!(layers.iter().all(Option::is_some), "a room of src/lib.rs is missing in LAYERS: {declared:?}");
    assert!(layers.is_sorted(), "rooms of src/lib.rs are out of order: {declared:?}");
    let on_disk: BTreeSet<String> = sources().into_iter().map(|(room, _)| room).collect();
    assert_eq!(on_disk, declared.iter().map(|r| (*r).to_owned()).collect(), "rooms on disk and in src/lib.rs differ");
}

#[test]
fn imports_run_one_way() {
    let mut wrong = Vec::new();
    for (room, path) in sources() {
        let mine = layer(&room).expect("in the table");
        for used in rooms_used(&code(&fs::read_to_string(&path).unwrap())) {
            if used != room && layer(&used).is_some_and(|theirs| theirs >= mine) {
                wrong.push(format!("{} uses crate::{used}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "imports against the order of layers:\n{}", wrong.join("\n"));
}

#[test]
fn core_rooms_stay_pure() {
    let mut wrong = Vec::new();
    for (room, path) in sources() {
        let text = code(&fs::read_to_string(&path).unwrap());
        let words: &[&str] = if CORE.contains(&room.as_str()) { OUTSIDE } else { &["unsafe"] };
        let allowed = |word: &str| word == "unsafe" && UNSAFE.contains(&room.as_str());
        let whole = |word: &str| {
            text.match_indices(word).any(|(at, _)| {
                let edge = |c: Option<char>| !c.is_some_and(|c| c.is_alphanumeric() || c == '_');
                edge(text[..at].chars().next_back()) && edge(text[at + word.len()..].chars().next())
            })
        };
        wrong.extend(words.iter().filter(|w| !allowed(w) && whole(w)).map(|w| format!("{} uses {w}", path.display())));
    }
    assert!(wrong.is_empty(), "not allowed there:\n{}", wrong.join("\n"));
}

#[test]
fn only_cli_reads_the_environment() {
    let readers = sources().into_iter().filter(|(room, _)| room != "cli");
    let wrong: Vec<String> = readers
        .filter(|(_, path)| {
            let text = code(&fs::read_to_string(path).unwrap());
            text.contains("env::var") || text.contains("option_env!") || text.contains("env::args")
        })
        .map(|(_, path)| path.display().to_string())
        .collect();
    assert!(wrong.is_empty(), "these read the environment: {wrong:?}");
}

/// `fuzz/` compiles rooms by itself, so `cargo test` does not notice what it lacks.
#[test]
fn the_fuzz_crate_has_what_its_rooms_use() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap();
    let (lib, ours, theirs) = (read("fuzz/src/lib.rs"), read("Cargo.toml"), read("fuzz/Cargo.toml"));
    let rooms: Vec<&str> = lib.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let dependencies = ours.split("[dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    let crates: Vec<&str> = dependencies.lines().filter_map(|l| Some(l.split_once(" =")?.0)).collect();
    assert!(rooms.contains(&"wire") && crates.contains(&"serde"));
    let mut missing = BTreeSet::new();
    for (_, path) in sources().into_iter().filter(|(room, _)| rooms.contains(&room.as_str())) {
        let text = code(&fs::read_to_string(path).unwrap());
        missing.extend(rooms_used(&text).into_iter().filter(|r| !rooms.contains(&r.as_str())));
        let used = |name: &&&str| text.contains(&format!("{}::", name.replace('-', "_")));
        let known = |name: &str| theirs.lines().any(|l| l.starts_with(&format!("{name} =")));
        missing.extend(crates.iter().filter(used).filter(|n| !known(n)).map(|n| (*n).to_owned()));
    }
    assert!(missing.is_empty(), "fuzz/src/lib.rs or fuzz/Cargo.toml lacks {missing:?}");
}

#[test]
fn no_file_outgrows_its_reader() {
    const LIMIT: usize = 900;
    let long: Vec<String> = sources()
        .into_iter()
        .map(|(_, path)| (fs::read_to_string(&path).unwrap().lines().count(), path))
        .filter(|(lines, _)| *lines > LIMIT)
        .map(|(lines, path)| format!("{} has {lines} lines", path.display()))
        .collect();
    assert!(long.is_empty(), "longer than {LIMIT} lines, split them by noun: {long:?}");
}

#[test]
fn finds_rooms_in_every_kind_of_path() {
    let text = code(
        "use crate::graph::{self, Model};\nuse crate::{plan::Plan, wire::{frame, cost}, units};\nlet x = crate::device::host();\n// crate::local\n#[cfg(test)]\nuse crate::cli;",
    );
    let expected = ["device", "graph", "plan", "units", "wire"];
    assert_eq!(rooms_used(&text), expected.map(str::to_owned).into());
}
