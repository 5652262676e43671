//! Checkpoints: what is written is what is read, and what a crash or a bad disk leaves is never taken for one.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use foreshard::graph::manifest::{ParamSpec, SlotSpec};
use foreshard::graph::{ArrayShape, DType, Graph, Manifest, Model, Part, StateTensor};
use foreshard::plan::{Place, ShardId};
use foreshard::runtime::checkpoint::{
    Checkpoint, CheckpointError, Depth, Draft, Fault, Keep, Milestone, ShardEntry, list, prune, runs, states_of,
    write_shard,
};
use foreshard::wire::Position;
use proptest::prelude::*;
use safetensors::SafeTensors;
use tempfile::TempDir;

/// A tensor of the state: type, shape, and the rows at which it falls apart.
type Spec = (DType, Vec<u64>, Vec<u64>);

/// A model that is nothing but its state; every other tensor is a slot.
fn model(specs: &[Spec]) -> Model {
    let mut manifest = Manifest::parse(include_bytes!("data/manifest.json")).unwrap();
    let (mut params, mut slots) = (Vec::new(), Vec::new());
    for (i, (dtype, shape, cuts)) in specs.iter().enumerate() {
        let (name, shape) = (format!("t{}", i / 2), shape.clone());
        if i % 2 == 0 {
            params.push((ParamSpec { name, dtype: *dtype, shape, grad_dtype: DType::Float32 }, cuts));
        } else {
            // Named like a param: allowed, and told apart in shard files.
            slots.push((SlotSpec { name, dtype: *dtype, shape, param: None }, cuts));
        }
    }
    let mut state = Vec::new();
    let mut push = |tensor: usize, name: &str, dtype, shape: &[u64], cuts: &[u64]| {
        let rows = shape.first().copied().unwrap_or(0);
        let inner = cuts.iter().copied().filter(|c| (1..rows).contains(c));
        let edges: BTreeSet<u64> = inner.chain([0, rows]).collect();
        let edges: Vec<u64> = edges.into_iter().collect();
        if edges.len() <= 2 {
            let shape = ArrayShape::new(dtype, shape.to_vec());
            state.push(StateTensor { name: name.to_owned(), tensor, rows: None, part: None, shape, param: None });
            return;
        }
        for edge in edges.windows(2) {
            let mut shape = ArrayShape::new(dtype, shape.to_vec());
            shape.dims[0] = edge[1] - edge[0];
            let name = format!("{name}[{}]", edge[0]);
            state.push(StateTensor { name, tensor, rows: Some(edge[0]..edge[1]), part: None, shape, param: None });
        }
    };
    for (i, (p, cuts)) in params.iter().enumerate() {
        push(i, &p.name, p.dtype, &p.shape, cuts);
    }
    for (i, (s, cuts)) in slots.iter().enumerate() {
        push(params.len() + i, &s.name, s.dtype, &s.shape, cuts);
    }
    let n_params = state.iter().filter(|t| t.tensor < params.len()).count();
    manifest.params = params.into_iter().map(|(p, _)| p).collect();
    manifest.slots = slots.into_iter().map(|(s, _)| s).collect();
    let (init, update) = (Graph::new("init"), Graph::new("update"));
    let fingerprint = "0123456789abcdef0123456789abcdef".to_owned();
    let origin = fingerprint.clone();
    Model { manifest, state, n_params, init, grads: Vec::new(), update, fingerprint, origin, split: Vec::new() }
}

fn small() -> Model {
    use DType::*;
    model(&[
        (Float32, vec![4, 3], vec![1, 2, 3]),
        (Bfloat16, vec![3], vec![]),
        (Bool, vec![5], vec![]),
        (Int32, vec![], vec![]),
        (Float32, vec![0, 7], vec![]),
    ])
}

/// The same model, with each state tensor that has more than one element along `axis` in so many parts.
fn in_parts(model: &Model, axis: usize, of: u64) -> Model {
    let parts = |tensor: &StateTensor| -> Vec<StateTensor> {
        let n = tensor.shape.dims.get(axis).copied().unwrap_or(0);
        if n < of || tensor.rows.is_some() && axis == 0 {
            return vec![tensor.clone()];
        }
        let part = |index: u64| {
            let range = n * index / of..n * (index + 1) / of;
            let (mut shape, name) = (tensor.shape.clone(), format!("{}.{index}", tensor.name));
            shape.dims[axis] = range.end - range.start;
            let part = Some(Part { axis, range, index: index as u32, of: of as u32 });
            StateTensor { name, part, shape, ..tensor.clone() }
        };
        (0..of).map(part).collect()
    };
    let state: Vec<StateTensor> = model.state.iter().flat_map(parts).collect();
    let n_params = state.iter().filter(|t| t.tensor < model.manifest.params.len()).count();
    Model { state, n_params, fingerprint: format!("{axis} {of}"), ..model.clone() }
}

