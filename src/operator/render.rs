//! The objects of a job, from its plan: pure.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::place::topology;
use super::pods::complete;
use crate::api::{Archive, PartitionPlanSpec, Seat, TrainingJob, Volume};
use crate::device::pjrt::CPU_KERNELS;
use crate::tls::{Certificate, FILES, Name};

/// What is the same for all jobs of a cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// Image of heads and workers.
    pub image: String,
    pub pull_policy: String,
    /// Plug-ins in that image, by device: `cpu` or an extended resource.
    pub plugins: BTreeMap<String, String>,
    /// Namespace of the operator: heads answer it alone.
    pub namespace: String,
}

/// Where workers dial the head, their peers dial them, and the operator asks the head.
pub const HEAD_PORT: u16 = 7070;
pub const PEER_PORT: u16 = 7071;
pub const STATUS_PORT: u16 = 7072;
/// Where the kubelet asks whether they are alive: in the first pod, runtime and head stand side by side.
const RUNTIME_HEALTH: u16 = 7073;
const HEAD_HEALTH: u16 = 7074;
/// Key in the secret of each pod of a job.
const TOKEN: &str = "token";
/// Label with the job's name.
pub const JOB: &str = "foreshard.dev/job";
/// Label with the number of a worker.
pub const WORKER: &str = "foreshard.dev/worker";
/// The gate that holds pods back until all of a job are there.
pub const GATE: &str = "foreshard.dev/gang";
/// Container of the head: it leads all workers, reads data and writes checkpoints.
pub const TRAINER: &str = "trainer";
/// Container of a worker: it executes a shard.
pub const RUNTIME: &str = "runtime";
/// Container that fetches archives before the others are started.
pub const FETCH: &str = "fetch";
/// Container in which a program of the user's makes the data.
pub const FEEDER: &str = "feeder";
/// It holds one piece of an archive at a time.
const FETCH_MEMORY: &str = "256Mi";
/// Where a container finds its certificate.
const CERTIFICATE: &str = "/etc/foreshard-tls";
/// The job's directory: its volumes stand in it.
const DIRECTORY: &str = "/job";
/// What a container leaves there, the kubelet tells when it has ended.
const TERMINATION_LOG: &str = "/dev/termination-log";
/// Thousandths of a core that the head is given of its node's first worker.
const HEAD_CPU: u32 = 100;
/// The same of a feeder, and its least memory.
const FEEDER_CPU: u32 = 100;
const FEEDER_MEMORY: &str = "256Mi";
/// Least memory of a head: it holds the model's graphs and batches.
const HEAD_MEMORY: &str = "256Mi";
/// Seconds that heads and workers have to end: longer than steps in flight and a checkpoint take. A worker that is told to
/// go stays until its head has written one, at most 100 s.
const GRACE: u32 = 120;
/// Seconds that a worker tries to reach its head.
const PATIENCE: u32 = 1800;
const USER: u32 = 65532;

/// What a plan comes to.
pub struct Rendered {
    /// What pods need before they start.
    pub support: Vec<Value>,
    /// By worker.
    pub pods: Vec<(u32, Value)>,
}

/// Pods are held back: the gang is not whole yet.
pub fn render(job: &TrainingJob, plan: &PartitionPlanSpec, site: &Site) -> Rendered {
    let of = Of { job, plan, site, name: &plan.job, own: own_name(job) };
    Rendered {
        support: vec![of.config(), of.service(), of.policy()],
        pods: plan.shards.iter().map(|seat| (seat.worker, of.pod(seat))).collect(),
    }
}

/// Holds a pod back no more: with it, its gang is whole.
pub fn release(pod: &mut Value) {
    if let Some(spec) = pod["spec"].as_object_mut() {
        spec.remove("schedulingGates");
    }
}

/// Shards of a plan.
pub fn n_shards(job: &TrainingJob, plan: &PartitionPlanSpec) -> usize {
    plan.shards.len() / job.spec.parallelism.replicas.max(1) as usize
}

/// One job and its plan.
struct Of<'a> {
    job: &'a TrainingJob,
    plan: &'a PartitionPlanSpec,
    site: &'a Site,
    name: &'a str,
    /// Of what pods need.
    own: String,
}

