//! What a running job shows: the head of a job answers questions with it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::control::{Answer, Asked, Request};
use crate::plan::explain::Short;
use crate::plan::{Place, Plan, ShardId};
use crate::runtime::{StepReport, same_token};
use crate::telemetry::Health;
use crate::tls::{Identity, Name, Stream};
use crate::units::Seconds;
use crate::wire::report::{AUTHORIZATION, JobReport, JobState, PlanReport, Recommended, ShardReport};

/// The report of a job, as far as it has come. What is written on it is logged, too: a line per event, and one for steps
/// now and then.
#[derive(Default)]
pub struct Board {
    /// Name of the job, for the log.
    job: String,
    report: Mutex<JobReport>,
    /// When a step was last logged.
    logged: Mutex<Option<Instant>>,
    health: Arc<Health>,
    /// Takes requests, once the job trains.
    control: Mutex<Option<Sender<Asked>>>,
}

/// How often a step is logged.
const EVERY: Duration = Duration::from_secs(5);

impl Board {
    /// `health`: ready while steps go on.
    pub fn new(job: String, health: Arc<Health>) -> Self {
        Self { job, health, ..Self::default() }
    }

    pub fn read(&self) -> JobReport {
        self.report.lock().unwrap_or_else(|p| p.into_inner()).clone()
    }

    pub fn write(&self, change: impl FnOnce(&mut JobReport)) {
        change(&mut self.report.lock().unwrap_or_else(|p| p.into_inner()));
    }

    /// Hands requests on from now on.
    pub fn hand_on(&self, to: Sender<Asked>) {
        *self.control.lock().unwrap_or_else(|p| p.into_inner()) = Some(to);
    }

    /// A plan waits for approval, or none does.
    pub fn recommend(&self, plan: Option<&(u64, String)>) {
        let recommended = plan.map(|(revision, why)| Recommended { revision: *revision, why: why.clone() });
        self.write(|r| r.recommended = recommended);
    }

    /// Something that a person would want to hear.
    pub fn say(&self, line: &str) {
        self.write(|r| line.clone_into(&mut r.message));
        let (plan, step) = self.at();
        tracing::info!(job = self.job, plan, step, "{line}");
    }

    /// The plan in force and the steps done.
    fn at(&self) -> (Option<u64>, u64) {
        let report = self.report.lock().unwrap_or_else(|p| p.into_inner());
        (report.plan.as_ref().map(|p| p.revision), report.step)
    }

    /// A step is done. `eta`: time to the end of the job, where something can be said of it; `rate`: of so many units per
    /// second.
    pub fn step(&self, report: &StepReport, eta: Option<Seconds>, (rate, unit): (f64, &str)) {
        self.health.set_ready(true);
        let mut logged = self.logged.lock().unwrap_or_else(|p| p.into_inner());
        if logged.is_none_or(|at| at.elapsed() > EVERY) {
            *logged = Some(Instant::now());
            let (plan, step, loss) = (report.revision, report.step + 1, report.loss);
            tracing::info!(job = self.job, plan, step, loss, rate, unit, seconds = report.seconds, "trains");
        }
        self.write(|r| {
            r.rate = Some(rate);
            unit.clone_into(&mut r.unit);
            r.state = JobState::Training;
            r.step = report.step + 1;
            r.first_loss.get_or_insert(report.loss.into());
            r.loss = Some(report.loss.into());
            r.step_seconds = Some(report.seconds);
            r.eta_seconds = eta.map(|eta| eta.0);
            r.busy = report.workers.iter().map(|w| w.busy_s / report.seconds.max(1e-9)).collect();
        });
    }

