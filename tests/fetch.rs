//! Archives over HTTP, from a server on the loopback interface: what is taken, what is refused, and how it is told.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};

use sha2::{Digest, Sha256};

/// Answers every request with what `answer` makes of its path, and closes.
fn serve(answer: impl Fn(&str) -> Vec<u8> + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let listen = move || {
        for stream in listener.incoming() {
            let _ = respond(stream.unwrap(), &answer);
        }
    };
    std::thread::Builder::new().name("server".to_owned()).spawn(listen).unwrap();
    address
}

fn respond(mut stream: TcpStream, answer: &impl Fn(&str) -> Vec<u8>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    while lines.next().is_some_and(|line| line.is_ok_and(|l| !l.is_empty())) {}
    stream.write_all(&answer(first.split(' ').nth(1).unwrap_or_default()))
}

fn answer(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n").as_bytes(), body].concat()
}

fn ok(body: &[u8]) -> Vec<u8> {
    answer("200 OK", &format!("Content-Length: {}\r\n", body.len()), body)
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// A bundle as `tar -czf` packs it.
fn packed(bundle: &str) -> Vec<u8> {
    let gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gz);
    tar.append_dir_all(bundle, Path::new("bundles").join(bundle)).unwrap();
    tar.into_inner().unwrap().finish().unwrap()
}

fn manifest(directory: &Path, url: &str, sha256: &str, more: &str) -> std::path::PathBuf {
    let data = std::env::current_dir().unwrap().join("examples/data/digits.csv");
    let yaml = format!(
        "apiVersion: foreshard.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: digits}}\nspec:\n  \
         bundle: models/mlp_digits.bundle\n  data: {{uri: {}, columns: {{x: [\"pixel*\"], \"y\": [label]}}}}\n  steps: 4\n  \
         volumes: [{{name: models, archive: {{url: {url:?}, sha256: {sha256}{more}}}}}]\n",
        data.display()
    );
    let path = directory.join("job.yaml");
    std::fs::write(&path, yaml).unwrap();
    path
}

/// Requests go where they are sent, whatever proxies this machine has.
fn alone(mut command: Command) -> Command {
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    command
}

/// `foreshard fetch`, as the operator starts it, and its last words.
fn fetch(directory: &Path, manifest: &Path) -> (Output, String) {
    fetch_with(directory, manifest, &[])
}

fn fetch_with(directory: &Path, manifest: &Path, environment: &[(&str, &str)]) -> (Output, String) {
    let words = directory.join("words");
    let _ = std::fs::remove_file(&words);
    std::fs::create_dir_all(directory.join("models")).unwrap();
    let mut command = alone(Command::new(env!("CARGO_BIN_EXE_foreshard")));
    let command = command.arg("fetch").arg(manifest).arg("--last-words").arg(&words).current_dir(directory);
    command.envs(environment.iter().copied());
    let done = command.output().unwrap();
    (done, std::fs::read_to_string(words).unwrap_or_default())
}

#[test]
fn an_archive_fills_its_directory_also_when_an_earlier_try_left_something_and_is_not_fetched_twice() {
    let bytes = packed("mlp_digits.bundle");
    let sha256 = hex(&bytes);
    let address = serve(move |path| match path {
        "/moved.tgz" => answer("302 Found", "Location: /a.tgz?signature=SECRET\r\nContent-Length: 0\r\n", b""),
        "/a.tgz?signature=SECRET" => ok(&bytes),
        _ => answer("404 Not Found", "Content-Length: 0\r\n", b""),
    });
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(directory.path().join("models/rest")).unwrap();
    std::fs::write(directory.path().join("models/half"), "half").unwrap();
    let at = |path: &str| manifest(directory.path(), &format!("http://{address}/{path}"), &sha256, "");
    let (done, words) = fetch(directory.path(), &at("moved.tgz"));
    assert!(done.status.success(), "{words}");
    let models = directory.path().join("models");
    let mine = std::fs::read(models.join("mlp_digits.bundle/manifest.json")).unwrap();
    assert_eq!(mine, std::fs::read("bundles/mlp_digits.bundle/manifest.json").unwrap());
    assert!(!models.join("half").exists() && !models.join("rest").exists());
    let (again, _) = fetch(directory.path(), &at("no-more.tgz"));
    assert!(again.status.success(), "what is there need not be fetched");
}

