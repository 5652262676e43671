//! The cache of executables: what is loaded computes what was compiled, and nothing that lies there can do harm.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use foreshard::device::cache::{Cached, ExecutableCache, Origin, Trouble};
use foreshard::device::{Arg, Device, DeviceError, ExecutableMemory, affinity};
use foreshard::graph::cut::{accumulate, zeros};
use foreshard::graph::export::{Alias, to_hlo};
use foreshard::graph::import::from_hlo;
use foreshard::graph::{ArrayShape, DType};
use foreshard::plan::{Problem, ScheduleKind, ShardId, solve};
use foreshard::runtime::RuntimeError;
use foreshard::runtime::program::{CacheUse, Compiler, Limits};
use foreshard::runtime::wiring::{Rank, Wiring};
use foreshard::topology::parse_devices;
use foreshard::units::Bytes;

/// A device whose executables are their own modules.
#[derive(Default)]
struct Fake {
    n_compiled: AtomicU32,
    /// Refuses everything that was serialized.
    refuses: bool,
    kind: &'static str,
}

impl Device for Fake {
    type Buffer = ();
    type Executable = Vec<u8>;

    fn platform(&self) -> &str {
        // Keys as for CPUs: with the host's features and the cores.
        "cpu fake 1"
    }
    fn kind(&self) -> &str {
        self.kind
    }
    fn options(&self) -> &[u8] {
        b"options"
    }
    fn compile(&self, _: &str, hlo: &[u8], _: &[Alias]) -> Result<Vec<u8>, DeviceError> {
        self.n_compiled.fetch_add(1, Ordering::SeqCst);
        Ok(hlo.to_vec())
    }
    fn serialize(&self, executable: &Vec<u8>) -> Result<Vec<u8>, DeviceError> {
        Ok(executable.iter().rev().copied().collect())
    }
    fn deserialize(&self, _: &str, bytes: &[u8]) -> Result<Vec<u8>, DeviceError> {
        if self.refuses {
            return Err(DeviceError::Call { entry: "deserialize", message: "not mine".to_owned() });
        }
        Ok(bytes.iter().rev().copied().collect())
    }
    fn memory(&self, _: &Vec<u8>) -> Result<ExecutableMemory, DeviceError> {
        Ok(ExecutableMemory::default())
    }
    fn upload(&self, _: &ArrayShape, _: &[u8]) -> Result<(), DeviceError> {
        unreachable!("nothing is executed")
    }
    fn execute(&self, _: &Vec<u8>, _: Vec<Arg<'_, ()>>) -> Result<Vec<()>, DeviceError> {
        unreachable!("nothing is executed")
    }
    fn wait(&self, (): &()) -> Result<(), DeviceError> {
        unreachable!("nothing is executed")
    }
    fn download(&self, (): &(), _: &mut [u8]) -> Result<(), DeviceError> {
        unreachable!("nothing is executed")
    }
}

const ORIGIN: Origin<'_> = Origin { plugin: "abc", flags: "--a --b" };

fn cache(directory: &Path, limit: u64) -> ExecutableCache {
    ExecutableCache::open(directory, Bytes(limit), &Fake::default(), ORIGIN).unwrap()
}

/// Asks for a module; whatever happens, the executable is the right one.
fn ask(cache: &ExecutableCache, device: &Fake, hlo: &[u8]) -> Cached<Vec<u8>> {
    let cached = cache.compile(device, "module", hlo, &[]).unwrap();
    assert_eq!(cached.executable, hlo);
    cached
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn a_module_is_compiled_once_and_then_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let device = Fake::default();
    for n in 0..3 {
        // As by processes that follow each other.
        let cached = ask(&cache(directory.path(), 1 << 20), &device, b"one");
        assert_eq!((cached.hit, cached.trouble.is_none()), (n > 0, true));
    }
    assert!(!ask(&cache(directory.path(), 1 << 20), &device, b"two").hit);
    assert_eq!(device.n_compiled.load(Ordering::SeqCst), 2);
    assert_eq!(entries(directory.path()).len(), 2);
}

#[test]
fn executables_of_another_origin_are_not_found() {
    let directory = tempfile::tempdir().unwrap();
    let gpu = Fake { kind: "gpu", ..Fake::default() };
    let hit = |device: &Fake, origin| {
        let cache = ExecutableCache::open(directory.path(), Bytes(1 << 20), device, origin).unwrap();
        ask(&cache, device, b"one").hit
    };
    assert!(!hit(&Fake::default(), ORIGIN));
    assert!(hit(&Fake::default(), Origin { flags: " --a   --b", ..ORIGIN }));
    for flags in ["", "--a", "--a--b", "--b --a"] {
        assert!(!hit(&Fake::default(), Origin { flags, ..ORIGIN }), "{flags:?}");
    }
    assert!(!hit(&Fake::default(), Origin { plugin: "abd", ..ORIGIN }));
    assert!(!hit(&gpu, ORIGIN));
    assert!(hit(&gpu, ORIGIN));
}