    /// A plan has come into force.
    pub fn plan(&self, plan: &Plan, why: &str) {
        let ops = |shard: usize| {
            let here = Place::Shard(ShardId(shard as u32));
            let grad = plan.grads.values().next();
            grad.map_or(0, |a| a.0.iter().filter(|&&p| p == here).count() as u64)
        };
        let shards = plan.shards.iter().enumerate().map(|(i, s)| ShardReport {
            workers: s.devices.iter().map(|d| d.0).collect(),
            ops: ops(i),
            busy_seconds: s.busy.0,
            memory: s.memory.0,
            sent: s.sent.0,
            recompute: s.recompute,
        });
        let report = PlanReport {
            revision: plan.revision,
            why: why.to_owned(),
            step_seconds: plan.step_time.0,
            bound_seconds: plan.bound.0,
            microbatch: plan.microbatch,
            microbatches: plan.n_microbatches,
            bytes_cut: plan.bytes_cut.0,
            shards: shards.collect(),
            explanation: None,
        };
        for (stage, shard) in report.shards.iter().enumerate() {
            for (rank, worker) in shard.workers.iter().enumerate() {
                let (job, plan, ops) = (&self.job, report.revision, shard.ops);
                tracing::info!(job, plan, stage, rank, worker, ops, "planned");
            }
        }
        self.write(|r| r.plan = Some(report));
    }

    /// The plan of this revision is explained; nobody asks about one that is in force no more.
    pub fn explained(&self, revision: u64, explanation: Short) {
        self.write(|r| {
            if let Some(plan) = r.plan.as_mut().filter(|p| p.revision == revision) {
                plan.explanation = Some(explanation);
            }
        });
    }

    /// Answers `GET /status` and takes `POST /approve/REVISION` from those who know the token; with an identity, from the
    /// operator alone.
    pub fn serve(self: &Arc<Self>, at: SocketAddr, token: String, identity: Option<Identity>) -> anyhow::Result<()> {
        let listener = TcpListener::bind(at).with_context(|| format!("cannot listen on {at}"))?;
        let board = self.clone();
        let serve = move || {
            // One after the other: there is one operator.
            for stream in listener.incoming() {
                let Ok(stream) = stream else { continue };
                // Whoever went away asks again.
                if let Err(e) = board.answer(stream, &token, identity.as_ref()) {
                    tracing::warn!(job = board.job, why = e.to_string(), "a question for the status is not answered");
                }
            }
        };
        std::thread::Builder::new().name("status".to_owned()).spawn(serve).context("cannot start a thread")?;
        Ok(())
    }

    fn answer(&self, socket: TcpStream, token: &str, identity: Option<&Identity>) -> std::io::Result<()> {
        const PATIENCE: Duration = Duration::from_secs(2);
        const MAX_REQUEST: u64 = 16 << 10;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let stream = Stream::accept(socket, identity)?;
        stream.is(Name::Operator)?;
        let Stream { reader, mut writer } = stream;
        let mut lines = BufReader::new(reader.take(MAX_REQUEST)).lines();
        let request = lines.next().transpose()?.unwrap_or_default();
        let mut shown = None;
        for line in lines {
            let line = line?;
            let Some((key, value)) = line.split_once(':') else { break };
            if key.eq_ignore_ascii_case(AUTHORIZATION) {
                shown = value.trim().strip_prefix("Bearer ").map(str::to_owned);
            }
        }
        let mut words = request.split_whitespace();
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let approved = path.strip_prefix("/approve/").and_then(|n| n.parse().ok());
        let known = shown.is_some_and(|s| same_token(&s, token));
        let (status, body) = match (method, path, approved) {
            ("GET", "/status", _) | ("POST", _, Some(_)) if !known => ("401 Unauthorized", String::new()),
            ("GET", "/status", _) => ("200 OK", serde_json::to_string(&self.read())?),
            ("POST", _, Some(revision)) => match self.approve(revision, PATIENCE) {
                Ok(done) => ("200 OK", serde_json::to_string(&done)?),
                Err(why) => ("409 Conflict", serde_json::to_string(&why)?),
            },
            _ => ("404 Not Found", String::new()),
        };
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n");
        writer.write_all(format!("{head}connection: close\r\n\r\n{body}").as_bytes())?;
        writer.close()
    }

