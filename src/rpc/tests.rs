use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::{Code, Request, Response, Status};

use super::v1::{ApproveReply, ApproveRequest, Report, WatchRequest};
use super::*;
use crate::plan::explain::Short;
use crate::tls::{Authority, Identity, Name};
use crate::topology::Measured;
use crate::wire::report::{JobReport, JobState, Learned, PlanReport, Recommended, ShardReport};

const TOKEN: &str = "a secret";

/// A head with one report to give, that agrees to revision 3.
struct Desk(JobReport);

#[tonic::async_trait]
impl v1::head_server::Head for Desk {
    type WatchStream = BoxStream<'static, Result<Report, Status>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let first = futures::stream::iter([Ok(self.0.clone().into())]);
        Ok(Response::new(first.chain(futures::stream::pending()).boxed()))
    }

    async fn approve(&self, request: Request<ApproveRequest>) -> Result<Response<ApproveReply>, Status> {
        match request.into_inner().revision {
            3 => Ok(Response::new(ApproveReply { message: "it is done".to_owned() })),
            other => Err(Status::failed_precondition(format!("revision 3 is recommended, not {other}"))),
        }
    }
}

fn authority(seed: u8) -> Authority {
    Authority::new(&[seed; 32], "job", 0..i64::MAX).unwrap()
}

fn identity(seed: u8, name: Name) -> Identity {
    authority(seed).identity(name, 0..i64::MAX).unwrap()
}

/// Serves until the task is dropped, and says where.
fn open(identity: Option<Identity>, report: JobReport) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    (at, tokio::spawn(async move { serve(listener, TOKEN.to_owned(), identity, Desk(report)).await.unwrap() }))
}

fn operator(at: SocketAddr) -> Head {
    Head { at, token: TOKEN.to_owned(), identity: Some(identity(1, Name::Operator)) }
}

/// Everything is set, and nothing to what it would be otherwise.
fn full() -> JobReport {
    let shard =
        ShardReport { workers: vec![1, 0], ops: 7, busy_seconds: 0.25, memory: 1 << 40, sent: 9, recompute: true };
    let explanation = Short {
        limit: "a".to_owned(),
        binds: "b".to_owned(),
        next: "c".to_owned(),
        more: vec!["d".to_owned(), "e".to_owned()],
    };
    let plan = PlanReport {
        revision: 4,
        why: "because".to_owned(),
        step_seconds: 0.5,
        bound_seconds: 0.4,
        microbatch: 16,
        microbatches: 8,
        bytes_cut: 1 << 33,
        shards: vec![shard, ShardReport::default()],
        explanation: Some(explanation),
    };
    let measured = Measured { product: 1.5, memory: 2.0, other: 0.5, launch: 3.0 };
    JobReport {
        state: JobState::Training,
        step: 12,
        steps: 100,
        first_loss: Some(4.5),
        loss: Some(-0.5),
        step_seconds: Some(0.125),
        rate: Some(1e6),
        unit: "tokens".to_owned(),
        eta_seconds: Some(60.0),
        restarts: 2,
        plan: Some(plan),
        recommended: Some(Recommended { revision: 5, why: "better".to_owned() }),
        learned: Some(Learned { bundle: "ab".repeat(32), kinds: BTreeMap::from([("cpu".to_owned(), measured)]) }),
        busy: vec![0.5, 1.0],
        message: "all is well".to_owned(),
        results: "/job/results/a/run-1".to_owned(),
    }
}

#[test]
fn a_report_is_the_same_on_the_other_side() {
    for report in [full(), JobReport::default()] {
        let bytes = Report::from(report.clone()).encode_to_vec();
        assert_eq!(JobReport::from(Report::decode(&bytes[..]).unwrap()), report);
    }
    use JobState::{Done, Failed, Interrupted, Refused, Starting, Training};
    for state in [Starting, Training, Done, Interrupted, Refused, Failed] {
        let report = JobReport { state, ..JobReport::default() };
        assert_eq!(JobReport::from(Report::from(report.clone())), report);
    }
    let mad = JobReport { loss: Some(f64::NAN), eta_seconds: Some(f64::INFINITY), step: 3, ..JobReport::default() };
    let expected = JobReport { step: 3, ..JobReport::default() };
    assert_eq!(JobReport::from(Report::from(mad)), expected, "as in last words");
}