/// XLA splits loops for the cores a process has when it compiles, and a running process may be given others.
#[test]
fn executables_for_other_cores_are_not_found() {
    let directory = tempfile::tempdir().unwrap();
    let (device, cache) = (Fake::default(), cache(directory.path(), 1 << 20));
    let cores = affinity::allowed();
    if cores.len() < 2 {
        eprintln!("skipped: this process has one core only");
        return;
    }
    // Pins the thread of this test alone.
    affinity::pin(&cores[..1]).unwrap();
    assert!(!ask(&cache, &device, b"one").hit);
    assert!(ask(&cache, &device, b"one").hit);
    affinity::pin(&cores[..2]).unwrap();
    assert!(!ask(&cache, &device, b"one").hit);
    affinity::pin(&cores[1..2]).unwrap();
    assert!(ask(&cache, &device, b"one").hit);
}

#[test]
fn a_damaged_entry_never_reaches_the_device_and_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let (device, cache) = (Fake::default(), cache(directory.path(), 1 << 20));
    ask(&cache, &device, b"module one");
    let path = entries(directory.path()).remove(0);
    let sound = fs::read(&path).unwrap();
    let mut damaged: Vec<Vec<u8>> = (0..sound.len()).map(|n| sound[..n].to_vec()).collect();
    damaged.extend((0..sound.len()).map(|at| {
        let mut bytes = sound.clone();
        bytes[at] ^= 1 << (at % 8);
        bytes
    }));
    damaged.push([&sound[..], b"x"].concat());
    for bytes in damaged {
        fs::write(&path, &bytes).unwrap();
        let cached = ask(&cache, &device, b"module one");
        let trouble = cached.trouble.expect("damage is reported").to_string();
        assert!(!cached.hit && trouble.starts_with("removed "), "{trouble}");
        assert_eq!(fs::read(&path).unwrap(), sound);
    }
    // A sound entry under the name of another module.
    ask(&cache, &device, b"two");
    let other = entries(directory.path()).into_iter().find(|p| *p != path).unwrap();
    fs::copy(&path, &other).unwrap();
    let cached = ask(&cache, &device, b"two");
    assert!(cached.trouble.unwrap().to_string().ends_with("the entry of another module"));
}

#[test]
fn an_entry_that_the_plugin_refuses_is_compiled_again() {
    let directory = tempfile::tempdir().unwrap();
    let cache = cache(directory.path(), 1 << 20);
    ask(&cache, &Fake::default(), b"one");
    let device = Fake { refuses: true, ..Fake::default() };
    let cached = ask(&cache, &device, b"one");
    assert!(!cached.hit && matches!(cached.trouble, Some(Trouble::Refused { .. })));
    assert!(ask(&cache, &Fake::default(), b"one").hit);
}

#[test]
fn what_was_used_longest_ago_goes_first() {
    let directory = tempfile::tempdir().unwrap();
    let device = Fake::default();
    let module = |n: u8| vec![n; 100];
    let roomy = cache(directory.path(), 1 << 20);
    let age = |n: u8, hours: u64| {
        let known = entries(directory.path());
        ask(&roomy, &device, &module(n));
        let path = entries(directory.path()).into_iter().find(|p| !known.contains(p)).unwrap();
        let at = SystemTime::now() - Duration::from_secs(hours * 3600);
        fs::File::options().append(true).open(path).unwrap().set_modified(at).unwrap();
    };
    age(1, 3);
    age(2, 2);
    age(3, 1);
    let (stale, fresh) = (directory.path().join(".part-stale"), directory.path().join(".part-fresh"));
    fs::write(&fresh, "").unwrap();
    let old = SystemTime::now() - Duration::from_secs(7200);
    fs::File::create(&stale).unwrap().set_modified(old).unwrap();
    // Using the oldest one makes it the youngest.
    assert!(ask(&roomy, &device, &module(1)).hit);
    let size = fs::metadata(&entries(directory.path())[2]).unwrap().len();
    let tight = cache(directory.path(), 3 * size);
    assert!(ask(&tight, &device, &module(4)).trouble.is_none());
    assert!(!stale.exists() && fresh.exists());
    let hit = |n| ask(&roomy, &device, &module(n)).hit;
    assert_eq!([hit(1), hit(3), hit(4)], [true; 3]);
    assert!(!hit(2));
    // One that is larger than everything is not kept, and costs nothing else its place.
    let trouble = ask(&tight, &device, &[7; 1000]).trouble;
    assert!(matches!(trouble, Some(Trouble::NotStored { .. })));
    assert_eq!([hit(1), hit(3), hit(4)], [true; 3]);
}

#[test]
fn a_directory_that_cannot_be_written_costs_a_word_in_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let inner = directory.path().join("cache");
    let cache = cache(&inner, 1 << 20);
    fs::remove_dir_all(&inner).unwrap();
    let cached = ask(&cache, &Fake::default(), b"one");
    assert!(!cached.hit && matches!(cached.trouble, Some(Trouble::NotStored { .. })));
}

