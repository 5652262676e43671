//! Small modules that once took a reader down or held it up, each with its story, and a replay of what fuzzing found.
//!
//! A test here that never ends has found its bug again.

#[path = "../fuzz/src/checks.rs"]
mod checks;
#[path = "../fuzz/src/messages.rs"]
mod messages;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use foreshard::graph::cut;
use foreshard::graph::export::{dense, to_hlo};
use foreshard::graph::import::from_hlo;
use foreshard::graph::passes::{Limits, normalise};
use foreshard::graph::proto::{Writer, computation, instruction, module};
use foreshard::graph::verify::verify;
use foreshard::graph::{ArrayShape, DType, Graph, Manifest, Model, Shape};

/// An instruction in the making; its id is its position in its computation.
struct Instruction {
    opcode: &'static str,
    shape: Shape,
    operands: Vec<u64>,
    called: Vec<u64>,
    attributes: Writer,
}

fn op(opcode: &'static str, shape: &Shape, operands: &[u64]) -> Instruction {
    let (operands, called) = (operands.to_vec(), Vec::new());
    Instruction { opcode, shape: shape.clone(), operands, called, attributes: Writer::default() }
}

impl Instruction {
    fn number(mut self, field: u32, n: u64) -> Self {
        self.attributes.number(field, n);
        self
    }
    fn bytes(mut self, field: u32, bytes: &[u8]) -> Self {
        self.attributes.bytes(field, bytes);
        self
    }
    fn calls(mut self, computations: &[u64]) -> Self {
        self.called = computations.to_vec();
        self
    }
}

fn parameter(number: u64, shape: &Shape) -> Instruction {
    op("parameter", shape, &[]).number(instruction::PARAMETER_NUMBER, number)
}

fn element(index: u64, shape: &Shape, tuple: u64) -> Instruction {
    op("get-tuple-element", shape, &[tuple]).number(instruction::TUPLE_INDEX, index)
}

fn int(value: u64) -> Instruction {
    let mut literal = Writer::default();
    literal.bytes(1, &dense(&s32()));
    literal.numbers(4, [value]);
    op("constant", &s32(), &[]).bytes(instruction::LITERAL, &literal.0)
}

fn s32() -> Shape {
    ArrayShape::scalar(DType::Int32).into()
}
fn pred() -> Shape {
    ArrayShape::scalar(DType::Bool).into()
}
fn f32(dims: &[u64]) -> Shape {
    ArrayShape::new(DType::Float32, dims).into()
}

/// A module of computations whose ids count from one; the last op of each is its root, the last computation the entry.
fn module(computations: &[Vec<Instruction>]) -> Vec<u8> {
    let mut out = Writer::default();
    for (i, ops) in computations.iter().enumerate() {
        let mut c = Writer::default();
        c.bytes(computation::NAME, format!("c{i}").as_bytes());
        for (id, op) in ops.iter().enumerate() {
            let mut o = Writer::default();
            o.bytes(instruction::NAME, format!("op{id}").as_bytes());
            o.bytes(instruction::OPCODE, op.opcode.as_bytes());
            o.bytes(instruction::SHAPE, &dense(&op.shape));
            o.fields(&op.attributes.0);
            o.number(instruction::ID, id as u64);
            o.numbers(instruction::OPERANDS, op.operands.iter().copied());
            o.numbers(instruction::CALLED, op.called.iter().copied());
            c.bytes(computation::INSTRUCTIONS, &o.0);
        }
        c.number(computation::ID, i as u64 + 1);
        c.number(computation::ROOT_ID, ops.len() as u64 - 1);
        out.bytes(module::COMPUTATIONS, &c.0);
    }
    out.number(module::ENTRY_ID, computations.len() as u64);
    out.0
}

fn good(bytes: &[u8]) -> Graph {
    let graph = from_hlo(bytes).unwrap();
    verify(&graph).unwrap();
    graph
}