impl Of<'_> {
    fn metadata(&self, name: &str) -> Value {
        json!({
            "name": name,
            "namespace": self.job.metadata.namespace,
            "labels": {
                "app.kubernetes.io/name": "foreshard",
                "app.kubernetes.io/component": "job",
                "app.kubernetes.io/managed-by": "foreshard-operator",
                JOB: self.name,
            },
            "ownerReferences": [owner(self.job)],
        })
    }

    fn namespace(&self) -> &str {
        self.job.metadata.namespace.as_deref().unwrap_or("default")
    }

    /// The manifest and the devices, as the head reads them.
    fn config(&self) -> Value {
        let mut manifest = json!({
            "apiVersion": "foreshard.dev/v1alpha1", "kind": "TrainingJob", "metadata": {"name": self.name},
            "spec": self.job.spec,
        });
        // How many was chosen by what was free.
        manifest["spec"]["parallelism"]["shards"] = json!(n_shards(self.job, self.plan));
        let devices = topology(&self.plan.shards);
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": self.metadata(&self.own),
            "data": {
                "job.yaml": serde_yaml::to_string(&manifest).expect("a manifest is plain data"),
                "devices.json": serde_json::to_string(&devices).expect("a topology is plain data"),
            },
        })
    }

    /// Headless: it gives pods their names. They find each other before they are ready.
    fn service(&self) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": self.metadata(&self.own),
            "spec": {
                "clusterIP": "None", "publishNotReadyAddresses": true, "selector": {JOB: self.name},
                "ports": [
                    {"name": "head", "port": HEAD_PORT, "protocol": "TCP", "targetPort": HEAD_PORT},
                    {"name": "peers", "port": PEER_PORT, "protocol": "TCP", "targetPort": PEER_PORT},
                ],
            },
        })
    }

    /// Pods of a job talk to each other, and its head to the operator; nobody else comes in.
    fn policy(&self) -> Value {
        let operator = json!({
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.site.namespace}},
            "podSelector": {"matchLabels": {
                "app.kubernetes.io/name": "foreshard", "app.kubernetes.io/component": "operator",
            }},
        });
        let port = |port: u16| json!({"protocol": "TCP", "port": port});
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": self.metadata(&self.own),
            "spec": {
                "podSelector": {"matchLabels": {JOB: self.name}},
                "policyTypes": ["Ingress"],
                "ingress": [
                    {"from": [{"podSelector": {"matchLabels": {JOB: self.name}}}],
                     "ports": [port(HEAD_PORT), port(PEER_PORT)]},
                    {"from": [operator], "ports": [port(STATUS_PORT)]},
                ],
            },
        })
    }

    fn pod(&self, seat: &Seat) -> Value {
        let name = format!("{}-{}", self.name, seat.worker);
        let mut metadata = self.metadata(&name);
        metadata["labels"][WORKER] = json!(seat.worker.to_string());
        metadata["labels"]["app.kubernetes.io/component"] = json!("worker");
        metadata["annotations"] = json!({"foreshard.dev/plan": self.plan.revision.to_string()});
        let has_head = seat.worker == 0;
        let mut runtime = self.runtime(seat, has_head);
        // The head is the main container of its pod: it has ended when training has, and the worker beside it is stopped
        // only after it.
        let mut inits: Vec<Value> = self.fetch().into_iter().collect();
        let containers = if has_head {
            runtime["restartPolicy"] = json!("Always");
            inits.extend(self.feeder());
            inits.push(runtime);
            vec![self.trainer()]
        } else {
            vec![runtime]
        };
        let affinity = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [seat.node]}]},
        ]}}});
        let mut spec = json!({
            "hostname": name,
            "subdomain": self.own,
            "restartPolicy": "OnFailure",
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": GRACE,
            "affinity": affinity,
            "schedulingGates": [{"name": GATE}],
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": containers,
            "volumes": self.volumes(seat),
        });
        if !inits.is_empty() {
            spec["initContainers"] = json!(inits);
        }
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
        complete(&mut pod, RUNTIME, self.job, seat);
        pod
    }

    /// One worker: it executes a shard.
    fn runtime(&self, seat: &Seat, beside_head: bool) -> Value {
        let head = format!("{}-0.{}.{}.svc:{HEAD_PORT}", self.name, self.own, self.namespace());
        let feeder = if self.job.spec.data.feeder.is_some() { FEEDER_CPU } else { 0 };
        let others = if beside_head { HEAD_CPU + feeder } else { 0 };
        let cpu = seat.cores.saturating_mul(1000).saturating_sub(others);
        let mut container = self.container(RUNTIME, seat.worker, Name::Worker(seat.worker));
        container["args"] = json!([
            "worker",
            "--connect",
            head,
            "--patience",
            PATIENCE.to_string(),
            "--worker",
            seat.worker.to_string(),
            "--listen",
            "$(POD_IP)",
            "--port",
            PEER_PORT.to_string(),
            "--plugin",
            self.site.plugin(&seat.device),
            "--device",
            seat.device,
            "--last-words",
            TERMINATION_LOG,
            "--breadcrumb",
            "/tmp/compiling",
            "--tls",
            CERTIFICATE,
            "--job",
            self.name,
            "--health",
            format!("0.0.0.0:{RUNTIME_HEALTH}"),
            "--json",
        ]);
        container["ports"] = json!([{"name": "peers", "containerPort": PEER_PORT, "protocol": "TCP"}]);
        container["resources"] = json!({
            "requests": {"cpu": format!("{cpu}m"), "memory": seat.memory.to_string()},
            "limits": {"cpu": seat.cores.to_string(), "memory": seat.memory.to_string()},
        });
        // It listens before it dials: that it does is all that others wait for. It is ready when its head has let it in.
        probed(container, RUNTIME_HEALTH)
    }

    fn trainer(&self) -> Value {
        let results = self.job.spec.results().unwrap_or_default();
        let mut container = self.container(TRAINER, 0, Name::Head);
        if self.job.spec.data.feeder.is_none() {
            self.give_credentials(&mut container);
        }
        container["args"] = json!([
            "head",
            "/etc/foreshard/job.yaml",
            "--devices",
            "/etc/foreshard/devices.json",
            "--profiles",
            "/etc/foreshard/profiles.json",
            "--listen",
            format!("0.0.0.0:{HEAD_PORT}"),
            "--status",
            format!("0.0.0.0:{STATUS_PORT}"),
            "--results",
            format!("{DIRECTORY}/{results}/{}", self.own),
            "--last-words",
            TERMINATION_LOG,
            "--tls",
            CERTIFICATE,
            "--job-name",
            self.name,
            "--health",
            format!("0.0.0.0:{HEAD_HEALTH}"),
            "--json",
        ]);
        container["ports"] = json!([
            {"name": "head", "containerPort": HEAD_PORT, "protocol": "TCP"},
            {"name": "status", "containerPort": STATUS_PORT, "protocol": "TCP"},
        ]);
        container["resources"] = json!({"requests": {"cpu": format!("{HEAD_CPU}m"), "memory": HEAD_MEMORY}});
        // What a head that was killed printed last is better than nothing.
        container["terminationMessagePolicy"] = json!("FallbackToLogsOnError");
        // It is ready while steps go on.
        probed(container, HEAD_HEALTH)
    }

    /// Fetches archives, where there are any: it sees nothing else of the job, and shows itself to nobody.
    fn fetch(&self) -> Option<Value> {
        let archives =
            || self.job.spec.volumes.iter().enumerate().filter_map(|(i, v)| Some((i, v, v.archive.as_ref()?)));
        let mut mounts: Vec<Value> = archives()
            .map(|(_, v, _)| json!({"name": mounted(v), "mountPath": format!("{DIRECTORY}/{}", v.name)}))
            .collect();
        if mounts.is_empty() {
            return None;
        }
        mounts.push(json!({"name": "config", "mountPath": "/etc/foreshard", "readOnly": true}));
        let credentials: Vec<Value> = archives()
            .filter_map(|(i, _, archive)| {
                Some(json!({"prefix": Archive::prefix(i), "secretRef": {"name": archive.credentials.as_ref()?}}))
            })
            .collect();
        let mut container = json!({
            "name": FETCH,
            "image": self.site.image,
            "imagePullPolicy": self.site.pull_policy,
            "workingDir": DIRECTORY,
            "args": ["fetch", "/etc/foreshard/job.yaml", "--last-words", TERMINATION_LOG, "--json"],
            "securityContext": confined(),
            "resources": {
                "requests": {"cpu": format!("{HEAD_CPU}m"), "memory": FETCH_MEMORY}, "limits": {"memory": FETCH_MEMORY},
            },
            "volumeMounts": mounts,
        });
        if !credentials.is_empty() {
            container["envFrom"] = json!(credentials);
        }
        Some(container)
    }

    /// Makes the data, where a program of the user's does: it shares the job's directory with the head, which listens there,
    /// and nothing by which it could be taken for a part of the job.
    fn feeder(&self) -> Option<Value> {
        let feeder = self.job.spec.data.feeder.as_ref()?;
        let mut mounts = vec![
            json!({"name": "directory", "mountPath": DIRECTORY}),
            json!({"name": "feeder-tmp", "mountPath": "/tmp"}),
        ];
        mounts.extend(self.mounts(|_| false));
        let env: Vec<Value> = feeder.env.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
        let mut container = json!({
            "name": FEEDER,
            "image": feeder.image,
            "imagePullPolicy": self.site.pull_policy,
            "workingDir": DIRECTORY,
            "restartPolicy": "Always",
            // What it printed last tells why it ended.
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "env": env,
            "securityContext": confined(),
            "resources": {"requests": {"cpu": format!("{FEEDER_CPU}m"), "memory": FEEDER_MEMORY}},
            "volumeMounts": mounts,
        });
        self.give_credentials(&mut container);
        for (field, words) in [("command", &feeder.command), ("args", &feeder.args)] {
            if !words.is_empty() {
                container[field] = json!(words);
            }
        }
        Some(container)
    }

    /// To the one container that fetches data.
    fn give_credentials(&self, container: &mut Value) {
        if let Some(name) = &self.job.spec.data.credentials {
            container["envFrom"] = json!([{"secretRef": {"name": name}}]);
        }
    }

    /// The user's volumes, where they stand in the job's directory.
    fn mounts(&self, is_writable: impl Fn(&Volume) -> bool) -> impl Iterator<Item = Value> {
        self.job.spec.volumes.iter().map(move |v| {
            let mut mount = json!({"name": mounted(v), "mountPath": format!("{DIRECTORY}/{}", v.name)});
            if !is_writable(v) {
                mount["readOnly"] = json!(true);
            }
            mount
        })
    }

    /// `worker`: of its pod. `part`: what it is to the others, which see only a certificate.
    fn container(&self, name: &str, worker: u32, part: Name) -> Value {
        let mut mounts = vec![
            json!({"name": "directory", "mountPath": DIRECTORY}),
            json!({"name": "tmp", "mountPath": "/tmp"}),
            json!({"name": "config", "mountPath": "/etc/foreshard", "readOnly": true}),
            json!({"name": format!("tls-{part}"), "mountPath": CERTIFICATE, "readOnly": true}),
        ];
        mounts.extend(self.mounts(|v| self.job.spec.results() == Some(&v.name)));
        json!({
            "name": name,
            "image": self.site.image,
            "imagePullPolicy": self.site.pull_policy,
            "workingDir": DIRECTORY,
            "env": [
                {"name": "FORESHARD_TOKEN", "valueFrom": {"secretKeyRef": {
                    "name": secret_name(self.job, worker), "key": TOKEN,
                }}},
                {"name": "POD_IP", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}},
                {"name": "XLA_FLAGS", "value": CPU_KERNELS},
            ],
            "securityContext": confined(),
            "volumeMounts": mounts,
        })
    }

    fn volumes(&self, seat: &Seat) -> Vec<Value> {
        let mut volumes = vec![
            json!({"name": "directory", "emptyDir": {}}),
            json!({"name": "tmp", "emptyDir": {}}),
            json!({"name": "config", "configMap": {"name": self.own}}),
        ];
        if seat.worker == 0 && self.job.spec.data.feeder.is_some() {
            volumes.push(json!({"name": "feeder-tmp", "emptyDir": {}}));
        }
        let name = secret_name(self.job, seat.worker);
        volumes.extend(parts(seat.worker).map(|part| {
            let items = FILES.map(|f| json!({"key": format!("{part}.{f}"), "path": f}));
            let secret = json!({"secretName": name, "defaultMode": 0o440, "items": items});
            json!({"name": format!("tls-{part}"), "secret": secret})
        }));
        volumes.extend(self.job.spec.volumes.iter().map(|v| {
            let mut volume = json!({"name": mounted(v)});
            if let Some(map) = &v.config_map {
                volume["configMap"] = json!({"name": map.name});
                if !map.items.is_empty() {
                    volume["configMap"]["items"] = json!(map.items);
                }
            } else if let Some(claim) = &v.persistent_volume_claim {
                volume["persistentVolumeClaim"] = json!({"claimName": claim.claim_name});
            } else if let Some(image) = &v.image {
                volume["image"] = json!({"reference": image.reference, "pullPolicy": self.site.pull_policy});
            } else if v.archive.is_some() {
                volume["emptyDir"] = json!({});
            }
            volume
        }));
        volumes
    }
}

