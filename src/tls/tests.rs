use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::*;

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
}

fn today() -> Range<i64> {
    now() - 3600..now() + 3600
}

fn authority(job: u8) -> Authority {
    Authority::new(&[job; 32], &format!("job-{job}"), today()).unwrap()
}

fn part(job: u8, name: Name) -> Identity {
    authority(job).identity(name, today()).unwrap()
}

/// Both ends of a connection that the client makes to `whom`, or why they refuse it. A client that is let in says a
/// word, and hears one.
fn meet(
    server: Option<Identity>,
    client: Option<Identity>,
    whom: Name,
) -> (Result<Stream, String>, Result<(), String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    let client = || {
        let socket = TcpStream::connect(at)?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut stream = Stream::dial(socket, client.as_ref(), whom)?;
        stream.writer.write_all(b"word")?;
        let mut word = [0; 4];
        stream.reader.read_exact(&mut word)
    };
    std::thread::scope(|threads| {
        let client = threads.spawn(client);
        let socket = listener.accept().unwrap().0;
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut accepted = Stream::accept(socket, server.as_ref());
        if let Ok(stream) = &mut accepted {
            let _ = stream.writer.write_all(b"word");
        }
        let said: std::io::Result<()> = client.join().unwrap();
        (accepted.map_err(|e| e.to_string()), said.map_err(|e| e.to_string()))
    })
}

fn refused(server: Identity, client: Identity, whom: Name) -> (String, String) {
    let (server, client) = meet(Some(server), Some(client), whom);
    (server.err().unwrap_or_default(), client.err().unwrap_or_default())
}

#[test]
fn parts_of_a_job_know_each_other_by_name() {
    let (stream, said) = meet(Some(part(1, Name::Head)), Some(part(1, Name::Worker(3))), Name::Head);
    said.unwrap();
    let stream = stream.unwrap();
    stream.is(Name::Worker(3)).unwrap();
    assert_eq!(stream.is(Name::Worker(4)).unwrap_err().to_string(), "its certificate is not that of worker-4");
    assert!(is_refusal(&stream.is(Name::Operator).unwrap_err()));
    let (_, said) = meet(Some(part(1, Name::Worker(2))), Some(part(1, Name::Worker(3))), Name::Head);
    assert_eq!(said.unwrap_err(), "its certificate is not that of head");
}

#[test]
fn both_ends_say_why_they_refuse_each_other() {
    let (server, client) = refused(part(1, Name::Head), part(2, Name::Worker(0)), Name::Head);
    assert_eq!(server, "it refuses this side's certificate: it is of another job");
    assert_eq!(client, "its certificate is not of this job");

    // One that knows this job's authority, and shows a certificate of another one.
    let other = authority(2).issue(Name::Worker(0), today()).unwrap();
    let mixed = Certificate { authority: authority(1).issue(Name::Head, today()).unwrap().authority, ..other };
    let (server, client) = refused(part(1, Name::Head), read(&mixed), Name::Head);
    assert_eq!(server, "its certificate is not of this job");
    assert_eq!(client, "it refuses this side's certificate: it is of another job");

    let past = now() - 7200..now() - 3600;
    let expired = authority(1).identity(Name::Worker(0), past.clone()).unwrap();
    let (server, client) = refused(part(1, Name::Head), expired, Name::Head);
    assert!(server.contains("expired"), "{server}");
    assert_eq!(client, "it refuses this side's certificate: it has expired");
    let expired = authority(1).identity(Name::Head, past).unwrap();
    let (server, client) = refused(expired, part(1, Name::Worker(0)), Name::Head);
    assert_eq!(server, "it refuses this side's certificate: it has expired");
    assert!(client.contains("expired"), "{client}");
}

#[test]
fn one_that_speaks_no_tls_is_refused() {
    let (server, _) = meet(Some(part(1, Name::Head)), None, Name::Head);
    assert_eq!(server.err().unwrap(), "it does not speak TLS");
    let (_, client) = meet(None, Some(part(1, Name::Worker(0))), Name::Head);
    assert_eq!(client.unwrap_err(), "it does not speak TLS");
}

#[test]
fn both_directions_are_full_at_the_same_time() {
    const LENGTH: usize = 8 << 20;
    for identities in [None, Some((part(1, Name::Head), part(1, Name::Worker(0))))] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let (head, worker) = identities.unzip();
        let exchange = |stream: Stream, byte: u8| {
            let Stream { mut reader, mut writer } = stream;
            std::thread::scope(|threads| {
                threads.spawn(move || {
                    writer.write_all(&vec![byte; LENGTH]).unwrap();
                    writer.close().unwrap();
                });
                let mut all = Vec::new();
                reader.read_to_end(&mut all).unwrap();
                all
            })
        };
        std::thread::scope(|threads| {
            let client = || Stream::dial(TcpStream::connect(at).unwrap(), worker.as_ref(), Name::Head).unwrap();
            let client = threads.spawn(move || exchange(client(), 1));
            let found = exchange(Stream::accept(listener.accept().unwrap().0, head.as_ref()).unwrap(), 2);
            assert!(found == vec![1; LENGTH]);
            assert!(client.join().unwrap() == vec![2; LENGTH]);
        });
    }
}

fn write(directory: &Path, certificate: &Certificate) {
    let texts = [&certificate.authority, &certificate.certificate, &certificate.key];
    FILES.iter().zip(texts).for_each(|(file, text)| std::fs::write(directory.join(file), text).unwrap());
}

fn read(certificate: &Certificate) -> Identity {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), certificate);
    Identity::read(directory.path()).unwrap()
}

#[test]
fn an_authority_is_made_again_from_the_same_seed() {
    let issued = authority(1).issue(Name::Head, today()).unwrap();
    assert_eq!(meet(Some(read(&issued)), Some(part(1, Name::Worker(0))), Name::Head).1, Ok(()));
}

#[test]
fn files_that_are_no_certificates_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let good = authority(1).issue(Name::Head, today()).unwrap();
    let swapped = Certificate { key: authority(1).issue(Name::Head, today()).unwrap().key, ..good.clone() };
    write(directory.path(), &swapped);
    assert!(matches!(Identity::read(directory.path()), Err(TlsError::Unusable(_))), "a key of another certificate");
    for file in FILES {
        for text in ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            write(directory.path(), &good);
            std::fs::write(directory.path().join(file), text).unwrap();
            assert!(Identity::read(directory.path()).is_err(), "{file}: {text:?}");
        }
        std::fs::remove_file(directory.path().join(file)).unwrap();
        let said = Identity::read(directory.path()).unwrap_err().to_string();
        assert!(said.contains(file), "{said}");
    }
}