#[test]
fn what_cannot_be_taken_is_told_with_its_field_and_the_way_out_and_leaves_nothing() {
    let bytes = packed("mlp_digits.bundle");
    let (sha256, length) = (hex(&bytes), bytes.len());
    let moved = |to: &str| answer("302 Found", &format!("Location: {to}\r\nContent-Length: 0\r\n"), b"");
    let served = bytes.clone();
    let address = serve(move |path| match path.split('?').next().unwrap_or_default() {
        "/a.tgz" => ok(&served),
        "/cut" => answer("200 OK", &format!("Content-Length: {}\r\n", served.len()), &served[..1000]),
        "/claims" => answer("200 OK", "Content-Length: 9000000000\r\n", b""),
        // Nobody says how much comes.
        "/endless" => answer("200 OK", "", &served),
        "/denied" => answer("403 Forbidden", "Content-Length: 0\r\n", b""),
        "/busy" => answer("503 Service Unavailable", "Content-Length: 0\r\n", b""),
        "/text" => ok(b"<html>sign in</html>"),
        "/round" => moved("/round"),
        _ => answer("404 Not Found", "Content-Length: 0\r\n", b""),
    });
    let text = hex(b"<html>sign in</html>");
    let other = "0".repeat(64);
    let permanent = Some(2);
    let passing = Some(1);
    for (path, sha256, more, code, says) in [
        ("a.tgz", &other, "", permanent, &[&*format!("has {sha256}, the manifest says {other}"), "sha256sum"][..]),
        ("a.tgz", &sha256, ", sizeLimit: 1Ki", permanent, &["is larger than 1024 bytes; raise sizeLimit"]),
        ("claims", &sha256, "", permanent, &["is larger than 4294967296 bytes"]),
        ("endless", &sha256, ", sizeLimit: 1Ki", permanent, &["is larger than 1024 bytes"]),
        ("text", &text, "", permanent, &["is no tar archive, plain or packed by gzip"]),
        ("cut", &sha256, "", passing, &[&*format!("ended after 1000 of {length} bytes"), "cut short"]),
        ("none", &sha256, "", passing, &["answered 404 Not Found", "correct the URL"]),
        ("denied?signature=SECRET", &sha256, "", passing, &["answered 403", "presigned URL may have run out"]),
        ("busy", &sha256, "", passing, &["answered 503", "the next try"]),
        ("round", &sha256, "", passing, &["leads too far", "more than 5 times"]),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let job = manifest(directory.path(), &format!("http://{address}/{path}"), sha256, more);
        let (done, words) = fetch(directory.path(), &job);
        assert_eq!(done.status.code(), code, "{words}");
        let said = String::from_utf8(done.stderr).unwrap();
        assert_eq!(said.trim_end(), format!("error: {words}"));
        for part in says.iter().chain(&["spec.volumes[models].archive: ", &format!("http://{address}/")]) {
            assert!(words.contains(part), "{part:?} is not in {words:?}");
        }
        assert!(!words.contains("SECRET"), "{words}");
        assert_eq!(std::fs::read_dir(directory.path().join("models")).unwrap().count(), 0);
    }
    let directory = tempfile::tempdir().unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (done, words) = fetch(directory.path(), &manifest(directory.path(), &format!("http://{closed}/a"), &other, ""));
    assert_eq!(done.status.code(), passing);
    assert!(words.contains("cannot be reached") && words.contains("refused"), "{words}");
}

#[test]
fn an_archive_in_s3_is_asked_for_by_a_url_that_the_credentials_of_its_volume_have_signed() {
    let bytes = packed("mlp_digits.bundle");
    let sha256 = hex(&bytes);
    let address = serve(move |path| match path.split_once('?') {
        Some(("/store/m/a.tgz", query)) if query.contains("X-Amz-Credential=mine%2F") => {
            assert!(query.contains("X-Amz-Signature="), "{query}");
            ok(&bytes)
        }
        _ => answer("403 Forbidden", "Content-Length: 0\r\n", b""),
    });
    let endpoint = format!("http://{address}");
    let closed = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let job = manifest(directory.path(), "s3://store/m/a.tgz", &sha256, ", credentials: c");
    let with = |key: &[(&str, &str)]| {
        let common = [("VOLUME_0_AWS_ENDPOINT", &*endpoint), ("VOLUME_0_AWS_METADATA_ENDPOINT", &*closed)];
        fetch_with(directory.path(), &job, &[&common, key].concat())
    };
    let secret = ("VOLUME_0_AWS_SECRET_ACCESS_KEY", "HIDDEN");
    // Those of another volume are none of its own.
    let (done, words) = with(&[("VOLUME_1_AWS_ACCESS_KEY_ID", "mine"), ("AWS_ACCESS_KEY_ID", "mine"), secret]);
    assert_eq!(done.status.code(), Some(1), "a secret may be corrected");
    assert!(words.contains("no request can be signed") && words.contains("AWS_ACCESS_KEY_ID"), "{words}");
    let (done, words) = with(&[("VOLUME_0_AWS_ACCESS_KEY_ID", "other"), secret]);
    assert_eq!(done.status.code(), Some(1), "{words}");
    assert!(words.contains("s3://store/m/a.tgz answered 403") && words.contains("credentials"), "{words}");
    assert!(!words.contains("HIDDEN") && !words.contains("Signature"), "{words}");
    let (done, words) = with(&[("VOLUME_0_AWS_ACCESS_KEY_ID", "mine"), secret]);
    assert!(done.status.success(), "{words}");
    assert!(directory.path().join("models/mlp_digits.bundle/manifest.json").exists());
}

#[test]
fn local_mode_fetches_what_is_not_there_and_touches_nothing_that_is() {
    let bytes = packed("mlp_digits.bundle");
    let sha256 = hex(&bytes);
    let address = serve(move |_| ok(&bytes));
    let directory = tempfile::tempdir().unwrap();
    let plugin = std::fs::canonicalize(support::plugin().find().unwrap().path()).unwrap();
    let run = |sha256: &str| {
        let job = manifest(directory.path(), &format!("http://{address}/a.tgz"), sha256, "");
        let mut command = alone(support::foreshard());
        command.args(["local", "run", "--run-dir", "run"]).arg(job).arg("--plugin").arg(&plugin);
        let done = command.current_dir(directory.path()).output().unwrap();
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    };
    let other = "0".repeat(64);
    let (code, said) = run(&other);
    assert!(code == Some(2) && said.contains("the manifest says"), "{said}");
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(left, ["job.yaml"], "nothing is left of what was refused");
    let (code, said) = run(&sha256);
    assert!(code == Some(0) && said.contains("fetched models: "), "{said}");
    std::fs::remove_dir_all(directory.path().join("run")).unwrap();
    let (code, said) = run(&sha256);
    assert!(code == Some(0) && !said.contains("fetched"), "{said}");
    let (code, said) = run(&other);
    assert!(code == Some(2) && said.contains("remove it, and the other is fetched"), "{said}");
}
