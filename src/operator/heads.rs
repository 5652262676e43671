//! Heads of jobs that run: for each of them a task that holds a connection, keeps what the head has said last, and wakes
//! whoever looks at jobs when that is news.
//!
//! # Guarantees
//! One task and one connection per job, no thread. They end when nobody follows the job any more, and with [`Heads`]. A head
//! that does not answer is asked less and less often, and one that starts anew soon.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::channel::mpsc::UnboundedSender;
use tokio::task::JoinHandle;

use crate::rpc::{self, AskError, Line};
use crate::telemetry::chain;
use crate::wire::report::{JobReport, JobState};

/// Pauses between two tries, twice as long each time.
const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(30)];
/// Longest pause while nobody listens there yet: a refused connection costs next to nothing, and a head is to be heard soon
/// after it has begun.
const SOON: Duration = Duration::from_secs(4);

/// Namespace and name of a job.
pub type Key = (String, String);

/// The heads that are followed, by job.
pub struct Heads {
    followed: Mutex<BTreeMap<Key, Followed>>,
    news: UnboundedSender<Key>,
}

/// A head is another one when the job, its pod or its container is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Which {
    pub uid: String,
    pub at: SocketAddr,
    pub restarts: u32,
}

struct Followed {
    which: Which,
    head: Arc<Head>,
    task: JoinHandle<()>,
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A head, as far as it has been heard.
#[derive(Default)]
pub struct Head(Mutex<Heard>);

#[derive(Default)]
struct Heard {
    /// What it has said last; nothing while it is not there.
    report: Option<Arc<JobReport>>,
    line: Option<Line>,
    /// Why nothing will be heard of it.
    deaf: Option<String>,
}

impl Heads {
    /// `news`: jobs whose heads have something to say.
    pub fn new(news: UnboundedSender<Key>) -> Self {
        Self { followed: Mutex::default(), news }
    }

    /// The head of a job, followed from now on; `find` says where it is and what it wants to see.
    ///
    /// # Errors
    /// Those of `find`, which is asked only about heads that are not followed yet.
    pub fn follow<E>(
        &self,
        job: &Key,
        which: Which,
        find: impl FnOnce() -> Result<rpc::Head, E>,
    ) -> Result<Arc<Head>, E> {
        let mut followed = self.lock();
        if let Some(known) = followed.get(job).filter(|f| f.which == which) {
            return Ok(known.head.clone());
        }
        let head = Arc::<Head>::default();
        let task = tokio::spawn(follow(job.clone(), find()?, head.clone(), self.news.clone()));
        followed.insert(job.clone(), Followed { which, head: head.clone(), task });
        Ok(head)
    }

    /// The job has no head that could be asked.
    pub fn forget(&self, job: &Key) {
        self.lock().remove(job);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Followed>> {
        self.followed.lock().unwrap_or_else(|p| p.into_inner())
    }
}

impl Head {
    pub fn report(&self) -> Option<Arc<JobReport>> {
        self.lock().report.clone()
    }

    /// Why nothing will be heard of it, although it is there.
    pub fn deaf(&self) -> Option<String> {
        self.lock().deaf.clone()
    }

    /// Tells it that a plan of its own is agreed to; what it says to that.
    ///
    /// # Errors
    /// [`AskError`], or `None` where the connection has just been lost.
    pub async fn approve(&self, revision: u64) -> Option<Result<String, AskError>> {
        let line = self.lock().line.clone()?;
        Some(line.approve(revision).await)
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.0.lock().unwrap_or_else(|p| p.into_inner())
    }
}

/// Follows one head for as long as somebody wants to know of it.
async fn follow(job: Key, at: rpc::Head, head: Arc<Head>, news: UnboundedSender<Key>) {
    let [shortest, longest] = PAUSES;
    let mut pause = shortest;
    let mut said = None;
    loop {
        let ended = listen(&job, &at, &head, &news).await;
        let deaf = match &ended {
            Err(e @ AskError::Old) => Some(format!("{e}; suspend and resume the job, and it has one of this version")),
            _ => None,
        };
        let before = std::mem::replace(&mut *head.lock(), Heard { deaf: deaf.clone(), ..Heard::default() });
        wake(&job, &news, deaf != before.deaf);
        if before.report.is_some() {
            (pause, said) = (shortest, None);
        }
        let is_absent = ended.as_ref().is_err_and(AskError::is_absent);
        if let Some(error) = ended.err().filter(|_| !is_absent).map(|e| chain(&e))
            && said.as_ref() != Some(&error)
        {
            tracing::warn!(job = format!("{}/{}", job.0, job.1), error, "the head is not heard");
            said = Some(error);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(if is_absent { SOON } else { longest });
    }
}

/// Until the head has ended, or the connection to it.
async fn listen(job: &Key, at: &rpc::Head, head: &Head, news: &UnboundedSender<Key>) -> Result<(), AskError> {
    let line = at.dial().await?;
    let mut reports = line.watch().await?;
    let mut next = reports.first().await?;
    let mut before = None;
    while let Some(report) = next {
        let gist = gist(&report);
        *head.lock() = Heard { report: Some(Arc::new(report)), line: Some(line.clone()), deaf: None };
        wake(job, news, before.as_ref() != Some(&gist));
        before = Some(gist);
        next = reports.next().await?;
    }
    Ok(())
}

fn wake(job: &Key, news: &UnboundedSender<Key>, is_news: bool) {
    if is_news {
        // Nobody looks any more when the operator ends.
        let _ = news.unbounded_send(job.clone());
    }
}

/// What of a report cannot wait until the job is looked at anyway: all but the figures of steps.
fn gist(report: &JobReport) -> JobReport {
    let mut gist = JobReport {
        step: 0,
        first_loss: None,
        loss: None,
        step_seconds: None,
        rate: None,
        eta_seconds: None,
        learned: None,
        busy: Vec::new(),
        ..report.clone()
    };
    // Its figures change with every look of the head.
    if let Some(recommended) = &mut gist.recommended {
        recommended.why.clear();
    }
    // A job that trains says so, whatever its head has said last.
    if report.state == JobState::Training {
        gist.message.clear();
    }
    gist
}