#[test]
fn a_report_of_another_version_says_what_both_know() {
    // Field 99 is a number, field 100 a message.
    let newer = [Report::from(full()).encode_to_vec(), vec![0x98, 0x06, 7, 0xa2, 0x06, 2, 8, 1]].concat();
    assert_eq!(JobReport::from(Report::decode(&newer[..]).unwrap()), full());
    let unknown = Report { state: 77, message: "paused".to_owned(), ..Report::default() };
    let read = JobReport::from(Report::decode(&unknown.encode_to_vec()[..]).unwrap());
    assert_eq!((read.state, read.message.as_str()), (JobState::Starting, "paused"));
    let older = JobReport::from(Report::decode(&[][..]).unwrap());
    assert_eq!(older, JobReport::default());
    let factors = v1::Factors { product: Some(2.0), ..v1::Factors::default() };
    let learned = v1::Learned { bundle: String::new(), kinds: BTreeMap::from([("cpu".to_owned(), factors)]) };
    assert_eq!(Learned::from(learned).kinds["cpu"], Measured { product: 2.0, ..Measured::NOMINAL });
}

#[tokio::test]
async fn both_ends_understand_each_other_over_mutual_tls_and_in_plain_text() {
    for (mine, theirs) in [(Some(identity(1, Name::Operator)), Some(identity(1, Name::Head))), (None, None)] {
        let (at, _serving) = open(theirs, full());
        let line = Head { at, token: TOKEN.to_owned(), identity: mine }.dial().await.unwrap();
        let mut reports = line.watch().await.unwrap();
        assert_eq!(reports.first().await.unwrap(), Some(full()));
        // A stream that waits keeps no call from its answer.
        assert_eq!(line.approve(3).await.unwrap(), "it is done");
        let why = line.approve(2).await.unwrap_err();
        let AskError::Call(status) = &why else { panic!("{why}") };
        assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "revision 3 is recommended, not 2"));
    }
}

#[tokio::test]
async fn only_the_operator_of_the_job_is_answered_and_only_by_its_head() {
    let (at, _serving) = open(Some(identity(1, Name::Head)), full());
    let refused = async |head: Head| {
        let why = match head.dial().await {
            Ok(line) => line.watch().await.err().expect("nobody answers"),
            Err(why) => why,
        };
        crate::telemetry::chain(&why)
    };
    let token = refused(Head { token: "another".to_owned(), ..operator(at) }).await;
    assert!(token.contains("the token is not that of the job"), "{token}");
    for stranger in [identity(1, Name::Worker(0)), identity(1, Name::Head)] {
        let said = refused(Head { identity: Some(stranger), ..operator(at) }).await;
        assert!(!said.contains("token"), "it was asked for its token: {said}");
    }
    let said = refused(Head { identity: Some(identity(2, Name::Operator)), ..operator(at) }).await;
    assert!(said.contains("its certificate is not of this job"), "{said}");
    // Who answers in the place of the head.
    let (at, _serving) = open(Some(identity(1, Name::Worker(0))), full());
    let said = refused(operator(at)).await;
    assert!(said.contains("its certificate is not that of head"), "{said}");
    // In plain text.
    let said = refused(Head { identity: None, ..operator(at) }).await;
    assert!(!said.contains("token"), "{said}");
}

