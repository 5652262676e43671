//! What a running job can be asked, and a Unix socket in the run directory through which it is, one JSON line each way.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::plan::Plan;

/// Longest request: a plan names every op.
const MAX_REQUEST: u64 = 256 << 20;
/// How long a request may take to come in.
const PATIENCE: Duration = Duration::from_secs(10);

/// What can be asked of a running job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Take over another plan: this one, or the best one of such a shape.
    Recut {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        plan: Option<Box<Plan>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        shards: Option<u32>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        microbatch: Option<u64>,
    },
    /// Take over the plan that is recommended: this one, or whichever it is.
    Approve {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        revision: Option<u64>,
    },
}

/// The answer: what has been done, or why not.
pub type Answer = Result<String, String>;

/// Where an answer goes: threads wait for it, and tasks.
pub type Reply = oneshot::Sender<Answer>;

/// A request and where its answer goes.
pub struct Asked {
    pub request: Request,
    pub answer: Reply,
}

/// Requests to a job, wherever they come from.
pub struct Control {
    ask: Sender<Asked>,
    requests: Receiver<Asked>,
}

impl Default for Control {
    fn default() -> Self {
        let (ask, requests) = channel();
        Self { ask, requests }
    }
}

impl Control {
    /// For whoever asks.
    pub fn asking(&self) -> Sender<Asked> {
        self.ask.clone()
    }

    /// The next request, if there is one.
    pub fn next(&self) -> Option<Asked> {
        self.requests.try_recv().ok()
    }
}

/// The listening socket; removed when dropped.
pub struct ControlSocket {
    path: PathBuf,
}

fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("control.sock")
}

impl ControlSocket {
    /// Listens in a run directory. Only the user who runs the job can connect.
    pub fn open(run_dir: &Path, to_job: Sender<Asked>) -> anyhow::Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let path = socket(run_dir);
        let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("cannot protect {}", path.display()))?;
        let serve = move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let to_job = to_job.clone();
                let converse = move || converse(stream, &to_job);
                // Without a thread the caller sees its connection close.
                let _ = std::thread::Builder::new().name("request".to_owned()).spawn(converse);
            }
        };
        std::thread::Builder::new().name("control".to_owned()).spawn(serve).context("cannot start a thread")?;
        Ok(Self { path })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn converse(stream: UnixStream, to_job: &Sender<Asked>) {
    let heard = || -> anyhow::Result<Answer> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut line = String::new();
        BufReader::new(&stream).take(MAX_REQUEST).read_line(&mut line)?;
        let request = match serde_json::from_str(&line) {
            Ok(request) => request,
            Err(e) => return Ok(Err(format!("not a request of this version: {e}"))),
        };
        let (answer, answered) = oneshot::channel();
        to_job.send(Asked { request, answer })?;
        Ok(answered.blocking_recv().unwrap_or_else(|_| Err("the job ended before it could do that".to_owned())))
    };
    // A caller that hangs up gets no answer.
    if let Ok(answer) = heard()
        && let Ok(json) = serde_json::to_string(&answer)
    {
        let _ = writeln!(&stream, "{json}");
    }
}

/// Asks a running job, and waits for its answer.
pub fn ask(run_dir: &Path, request: &Request) -> anyhow::Result<Answer> {
    let path = socket(run_dir);
    let stream = UnixStream::connect(&path)
        .with_context(|| format!("no job is running in {} ({} does not answer)", run_dir.display(), path.display()))?;
    let json = serde_json::to_string(request)?;
    writeln!(&stream, "{json}")?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    serde_json::from_str(&line).context("the job ended before it could answer")
}