/// The whole of a manifest's tensor, by step.
fn whole(model: &Model, tensor: usize, step: u64) -> Vec<u8> {
    let pieces = model.state.iter().filter(|t| t.tensor == tensor);
    let bytes: u64 = pieces.map(|t| t.shape.bytes().0).sum();
    (0..bytes).map(|i| (i * 31 + tensor as u64 * 7 + step) as u8).collect()
}

fn bytes(model: &Model, state: usize, step: u64) -> Vec<u8> {
    let tensor = &model.state[state];
    let whole = whole(model, tensor.tensor, step);
    tensor.byte_runs(&model.manifest).flat_map(|run| &whole[run.start as usize..run.end as usize]).copied().collect()
}

fn milestone(step: u64) -> Milestone {
    Milestone { step, of: 100, position: Position { epoch: 1, sample: step * 4 }, seed: 17, revision: 3, microbatch: 2 }
}

fn write_shards(draft: &Draft, model: &Model, shards: &[Vec<usize>], step: u64) -> Vec<ShardEntry> {
    let entry = |(rank, states): (usize, &Vec<usize>)| {
        let mut bytes = |i| Ok::<_, CheckpointError>(Cow::Owned(bytes(model, i, step)));
        write_shard(model, &draft.shard(rank as u32), states, &mut bytes).unwrap()
    };
    shards.iter().enumerate().map(entry).collect()
}

fn write(directory: &Path, model: &Model, shards: &[Vec<usize>], step: u64) -> PathBuf {
    let draft = Draft::begin(directory).unwrap();
    let entries = write_shards(&draft, model, shards, step);
    draft.commit(model, &milestone(step), &entries).unwrap()
}

/// All state in one shard, or in two.
fn split(model: &Model, n: usize) -> Vec<Vec<usize>> {
    (0..n).map(|s| (0..model.state.len()).filter(|i| i % n == s).collect()).collect()
}

fn open(path: &Path) -> Result<(Checkpoint, usize), CheckpointError> {
    Checkpoint::open(path, Depth::Lengths).map(|f| (f.checkpoint, f.skipped.len()))
}

