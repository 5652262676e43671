"""Who may run, and where: a queue of Kueue, and nodes with GPUs or TPUs."""

import contextlib
import json
from typing import NamedTuple

from kit import apply, cluster, condition, get, install, items, kubectl, namespace, replaced, state, uids, wait
from scenarios import scenario

# Room for one job of two workers, on nodes of which Kueue knows more than the operator.
QUOTA = """
apiVersion: kueue.x-k8s.io/v1beta2
kind: ResourceFlavor
metadata: {name: second}
spec: {nodeLabels: {kubernetes.io/hostname: node-2}}
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: ClusterQueue
metadata: {name: small}
spec:
  namespaceSelector: {}
  resourceGroups:
    - coveredResources: [cpu, memory]
      flavors:
        - name: second
          resources: [{name: cpu, nominalQuota: 2}, {name: memory, nominalQuota: 3Gi}]
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: LocalQueue
metadata: {name: team, namespace: queue}
spec: {clusterQueue: small}
"""


@contextlib.contextmanager
def kueue():
    try:
        cluster("queue", "on")
        yield
    finally:
        cluster("queue", "off")


def digits(name, steps, *more, labels=""):
    """The sample under another name, on as few nodes as possible."""
    return replaced(
        ("name: digits\nspec", f"name: {name}\n{labels}spec"),
        ("steps: 200\n", f"steps: {steps}\n"),
        ("  placement:\n    maxPerNode: 1\n", ""),
        *more,
    )


def groups(job):
    """Of a job's pods: the groups that Kueue lets in."""
    return {p["metadata"]["labels"]["kueue.x-k8s.io/pod-group-name"] for p in items("pods", "queue", job)}


def admitted(workload):
    found = condition(get("workload", workload, "queue"), "Admitted")
    return found["status"] == "True"


def suspend(job, value):
    patch = json.dumps({"spec": {"suspend": value}})
    kubectl("patch", "trainingjob", job, "-n", "queue", "--type=merge", "-p", patch)


def drain(policy):
    patch = json.dumps({"spec": {"stopPolicy": policy}})
    kubectl("patch", "clusterqueue", "small", "--type=merge", "-p", patch)


@scenario(105)
def queue():
    """Of two jobs in a queue with quota for one, the second waits until the first is suspended; a worker that is lost keeps
    its place, a job that has ended gives it back, and one that Kueue evicts waits again."""
    namespace("queue")
    with kueue():
        kubectl("apply", "-f", "-", manifest=QUOTA)
        labels = "  labels: {kueue.x-k8s.io/queue-name: team}\n"
        apply("queue", "digits", digits("first", 1_000_000, labels=labels))
        state("queue", "first", "Running", 120)
        [group] = groups("first")
        workload = get("workload", group, "queue")
        assert sorted((s["name"], s["count"]) for s in workload["spec"]["podSets"]) == [("head", 1), ("worker", 1)], workload["spec"]
        assert admitted(group), workload["status"]
        # The operator had chosen the other node; Kueue's flavor has this one.
        assert {p["spec"]["nodeName"] for p in items("pods", "queue", "first")} == {"node-2"}
        print([p["spec"]["reason"] for p in items("partitionplans", "queue")])

        apply("queue", "digits", digits("second", 200, labels=labels))
        said = condition(state("queue", "second", "Waiting", 30), "Training")["message"]
        print(said)
        [other] = groups("second")
        assert f"until queue team has quota for 2 workers of 1 cores and 1.00 GiB each; kubectl describe workload {other}" in said, said

        def reserved():
            return condition(get("workload", other, "queue"), "QuotaReserved")["message"]

        print(wait("Kueue says what is missing", 30, lambda: "insufficient unused quota" in reserved() and reserved()))

        before, restarts = uids("queue", "first"), get("trainingjob", "first", "queue")["status"].get("restarts", 0)
        kubectl("delete", "pod", "first-1", "-n", "queue", "--grace-period=0", "--force")
        wait("another pod of the group", 60, lambda: uids("queue", "first").get("first-1", before["first-1"]) != before["first-1"])
        wait("steps go on", 90, lambda: get("trainingjob", "first", "queue")["status"].get("restarts", 0) > restarts)
        state("queue", "first", "Running", 60)
        after = uids("queue", "first")
        assert groups("first") == {group} and after["first-0"] == before["first-0"], (groups("first"), before, after)
        gates = [[g["name"].split("/")[0] for g in p["spec"]["schedulingGates"]] for p in items("pods", "queue", "second")]
        assert len(gates) == 2 and all(set(of) == {"kueue.x-k8s.io"} for of in gates), gates

        suspend("first", True)
        state("queue", "first", "Suspended", 60)
        state("queue", "second", "Complete", 120)
        # Its pods are still there to be read.
        assert items("pods", "queue", "second")
        suspend("first", False)
        state("queue", "first", "Running", 120)

        drain("HoldAndDrain")
        state("queue", "first", "Waiting", 60)
        drain("None")
        state("queue", "first", "Running", 120)

        kubectl("delete", "trainingjobs", "--all", "-n", "queue", "--wait=false")
        gone = lambda: items("pods", "queue") == [] and items("workloads", "queue") == []  # noqa: E731
        wait("pods and workloads are gone", 150, gone)


