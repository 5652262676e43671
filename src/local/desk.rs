//! Where calls for a running job come in.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{BoxStream, unfold};
use tokio::sync::{oneshot, watch};
use tonic::{Request, Response, Status};

use super::board::Board;
use super::control::{self, Asked};
use crate::rpc::v1::head_server::Head;
use crate::rpc::v1::{ApproveReply, ApproveRequest, Report, WatchRequest};
use crate::wire::report::JobReport;

/// Least time between two reports to the same reader.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a job may take to answer: it looks between two steps.
const PATIENCE: Duration = Duration::from_secs(2);

/// Answers with what stands on a board, and hands on what the job is asked.
pub struct Desk(pub Arc<Board>);

#[tonic::async_trait]
impl Head for Desk {
    type WatchStream = BoxStream<'static, Result<Report, Status>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(reports(self.0.follow())))
    }

    async fn approve(&self, request: Request<ApproveRequest>) -> Result<Response<ApproveReply>, Status> {
        let (answer, answered) = oneshot::channel();
        let revision = Some(request.into_inner().revision);
        let asked = Asked { request: control::Request::Approve { revision }, answer };
        let sent = self.0.control().is_some_and(|job| job.send(asked).is_ok());
        if !sent {
            return Err(Status::failed_precondition("the job does not train now"));
        }
        match tokio::time::timeout(PATIENCE, answered).await {
            Ok(Ok(Ok(message))) => Ok(Response::new(ApproveReply { message })),
            Ok(Ok(Err(why))) => Err(Status::failed_precondition(why)),
            Ok(Err(_)) => Err(Status::failed_precondition("the job ended before it could do that")),
            Err(_) => Err(Status::deadline_exceeded("the job is in the middle of a step, and hears of it afterwards")),
        }
    }
}