fn files(path: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

/// Names in a directory, without the lock.
fn names(path: &Path) -> Vec<String> {
    let all = files(path).into_iter().map(|f| f.file_name().unwrap().to_string_lossy().into_owned());
    all.filter(|n| n != ".lock").collect()
}

fn dtype() -> impl Strategy<Value = DType> {
    use DType::*;
    proptest::sample::select(vec![Bool, Int8, Uint16, Bfloat16, Float32, Int64, Complex64, Complex128, Float8E5m2])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn reads_what_was_written_whatever_the_shards(
        specs in proptest::collection::vec(
            (dtype(), proptest::collection::vec(0u64..5, 0..4), proptest::collection::vec(1u64..5, 0..4)), 1..7),
        n_shards in 1usize..5,
        owners in proptest::collection::vec(0usize..5, 64),
    ) {
        let model = model(&specs);
        let mut shards = vec![Vec::new(); n_shards];
        for i in 0..model.state.len() {
            shards[owners[i % owners.len()] % n_shards].push(i);
        }
        let directory = tempfile::tempdir().unwrap();
        let path = write(directory.path(), &model, &shards, 100);
        let (checkpoint, _) = open(directory.path()).unwrap();
        prop_assert_eq!(checkpoint.path(), &path);
        prop_assert_eq!(checkpoint.faults(Depth::Checksums), vec![]);
        prop_assert_eq!((checkpoint.index().step, checkpoint.index().position), (100, milestone(100).position));
        prop_assert_eq!((checkpoint.index().seed, checkpoint.index().revision), (17, 3));
        for i in 0..model.state.len() {
            prop_assert_eq!(checkpoint.read(&model, i).unwrap(), bytes(&model, i, 100));
        }
        // Shard files are plain safetensors, with one tensor per piece.
        let mut n = 0;
        for file in files(&path).iter().filter(|f| f.extension().is_some_and(|e| e == "safetensors")) {
            n += SafeTensors::deserialize(&fs::read(file).unwrap()).unwrap().len();
        }
        prop_assert_eq!(n, model.state.len());
        // So is an export, with the manifest's names and shapes.
        let out = directory.path().join("params.safetensors");
        checkpoint.export(&out, false).unwrap();
        let exported = fs::read(&out).unwrap();
        let exported = SafeTensors::deserialize(&exported).unwrap();
        prop_assert_eq!(exported.len(), model.manifest.params.len());
        for (i, param) in model.manifest.params.iter().enumerate() {
            let tensor = exported.tensor(&param.name).unwrap();
            let mut shape: Vec<usize> = param.shape.iter().map(|&d| d as usize).collect();
            shape.extend((param.dtype == DType::Complex128).then_some(2));
            prop_assert_eq!(tensor.shape(), shape);
            prop_assert_eq!(tensor.data(), whole(&model, i, 100));
            let aligned = tensor.data().as_ptr() as usize - exported_start(&exported);
            prop_assert_eq!(aligned % param.dtype.size().min(8) as usize, 0);
        }
    }
}

/// Address of the first byte of tensor data.
fn exported_start(file: &SafeTensors<'_>) -> usize {
    file.tensors().iter().map(|(_, t)| t.data().as_ptr() as usize).min().unwrap()
}

#[test]
fn slots_are_exported_on_request() {
    let mut model = small();
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("all.safetensors");
    write(directory.path(), &model, &split(&model, 2), 1);
    let e = open(directory.path()).unwrap().0.export(&out, true).unwrap_err();
    assert_eq!(e.to_string(), "slot \"t0\" has the name of a param; export without --slots");
    assert!(!out.exists());
    for slot in &mut model.manifest.slots {
        slot.name.insert_str(0, "opt.");
    }
    write(directory.path(), &model, &split(&model, 2), 2);
    open(directory.path()).unwrap().0.export(&out, true).unwrap();
    let file = fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let mut found: Vec<&str> = file.names();
    found.sort_unstable();
    assert_eq!(found, ["opt.t0", "opt.t1", "t0", "t1", "t2"]);
    assert_eq!(file.tensor("opt.t0").unwrap().data(), whole(&model, 3, 2));
}

/// Every file of the newest checkpoint, changed in every way of `changes(length)` by `change`, makes readers fall
/// back to the one before, which stays as it was.
fn damaged_everywhere(depth: Depth, change: impl Fn(&mut Vec<u8>, usize), every: usize) {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), &model, &split(&model, 2), 1);
    let newest = write(directory.path(), &model, &split(&model, 2), 2);
    assert_eq!(files(&newest).len(), 3);
    for file in files(&newest) {
        let sound = fs::read(&file).unwrap();
        for at in (0..sound.len()).step_by(every) {
            let mut damaged = sound.clone();
            change(&mut damaged, at);
            fs::write(&file, &damaged).unwrap();
            let what = || format!("{} at byte {at}", file.display());
            let found = Checkpoint::open(directory.path(), depth).unwrap_or_else(|e| panic!("{}: {e}", what()));
            assert_eq!((found.checkpoint.index().step, found.skipped.len()), (1, 1), "{}", what());
            let named = Checkpoint::open(&newest, depth);
            assert!(named.is_err(), "{}", what());
        }
        fs::write(&file, &sound).unwrap();
    }
    assert_eq!(open(directory.path()).unwrap().0.index().step, 2);
}

#[test]
fn a_checkpoint_cut_short_anywhere_is_never_used() {
    damaged_everywhere(Depth::Lengths, |bytes, at| bytes.truncate(at), 1);
}

#[test]
fn a_checkpoint_with_any_byte_changed_is_never_used_when_checksums_are_asked_for() {
    damaged_everywhere(Depth::Checksums, |bytes, at| bytes[at] ^= 1 << (at % 8), 1);
}

#[test]
fn a_changed_index_is_noticed_without_reading_the_shards() {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), &model, &split(&model, 1), 7);
    let index = path.join("index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replacen("\"seed\": 17", "\"seed\": 18", 1)).unwrap();
    let e = open(&path).unwrap_err().to_string();
    assert!(e.contains("index.json: not an index of a checkpoint: it has crc32"), "{e}");
}

