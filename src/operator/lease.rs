//! One operator works, others stand by: a Lease in the operator's namespace.
//!
//! # Guarantees
//! Whoever works has renewed the lease within [`DEADLINE`]; whoever takes over has seen it unchanged for [`DURATION`],
//! which is longer by more than a request may take. Clocks of different machines are never compared.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};

use super::OperatorError;

const NAME: &str = "foreshard-operator";
/// How long a lease holds that nobody renews.
const DURATION: Duration = Duration::from_secs(15);
/// Without a renewal for so long the operator stops.
const DEADLINE: Duration = Duration::from_secs(9);
const PAUSE: Duration = Duration::from_secs(2);
/// Longest request: DEADLINE + PAUSE + REQUEST < DURATION.
const REQUEST: Duration = Duration::from_secs(3);

pub struct Leader {
    api: Api<Lease>,
    identity: String,
    /// The lease as it was last seen to change, and when that was.
    seen: Option<(Option<String>, Instant)>,
}

impl Leader {
    pub fn new(client: &Client, namespace: &str, identity: String) -> Self {
        Self { api: Api::namespaced(client.clone(), namespace), identity, seen: None }
    }

    /// Waits for the lease, works while it can be kept, and gives it back.
    ///
    /// # Errors
    /// [`OperatorError::LeaseLost`] when it cannot be renewed: the program should end.
    pub async fn lead<T>(mut self, work: impl Future<Output = T>) -> Result<T, OperatorError> {
        while !self.renew().await.unwrap_or(false) {
            tokio::time::sleep(PAUSE).await;
        }
        tracing::info!(identity = self.identity, "leads");
        let done = tokio::select! {
            done = work => done,
            () = self.keep() => return Err(OperatorError::LeaseLost),
        };
        self.release().await;
        Ok(done)
    }

    /// Renews until that fails for too long.
    async fn keep(&mut self) {
        let mut renewed = Instant::now();
        while renewed.elapsed() < DEADLINE {
            tokio::time::sleep(PAUSE).await;
            let asked = Instant::now();
            match self.renew().await {
                Some(true) => renewed = asked,
                // Somebody else has it.
                Some(false) => return,
                None => {}
            }
        }
    }

    /// Whether the lease is ours for another while; `None` when nobody answers.
    async fn renew(&mut self) -> Option<bool> {
        tokio::time::timeout(REQUEST, self.exchange()).await.ok()?.ok()
    }

    async fn exchange(&mut self) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.api.get_opt(NAME).await? else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() },
                spec: Some(self.spec(LeaseSpec::default())),
            };
            return taken(self.api.create(&PostParams::default(), &lease).await);
        };
        let spec = lease.spec.take().unwrap_or_default();
        let version = lease.metadata.resource_version.clone();
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != version) {
            self.seen = Some((version, Instant::now()));
        }
        let unchanged = self.seen.as_ref().map_or(Duration::ZERO, |(_, since)| since.elapsed());
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder != self.identity && !holder.is_empty() && unchanged < DURATION {
            return Ok(false);
        }
        // The version that was read travels along: of two that try at once, one is refused.
        lease.spec = Some(self.spec(spec));
        taken(self.api.replace(NAME, &PostParams::default(), &lease).await)
    }

    fn spec(&self, before: LeaseSpec) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let same = before.holder_identity.as_ref() == Some(&self.identity);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(DURATION.as_secs() as i32),
            acquire_time: before.acquire_time.filter(|_| same).or(Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(before.lease_transitions.unwrap_or(0).saturating_add(i32::from(!same))),
            ..before
        }
    }

    /// Lets another take over at once.
    async fn release(&mut self) {
        let free = async {
            let mut lease = self.api.get(NAME).await?;
            if let Some(spec) = &mut lease.spec {
                spec.holder_identity = Some(String::new());
            }
            self.api.replace(NAME, &PostParams::default(), &lease).await
        };
        // Whoever waits takes over a little later otherwise.
        let _ = tokio::time::timeout(REQUEST, free).await;
    }
}

/// A conflict means that somebody else was faster.
fn taken<T>(result: Result<T, kube::Error>) -> Result<bool, kube::Error> {
    match result {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(e)) if e.code == 409 => Ok(false),
        Err(e) => Err(e),
    }
}