/// What no container of ours needs.
fn confined() -> Value {
    json!({"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}})
}

/// A container whose health is asked for at a port. Whether a worker hangs is found out by its head, which knows what to
/// expect: one that only computes or compiles for long answers. Killed is what answers nothing for minutes, or does not end
/// after its head has let it go.
fn probed(mut container: Value, port: u16) -> Value {
    let get = |path: &str| json!({"path": path, "port": port});
    container["startupProbe"] = json!({"httpGet": get("/livez"), "periodSeconds": 1, "failureThreshold": 120});
    container["readinessProbe"] = json!({"httpGet": get("/readyz"), "periodSeconds": 10, "timeoutSeconds": 5});
    container["livenessProbe"] =
        json!({"httpGet": get("/livez"), "periodSeconds": 20, "timeoutSeconds": 10, "failureThreshold": 6});
    container
}

/// The name of a user's volume in a pod: never one of ours.
fn mounted(volume: &Volume) -> String {
    format!("v-{}", volume.name).chars().take(63).collect()
}

/// Nobody else's objects have this name: not a user's, and not those of an earlier job of the same name, which are
/// collected some time after it.
pub fn own_name(job: &TrainingJob) -> String {
    let uid = job.metadata.uid.as_deref().unwrap_or_default();
    format!("{}-{}", job.metadata.name.as_deref().unwrap_or_default(), uid.get(..8).unwrap_or(uid))
}

/// Parts of a job in the pod of a worker.
pub fn parts(worker: u32) -> impl Iterator<Item = Name> {
    (worker == 0).then_some(Name::Head).into_iter().chain([Name::Worker(worker)])
}

fn secret_name(job: &TrainingJob, worker: u32) -> String {
    format!("{}-{worker}", own_name(job))
}

/// The secret of one pod: no pod can be taken for another, and of the parts in it each container mounts its own alone.
pub fn secret(job: &TrainingJob, worker: u32, token: &str, certificates: &[(Name, Certificate)]) -> Value {
    let name = job.metadata.name.as_deref().unwrap_or_default();
    let mut data = json!({TOKEN: token});
    for (part, of) in certificates {
        for (file, text) in FILES.iter().zip([&of.authority, &of.certificate, &of.key]) {
            data[format!("{part}.{file}")] = json!(text);
        }
    }
    json!({
        "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
        "metadata": {
            "name": secret_name(job, worker), "namespace": job.metadata.namespace, "ownerReferences": [owner(job)],
            "labels": {"app.kubernetes.io/managed-by": "foreshard-operator", JOB: name},
        },
        "stringData": data,
    })
}

/// What a plan looks like to the API server.
pub fn plan(job: &TrainingJob, spec: &PartitionPlanSpec) -> Value {
    json!({
        "apiVersion": "foreshard.dev/v1alpha1", "kind": "PartitionPlan",
        "metadata": {
            "name": super::decide::plan_name(&spec.job, spec.revision), "namespace": job.metadata.namespace,
            "ownerReferences": [owner(job)],
            "labels": {"app.kubernetes.io/managed-by": "foreshard-operator", JOB: spec.job},
        },
        "spec": spec,
    })
}

fn owner(job: &TrainingJob) -> Value {
    json!({
        "apiVersion": "foreshard.dev/v1alpha1", "kind": "TrainingJob", "name": job.metadata.name,
        "uid": job.metadata.uid, "controller": true, "blockOwnerDeletion": true,
    })
}