#[test]
fn a_missing_file_is_named() {
    let model = small();
    for (file, says) in [("shard-1.safetensors", "shard-1.safetensors is missing"), ("index.json", "cannot read")] {
        let directory = tempfile::tempdir().unwrap();
        let path = write(directory.path(), &model, &split(&model, 2), 1);
        fs::remove_file(path.join(file)).unwrap();
        let e = open(&path).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
        assert!(matches!(open(directory.path()), Err(CheckpointError::NoneUsable { .. })));
    }
}

#[test]
fn damage_is_found_when_a_tensor_is_read() {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), &model, &split(&model, 1), 1);
    let shard = path.join("shard-0.safetensors");
    let mut data = fs::read(&shard).unwrap();
    let (checkpoint, _) = open(&path).unwrap();
    *data.last_mut().unwrap() ^= 1;
    fs::write(&shard, &data).unwrap();
    // The last tensor of the file, and no other.
    let failed: Vec<usize> = (0..model.state.len()).filter(|&i| checkpoint.read(&model, i).is_err()).collect();
    assert_eq!(failed.len(), 1);
    let e = checkpoint.read(&model, failed[0]).unwrap_err();
    assert!(matches!(e, CheckpointError::Broken { fault: Fault::Tensor { .. }, .. }), "{e}");
    let faults = checkpoint.faults(Depth::Checksums);
    assert!(matches!(&faults[..], [Fault::Tensor { .. }, Fault::Checksum { .. }]), "{faults:?}");
    // Files that shrink while they are open are noticed too.
    fs::write(&shard, &data[..data.len() - 1]).unwrap();
    let e = checkpoint.read(&model, 0).unwrap_err().to_string();
    let (expected, found) = (data.len(), data.len() - 1);
    assert!(e.contains(&format!("shard-0.safetensors has {found} bytes, expected {expected}")), "{e}");
}

#[test]
fn other_formats_and_garbage_are_told_apart() {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), &model, &split(&model, 1), 1);
    let index = path.join("index.json");
    fs::write(&index, r#"{"format": "foreshard.checkpoint/9", "foreshard": "7.0.0", "new": true}"#).unwrap();
    let e = open(&path).unwrap_err().to_string();
    for part in ["foreshard.checkpoint/9", "7.0.0", "foreshard.checkpoint/1"] {
        assert!(e.contains(part), "{e}");
    }
    for garbage in [&b""[..], b"{", b"null", b"\xff\xfe", b"{\"format\": \"foreshard.checkpoint/1\"}", &[0; 4096]] {
        fs::write(&index, garbage).unwrap();
        assert!(matches!(open(&path), Err(CheckpointError::Index { .. })), "{garbage:?}");
    }
}

/// What was split one way is read unsplit and split otherwise, and exported whole.
#[test]
fn any_split_resumes_from_any_other() {
    use DType::*;
    let whole = model(&[
        (Float32, vec![4, 6], vec![1, 2, 3]),
        (Bfloat16, vec![7], vec![]),
        (Uint8, vec![5, 3, 4], vec![]),
        (Int32, vec![], vec![]),
        (Float32, vec![0, 7], vec![]),
        (Float64, vec![2, 5], vec![]),
    ]);
    let models = [whole.clone(), in_parts(&whole, 0, 2), in_parts(&whole, 1, 2), in_parts(&whole, 1, 3)];
    assert!(models[1..].iter().all(|m| m.state.len() > whole.state.len()));
    let directory = tempfile::tempdir().unwrap();
    for (step, written) in models.iter().enumerate() {
        let path = write(directory.path(), written, &split(written, 2), step as u64);
        let text = fs::read_to_string(path.join("index.json")).unwrap();
        let format = if step == 0 { "foreshard.checkpoint/1" } else { "foreshard.checkpoint/2" };
        assert!(text.contains(format), "{text}");
        let (checkpoint, _) = open(&path).unwrap();
        assert_eq!(checkpoint.faults(Depth::Checksums), Vec::new());
        for read in &models {
            for i in 0..read.state.len() {
                let name = &read.state[i].name;
                assert_eq!(checkpoint.read(read, i).unwrap(), bytes(read, i, step as u64), "{name} from step {step}");
            }
        }
        let exported = directory.path().join("params.safetensors");
        checkpoint.export(&exported, false).unwrap();
        let file = fs::read(&exported).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        for (i, param) in whole.manifest.params.iter().enumerate() {
            let expected = self::whole(&whole, i, step as u64);
            assert_eq!(tensors.tensor(&param.name).unwrap().data(), expected, "{} of step {step}", param.name);
        }
    }
}

