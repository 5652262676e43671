use std::io::{Seek, Write};

use tar::{Builder, EntryType, Header};

use super::FetchError;
use super::unpack::unpack;

/// A header of any name: the library writes none that leads elsewhere.
fn header(name: &str, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o777);
    header.set_cksum();
    header
}

fn archive(entries: &[(&str, EntryType, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, kind, data) in entries {
        builder.append(&header(name, *kind, data.len() as u64), *data).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packed.write_all(data).unwrap();
    packed.finish().unwrap()
}

/// Unpacks into a directory of its own.
fn unpacked(bytes: &[u8], limit: u64) -> (tempfile::TempDir, Result<u64, FetchError>) {
    let directory = tempfile::tempdir().unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    let into = directory.path().join("in");
    std::fs::create_dir(&into).unwrap();
    let result = unpack(&mut file, &into, limit, "http://here/a.tar");
    (directory, result)
}

#[test]
fn files_and_directories_come_out_as_they_went_in_plain_or_packed() {
    let long = "a/".repeat(80) + "long.txt";
    let mut builder = Builder::new(Vec::new());
    for (name, data) in [("./m.bundle/manifest.json", &b"{}"[..]), (&long, b"far down")] {
        let mut header = Header::new_gnu();
        header.set_size(data.len() as u64);
        builder.append_data(&mut header, name, data).unwrap();
    }
    let plain = builder.into_inner().unwrap();
    for bytes in [gzip(&plain), plain] {
        let (directory, n) = unpacked(&bytes, 1 << 20);
        assert_eq!(n.unwrap(), 2);
        let read = |name: &str| std::fs::read(directory.path().join("in").join(name)).unwrap();
        assert_eq!((read("m.bundle/manifest.json"), read(&long)), (b"{}".to_vec(), b"far down".to_vec()));
    }
}

#[test]
fn what_leads_elsewhere_is_refused_and_nothing_is_written_there() {
    use EntryType as T;
    for (name, kind, says) in [
        ("../out", T::Regular, "leads out of its directory"),
        ("a/../../out", T::Regular, "leads out of its directory"),
        ("/tmp/out", T::Regular, "leads out of its directory"),
        ("..", T::Directory, "leads out of its directory"),
        ("link", T::Symlink, "is a link"),
        ("link", T::Link, "is a link"),
        ("pipe", T::Fifo, "neither a file nor a directory"),
        ("disk", T::Block, "neither a file nor a directory"),
        ("a", T::Regular, "more than once"),
        ("a/b", T::Regular, "more than once"),
    ] {
        let (directory, result) = unpacked(&archive(&[("a", T::Regular, b"1"), (name, kind, b"")]), 1 << 20);
        let e = result.unwrap_err();
        assert!(e.is_permanent() && e.to_string().contains(says) && e.to_string().contains(name), "{e}");
        assert!(!directory.path().join("out").exists());
        assert!(std::fs::read_dir(directory.path().join("in")).unwrap().all(|f| f.unwrap().file_name() == "a"));
    }
}

#[test]
fn bombs_are_refused_before_they_cost_anything() {
    use EntryType as T;
    let e = |bytes: &[u8], limit| unpacked(bytes, limit).1.unwrap_err().to_string();
    let zeros = vec![0; 8 << 20];
    let bomb = gzip(&archive(&[("zeros", T::Regular, &zeros)]));
    assert!(bomb.len() < 20_000);
    assert!(e(&bomb, 1 << 20).contains("unpacks to more than 1048576 bytes; raise sizeLimit"));
    // A name of 8 MiB.
    let long = gzip(&archive(&[("././@LongLink", T::GNULongName, &zeros), ("a", T::Regular, b"")]));
    assert!(e(&long, 1 << 30).contains("a header of more than 1048576 bytes"));
    // A size that is only claimed.
    let mut cut = archive(&[]);
    cut.splice(..0, header("a", T::Regular, 1000).as_bytes().iter().copied());
    cut.truncate(512 + 100);
    assert!(e(&cut, 1 << 20).contains("is no tar archive"));
    assert!(e(b"not a tar", 1 << 20).contains("is no tar archive"));
    assert!(e(&archive(&[]), 1 << 20).contains("there is no file in it"));
}

#[test]
fn damage_is_told_and_never_panics() {
    let whole = gzip(&archive(&[("a/b", EntryType::Regular, &[7; 3000]), ("c", EntryType::Directory, b"")]));
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x5a;
        let _ = unpacked(&damaged, 1 << 20);
        let _ = unpacked(&whole[..at], 1 << 20);
    }
}