/// What stands there, and then what it has changed to.
fn reports(board: watch::Receiver<JobReport>) -> BoxStream<'static, Result<Report, Status>> {
    let told = None::<JobReport>;
    let next = |(mut board, mut told): (watch::Receiver<JobReport>, Option<JobReport>)| async move {
        loop {
            if told.is_some() {
                tokio::time::sleep(PAUSE).await;
                board.changed().await.ok()?;
            }
            let now = board.borrow_and_update().clone();
            if told.as_ref() != Some(&now) {
                told = Some(now.clone());
                return Some((Ok(now.into()), (board, told)));
            }
        }
    };
    unfold((board, told), next).boxed()
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};
    use std::sync::mpsc::channel;

    use futures::channel::mpsc::{UnboundedReceiver, unbounded};
    use tokio::task::JoinHandle;
    use tonic::Code;

    use super::*;
    use crate::local::control::Request as Asking;
    use crate::operator::heads::{Heads, Key, Which};
    use crate::rpc::{self, AskError, Line};
    use crate::tls::{Authority, Identity, Name, TlsError};
    use crate::wire::report::{JobState, PlanReport, Recommended};

    const TOKEN: &str = "secret";

    fn identity(name: Name) -> Identity {
        Authority::new(&[1; 32], "job", 0..i64::MAX).unwrap().identity(name, 0..i64::MAX).unwrap()
    }

    fn head(at: SocketAddr) -> rpc::Head {
        rpc::Head { at, token: TOKEN.to_owned(), identity: Some(identity(Name::Operator)) }
    }

    /// A board that answers from a thread of its own, as that of a head does.
    async fn served(board: &Arc<Board>) -> Line {
        let at = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        board.serve(at, TOKEN.to_owned(), Some(identity(Name::Head))).unwrap();
        head(at).dial().await.unwrap()
    }

    #[tokio::test]
    async fn what_is_written_is_told_and_what_is_written_meanwhile_is_told_together() {
        let board = Arc::new(Board::default());
        board.write(|r| r.step = 7);
        let line = served(&board).await;
        let mut reports = line.watch().await.unwrap();
        assert_eq!(reports.next().await.unwrap().unwrap().step, 7);
        board.write(|r| r.step = 8);
        board.write(|r| r.step = 7);
        board.write(|r| r.step = 9);
        assert_eq!(reports.next().await.unwrap().unwrap().step, 9);
        // Whoever comes later begins with what is there.
        assert_eq!(line.watch().await.unwrap().next().await.unwrap().unwrap().step, 9);
    }

    #[tokio::test]
    async fn approvals_are_handed_on_to_the_job() {
        let board = Arc::new(Board::default());
        let line = served(&board).await;
        let refused = async |revision| match line.approve(revision).await {
            Err(AskError::Call(status)) => (status.code(), status.message().to_owned()),
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(3).await, (Code::FailedPrecondition, "the job does not train now".to_owned()));
        let (ask, asked) = channel::<Asked>();
        board.hand_on(ask);
        let job = std::thread::Builder::new().spawn(move || {
            for (expected, said) in [(3, Ok("done".to_owned())), (2, Err("revision 3 is recommended".to_owned()))] {
                let Asked { request, answer } = asked.recv().unwrap();
                assert_eq!(request, Asking::Approve { revision: Some(expected) });
                answer.send(said).unwrap();
            }
            // One that is asked in a long step, and then ends.
            asked.recv().unwrap()
        });
        assert_eq!(line.approve(3).await.unwrap(), "done");
        assert_eq!(refused(2).await, (Code::FailedPrecondition, "revision 3 is recommended".to_owned()));
        assert_eq!(refused(3).await.0, Code::DeadlineExceeded);
        job.unwrap().join().unwrap();
        assert_eq!(refused(3).await.0, Code::FailedPrecondition, "the job is over");
    }

    /// A head that can be stopped.
    fn open(listener: TcpListener, board: &Arc<Board>) -> JoinHandle<()> {
        let desk = Desk(board.clone());
        tokio::spawn(
            async move { rpc::serve(listener, TOKEN.to_owned(), Some(identity(Name::Head)), desk).await.unwrap() },
        )
    }

    fn key() -> Key {
        ("ns".to_owned(), "a".to_owned())
    }

    fn follow(heads: &Heads, which: &Which) -> Arc<crate::operator::heads::Head> {
        heads.follow(&key(), which.clone(), || Ok::<_, TlsError>(head(which.at))).unwrap()
    }

    async fn woken(news: &mut UnboundedReceiver<Key>) {
        let next = tokio::time::timeout(Duration::from_secs(60), news.next());
        assert_eq!(next.await.expect("nobody is woken"), Some(key()));
    }

    async fn until(seen: impl Fn() -> bool) {
        let seen = async {
            while !seen() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), seen).await.expect("it does not come to that");
    }

    #[tokio::test]
    async fn the_operator_is_woken_by_news_and_not_by_figures() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let board = Arc::new(Board::default());
        let _serving = open(listener, &board);
        let (tell, mut news) = unbounded();
        let heads = Heads::new(tell);
        let which = Which { uid: "u".to_owned(), at, restarts: 0 };
        let head = follow(&heads, &which);
        woken(&mut news).await;
        assert_eq!(head.report().unwrap().state, JobState::Starting);
        assert!(Arc::ptr_eq(&head, &follow(&heads, &which)), "one connection for each head");
        // Figures come, and nobody is woken for them; then somebody is.
        board.write(|r| r.state = JobState::Training);
        woken(&mut news).await;
        board.write(|r| (r.step, r.loss, r.message) = (3, Some(0.5), "a line".to_owned()));
        until(|| head.report().unwrap().step == 3).await;
        board.write(|r| r.recommended = Some(Recommended { revision: 2, why: "it saves 20%".to_owned() }));
        woken(&mut news).await;
        board.write(|r| r.recommended = Some(Recommended { revision: 2, why: "it saves 21%".to_owned() }));
        until(|| head.report().unwrap().recommended.as_ref().unwrap().why == "it saves 21%").await;
        board.write(|r| r.plan = Some(PlanReport { revision: 2, ..PlanReport::default() }));
        woken(&mut news).await;
        assert!(news.try_recv().is_err(), "nobody was woken for figures");
        heads.forget(&key());
        // The task ends, and with it its connection.
        until(|| Arc::strong_count(&head) == 1).await;
    }

    #[tokio::test]
    async fn a_head_that_is_gone_says_nothing_and_one_that_is_back_is_heard_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let board = Arc::new(Board::default());
        let serving = open(listener, &board);
        let (tell, mut news) = unbounded();
        let heads = Heads::new(tell);
        let which = Which { uid: "u".to_owned(), at, restarts: 0 };
        let head = follow(&heads, &which);
        woken(&mut news).await;
        serving.abort();
        until(|| head.report().is_none()).await;
        assert!(head.approve(3).await.is_none());
        board.write(|r| r.step = 9);
        let _serving = open(TcpListener::bind(at).unwrap(), &board);
        woken(&mut news).await;
        assert_eq!(head.report().unwrap().step, 9);
        // A container that was started again is another head.
        let other = follow(&heads, &Which { restarts: 1, ..which });
        woken(&mut news).await;
        assert!(!Arc::ptr_eq(&head, &other) && other.report().is_some());
    }
}