/// Heads of the version before answered HTTP/1.1 in TLS without ALPN, and operators asked so.
#[tokio::test]
async fn who_speaks_no_grpc_is_told_from_others() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let old = TlsAcceptor::from(identity(1, Name::Head).server(&[]));
    let head = tokio::spawn(async move {
        let mut stream = old.accept(listener.accept().await.unwrap().0).await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let why = operator(at).dial().await.err().unwrap();
    assert!(matches!(why, AskError::Old), "{why}");
    head.await.unwrap();

    let (at, _serving) = open(Some(identity(1, Name::Head)), full());
    let old = TlsConnector::from(identity(1, Name::Operator).client(&[]));
    let mut stream = old.connect(Name::Head.server(), TcpStream::connect(at).await.unwrap()).await.unwrap();
    let _ = stream.write_all(b"GET /status HTTP/1.1\r\nhost: head\r\nauthorization: Bearer a secret\r\n\r\n").await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert_eq!(answer, b"", "an operator of before takes this for silence");
}

#[tokio::test]
async fn garbage_and_crowds_of_silent_connections_cost_a_head_nothing() {
    let (at, _serving) = open(Some(identity(1, Name::Head)), full());
    let watching = operator(at).dial().await.unwrap();
    let mut reports = watching.watch().await.unwrap();
    assert!(reports.first().await.unwrap().is_some());
    let mut crowd = Vec::new();
    for i in 0..300 {
        let mut stream = TcpStream::connect(at).await.unwrap();
        if i % 3 == 0 {
            let _ = stream.write_all(&[i as u8; 4096]).await;
        }
        crowd.push(stream);
    }
    // A certificate alone makes no guest either.
    let tls = TlsConnector::from(identity(1, Name::Operator).client(&[HTTP2]));
    for _ in 0..10 {
        let stream = TcpStream::connect(at).await.unwrap();
        let mut stream = tls.connect(Name::Head.server(), stream).await.unwrap();
        let _ = stream.write_all(b"PRI * HTTP/2.0\r\n").await;
        crowd.push(stream.into_inner().0);
    }
    let line = operator(at).dial().await.unwrap();
    assert_eq!(line.watch().await.unwrap().first().await.unwrap(), Some(full()));
    assert_eq!(watching.approve(3).await.unwrap(), "it is done", "who was there before is there still");
    // The oldest had to go for the newest.
    let mut byte = [0];
    let ended = tokio::time::timeout(Duration::from_secs(60), crowd[1].read(&mut byte)).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
}

#[tokio::test]
async fn who_shows_no_token_is_turned_away_after_a_while() {
    let encrypted = Some(identity(1, Name::Head));
    for (theirs, hello) in [(None, ""), (None, "PRI * HTTP/2.0\r\n\r\nSM"), (encrypted, "\x16\x03")] {
        let (at, _serving) = open(theirs, full());
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(hello.as_bytes()).await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "a silent one keeps its place");
    }
}

#[tokio::test]
async fn a_message_that_is_too_long_is_refused() {
    let long = JobReport { message: "x".repeat(MAX_REPORT), ..full() };
    let (at, _serving) = open(Some(identity(1, Name::Head)), long);
    let line = operator(at).dial().await.unwrap();
    let why = line.watch().await.unwrap().first().await.unwrap_err();
    assert!(matches!(&why, AskError::Call(status) if status.code() == Code::OutOfRange), "{why:?}");
    assert_eq!(line.approve(3).await.unwrap(), "it is done");
}

/// An operator may fail in the middle of a call, and a head too.
#[tokio::test]
async fn the_end_of_a_head_is_heard() {
    let (at, serving) = open(Some(identity(1, Name::Head)), full());
    let line = operator(at).dial().await.unwrap();
    let mut reports = line.watch().await.unwrap();
    assert!(reports.first().await.unwrap().is_some());
    serving.abort();
    assert!(!matches!(reports.first().await, Err(AskError::Silent) | Ok(Some(_))));
    assert!(line.approve(3).await.is_err());
    let why = operator(at).dial().await.err().unwrap();
    assert!(why.is_absent(), "{why}");
}