/// A loop over (counter, tensor) whose counter goes from 0 to 3 by way of `step`, around one matrix product.
fn counted(step: impl Fn(&mut Vec<Instruction>) -> u64) -> Vec<u8> {
    let x = f32(&[2, 2]);
    let state = Shape::Tuple(vec![s32(), x.clone()]);
    let mut dot = Writer::default();
    dot.numbers(1, [1]);
    dot.numbers(2, [0]);
    let mut body = vec![
        parameter(0, &state),
        element(0, &s32(), 0),
        element(1, &x, 0),
        op("dot", &x, &[2, 2]).bytes(instruction::DOT, &dot.0),
    ];
    let next = step(&mut body);
    body.push(op("tuple", &state, &[next, 3]));
    let compare = op("compare", &pred(), &[1, 2]).bytes(instruction::COMPARISON_DIRECTION, b"LT");
    let condition = vec![parameter(0, &state), element(0, &s32(), 0), int(3), compare];
    let entry = vec![
        parameter(0, &x),
        int(0),
        op("tuple", &state, &[1, 0]),
        op("while", &state, &[2]).calls(&[1, 2]),
        element(1, &x, 3),
    ];
    module(&[body, condition, entry])
}

fn n_products(bytes: &[u8]) -> usize {
    let flat = normalise(&good(bytes), Limits::default(), &[], &[]).unwrap().graph;
    flat.ops().filter(|(_, op)| &*op.opcode == "dot").count()
}

/// The count of trips was computed by recursion without memory: every use of a value computed it again.
#[test]
fn a_counter_that_is_doubled_seventy_times_is_computed_once_each_time() {
    let unrolled = counted(|body| {
        let mut at = 1;
        let mut push = |op: Instruction| {
            body.push(op);
            body.len() as u64 - 1
        };
        // (i + i) - i, over and over.
        for _ in 0..70 {
            let twice = push(op("add", &s32(), &[at, at]));
            at = push(op("subtract", &s32(), &[twice, at]));
        }
        let one = push(int(1));
        push(op("add", &s32(), &[at, one]))
    });
    assert_eq!(n_products(&unrolled), 3);
}

/// The same recursion ran out of stack on a long chain.
#[test]
fn a_counter_may_go_through_a_long_chain_of_ops() {
    let unrolled = counted(|body| {
        body.push(int(1));
        let one = body.len() as u64 - 1;
        body.push(op("add", &s32(), &[1, one]));
        for _ in 0..200_000 {
            let last = body.len() as u64 - 1;
            body.push(op("copy", &s32(), &[last]));
        }
        body.len() as u64 - 1
    });
    assert_eq!(n_products(&unrolled), 3);
}

/// Forty computations, each calling the one before it twice, do 2^40 calls and never add an op.
#[test]
fn calls_that_double_are_refused_in_time() {
    let mut computations = vec![vec![parameter(0, &s32()), int(1), op("add", &s32(), &[0, 1])]];
    for i in 1..40 {
        let call = |from| op("call", &s32(), &[from]).calls(&[i]);
        computations.push(vec![parameter(0, &s32()), call(0), call(1)]);
    }
    computations.push(vec![int(1), op("call", &s32(), &[0]).calls(&[40])]);
    let graph = good(&module(&computations));
    let limits = Limits { ops: 20_000, ..Limits::default() };
    let e = normalise(&graph, limits, &[], &[]).unwrap_err().to_string();
    assert!(e.contains("more than 640000 steps"), "{e}");
}

/// Writing one row made a list of all rows, known or not.
#[test]
fn writing_one_row_of_a_huge_tensor_takes_no_memory_for_the_others() {
    let (huge, row) = (f32(&[1 << 50, 1]), f32(&[1, 1]));
    let update = op("dynamic-update-slice", &huge, &[0, 1, 2, 3]);
    let graph = good(&module(&[vec![parameter(0, &huge), parameter(1, &row), int(5), int(0), update]]));
    let flat = normalise(&graph, Limits::default(), &[], &[]).unwrap().graph;
    assert!(flat.ops().any(|(_, op)| &*op.opcode == "dynamic-update-slice"));
}

/// Parameters are placed before all other ops, so theirs do not exist yet.
#[test]
fn a_parameter_that_reads_another_op_is_refused() {
    let mut strange = parameter(0, &s32());
    strange.operands = vec![1];
    let e = from_hlo(&module(&[vec![strange, int(1)]])).unwrap_err().to_string();
    assert!(e.contains("a parameter with operands"), "{e}");
}

/// The root tuple is taken apart unless an op reads it; only the low half of the ids says whether one does.
#[test]
fn a_root_that_is_read_under_a_longer_id_is_kept() {
    let pair = Shape::Tuple(vec![s32(), s32()]);
    let mut reader = element(0, &s32(), 0);
    reader.operands = vec![(7 << 32) | 2];
    let bytes = module(&[vec![int(1), reader, op("tuple", &pair, &[0, 0])]]);
    let graph = good(&bytes);
    assert_eq!((graph.n_ops(), graph.outputs().len()), (3, 2));
}