/// An index whose parts do not make up their tensor is none.
#[test]
fn parts_that_overlap_or_are_missing_are_noticed() {
    let model = in_parts(&model(&[(DType::Float32, vec![2, 6], vec![1])]), 1, 3);
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), &model, &split(&model, 1), 1);
    let sound = open(&path).unwrap().0.index().clone();
    for (at, change) in [(0, (0, 1)), (1, (2, 5)), (2, (4, 7)), (4, (3, 4)), (5, (4, 5))] {
        let mut index = sound.clone();
        let part = index.tensors[0].pieces[at].part.as_mut().unwrap();
        (part.from, part.to) = change;
        fs::write(path.join("index.json"), index.encode()).unwrap();
        assert!(matches!(open(&path), Err(CheckpointError::Index { .. })), "piece {at} as {change:?}");
    }
    for at in 0..6 {
        let mut index = sound.clone();
        index.tensors[0].pieces.remove(at);
        fs::write(path.join("index.json"), index.encode()).unwrap();
        assert!(matches!(open(&path), Err(CheckpointError::Index { .. })), "without piece {at}");
    }
    fs::write(path.join("index.json"), sound.encode()).unwrap();
    open(&path).unwrap();
}

#[test]
fn another_model_is_refused_by_both_fingerprints() {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), &model, &split(&model, 1), 1);
    let mut other = small();
    other.origin = "ffff".to_owned();
    let e = open(directory.path()).unwrap().0.read(&other, 0).unwrap_err().to_string();
    assert!(e.contains(&model.origin) && e.contains("ffff"), "{e}");
}

#[test]
fn what_a_crashed_writer_left_is_ignored_and_then_removed() {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), &model, &split(&model, 2), 1);
    let complete = files(&directory.path().join("step-00000001"));
    // A crash after each file, and inside each file.
    for n in 0..=complete.len() {
        let left = directory.path().join(format!(".draft-crash{n}"));
        fs::create_dir(&left).unwrap();
        for (i, file) in complete.iter().take(n).enumerate() {
            let mut bytes = fs::read(file).unwrap();
            if i + 1 == n {
                bytes.truncate(bytes.len() / 2);
            }
            fs::write(left.join(file.file_name().unwrap()), bytes).unwrap();
        }
    }
    fs::create_dir(directory.path().join(".removed-step-00000000")).unwrap();
    let (checkpoint, skipped) = open(directory.path()).unwrap();
    assert_eq!((checkpoint.index().step, skipped), (1, 0));
    assert_eq!(list(directory.path()).unwrap().len(), 1);
    write(directory.path(), &model, &split(&model, 1), 2);
    assert_eq!(names(directory.path()), ["step-00000001", "step-00000002"]);
}

#[test]
fn a_draft_that_is_dropped_leaves_nothing() {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    let draft = Draft::begin(directory.path()).unwrap();
    write_shards(&draft, &model, &split(&model, 2), 1);
    assert_eq!(names(directory.path()).len(), 1);
    assert!(matches!(open(directory.path()), Err(CheckpointError::Nothing { .. })));
    drop(draft);
    assert_eq!(names(directory.path()), [""; 0]);
}

#[test]
fn a_directory_has_one_writer_at_a_time() {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    let first = Draft::begin(directory.path()).unwrap();
    let e = Draft::begin(directory.path()).err().unwrap();
    assert!(matches!(e, CheckpointError::Busy { .. }), "{e}");
    let entries = write_shards(&first, &model, &split(&model, 1), 1);
    first.commit(&model, &milestone(1), &entries).unwrap();
    write(directory.path(), &model, &split(&model, 1), 2);
    assert_eq!(names(directory.path()), ["step-00000001", "step-00000002"]);
}

/// A head leaves a run for each of its starts; the last one that got as far as a checkpoint is where the job stands.
#[test]
fn the_newest_checkpoint_of_a_job_is_that_of_its_last_run_which_has_one() {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(open(directory.path()), Err(CheckpointError::Nothing { .. })));
    for (run, steps) in [("run-2", vec![30, 40]), ("run-10", vec![20]), ("run-11", vec![]), ("run-x", vec![90])] {
        let checkpoints = directory.path().join(run).join("checkpoints");
        fs::create_dir_all(&checkpoints).unwrap();
        steps.iter().for_each(|&step| drop(write(&checkpoints, &model, &split(&model, 1), step)));
    }
    let numbers: Vec<u64> = runs(directory.path()).unwrap().into_iter().map(|(n, _)| n).collect();
    assert_eq!(numbers, [2, 10, 11]);
    let steps: Vec<u64> = list(directory.path()).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [30, 40, 20]);
    assert_eq!(open(directory.path()).unwrap().0.index().step, 20);
}

