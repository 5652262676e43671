//! The binding on the real CPU plug-in: every transfer, every way to pass an argument, and modules that have been
//! through import and export.

mod support;

use foreshard::device::{Arg, Device};
use foreshard::graph::cut::{accumulate, zeros};
use foreshard::graph::export::{Alias, to_hlo};
use foreshard::graph::import::from_hlo;
use foreshard::graph::{ArrayShape, DType};

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn values_survive_the_way_to_the_device_and_back() {
    let device = support::cpu();
    for dtype in
        [DType::Bool, DType::Int8, DType::Uint32, DType::Bfloat16, DType::Float32, DType::Float64, DType::Int64]
    {
        for dims in [vec![], vec![0], vec![3], vec![2, 5, 7], vec![4, 0, 2]] {
            let shape = ArrayShape::new(dtype, dims);
            let data: Vec<u8> = (0..shape.bytes().0).map(|i| (i % 2) as u8).collect();
            let buffer = device.upload(&shape, &data).unwrap();
            let mut back = vec![9; data.len()];
            device.download(&buffer, &mut back).unwrap();
            assert_eq!(back, data, "{shape}");
        }
    }
}

#[test]
fn refuses_data_of_another_size() {
    let device = support::cpu();
    let shape = ArrayShape::new(DType::Float32, vec![3]);
    let e = device.upload(&shape, &[0; 8]).err().unwrap();
    assert_eq!(e.to_string(), "f32[3] where 8 bytes were given");
}

#[test]
fn donated_arguments_become_results_and_kept_ones_stay() {
    let device = support::cpu();
    let shape = ArrayShape::new(DType::Float32, vec![4]);
    let mut graph = zeros("sum", std::slice::from_ref(&shape));
    accumulate(&mut graph, &[0]);
    accumulate(&mut graph, &[0]);
    let aliases = [Alias { output: 0, parameter: 1 }];
    let sum = device.compile("sum", &to_hlo(&graph, &aliases), &aliases).unwrap();
    let upload = |v: f32| device.upload(&shape, &f32s(&[v; 4])).unwrap();
    let (kept, mut total) = (upload(1.0), upload(0.0));
    for _ in 0..1000 {
        total = device.execute(&sum, vec![Arg::Keep(&kept), Arg::Donate(total)]).unwrap().remove(0);
    }
    let mut out = vec![0; 16];
    device.download(&total, &mut out).unwrap();
    assert_eq!(out, f32s(&[1000.0; 4]));
    // The same argument, not donated: the plug-in must copy.
    let doubled = device.execute(&sum, vec![Arg::Keep(&kept), Arg::Keep(&kept)]).unwrap();
    device.download(&doubled[0], &mut out).unwrap();
    assert_eq!(out, f32s(&[2.0; 4]));
    device.download(&kept, &mut out).unwrap();
    assert_eq!(out, f32s(&[1.0; 4]));
    assert_eq!(device.memory(&sum).unwrap().aliased.0, 16);
}

#[test]
fn garbage_is_an_error_that_names_the_call() {
    let device = support::cpu();
    let e = device.compile("garbage", b"\xff\xff\xff", &[]).err().unwrap();
    assert!(e.to_string().starts_with("PJRT_Client_Compile: "), "{e}");
}

/// Modules written by JAX compute the same bits after import and export as before.
#[test]
fn imported_and_exported_modules_are_bit_equal() {
    let device = support::cpu();
    for name in ["scan", "mix"] {
        let bytes = std::fs::read(format!("tests/data/hlo/{name}.hlo.pb")).unwrap();
        let graph = from_hlo(&bytes).unwrap();
        let exported = to_hlo(&graph, &[]);
        assert_eq!(to_hlo(&from_hlo(&exported).unwrap(), &[]), exported, "{name}: export is a fixed point");
        let inputs: Vec<_> = graph
            .parameters()
            .iter()
            .map(|&p| {
                let shape = graph.op(p).shape.as_array().unwrap();
                let values = (0..shape.n_elements()).map(|i| match shape.dtype {
                    DType::Float32 => (((i * 37 % 19) as f32 - 9.0) / 10.0).to_le_bytes(),
                    _ => (i as u32 + 5).to_le_bytes(),
                });
                device.upload(shape, &values.flatten().collect::<Vec<u8>>()).unwrap()
            })
            .collect();
        let run = |hlo: &[u8]| {
            let executable = device.compile(name, hlo, &[]).unwrap();
            let results = device.execute(&executable, inputs.iter().map(Arg::Keep).collect()).unwrap();
            let of = |i: usize| graph.op(graph.outputs()[i]).shape.bytes().0 as usize;
            let download = |(i, b)| {
                let mut out = vec![0; of(i)];
                device.download(b, &mut out).unwrap();
                out
            };
            results.iter().enumerate().map(download).collect::<Vec<_>>()
        };
        let (before, after) = (run(&bytes), run(&exported));
        assert!(before.iter().flatten().any(|&b| b != 0));
        assert_eq!(before, after, "{name}");
    }
}