/// A call may promise another shape than its callee has; the passes believed the callee.
#[test]
fn calls_and_loops_yield_what_their_callees_yield() {
    let callee = || vec![int(1), int(2), op("tuple", &Shape::Tuple(vec![s32(), s32()]), &[0, 1])];
    let bytes = module(&[callee(), vec![op("call", &s32(), &[]).calls(&[1])]]);
    let e = verify(&from_hlo(&bytes).unwrap()).unwrap_err().to_string();
    assert!(e.contains("it yields s32[], the callee (s32[], s32[])"), "{e}");
    let body = vec![parameter(0, &s32()), op("copy", &s32(), &[0])];
    let bytes = module(&[body, vec![int(0), op("while", &s32(), &[0]).calls(&[1, 1])]]);
    let e = verify(&from_hlo(&bytes).unwrap()).unwrap_err().to_string();
    assert!(e.contains("it calls what yields [s32[], s32[]]"), "{e}");
}

/// Checks of dimension lists are quadratic in the number of axes.
#[test]
fn tensors_of_a_hundred_axes_are_refused() {
    let e = from_hlo(&module(&[vec![parameter(0, &f32(&[1; 100]))]])).unwrap_err().to_string();
    assert!(e.contains("100 axes, the limit is 64"), "{e}");
}

/// A name is made unique by a number behind it; the search for a free one began anew for every op.
#[test]
fn thousands_of_ops_of_one_name_are_written_in_time() {
    const HALF: u32 = 20_000;
    let mut graph = Graph::new("names");
    let mut last = graph.push_parameter(cut::parameter("x", s32()));
    for i in 0..2 * HALF {
        // The first half takes the names that the second would be given.
        let name = if i < HALF { format!("a.{}", HALF + i) } else { "a".to_owned() };
        last = graph.push(cut::op(&name, "copy", s32(), vec![last], Vec::new()));
    }
    graph.set_outputs(vec![last]);
    let again = from_hlo(&to_hlo(&graph, &[])).unwrap();
    let names: BTreeSet<&str> = again.ops().map(|(_, op)| op.name.as_str()).collect();
    assert_eq!(names.len(), graph.n_ops());
}

/// Likeness of two names takes time in proportion to the product of their lengths.
#[test]
fn a_name_of_a_megabyte_gets_no_suggestion() {
    let long = "n".repeat(1 << 20);
    let json = include_str!("data/manifest.json");
    let json = json.replace("\"name\": \"w\"", &format!("\"name\": \"{long}\""));
    let e = Manifest::parse(json.replace("\"param\": \"w\"", &format!("\"param\": \"{long}!\"")).as_bytes());
    assert!(e.unwrap_err().contains("which does not exist"));
}

/// Inputs that fuzzing found (`tests/data/fuzz/TARGET`), and files as their writers write them.
#[test]
fn what_fuzzing_found_holds() {
    let replay = |directory: &str, ending: &str, check: fn(&[u8])| {
        let mut n = 0;
        for path in files(Path::new(directory)).iter().filter(|p| p.to_string_lossy().ends_with(ending)) {
            eprintln!("{}", path.display());
            check(&std::fs::read(path).unwrap());
            n += 1;
        }
        n
    };
    assert!(replay("tests/data", ".hlo.pb", checks::import) > 4);
    assert!(replay("tests/data/stack.bundle", ".hlo.pb", checks::bundle) == 3);
    assert!(replay("bundles", "manifest.json", checks::manifest) > 4);
    let model = Model::import(&mut |file| std::fs::read(Path::new("tests/data/stack.bundle").join(file))).unwrap();
    let frames = messages::frames(&model);
    assert_eq!(checks::stack().fingerprint, model.fingerprint);
    frames.iter().for_each(|frame| checks::wire(frame));
    checks::wire(&frames.concat());
    replay("tests/data/fuzz/import", "", checks::import);
    replay("tests/data/fuzz/bundle", "", checks::bundle);
    replay("tests/data/fuzz/manifest", "", checks::manifest);
    replay("tests/data/fuzz/problem", "", checks::problem);
    replay("tests/data/fuzz/wire", "", checks::wire);
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}