#[test]
fn a_step_that_is_there_stays_unless_it_is_broken() {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), &model, &split(&model, 1), 5);
    let before = fs::read(path.join("index.json")).unwrap();
    // The run resumed before this step with another plan, and comes by again.
    assert_eq!(write(directory.path(), &model, &split(&model, 3), 5), path);
    assert_eq!(fs::read(path.join("index.json")).unwrap(), before);
    // Another run.
    let draft = Draft::begin(directory.path()).unwrap();
    let entries = write_shards(&draft, &model, &split(&model, 1), 5);
    let e = draft.commit(&model, &Milestone { seed: 4, ..milestone(5) }, &entries).unwrap_err();
    assert!(e.to_string().contains("step-00000005 is there already, of another run: seed 17"), "{e}");
    // Broken: a byte in the middle of a shard.
    let shard = path.join("shard-0.safetensors");
    let mut data = fs::read(&shard).unwrap();
    let last = data.len() - 1;
    data[last] ^= 8;
    fs::write(&shard, data).unwrap();
    write(directory.path(), &model, &split(&model, 3), 5);
    let (checkpoint, _) = open(directory.path()).unwrap();
    assert_eq!((checkpoint.index().files.len(), checkpoint.faults(Depth::Checksums)), (3, vec![]));
    assert_eq!(names(directory.path()), ["step-00000005"]);
}

#[test]
fn an_incomplete_or_double_state_is_not_committed() {
    let model = small();
    let all: Vec<usize> = (0..model.state.len()).collect();
    let check = |shards: &[Vec<usize>], change: &dyn Fn(&mut Vec<ShardEntry>), says: &str| {
        let directory = tempfile::tempdir().unwrap();
        let draft = Draft::begin(directory.path()).unwrap();
        let mut entries = write_shards(&draft, &model, shards, 1);
        change(&mut entries);
        let e = draft.commit(&model, &milestone(1), &entries).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
        assert_eq!(names(directory.path()), [""; 0], "{says}");
    };
    let same = |_: &mut Vec<ShardEntry>| {};
    let one = [all.clone()];
    check(&[all[1..].to_vec()], &same, "no shard has written state tensor \"t0[0]\"");
    check(&[all[..2].to_vec()], &same, "no shard has written state tensor \"t0[2]\", and 5 more");
    check(
        &[all.clone(), vec![2]],
        &same,
        "state tensor \"t0[2]\" is in shard-0.safetensors and in shard-1.safetensors",
    );
    check(&one, &|e| e[0].file = "../x".to_owned(), "is not the name of one shard file");
    check(&one, &|e| e[0].file = "other".to_owned(), "shard file other: No such file");
    check(&one, &|e| e[0].pieces[0].state = 99, "a tensor that is not in the model");
    check(&one, &|e| e[0].pieces[0].begin = u64::MAX, "a tensor that ends behind it");
    check(&one, &|e| e[0].pieces[1].begin = e[0].pieces[0].begin, "two tensors share byte");
    check(&one, &|e| e[0].bytes += 1, "its worker wrote");
    check(&one, &|e| e.push(e[0].clone()), "is not the name of one shard file");
}

#[test]
fn a_shard_that_fails_halfway_leaves_no_file() {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("shard-0.safetensors");
    let all: Vec<usize> = (0..model.state.len()).collect();
    let mut n = 0;
    let mut fails = |i| {
        n += 1;
        let data = bytes(&model, i, 1);
        Ok::<_, CheckpointError>(Cow::Owned(if n == 3 { data[1..].to_vec() } else { data }))
    };
    let e = write_shard(&model, &path, &all, &mut fails).unwrap_err();
    assert!(matches!(e, CheckpointError::Size { .. }), "{e}");
    assert!(!path.exists());
    let nowhere = directory.path().join("missing/shard-0.safetensors");
    let mut works = |i| Ok::<_, CheckpointError>(Cow::Owned(bytes(&model, i, 1)));
    let e = write_shard(&model, &nowhere, &all, &mut works).unwrap_err();
    assert!(matches!(e, CheckpointError::Write { .. }), "{e}");
    fs::write(directory.path().join("file"), "").unwrap();
    let e = Draft::begin(&directory.path().join("file/checkpoints")).err().unwrap();
    assert!(matches!(e, CheckpointError::Write { .. }), "{e}");
}