#[test]
fn many_may_write_at_once() {
    let directory = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                // Too small for all: entries come and go under the readers' hands.
                let (device, cache) = (Fake::default(), cache(directory.path(), 1000));
                for round in 0..50u8 {
                    let cached = ask(&cache, &device, &[round % 7; 200]);
                    assert!(cached.trouble.is_none(), "{}", cached.trouble.unwrap());
                }
            });
        }
    });
    let total: u64 = entries(directory.path()).iter().map(|p| fs::metadata(p).unwrap().len()).sum();
    assert!(total <= 1000, "{total}");
}

/// On the real plug-in: every result bit by bit, also in memory that the argument has given up.
#[test]
fn a_loaded_executable_computes_what_the_compiled_one_does() {
    let device = support::cpu();
    let directory = tempfile::tempdir().unwrap();
    let cache = ExecutableCache::open(directory.path(), Bytes(1 << 30), device, ORIGIN).unwrap();
    let read = |name: &str| from_hlo(&fs::read(format!("tests/data/hlo/{name}.hlo.pb")).unwrap()).unwrap();
    let mut sum = zeros("sum", &[ArrayShape::new(DType::Float32, vec![4])]);
    accumulate(&mut sum, &[0]);
    accumulate(&mut sum, &[0]);
    let aliases = [Alias { output: 0, parameter: 1 }];
    for (graph, aliases) in [(read("scan"), &[][..]), (read("mix"), &[]), (sum, &aliases)] {
        let hlo = to_hlo(&graph, aliases);
        let run = |hit: bool| {
            let cached = cache.compile(device, &graph.name, &hlo, aliases).unwrap();
            assert_eq!((cached.hit, cached.trouble.is_none()), (hit, true));
            let inputs = graph.parameters().iter().map(|&p| {
                let shape = graph.op(p).shape.as_array().unwrap();
                let values = (0..shape.n_elements()).map(|i| match shape.dtype {
                    DType::Float32 => (((i * 37 % 19) as f32 - 9.0) / 10.0).to_le_bytes(),
                    _ => (i as u32 + 5).to_le_bytes(),
                });
                Arg::Donate(device.upload(shape, &values.flatten().collect::<Vec<u8>>()).unwrap())
            });
            let results = device.execute(&cached.executable, inputs.collect()).unwrap();
            let download = |(buffer, &output)| {
                let mut out = vec![0; graph.op(output).shape.bytes().0 as usize];
                device.download(buffer, &mut out).unwrap();
                out
            };
            let results: Vec<Vec<u8>> = results.iter().zip(graph.outputs()).map(download).collect();
            (results, device.memory(&cached.executable).unwrap())
        };
        let compiled = run(false);
        assert!(compiled.0.iter().flatten().any(|&b| b != 0));
        assert_eq!(compiled.1.aliased.0 > 0, !aliases.is_empty());
        assert_eq!(run(true), compiled, "{}", graph.name);
    }
}

/// What a worker compiles comes from the cache the second time, be it all or as much as there was time for.
#[test]
fn a_shard_that_was_compiled_before_is_loaded() {
    let device = support::cpu();
    let model = support::load("bundles/mlp_digits.bundle");
    let topology = parse_devices("2xcpu").unwrap();
    let problem = Problem { schedule: Some(ScheduleKind::OneFOneB), ..Problem::new(&model, &topology, 2) };
    let plan = solve(&problem, None).unwrap();
    let wiring = Wiring::new(&model, &plan).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let open = |name| ExecutableCache::open(&directory.path().join(name), Bytes(1 << 30), device, ORIGIN).unwrap();
    let compile = |cache: Option<&ExecutableCache>, limits: Limits<'_>| {
        let rank = Rank { shard: ShardId(0), replica: 0 };
        let progress = &mut |_, _| {};
        let compiler = Compiler::new(device, &model, &plan, &wiring, rank, progress).with_cache(cache);
        Ok(compiler.with_limits(limits).compile(Some(&BTreeSet::new()))?.cache)
    };
    let whole =
        |cache: Option<&ExecutableCache>| -> Result<CacheUse, RuntimeError> { compile(cache, Limits::default()) };
    let cache = open("whole");
    let first = whole(Some(&cache)).unwrap();
    assert!(first.hits == 0 && first.misses > 3 && first.troubles.is_empty(), "{first:?}");
    assert_eq!(whole(Some(&cache)).unwrap(), CacheUse { hits: first.misses, misses: 0, troubles: Vec::new() });
    assert_eq!(whole(None).unwrap(), CacheUse { hits: 0, ..first });

    // With time for no more than one, each go has one more.
    let cache = open("by spells");
    let spell = Limits { until: Some(Instant::now()), cancelled: None };
    let mut before = u32::MAX;
    for _ in 1..first.misses {
        match compile(Some(&cache), spell) {
            Err(RuntimeError::Unfinished { compiled: 1, left }) if left < before => before = left,
            other => panic!("{:?}", other.map(|_| "all")),
        }
    }
    assert_eq!(
        compile(Some(&cache), spell).unwrap(),
        CacheUse { hits: first.misses - 1, misses: 1, troubles: Vec::new() }
    );
    let called_off = Limits { cancelled: Some(&AtomicBool::new(true)), until: None };
    assert!(matches!(compile(None, called_off), Err(RuntimeError::Unfinished { compiled: 0, .. })));
}