class Accelerator(NamedTuple):
    """A kind of device, as a cloud tells of it. There is none here: a node claims to have it."""

    namespace: str
    resource: str
    # Of its nodes; the first says what the devices are.
    labels: dict[str, str]
    # The plug-in that would drive it, which the image lacks.
    plugin: str

    @property
    def product(self):
        return next(iter(self.labels.values()))


GPU = Accelerator("gpus", "nvidia.com/gpu", {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}, "xla_cuda_pjrt.so")
# As GKE's nodes are.
TPU = Accelerator(
    "tpus",
    "google.com/tpu",
    {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "2x4"},
    "libtpu.so",
)


def offer(kind, n):
    """So many on the second node, as its device plug-in would tell; `None`: not even a place for them."""
    amount = {kind.resource: n if n is None else str(n)}
    patch = json.dumps({"status": {"capacity": amount, "allocatable": amount}})
    kubectl("patch", "node", "node-2", "--subresource=status", "--type=merge", "-p", patch)


@contextlib.contextmanager
def node_with(kind):
    """The second node has one of the devices, and the labels and the taint that come with it. Nothing computes there but its
    cores."""
    offer(kind, 1)
    kubectl("label", "node", "node-2", *[f"{label}={value}" for label, value in kind.labels.items()])
    kubectl("taint", "node", "node-2", f"{kind.resource}=present:NoSchedule")
    try:
        yield
    finally:
        kubectl("taint", "node", "node-2", f"{kind.resource}-")
        kubectl("label", "node", "node-2", *[f"{label}-" for label in kind.labels])
        offer(kind, None)
        install()


def plugin(kind, file):
    """The operator believes this file of its image to drive the devices."""
    name = kind.resource.replace(".", "\\.")
    install("--set", f"image.plugins.{name}=/usr/local/lib/foreshard/{file}")


def on(kind, name, steps, least=1):
    devices = f"    cores: 1\n    devices: [{{name: {kind.resource}, min: {least}, max: 4}}]\n"
    return digits(name, steps, ("  parallelism:\n    shards: 2\n", ""), ("    cores: 1\n", devices))


def failed(kind, job, reason):
    found = condition(state(kind.namespace, job, "Failed", 120), "Failed")
    print(f"{found['reason']}: {found['message']}")
    assert found["reason"] == reason, found
    return found["message"]


def claimed(kind):
    """Jobs get the node that claims to have the devices, and no more than there are; without a plug-in they say what is
    missing."""
    namespace(kind.namespace)
    resource = kind.resource
    with node_with(kind):
        apply(kind.namespace, "digits", on(kind, "unknown", 200))
        assert f"has no PJRT plug-in for {resource}" in failed(kind, "unknown", "NoPlugin")

        # The one for CPUs stands in: where pods run and what they ask for is as with any other.
        plugin(kind, "xla_cpu_pjrt.so")
        apply(kind.namespace, "digits", on(kind, "first", 1_000_000))
        job = state(kind.namespace, "first", "Running", 120)
        [pod] = items("pods", kind.namespace, "first")
        assert pod["spec"]["nodeName"] == "node-2", pod["spec"]["nodeName"]
        assert {"key": resource, "operator": "Exists"} in pod["spec"]["tolerations"], pod["spec"]["tolerations"]
        containers = {c["name"]: c["resources"] for c in pod["spec"]["initContainers"] + pod["spec"]["containers"]}
        worker = containers.pop("runtime")
        assert worker["requests"][resource] == worker["limits"][resource] == "1", worker
        assert resource not in json.dumps(containers), containers
        [seat] = get("partitionplan", job["status"]["plan"], kind.namespace)["spec"]["shards"]
        assert (seat["device"], seat["product"]) == (resource, kind.product), seat

        apply(kind.namespace, "digits", on(kind, "second", 1_000_000))
        said = condition(state(kind.namespace, "second", "Waiting", 30), "Placed")["message"]
        print(said)
        assert f"one {resource} each: there is room for 0 on 1 nodes" in said and f"and 0 {resource}" in said, said
        offer(kind, 2)
        state(kind.namespace, "second", "Running", 120)

        kubectl("delete", "trainingjobs", "--all", "-n", kind.namespace, "--wait=false")
        wait("both are gone", 150, lambda: items("pods", kind.namespace) == [])
        offer(kind, None)
        apply(kind.namespace, "digits", on(kind, "nowhere", 200))
        said = condition(state(kind.namespace, "nowhere", "Waiting", 30), "Placed")["message"]
        print(said)
        assert f"no node has {resource}" in said, said
        kubectl("delete", "trainingjob", "nowhere", "-n", kind.namespace, "--wait=false")
        offer(kind, 2)
        plugin(kind, kind.plugin)
        apply(kind.namespace, "digits", on(kind, "missing", 200, least=2))
        said = failed(kind, "missing", "NoDevice")
        assert f"on node node-2 cannot use {resource}, its plug-in is not there" in said and kind.plugin in said, said


@scenario(50)
def gpus():
    """Jobs on GPUs, on a node with the label and the taint of their vendor's plug-in."""
    claimed(GPU)


@scenario(50)
def tpus():
    """Jobs on TPUs, on a node as GKE makes them."""
    claimed(TPU)