#[test]
fn every_state_tensor_has_one_writer() {
    use Place::{Everywhere, Shard};
    let owners = [Shard(ShardId(1)), Everywhere, Shard(ShardId(0)), Shard(ShardId(2)), Everywhere];
    let of = |shard| states_of(&owners, ShardId(shard));
    assert_eq!([of(0), of(1), of(2), of(3)], [vec![1, 2, 4], vec![0], vec![3], vec![]]);
}

#[test]
fn old_checkpoints_go_and_those_of_others_stay() {
    let model = small();
    let directory = tempfile::tempdir().unwrap();
    for step in [10, 20, 30, 40] {
        write(directory.path(), &model, &split(&model, 1), step);
    }
    let mut other = small();
    other.origin = "ffff".to_owned();
    write(directory.path(), &other, &split(&other, 1), 15);
    let newer = write(directory.path(), &model, &split(&model, 1), 16);
    fs::write(newer.join("index.json"), r#"{"format": "foreshard.checkpoint/9"}"#).unwrap();
    let keep = Keep { last: 1, every: Some(20) };
    let gone = prune(directory.path(), &keep, &model.origin).unwrap();
    assert_eq!(gone, [10, 30].map(|s| directory.path().join(format!("step-{s:08}"))));
    let left: Vec<u64> = list(directory.path()).unwrap().into_iter().map(|(s, _)| s).collect();
    assert_eq!(left, [15, 16, 20, 40]);
    assert_eq!(names(directory.path()).len(), 4);
}

/// A run directory with a sound checkpoint (step 1) and a broken one (step 2).
fn run() -> TempDir {
    let model = small();
    let run = tempfile::tempdir().unwrap();
    let checkpoints = run.path().join("checkpoints");
    write(&checkpoints, &model, &split(&model, 2), 1);
    let broken = write(&checkpoints, &model, &split(&model, 2), 2);
    let shard = broken.join("shard-0.safetensors");
    let data = fs::read(&shard).unwrap();
    fs::write(&shard, &data[..data.len() - 4]).unwrap();
    run
}

fn foreshard(args: &[&str], path: &Path) -> (Output, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_foreshard")).arg("checkpoint").args(args).arg(path).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    (output, stdout, stderr)
}

#[test]
fn the_command_line_lists_verifies_and_exports() {
    let run = run();
    let (output, stdout, _) = foreshard(&["ls"], run.path());
    assert!(output.status.success());
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{stdout}");
    assert!(lines[1].trim_start().starts_with("1 ") && lines[1].contains("small") && lines[1].ends_with("ok"));
    assert!(lines[2].contains("broken: shard-0.safetensors has"), "{stdout}");

    let (output, stdout, _) = foreshard(&["verify"], run.path());
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout.contains("step-00000001: ok") && stdout.contains("cut short"), "{stdout}");
    let (output, ..) = foreshard(&["verify"], &run.path().join("checkpoints/step-00000001"));
    assert!(output.status.success());

    let out = run.path().join("out.safetensors");
    let (output, _, stderr) = foreshard(&["export", "-o", out.to_str().unwrap()], run.path());
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("skipped") && stderr.contains("step 1 of"), "{stderr}");
    SafeTensors::deserialize(&fs::read(&out).unwrap()).unwrap();

    let (output, _, stderr) = foreshard(&["ls"], &run.path().join("nowhere"));
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    let (output, _, stderr) = foreshard(&["export", "-o", "/dev/null/x"], run.path());
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.contains("cannot write /dev/null/x"), "{stderr}");
}

/// A file size limit stands in for a full disk.
#[test]
fn an_export_that_does_not_fit_leaves_nothing() {
    let model = model(&[(DType::Float32, vec![300, 1000], vec![])]);
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), &model, &[vec![0]], 1);
    let script = r#"trap "" XFSZ; ulimit -f 100; exec "$0" checkpoint export "$1" -o "$1/out.safetensors""#;
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_foreshard")]).arg(directory.path());
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("out.safetensors; is the disk full?"), "{stderr}");
    assert_eq!(names(directory.path()), ["step-00000001"]);
}
