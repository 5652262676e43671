//! Data as a job names it: every format gives the same batches, from any position, and bad data is an error with a
//! file's name in it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Float32Array, Int32Array, ListArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Float32Type, Int32Type};
use foreshard::api::{Data, Format, Shuffle};
use foreshard::graph::Manifest;
use foreshard::trainer::{DataError, Reader};
use foreshard::wire::{Batch, Position};
use proptest::prelude::*;
use tempfile::TempDir;

/// A model that takes batches of 4 rows `x` f32[3] and `y` s32[], in microbatches of 2.
fn fixed() -> Manifest {
    manifest(
        r#"{"name": "x", "dtype": "float32", "shape": [4, 3]}, {"name": "y", "dtype": "int32", "shape": [4]}"#,
        &[("mb2", r#"{"x": [2, 3], "y": [2]}"#)],
    )
}

/// A model that takes batches of 4 rows `tokens` s32[t] for t of 2, 5 and 8.
fn bucketed() -> Manifest {
    manifest(
        r#"{"name": "tokens", "dtype": "int32", "shape": [4, 8]}"#,
        &[("mb2", r#"{"tokens": [2, 8]}"#), ("mb2-t5", r#"{"tokens": [2, 5]}"#), ("mb2-t2", r#"{"tokens": [2, 2]}"#)],
    )
}

fn manifest(batch: &str, variants: &[(&str, &str)]) -> Manifest {
    let hlo = r#"{"file": "f", "sha256": "00"}"#;
    let grads: Vec<String> = variants
        .iter()
        .map(|(name, shapes)| format!(r#"{{"name": "{name}", "microbatch": 2, "shapes": {shapes}, "hlo": {hlo}}}"#))
        .collect();
    let json = format!(
        r#"{{"format": "foreshard.bundle/1", "name": "m", "batch_size": 4, "slots": [], "metrics": [],
             "params": [{{"name": "w", "dtype": "float32", "shape": [1], "grad_dtype": "float32"}}],
             "batch": [{batch}], "grad": [{}], "init": {{"hlo": {hlo}}}, "update": {{"hlo": {hlo}}}}}"#,
        grads.join(", ")
    );
    Manifest::parse(json.as_bytes()).unwrap()
}

fn data(uri: &str) -> Data {
    Data {
        uri: Some(uri.to_owned()),
        format: None,
        columns: Default::default(),
        shuffle: Shuffle::Epoch,
        socket: None,
        credentials: None,
        feeder: None,
        read_ahead: 2,
    }
}

fn open(data: &Data, manifest: &Manifest, position: Position) -> Result<Reader, DataError> {
    Reader::open(data, manifest, 2, 7, position, &[])
}

/// The first batches from a position on.
fn batches(data: &Data, manifest: &Manifest, position: Position, n: usize) -> Vec<Batch> {
    open(data, manifest, position).unwrap().take(n).map(Result::unwrap).collect()
}

/// The error of data that cannot be read, whether it shows at once or later.
fn error(data: &Data, manifest: &Manifest) -> String {
    let read = open(data, manifest, Position::default()).and_then(|r| r.take(20).collect::<Result<Vec<_>, _>>());
    read.expect_err("this data is bad").to_string()
}

fn ints(batch: &Batch, tensor: usize) -> Vec<i32> {
    batch.tensors[tensor].data.chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Ten rows of `x` and `y`; `x` begins with whole numbers only.
fn x(row: usize) -> [f32; 3] {
    std::array::from_fn(|i| if row < 5 { (row + i) as f32 } else { (row + i) as f32 / 2.0 })
}

const ROWS: usize = 10;

fn csv() -> Vec<u8> {
    let row = |r| format!("{},{},{},{r}\n", x(r)[0], x(r)[1], x(r)[2]);
    format!("x0,x1,x2,y\n{}", (0..ROWS).map(row).collect::<String>()).into_bytes()
}

fn jsonl() -> Vec<u8> {
    (0..ROWS).map(|r| format!("{{\"x\": {:?}, \"y\": {r}}}\n", x(r))).collect::<String>().into_bytes()
}

fn parquet() -> Vec<u8> {
    let rows = (0..ROWS).map(|r| Some(x(r).map(Some)));
    let xs: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(rows));
    let ys: ArrayRef = Arc::new(Int32Array::from_iter_values(0..ROWS as i32));
    parquet_of(&RecordBatch::try_from_iter([("x", xs), ("y", ys)]).unwrap())
}

/// In row groups of 4.
fn parquet_of(batch: &RecordBatch) -> Vec<u8> {
    let properties = parquet::file::properties::WriterProperties::builder()
        .set_max_row_group_row_count(Some(4))
        .set_compression(parquet::basic::Compression::SNAPPY)
        .build();
    let mut writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.into_inner().unwrap()
}

fn safetensors() -> Vec<u8> {
    use safetensors::{Dtype, tensor::TensorView};
    let xs: Vec<u8> = (0..ROWS).flat_map(x).flat_map(f32::to_le_bytes).collect();
    let ys: Vec<u8> = (0..ROWS as i32).flat_map(i32::to_le_bytes).collect();
    let views = [
        ("x", TensorView::new(Dtype::F32, vec![ROWS, 3], &xs).unwrap()),
        ("y", TensorView::new(Dtype::I32, vec![ROWS], &ys).unwrap()),
    ];
    safetensors::serialize(views, None).unwrap()
}

/// Only `x`: an npy file holds one array.
fn npy() -> Vec<u8> {
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({ROWS}, 3), }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.bytes());
    file.extend((0..ROWS).flat_map(x).flat_map(f32::to_le_bytes));
    file
}

fn gz(data: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(data).unwrap();
    packed.finish().unwrap()
}

fn write(directory: &TempDir, name: &str, content: &[u8]) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

/// Data in one file.
fn file(directory: &TempDir, name: &str, content: &[u8]) -> Data {
    let mut data = data(write(directory, name, content).to_str().unwrap());
    if name.contains("csv") {
        data.columns.insert("x".to_owned(), vec!["x*".to_owned()]);
    }
    data
}

const START: Position = Position { epoch: 0, sample: 0 };

#[test]
fn every_format_gives_the_same_batches() {
    let directory = tempfile::tempdir().unwrap();
    let expected = batches(&file(&directory, "d.safetensors", &safetensors()), &fixed(), START, 6);
    let rows: Vec<i32> = expected.iter().flat_map(|b| ints(b, 1)).collect();
    for pass in rows.chunks(8) {
        let mut pass = pass.to_vec();
        pass.sort_unstable();
        pass.dedup();
        assert_eq!(pass.len(), 8, "a row came twice in one pass: {rows:?}");
    }
    for (batch, y) in expected.iter().zip(rows.chunks(4)) {
        let xs: Vec<u8> = y.iter().flat_map(|&r| x(r as usize)).flat_map(f32::to_le_bytes).collect();
        assert_eq!(batch.tensors[0].data, xs);
        assert_eq!(batch.variant, "mb2");
    }
    for (name, content) in [
        ("d.csv", csv()),
        ("d.csv.gz", gz(&csv())),
        ("d.jsonl", jsonl()),
        ("d.ndjson.gz", gz(&jsonl())),
        ("d.parquet", parquet()),
    ] {
        assert_eq!(batches(&file(&directory, name, &content), &fixed(), START, 6), expected, "{name}");
    }
    let only_x = manifest(r#"{"name": "x", "dtype": "float32", "shape": [4, 3]}"#, &[("mb2", r#"{"x": [2, 3]}"#)]);
    for batch in batches(&file(&directory, "d.npy", &npy()), &only_x, START, 6).iter().zip(&expected) {
        assert_eq!(batch.0.tensors[0], batch.1.tensors[0]);
    }
}

#[test]
fn files_of_a_directory_follow_each_other_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let lines: Vec<Vec<u8>> = jsonl().split_inclusive(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    write(&directory, "part-1.jsonl.gz", &gz(&lines[4..].concat()));
    write(&directory, "part-0.jsonl", &lines[..4].concat());
    write(&directory, "README.md", b"not data");
    let uri = format!("file://{}", directory.path().display());
    let whole = file(&directory, "whole.json", &jsonl());
    let whole = Data { format: Some(Format::Jsonl), ..whole };
    let expected = batches(&whole, &fixed(), START, 5);
    assert_eq!(batches(&data(&uri), &fixed(), START, 5), expected);
    assert!(error(&data("memory:///empty"), &fixed()).contains("nothing is there"));
}

/// A web server with one file, in the few words of HTTP that an object store needs.
fn serve(path: &'static str, content: Vec<u8>) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let work = move || {
        for mut stream in listener.incoming().flatten() {
            let request: Vec<String> =
                BufReader::new(&stream).lines().map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
            let mut words = request[0].split(' ');
            let (method, found) = (words.next().unwrap(), words.next() == Some(path));
            let (status, length) = if found { ("200 OK", content.len()) } else { ("404 Not Found", 0) };
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
            let body = if found && method == "GET" { &content[..] } else { &[] };
            let _ = stream.write_all(&[head.as_bytes(), body].concat());
        }
    };
    std::thread::Builder::new().spawn(work).unwrap();
    format!("http://{address}")
}

#[test]
fn object_stores_give_the_same_batches_as_files() {
    let directory = tempfile::tempdir().unwrap();
    let expected = batches(&file(&directory, "d.jsonl", &jsonl()), &fixed(), START, 5);
    let server = serve("/some/d.jsonl.gz", gz(&jsonl()));
    let settings = [("ALLOW_HTTP".to_owned(), "true".to_owned())];
    let reader = Reader::open(&data(&format!("{server}/some/d.jsonl.gz")), &fixed(), 2, 7, START, &settings).unwrap();
    assert_eq!(reader.take(5).map(Result::unwrap).collect::<Vec<_>>(), expected);
    let missing = format!("{server}/other.jsonl");
    let e = Reader::open(&data(&missing), &fixed(), 2, 7, START, &settings).err().unwrap().to_string();
    assert!(e.contains(&missing), "{e}");
}

#[test]
fn text_is_one_string_across_files() {
    let tokens = r#"{"name": "tokens", "dtype": "int32", "shape": [4, 3]}, {"name": "targets", "dtype": "int32", "shape": [4, 3]}"#;
    let manifest = manifest(tokens, &[("mb2", r#"{"tokens": [2, 3], "targets": [2, 3]}"#)]);
    let directory = tempfile::tempdir().unwrap();
    let text: Vec<u8> = (b'a'..=b'z').collect();
    write(&directory, "a.txt", &text[..5]);
    write(&directory, "b.txt.gz", &gz(&text[5..]));
    let data = Data { shuffle: Shuffle::None, ..data(directory.path().to_str().unwrap()) };
    let batch = batches(&data, &manifest, START, 1).remove(0);
    let expected: Vec<i32> = text[..13].iter().map(|&b| b.into()).collect();
    assert_eq!((ints(&batch, 0), ints(&batch, 1)), (expected[..12].to_vec(), expected[1..].to_vec()));
}

/// Rows of so many tokens: row r of length n is r+1, n times.
fn ragged(lengths: &[usize]) -> Vec<u8> {
    let row = |(r, &n): (usize, &usize)| format!("{{\"tokens\": {:?}}}\n", vec![r + 1; n]);
    lengths.iter().enumerate().map(row).collect::<String>().into_bytes()
}

#[test]
fn rows_are_padded_to_the_smallest_bucket_and_batches_have_one() {
    let directory = tempfile::tempdir().unwrap();
    let lengths = [1, 5, 2, 2, 3, 8, 1, 4, 3, 6, 7, 8];
    let jsonl = Data { shuffle: Shuffle::None, ..file(&directory, "r.jsonl", &ragged(&lengths)) };
    let found: Vec<(String, Vec<i32>)> =
        batches(&jsonl, &bucketed(), START, 3).iter().map(|b| (b.variant.clone(), ints(b, 0))).collect();
    let padded = |rows: &[i32], width: usize| -> Vec<i32> {
        let row = |&r: &i32| (0..width).map(move |i| if i < lengths[r as usize - 1] { r } else { 0 });
        rows.iter().flat_map(row).collect()
    };
    assert_eq!(found[0], ("mb2-t2".to_owned(), padded(&[1, 3, 4, 7], 2)));
    assert_eq!(found[1], ("mb2-t5".to_owned(), padded(&[2, 5, 8, 9], 5)));
    assert_eq!(found[2], ("mb2".to_owned(), padded(&[6, 10, 11, 12], 8)));

    let rows = lengths.iter().enumerate().map(|(r, &n)| Some(vec![Some(r as i32 + 1); n]));
    let lists: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(rows));
    let lists = RecordBatch::try_from_iter([("tokens", lists)]).unwrap();
    let parquet = file(&directory, "r.parquet", &parquet_of(&lists));
    let jsonl = Data { shuffle: Shuffle::Epoch, ..jsonl };
    assert_eq!(batches(&parquet, &bucketed(), START, 9), batches(&jsonl, &bucketed(), START, 9));

    let longer = file(&directory, "l.jsonl", &ragged(&[1, 2, 9, 4]));
    let e = error(&longer, &bucketed());
    for part in ["l.jsonl", "row 2", "9 values", "\"tokens\"", "s32[8]"] {
        assert!(e.contains(part), "{e:?} lacks {part:?}");
    }
}

#[test]
fn rows_that_fill_no_batch_of_their_own_join_a_larger_bucket() {
    let directory = tempfile::tempdir().unwrap();
    // Three short, five middle, one long: the short ones go up, the long one gets company from below.
    let rows = file(&directory, "r.jsonl", &ragged(&[1, 2, 1, 4, 4, 4, 4, 4, 8]));
    let found = batches(&rows, &bucketed(), START, 2);
    let mut variants: Vec<&str> = found.iter().map(|b| b.variant.as_str()).collect();
    variants.sort_unstable();
    assert_eq!(variants, ["mb2", "mb2-t5"]);
    let long = found.iter().find(|b| b.variant == "mb2").unwrap();
    let company = ints(long, 0).chunks(8).filter(|row| row[4..] == [0; 4]).count();
    assert_eq!((company, ints(long, 0).iter().filter(|&&v| v == 9).count()), (3, 8));
}

#[test]
fn rows_of_another_length_are_an_error_though_their_sum_fits() {
    let directory = tempfile::tempdir().unwrap();
    let lines = "{\"x\": [1, 2, 3], \"y\": 0}\n{\"x\": [1, 2], \"y\": 0}\n{\"x\": [1, 2, 3, 4], \"y\": 0}\n";
    let e = error(&file(&directory, "s.jsonl", lines.as_bytes()), &fixed());
    for part in ["s.jsonl", "takes 3 values per row", "gives 2 in row 1"] {
        assert!(e.contains(part), "{e:?} lacks {part:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn goes_on_from_any_position(
        lengths in proptest::collection::vec(0usize..9, 4..60),
        shuffled: bool,
        from in 0usize..12,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let shuffle = if shuffled { Shuffle::Epoch } else { Shuffle::None };
        let data = Data { shuffle, ..file(&directory, "r.jsonl", &ragged(&lengths)) };
        let whole = batches(&data, &bucketed(), START, 16);
        let rest = batches(&data, &bucketed(), whole[from].position, 15 - from);
        prop_assert_eq!(&whole[from + 1..], &rest[..]);
    }
}

/// Opens and reads damaged data; anything but a panic is fine, and an error names the file.
fn survives(name: &str, content: &[u8], manifest: &Manifest) -> Result<(), TestCaseError> {
    let directory = tempfile::tempdir().unwrap();
    let data = file(&directory, name, content);
    let problem = match open(&data, manifest, START) {
        Ok(mut reader) => match reader.next() {
            Some(batch) => batch.err(),
            None => return Err(TestCaseError::fail("the reader died")),
        },
        Err(e) => Some(e),
    };
    if let Some(e) = problem {
        prop_assert!(e.to_string().contains(name), "{} is not named in {:?}", name, e.to_string());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_never_panic(format in 0usize..7, at: prop::sample::Index, bit in 0u8..8, cut: Option<prop::sample::Index>) {
        let (name, mut content) = match format {
            0 => ("d.csv", csv()),
            1 => ("d.jsonl", jsonl()),
            2 => ("d.parquet", parquet()),
            3 => ("d.safetensors", safetensors()),
            4 => ("d.npy", npy()),
            5 => ("d.csv.gz", gz(&csv())),
            _ => ("r.jsonl", ragged(&[1, 5, 2, 2, 3, 8, 1, 4, 3, 6, 7, 8])),
        };
        match cut {
            Some(cut) => content.truncate(cut.index(content.len())),
            None => { let at = at.index(content.len()); content[at] ^= 1 << bit }
        }
        let model = match format {
            4 => manifest(r#"{"name": "x", "dtype": "float32", "shape": [4, 3]}"#, &[("mb2", r#"{"x": [2, 3]}"#)]),
            6 => bucketed(),
            _ => fixed(),
        };
        survives(name, &content, &model)?;
    }
}

#[test]
fn files_cut_short_anywhere_are_refused_or_give_their_first_rows() {
    let directory = tempfile::tempdir().unwrap();
    let only_x = manifest(r#"{"name": "x", "dtype": "float32", "shape": [4, 3]}"#, &[("mb2", r#"{"x": [2, 3]}"#)]);
    for (name, content, manifest) in [
        ("d.csv", csv(), fixed()),
        ("d.jsonl", jsonl(), fixed()),
        ("d.parquet", parquet(), fixed()),
        ("d.safetensors", safetensors(), fixed()),
        ("d.npy", npy(), only_x),
        ("d.csv.gz", gz(&csv()), fixed()),
    ] {
        let lines = matches!(name, "d.csv" | "d.jsonl");
        for end in 0..content.len() {
            let data = Data { shuffle: Shuffle::None, ..file(&directory, name, &content[..end]) };
            let reader = match open(&data, &manifest, START) {
                Ok(reader) => reader,
                Err(e) => {
                    assert!(e.to_string().contains(name), "cut at {end}: {e}");
                    continue;
                }
            };
            // Only of lines can a part be told from the whole: all rows but the last are what they were.
            assert!(lines, "{name} cut at {end} of {} is taken for whole", content.len());
            let n = reader.n_batches.unwrap() as usize;
            let whole = content[..end].iter().filter(|&&b| b == b'\n').count() - usize::from(name == "d.csv");
            assert!(4 * n <= whole + 1, "{name} cut at {end}");
            for (b, batch) in reader.take(n).enumerate() {
                for (i, found) in batch.unwrap().tensors[0].data.chunks(12).enumerate() {
                    let row = 4 * b + i;
                    let expected: Vec<u8> = x(row).into_iter().flat_map(f32::to_le_bytes).collect();
                    assert!(row == whole || found == expected, "{name} cut at {end}, row {row}");
                }
            }
        }
    }
}

/// A feeder that does with its connection what it is told to.
fn fed(manifest: &Manifest, feed: impl FnOnce(UnixStream) + Send + 'static) -> Vec<Result<Batch, String>> {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("feeder");
    let data = Data { uri: None, socket: Some(socket.display().to_string()), ..data("") };
    let reader = open(&data, manifest, START).unwrap();
    let feeder = std::thread::Builder::new().spawn(move || feed(connect(&socket))).unwrap();
    let found = reader.map(|b| b.map_err(|e| e.to_string())).collect();
    feeder.join().unwrap();
    found
}

fn connect(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(e) => assert!(Instant::now() < deadline, "nobody listens: {e}"),
        }
    }
}

fn send(stream: impl Write, batches: &[RecordBatch]) {
    let mut writer = arrow::ipc::writer::StreamWriter::try_new(stream, &batches[0].schema()).unwrap();
    // The reader may hang up.
    let _ = batches.iter().try_for_each(|b| writer.write(b)).and_then(|()| writer.finish());
}

fn rows_of(x: ArrayRef, y: ArrayRef) -> RecordBatch {
    RecordBatch::try_from_iter([("x", x), ("y", y)]).unwrap()
}

fn good(rows: usize) -> RecordBatch {
    let item = Arc::new(Field::new_list_field(DataType::Float32, false));
    let xs: ArrayRef = Arc::new(Float32Array::from_iter_values((0..rows).flat_map(x)));
    let xs = arrow::array::FixedSizeListArray::new(item, 3, xs, None);
    rows_of(Arc::new(xs), Arc::new(Int32Array::from_iter_values(0..rows as i32)))
}

#[test]
fn a_feeder_gives_batches_of_any_number_of_rows() {
    let found = fed(&fixed(), |s| send(s, &[good(3), good(6), good(1)]));
    let ys: Vec<Vec<i32>> = found.into_iter().map(|b| ints(&b.unwrap(), 1)).collect();
    assert_eq!(ys, [[0, 1, 2, 0], [1, 2, 3, 4]], "the rest of two rows fills no batch");

    let lengths = [1, 5, 2, 2, 3, 1];
    let rows = lengths.iter().map(|&n| Some(vec![Some(n as i32); n]));
    let lists: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(rows));
    let lists = RecordBatch::try_from_iter([("tokens", lists)]).unwrap();
    let found = fed(&bucketed(), move |s| send(s, &[lists]));
    let [Ok(only)] = &found[..] else { panic!("{found:?}") };
    assert_eq!((only.variant.as_str(), ints(only, 0)), ("mb2-t2", vec![1, 0, 2, 2, 2, 2, 1, 0]));
}

#[test]
fn what_a_feeder_does_wrong_is_said() {
    let last = |found: Vec<Result<Batch, String>>| found.into_iter().next_back().expect("an error").unwrap_err();
    let e = last(fed(&fixed(), |mut s| drop(s.write_all(b"GET / HTTP/1.1\r\n\r\n"))));
    assert!(e.contains("not an Arrow IPC stream"), "{e}");
    let e = last(fed(&fixed(), drop));
    assert!(e.contains("closed before anything was written"), "{e}");
    let short: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>([Some([Some(1.0); 2])]));
    let y: ArrayRef = Arc::new(Int32Array::from(vec![1]));
    let batch = rows_of(short, y.clone());
    let e = last(fed(&fixed(), move |s| send(s, &[batch])));
    assert!(e.contains("takes 3 values per row") && e.contains("gives 2 in row 0"), "{e}");
    let whole: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>([Some([Some(1.0); 3])]));
    let real: ArrayRef = Arc::new(Float32Array::from(vec![1.5]));
    let batch = rows_of(whole.clone(), real);
    let e = last(fed(&fixed(), move |s| send(s, &[batch])));
    assert!(e.contains("column \"y\": Float32 would be rounded to Int32"), "{e}");
    let batch = RecordBatch::try_from_iter([("x", whole), ("label", y)]).unwrap();
    let e = last(fed(&fixed(), move |s| send(s, &[batch])));
    assert!(e.contains("no column \"y\"") && e.contains("\"label\""), "{e}");
    let mut bytes = Vec::new();
    send(&mut bytes, &[good(4), good(4)]);
    let cut = bytes.len() * 3 / 4;
    let found = fed(&fixed(), move |mut s| drop(s.write_all(&bytes[..cut])));
    assert!(found[0].is_ok());
    let e = last(found);
    assert!(e.contains("the stream broke after 4 rows"), "{e}");
}