    fn approve(&self, revision: u64, patience: Duration) -> Answer {
        let (answer, answers) = channel();
        let control = self.control.lock().unwrap_or_else(|p| p.into_inner()).clone();
        let request = Request::Approve { revision: Some(revision) };
        let asked = control.and_then(|control| control.send(Asked { request, answer }).ok());
        let answered = asked.and_then(|()| answers.recv_timeout(patience).ok());
        answered.unwrap_or_else(|| Err("the job has no time for that now".to_owned()))
    }

    /// Leaves the report behind, cut short where the place is small: Kubernetes keeps 4 KiB of a container's last words.
    pub fn last_words(&self, path: &Path) -> anyhow::Result<()> {
        const MAX: usize = 4000;
        const MAX_MESSAGE: usize = 1500;
        let mut report = self.read();
        report.message = report.message.chars().take(MAX_MESSAGE).collect();
        report.recommended = None;
        let mut text = serde_json::to_string(&report)?;
        if let (true, Some(plan)) = (text.len() > MAX, &mut report.plan) {
            plan.explanation = None;
            text = serde_json::to_string(&report)?;
        }
        if text.len() > MAX {
            (report.plan, report.busy) = (None, Vec::new());
            text = serde_json::to_string(&report)?;
        }
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(at: SocketAddr, path: &str, token: &str) -> String {
        say(at, "GET", path, token)
    }

    fn say(at: SocketAddr, method: &str, path: &str, token: &str) -> String {
        let mut stream = TcpStream::connect(at).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn tells_its_report_to_those_who_know_the_token() {
        let at = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let board = Arc::new(Board::default());
        board.write(|r| r.step = 7);
        board.serve(at, "secret".to_owned(), None).unwrap();
        let answer = ask(at, "/status", "secret");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        assert_eq!(serde_json::from_str::<JobReport>(body).unwrap().step, 7);
        assert!(ask(at, "/status", "guess").starts_with("HTTP/1.1 401"));
        assert!(ask(at, "/etc/passwd", "secret").starts_with("HTTP/1.1 404"));
    }

    #[test]
    fn hands_approvals_on_to_the_job() {
        let at = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let board = Arc::new(Board::default());
        board.serve(at, "secret".to_owned(), None).unwrap();
        let post = |path: &str, token: &str| say(at, "POST", path, token);
        assert!(post("/approve/3", "secret").starts_with("HTTP/1.1 409"), "it does not train yet");
        let (ask, asked) = channel();
        board.hand_on(ask);
        assert!(post("/approve/3", "guess").starts_with("HTTP/1.1 401"));
        assert!(post("/approve/x", "secret").starts_with("HTTP/1.1 404"));
        std::thread::scope(|threads| {
            threads.spawn(move || {
                let Asked { request, answer } = asked.recv().unwrap();
                assert_eq!(request, Request::Approve { revision: Some(3) });
                answer.send(Ok("done".to_owned())).unwrap();
            });
            assert!(post("/approve/3", "secret").starts_with("HTTP/1.1 200"));
        });
    }

    #[test]
    fn last_words_stay_short() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let board = Board::default();
        board.write(|r| {
            r.message = "é".repeat(5000);
            r.busy = vec![0.123_456_789; 4096];
        });
        board.last_words(file.path()).unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(text.len() <= 4096, "{}", text.len());
        assert!(serde_json::from_str::<JobReport>(&text).is_ok());
    }

    #[test]
    fn last_words_leave_out_the_explanation_before_the_plan() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let board = Board::default();
        board.write(|r| r.plan = Some(PlanReport { revision: 3, ..PlanReport::default() }));
        board.explained(2, Short { limit: "of the plan before".to_owned(), ..Short::default() });
        assert_eq!(board.read().plan.unwrap().explanation, None);
        board.explained(3, Short { limit: "x".repeat(4000), ..Short::default() });
        assert!(board.read().plan.unwrap().explanation.is_some());
        board.last_words(file.path()).unwrap();
        let words: JobReport = serde_json::from_str(&std::fs::read_to_string(file.path()).unwrap()).unwrap();
        assert_eq!(words.plan.map(|p| (p.revision, p.explanation)), Some((3, None)));
    }
}
